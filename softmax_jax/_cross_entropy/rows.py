"""What the two rules share: masks, the uniform label, and numbers per row.

Arrays of one number per row keep the class axes with size 1, so that they broadcast against the
logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from softmax_jax._normalizer import Axes, Normalizer, entries, masked


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
  # A shift that two sums along the row share is put into memory, repeated along it, on a CPU.
  shift = jax.lax.optimization_barrier(s.shift)
  return (shift - z) + s.log_sum()


def uniform_loss(
  weights: jax.Array | None,
  logits: jax.Array,
  mask: jax.Array | None,
  s: Normalizer,
  axes: Axes,
) -> jax.Array:
  """``-sum_k u_k log a_k`` with the (weighted) uniform label u."""
  dtype = s.shift.dtype
  cost = minus_log_softmax(entries(logits, mask, axes, dtype), s)
  if weights is None and mask is None:
    return jnp.sum(cost, axis=axes, keepdims=True) / class_count(mask, logits.shape, axes, dtype)
  u = uniform_label(weights, mask, logits.shape, axes, dtype)
  # What has no weight adds nothing, even at an infinite cost.
  bound = jnp.where(u == 0, jnp.zeros_like(u), jnp.inf)
  return jnp.sum(u * jnp.minimum(cost, bound), axis=axes, keepdims=True)


def cost_of(label: jax.Array, cost: jax.Array) -> jax.Array:
  """``cost`` with 0 where a label of exactly 0 meets an infinite one."""
  return jnp.where((label == 0) & (cost == jnp.inf), jnp.zeros_like(cost), cost)


def class_count(
  mask: jax.Array | None, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike
) -> int | jax.Array:
  """The number of unmasked classes of each row, at least 1."""
  if mask is None:
    return max(1, math.prod(shape[axis] for axis in axes))
  full = tuple(n if axis in axes else mask.shape[axis] for axis, n in enumerate(shape))
  count = jnp.sum(jnp.broadcast_to(mask, full), axis=axes, keepdims=True)
  return jnp.maximum(count, 1).astype(dtype)


def uniform_label(
  weights: jax.Array | None,
  mask: jax.Array | None,
  shape: tuple[int, ...],
  axes: Axes,
  dtype: DTypeLike,
) -> jax.Array:
  """The uniform distribution over the unmasked classes, times the weights of the classes."""
  if weights is None:
    weights = jnp.ones([n if axis in axes else 1 for axis, n in enumerate(shape)], dtype)
  return masked(weights / class_count(mask, shape, axes, dtype), mask, 0)
