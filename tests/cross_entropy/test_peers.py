"""Agreement with torch over the full grid of its options, wherever the meanings are the same.

Where they are not (nothing to average, a weightless class at -inf) each side is pinned down.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random, relative_error
from peer_losses import (
  CLASS_WEIGHTS,
  coefficients,
  cotangent,
  every_reduction,
  every_shape,
  integer_labels,
  of_integer_labels,
  of_soft_labels,
  probabilities,
  with_and_without_weights,
)

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

torch = pytest.importorskip("torch", reason="torch, a peer of the losses, is not installed")


def of_torch(logits, labels, y_bar, weight=None, **options):
  """The loss by torch and its VJP with y_bar, by the logits and by soft labels."""
  inputs = [torch.tensor(logits, requires_grad=True)]
  labels = torch.tensor(labels, requires_grad=labels.dtype.kind == "f")
  if labels.requires_grad:
    inputs.append(labels)
  if weight is not None:
    weight = torch.tensor(weight)
  loss = torch.nn.functional.cross_entropy(inputs[0], labels, weight=weight, **options)
  bars = torch.autograd.grad(loss, inputs, torch.tensor(y_bar))
  return [x.detach().numpy() for x in (loss, *bars)]


def assert_same(actual, expected):
  for x, y in zip(actual, expected, strict=True):
    assert relative_error(x, y) < 1e-12


@pytest.mark.few(4)
@every_shape
@with_and_without_weights
@every_reduction
def test_class_indices(shape, weighted, reduction):
  """With every smoothing, and an index to ignore inside the classes or outside."""
  logits, labels = random(0, shape, np.float64, scale=2), integer_labels(shape)
  padded = labels.copy()
  padded.flat[::3] = -100
  y_bar = cotangent(shape, reduction)
  with jax.enable_x64(True):
    for (ours, theirs), (y, ignored) in itertools.product(
      coefficients([0.0, 0.2, 1.0], weighted), [(labels, -100), (padded, -100), (labels, 1)]
    ):
      assert_same(
        of_integer_labels(logits, y, y_bar, reduction=reduction, ignore_index=ignored, **ours),
        of_torch(logits, y, y_bar, reduction=reduction, ignore_index=ignored, **theirs),
      )


@pytest.mark.few(4)
@every_shape
@with_and_without_weights
@every_reduction
def test_class_probabilities(shape, weighted, reduction):
  """With every smoothing, and labels that sum to one or do not; differentiated by them too."""
  logits, y_bar = random(0, shape, np.float64, scale=2), cotangent(shape, reduction)
  with jax.enable_x64(True):
    for (ours, theirs), labels in itertools.product(
      coefficients([0.0, 0.2, 1.0], weighted),
      [probabilities(shape), random(4, shape, np.float64)],
    ):
      assert_same(
        of_soft_labels(logits, labels, y_bar, reduction=reduction, **ours),
        of_torch(logits, labels, y_bar, reduction=reduction, **theirs),
      )


@pytest.mark.parametrize("labels", [np.array(3), np.array([0.5, 0, 0.25, 0.25, 0])])
def test_one_row(labels):
  logits = random(0, (5,), np.float64)
  loss = softmax_cross_entropy if labels.ndim else softmax_cross_entropy_with_integer_labels
  with jax.enable_x64(True):
    value, pull = jax.vjp(
      lambda z: loss(z, labels, label_smoothing=0.2, class_weights=CLASS_WEIGHTS), logits
    )
    expected = of_torch(
      logits, labels, np.array(1.5), CLASS_WEIGHTS, label_smoothing=0.2, reduction="sum"
    )
    assert_same((value, *pull(jnp.float64(1.5))), expected[:2])


# Where the meanings differ.


@pytest.mark.parametrize("why", ["ignored", "weightless"])
def test_the_mean_of_nothing_is_zero_here_and_nan_there(why):
  logits, labels = random(0, (2, 5), np.float64), np.array([2, 2])  # class 2 has no weight
  y_bar = np.array(1.0)
  ours = {"ignore_index": 2 if why == "ignored" else -100}
  theirs = dict(ours)
  if why == "weightless":
    ours["class_weights"] = theirs["weight"] = CLASS_WEIGHTS
  with jax.enable_x64(True):
    loss, gradient = of_integer_labels(logits, labels, y_bar, reduction="mean", **ours)
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(gradient, 0)
  their_loss, _ = of_torch(logits, labels, y_bar, **theirs)
  assert np.isnan(their_loss)


def test_a_share_of_zero_at_minus_infinity_is_zero_here_and_nan_there():
  logits, labels = np.array([[-np.inf, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]])
  with jax.enable_x64(True):
    loss, by_logits, by_labels = of_soft_labels(logits, labels, np.array(1.0), reduction="mean")
  assert relative_error(loss, np.log(2)) < 1e-15
  assert relative_error(by_logits, [[0, -0.5, 0.5]]) < 1e-15
  assert relative_error(by_labels, [[0, np.log(2), np.log(2)]]) < 1e-15
  assert np.isnan(of_torch(logits, labels, np.array(1.0))[0])


def test_a_class_without_weight_at_minus_infinity_is_zero_here_and_nan_there():
  """In the smoothed part, which is over all classes."""
  logits, labels = np.array([[1.0, 2.0, -np.inf, 0.0, 0.5]]), np.array([1])
  options = {"label_smoothing": 0.2, "reduction": "sum"}
  y_bar = np.array(1.0)
  with jax.enable_x64(True):
    ours = of_integer_labels(logits, labels, y_bar, class_weights=CLASS_WEIGHTS, **options)
  assert all(np.all(np.isfinite(np.asarray(x))) for x in ours)
  assert np.isnan(of_torch(logits, labels, y_bar, CLASS_WEIGHTS, **options)[0])
