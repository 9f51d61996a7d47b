"""The sums along a row that make its normalizer, in passes over the row and in one read of it.

Both forms compute the same numbers from the entries z_k on this device:

    top = max_k z_k,   rest = (sum_k exp(z_k - top)) - 1,
    and for weights p_k:   cost = sum_k p_k (top - z_k),   weight = sum_k p_k,
    or for the entropy:    spread = sum_k exp(z_k - top) (top - z_k).

The largest exponential is 1. Added to the others it wipes out their digits where it holds nearly
all of the sum, so that the others must be summed without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from softmax_jax._arrays import batched_like, masked, where_needed
from softmax_jax._devices import index_along, varying_alike
from softmax_jax._exponentials import (
  DOMINATED,
  difference,
  drop_dominant,
  exp_of_difference,
  finite_cost,
  finite_or_zero,
)
from softmax_jax._forward_mode import with_derivative_of
from softmax_jax._platform import Forms, in_form_of_platform
from softmax_jax._products import cost_of, scale_or_zero
from softmax_jax._rows import Axes, Rows


class Weights(NamedTuple):
  """The weights p_k of a cost: a label times a weight of its class.

  Attributes:
    labels: one for each entry, or fewer that broadcast; None where all are 1.
    classes: the weights of the classes; None where all are 1.
    counts: the rows outside of which a derivative by the weights is 0 where it would not be finite;
      None where all count.
  """

  labels: jax.Array | None
  classes: jax.Array | None
  counts: jax.Array | None = None

  def p(self, mask: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """The weights, 0 where masked, with as few entries as broadcast to all."""
    label = jnp.ones((), dtype) if self.labels is None else self.labels.astype(dtype)
    label = masked(label, mask, 0)
    if self.classes is None:
      return label
    if self.labels is None or self.counts is None:
      return label * self.classes
    shape = jnp.broadcast_shapes(label.shape, self.classes.shape, self.counts.shape)
    return scale_or_zero(self.classes, jnp.broadcast_to(label, shape), self.counts)


class Cost(NamedTuple):
  """Sums over the entries z_k of each row, with a constant shift; 0 * inf is 0 in the first.

  Attributes:
    total: ``sum_k p_k (shift - z_k)``.
    weight: ``sum_k p_k``.
  """

  total: jax.Array
  weight: jax.Array

  def moved(self, by: jax.Array) -> Cost:
    """The same with a shift that is larger by the number ``by``."""
    finite = jnp.where(jnp.isinf(self.weight) & (by == 0), 0, self.weight)
    return Cost(self.total + scale_or_zero(finite, by), self.weight)


class RowSums(NamedTuple):
  """The sums over the entries of each row on this device, shaped with the reduced axes kept.

  Attributes:
    top: the largest entry; NaN or any number in a row with NaN.
    rest: the sum of ``exp(z - top)`` over all entries but one that is the largest: to a few
      rounding errors of its own size; -1 in a row of -inf alone, +inf in a row with +inf.
    costs: one for each of the weights; the shift is `top`, or 0 where that is not finite.
    top_index: where the largest entry is, if that was asked for; 0 in passes, which do not know.
    spread: the sum of ``exp(z - shift) (shift - z)``, if that was asked for; the shift is that of
      the costs, and an entry of -inf adds 0.
  """

  top: jax.Array
  rest: jax.Array
  costs: tuple[Cost, ...]
  top_index: jax.Array | None = None
  spread: jax.Array | None = None


def row_sums(
  x: jax.Array,
  mask: jax.Array | None,
  weights: tuple[Weights, ...],
  rows: Rows,
  dtype: DTypeLike,
  *,
  with_index: bool = False,
  with_spread: bool = False,
) -> RowSums:
  """The sums over the entries of ``x``, computed in ``dtype``; masked ones count as -inf."""

  def form(sums: Callable[..., RowSums]) -> Callable[..., RowSums]:
    asked = functools.partial(sums, with_index=with_index, with_spread=with_spread)
    return lambda x, mask, weights: asked(x, mask, weights, rows, dtype)

  return in_form_of_platform(Forms(form(in_passes), form(in_one_read)), rows, x, mask, weights)


def two_row_sums(x: jax.Array, y: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The sums of two arrays over the entries of each row on this device."""

  def plain(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rows.local_sum(x), rows.local_sum(y)

  def one_read(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _two_sums(x, y, rows.axes)

  return in_form_of_platform(Forms(plain, one_read), rows, x, y)


# --- in passes ------------------------------------------------------------------------------------


def in_passes(
  x: jax.Array,
  mask: jax.Array | None,
  weights: tuple[Weights, ...],
  rows: Rows,
  dtype: DTypeLike,
  *,
  with_index: bool = False,
  with_spread: bool = False,
) -> RowSums:
  """The largest, then the sum of all, and only where one dominates a row that of the others."""
  z = _entries(x, mask, dtype)
  top = rows.local_max(z)
  shift = finite_or_zero(top)
  if rows.are_short(x.shape):  # on a CPU both sums at once are cheaper than one
    e = exp_of_difference(z, shift)
    total, others = _two_sums(e, drop_dominant(e), rows.axes)
    rest = total - 1
  else:
    rest = rows.local_sum(jnp.exp(difference(z, shift))) - 1

    def sum_of_others(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> jax.Array:
      e = exp_of_difference(_entries(x, mask, dtype), shift)
      return rows.local_sum(drop_dominant(e))

    dominated = jnp.abs(rest) < DOMINATED
    others = where_needed(dominated, sum_of_others, rest, x, mask, shift)
  rest = jnp.where(jnp.abs(rest) < DOMINATED, others, rest)
  rest = jnp.where(top == jnp.inf, jnp.inf, rest)
  # With a shift of their own: XLA:CPU would materialize the difference that two sums share.
  (shift,) = rows.barrier((shift,))
  costs = [_cost_in_passes(x, mask, weight, shift, rows, dtype) for weight in weights]
  spread = None
  if with_spread:
    z = _entries(x, mask, dtype)
    spread = rows.local_sum(exp_of_difference(z, shift) * finite_cost(z, shift))
  index = batched_like(jnp.zeros((), jnp.int32), top) if with_index else None
  return RowSums(top, rest, tuple(costs), index, spread)


_Operands = tuple[jax.Array, jax.Array | None, Weights, jax.Array]  # x, mask, weights, shift


def _cost_in_passes(
  x: jax.Array,
  mask: jax.Array | None,
  weights: Weights,
  shift: jax.Array,
  rows: Rows,
  dtype: DTypeLike,
) -> Cost:
  def p_and_cost(operands: _Operands) -> tuple[jax.Array, jax.Array]:
    x, mask, weights, shift = operands
    p = jnp.broadcast_to(weights.p(mask, dtype), x.shape)
    return p, -difference(_entries(x, mask, dtype), shift)

  def quick_total(operands: _Operands) -> jax.Array:
    p, cost = p_and_cost(operands)
    return rows.local_sum(p * cost)

  # An infinite weight at a cost of 0 counts in the other sum.
  def careful_total(operands: _Operands) -> jax.Array:
    p, cost = p_and_cost(operands)
    finite = jnp.where(jnp.isinf(p) & (cost == 0), 0, p)
    return rows.local_sum(scale_or_zero(finite, cost_of(p, cost), operands[2].counts))

  def quick_weight(operands: _Operands) -> jax.Array:
    return rows.local_sum(p_and_cost(operands)[0])

  # The derivative by a weight of 0 at an infinite cost is 0; the value is the same.
  def careful_weight(operands: _Operands) -> jax.Array:
    p, cost = p_and_cost(operands)
    return rows.local_sum(jnp.where((p == 0) & (cost == jnp.inf), 0, p))

  operands = x, mask, weights, shift
  if weights.labels is weights.classes is None and mask is None:
    return Cost(*varying_alike(quick_total(operands), quick_weight(operands)))
  if mask is not None or rows.are_short(x.shape):
    total = careful_total(operands)
  else:  # to be careful in every sum would double its time
    total = quick_total(operands)
    total = where_needed(jnp.isnan(total), careful_total, total, operands)
  weight = with_derivative_of(careful_weight, quick_weight, operands)
  return Cost(*varying_alike(total, weight))


def _entries(x: jax.Array, mask: jax.Array | None, dtype: DTypeLike) -> jax.Array:
  return masked(x.astype(dtype), mask, -jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _two_sums(x: jax.Array, y: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
  """The sums of two arrays along ``axes``, in one pass."""
  zero = jnp.zeros((), x.dtype)
  both = lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)
  return jnp.expand_dims(both[0], axes), jnp.expand_dims(both[1], axes)


# They are linear. JAX would differentiate such a reduction by a tree of slices, which it refuses
# of explicitly sharded arrays, and under `jax.vmap` with an `spmd_axis_name`.
@_two_sums.defjvp
def _two_sums_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
  x_dot, y_dot = (jnp.sum(dot, axis=axes, keepdims=True) for dot in tangents)
  return _two_sums(*primals, axes), (x_dot, y_dot)


# --- in one read ----------------------------------------------------------------------------------


class _Part(NamedTuple):
  """A part of a row; `low` is what is missing, due to rounding, from the number before it."""

  top: jax.Array
  rest: jax.Array
  low: jax.Array
  costs: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]  # total, low, weight
  top_index: jax.Array | None
  spread: tuple[jax.Array, jax.Array] | None  # total, low


# A part of a row is described by (m, r): its largest entry, and the sum of exp(z_k - m) over all
# entries but one that is m. Two parts with m_1 >= m_2 make
#   m = m_1,   r = r_1 + exp(m_2 - m_1) (1 + r_2),   cost = cost_1 + cost_2 + weight_2 (m_1 - m_2),
#   spread = spread_1 + exp(m_2 - m_1) (spread_2 + (1 + r_2) (m_1 - m_2)),
# in any order: a commutative monoid with the neutral element (-inf, -1), which an entry of -inf is
# too; any other entry is (z, 0). So one `jax.lax.reduce` reads the row once, and no sum includes
# the 1 of the largest entry. The rounding errors of r and of the costs travel along, each in a
# number of its own, so that their digits do not depend on the order or on the length of the row.
def in_one_read(
  x: jax.Array,
  mask: jax.Array | None,
  weights: tuple[Weights, ...],
  rows: Rows,
  dtype: DTypeLike,
  *,
  with_index: bool = False,
  with_spread: bool = False,
) -> RowSums:
  """All sums at once."""
  z = _entries(x, mask, dtype)
  zeros = jnp.zeros_like(z)
  p = [jnp.broadcast_to(weight.p(mask, dtype), z.shape) for weight in weights]
  zero = jnp.zeros((), z.dtype)
  entry = _Part(
    top=z,
    rest=jnp.where(z == -jnp.inf, -1, zeros),
    low=zeros,
    costs=tuple((zeros, zeros, weight) for weight in p),
    top_index=index_along(z, rows.axes[0]) if with_index else None,
    spread=(zeros, zeros) if with_spread else None,
  )
  neutral = _Part(
    top=zero - jnp.inf,
    rest=zero - 1,
    low=zero,
    costs=((zero, zero, zero),) * len(p),
    top_index=jnp.zeros((), jnp.int32) if with_index else None,
    spread=(zero, zero) if with_spread else None,
  )
  sums: _Part = lax.reduce(entry, neutral, _combined, rows.axes)
  row = jax.tree.map(lambda x: jnp.expand_dims(x, rows.axes), sums)
  rest = (row.rest + row.low) + jnp.where(row.top == jnp.inf, jnp.inf, 0)
  costs = tuple(Cost(total + low, weight) for total, low, weight in row.costs)
  spread = None if row.spread is None else row.spread[0] + row.spread[1]
  return RowSums(row.top, rest, costs, row.top_index, spread)


def _combined(one: _Part, other: _Part) -> _Part:
  """Two parts of a row as one."""
  one_first = one.top >= other.top
  zero = lax.full_like(one.top, 0)

  def ordered(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.select(one_first, x, y), lax.select(one_first, y, x)

  m_1, m_2 = ordered(one.top, other.top)
  r_1, r_2 = ordered(one.rest, other.rest)
  low_1, low_2 = ordered(one.low, other.low)
  # -inf - -inf is nothing to add, and inf - inf is 0.
  finite = lax.is_finite(m_2)
  d, error = _two_sum(m_2, -m_1)
  d = lax.select(finite | (m_1 != m_2), d, lax.min(m_2, zero))
  e = lax.exp(d)
  e = e + e * lax.select(finite & (e > zero), error, zero)  # exp(d + error)
  r, low = _two_sum(r_1, e * (1 + r_2) + e * low_2)

  def combined_costs(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> Any:
    total, low = _two_sum(one[0], other[0])
    _, moved = ordered(one[2], other[2])
    nothing = (moved == zero) | (d == zero)
    total, more = _two_sum(total, lax.select(nothing, zero, moved * -d))
    low = lax.select(lax.is_finite(total), low + more + (one[1] + other[1]), zero)
    return total, low, one[2] + other[2]

  costs = tuple(map(combined_costs, one.costs, other.costs))
  top_index = None
  if one.top_index is not None and other.top_index is not None:
    top_index, _ = ordered(one.top_index, other.top_index)
  spread = None
  if one.spread is not None and other.spread is not None:
    spread_1, spread_2 = ordered(one.spread[0], other.spread[0])
    spread_low_1, spread_low_2 = ordered(one.spread[1], other.spread[1])
    distance = lax.min(-d, lax.full_like(d, np.finfo(d.dtype).max))
    moved = e * (spread_2 + ((1 + r_2) + low_2) * distance) + e * spread_low_2
    total, more = _two_sum(spread_1, moved)
    spread = total, spread_low_1 + more
  return _Part(m_1, r, low_1 + low, costs, top_index, spread)


def sum_in_one_read(x: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The sum of each row, and what is missing from it due to rounding."""

  def combined(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    total, low = _two_sum(one[0], other[0])
    return total, low + (one[1] + other[1])

  zero = jnp.zeros((), x.dtype)
  total, low = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), combined, rows.axes)
  return jnp.expand_dims(total, rows.axes), jnp.expand_dims(low, rows.axes)


def _two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sum and its rounding error."""
  total = x + y
  back = total - x
  return total, (x - (total - back)) + (y - back)
