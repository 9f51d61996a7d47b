"""softmax_jax.derivatives: against autodiff of jax.nn and optax, the oracle and mpmath."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from closed_forms import (
  MATRICES,
  PRODUCTS,
  arguments,
  by_autodiff,
  by_oracle,
  closed_forms,
  functions,
  further,
)
from oracle import random, relative_error, wide
from rows_that_cancel import ROWS, VECTORS, by_definition

import softmax_jax
from softmax_jax import derivatives


def test_autodiff_of_jax_nn_and_optax():
  with jax.enable_x64(True):
    args = arguments(0, (3, 4), np.float64)
    peers = jax.jit(jax.vmap(by_autodiff))(*args)
    for name, value in closed_forms(*args).items():
      for peer in peers[name]:
        assert relative_error(value, peer) < 1e-14, name


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 5), (2, 3, 4), (2, 1, 2, 3), (0, 4), (3, 0)])
def test_shapes(shape):
  args = arguments(1, shape)
  expected = by_oracle(*args) if shape[-1] else {}
  for name, value in closed_forms(*args).items():
    assert value.shape == shape + shape[-1:] * (name in MATRICES), name
    assert value.dtype == jnp.float32, name
    if value.size:
      assert relative_error(value, expected[name]) < 4 * 2**-24, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(dtype):
  with jax.enable_x64(dtype == "float64"):
    args = arguments(2, (3, 5), jnp.dtype(dtype), scale=2.0)
    eps = float(jnp.finfo(dtype).eps)
    # Sixteen bits are rounded once, at the end.
    bound = 0.51 * eps if jnp.finfo(dtype).bits == 16 else 4 * eps
    expected = by_oracle(*args)
    for name, value in closed_forms(*args).items():
      assert value.dtype == dtype, name
      assert relative_error(value, expected[name]) < bound, name


def test_dtype_of_the_logits_decides():
  x, y_bar, x_dot, labels, t = arguments(3, (2, 4))
  half = x.astype(jnp.bfloat16)
  expected = by_oracle(half, y_bar, x_dot, labels, t)
  for name, value in closed_forms(half, y_bar, x_dot, labels, t).items():
    assert value.dtype == jnp.bfloat16, name
    assert relative_error(value, expected[name]) < 0.51 * 2**-7, name

  # Vectors and labels of another dtype lose no digits: bfloat16 and integers are exact in float32.
  for vectors in (
    [v.astype(jnp.bfloat16) for v in (y_bar, x_dot)],
    [v.round().astype(jnp.int8) for v in (y_bar, x_dot)],
  ):
    args = (x, *vectors, labels, t.astype(jnp.bfloat16))
    expected = by_oracle(*args)
    for name, value in closed_forms(*args).items():
      assert value.dtype == jnp.float32, name
      assert relative_error(value, expected[name]) < 4 * 2**-24, name
  with jax.enable_x64(True):
    wider = [v.astype(jnp.float64) for v in (y_bar, x_dot)]
    value = jax.jit(derivatives.softmax_hvp)(x, *wider)
    assert value.dtype == jnp.float32
    expected = by_oracle(x, *wider, labels, t)["softmax_hvp"]
    assert relative_error(value, expected.astype(np.float32)) < 1e-9  # rounded once, at the end


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_integer_logits_become_floats(dtype):
  x = np.array([[1, 0, 127], [3, 3, 5]], dtype)  # differences that would wrap
  _, y_bar, x_dot, _, _ = arguments(4, x.shape)
  for f, vectors in (
    (derivatives.softmax_jacobian, ()),
    (derivatives.log_softmax_jacobian, ()),
    (derivatives.logsumexp_hessian, ()),
    (derivatives.softmax_jvp, (x_dot,)),
    (derivatives.softmax_vjp, (y_bar,)),
    (derivatives.softmax_hvp, (y_bar, x_dot)),
  ):
    value = f(x, *vectors)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, f(x.astype(np.float32), *vectors))


@pytest.mark.without("disable_jit")  # op by op, what corrects an e of 1e-36 is flushed to 0
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("label", ["largest", "other"])
def test_rows_that_lose_digits(vector, label):
  """Errors are a few u of the norm of each row's own result, whatever its size; u = 2**-24."""
  x = np.array(list(ROWS.values()), np.float32)
  k = x.argmax(-1)
  noise = random(5, (2, *x.shape))
  c, v = (
    np.stack([VECTORS[vector](*pair) for pair in zip(k, n, strict=True)]).astype(np.float32)
    for n in noise
  )
  labels = k if label == "largest" else (k + 1) % x.shape[-1]
  # A one-hot label, and one that sums to 2 and has no zero.
  sure = np.where(np.arange(x.shape[-1]) == labels[:, None], 1, 1e-9 * abs(noise[0]))
  t = sure if label == "largest" else 2 * sure + 0.1 * abs(noise[1])
  t = t.astype(np.float32)

  values = closed_forms(x, c, v, labels, t)
  for i, row in enumerate(ROWS):
    expected, scale = by_definition(x[i], c[i], v[i], labels[i], t[i])
    for name, value in values.items():
      size = scale if name == "softmax_hvp" else np.linalg.norm(expected[name])
      difference = np.linalg.norm(wide(value[i]) - expected[name])
      assert size > 0, (name, row)
      assert difference <= 6 * 2**-24 * size, (name, row, float(difference / size * 2**24))


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_many_classes(scale):
  """Rounding does not accumulate in row sums: 20,000 classes, a few u of the norm."""
  K = 20_000
  x = random(6, K, scale=scale)
  k = x.argmax()
  a = np.exp(wide(x) - wide(x).max())
  a /= a.sum()
  f = jax.jit(derivatives.softmax_vjp)
  for vector, build in VECTORS.items():
    c = build(k, random(7, K)).astype(np.float32)
    centered = wide(c) - np.sum(a * wide(c))
    expected = a * (centered - np.sum(a * centered))
    assert relative_error(f(x, c), expected) < 8 * 2**-24, vector


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_further_derivatives(mode):
  with jax.enable_x64(True):
    args = arguments(8, (4,), np.float64)
    x, y_bar, x_dot, _, t = args
    values = further(mode, *args)
    peers = by_oracle(*args)
    third = jax.jacfwd(jax.jacrev(jax.jacfwd(jax.nn.softmax)))(x)
    hessian = oracle.hessian("softmax", x)
    expected = {
      **dict.fromkeys(MATRICES, hessian),
      "log_softmax_jacobian": oracle.hessian("log_softmax", x),
      **dict.fromkeys(("softmax_jvp", "cross_entropy_hvp"), hessian @ wide(x_dot)),
      "softmax_vjp": np.einsum("ijk,i->jk", hessian, wide(y_bar)),
      "softmax_hvp": jnp.einsum("ijkl,i,k->jl", third, y_bar, x_dot),
      "integer_gradient": peers["cross_entropy_hessian"],
      "soft_gradient": peers["cross_entropy_hessian"] * np.sum(wide(t)),
    }
    for name, value in values.items():
      assert relative_error(value, expected[name]) < 1e-13, name


@pytest.mark.without("disable_jit")  # op by op, what corrects an e of 1e-36 is flushed to 0
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("row", ["confident", "inexact difference", "all but one"])
def test_further_derivatives_keep_the_digits(mode, row):
  x = np.array(ROWS[row], np.float32)
  args = (x, *arguments(9, x.shape)[1:])
  values = further(mode, *args)
  j = by_definition(*args)[0]["softmax_jacobian"]
  hessian = oracle.hessian("softmax", x)
  for name, expected in {
    "integer_gradient": j,
    "soft_gradient": j * np.sum(wide(args[-1])),
    "softmax_jacobian": hessian,
    "log_softmax_jacobian": oracle.hessian("log_softmax", x),
    "cross_entropy_hessian": hessian,
  }.items():
    assert relative_error(values[name], expected) < 8 * 2**-24, name


# --- structure -----------------------------------------------------------------------------------


def test_symmetry_row_sums_and_eigenvalues():
  x = np.array(list(ROWS.values()), np.float32)
  _, c, v, labels, t = arguments(10, x.shape)
  values = closed_forms(x, c, v, labels, t)
  for name in ("softmax_jacobian", "logsumexp_hessian", "cross_entropy_hessian"):
    j = values[name]
    np.testing.assert_array_equal(j, jnp.matrix_transpose(j))
    j = np.asarray(j, np.float64)
    norm = np.linalg.norm(j, axis=(-2, -1))
    assert np.all(norm > 0)
    assert np.all(abs(j.sum(-1)).max(-1) <= 2 * 2**-24 * norm)
    assert np.all(np.linalg.eigvalsh(j).min(-1) >= -2 * 2**-24 * norm)
  p = np.asarray(values["log_softmax_jacobian"], np.float64)
  assert np.all(abs(p.sum(-1)) <= 4 * 2**-24)
  assert relative_error(p @ p, p) < 4 * 2**-24
  for name in (*PRODUCTS, "integer_gradient"):
    value = np.asarray(values[name], np.float64)
    assert np.all(abs(value.sum(-1)) <= 4 * 2**-24 * np.linalg.norm(value, axis=-1)), name


def test_products_are_the_matrices_times_vectors():
  with jax.enable_x64(True):
    x, c, v, labels, t = arguments(11, (3, 4), np.float64)
    f = closed_forms(x, c, v, labels, t)
    j = f["softmax_jacobian"]
    np.testing.assert_array_equal(f["cross_entropy_hvp"], f["softmax_jvp"])
    assert relative_error(f["softmax_jvp"], jnp.einsum("...ij,...j->...i", j, v)) < 1e-14
    assert relative_error(f["softmax_vjp"], jnp.einsum("...i,...ij->...j", c, j)) < 1e-14
    exchanged = closed_forms(x, v, c, labels, t)["softmax_hvp"]
    assert relative_error(f["softmax_hvp"], exchanged) < 1e-14


def sizes_of_intermediates(jaxpr):
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for parameter in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ):
      if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
        yield from sizes_of_intermediates(getattr(parameter, "jaxpr", parameter))


def test_products_never_build_a_matrix():
  K = 64
  args = arguments(12, (3, K))
  for name, f in functions(*args).items():
    largest = max(sizes_of_intermediates(jax.make_jaxpr(f)(args[0]).jaxpr))
    assert largest == (3 * K * K if name in MATRICES else 3 * K), name
    if name not in MATRICES:
      compiled = jax.jit(f).lower(args[0]).compile()
      assert compiled.memory_analysis().temp_size_in_bytes < 4 * K * K, name


# --- transformations -----------------------------------------------------------------------------


def test_vmap_over_every_argument():
  args = arguments(13, (3, 4))
  expected = closed_forms(*args)
  for name, value in jax.jit(jax.vmap(closed_forms))(*args).items():
    np.testing.assert_array_equal(value, expected[name])
  # Some arguments batched, the others shared.
  for mapped in ((0, 2, 4), (1, 3)):
    of = lambda r, mapped=mapped: [a[r if i in mapped else 0] for i, a in enumerate(args)]
    in_axes = [a.ndim - 1 if i in mapped else None for i, a in enumerate(args)]
    batched = [jnp.moveaxis(a, 0, -1) if i in mapped else a[0] for i, a in enumerate(args)]
    values = jax.jit(jax.vmap(closed_forms, in_axes))(*batched)
    rows = [closed_forms(*of(r)) for r in range(3)]
    for name, value in values.items():
      assert relative_error(value, jnp.stack([row[name] for row in rows])) < 4 * 2**-24, name


def test_linear_in_the_vectors():
  """Both modes by y_bar, x_dot and the labels, and the transpose that a custom_vjp rule needs."""

  @jax.jit
  def matrices(x, c, v, t):
    d = derivatives
    cases = [
      (functools.partial(d.softmax_jvp, x), v),
      (functools.partial(d.softmax_vjp, x), c),
      (functools.partial(d.cross_entropy_hvp, x), v),
      (lambda c: d.softmax_hvp(x, c, v), c),
      (lambda v: d.softmax_hvp(x, c, v), v),
      (functools.partial(d.cross_entropy_gradient, x), t),
    ]
    transpose = lambda f, at: jax.vmap(jax.linear_transpose(f, at))(jnp.eye(4))[0]
    return [(jax.jacfwd(f)(at), jax.jacrev(f)(at), transpose(f, at)) for f, at in cases]

  with jax.enable_x64(True):
    x, c, v, _, t = arguments(14, (4,), np.float64)
    j = oracle.jacobian("softmax", x)
    hessian = oracle.hessian("softmax", x)
    a = oracle.linearize("softmax", x)[0]
    by_c, by_v = hessian @ wide(v), np.einsum("ijk,i->jk", hessian, wide(c))
    expected = (j, j, j, by_c.T, by_v, a[:, None] - np.eye(4))
    for case, e in zip(matrices(x, c, v, t), expected, strict=True):
      for matrix in case:
        assert relative_error(matrix, e) < 1e-14


def test_as_the_rule_of_a_custom_vjp_function():
  rule = jax.custom_vjp(lambda x: jax.nn.softmax(x))
  rule.defvjp(
    lambda x: (jax.nn.softmax(x), x), lambda x, y_bar: (derivatives.softmax_vjp(x, y_bar),)
  )
  softmax = softmax_jax.enable_forward_mode(rule)
  modes = (jax.jacfwd, jax.jacrev)
  with jax.enable_x64(True):
    x = arguments(15, (4,), np.float64)[0]
    j, hessian = oracle.jacobian("softmax", x), oracle.hessian("softmax", x)
    for value in jax.jit(lambda x: [mode(softmax)(x) for mode in modes])(x):
      assert relative_error(value, j) < 1e-14
    for value in jax.jit(lambda x: [o(i(softmax))(x) for i in modes for o in modes])(x):
      assert relative_error(value, hessian) < 1e-14


def test_our_own_functions_agree():
  @jax.jit
  def derivatives_of_ours(x, c, v):
    return {
      "softmax_jacobian": jax.jacfwd(softmax_jax.softmax)(x),
      "log_softmax_jacobian": jax.jacrev(softmax_jax.log_softmax)(x),
      "logsumexp_hessian": jax.hessian(softmax_jax.logsumexp)(x),
      "softmax_jvp": jax.jvp(softmax_jax.softmax, (x,), (v,))[1],
      "softmax_vjp": jax.vjp(softmax_jax.softmax, x)[1](c)[0],
    }

  with jax.enable_x64(True):
    args = arguments(16, (4,), np.float64)
    ours, closed = derivatives_of_ours(*args[:3]), closed_forms(*args)
    for name, value in ours.items():
      assert relative_error(value, closed[name]) < 1e-14, name
    # logsumexp of -inf alone is -inf with derivative 0, and a Hessian of 0.
    args = (jnp.full_like(args[0], -jnp.inf), *args[1:])
    for values in (derivatives_of_ours(*args[:3]), closed_forms(*args)):
      np.testing.assert_array_equal(values["logsumexp_hessian"], np.zeros((4, 4)))
