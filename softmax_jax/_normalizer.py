"""The normalizer of a row, which softmax and the losses share.

Notation, for the entries x_k of one row (those along the axes that are reduced):

    e_k = exp(x_k - shift),   S = sum_k e_k,   a_k = e_k / S   (the softmax, seed step 1)

where ``shift`` is the largest x_k. Every formula below holds for any other number as well, so
that the derivative of ``shift`` may be chosen: it is that of the dominant entry of the row, or 0
where there is none (`differentiable`), which keeps the digits of second derivatives. "Seed step 1"
to "seed step 6" are the steps of the derivation in `softmax_jax.derivatives`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from softmax_jax._arrays import compiled, masked, where_needed
from softmax_jax._rows import Axes, Parts, Rows


class Normalizer(NamedTuple):
  """The normalizer S of each row, as numbers that keep all digits of its logarithm.

  All have the shape of the row sums with the reduced axes kept.

  Attributes:
    shift: the largest entry, or 0 where that is not finite.
    rest: S - 1, the sum over all entries but the largest, to a few rounding errors of its own size;
      -1 in a row of -inf alone, +inf in a row with +inf.
    any: whether any entry of the row counts, or None where nothing is masked.
  """

  shift: jax.Array
  rest: jax.Array
  any: jax.Array | None

  def log_sum(self) -> jax.Array:
    """``log S``; adding ``shift`` gives the logsumexp."""
    # The inner select keeps the infinite slope of the logarithm at S = 0 out of derivatives.
    empty = self.rest == -1
    return jnp.where(empty, -jnp.inf, jnp.log1p(jnp.where(empty, 0, self.rest)))

  def exp(self, z: jax.Array) -> jax.Array:
    """``exp(z - shift)``, free of the rounding error of the difference."""
    return _exp(z, self.shift, self.rest)

  def minus_shift(self, z: jax.Array) -> jax.Array:
    """``z - shift``, exactly 0 for the dominant entry.

    Where z is a product, XLA may recompute it in each loop that uses it, with another rounding, so
    that ``max(z) - shift`` need not be 0 (https://github.com/jax-ml/jax/issues/38609). This error
    could exceed the sum of all other entries.
    """
    return _minus_shift(z, self.shift, self.rest)

  def minus_shift_in_a_sum(self, z: jax.Array) -> jax.Array:
    """``z - shift`` without the select of `minus_shift`, which would slow down a sum on a CPU."""
    return _minus_shift_in_a_sum(z, self.shift, self.rest)


class LocalNormalizer(NamedTuple):
  """What one device knows of a `Normalizer`.

  Attributes:
    shift: that of the `Normalizer`.
    rest: the sum over the entries of this device, excluding `excluded_max`.
    excluded_max: ``exp(z - shift)`` of the largest entry on this device if that is at least
      `_DOMINATED`, otherwise 0; None where one device has the whole row.
    any: that of the `Normalizer`.
  """

  shift: jax.Array
  rest: jax.Array
  excluded_max: jax.Array | None
  any: jax.Array | None

  def over_devices(self, others: Parts, rows: Rows) -> tuple[Normalizer, Parts]:
    """The normalizer, and the sums over the devices of ``others``, which are per-row scalars."""
    if self.excluded_max is None:
      return Normalizer(self.shift, self.rest, self.any), others
    # Where the largest entry alone is excluded, `excluded_max` adds up to 1.
    rest, excluded, others = rows.sum_over_devices((self.rest, self.excluded_max, others))
    return Normalizer(self.shift, rest + (excluded - 1), self.any), others


# Where the others sum to less than this, forming S first loses their digits. (Where another entry
# is nearly as large as the largest, they sum to more.)
_DOMINATED = 0.75


def normalizer(x: jax.Array, mask: jax.Array | None, rows: Rows, dtype: DTypeLike) -> Normalizer:
  """The normalizer of the entries of ``x`` in each row."""
  s, _ = local_normalizer(x, mask, rows, dtype).over_devices((), rows)
  return differentiable(s, entries(x, mask, s.any, dtype), rows)


@functools.partial(compiled, static_argnums=(2, 3))
def local_normalizer(
  x: jax.Array, mask: jax.Array | None, rows: Rows, dtype: DTypeLike
) -> LocalNormalizer:
  """The sum of ``exp(z - shift)`` over the entries z on this device, all but the largest.

  The largest e is 1. Added to the others it wipes out their digits where it holds nearly all of the
  sum, so there the others are summed alone (`_drop_dominant`).
  """
  z, top, any_ = entries_and_largest(x, mask, rows, dtype)
  shift = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
  local_top, excluded_max, excluded = top, None, 1
  if rows.axis_name is not None:
    local_top = rows.local_max(z)
    e_top = jnp.exp(jnp.minimum(local_top, shift) - shift)
    excluded = excluded_max = e_top - _drop_dominant(e_top)
  if rows.are_short(x.shape):  # on a CPU both sums at once are cheaper than one
    e = exp_of_difference(z, shift)
    total, others = _sums(e, _drop_dominant(e), rows.axes)
    rest = total - excluded
  else:
    rest = rows.local_sum(jnp.exp(difference(z, shift))) - excluded

    def sum_of_others(
      x: jax.Array, mask: jax.Array | None, any_: jax.Array | None, shift: jax.Array
    ) -> jax.Array:
      e = exp_of_difference(entries(x, mask, any_, dtype), shift)
      return rows.local_sum(_drop_dominant(e))

    others = where_needed(jnp.any(_dominated(rest)), sum_of_others, rest, x, mask, any_, shift)
  rest = jnp.where(_dominated(rest), others, rest)
  return LocalNormalizer(shift, jnp.where(local_top == jnp.inf, jnp.inf, rest), excluded_max, any_)


def entries_and_largest(
  x: jax.Array, mask: jax.Array | None, rows: Rows, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The `entries`, the largest of each row, and whether any of the row counts (on all devices)."""
  any_ = None if mask is None else jnp.any(mask, axis=rows.axes, keepdims=True)
  if rows.axis_name is None:
    z = entries(x, mask, any_, dtype)
    return z, rows.local_max(z), any_
  local_top = rows.local_max(masked(x.astype(dtype), mask, -jnp.inf))
  top, any_ = rows.max_over_devices(local_top, any_)
  return entries(x, mask, any_, dtype), top, any_


# With z_t the dominant entry of a row, shift_dot = z_dot_t, and the derivatives of
#   e_k = exp(z_k - shift)     are   e_dot_k = e_k (z_dot_k - z_dot_t),  exactly 0 for k = t,
#   rest = sum_{k != t} e_k          rest_dot = sum_{k != t} e_dot_k.
# All terms are as small as the entries beside t, so that second derivatives keep their digits when
# a_t is close to 1. (With a constant shift e_dot_t would have to cancel.) Without a dominant entry,
# shift_dot = 0 and rest_dot = S_dot = sum_k e_dot_k.
#
# In a scan that is differentiated twice, JAX 0.10 drops the rules of custom_jvp functions whose
# arguments it knows beforehand, and differentiates their code: here `local_normalizer`, with a
# constant shift. So a backward rule calls `differentiable` again. Then either both the normalizer
# and the functions of it below have their rules, or neither has.
def differentiable(s: Normalizer, z: jax.Array, rows: Rows) -> Normalizer:
  """``s``, computed from the entries z, with its derivative by them."""
  shift, rest = _differentiable(z, s.shift, s.rest, rows)
  return Normalizer(shift, rest, s.any)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _differentiable(
  z: jax.Array, shift: jax.Array, rest: jax.Array, rows: Rows
) -> tuple[jax.Array, jax.Array]:
  return shift, rest


@_differentiable.defjvp
def _differentiable_jvp(rows: Rows, primals: Any, tangents: Any) -> tuple[Any, Any]:
  z, shift, rest = primals
  z_dot = tangents[0]
  shift, rest = _differentiable(z, shift, rest, rows)
  dominant = _is_dominant(z, shift, rest)
  shift_dot = rows.sum(jnp.where(dominant, z_dot, jnp.zeros_like(z_dot)))  # z_dot_t
  rest_dot = rows.sum(_exp_dot(z, shift, rest, z_dot, shift_dot))  # sum_{k != t} e_dot_k
  return (shift, rest), (shift_dot, rest_dot)


def _dominated(rest: jax.Array) -> jax.Array:
  return jnp.abs(rest) < _DOMINATED


def _is_dominant(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  """Whether an entry dominates its row; then no other lies within 1/4 of it: exp(-1/4) > 0.75."""
  return _dominated(rest) & (z - shift > -0.25)


def _drop_dominant(e: jax.Array) -> jax.Array:
  """``e`` where it is below `_DOMINATED`, 0 where it is more; without a select, for speed.

  The derivative is that of ``e`` everywhere: what is dropped is the constant 1 in S - 1, while its
  entry is part of S.
  """
  return e - lax.stop_gradient(e) * jnp.floor(e + (1 - _DOMINATED))


def _sums(x: jax.Array, y: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
  """The sums of two arrays along ``axes``, in one pass."""

  @jax.custom_jvp
  def sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    zero = jnp.zeros((), x.dtype)
    both = lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)
    return jnp.expand_dims(both[0], axes), jnp.expand_dims(both[1], axes)

  # They are linear. JAX would differentiate such a reduction by a tree of slices, which it refuses
  # of explicitly sharded arrays, and under `jax.vmap` with an `spmd_axis_name`.
  @sums.defjvp
  def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
    x_dot, y_dot = (jnp.sum(dot, axis=axes, keepdims=True) for dot in tangents)
    return sums(*primals), (x_dot, y_dot)

  return sums(x, y)


def exp_of_difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``exp(x - shift)`` for ``x <= shift``, free of the rounding error of the difference.

  The difference d is off by up to u |d|, and its exponential by as many units of itself. The error
  is known exactly (the two-sum of Knuth), and exp(d + error) = exp(d) (1 + error).
  """
  y = jnp.maximum(x, underflow_floor(shift))
  d = y - shift
  back = d - y
  error = (y - (d - back)) - (shift + back)
  e = jnp.exp(difference(x, shift))  # as in `local_normalizer`: XLA computes it once for both
  return e + e * error


@jax.custom_jvp
def _exp(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  return exp_of_difference(z, shift)


@_exp.defjvp
def _exp_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _exp(*primals), _exp_dot(*primals, *tangents[:2])


def _exp_dot(
  z: jax.Array, shift: jax.Array, rest: jax.Array, z_dot: jax.Array, shift_dot: jax.Array
) -> jax.Array:
  """The derivative of `_exp`; that of the dominant entry is 0."""
  e = _exp(z, shift, rest)
  e = jnp.where(_is_dominant(z, shift, rest), jnp.zeros_like(e), e)
  return e * (z_dot - shift_dot)


@jax.custom_jvp
def _minus_shift(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  d = z - shift
  return d - lax.stop_gradient(jnp.where(_is_dominant(z, shift, rest), d, jnp.zeros_like(d)))


@_minus_shift.defjvp
def _minus_shift_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _minus_shift(*primals), _minus_shift_dot(primals, tangents)


@jax.custom_jvp
def _minus_shift_in_a_sum(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  return difference(z, shift)


@_minus_shift_in_a_sum.defjvp
def _minus_shift_in_a_sum_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _minus_shift_in_a_sum(*primals), _minus_shift_dot(primals, tangents)


def _minus_shift_dot(primals: Any, tangents: Any) -> jax.Array:
  """The derivative of both: z_dot - shift_dot, and 0 for the dominant entry."""
  d_dot = tangents[0] - tangents[1]
  return jnp.where(_is_dominant(*primals), jnp.zeros_like(d_dot), d_dot)


def difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``x - shift``, with ``x`` rounded first.

  Where x is a product (a scale times the logits, say), CPUs and GPUs contract it with the
  subtraction into a fused multiply-add, which subtracts from the exact product: the result is not 0
  for the x that is ``shift``. Adding a zero that the compiler does not know prevents that.
  (https://github.com/openxla/xla/issues/41579)
  """
  zero = lax.optimization_barrier(0 * shift)
  return (x + zero) - shift


def underflow_floor(shift: jax.Array) -> jax.Array:
  """A finite number whose exponential is 0 beside that of ``shift``."""
  far = 128 if shift.dtype == jnp.float32 else 1024
  below = jnp.minimum(shift * (1 - 2**-10), shift * (1 + 2**-10)) - far
  # Without the barrier XLA:CPU recomputes it for every entry of the row.
  return lax.optimization_barrier(jnp.maximum(below, np.finfo(shift.dtype).min))


def entries(
  x: jax.Array, mask: jax.Array | None, any_: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
  """``x`` in ``dtype``, with -inf where masked; 0 in rows without ``any_``, which avoids NaN."""
  z = x.astype(dtype)
  if mask is None or any_ is None:
    return z
  return jnp.where(mask, z, jnp.where(any_, -jnp.inf, 0).astype(z.dtype))
