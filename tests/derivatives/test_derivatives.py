"""softmax_jax.derivatives: against autodiff of jax.nn and optax, the oracle and mpmath."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import oracle
import pytest
from oracle import random, relative_error, wide

import softmax_jax
from softmax_jax import derivatives

MATRICES = (
  "softmax_jacobian",
  "log_softmax_jacobian",
  "logsumexp_hessian",
  "cross_entropy_hessian",
)
PRODUCTS = ("softmax_jvp", "softmax_vjp", "softmax_hvp", "cross_entropy_hvp")
GRADIENTS = ("integer_gradient", "soft_gradient")


def functions(x, y_bar, x_dot, labels, probabilities):
  """Every function of the module at the same arguments, each as a function of x alone."""
  d = derivatives
  return {
    **{name: getattr(d, name) for name in MATRICES},
    "softmax_jvp": lambda x: d.softmax_jvp(x, x_dot),
    "softmax_vjp": lambda x: d.softmax_vjp(x, y_bar),
    "softmax_hvp": lambda x: d.softmax_hvp(x, y_bar, x_dot),
    "cross_entropy_hvp": lambda x: d.cross_entropy_hvp(x, x_dot),
    "integer_gradient": lambda x: d.cross_entropy_gradient(x, labels),
    "soft_gradient": lambda x: d.cross_entropy_gradient(x, probabilities),
  }


@jax.jit
def closed_forms(x, *args):
  return {name: f(x) for name, f in functions(x, *args).items()}


@functools.partial(jax.jit, static_argnums=0)
def further(mode, x, *args):
  """The closed forms differentiated once more; one row."""
  return {name: mode(f)(x) for name, f in functions(x, *args).items()}


gradient = jax.jit(derivatives.cross_entropy_gradient)


def arguments(seed, shape, dtype=np.float32, scale=3.0):
  """x, y_bar, x_dot, labels, and labels as numbers that do not sum to one."""
  x, y_bar, x_dot, t = (
    jnp.asarray(random(seed + i, shape, np.float64, s).astype(dtype))
    for i, s in enumerate((scale, 2.0, 3.0, 1.0))
  )
  labels = np.random.default_rng(seed).integers(0, max(shape[-1], 1), shape[:-1], np.int32)
  return x, y_bar, x_dot, labels, abs(t)


def by_autodiff(x, y_bar, x_dot, label, t):
  """The same for one row, by JAX's own derivatives of jax.nn and optax; each in both modes."""
  soft = lambda x: optax.softmax_cross_entropy(x, t)
  integer = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, label)
  vjp = lambda x: jax.vjp(jax.nn.softmax, x)[1](y_bar)[0]
  hessians = lambda f: (jax.jacfwd(jax.jacrev(f))(x), jax.jacrev(jax.jacrev(f))(x))
  both = lambda f: (jax.jacfwd(f)(x), jax.jacrev(f)(x))
  jvp = lambda f: jax.jvp(f, (x,), (x_dot,))[1]
  return {
    "softmax_jacobian": both(jax.nn.softmax),
    "log_softmax_jacobian": both(jax.nn.log_softmax),
    "logsumexp_hessian": hessians(jax.nn.logsumexp),
    "cross_entropy_hessian": hessians(integer),
    "softmax_jvp": (jvp(jax.nn.softmax),),
    "softmax_vjp": (vjp(x),),
    "softmax_hvp": (jvp(vjp), jax.jacrev(vjp)(x) @ x_dot),
    "cross_entropy_hvp": (jvp(jax.grad(integer)), jvp(jax.grad(soft)) / t.sum()),
    "integer_gradient": both(integer),
    "soft_gradient": both(soft),
  }


def by_oracle(x, y_bar, x_dot, labels, t):
  """The same, for any batch, in extended precision."""
  shape, K = x.shape, x.shape[-1]
  rows = [wide(v).reshape(-1, K) for v in (x, y_bar, x_dot, t)]
  results = {name: [] for name in functions(x, y_bar, x_dot, labels, t)}
  for z, c, v, t_row, label in zip(*rows, np.reshape(labels, -1), strict=True):
    j = oracle.jacobian("softmax", z)
    of_labels = lambda t, z=z: oracle.linearize("softmax_cross_entropy", z, t)[2](1.0)[0]
    row = {
      **dict.fromkeys(MATRICES, j),
      "log_softmax_jacobian": oracle.jacobian("log_softmax", z),
      **dict.fromkeys(("softmax_jvp", "cross_entropy_hvp"), j @ v),
      "softmax_vjp": c @ j,
      "softmax_hvp": np.einsum("ijk,i,k->j", oracle.hessian("softmax", z), c, v),
      "integer_gradient": of_labels(wide(np.arange(K) == label)),
      "soft_gradient": of_labels(t_row),
    }
    for name, value in row.items():
      results[name].append(value)
  return {
    name: np.array(value, np.longdouble).reshape(shape + (K,) * (name in MATRICES))
    for name, value in results.items()
  }


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

  # Vectors and labels of another dtype lose nothing: bfloat16 and integers are exact in float32.
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


# Rows in which the textbook formulas lose some or all digits in float32, K = 6 each.
ROWS = {
  "mild": [0.3, -1.2, 2.1, 0.7, -0.4, 1.9],
  "nearly uniform": [0.01, -0.02, 0.015, 0.0, 0.003, 0.0121],
  "uniform": [7.0] * 6,
  "confident": [30.0, 0.0, 1.0, -2.0, 0.5, 0.25],
  "more confident": [-4.0, 0.5, -3.0, 80.0, 1.0, 2.0],
  "inexact difference": [0.7771234, 83.123456, -0.3330011, 2.7182817, -1.414213, 1.23456],
  "far from zero": [1e4, 1e4 - 40, 1e4 - 41.5, 1e4 - 38, 1e4 - 50, 1e4 - 39],
  "two tied": [50.1, 0.3, 50.1, -3.0, 1.0, 2.0],
  "two nearly tied": [50.1, 0.3, 50.100006, -3.0, 1.0, 2.0],
  "three likely": [50.1, 0.3, 49.4, -3.0, 50.7, 2.0],
  "all but one": [60.0, 60.5, 61.0, 60.25, -20.0, 60.75],
}
# Vectors that make a sum of a_k v_k in float32 cancel: a shift, an outlier, a one-hot.
VECTORS = {
  "random": lambda k, v: v,
  "shifted": lambda k, v: v + 1e4,
  "one-hot at the largest": lambda k, v: np.arange(len(v)) == k,
  "one-hot elsewhere": lambda k, v: np.arange(len(v)) == (k + 1) % len(v),
  "outlier at the largest": lambda k, v: v + 1e3 * (np.arange(len(v)) == k),
  "constant where likely": lambda k, v: np.where(np.arange(len(v)) % 2 == 0, 1e4, v),
}


def by_definition(z, c, v, label, t):
  """One row in 80 digits, straight from the definitions. Also |a p|, the scale of softmax_hvp."""
  with mpmath.workdps(80):
    z, c, v, t = ([mpmath.mpf(float(i)) for i in row] for row in (z, c, v, t))
    K = range(len(z))
    dot = lambda p, q: mpmath.fsum(i * j for i, j in zip(p, q, strict=True))
    s = mpmath.fsum(map(mpmath.exp, z))
    a = [mpmath.exp(i) / s for i in z]
    times_j = lambda v: [a[i] * (v[i] - dot(a, v)) for i in K]
    a_dot = times_j(v)
    j = [[a[i] * ((i == k) - a[k]) for k in K] for i in K]
    rows = {
      **dict.fromkeys(MATRICES, j),
      "log_softmax_jacobian": [[(i == k) - a[k] for k in K] for i in K],
      **dict.fromkeys(("softmax_jvp", "cross_entropy_hvp"), a_dot),
      "softmax_vjp": times_j(c),
      "softmax_hvp": [a_dot[i] * (c[i] - dot(a, c)) - a[i] * dot(a_dot, c) for i in K],
      "integer_gradient": [a[i] - (i == label) for i in K],
      "soft_gradient": [a[i] * mpmath.fsum(t) - t[i] for i in K],
    }
    scale = [a[i] * (c[i] - dot(a, c)) * (v[i] - dot(a, v)) for i in K]
    to_array = lambda v: np.array(v, dtype=object).astype(np.longdouble)
    return {name: to_array(v) for name, v in rows.items()}, np.linalg.norm(to_array(scale))


@pytest.mark.without("disable_jit")  # op by op, what corrects an e of 1e-36 is flushed to 0
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("label", ["largest", "other"])
def test_rows_that_lose_digits(vector, label):
  """A few u of the norm of each row's own result, whatever its size; u = 2**-24."""
  x = np.array(list(ROWS.values()), np.float32)
  k = x.argmax(-1)
  noise = random(5, (2, *x.shape))
  c, v = (
    np.stack([VECTORS[vector](*pair) for pair in zip(k, n, strict=True)]).astype(np.float32)
    for n in noise
  )
  labels = k if label == "largest" else (k + 1) % x.shape[-1]
  # A label that is sure, and one that sums to 2 and spares no class.
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
  """The row sums do not wear out: 20,000 classes, a few u of the norm."""
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
  # Some with a batch of their own, the others shared.
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


# --- infinities, NaN and labels that do not exist ------------------------------------------------


@pytest.mark.parametrize("i", [0, 2])
def test_minus_infinity_has_probability_zero(i):
  """The entry might as well not be there; further derivatives are exactly 0 there too."""
  x, c, v, _, t = arguments(17, (6,))
  x, t, label = x.at[i].set(-jnp.inf), t.at[i].set(0), np.array(1, np.int32)
  keep = np.arange(6) != i
  alone = closed_forms(*(a[keep] for a in (x, c, v)), label - (i < 1), t[keep])
  modes = {mode: further(mode, x, c, v, label, t) for mode in (jax.jacfwd, jax.jacrev)}
  for name, value in closed_forms(x, c, v, label, t).items():
    inside = np.ix_(keep, keep) if name in MATRICES else keep
    assert relative_error(value[inside], alone[name]) < 4 * 2**-24, name
    for by_x in modes.values():
      assert np.all(np.isfinite(by_x[name])), name
      np.testing.assert_array_equal(by_x[name][..., i], 0)
    if name == "log_softmax_jacobian":
      np.testing.assert_array_equal(value[:, i], np.eye(6)[i])
      peer = jax.jit(jax.jacrev(jax.nn.log_softmax))(x)
      assert relative_error(value, peer) < 4 * 2**-24
    else:
      np.testing.assert_array_equal(value[i], 0)
      np.testing.assert_array_equal(value[..., i], 0)


def test_label_of_minus_infinity():
  x = jnp.array([0.0, -jnp.inf, 0.0])
  for label in (1, jnp.array([0.0, 1.0, 0.0])):
    np.testing.assert_array_equal(gradient(x, label), [0.5, -1.0, 0.5])


@pytest.mark.without("debug_nans", "enable_x64")
@pytest.mark.parametrize("bad", ["nan", "inf", "two inf", "-inf alone"])
def test_a_bad_row_is_nan_and_touches_no_other(bad):
  args = arguments(18, (3, 4))
  good = closed_forms(*args)
  row = {"nan": [1, np.nan, 2, 0], "inf": [1, np.inf, 2, 0], "two inf": [np.inf, 0, np.inf, 1]}
  x = args[0].at[1].set(jnp.array(row.get(bad, [-np.inf] * 4)))
  for name, value in closed_forms(x, *args[1:]).items():
    expected = np.array(good[name])
    expected[1] = 0 if name == "logsumexp_hessian" and bad == "-inf alone" else np.nan
    np.testing.assert_array_equal(value, expected, err_msg=name)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_class(bad):
  args = arguments(19, (2, 1))
  x = jnp.array([[3.0], [bad]])
  for name, value in closed_forms(x, *args[1:]).items():
    expected = 0 if name == "logsumexp_hessian" and bad == -np.inf else np.nan
    np.testing.assert_array_equal(value.ravel(), [0, expected], err_msg=name)


def test_further_derivatives_of_minus_infinity_alone():
  x, *args = arguments(22, (6,))
  for mode in (jax.jacfwd, jax.jacrev):
    value = further(mode, jnp.full_like(x, -jnp.inf), *args)["logsumexp_hessian"]
    np.testing.assert_array_equal(value, np.zeros((6, 6, 6)))


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_labels_out_of_range(dtype):
  x = arguments(20, (4, 3))[0]
  info = np.iinfo(dtype)
  labels = np.array([1, info.max, 3, info.min], dtype)
  values = np.asarray(gradient(x, labels))
  for is_nan in (np.isnan(values).all(-1), np.isnan(values).any(-1)):
    np.testing.assert_array_equal(is_nan, [False, True, True, info.min != 0])
  np.testing.assert_array_equal(values[0], gradient(x, np.ones(4, np.int32))[0])


@pytest.mark.without("debug_nans")
def test_labels_of_a_narrow_dtype():
  """100 in int8 is class 100 of 300, and -1 is none of them."""
  x = arguments(21, (2, 300))[0]
  values = gradient(x, np.array([100, -1], np.int8))
  expected = gradient(x, (np.arange(300) == [[100], [0]]).astype(np.float32))
  np.testing.assert_array_equal(values[0], expected[0])
  assert np.all(np.isnan(values[1]))


# --- errors --------------------------------------------------------------------------------------

X = np.zeros((2, 3), np.float32)
REAL, BOOL, COMPLEX = np.zeros(3, np.float32), np.zeros(3, bool), np.zeros(3, np.complex64)
OF_X = {
  "softmax_jacobian": 0,
  "softmax_jvp": 1,
  "softmax_vjp": 1,
  "softmax_hvp": 2,
  "log_softmax_jacobian": 0,
  "logsumexp_hessian": 0,
}
OF_LOGITS = {"cross_entropy_gradient": 1, "cross_entropy_hessian": 0, "cross_entropy_hvp": 1}


def assert_raises(error, message, f, *args):
  with pytest.raises(error) as raised:
    f(*args)
  assert str(raised.value) == message


def test_every_public_function_is_tested():
  assert set(derivatives.__all__) == OF_X.keys() | OF_LOGITS.keys()


@pytest.mark.parametrize("name", OF_X | OF_LOGITS)
def test_errors_of_the_logits(name):
  f = getattr(derivatives, name)
  x = "x" if name in OF_X else "logits"
  others = [REAL] * (OF_X | OF_LOGITS)[name]
  assert_raises(
    ValueError,
    f"{name} expected {x} of shape [*B, K] with at least one axis, got shape (). "
    f"Pass {x}.reshape(1).",
    *(f, np.float32(1.0), *others),
  )
  for wrong in (BOOL, COMPLEX):
    kind = "real" if name in OF_X else "floating"
    message = f"{name} expected {x} of a {kind} dtype, got dtype {wrong.dtype}."
    assert_raises(TypeError, message, f, wrong, *others)
  assert_raises(
    TypeError,
    f"{name} expected {x} to be an array, got list. Pass jnp.asarray({x}).",
    *(f, [1.0, 2.0, 3.0], *others),
  )
  if name in OF_LOGITS:
    assert_raises(
      TypeError,
      f"{name} expected logits of a floating dtype, got dtype int32. "
      f"Pass logits.astype(jnp.float32).",
      *(f, np.zeros(3, np.int32), *others),
    )


@pytest.mark.parametrize(
  ("name", "vector", "of"),
  [
    ("softmax_jvp", "x_dot", "x"),
    ("softmax_vjp", "y_bar", "x"),
    ("softmax_hvp", "y_bar", "x"),
    ("softmax_hvp", "x_dot", "x"),
    ("cross_entropy_hvp", "x_dot", "logits"),
  ],
)
def test_errors_of_the_vectors(name, vector, of):
  second = (name, vector) == ("softmax_hvp", "x_dot")
  others = {"y_bar": X} if second else {"x_dot": X} if name == "softmax_hvp" else {}
  f = lambda wrong: getattr(derivatives, name)(X, **others, **{vector: wrong})
  for shape in ((3,), (1, 3), (2, 1), (2, 3, 1), ()):
    assert_raises(
      ValueError,
      f"{name} expected {vector} of the shape of {of}, (2, 3), got shape {shape}. "
      f"Broadcast it with jnp.broadcast_to({vector}, {of}.shape).",
      *(f, np.zeros(shape, np.float32)),
    )
  for wrong in (X > 0, X + 0j):
    assert_raises(
      TypeError,
      f"{name} expected {vector} of a real dtype, got dtype {wrong.dtype}.",
      *(f, wrong),
    )


@pytest.mark.parametrize(
  ("labels", "error", "message"),
  [
    (
      np.zeros(3, np.int32),
      ValueError,
      "integer labels of shape (2,), one class index per row of logits of shape (2, 3), got shape "
      "(3,). Probabilities need a floating dtype.",
    ),
    (
      np.zeros((2, 3), np.int32),
      ValueError,
      "integer labels of shape (2,), one class index per row of logits of shape (2, 3), got shape "
      "(2, 3). Probabilities need a floating dtype.",
    ),
    (
      np.zeros(2, np.float32),
      ValueError,
      "probabilities as labels to have the shape of logits, (2, 3), got shape (2,). Class indices "
      "need an integer dtype.",
    ),
    (
      np.zeros(3, np.float32),
      ValueError,
      "probabilities as labels to have the shape of logits, (2, 3), got shape (3,). Class indices "
      "need an integer dtype.",
    ),
    (X > 0, TypeError, "labels of a real dtype, got dtype bool."),
    (X + 0j, TypeError, "labels of a real dtype, got dtype complex64."),
    ([0, 1], TypeError, "labels to be an array, got list. Pass jnp.asarray(labels)."),
  ],
)
def test_errors_of_the_labels(labels, error, message):
  message = f"cross_entropy_gradient expected {message}"
  assert_raises(error, message, derivatives.cross_entropy_gradient, X, labels)
