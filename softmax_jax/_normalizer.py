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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from softmax_jax._arrays import compiled, masked
from softmax_jax._exponentials import (
  DOMINATED,
  difference,
  drop_dominant,
  entries,
  exp_of_difference,
  finite_or_zero,
)
from softmax_jax._row_sums import Cost, RowSums, Weights, row_sums
from softmax_jax._rows import Parts, Rows


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

  def is_finite(self) -> jax.Array:
    """Whether the logsumexp is a finite number."""
    return (self.rest < jnp.inf) & (self.rest != -1)

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

  def cost(self, z: jax.Array) -> jax.Array:
    """``shift - z``, but finite: its product with a probability of 0 is 0."""
    gone, zeros = z == -jnp.inf, jnp.zeros_like(z)
    cost = jnp.minimum(-self.minus_shift(jnp.where(gone, zeros, z)), jnp.finfo(z.dtype).max)
    return jnp.where(gone, zeros, cost)

  def minus_shift_in_a_sum(self, z: jax.Array) -> jax.Array:
    """``z - shift`` without the select of `minus_shift`, which would slow down a sum on a CPU."""
    return _minus_shift_in_a_sum(z, self.shift, self.rest)


class LocalNormalizer(NamedTuple):
  """What one device knows of a `Normalizer`.

  Attributes:
    shift: that of the `Normalizer`.
    rest: the sum over the entries of this device, excluding `excluded_max`.
    excluded_max: ``exp(z - shift)`` of the largest entry on this device if that is at least
      `DOMINATED`, otherwise 0; None where one device has the whole row.
    any: that of the `Normalizer`.
    top_index: where the largest entry on this device is, if that is known.
    spread: the sum of ``exp(z - shift) (shift - z)`` on this device, if that was asked for.
  """

  shift: jax.Array
  rest: jax.Array
  excluded_max: jax.Array | None
  any: jax.Array | None
  top_index: jax.Array | None
  spread: jax.Array | None

  def over_devices(self, others: Parts, rows: Rows) -> tuple[Normalizer, Parts]:
    """The normalizer, and the sums over the devices of ``others``, which are per-row scalars."""
    rest = self.rest
    if self.excluded_max is not None:
      # Where the largest entry alone is excluded, `excluded_max` adds up to 1.
      rest, excluded, others = rows.sum_over_devices((rest, self.excluded_max, others))
      rest = rest + (excluded - 1)
    # A row without any entry gets S = 1, which avoids NaN.
    return Normalizer(self.shift, masked(rest, self.any, 0), self.any), others


def normalizer(
  x: jax.Array,
  mask: jax.Array | None,
  rows: Rows,
  dtype: DTypeLike,
  sums: Callable[..., RowSums] = row_sums,
) -> tuple[Normalizer, jax.Array | None]:
  """The normalizer of the entries of ``x`` by a form of `row_sums`, and its ``top_index``."""
  local, _ = local_normalizer(x, mask, (), rows, dtype, sums)
  s, _ = local.over_devices((), rows)
  return differentiable(s, entries(x, mask, s.any, dtype), rows), local.top_index


@functools.partial(compiled, static_argnums=(3, 4, 5))
def local_normalizer(
  x: jax.Array,
  mask: jax.Array | None,
  weights: tuple[Weights, ...],
  rows: Rows,
  dtype: DTypeLike,
  sums: Callable[..., RowSums] = row_sums,
) -> tuple[LocalNormalizer, tuple[Cost, ...]]:
  """What this device knows of the normalizer of ``x``, and its part of the cost of each weight."""
  local = sums(x, mask, weights, rows, dtype)
  any_ = rows.local_any(mask)
  local_top = lax.stop_gradient(local.top)
  local_shift = finite_or_zero(local_top)
  if rows.axis_name is None:
    s = LocalNormalizer(local_shift, local.rest, None, any_, local.top_index, local.spread)
    return s, local.costs
  top, any_ = rows.max_over_devices(local_top, any_)
  shift = finite_or_zero(top)
  # exp(z - shift) = e exp(z - local_top), which is e for the largest on this device.
  e = exp_of_difference(jnp.minimum(local_top, shift), shift)
  kept = drop_dominant(e)
  costs = tuple(cost.moved(shift - local_shift) for cost in local.costs)
  rest = e * local.rest + kept
  spread = local.spread
  if spread is not None:
    spread = e * (spread + (1 + local.rest) * (shift - local_shift))
  return LocalNormalizer(shift, rest, e - kept, any_, local.top_index, spread), costs


# With z_t the dominant entry of a row, shift_dot = z_dot_t, and the derivatives of
#   e_k = exp(z_k - shift)     are   e_dot_k = e_k (z_dot_k - z_dot_t),  exactly 0 for k = t,
#   rest = sum_{k != t} e_k          rest_dot = sum_{k != t} e_dot_k.
# All terms are as small as the entries beside t, so that second derivatives keep their digits when
# a_t is close to 1. (With a constant shift e_dot_t would have to cancel.) Without a dominant entry,
# shift_dot = 0 and rest_dot = S_dot = sum_k e_dot_k.
#
# In a scan that is differentiated twice, JAX before 0.12 drops the rules of custom_jvp functions
# whose arguments it knows beforehand, and differentiates their code: here `local_normalizer`, with
# a constant shift. So a backward rule calls `differentiable` again. Then either both the normalizer
# and the functions of it below have their rules, or neither has.
def differentiable(s: Normalizer, z: jax.Array, rows: Rows) -> Normalizer:
  """``s``, computed from the entries z, with its derivative by them."""
  shift, rest = s.shift, s.rest
  if jax.__version_info__ >= (0, 12):
    # Under `jax_custom_jvp3` a cotangent of 0 would reach the exponentials, which may be NaN. (A
    # dropped rule, as above, leaves these two as the only way to the derivative.)
    shift, rest = lax.stop_gradient((shift, rest))
  shift, rest = _differentiable(z, shift, rest, rows)
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
  return jnp.abs(rest) < DOMINATED


def _is_dominant(z: jax.Array, shift: jax.Array, rest: jax.Array) -> jax.Array:
  """Whether an entry dominates its row; then no other lies within 1/4 of it: exp(-1/4) > 0.75."""
  return _dominated(rest) & (z - shift > -0.25)


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
