"""What the two rules share: masks, the uniform label, and numbers per row.

Arrays of one number per row keep the class axes with size 1, so that they broadcast against the
logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softmax_jax._normalizer import Axes, Normalizer, masked


class PerRow(NamedTuple):
  """The outputs of a rule.

  Attributes:
    nll: the negative log-likelihood of the label.
    lse: the log-normalizer.
    uniform: the loss against the (weighted) uniform label, or None where labels are not smoothed.
  """

  nll: jax.Array
  lse: jax.Array
  uniform: jax.Array | None


def inverse_sum(s: Normalizer) -> jax.Array:
  """``1 / S``; it makes every probability NaN in a row with +inf or of -inf alone."""
  return jnp.where(s.rest == jnp.inf, jnp.nan, 1 / (1 + s.rest))


def minus_log_softmax(z: jax.Array, s: Normalizer) -> jax.Array:
  """``-log a``, as a sum of two terms that are at least 0."""
  return (s.shift - z) + s.log_sum()


def cost_of(label: jax.Array, cost: jax.Array) -> jax.Array:
  """``cost`` with 0 where a label of exactly 0 meets an infinite one: 0 log 0 = 0 by convention."""
  return jnp.where((label == 0) & (cost == jnp.inf), jnp.zeros_like(cost), cost)


def class_count(mask: jax.Array | None, shape: tuple[int, ...], axes: Axes) -> int | jax.Array:
  """The number of unmasked classes of each row, at least 1."""
  if mask is None:
    return max(1, math.prod(shape[axis] for axis in axes))
  full = tuple(n if axis in axes else mask.shape[axis] for axis, n in enumerate(shape))
  return jnp.maximum(jnp.sum(jnp.broadcast_to(mask, full), axis=axes, keepdims=True), 1)


def uniform_label(
  weights: jax.Array | None, mask: jax.Array | None, z: jax.Array, axes: Axes
) -> jax.Array:
  """The uniform distribution over the unmasked classes, times the weights of the classes."""
  if weights is None:
    weights = jnp.ones([n if axis in axes else 1 for axis, n in enumerate(z.shape)], z.dtype)
  return masked(weights / class_count(mask, z.shape, axes), mask, 0)
