"""Rows that do not count, by their sample weight or by their label, and the right predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random, relative_error

from softmax_jax import (
  linear_softmax_cross_entropy,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)

ROWS, CLASSES, FEATURES = 6, 5, 3
LABELS = np.array([0, 4, 2, 1, 3, 2])
WEIGHTS = np.float32([1.5, -0.25, 0, 0, 2, 0])
ZERO = WEIGHTS == 0
CLASS_WEIGHTS = np.linspace(0.5, 2, CLASSES, dtype=np.float32)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.05, "class_weights": CLASS_WEIGHTS}


def integer(x, s, t, **options):
  return softmax_cross_entropy_with_integer_labels(x, t, sample_weights=s, **options)


def soft(x, s, t, **options):
  """Rows of logits and of labels."""
  z, p = x[:, :CLASSES], x[:, CLASSES:]
  return softmax_cross_entropy(z, p, sample_weights=s, **options)


def linear(x, s, t, **options):
  weight = random(3, (FEATURES, CLASSES))
  return linear_softmax_cross_entropy(x, weight, t, sample_weights=s, chunk_size=4, **options)


# What is in a row of each loss.
LOSSES = {
  "integer": (integer, random(0, (ROWS, CLASSES), scale=2)),
  "soft": (soft, np.abs(random(1, (ROWS, 2 * CLASSES), scale=2))),
  "linear": (linear, random(2, (ROWS, FEATURES), scale=2)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def derivatives(f, labels, reduction, second=False):
  """Value, gradients and tangent by x, s and class weights, and in both modes the second ones."""

  def total(x, s, w):
    loss = f(x, s, labels, reduction=reduction, **(OPTIONS | {"class_weights": w}))
    return jnp.sum(jnp.sin(loss))

  @jax.jit
  def program(*args):
    argnums = (0, 1, 2)
    gradient = jax.grad(total, argnums)
    dots = tuple(map(jnp.ones_like, args))
    found = {
      "value": total(*args),
      "gradient": gradient(*args),
      "tangent": jax.jvp(total, args, dots)[1],
    }
    if second:
      of_both = jax.value_and_grad(total, argnums)
      found["forward"] = jax.jvp(gradient, args, dots)[1]
      found["reverse"] = jax.grad(lambda args: sum(map(jnp.sum, jax.tree.leaves(of_both(*args)))))(
        args
      )
    return found

  return program


@pytest.mark.few(2)
@pytest.mark.without("debug_nans")
@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_row_of_weight_0_may_hold_anything(name, reduction):
  """It adds nothing to any derivative, as if it were left out; nothing is NaN."""
  f, x = LOSSES[name]
  program = derivatives(f, LABELS, reduction, second=True)
  ignored = [2, 5]  # the rows that will hold no numbers
  others = np.delete(np.arange(ROWS), ignored)
  of_others = derivatives(f, LABELS[others], reduction)
  expected = of_others(x[others], WEIGHTS[others], CLASS_WEIGHTS)
  for anything in (np.nan, np.inf, -np.inf):
    hostile = np.array(x)
    hostile[2] = anything
    hostile[5, 1] = np.nan
    actual = program(hostile, WEIGHTS, CLASS_WEIGHTS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual)), anything
    for key in ("value", "tangent"):
      np.testing.assert_allclose(actual[key], expected[key], rtol=2e-6)
    for mine, theirs in zip(actual["gradient"], expected["gradient"], strict=True):
      if len(mine) == ROWS:
        assert np.all(mine[np.array(ignored)] == 0)
        mine = mine[others]
      assert relative_error(mine, theirs) < 5e-6


@pytest.mark.few(1)
@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("name", ["integer", "linear"])
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_row_of_weight_0_may_have_any_label(name, label):
  f, x = LOSSES[name]
  labels = np.where(np.arange(ROWS) == 3, label, LABELS)
  args = np.delete(x, 3, 0), np.delete(WEIGHTS, 3), CLASS_WEIGHTS
  expected = derivatives(f, np.delete(LABELS, 3), "mean")(*args)
  actual = derivatives(f, labels, "mean", second=True)(x, WEIGHTS, CLASS_WEIGHTS)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
  np.testing.assert_allclose(actual["value"], expected["value"], rtol=2e-6)
  assert relative_error(actual["gradient"][2], expected["gradient"][2]) < 5e-6
  assert np.all(actual["gradient"][0][3] == 0)
  # With another weight it is NaN, unless all labels out of range are ignored.
  s = np.where(np.arange(ROWS) == 3, 1, WEIGHTS)
  assert np.isnan(f(x, s, labels, reduction="sum"))
  assert np.isfinite(f(x, s, labels, reduction="sum", ignore_invalid=True))


@pytest.mark.few(1)
@each_loss
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_derivative_by_a_weight_of_0_is_the_loss(name, reduction):
  """And its derivative by x is the gradient of that loss, in both orders."""
  f, x = LOSSES[name]
  total = lambda x, s: jnp.sum(f(x, s, LABELS, reduction=reduction, **OPTIONS))
  losses = lambda x: f(x, None, LABELS, reduction="none", **OPTIONS)
  loss_of_all = lambda x: jnp.sum(losses(x))

  @jax.jit
  def found(x):
    return (
      losses(x),
      jax.grad(total, 1)(x, WEIGHTS),
      jax.jvp(lambda s: total(x, s), (WEIGHTS,), (ZERO.astype(WEIGHTS.dtype),))[1],
      jax.grad(loss_of_all)(x),
      jax.jacfwd(jax.grad(total), 1)(x, WEIGHTS),
      jax.jacrev(jax.grad(total, 1))(x, WEIGHTS),
    )

  expected, by_weight, forward, gradient, mixed, mixed_in_reverse = found(x)
  assert relative_error(by_weight, expected) < 2e-6
  np.testing.assert_allclose(forward, np.sum(expected[ZERO]), rtol=2e-6)
  rows = np.arange(ROWS)
  assert relative_error(mixed[rows, :, rows], gradient) < 5e-6
  assert relative_error(mixed_in_reverse[rows, rows], gradient) < 5e-6


@each_loss
def test_an_infinite_loss_of_weight_0_adds_nothing(name):
  f, x = LOSSES[name]
  x = jnp.asarray(x)
  options = {}
  if name == "linear":  # of this class there is no other label
    options["bias"] = jnp.zeros(CLASSES).at[LABELS[3]].set(-jnp.inf)
  else:
    x = x.at[3, LABELS[3]].set(-jnp.inf)
  total = lambda x, s: f(x, s, LABELS, reduction="sum", **options)
  value, (by_x, by_s) = jax.value_and_grad(total, (0, 1))(x, WEIGHTS)
  assert np.isfinite(value) and np.all(np.isfinite(by_x)) and np.all(np.isfinite(by_s))
  assert by_s[3] == 0


def test_ignoring_labels_out_of_range_is_ignoring_them_by_name():
  labels = np.array([0, -1, 2, -100, CLASSES, 2**31 - 1])
  counts = (labels >= 0) & (labels < CLASSES)
  for name in ("integer", "linear"):
    f, x = LOSSES[name]
    hostile = np.where(counts[:, None], x, np.nan)
    gradient = jax.value_and_grad(f)
    actual = gradient(hostile, None, labels, reduction="mean", ignore_invalid=True, **OPTIONS)
    expected = gradient(x[counts], None, labels[counts], reduction="mean", **OPTIONS)
    assert relative_error(actual[0], expected[0]) < 2e-6
    assert relative_error(actual[1][counts], expected[1]) < 2e-6
    assert np.all(actual[1][~counts] == 0)
    both = f(x, None, labels, reduction="sum", ignore_invalid=True, ignore_index=2)
    assert relative_error(both, f(x[:1], None, labels[:1], reduction="sum")) < 2e-6


@pytest.mark.without("debug_nans")
def test_right_predictions():
  inf, nan = np.inf, np.nan
  rows = [  # logits, label, whether it is right
    ([0, 1, 2, 3], 3, True),
    ([0, 1, 2, 3], 2, False),
    ([50, 1, 2, 3], 0, True),
    ([50, 1, 2, 3], 1, False),
    ([2, 2, 1, 0], 0, True),  # ties are right
    ([2, 2, 1, 0], 1, True),
    ([2, 2, 1, 0], 2, False),
    ([-inf, -inf, -1e30, -inf], 2, True),
    ([-inf, -inf, -inf, -inf], 2, False),
    ([0, nan, 0, 0], 0, False),
    ([0, inf, 0, 0], 1, False),  # its loss is NaN
    ([0, inf, 0, 0], 0, False),
    ([0, 1, 2, 3], 9, False),
    ([0, 1, 2, 3], -1, False),
    ([0, 1, 2, 3], 7, False),  # ignored
  ]
  z, t, right = (np.array(column) for column in zip(*rows, strict=True))
  f = lambda z, t: (
    softmax_cross_entropy_with_integer_labels(z, t, ignore_index=7, return_aux=True)[1].correct
  )
  for dtype in ("float32", "bfloat16"):
    logits = jnp.asarray(z, dtype)
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(logits[:, None], t[:, None]), right)
    assert f(logits, t) == np.sum(right) and f(logits, t).dtype == np.int32
  # Masked classes are not the largest, and rows without one are not right.
  masked = softmax_cross_entropy_with_integer_labels(
    np.float32([[0, 1, 2], [0, 1, 2]]),
    np.array([1, 1]),
    where=np.array([[1, 1, 0], [0, 0, 0]], bool),
    return_aux=True,
  )
  assert masked[1].correct == 1
  labels = jax.nn.one_hot(t, 4)
  assert softmax_cross_entropy(z.astype(np.float32), labels, return_aux=True)[1].correct is None
