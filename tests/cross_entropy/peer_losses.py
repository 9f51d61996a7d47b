"""The losses and their gradients with the options that torch has too."""

import functools

import jax
import numpy as np
import pytest
from oracle import random

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

REDUCTIONS = ("none", "sum", "mean")
SHAPES = {"rows": (4, 5), "images": (4, 5, 2, 2)}  # five classes on axis 1
CLASS_WEIGHTS = np.array([0.5, 2.0, 0.0, 0.75, 1.5])  # one class has no weight
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
with_and_without_weights = pytest.mark.parametrize("weighted", [False, True])


def integer_labels(shape):
  return np.random.default_rng(1).integers(0, shape[1], (shape[0], *shape[2:]))


def probabilities(shape):
  t = np.random.default_rng(2).random(shape)
  t[t < 0.2] = 0
  return t / t.sum(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames="reduction")
def of_integer_labels(logits, labels, y_bar, *, reduction, **options):
  loss, pull = jax.vjp(
    lambda z: softmax_cross_entropy_with_integer_labels(
      z, labels, axis=1, reduction=reduction, **options
    ),
    logits,
  )
  return loss, *pull(y_bar)


@functools.partial(jax.jit, static_argnames="reduction")
def of_soft_labels(logits, labels, y_bar, *, reduction, **options):
  loss, pull = jax.vjp(
    lambda z, t: softmax_cross_entropy(z, t, axis=1, reduction=reduction, **options),
    logits,
    labels,
  )
  return loss, *pull(y_bar)


def cotangent(shape, reduction):
  return random(3, (shape[0], *shape[2:]) if reduction == "none" else (), np.float64)


def coefficients(smoothings, weighted):
  """The options of ours and of torch's, for each smoothing."""
  for smoothing in smoothings:
    ours, theirs = {"label_smoothing": smoothing}, {"label_smoothing": smoothing}
    if weighted:
      ours["class_weights"] = theirs["weight"] = CLASS_WEIGHTS
    yield ours, theirs
