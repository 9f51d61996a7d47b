"""Softmax, its logarithm and their backward passes, each in the forms of `softmax_jax._platform`.

The forms of one map stand side by side. Shapes are given for the last axis: ``[*B, K]`` for the
entries of rows, ``[*B, 1]`` for one scalar per row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from softmax_jax._arrays import batched_like, masked
from softmax_jax._devices import entry_at
from softmax_jax._exponentials import (
  DOMINATED,
  drop_dominant,
  entries,
  is_dominant,
  rounding_error_of_difference,
  underflow_floor,
)
from softmax_jax._normalizer import normalizer
from softmax_jax._platform import Forms, fits_on_chip, in_form_of_platform
from softmax_jax._row_sums import RowSums, in_one_read, in_passes, row_sums, sum_in_one_read
from softmax_jax._rows import Rows

# --- softmax --------------------------------------------------------------------------------------


class Softmax(NamedTuple):
  """A softmax, and what a backward pass in one read needs beside it.

  Attributes:
    a: the probabilities ``[*B, K]``.
    largest: where the largest of each row is ``[*B, 1]``; 0 in the other forms.
  """

  a: jax.Array
  largest: jax.Array


def softmax(x: jax.Array, mask: jax.Array | None, rows: Rows, dtype: DTypeLike) -> Softmax:
  """The softmax of the entries of ``x`` in each row, in ``dtype``."""
  if rows.axis_name is not None:
    return _softmax_of_normalizer(rows, dtype, row_sums, x, mask)
  forms = (_softmax_in_passes, _softmax_in_one_read, _softmax_on_chip)
  return in_form_of_platform(
    Forms(*(functools.partial(f, rows, dtype) for f in forms)), rows, x, mask
  )


def _softmax_in_passes(
  rows: Rows, dtype: DTypeLike, x: jax.Array, mask: jax.Array | None
) -> Softmax:
  """With an integer shift: only z - shift is rounded, and its error is cheap to know.

  Short rows of float32, where every operation counts, keep that error: up to |z - shift| / 2 units
  in the last place.
  """
  z = entries(x, mask, rows.local_any(mask), dtype)
  shift = jnp.ceil(rows.local_max(z))
  e = exact_e = jnp.exp(z - shift)
  if not (rows.are_short(z.shape) and z.dtype == jnp.float32):
    z = jnp.maximum(z, underflow_floor(shift))
    error = z - ((z - shift) + shift)
    exact_e = e + e * error  # exp(z - shift + error)
  # The sum is left as it is: the errors of its terms are weighted by a_k and have either sign.
  total = rows.local_sum(e)
  return Softmax(exact_e / total, _no_index(total))


def _softmax_on_chip(rows: Rows, dtype: DTypeLike, x: jax.Array, mask: jax.Array | None) -> Softmax:
  _, e = _differences_on_chip(rows, masked(x.astype(dtype), mask, -jnp.inf))
  total = rows.local_sum(e)
  return Softmax(e / total, _no_index(total))


def _softmax_in_one_read(
  rows: Rows, dtype: DTypeLike, x: jax.Array, mask: jax.Array | None
) -> Softmax:
  sums = _with_index if len(rows.axes) == 1 else in_one_read
  return _softmax_of_normalizer(rows, dtype, sums, x, mask)


_with_index = functools.partial(in_one_read, with_index=True)


def _softmax_of_normalizer(
  rows: Rows,
  dtype: DTypeLike,
  sums: Callable[..., RowSums],
  x: jax.Array,
  mask: jax.Array | None,
) -> Softmax:
  s, largest = normalizer(x, mask, rows, dtype, sums)
  # A row with +inf is NaN, and so is one of -inf alone, where it is 0 / 0.
  total = jnp.where(s.rest == jnp.inf, jnp.nan, 1 + s.rest)
  a = s.exp(entries(x, mask, s.any, dtype)) / total
  return Softmax(a, _no_index(total) if largest is None else largest)


def _no_index(like: jax.Array) -> jax.Array:
  return batched_like(jnp.zeros((), jnp.int32), like)


def _differences_on_chip(rows: Rows, z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``z - max(z)`` and its exponential, free of the rounding error of the difference.

  XLA:GPU begins its one kernel at a difference whose right side it uses only once. So the largest
  entry has a copy for all other uses, which XLA does not recognize as one.
  """
  top = rows.local_max(z)
  copy = -lax.stop_gradient(jnp.min(-z, axis=rows.axes, keepdims=True, initial=jnp.inf))
  # The minimum keeps a product z from the contraction that `difference` is about. It makes +inf
  # finite, but a row with +inf is NaN by way of the copy.
  d = jnp.minimum(z, np.finfo(z.dtype).max) - top
  e = jnp.exp(d)
  y = jnp.maximum(z, underflow_floor(copy, barrier=False))
  return d, e + e * rounding_error_of_difference(y, copy)


# Seed step 5: J_ij = a_i (delta_ij - a_j), so with the cotangent c = y_bar
#   x_bar_j = sum_i J_ij c_i = a_j (c_j - sum_i a_i c_i).
# When one a_t is close to 1 this difference cancels. But J 1 = 0, so that any number may be
# subtracted from c first. With c_t, the term of t is exactly 0 and nothing cancels.
def softmax_vjp(
  y: jax.Array, largest: jax.Array | None, y_bar: jax.Array, rows: Rows, dtype: DTypeLike
) -> jax.Array:
  """The product of the cotangent with the (symmetric) Jacobian of softmax at its output y."""
  if rows.axis_name is not None:
    return _softmax_vjp_over_devices(rows, y.astype(dtype), y_bar.astype(dtype))

  def plain(y: jax.Array, largest: jax.Array, y_bar: jax.Array) -> jax.Array:
    return _softmax_vjp_in_passes(rows, y.astype(dtype), y_bar.astype(dtype))

  def on_chip(y: jax.Array, largest: jax.Array, y_bar: jax.Array) -> jax.Array:
    a = _normalized_on_chip(rows, lax.optimization_barrier(y).astype(dtype))
    return _softmax_vjp_in_passes(rows, a, y_bar.astype(dtype))

  def one_read(y: jax.Array, largest: jax.Array, y_bar: jax.Array) -> jax.Array:
    (axis,) = rows.axes
    # With the barrier XLA reads y as it is stored. Where it knows how a rounded y was computed it
    # would drop the rounding, and write all of y before that too.
    a = (y if y.dtype == dtype else lax.optimization_barrier(y)).astype(dtype)
    c = y_bar.astype(dtype) - entry_at(y_bar, largest, axis).astype(dtype)  # c_j - c_t
    mean = rows.local_sum(a * c) / rows.local_sum(a)
    return a * (c - mean)

  forms = Forms(plain, one_read if len(rows.axes) == 1 else plain, on_chip)
  return in_form_of_platform(forms, rows, y, largest, y_bar)


# The mean of c is subtracted first, and once more what rounding left of it. Then c_t is nearly 0,
# and the formula is right to the last digits if an a_t next to 1 is exactly 1. The rounded division
# may have missed that, so all a are scaled up by one unit, up to 1. (The minimum drops further
# derivatives by that a_t. They would multiply c_t, which is nearly 0.)
def _softmax_vjp_in_passes(rows: Rows, a: jax.Array, c: jax.Array) -> jax.Array:
  # The first mean is that of a as it is: inside a sum XLA:CPU's minimum may turn NaN into 1.
  c = c - rows.local_sum(a * c)  # c_j - mean
  a = jnp.minimum(a * (1 + np.finfo(a.dtype).eps), 1)
  c = c - rows.local_sum(a * c)
  return a * (c - rows.local_sum(a * c))  # a_j (c_j - sum_i a_i c_i)


# Two sums over the devices: c_t where an a_t dominates the row, otherwise the mean; then the mean
# of what that leaves.
def _softmax_vjp_over_devices(rows: Rows, a: jax.Array, c: jax.Array) -> jax.Array:
  dominant = is_dominant(a)
  sums = [rows.local_sum(x) for x in (dominant, dominant * c, a * c)]
  dominates, c_t, mean = rows.sum_over_devices(sums)
  c = c - jnp.where(dominates > 0, c_t, mean)
  total, mean = rows.sum_over_devices([rows.local_sum(a), rows.local_sum(a * c)])
  return a * (c - mean / total)


def _normalized_on_chip(rows: Rows, a: jax.Array) -> jax.Array:
  """``a``, divided by its sum: a quotient with which XLA:GPU begins its one kernel."""
  return a / rows.local_sum(a)


# --- log_softmax ----------------------------------------------------------------------------------


def log_softmax(x: jax.Array, mask: jax.Array | None, rows: Rows, dtype: DTypeLike) -> jax.Array:
  """The logarithm of the softmax of the entries of ``x`` in each row, in ``dtype``."""

  def form(sums: Callable[..., RowSums]) -> Callable[..., jax.Array]:
    return functools.partial(_log_softmax_of_normalizer, rows, dtype, sums)

  if not fits_on_chip(x, rows):
    return form(row_sums)(x, mask)
  on_chip = functools.partial(_log_softmax_on_chip, rows, dtype)
  return in_form_of_platform(Forms(form(in_passes), form(in_one_read), on_chip), rows, x, mask)


def _log_softmax_of_normalizer(
  rows: Rows,
  dtype: DTypeLike,
  sums: Callable[..., RowSums],
  x: jax.Array,
  mask: jax.Array | None,
) -> jax.Array:
  s, _ = normalizer(x, mask, rows, dtype, sums)  # of [*B, 1]
  z = entries(x, mask, s.any, dtype)  # [*B, K]
  # A row with +inf is NaN, as in the softmax.
  log_sum = jnp.where(s.rest == jnp.inf, jnp.nan, s.log_sum())
  # Without the barrier XLA:CPU materializes these per-row scalars, broadcast along the row.
  s, log_sum = rows.barrier((s, log_sum))
  # (x_j - shift) - log S: both terms are at most 0, so that nothing cancels.
  return s.minus_shift(z) - log_sum


def _log_softmax_on_chip(
  rows: Rows, dtype: DTypeLike, x: jax.Array, mask: jax.Array | None
) -> jax.Array:
  d, e = _differences_on_chip(rows, masked(x.astype(dtype), mask, -jnp.inf))
  rest, others = rows.local_sum(e) - 1, rows.local_sum(drop_dominant(e))
  return d - jnp.log1p(jnp.where(rest < DOMINATED, others, rest))


# y_i = log a_i, and with seed step 5: dy_i/dx_j = (1 / a_i) a_i (delta_ij - a_j) = delta_ij - a_j,
# so   x_bar_j = y_bar_j - a_j sum_i y_bar_i,   a_j = exp(y_j).
# When one a_t is close to 1 that difference leaves rounding errors at t, where it is
#   (1 - a_t) y_bar_t - a_t sum_{i != t} y_bar_i,   1 - a_t = sum_{i != t} a_i = -expm1(y_t).
def log_softmax_vjp(y: jax.Array, y_bar: jax.Array, rows: Rows, dtype: DTypeLike) -> jax.Array:
  """The product of the cotangent with the transposed Jacobian of log_softmax at its output y."""
  if rows.axis_name is not None:
    return _log_softmax_vjp_over_devices(rows, y.astype(dtype), y_bar.astype(dtype))

  def plain(y: jax.Array, y_bar: jax.Array) -> jax.Array:
    return _projected(rows, jnp.exp(y.astype(dtype)), y_bar.astype(dtype))

  def on_chip(y: jax.Array, y_bar: jax.Array) -> jax.Array:
    a = _normalized_on_chip(rows, jnp.exp(lax.optimization_barrier(y).astype(dtype)))
    return _projected(rows, a, y_bar.astype(dtype))

  def one_read(y: jax.Array, y_bar: jax.Array) -> jax.Array:
    # With the barrier a TPU does not read what it also copies onto the chip.
    y, y_bar = lax.optimization_barrier(y).astype(dtype), y_bar.astype(dtype)
    total, low = sum_in_one_read(y_bar, rows)
    others = (total - y_bar) + low  # sum_{i != j} y_bar_i
    return -jnp.expm1(y) * y_bar - jnp.exp(y) * others  # (1 - a_j) y_bar_j - a_j others

  return in_form_of_platform(Forms(plain, one_read, on_chip), rows, y, y_bar)


# P^T = I - a 1^T is a projection, P^T P^T = P^T, as a sums to 1, and it takes the t-th unit vector
# to one that is nearly 0 at t. A second projection removes the rounding errors, and also the error
# from sum(a) != 1, as y is rounded.
def _projected(rows: Rows, a: jax.Array, x_bar: jax.Array) -> jax.Array:
  for _ in range(2):
    x_bar = x_bar - a * rows.local_sum(x_bar)  # y_bar_j - a_j sum_i y_bar_i
  return x_bar


def _log_softmax_vjp_over_devices(rows: Rows, y: jax.Array, y_bar: jax.Array) -> jax.Array:
  a = jnp.exp(y)
  dominant = is_dominant(a)  # 1 at t
  sums = [dominant * y_bar, y_bar - dominant * y_bar, a - dominant * a]
  y_bar_t, others, a_others = rows.sum_over_devices([rows.local_sum(x) for x in sums])
  at_t = a_others * y_bar - a * others  # (1 - a_t) y_bar_t - a_t sum_{i != t} y_bar_i
  return jnp.where(dominant > 0, at_t, y_bar - a * (y_bar_t + others))
