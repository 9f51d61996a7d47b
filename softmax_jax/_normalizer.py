"""What softmax and the losses share: the normalizer of a row, masks and broadcasting.

Notation, for the entries x_k of one row (those along the axes that are reduced):

    e_k = exp(x_k - shift),   S = sum_k e_k,   a_k = e_k / S   (the softmax, seed step 1)

where ``shift`` is the largest x_k. Every formula built on it holds for any constant in its place,
so its derivative is zero and is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[int, ...]


class Normalizer(NamedTuple):
  """The normalizer S of each row, as numbers that keep all digits of its logarithm.

  Both have the shape of the row sums with the reduced axes kept.

  Attributes:
    shift: the largest entry, or 0 where that is not finite.
    rest: S - 1, the sum over all entries but the largest, to a few rounding errors of its own size;
      -1 in a row of -inf alone, +inf in a row with +inf.
  """

  shift: jax.Array
  rest: jax.Array

  def log_sum(self) -> jax.Array:
    """``log S``; adding ``shift`` gives the logsumexp."""
    return jnp.log1p(self.rest)


def normalizer(x: jax.Array, axes: Axes) -> Normalizer:
  """The normalizer of ``exp(x)`` along ``axes``.

  The largest e is exactly 1. Added to the others it wipes out their digits where it holds nearly
  all of the sum, so there the others are summed alone: ``e - floor(e)`` is 0 for the largest and e
  for the others. (It is 0, too, for entries tied with the largest, but then S >= 2.)
  """
  top = lax.stop_gradient(jnp.max(x, axis=axes, keepdims=True, initial=-jnp.inf))
  shift = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
  e = jnp.exp(x - shift)
  rest = jnp.sum(e, axis=axes, keepdims=True) - 1
  others = jnp.sum(e - jnp.floor(e), axis=axes, keepdims=True)
  return Normalizer(shift, jnp.where(jnp.abs(rest) < 0.25, others, rest))


def fill_masked(x: jax.Array, mask: jax.Array, axes: Axes) -> jax.Array:
  """``x`` with -inf where masked, and 0 in rows that are masked altogether (no NaN comes of those).

  The select also cuts the derivative: masked entries have gradient exactly 0.
  """
  fill = jnp.where(jnp.any(mask, axis=axes, keepdims=True), -jnp.inf, 0).astype(x.dtype)
  return jnp.where(mask, x, fill)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The sum of ``x`` over the axes along which an array of ``shape`` was repeated."""
  axes = tuple(i for i, size in enumerate(shape) if size != x.shape[i])
  return jnp.sum(x, axis=axes, keepdims=True) if axes else x
