"""The sums along a row that make its normalizer, in passes over the row and in one read of it.

Both forms compute the same numbers from the entries z_k on this device:

    top = max_k z_k,   rest = (sum_k exp(z_k - top)) - 1,
    and for weights p_k:   cost = sum_k p_k (top - z_k),   weight = sum_k p_k.

The largest exponential is 1. Added to the others it wipes out their digits where it holds nearly
all of the sum, so that the others must be summed without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from softmax_jax._arrays import masked, where_needed
from softmax_jax._exponentials import (
  DOMINATED,
  difference,
  drop_dominant,
  exp_of_difference,
  finite_or_zero,
)
from softmax_jax._platform import by_platform
from softmax_jax._products import scale_or_zero
from softmax_jax._rows import Axes, Rows


class Weights(NamedTuple):
  """The weights p_k of a cost: a label times a weight of its class.

  Attributes:
    labels: one for each entry, or fewer that broadcast; None where all are 1.
    classes: the weights of the classes; None where all are 1.
    counts: which rows count, for derivatives by the weights; None where all do.
  """

  labels: jax.Array | None
  classes: jax.Array | None
  counts: jax.Array | None = None

  def p(self, mask: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """The weights, 0 where masked, with as few entries as broadcast to all."""
    label = jnp.ones((), dtype) if self.labels is None else self.labels.astype(dtype)
    label = masked(label, mask, 0)
    return label if self.classes is None else label * self.classes


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
    return Cost(self.total + scale_or_zero(self.weight, by), self.weight)


class RowSums(NamedTuple):
  """The sums over the entries of each row on this device, shaped with the reduced axes kept.

  Attributes:
    top: the largest entry; NaN or any number in a row with NaN.
    rest: the sum of ``exp(z - top)`` over all entries but one that is the largest: to a few
      rounding errors of its own size; -1 in a row of -inf alone, +inf in a row with +inf.
    costs: one for each of the weights; the shift is `top`, or 0 where that is not finite.
  """

  top: jax.Array
  rest: jax.Array
  costs: tuple[Cost, ...]


def row_sums(
  x: jax.Array,
  mask: jax.Array | None,
  weights: tuple[Weights, ...],
  rows: Rows,
  dtype: DTypeLike,
) -> RowSums:
  """The sums over the entries of ``x``, computed in ``dtype``; masked ones count as -inf."""

  def form(sums: Callable[..., RowSums]) -> Callable[..., RowSums]:
    return lambda x, mask, weights: sums(x, mask, weights, rows, dtype)

  return by_platform(form(in_passes), form(in_one_read), None, x, mask, weights)


# --- in passes ------------------------------------------------------------------------------------


def in_passes(
  x: jax.Array, mask: jax.Array | None, weights: tuple[Weights, ...], rows: Rows, dtype: DTypeLike
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

    dominated = jnp.any(jnp.abs(rest) < DOMINATED)
    others = where_needed(dominated, sum_of_others, rest, x, mask, shift)
  rest = jnp.where(jnp.abs(rest) < DOMINATED, others, rest)
  rest = jnp.where(top == jnp.inf, jnp.inf, rest)
  costs = [_cost_in_passes(x, mask, weight, shift, rows, dtype) for weight in weights]
  return RowSums(top, rest, tuple(costs))


def _cost_in_passes(
  x: jax.Array,
  mask: jax.Array | None,
  weights: Weights,
  shift: jax.Array,
  rows: Rows,
  dtype: DTypeLike,
) -> Cost:
  def total(
    careful: bool, x: jax.Array, mask: jax.Array | None, weights: Weights, shift: jax.Array
  ) -> jax.Array:
    p, cost = weights.p(mask, dtype), -difference(_entries(x, mask, dtype), shift)
    return rows.local_sum(scale_or_zero(p, cost, weights.counts) if careful else p * cost)

  weight = rows.local_sum(jnp.broadcast_to(weights.p(mask, dtype), x.shape))
  careful = mask is not None or rows.are_short(x.shape)
  quick = total(careful, x, mask, weights, shift)
  if careful or weights.labels is weights.classes is None:
    return Cost(quick, weight)
  # Looking for weights of 0 at infinite costs in every sum would double its time.
  careful = functools.partial(total, True)
  nothing = jnp.any(jnp.isnan(quick))
  return Cost(where_needed(nothing, careful, quick, x, mask, weights, shift), weight)


def _entries(x: jax.Array, mask: jax.Array | None, dtype: DTypeLike) -> jax.Array:
  return masked(x.astype(dtype), mask, -jnp.inf)


def _two_sums(x: jax.Array, y: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
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


# --- in one read ----------------------------------------------------------------------------------


# A part of a row is described by (m, r): its largest entry, and the sum of exp(z_k - m) over all
# entries but one that is m. Two parts with m_1 >= m_2 make
#   m = m_1,   r = r_1 + exp(m_2 - m_1) (1 + r_2),   cost = cost_1 + cost_2 + weight_2 (m_1 - m_2),
# in any order: a commutative monoid with the neutral element (-inf, -1), which an entry of -inf is
# too; any other entry is (z, 0). So one `jax.lax.reduce` reads the row once, and no sum includes
# the 1 of the largest entry. The rounding errors of r and of the costs travel along, each in a
# number of its own, so that their digits do not depend on the order or on the length of the row.
def in_one_read(
  x: jax.Array, mask: jax.Array | None, weights: tuple[Weights, ...], rows: Rows, dtype: DTypeLike
) -> RowSums:
  """All sums at once."""
  z = _entries(x, mask, dtype)
  zeros = jnp.zeros_like(z)
  parts = [z, jnp.where(z == -jnp.inf, -1, zeros), zeros]
  neutral = [-jnp.inf, -1, 0]
  for weight in weights:
    parts += [zeros, zeros, jnp.broadcast_to(weight.p(mask, dtype), z.shape)]
    neutral += [0, 0, 0]
  neutral = [jnp.asarray(value, z.dtype) for value in neutral]
  sums = lax.reduce(tuple(parts), tuple(neutral), _combined, rows.axes)
  top, rest, low, *of_costs = (jnp.expand_dims(x, rows.axes) for x in sums)
  rest = (rest + low) + jnp.where(top == jnp.inf, jnp.inf, 0)
  costs = [
    Cost(total + low, weight)
    for total, low, weight in zip(of_costs[::3], of_costs[1::3], of_costs[2::3], strict=True)
  ]
  return RowSums(top, rest, tuple(costs))


def _combined(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """The sums over two parts of a row."""
  (m, r_1, low_1), (m_2, r_2, low_2) = _larger_first(one[:3], other[:3])
  # -inf - -inf is nothing to add, and inf - inf is 0.
  d, error = _two_sum(m_2, -m)
  d = jnp.where(jnp.isinf(m_2), jnp.minimum(m_2, 0), d)
  e = jnp.exp(d)
  e = e + e * jnp.where(e > 0, error, 0)  # exp(d + error)
  r, low = _two_sum(r_1, e * (1 + r_2) + e * low_2)
  sums = [m, r, low_1 + low]
  for i in range(3, len(one), 3):
    (total_1, low_1, weight_1), (total_2, low_2, weight_2) = one[i : i + 3], other[i : i + 3]
    moved = jnp.where(one[0] >= other[0], weight_2, weight_1)
    total, low = _two_sum(total_1, total_2)
    total, more = _two_sum(total, jnp.where(moved == 0, 0, moved * -d))
    low = jnp.where(jnp.isfinite(total), low + more + (low_1 + low_2), 0)
    sums += [total, low, weight_1 + weight_2]
  return tuple(sums)


# A part of a row is described by (a_max, pivot, A, B): the largest a, the c of that, A = sum_k a_k,
# and B = sum_k a_k (c_k - pivot), which moves by A (pivot_2 - pivot_1) where the pivot changes.
def mean_in_one_read(a: jax.Array, c: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The mean of ``c`` with the weights ``a >= 0`` in each row, as the sum of two numbers.

  The first is the c of the largest a. So c minus both keeps its digits there, and elsewhere loses
  none to what all c have in common.
  """
  zeros = jnp.zeros_like(a)
  neutral = [jnp.asarray(value, a.dtype) for value in (-1, 0, 0, 0, 0, 0)]
  sums = lax.reduce((a, c, a, zeros, zeros, zeros), tuple(neutral), _combined_means, rows.axes)
  _, pivot, weight, weight_low, total, low = (jnp.expand_dims(x, rows.axes) for x in sums)
  return pivot, (total + low) / (weight + weight_low)


def _combined_means(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[Any, ...]:
  """The sums over two parts of a row."""
  (a, pivot, _), (_, pivot_2, moved) = _larger_first(one[:3], other[:3])
  weight, weight_low = _two_sum(one[2], other[2])
  total, low = _two_sum(one[4], other[4])
  total, more = _two_sum(total, moved * (pivot_2 - pivot))
  return a, pivot, weight, weight_low + (one[3] + other[3]), total, low + more + (one[5] + other[5])


def sum_in_one_read(x: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The sum of each row, and what is missing from it due to rounding."""

  def combined(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    total, low = _two_sum(one[0], other[0])
    return total, low + (one[1] + other[1])

  zero = jnp.zeros((), x.dtype)
  total, low = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), combined, rows.axes)
  return jnp.expand_dims(total, rows.axes), jnp.expand_dims(low, rows.axes)


def _larger_first(
  one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Two parts of a row, that with the larger first number first."""
  first = one[0] >= other[0]
  pairs = list(zip(one, other, strict=True))
  return [jnp.where(first, x, y) for x, y in pairs], [jnp.where(first, y, x) for x, y in pairs]


def _two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sum and its rounding error."""
  total = x + y
  back = total - x
  return total, (x - (total - back)) + (y - back)
