"""Infinities, NaN, masks and labels out of range: what the docstrings promise of each.

Every test looks at the value and at the derivative in both modes. Where a batch holds a special
row, its other rows must not notice.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from edge_functions import (
  ENTROPY,
  FUNCTIONS,
  INF,
  INTEGER,
  KL,
  NAN,
  SOFT,
  WEIGHTS,
  assert_same,
  both_modes,
  by_oracle,
  check,
  every_function,
  every_loss,
  labels_for,
  row,
  second_derivatives,
)
from oracle import random

from softmax_jax import (
  linear_softmax_cross_entropy,
  logsumexp,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)

# -inf.


@every_function
@pytest.mark.parametrize(
  "x",
  [row(1, 2, -INF, 0.5), row(0, 30, -INF, -INF), row(0, -30, -INF, 2), row(-INF, 2, -INF, -INF)],
  ids=["one", "two", "where the label is unlikely", "all but one"],
)
def test_probability_and_derivative_are_zero_at_minus_infinity(name, x):
  y, jacobian = by_oracle(name, x)
  check(FUNCTIONS[name], (x,), y, jacobian)
  # The oracle says zero there too, except for log_softmax and at a label, where it is -t.
  if name != "log_softmax":
    at_infinity = np.isneginf(x)
    weight = WEIGHTS[at_infinity] if name == SOFT else 0
    np.testing.assert_array_equal(jacobian[..., at_infinity] + weight, 0)


@every_function
def test_second_derivatives_at_minus_infinity(name):
  x = row(1, 2, -INF, 0.5)
  expected = oracle.hessian(name, x, labels_for(name, x.shape))
  for actual in second_derivatives(FUNCTIONS[name], x):
    assert_same(actual, expected)


@every_function
def test_minus_infinity_in_sixteen_bits(name):
  x = row(0.5, 2, -INF, -INF, dtype=jnp.bfloat16)
  check(FUNCTIONS[name], (x,), *by_oracle(name, x), tolerance=0.02)


@pytest.mark.without("debug_nans")
@every_function
def test_a_row_of_minus_infinity_alone(name):
  y, *jacobians = both_modes(FUNCTIONS[name], row(-INF, -INF, -INF, -INF))
  if name == "logsumexp":
    np.testing.assert_array_equal(y, -INF)
    for jacobian in jacobians:
      np.testing.assert_array_equal(jacobian, 0)
  else:
    np.testing.assert_array_equal(y, NAN)


@every_loss
def test_loss_whose_label_is_at_minus_infinity(name):
  x, one_hot = row(2, -INF, 1, 0.5), row(0, 1, 0, 0)
  f = FUNCTIONS[name] if name == INTEGER else lambda x: softmax_cross_entropy(x, one_hot)
  a = np.exp(np.float64([2, 1, 0.5]))
  a /= np.sum(a)
  check(f, (x,), INF, np.array([a[0], -1, a[1], a[2]]))


@pytest.mark.parametrize("repeats", [1, 5])  # few classes, and more
def test_soft_label_of_zero_at_minus_infinity_adds_nothing(repeats):
  logits = np.tile(row(2, -INF, 1, 0.5), repeats)
  labels = np.tile(row(0.5, 0, 0.25, 0.25), repeats)
  kept = np.isfinite(logits)
  expected, *_ = oracle.linearize(SOFT, logits[kept], labels[kept])
  gradient = np.zeros(logits.size)
  gradient[kept] = oracle.jacobian(SOFT, logits[kept], labels[kept])
  check(softmax_cross_entropy, (logits, labels), expected, gradient)
  # Both arguments move, but this label does not: no 0 * inf.
  dots = [np.tile(dot, repeats) for dot in (row(1, 2, 3, 4), row(0.5, 0, -1, 2))]
  _, loss_dot = jax.jit(lambda *args: jax.jvp(softmax_cross_entropy, args, tuple(dots)))(
    logits, labels
  )
  labels_bar = jax.jit(jax.grad(softmax_cross_entropy, argnums=1))(logits, labels)
  _, jvp, vjp = oracle.linearize(SOFT, logits[kept], labels[kept])
  assert_same(loss_dot, jvp(*(dot[kept] for dot in dots)))
  assert_same(labels_bar[kept], vjp(1)[1])


# +inf and NaN.


@pytest.mark.without("debug_nans")
@every_function
def test_plus_infinity(name):
  x = row(0, 1, INF, -INF)
  y, *jacobians = both_modes(FUNCTIONS[name], x)
  if name == "logsumexp":
    np.testing.assert_array_equal(y, INF)
  elif name in ("softmax", "log_softmax"):
    for v in (y, *jacobians):
      np.testing.assert_array_equal(v, NAN)
  else:
    assert not np.isfinite(y)


@pytest.mark.without("debug_nans")
@every_function
@pytest.mark.parametrize("x", [row(0, NAN, 1, 2), row(0, 1, NAN, 2), row(NAN, 1, INF, 0)])
def test_nan_reaches_the_whole_row(name, x):
  for v in both_modes(FUNCTIONS[name], x):
    np.testing.assert_array_equal(v, NAN)


@every_function
def test_largest_finite_logits_are_nothing_special(name):
  x = row(3e38, 3e38, -3e38, 0)
  y, jacobian = by_oracle(name, x)
  with np.errstate(over="ignore"):  # 6e38 is +inf in float32
    y = y.astype(np.float32)
  check(FUNCTIONS[name], (x,), y, jacobian)


# Masks.


@pytest.mark.few(3)
@every_function
@pytest.mark.parametrize("hidden", [1.0, INF, -INF, NAN])
def test_masked_entries_have_no_say(name, hidden):
  x, where = row(hidden, 2, hidden, 0.5), np.array([False, True, False, True])
  shown = np.where(where, x, 0)
  check(FUNCTIONS[name], (x, where), *by_oracle(name, shown, where))
  for actual, expected in zip(
    second_derivatives(FUNCTIONS[name], x, where),
    second_derivatives(FUNCTIONS[name], shown, where),
    strict=True,
  ):
    chex.assert_trees_all_equal(actual, expected)
    assert np.all(np.isfinite(actual))
    np.testing.assert_array_equal(actual[..., ~where], 0)


@pytest.mark.without("debug_nans")
@every_function
@pytest.mark.parametrize("x", [row(NAN, 2, 1, 0), row(INF, 2, 1, 0), row(-INF, -INF, 1, -INF)])
def test_masked_entries_have_no_gradient_in_any_row(name, x):
  where = np.array([True, True, False, True])
  _, by_reverse_mode, _ = both_modes(FUNCTIONS[name], x, where)
  np.testing.assert_array_equal(by_reverse_mode[..., ~where], 0)


@every_function
@pytest.mark.parametrize(
  "x", [row(1, 2, 3, 4), row(NAN, INF, -INF, 0), row(-INF, -INF, -INF, -INF)]
)
def test_a_row_that_is_masked_altogether(name, x):
  none = np.zeros(4, bool)
  value = {"softmax": np.zeros(4), "log_softmax": np.full(4, -INF), "logsumexp": -INF}.get(name, 0)
  check(FUNCTIONS[name], (x, none), value, np.zeros((*np.shape(value), 4)))
  for derivative in second_derivatives(FUNCTIONS[name], x, none):
    np.testing.assert_array_equal(derivative, 0)


@pytest.mark.without("debug_nans")
@every_loss
def test_whole_rows_masked_by_one_value_each(name):
  x = jnp.stack([row(1, 2, 3, 4), row(NAN, INF, -INF, 0), row(0, 1, 0, -1)])
  where = np.array([True, False, True])
  loss, *jacobians = both_modes(FUNCTIONS[name], x, where)
  expected = [by_oracle(name, x[0]), (0, np.zeros(4)), by_oracle(name, x[2])]
  assert_same(loss, np.array([y for y, _ in expected]))
  for jacobian in jacobians:
    for i in range(3):
      for j in range(3):
        assert_same(jacobian[i, j], expected[i][1] if i == j else np.zeros(4))


def test_masked_integer_label_costs_infinity():
  x, where = row(1, 5, 3, 4), np.array([True, False, True, True])
  a = np.exp(np.float64([1, 3, 4]))
  a /= np.sum(a)
  check(FUNCTIONS[INTEGER], (x, where), INF, np.array([a[0], 0, a[1], a[2]]))


@every_function
def test_masks_and_minus_infinity_together(name):
  x, where = row(1, 2, NAN, -INF), np.array([True, True, False, True])
  expected = by_oracle(name, np.where(where, x, 0), where)
  check(FUNCTIONS[name], (x, where), *expected)


# Labels.


def loss_of(x, label, where=None):
  return softmax_cross_entropy_with_integer_labels(x, label, where=where)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize(
  ("label", "dtype"),
  [
    (-1, "int32"),
    (-4, "int32"),
    (4, "int32"),
    (2**31 - 1, "int32"),
    (-(2**31), "int32"),
    (-1, "int8"),
    (255, "uint8"),
    (2**32 - 1, "uint32"),
    (2**32 + 1, "int64"),
  ],
)
def test_label_out_of_range_gives_nan_in_its_row_and_no_other(label, dtype):
  x = random(0, (3, 4))
  with jax.enable_x64(dtype == "int64"):
    loss, *jacobians = both_modes(loss_of, x, np.array([1, label, 3], dtype))
  np.testing.assert_array_equal(loss[1], NAN)
  for jacobian in jacobians:
    np.testing.assert_array_equal(jacobian[1, 1], NAN)
  for i, j, in_range in ((0, 2, 1), (2, 0, 3)):
    assert_same(loss[i], oracle.linearize(INTEGER, x[i], in_range)[0])
    for jacobian in jacobians:
      assert_same(jacobian[i, i], oracle.jacobian(INTEGER, x[i], in_range))
      assert_same(jacobian[i, j], np.zeros(4))


def test_label_out_of_range_in_a_row_that_is_masked_altogether():
  """As padding has it: the row does not count, whatever its label."""
  x, label, where = random(0, (2, 4)), np.int32([1, -1]), np.array([True, False])
  expected, _, vjp = oracle.linearize(INTEGER, x[:1], label[:1])
  loss, pull = jax.vjp(lambda x: loss_of(x, label, where), x)
  assert_same(loss, [expected[0], 0])
  assert_same(pull(np.float32([1, 1]))[0], [*vjp(np.ones(1))[0], np.zeros(4)])


@pytest.mark.without("debug_nans")
def test_label_out_of_range_beside_masked_entries():
  where = np.array([True, True, False, True])
  for v in both_modes(loss_of, row(1, 2, 3, 4), np.int32(4), where):
    np.testing.assert_array_equal(v[where] if v.ndim else v, NAN)


# Rows do not notice each other.


@pytest.mark.without("debug_nans")
@every_function
def test_ordinary_rows_do_not_notice_special_ones(name):
  f, x = FUNCTIONS[name], random(1, (9, 4))
  special = x.copy()
  special[1:8] = [
    [NAN, 0, 0, 0],
    [0, NAN, 1, 1],
    [INF, 0, 0, 0],
    [0, INF, INF, 0],
    [-INF, -INF, -INF, -INF],
    [0, -INF, 0, 0],
    [3e38, -3e38, 0, 3e38],
  ]
  x_dot, y_bar = random(2, x.shape), random(3, np.shape(f(x)))
  ordinary = np.array([0, 8])
  for actual, expected in zip(
    _derivatives(f, special, x_dot, y_bar), _derivatives(f, x, x_dot, y_bar), strict=True
  ):
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal(actual[ordinary], expected[ordinary])


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(f, x, x_dot, y_bar):
  return *jax.jvp(f, (x,), (x_dot,)), *jax.vjp(f, x)[1](y_bar)


# Sizes 0 and 1.


@every_function
def test_no_classes(name):
  f, x = FUNCTIONS[name], jnp.zeros((2, 0))
  value = {"logsumexp": np.full(2, -INF)} | dict.fromkeys((SOFT, INTEGER, ENTROPY, KL), np.zeros(2))
  check(f, (x,), value.get(name, np.zeros((2, 0))), np.zeros((*f(x).shape, 2, 0)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("where", [None, np.ones(2, bool), np.ones((2, 0), bool)])
def test_without_classes_no_row_counts(reduction, where):
  """Whatever the options; the two losses are alike in it."""
  for loss, labels in (
    (softmax_cross_entropy, jnp.zeros((2, 0))),
    (softmax_cross_entropy_with_integer_labels, jnp.zeros(2, int)),
  ):

    def f(z, z_loss, w, loss=loss, labels=labels):
      options = {"label_smoothing": 0.1, "class_weights": w, "reduction": reduction}
      value, aux = loss(z, labels, where=where, z_loss=z_loss, return_aux=True, **options)
      return jnp.sum(value), (value, aux)

    args = jnp.zeros((2, 0)), jnp.float32(0.5), jnp.zeros(0)
    bars, (value, aux) = jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*args)
    assert value.shape == ((2,) if reduction == "none" else ())
    results = value, aux, bars
    chex.assert_trees_all_equal(results, jax.tree.map(jnp.zeros_like, results))


@every_function
def test_one_class(name):
  value = {"softmax": [1], "logsumexp": 2.5}.get(name, [0] if name == "log_softmax" else 0)
  jacobian = [1] if name == "logsumexp" else np.zeros((*np.shape(value), 1))
  check(FUNCTIONS[name], (row(2.5),), value, jacobian)


@every_function
def test_no_rows(name):
  f, x = FUNCTIONS[name], jnp.zeros((0, 4))
  shape = (0, 4) if name in ("softmax", "log_softmax") else (0,)
  check(f, (x,), np.zeros(shape), np.zeros((*shape, 0, 4)))


# logsumexp's weights.


@pytest.mark.parametrize("hidden", [1.0, INF, -INF, NAN])
def test_entry_of_weight_zero_has_no_say(hidden):
  a, b = row(1, hidden, 2, hidden), row(2, 0, 0.5, 0)
  kept = np.array([True, False, True, False])
  y, jvp, _ = oracle.linearize("logsumexp", a[kept], b[kept])
  jacobian = np.zeros(4)
  jacobian[kept] = [jvp(e) for e in np.eye(2)]
  check(weighted, (a, b), y, jacobian)


def test_weights_at_minus_infinity():
  a, b = row(1, -INF, 2, -INF), row(2, 3, -0.5, -1)
  y, jvp, _ = oracle.linearize("logsumexp", a, b)
  check(weighted, (a, b), y, np.array([jvp(e, 0 * e) for e in np.eye(4)]))


def test_weights_that_are_all_zero_give_minus_infinity():
  np.testing.assert_array_equal(weighted(row(1, 2, 3, 4), row(0, 0, 0, 0)), -INF)


def test_weighted_row_that_is_masked_altogether():
  f = lambda a, b, where: logsumexp(a, b=b, where=where)
  args = row(1, NAN, 2, INF), row(2, 3, -0.5, 1), np.zeros(4, bool)
  check(f, args, -INF, np.zeros(4))
  np.testing.assert_array_equal(jax.jit(jax.grad(f, argnums=1))(*args), 0)


def weighted(a, b):
  return logsumexp(a, b=b)


# The gradient by the weights of the classes, where what does not count costs infinity.

COSTS_INFINITY = [[0, 0, -INF], [NAN, NAN, NAN], [INF, 0, 0], [-INF, -INF, -INF]]


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("hidden", COSTS_INFINITY)
def test_an_ignored_row_has_no_say_in_the_gradient_by_class_weights(hidden):
  shown, t = row(1, 2, 3), np.array([0, -1])
  x = np.stack([shown, np.float32(hidden)])
  smoothed = functools.partial(softmax_cross_entropy_with_integer_labels, label_smoothing=0.1)
  expected = jax.grad(lambda w: smoothed(shown, 0, class_weights=w))(np.ones(3, np.float32))
  for loss in (
    lambda w: smoothed(x, t, ignore_index=-1, class_weights=w).sum(),
    lambda w: smoothed(x, abs(t), where=t == 0, class_weights=w).sum(),
  ):
    for gradient in (jax.grad(loss), jax.jacfwd(loss)):
      np.testing.assert_allclose(gradient(np.ones(3, np.float32)), expected, rtol=1e-6)


@pytest.mark.few(2)
@pytest.mark.without("debug_nans")  # 0 * inf, which is then left out
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [SOFT, INTEGER, "linear"])
def test_a_coefficient_that_is_traced_and_0_is_0(name, reduction):
  """Where it is a Python 0.0, the term is left out; a class without probability costs infinity."""
  x, t, w = row(1, 2, -INF), 0, np.ones(3, np.float32)

  def loss(w, label_smoothing, z_loss):
    options = dict(class_weights=w, label_smoothing=label_smoothing, z_loss=z_loss)
    if name == "linear":
      zeros = jnp.zeros((1, 1)), jnp.zeros((1, 3)), jnp.array([t])
      f = functools.partial(linear_softmax_cross_entropy, *zeros, bias=x)
    elif name == SOFT:
      f = functools.partial(softmax_cross_entropy, x[None], np.eye(3, dtype=np.float32)[[t]])
    else:
      f = functools.partial(softmax_cross_entropy_with_integer_labels, x[None], np.array([t]))
    return jnp.sum(f(**options, reduction=reduction))

  zero = jnp.float32(0)
  for derivative in (lambda f: f, jax.grad, jax.jacfwd):
    np.testing.assert_allclose(
      derivative(loss)(w, zero, zero), derivative(loss)(w, 0.0, 0.0), rtol=1e-6
    )


def test_a_z_loss_of_0_that_is_traced_adds_nothing_to_an_infinite_loss():
  x = row(1, INF)[None]
  assert softmax_cross_entropy_with_integer_labels(x, np.array([0]), z_loss=jnp.float32(0)) == INF
