"""What softmax and the losses share: the normalizer of a row, masks and broadcasting.

Notation, for the entries x_k of one row (those along the axes that are reduced):

    e_k = exp(x_k - shift),   S = sum_k e_k,   a_k = e_k / S   (the softmax, seed step 1)

where ``shift`` is the largest x_k. Every formula built on it holds for any constant in its place,
so its derivative is zero and is dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

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


def compiled(rule: Callable, static_argnums: int) -> Callable:
  """``rule`` as one program, not many small ones, where no `jax.jit` surrounds the call."""
  return jax.jit(rule, static_argnums=static_argnums, inline=True)


# Where the others sum to less than this, S - 1 would have lost digits of them. (Where another entry
# is as large as the largest, they sum to 1 or more.)
_DOMINATED = 0.99

# Up to this many entries XLA:CPU unrolls a row, and both sums at once are cheaper than one.
_FEW = 16


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def normalizer(x: jax.Array, mask: jax.Array | None, axes: Axes, dtype: DTypeLike) -> Normalizer:
  """The normalizer of ``exp(entries(x, mask, axes, dtype))`` along ``axes``.

  The largest e is exactly 1. Added to the others it wipes out their digits where it holds nearly
  all of the sum, so there the others are summed alone: ``e - floor(e)`` is 0 for the largest and e
  for the others. (It is 0, too, for entries tied with the largest, but then S >= 2.)
  """
  z = entries(x, mask, axes, dtype)
  top = largest(z, axes)
  shift = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
  if few(x.shape, axes):
    e = exp_of_difference(z, shift)
    total, others = _sums(e, e - jnp.floor(e), axes)
    rest = total - 1
  else:
    rest = jnp.sum(jnp.exp(z - shift), axis=axes, keepdims=True) - 1

    def sum_of_others(x, mask, shift, rest):
      e = exp_of_difference(entries(x, mask, axes, dtype), shift)
      return jnp.sum(e - jnp.floor(e), axis=axes, keepdims=True)

    others = where_needed(
      jnp.any(_dominated(rest)),
      sum_of_others,
      lambda x, mask, shift, rest: rest,
      x,
      mask,
      shift,
      rest,
    )
  rest = jnp.where(_dominated(rest), others, rest)
  return Normalizer(shift, jnp.where(top == jnp.inf, jnp.inf, rest))


def _dominated(rest: jax.Array) -> jax.Array:
  return jnp.abs(rest) < _DOMINATED


def largest(z: jax.Array, axes: Axes) -> jax.Array:
  """The largest entry of each row, a constant for every derivative."""
  return lax.stop_gradient(jnp.max(z, axis=axes, keepdims=True, initial=-jnp.inf))


def few(shape: tuple[int, ...], axes: Axes) -> bool:
  """Whether a row along ``axes`` has only a few entries."""
  return math.prod(shape[axis] for axis in axes) <= _FEW


def _sums(x: jax.Array, y: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
  """The sums of two arrays along ``axes``, in one pass."""
  zero = jnp.zeros((), x.dtype)
  sums = lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)
  return jnp.expand_dims(sums[0], axes), jnp.expand_dims(sums[1], axes)


def exp_of_difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``exp(x - shift)`` for ``x <= shift``, free of the rounding error of the difference.

  The difference d is off by up to u |d|, and its exponential by as many units of itself. The error
  is known exactly (the two-sum of Knuth), and exp(d + error) = exp(d) (1 + error).
  """
  y = jnp.maximum(x, vanishing(shift))
  d = y - shift
  back = d - y
  error = (y - (d - back)) - (shift + back)
  e = jnp.exp(x - shift)  # as it stands in `normalizer`, so that XLA computes it once for both
  return e + e * error


def vanishing(shift: jax.Array) -> jax.Array:
  """A finite number whose exponential is 0 beside that of ``shift``."""
  far = 128 if shift.dtype == jnp.float32 else 1024
  below = jnp.minimum(shift * (1 - 2**-10), shift * (1 + 2**-10)) - far
  # Without the barrier XLA:CPU computes it again for every entry of the row.
  return lax.optimization_barrier(jnp.maximum(below, jnp.finfo(shift.dtype).min))


def where_needed(
  needed: jax.Array, yes: Callable, no: Callable, *args: jax.Array | None
) -> jax.Array:
  """``yes(*args)`` if ``needed``, else ``yes(*args)`` or the cheaper ``no(*args)``.

  A second pass over an array costs as much as the first where arithmetic is the limit, as on a CPU:
  there it is left out if no row needs it. Elsewhere it is fused with the first, and a branch would
  only part them.
  """
  return lax.platform_dependent(
    needed,
    *args,
    cpu=lambda needed, *args: lax.cond(needed, yes, no, *args),
    default=lambda needed, *args: yes(*args),
  )


def masked(x: jax.Array, mask: jax.Array | None, fill: float) -> jax.Array:
  """``x`` with ``fill`` where the mask is False."""
  return x if mask is None else jnp.where(mask, x, jnp.full((), fill, x.dtype))


def entries(x: jax.Array, mask: jax.Array | None, axes: Axes, dtype: DTypeLike) -> jax.Array:
  """``x`` in ``dtype``, with -inf where masked; 0 in rows masked altogether, which spares NaNs."""
  z = x.astype(dtype)
  if mask is None:
    return z
  fill = jnp.where(jnp.any(mask, axis=axes, keepdims=True), -jnp.inf, 0).astype(z.dtype)
  return jnp.where(mask, z, fill)


def any_entry(mask: jax.Array | None, axes: Axes) -> jax.Array | None:
  """Whether each row has an entry that is not masked; None where nothing is masked."""
  return None if mask is None else jnp.any(mask, axis=axes, keepdims=True)


def broadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """``x`` with shape ``shape``; itself, not a copy, where it has that already."""
  return x if x.shape == shape else jnp.broadcast_to(x, shape)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The sum of ``x`` over the axes along which an array of ``shape`` was repeated."""
  axes = tuple(i for i, size in enumerate(shape) if size != x.shape[i])
  return jnp.sum(x, axis=axes, keepdims=True) if axes else x
