"""Entries of a row, their distance from the largest, and the exponentials of that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# Where all entries but the largest sum to less than this, forming the whole sum first loses their
# digits. (Where another entry is nearly as large as the largest, they sum to more.)
DOMINATED = 0.75


def exp_of_difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``exp(x - shift)`` for ``x <= shift``, free of the rounding error of the difference.

  The difference d is off by up to u |d|, and its exponential by as many units of itself. The error
  is known exactly (the two-sum of Knuth), and exp(d + error) = exp(d) (1 + error).
  """
  d, error = difference_and_error(x, shift)
  e = jnp.exp(d)  # as in `in_passes`: XLA computes it once for both
  return e + e * error


def difference_and_error(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``x - shift`` for ``x <= shift``, and what that lacks if its exponential is not 0."""
  error = rounding_error_of_difference(jnp.maximum(x, underflow_floor(shift)), shift)
  return difference(x, shift), error


def rounding_error_of_difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """What ``x - shift`` lacks, exactly, of two finite numbers."""
  d = x - shift
  back = d - x
  return (x - (d - back)) - (shift + back)


def is_dominant(e: jax.Array) -> jax.Array:
  """1 where ``e <= 1`` is at least `DOMINATED`, 0 elsewhere; without a select, for speed."""
  return jnp.floor(e + (1 - DOMINATED))


def drop_dominant(e: jax.Array) -> jax.Array:
  """``e`` where it is below `DOMINATED`, 0 where it is more.

  The derivative is that of ``e`` everywhere: what is dropped is the constant 1 in S - 1, while its
  entry is part of S.
  """
  return e - lax.stop_gradient(e) * is_dominant(e)


def difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``x - shift``, with ``x`` rounded first.

  Where x is a product (a scale times the logits, say), CPUs and GPUs contract it with the
  subtraction into a fused multiply-add, which subtracts from the exact product: the result is not 0
  for the x that is ``shift``. Adding a zero that the compiler does not know prevents that.
  (https://github.com/openxla/xla/issues/41579)
  """
  zero = lax.optimization_barrier(0 * shift)
  return (x + zero) - shift


def finite_cost(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``shift - x``; finite for an x of -inf, so that its product with a probability of 0 is 0."""
  return jnp.minimum(-difference(x, shift), np.finfo(shift.dtype).max)


def underflow_floor(shift: jax.Array, *, barrier: bool = True) -> jax.Array:
  """A finite number whose exponential is 0 beside that of ``shift``."""
  far = 128 if shift.dtype == jnp.float32 else 1024
  below = jnp.minimum(shift * (1 - 2**-10), shift * (1 + 2**-10)) - far
  floor = jnp.maximum(below, np.finfo(shift.dtype).min)
  # Without the barrier XLA:CPU recomputes it for every entry of the row.
  return lax.optimization_barrier(floor) if barrier else floor


def entries(
  x: jax.Array, mask: jax.Array | None, any_: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
  """``x`` in ``dtype``, with -inf where masked; 0 in rows without ``any_``, which avoids NaN."""
  z = x.astype(dtype)
  if mask is None or any_ is None:
    return z
  return jnp.where(mask, z, jnp.where(any_, -jnp.inf, 0).astype(z.dtype))


def finite_or_zero(top: jax.Array) -> jax.Array:
  """The largest entry of a row, to subtract from all; 0 where it is not finite."""
  return jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
