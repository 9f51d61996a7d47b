"""What softmax and the losses share: the normalizer of a row, masks and broadcasting.

Notation, for the entries x_k of one row (those along the axes that are reduced):

    e_k = exp(x_k - shift),   S = sum_k e_k,   a_k = e_k / S   (the softmax, seed step 1)

where ``shift`` is the largest x_k. Every formula built on it holds for any number in its place, so
that the derivative of ``shift`` may be chosen: it is that of the dominant entry of the row, or 0
where there is none (`differentiable`), which keeps the digits of second derivatives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike

from softmax_jax import _devices as devices
from softmax_jax._devices import AxisName
from softmax_jax._forward_mode import varying_axes
from softmax_jax._typed import cond, custom_jvp, platform_dependent

Axes = tuple[int, ...]
Pair = tuple[jax.Array, jax.Array]

P = ParamSpec("P")
R = TypeVar("R")
Args = TypeVarTuple("Args")


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

  def below(self, z: jax.Array) -> jax.Array:
    """``z - shift``, exactly 0 for the dominant entry.

    Where z is computed by a product, each of the loops that XLA fuses it into may round it in its
    own way, and what the largest entry differs by from itself would be more than the share of all
    others.
    """
    return _below(z, self.shift, self.rest)

  def difference(self, z: jax.Array) -> jax.Array:
    """``z - shift`` without the select of `below`, which would slow down a sum on a CPU."""
    return _difference(z, self.shift, self.rest)


class OwnSum(NamedTuple):
  """What one device knows of a `Normalizer`, before the devices add up what they know.

  Attributes:
    shift: that of the `Normalizer`.
    rest: the sum over the entries of this device, but for what is left out.
    tops: what has been left out, ``exp(z - shift)`` of the largest entry here if that is at least
      `_DOMINATED`, otherwise 0; None where one device has the whole row.
    any: that of the `Normalizer`.
  """

  shift: jax.Array
  rest: jax.Array
  tops: jax.Array | None
  any: jax.Array | None


def compiled(rule: Callable[P, R], static_argnums: int | tuple[int, ...]) -> Callable[P, R]:
  """``rule`` as one program, not many small ones, where no `jax.jit` surrounds the call."""
  return jax.jit(rule, static_argnums=static_argnums, inline=True)


# Where the others sum to less than this, S - 1 would have lost digits of them. (Where another entry
# is nearly as large as the largest, they sum to more.)
_DOMINATED = 0.75

# Up to this many entries XLA:CPU unrolls a row, and both sums at once are cheaper than one.
_FEW = 16


def normalizer(
  x: jax.Array,
  mask: jax.Array | None,
  axes: Axes,
  dtype: DTypeLike,
  axis_name: AxisName | None = None,
) -> Normalizer:
  """The normalizer of the entries of ``x`` along ``axes`` (and over the devices of a mesh axis)."""
  s, _ = add_up(own_sum(x, mask, axes, dtype, axis_name), (), axis_name)
  return differentiable(s, entries(x, mask, s.any, dtype), axes, axis_name)


def add_up(
  own: OwnSum, others: devices.Parts, axis_name: AxisName | None
) -> tuple[Normalizer, devices.Parts]:
  """The normalizer, and the sums over the devices of ``others``, which are numbers per row."""
  if own.tops is None:
    return Normalizer(own.shift, own.rest, own.any), others
  # Where the largest entry alone is left out, `tops` add up to 1.
  rest, tops, others = devices.add_up((own.rest, own.tops, others), axis_name)
  return Normalizer(own.shift, rest + (tops - 1), own.any), others


@functools.partial(compiled, static_argnums=(2, 3, 4))
def own_sum(
  x: jax.Array,
  mask: jax.Array | None,
  axes: Axes,
  dtype: DTypeLike,
  axis_name: AxisName | None = None,
) -> OwnSum:
  """The sum of ``exp(z - shift)`` over the entries z on this device, all but the largest.

  The largest e is 1. Added to the others it wipes out their digits where it holds nearly all of the
  sum, so there the others are summed alone (`_if_small`).
  """
  z, top, any_ = entries_and_largest(x, mask, axes, dtype, axis_name)
  shift = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
  own_top = top if axis_name is None else largest(z, axes)
  tops = None
  if axis_name is not None:
    own_largest = jnp.exp(jnp.minimum(own_top, shift) - shift)
    tops = own_largest - _if_small(own_largest)
  left_out = 1 if tops is None else tops
  if few(x.shape, axes):
    e = exp_of_difference(z, shift)
    total, others = _sums(e, _if_small(e), axes)
    rest = total - left_out
  else:
    rest = jnp.sum(jnp.exp(difference(z, shift)), axis=axes, keepdims=True) - left_out

    def sum_of_others(
      x: jax.Array,
      mask: jax.Array | None,
      any_: jax.Array | None,
      shift: jax.Array,
      rest: jax.Array,
    ) -> jax.Array:
      e = exp_of_difference(entries(x, mask, any_, dtype), shift)
      return jnp.sum(_if_small(e), axis=axes, keepdims=True)

    others = where_needed(
      jnp.any(_dominated(rest)),
      sum_of_others,
      lambda x, mask, any_, shift, rest: rest,
      x,
      mask,
      any_,
      shift,
      rest,
    )
  rest = jnp.where(_dominated(rest), others, rest)
  return OwnSum(shift, jnp.where(own_top == jnp.inf, jnp.inf, rest), tops, any_)


def entries_and_largest(
  x: jax.Array, mask: jax.Array | None, axes: Axes, dtype: DTypeLike, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The `entries`, the largest of each row, and whether any of the row counts (on all devices)."""
  any_ = any_entry(mask, axes)
  if axis_name is None:
    z = entries(x, mask, any_, dtype)
    return z, largest(z, axes), any_
  top, any_ = devices.largest(
    largest(masked(x.astype(dtype), mask, -jnp.inf), axes), any_, axis_name
  )
  return entries(x, mask, any_, dtype), top, any_


def differentiable(
  s: Normalizer, z: jax.Array, axes: Axes, axis_name: AxisName | None
) -> Normalizer:
  """``s`` with its derivative by the entries z of which it is made."""
  shift, rest = _differentiable(z, s.shift, s.rest, axes, axis_name)
  return Normalizer(shift, rest, s.any)


# With z_t the dominant entry of a row, shift_dot = z_dot_t, and the derivatives of
#   e_k = exp(z_k - shift)     are   e_dot_k = e_k (z_dot_k - z_dot_t),  exactly 0 for k = t,
#   rest = sum_{k != t} e_k          rest_dot = sum_{k != t} e_dot_k.
# No term is larger than what is left of the row beside t, so that second derivatives of a row whose
# t has nearly all of the probability keep their digits: with a constant shift t's own e_dot_t would
# have to cancel. Without a dominant entry, shift_dot = 0 and rest_dot = S_dot = sum_k e_dot_k.
#
# JAX 0.10 forgets the rules of custom_jvp functions for what it computes beforehand in a scan that
# it differentiates twice. The derivatives are those of their code there, here of `own_sum` with a
# constant shift. So a backward rule calls `differentiable` again: it has both, the rule for the
# normalizer and those for the functions of it below, or neither.
def _shift_and_rest(
  z: jax.Array, shift: jax.Array, rest: jax.Array, axes: Axes, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
  return shift, rest


def _shift_and_rest_jvp(
  axes: Axes, axis_name: AxisName | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
  z, shift, rest = primals
  z_dot = tangents[0]
  shift, rest = _differentiable(z, shift, rest, axes, axis_name)
  dominant = _is_dominant(z, shift, rest)
  z_dot_t = jnp.where(dominant, z_dot, jnp.zeros_like(z_dot))
  shift_dot = devices.row_sum(z_dot_t, axes, axis_name)
  e_dot = _exp_dot(z, shift, rest, z_dot, shift_dot)
  return (shift, rest), (shift_dot, devices.row_sum(e_dot, axes, axis_name))


_differentiable = custom_jvp(_shift_and_rest, nondiff_argnums=(3, 4))
_differentiable.defjvp(_shift_and_rest_jvp)


def _dominated(rest: jax.Array) -> jax.Array:
  return jnp.abs(rest) < _DOMINATED


def _is_dominant(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  """Whether an entry holds most of the sum of its row: no other is as near to the shift as -1/4."""
  return _dominated(rest) & (z - shift > -0.25)


def _if_small(e: jax.Array) -> jax.Array:
  """``e`` where it is below `_DOMINATED`, 0 where it is more; without a select, for the speed.

  The derivative is that of ``e`` everywhere: what is left out is the 1 in S - 1, a constant, but
  its entry is part of S.
  """
  return e - lax.stop_gradient(e) * jnp.floor(e + (1 - _DOMINATED))


def largest(z: jax.Array, axes: Axes) -> jax.Array:
  """The largest entry of each row, a constant for every derivative."""
  return lax.stop_gradient(jnp.max(z, axis=axes, keepdims=True, initial=-jnp.inf))


def few(shape: tuple[int, ...], axes: Axes) -> bool:
  """Whether a row along ``axes`` has only a few entries."""
  size = math.prod(shape[axis] for axis in axes)
  return not is_symbolic_dim(size) and size <= _FEW


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
  def _(primals: Pair, tangents: Pair) -> tuple[Pair, Pair]:
    x_dot, y_dot = (jnp.sum(dot, axis=axes, keepdims=True) for dot in tangents)
    return sums(*primals), (x_dot, y_dot)

  return sums(x, y)


def exp_of_difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``exp(x - shift)`` for ``x <= shift``, free of the rounding error of the difference.

  The difference d is off by up to u |d|, and its exponential by as many units of itself. The error
  is known exactly (the two-sum of Knuth), and exp(d + error) = exp(d) (1 + error).
  """
  y = jnp.maximum(x, vanishing(shift))
  d = y - shift
  back = d - y
  error = (y - (d - back)) - (shift + back)
  e = jnp.exp(difference(x, shift))  # as in `own_sum`: XLA computes it once for both
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
def _difference(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  return difference(z, shift)


@jax.custom_jvp
def _below(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  d = z - shift
  return d - lax.stop_gradient(jnp.where(_is_dominant(z, shift, rest), d, jnp.zeros_like(d)))


@_difference.defjvp
def _difference_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _difference(*primals), _difference_dot(primals, tangents)


@_below.defjvp
def _below_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _below(*primals), _difference_dot(primals, tangents)


def _difference_dot(primals: Any, tangents: Any) -> jax.Array:
  d_dot = tangents[0] - tangents[1]
  return jnp.where(_is_dominant(*primals), jnp.zeros_like(d_dot), d_dot)


def difference(x: jax.Array, shift: jax.Array) -> jax.Array:
  """``x - shift``, with ``x`` rounded before.

  Where x is a product that XLA fuses with this, a scale times the logits say, the CPU and the GPU
  would subtract from the exact product: more exact, but not 0 for the x that is ``shift``. So the
  product is added to a zero first, one that the compiler does not know.
  """
  zero = lax.optimization_barrier(0 * shift)
  return (x + zero) - shift


def vanishing(shift: jax.Array) -> jax.Array:
  """A finite number whose exponential is 0 beside that of ``shift``."""
  far = 128 if shift.dtype == jnp.float32 else 1024
  below = jnp.minimum(shift * (1 - 2**-10), shift * (1 + 2**-10)) - far
  # Without the barrier XLA:CPU computes it again for every entry of the row.
  return lax.optimization_barrier(jnp.maximum(below, np.finfo(shift.dtype).min))


def _where_needed(
  needed: jax.Array,
  yes: Callable[[*Args], jax.Array],
  no: Callable[[*Args], jax.Array],
  *args: *Args,
) -> jax.Array:
  """``yes(*args)`` if ``needed``, else ``yes(*args)`` or the cheaper ``no(*args)``.

  A second pass over an array costs as much as the first where arithmetic is the limit, as on a CPU:
  there it is left out if no row needs it. Elsewhere it is fused with the first, and a branch would
  only part them. Inside `jax.shard_map` there is none either: JAX cannot vmap it there.

  The derivative is always that of ``yes``: that of ``no`` may be NaN where its value is replaced.
  """
  if any(varying_axes(x) for x in jax.tree.leaves(args)):
    return yes(*args)

  def branch(needed: jax.Array, *args: *Args) -> jax.Array:
    return cond(needed, yes, no, *args)

  def no_branch(needed: jax.Array, *args: *Args) -> jax.Array:
    return yes(*args)

  return platform_dependent(needed, *args, cpu=branch, default=no_branch)


def _where_needed_jvp(
  yes: Callable[..., jax.Array], no: Callable[..., jax.Array], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  needed, *args = primals
  return where_needed(needed, yes, no, *args), jax.jvp(yes, tuple(args), tangents[1:])[1]


where_needed = custom_jvp(_where_needed, nondiff_argnums=(1, 2))
where_needed.defjvp(_where_needed_jvp)


def masked(x: jax.Array, mask: jax.Array | None, fill: float) -> jax.Array:
  """``x`` with ``fill`` where the mask is False."""
  return x if mask is None else jnp.where(mask, x, jnp.full((), fill, x.dtype))


def entries(
  x: jax.Array, mask: jax.Array | None, any_: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
  """``x`` in ``dtype``, with -inf where masked; 0 in rows without ``any_``, which spares NaNs."""
  z = x.astype(dtype)
  if mask is None or any_ is None:
    return z
  return jnp.where(mask, z, jnp.where(any_, -jnp.inf, 0).astype(z.dtype))


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
