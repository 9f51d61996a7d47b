"""softmax, log_softmax, logsumexp: values and derivatives against the oracle and jax.nn."""

import functools
import inspect

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import check, default_promotion, random, relative_error

from softmax_jax import log_softmax, logsumexp, softmax

FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)


@every_function
def test_signature_starts_as_its_peer(name):
  ours, peer = (inspect.signature(f).parameters for f in (FUNCTIONS[name], getattr(jax.nn, name)))
  for p, q in zip(ours.values(), peer.values(), strict=False):
    assert (p.name, p.kind, p.default) == (q.name, q.kind, q.default)
  assert len(ours) >= len(peer)


@every_function
@pytest.mark.parametrize(
  ("shape", "axis"),
  [
    ((), None),
    ((), ()),
    ((1,), 0),
    ((5,), -1),
    ((3, 1), -1),
    ((0, 4), -1),
    ((4, 3), 0),
    ((4, 3), ()),
    ((2, 3, 4), 1),
    ((2, 3, 4), (0, -1)),
    ((2, 3, 2, 4), -2),
    ((2, 3, 2, 4), (-1, 1)),
  ],
)
def test_shapes_and_axes(name, shape, axis):
  x = random(0, shape, scale=3)
  check(name, FUNCTIONS[name], getattr(jax.nn, name), x, axis=axis)


@every_function
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    x = jnp.asarray(random(1, (4, 6), scale=3), dtype)
    # softmax and log_softmax save their rounded output, so its rounding enters their derivatives.
    check(name, FUNCTIONS[name], getattr(jax.nn, name), x, axis=-1, where=x < 3, loosen=6)


@every_function
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32"])
def test_integers_are_promoted_without_wrapping(name, dtype):
  limits = jnp.iinfo(dtype)
  with jax.enable_x64(dtype == "int32"):
    x = jnp.array([[limits.max, limits.max - 1], [limits.min, limits.max]], dtype)
    y = FUNCTIONS[name](x, axis=-1)
    with np.errstate(invalid="ignore"):  # the peer casts -inf to an integer
      peer = lambda x: default_promotion()(getattr(jax.nn, name))(x, axis=-1)
      assert y.dtype == jax.eval_shape(peer, x).dtype
  # Whole numbers round on their way to float32, so that the difference in the first row may be 0.
  x = np.asarray(x).astype(y.dtype)
  expected, *_ = oracle.linearize(name, x, axis=-1)
  assert relative_error(y, expected) < 1e-6


@every_function
def test_takes_numpy_arrays_and_numbers(name):
  x = random(2, (3,))
  chex.assert_trees_all_equal(FUNCTIONS[name](x), FUNCTIONS[name](jnp.asarray(x)))
  expected, *_ = oracle.linearize(name, 2.5, axis=None)
  assert relative_error(FUNCTIONS[name](2.5, axis=None), expected) == 0


@every_function
@pytest.mark.parametrize(
  ("axis", "where"),
  [
    (-1, MASK),
    (None, MASK),
    ((), MASK),
    (1, MASK[0]),
    (0, MASK[:, :1]),
  ],
  ids=["rows", "all", "elementwise", "of columns", "of rows, axis 0"],
)
def test_masks(name, axis, where):
  x = random(3, MASK.shape)
  # jax.nn has NaN where a row is masked altogether; test_edge_values.py says what we have.
  empty = not np.all(np.any(np.broadcast_to(where, x.shape), axis=axis))
  peer = None if empty else getattr(jax.nn, name)
  check(name, FUNCTIONS[name], peer, x, axis=axis, where=where)


@every_function
def test_mask_of_one_value(name):
  f, x = FUNCTIONS[name], random(3, (2, 3))
  chex.assert_trees_all_equal(f(x, axis=-1, where=True), f(x, axis=-1))
  chex.assert_trees_all_equal(f(x, axis=-1, where=False), f(x, axis=-1, where=np.zeros(3, bool)))


@every_function
def test_jacobian_both_ways_and_second_derivatives(name):
  f, peer, x = FUNCTIONS[name], getattr(jax.nn, name), random(4, (5,), scale=2)
  forward, reverse, hessian, *peers = jax.jit(
    lambda x: [
      *(jax.jacfwd(f)(x), jax.jacrev(f)(x), jax.hessian(f)(x)),
      *(jax.jacrev(peer)(x), jax.hessian(peer)(x)),
    ]
  )(x)
  expected = oracle.jacobian(name, x)
  assert relative_error(forward, expected) < 1e-6
  assert relative_error(reverse, expected) < 1e-6
  assert relative_error(hessian, oracle.hessian(name, x)) < 1e-6
  assert relative_error(reverse, peers[0]) < 1e-5
  assert relative_error(hessian, peers[1]) < 1e-5


# logsumexp's own options.


def weighted(logsumexp):
  return lambda a, b, **options: logsumexp(a, b=b, **options)


@pytest.mark.parametrize("axis", [None, (-1, 0), ()])
def test_logsumexp_keeps_dimensions(axis):
  x = random(5, (2, 3, 4))
  check("logsumexp", logsumexp, jax.nn.logsumexp, x, axis=axis, keepdims=True)


def test_logsumexp_sums_over_all_axes_by_default():
  x = random(5, (2, 3))
  assert relative_error(logsumexp(x), np.log(np.sum(np.exp(x.astype(float))))) < 1e-6


@pytest.mark.parametrize(
  ("b", "axis", "where"),
  [
    (np.abs(random(6, (3, 5))), -1, MASK),
    (np.abs(random(6, (5,))), -1, None),
    (np.abs(random(6, (5,))), None, MASK),
    (np.abs(random(6, (3, 1))), -1, MASK[0]),
    (np.abs(random(6, (3, 1))), 0, None),
    (np.float64(3), -1, None),
    (np.array([3, -0.2, 2, -0.1, 5]), -1, None),
  ],
  ids=[
    "masked",
    "row",
    "row over all axes",
    "column",
    "column along itself",
    "number",
    "some negative",
  ],
)
def test_logsumexp_weights(b, axis, where):
  x = random(7, (3, 5), scale=0.3)
  f, peer = weighted(logsumexp), weighted(jax.nn.logsumexp)
  options = {"axis": axis, "where": where, "keepdims": True}
  check("logsumexp", f, peer, x, b.astype(np.float32), **options)


def test_logsumexp_weight_zero_drops_the_entry_and_keeps_its_derivative():
  # jax.nn replaces such an entry by -inf and so gives 0 for d/db there, which is exp(a_j - lse).
  x, b = random(8, (2, 4)), np.float32([0, 1, 2, 0])
  check("logsumexp", weighted(logsumexp), None, x, b, axis=-1)


@pytest.mark.without("debug_nans")
def test_logsumexp_sign():
  x = random(9, (4, 3), scale=0.5)
  b = np.float32([[1, 2, 3], [-1, -2, -3], [0, 0, 0], [1, 1, -9]])
  log, sign = logsumexp(x, axis=1, b=b, return_sign=True)
  expected, *_ = oracle.linearize("logsumexp", x, b)
  assert relative_error(log, expected) < 1e-6
  np.testing.assert_array_equal(sign, [1, -1, 0, -1])
  assert (log.dtype, sign.dtype) == (x.dtype, x.dtype)
  np.testing.assert_array_equal(
    np.isnan(logsumexp(x, axis=1, b=b)), [False, True, False, True]
  )  # the logarithm of a negative sum

  log, sign = logsumexp(x, axis=1, return_sign=True, keepdims=True)
  chex.assert_shape([log, sign], (4, 1))
  np.testing.assert_array_equal(sign, 1)


@pytest.mark.without("enable_x64")
def test_logsumexp_derivatives_with_sign():
  x, b = random(9, (3, 3), scale=0.5), np.float32([[1, 2, 3], [-1, -2, -3], [1, 1, -9]])
  log_of = lambda f: lambda a, b, **options: f(a, b=b, return_sign=True, **options)[0]
  check("logsumexp", log_of(logsumexp), log_of(jax.nn.logsumexp), x, b, axis=-1)
  sign = lambda a, b: logsumexp(a, axis=-1, b=b, return_sign=True)[1]
  sign_dot, bars = jax.jit(
    lambda *args: (jax.jvp(sign, args, args)[1], jax.vjp(sign, *args)[1](jnp.ones(3)))
  )(x, b)
  chex.assert_trees_all_equal((sign_dot, *bars), (np.zeros(3), 0 * x, 0 * b))


@pytest.mark.parametrize(
  ("a", "b"),
  [("bfloat16", "float32"), ("float32", "bfloat16"), ("int8", "float16"), ("float16", "int32")],
)
@default_promotion()
def test_logsumexp_promotes_a_and_b_as_its_peer(a, b):
  x, weight = jnp.array([120, 127], a), jnp.array([1, 3], b)
  y = logsumexp(x, b=weight)
  assert y.dtype == jax.nn.logsumexp(x, b=weight).dtype
  expected, _, vjp = oracle.linearize("logsumexp", x, weight)
  assert relative_error(y, expected) <= oracle.tolerance(y.dtype)
  for argnum, v in enumerate((x, weight)):
    if jnp.issubdtype(v.dtype, jnp.inexact):
      total = lambda x, weight: logsumexp(x, b=weight).astype("float32")
      bar = jax.jit(jax.grad(total, argnum))(x, weight)
      assert bar.dtype == v.dtype
      assert relative_error(bar, vjp(1)[argnum]) < 0.01


# Digits.


@pytest.mark.parametrize("gap", [1e-6, 1e-10, 1e-30])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_confident_row_keeps_its_digits(name, gap):
  # The largest logit is 0, so that logsumexp is log1p(r) as well. Every entry counts by itself.
  x = np.float32([np.log(gap), 0, np.log(gap) - 1])
  y = np.atleast_1d(FUNCTIONS[name](x))
  expected, *_ = oracle.linearize(name, x)
  for actual, entry in zip(y, np.atleast_1d(expected), strict=True):
    assert relative_error(actual, entry) < 1e-6


@pytest.mark.parametrize("gap", [1e-6, 1e-10])
def test_confident_row_keeps_the_digits_of_the_softmax_derivative(gap):
  x = np.float32([np.log(gap), 0, np.log(gap) - 1])
  y_bar = np.float32([5.25, 5, 3])
  _, jvp, vjp = oracle.linearize("softmax", x)
  assert relative_error(jax.vjp(softmax, x)[1](y_bar)[0], vjp(y_bar)[0]) < 1e-6
  assert relative_error(jax.jvp(softmax, (x,), (y_bar,))[1], jvp(y_bar)) < 1e-6


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("scale", [0.01, 1, 100, 10000])
@pytest.mark.parametrize("classes", [2, 1000])
def test_every_entry_keeps_its_digits(name, scale, classes):
  x = random(10, (20, classes), scale=scale)
  y = np.asarray(FUNCTIONS[name](x), float)
  z = x.astype(np.longdouble)
  z -= z.max(axis=1, keepdims=True)
  log_r = np.log1p(np.exp(np.sort(z, axis=1)[:, :-1]).sum(axis=1, keepdims=True))
  expected = z - log_r if name == "log_softmax" else np.exp(z - log_r)
  counts = np.abs(expected) > 1e-35  # smaller terms may flush to zero
  error = np.max(np.abs(y - expected)[counts] / np.abs(expected)[counts])
  assert error < (1e-6 if scale <= 1 else 1e-5)  # x - max is rounded, and exp magnifies it


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shift", [-1e8, 1e8, 3e38])
def test_equal_logits_of_any_size(name, shift):
  expected, *_ = oracle.linearize(name, np.zeros(2))
  assert relative_error(FUNCTIONS[name](np.float32([shift, shift])), expected) < 1e-7


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_log_softmax_of_a_sure_class(outer, inner):
  x, c = np.float32([0, -27.6, -28, -30]), np.float32([1, 2, 3, 4])
  hessian = outer(inner(lambda x: log_softmax(x) @ c))(x)
  others = np.exp(x[1:].astype(np.longdouble))
  r = others.sum()  # 1e-12, which 1 - a does not tell from 0 in float32
  a = np.concatenate([[1], others]) / (1 + r)
  expected = np.diag(a) - np.outer(a, a)
  expected[0, 0] = a[0] * r / (1 + r)
  assert np.max(np.abs(np.asarray(hessian) / (-c.sum() * expected) - 1)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_sixteen_bits_sum_many_classes_in_float32(name, dtype):
  x = jnp.asarray(random(11, (3000,)), dtype)
  y = np.atleast_1d(np.asarray(FUNCTIONS[name](x), float))
  z = np.asarray(x, np.longdouble)
  lse = np.log(np.sum(np.exp(z)))
  expected = {"softmax": np.exp(z - lse), "log_softmax": z - lse, "logsumexp": lse}[name]
  assert relative_error(y, np.atleast_1d(expected)) < oracle.tolerance(dtype)


# Properties.


@functools.partial(jax.jit, static_argnums=2)
def all_three(x, mask, axis):
  return (
    softmax(x, axis, mask),
    log_softmax(x, axis, mask),
    logsumexp(x, axis, keepdims=True, where=mask),
  )


@st.composite
def masked_rows(draw):
  shape, axis = draw(st.sampled_from([((4,), -1), ((2, 3), 0), ((2, 3, 2), (-1, 0))]))
  seed = draw(st.integers(0, 1000))
  x = np.round(random(seed, shape, scale=draw(st.sampled_from([4, 40]))) * 4) / 4
  return x, random(seed + 1, shape) > draw(st.sampled_from([-9, 0, 1])), axis


def properties(test):
  settings = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
  return settings(hypothesis.given(masked_rows())(test))


@properties
def test_probabilities_sum_to_one_over_what_is_not_masked(rows):
  _, mask, axis = rows
  a, log_a, lse = all_three(*rows)
  assert np.all(a >= 0)
  np.testing.assert_array_equal(np.asarray(a)[~mask], 0)
  np.testing.assert_array_equal(np.asarray(log_a)[~mask], -np.inf)
  np.testing.assert_allclose(np.sum(a, axis), np.any(mask, axis), rtol=1e-6)
  np.testing.assert_array_equal(np.isneginf(lse), ~np.any(mask, axis, keepdims=True))


@properties
def test_masked_entries_have_no_say(rows):
  x, mask, axis = rows
  chex.assert_trees_all_equal(
    all_three(*rows), all_three(np.where(mask, x, x.dtype.type(77)), mask, axis)
  )


@properties
def test_adding_a_constant_moves_only_logsumexp(rows):
  x, mask, axis = rows  # multiples of 1/4: adding 8 rounds nothing
  *moved, lse = all_three(x + 8, mask, axis)
  chex.assert_trees_all_equal(tuple(moved), all_three(*rows)[:2])
  assert relative_error(lse, np.asarray(all_three(*rows)[2]) + 8) < 1e-6


@properties
def test_the_three_agree_with_each_other(rows):
  x, mask, _ = rows
  a, log_a, lse = map(np.asarray, all_three(*rows))
  assert relative_error(np.exp(log_a), a) < 2e-6
  assert relative_error(np.where(mask, np.exp(x - lse), 0), a) < 1e-5
