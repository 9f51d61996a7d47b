"""What goes wrong in other libraries' losses, and not in these two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from option_formulas import (
  INTEGER,
  INTEGERS,
  LABELS,
  LOSSES,
  SOFT,
  arguments,
  every_loss,
  everything,
)
from oracle import random, relative_error

from softmax_jax import softmax_cross_entropy
from softmax_jax import softmax_cross_entropy_with_integer_labels as integer_loss


@pytest.mark.without("debug_nans")
def test_a_label_of_minus_one_is_not_the_last_class():
  """In optax it is, because NumPy indexing wraps around."""
  z = random(7, (2, 5))
  theirs = optax.losses.softmax_cross_entropy_with_integer_labels(z, np.array([-1, 4]))
  ours = integer_loss(z, np.array([-1, 4]))
  assert np.isfinite(theirs[0])
  assert np.isnan(ours[0])
  assert relative_error(ours[1], theirs[1]) < 1e-6


@every_loss
def test_the_returned_z_loss_has_a_gradient(name):
  """In t5x that gradient is zero; it is d(lambda lse^2)/dz = 2 lambda lse a."""
  z, labels = random(8, (4, 5)), np.float32(LABELS[SOFT]) if name == SOFT else INTEGERS
  f = lambda z: jnp.sum(LOSSES[name](z, labels, z_loss=0.03, return_aux=True)[1].z_loss)
  exact = z.astype(np.float64)
  lse = np.log(np.sum(np.exp(exact), axis=1, keepdims=True))
  assert relative_error(jax.jit(jax.grad(f))(z), 0.06 * lse * np.exp(exact - lse)) < 1e-6


def test_soft_labels_need_not_sum_to_one():
  """In t5x the gradient is a_j - t_j, which assumes a sum of 1; here it is 2 a_j - t_j."""
  z, t = random(9, (5,)), np.float32([0.5, 0, 1, 0.5, 0])
  a = np.exp(z.astype(np.float64)) / np.sum(np.exp(z.astype(np.float64)))
  assert relative_error(jax.jit(jax.grad(softmax_cross_entropy))(z, t), 2 * a - t) < 1e-6


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.03}])
def test_forward_mode_is_finite_where_a_label_of_zero_meets_minus_infinity(options):
  """NaN in optax's safe_softmax_cross_entropy."""
  z, t, z_dot = np.float32([-np.inf, 0, 0]), np.float32([0, 1, 0]), np.float32([5, 2, 3])
  theirs = jax.jvp(lambda z: optax.losses.safe_softmax_cross_entropy(z, t), (z,), (z_dot,))[1]
  assert np.isnan(theirs)
  f = jax.jit(lambda z: softmax_cross_entropy(z, t, **options))
  loss, tangent = jax.jvp(f, (z,), (z_dot,))
  penalty = options.get("z_loss", 0)
  assert relative_error(loss, np.log(2) + penalty * np.log(2) ** 2) < 1e-6
  assert relative_error(tangent, 0.5 + 2 * penalty * np.log(2) * 2.5) < 1e-6


@pytest.mark.without("debug_nans")
def test_a_soft_label_of_zero_at_minus_infinity_adds_nothing():
  """NaN in torch, and in optax without the word "safe"."""
  z, t = np.float32([-np.inf, 0, 0]), np.float32([0, 1, 0])
  assert np.isnan(optax.losses.softmax_cross_entropy(z, t))
  loss, gradients = jax.jit(jax.value_and_grad(softmax_cross_entropy, argnums=(0, 1)))(z, t)
  assert relative_error(loss, np.log(2)) < 1e-6
  assert relative_error(gradients[0], [0, -0.5, 0.5]) < 1e-6
  assert relative_error(gradients[1], [0, np.log(2), np.log(2)]) < 1e-6


def test_a_masked_label_is_not_rewarded():
  """In optax its logit counts although its class does not, so the loss is negative."""
  z, where = np.float32([5, 0, 0]), np.array([False, True, True])
  theirs = optax.losses.softmax_cross_entropy_with_integer_labels(z, np.int32(0), where=where)
  assert theirs < 0
  assert integer_loss(z, np.int32(0), where=where) == np.inf


@every_loss
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_large_logits_leave_a_loss(name, options):
  """log 2 for two equal logits of any size; lse - z_t loses it altogether, as in optax."""
  z = np.float32([1e8, 1e8])
  labels = np.float32([1, 0]) if name == SOFT else np.int32(0)
  if name == INTEGER and not options:
    assert relative_error(jax.nn.logsumexp(z) - z[0], np.log(2)) > 0.1
  assert relative_error(LOSSES[name](z, labels, **options), np.log(2)) < 1e-6


@every_loss
def test_axes_other_than_the_last(name):
  """Libraries with a fixed class axis make the user transpose."""
  smooth, fixed = arguments(name, everything(name), masked=True, dtype=np.float32)
  expected = LOSSES[name](**smooth, **fixed)
  moved = {
    key: x.T if key in ("logits", "where") or (key == "labels" and name == SOFT) else x
    for key, x in (smooth | fixed).items()
  }
  assert relative_error(LOSSES[name](**moved, axis=0), expected) < 1e-6
  np.testing.assert_array_equal(expected.shape, (4,))
