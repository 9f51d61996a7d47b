"""Labels of every dtype, ignored, out of range, and of no weight at an infinite cost."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from option_formulas import INTEGERS, LOSSES, SOFT, every_loss, formulas
from oracle import random, relative_error

from softmax_jax import softmax_cross_entropy_with_integer_labels as integer_loss

ALL_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


WIDE_WEIGHTS = np.linspace(0.5, 2, 300)


@jax.jit
def wide_loss(z, labels):
  return integer_loss(
    z, labels, class_weights=WIDE_WEIGHTS.astype(np.float32), label_smoothing=0.1, ignore_index=5
  )


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ALL_INTEGERS)
def test_integer_labels_of_every_dtype(dtype):
  """300 classes, more than an int8 can count. The last label is the smallest of the dtype."""
  z = random(2, (5, 300))
  least = np.iinfo(dtype).min
  with jax.enable_x64(dtype.endswith("64")):
    labels = np.array([0, 127, min(299, np.iinfo(dtype).max), 5, least], dtype)
    loss = np.asarray(wide_loss(z, labels))
  expected = formulas(
    np,
    z.astype(np.float64),
    labels.astype(np.int64),
    class_weights=WIDE_WEIGHTS,
    label_smoothing=0.1,
    ignore_index=5,
  )[0]
  if least < 0:
    expected[4] = np.nan
  assert relative_error(loss, expected) < oracle.tolerance("float32")


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_huge_unsigned_labels_are_out_of_range(dtype):
  with jax.enable_x64(dtype == "uint64"):
    huge = np.array([np.iinfo(dtype).max, 1, np.iinfo(dtype).max // 2 + 1], dtype)
    loss = integer_loss(random(3, (3, 5)), huge)
    np.testing.assert_array_equal(np.isnan(loss), [True, False, True])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_the_largest_unsigned_label_may_be_ignored(dtype):
  """A -1 that was cast to an unsigned dtype."""
  with jax.enable_x64(dtype == "uint64"):
    labels = np.array([2, np.iinfo(dtype).max], dtype)
    loss = integer_loss(random(3, (2, 5)), labels, ignore_index=labels[1])
    assert loss[0] > 0
    assert loss[1] == 0


@jax.jit
def ignoring(z, labels, ignore_index):
  f = lambda z: integer_loss(
    z, labels, ignore_index=ignore_index, reduction="mean", label_smoothing=0.1, z_loss=0.03
  )
  return f(z), jax.grad(f)(z)


@pytest.mark.parametrize("ignore_index", [1, -100, 7])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_ignored_rows_may_hold_anything(ignore_index, junk):
  labels = np.where(INTEGERS == 1, ignore_index, INTEGERS)
  z = random(4, (4, 5))
  clean_loss, clean_gradient = ignoring(z, labels, ignore_index)
  z[3] = junk
  loss, gradient = ignoring(z, labels, ignore_index)
  assert loss == clean_loss
  np.testing.assert_array_equal(gradient, clean_gradient)
  np.testing.assert_array_equal(gradient[3], 0)
  assert np.all(gradient[:3] != 0)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("how", ["ignored", "masked", "weightless", "empty"])
def test_the_mean_of_nothing_is_zero(how):
  """So are its gradients. The logits of rows that do not count are NaN."""
  z = np.full((0 if how == "empty" else 3, 5), np.nan, np.float32)
  options = {
    "ignored": {"ignore_index": 2},
    "masked": {"where": np.zeros((3, 5), bool)},
    "weightless": {"class_weights": np.zeros(5, np.float32)},
    "empty": {},
  }[how]
  if how == "weightless":
    z = random(5, z.shape)
  labels = np.full(len(z), 2)

  @jax.jit
  def f(z, alpha):
    return integer_loss(z, labels, label_smoothing=alpha, reduction="mean", **options)

  loss, gradients = jax.value_and_grad(f, argnums=(0, 1))(z, np.float32(0.1))
  assert loss == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


# Zero weights at infinite costs.


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_a_class_of_weight_zero_adds_nothing_at_minus_infinity(name, masked):
  """Smoothing gives such a class a share, which would make the loss infinite. In both modes."""
  z, w, z_dot = np.float32([-np.inf, 0.5, 1]), np.float32([0, 1, 2]), np.float32([7, 1, 2])
  t = np.float32([0, 1, 0])
  labels = t if name == SOFT else np.int32(1)
  where = np.ones(3, bool) if masked else None

  @jax.jit
  def f(z, w):
    return LOSSES[name](z, labels, class_weights=w, label_smoothing=0.3, where=where)

  share = 0.7 * t[1:] + 0.1  # of the two other classes
  log_a = z[1:] - np.log(np.sum(np.exp(z[1:], dtype=np.float64)))
  p = w[1:] * share
  by_logits = np.exp(log_a) * np.sum(p) - p
  loss, bars = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(z, w)
  assert relative_error(loss, -np.sum(p * log_a)) < 1e-6
  assert relative_error(bars[0], [0, *by_logits]) < 1e-6
  assert relative_error(bars[1], [0, *(-share * log_a)]) < 1e-6
  tangent = jax.jvp(lambda z: f(z, w), (z,), (z_dot,))[1]
  assert relative_error(tangent, by_logits @ z_dot[1:]) < 1e-6


def test_a_label_without_weight_at_minus_infinity_smoothed_altogether():
  z, w = np.float32([-np.inf, 0, 1]), np.float32([0, 1, 1])
  f = lambda z: integer_loss(z, 0, class_weights=w, label_smoothing=1.0)
  loss, gradient = jax.jit(jax.value_and_grad(f))(z)
  a = np.exp([0.0, 1.0]) / (1 + np.e)
  assert relative_error(loss, -np.sum(np.log(a)) / 3) < 1e-6
  assert relative_error(gradient, [0, *(a * 2 / 3 - 1 / 3)]) < 1e-6


def test_a_label_without_weight_at_minus_infinity_adds_nothing():
  z, w = np.float32([-np.inf, 0, 1]), np.float32([0, 1, 1])
  assert integer_loss(z, 0, class_weights=w) == 0
  assert integer_loss(z, 0, label_smoothing=0.5) == np.inf


@pytest.mark.without("debug_nans", "enable_x64")
def test_a_label_out_of_range_is_nan_in_its_row_alone():
  z, w, labels = random(6, (3, 5)), np.float32([1, 2, 3, 4, 5]), np.array([1, 5, 3])

  @jax.jit
  def f(z, labels):
    loss, pull = jax.vjp(
      lambda z: integer_loss(z, labels, class_weights=w, label_smoothing=0.1, z_loss=0.03), z
    )
    return loss, *pull(jnp.ones(3))

  loss, gradient = f(z, labels)
  assert np.isnan(loss[1])
  assert np.all(np.isnan(gradient[1]))
  valid_loss, valid_gradient = f(z, labels % 5)
  np.testing.assert_array_equal(loss[::2], valid_loss[::2])
  np.testing.assert_array_equal(gradient[::2], valid_gradient[::2])
