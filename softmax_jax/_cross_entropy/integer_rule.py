"""The rule of the cross-entropy with one class index per row."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmax_jax import _devices as devices
from softmax_jax._arguments import compute_dtype
from softmax_jax._arrays import batched_like, compiled, masked, unbroadcast
from softmax_jax._cross_entropy.label import (
  IGNORED,
  Label,
  bar_by_row,
  by_row,
  is_label,
  stop_gradient_unless,
  weight_of_label,
)
from softmax_jax._cross_entropy.per_row import PerRow, inverse_sum, minus_log_softmax
from softmax_jax._cross_entropy.uniform import UniformSums, uniform_label
from softmax_jax._exponentials import entries
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, local_normalizer
from softmax_jax._products import cost_of, linear_scale_or_zero
from softmax_jax._row_sums import Weights
from softmax_jax._rows import Rows


class Static(NamedTuple):
  """What is known while tracing.

  Attributes:
    rows: the rows of the logits, along one class axis.
    num_classes: the number of classes on all devices.
    smoothed: whether the loss against the uniform label is needed.
    ignores: whether there may be rows that do not count.
  """

  rows: Rows
  num_classes: int
  smoothed: bool
  ignores: bool


class Residuals(NamedTuple):
  logits: jax.Array
  class_index: jax.Array  # of the label of each row, or INVALID or IGNORED
  mask: jax.Array | None
  weights: jax.Array | None
  normalizer: Normalizer
  uniform: UniformSums | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rule(
  logits: jax.Array,
  index: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  weightless: jax.Array | None,
  static: Static,
) -> PerRow:
  return fwd(logits, index, mask, weights, weightless, static)[0]


def fwd(
  logits: jax.Array,
  index: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  weightless: jax.Array | None,
  static: Static,
  z_t: jax.Array | None = None,
) -> tuple[PerRow, Residuals]:
  """The outputs and the residuals; z_t is the z of the label where the caller has it."""
  rows, (axis,) = static.rows, static.rows.axes
  dtype = compute_dtype(logits.dtype)
  x = logits  # [*B, V]
  if rows.axis_name is not None:
    # The sums over devices share one array. Their cotangents of 0 reach the exponentials there, and
    # would meet NaN.
    x = _zero_if_ignored(logits, index, static)
  x = _stop_gradient_if_ignored(x, index, static)
  smoothing = ()
  if static.smoothed:
    smoothing = (Weights(None, weights, _finite_rows(index, weightless, static)),)
  local, costs = local_normalizer(x, mask, smoothing, rows, dtype)
  label = Label.of(index, logits.shape[axis], rows)
  if z_t is None:
    z_t = label.take_entry(x, mask, local.any, dtype, axis)  # [*B, 1], as all that follows
  w_t = None
  if weights is not None:
    w_t = label.take_weight(weights, axis, logits)
  uniform = None
  if static.smoothed:
    uniform = UniformSums.of(costs[0].total, weights, mask, logits.shape, dtype, rows)
  s, (z_t, w_t, uniform) = local.over_devices((z_t, w_t, uniform), rows)
  z = entries(x, mask, s.any, dtype)
  if s.any is not None:  # a row without any class does not count
    index = jnp.where(s.any, index, IGNORED)
  if weightless is not None:  # nor does a row of sample weight 0 whose logits are no numbers
    index = jnp.where(weightless & ~s.is_finite(), IGNORED, index)
    z = _stop_gradient_if_ignored(z, index, static)
  s = s._replace(
    shift=_stop_gradient_if_ignored(s.shift, index, static),
    rest=_zero_if_ignored(s.rest, index, static),
  )
  s = differentiable(s, z, rows)

  nll = by_row(index, s.log_sum() - s.minus_shift(z_t))  # -log a_t = log S - (z_t - shift)
  lse = jnp.where(index == IGNORED, 0, s.shift + s.log_sum())  # shift + log S
  weight = jnp.where(index == IGNORED, 0, jnp.ones_like(nll) if w_t is None else w_t)
  uniform_loss = None
  if uniform is not None:
    uniform_loss = by_row(index, uniform.loss(s, static.num_classes))  # -sum_k u_k log a_k
    uniform = uniform._replace(cost=None)
  # The label's logit against the largest, which the normalizer knows: no pass for an argmax.
  is_right = s.is_finite() & (s.minus_shift(z_t) >= 0) & (index >= 0)
  right = batched_like(is_right.astype(dtype), lse)
  per_row = PerRow(nll, lse, uniform_loss, batched_like(weight, lse), right)
  return per_row, Residuals(logits, index, mask, weights, s, uniform)


def _finite_rows(
  index: jax.Array, weightless: jax.Array | None, static: Static
) -> jax.Array | None:
  """The rows that must hold numbers; None where all must."""
  if not static.ignores:
    return None
  counts = index != IGNORED
  return counts if weightless is None else counts & ~weightless


# Seed step 6: nll = -log a_t, d nll/dz_j = a_j - delta_tj. Seed step 1: d lse/dz_j = a_j. And with
# the uniform label u: uniform = -sum_k u_k log a_k, d uniform/dz_j = a_j sum_k u_k - u_j. Together,
# with g = lse_bar + uniform_bar sum_k u_k,
#   z_bar_j = a_j (g + nll_bar) - delta_tj nll_bar - u_j uniform_bar.
# By the weights, d uniform/du_j = -log a_j and d weight/dw_j = delta_tj.
def bwd(
  static: Static, residuals: Residuals, bars: PerRow
) -> tuple[jax.Array, None, None, jax.Array | None, None]:
  rows, (axis,) = static.rows, static.rows.axes
  logits, index, mask, weights, s, uniform = residuals
  z = entries(logits, mask, s.any, s.shift.dtype)  # [*B, V]
  z = _stop_gradient_if_ignored(z, index, static)
  s = s._replace(shift=_stop_gradient_if_ignored(s.shift, index, static))
  s = differentiable(s, z, rows)
  bars = bars._replace(
    nll=bar_by_row(index, bars.nll),
    uniform=None if uniform is None else bar_by_row(index, bars.uniform),
  )

  g, u = bars.lse, None
  if uniform is not None:
    u = uniform_label(weights, mask, uniform.divisor(static.num_classes), z)
    g = g + bars.uniform * uniform.label_sum(static.num_classes)  # + uniform_bar sum_k u_k
  # z may be NaN in a row that does not count. The select keeps that NaN out of derivatives by g.
  g = jnp.where(index == IGNORED, jnp.zeros_like(g), g)
  label = Label.of(index, z.shape[axis], rows)
  z_t = label.take_entry(logits, mask, s.any, z.dtype, axis, elsewhere=-jnp.inf)
  z_t = _stop_gradient_if_ignored(z_t, index, static)
  z_bar = logits_bar(z, z_t, index, s, g, bars.nll, rows)  # a_j (g + nll_bar) - delta_tj nll_bar
  if u is not None:
    z_bar = z_bar - u * bars.uniform  # - u_j uniform_bar
  # What does not count may hold anything. Its derivative is 0.
  z_bar = masked(_zero_if_ignored(z_bar, index, static), mask, 0).astype(logits.dtype)
  return z_bar, None, None, _weights_bar(z, s, u, static, residuals, bars), None


# a_j (g + nll_bar) - delta_tj nll_bar, where the term of the label would cancel when a_t is close
# to 1:
#   a_t (g + nll_bar) - nll_bar = a_t g - (1 - a_t) nll_bar,   1 - a_t = ((1 - e_t) + rest) / S.
def logits_bar(
  z: jax.Array,
  z_t: jax.Array,
  index: jax.Array,
  s: Normalizer,
  g: jax.Array,
  nll_bar: jax.Array,
  rows: Rows,
) -> jax.Array:
  """The cotangent of the logits without that of the uniform label; z_t is the z of the label."""
  inverse = inverse_sum(s)
  e_t = s.exp(z_t)
  # Exactly 1 for the largest entry, however XLA rounds it, but with the derivative of e_t.
  e_t += lax.stop_gradient(jnp.where(s.minus_shift(z_t) == 0, 1 - e_t, jnp.zeros_like(e_t)))
  # a_t g - (1 - a_t) nll_bar
  at_label = (e_t * inverse) * g - (((1 - e_t) + s.rest) * inverse) * nll_bar
  elsewhere = s.exp(z) * ((g + nll_bar) * inverse)  # a_j (g + nll_bar)
  return jnp.where(is_label(z, index, rows), at_label, elsewhere)


def _weights_bar(
  z: jax.Array,
  s: Normalizer,
  u: jax.Array | None,
  static: Static,
  residuals: Residuals,
  bars: PerRow,
) -> jax.Array | None:
  """The cotangent of the class weights, by the weight of the label and by the uniform label."""
  _, index, mask, weights, _, uniform = residuals
  if weights is None:
    return None
  (axis,) = static.rows.axes
  label = Label.of(index, z.shape[axis], static.rows)
  weight_bar = jnp.where(index == IGNORED, 0, bars.weight)
  weight_bar, _ = devices.varying_alike(weight_bar, weights)
  # delta_tj weight_bar
  (weights_bar,) = jax.linear_transpose(lambda w: label.take_weight(w, axis, z), weights)(
    weight_bar
  )
  if u is None or uniform is None:
    return weights_bar
  # -log a_j uniform_bar, divided as the weights are in u
  u_bar = linear_scale_or_zero(bars.uniform, cost_of(u, minus_log_softmax(z, s)))
  u_bar = masked(_zero_if_ignored(u_bar, index, static), mask, 0)
  u_bar = u_bar / uniform.divisor(static.num_classes)
  return weights_bar + unbroadcast(u_bar, weights.shape)


# The same derivative along z_dot and weights_dot, in the form that keeps its digits near a_t = 1:
#   nll_dot = sum_j a_j z_dot_j - z_dot_t = sum_{j != t} a_j (z_dot_j - z_dot_t),
#   lse_dot = sum_j a_j z_dot_j,
#   uniform_dot = lse_dot sum_k u_k - sum_k u_k z_dot_k - sum_k u_dot_k log a_k.
def tangent(static: Static, residuals: Residuals, args_dot: tuple[Any, ...]) -> PerRow:
  rows, (axis,) = static.rows, static.rows.axes
  logits, index, mask, weights, s, uniform = residuals
  logits_dot, _, _, weights_dot, _ = args_dot
  dtype = s.shift.dtype
  z = _zero_if_ignored(entries(logits, mask, s.any, dtype), index, static)
  s = s._replace(
    shift=_zero_if_ignored(s.shift, index, static), rest=_zero_if_ignored(s.rest, index, static)
  )
  s = differentiable(s, z, rows)
  z_dot = nll_dot = lse_dot = uniform_dot = weight_dot = None
  if logits_dot is not None:
    z_dot = masked(logits_dot.astype(dtype), mask, 0)
    label = Label.of(index, z.shape[axis], rows)
    z_dot_t = rows.sum_over_devices(label.take(z_dot, axis))
    a = s.exp(z) * inverse_sum(s)
    others = jnp.where(is_label(z, index, rows), jnp.zeros_like(a), a)
    terms = others * (z_dot - z_dot_t), a * z_dot  # a_j (z_dot_j - z_dot_t), a_j z_dot_j
    nll_dot, lse_dot = rows.sum_over_devices([rows.local_sum(term) for term in terms])
  if weights_dot is not None:
    weight_dot = weight_of_label(weights_dot, index, rows, z)
    weight_dot = jnp.where(index == IGNORED, 0, weight_dot)
  if uniform is not None:
    divisor = uniform.divisor(static.num_classes)
    u = uniform_label(weights, mask, divisor, z)
    terms_dot = jnp.zeros((), dtype)
    if z_dot is not None:
      terms_dot -= u * z_dot  # - u_k z_dot_k
    if weights_dot is not None:
      u_dot = uniform_label(weights_dot, mask, divisor, z)
      cost = cost_of(u, minus_log_softmax(z, s))
      terms_dot += linear_scale_or_zero(u_dot, cost)  # - u_dot_k log a_k
    uniform_dot = rows.sum(jnp.broadcast_to(terms_dot, z.shape))
    if lse_dot is not None:
      uniform_dot += lse_dot * uniform.label_sum(static.num_classes)  # lse_dot sum_k u_k
    uniform_dot = by_row(index, uniform_dot)
  if nll_dot is not None and lse_dot is not None:
    nll_dot, lse_dot = by_row(index, nll_dot), jnp.where(index == IGNORED, 0, lse_dot)
  return PerRow(nll_dot, lse_dot, uniform_dot, weight_dot)


_rule.defvjp(fwd, bwd)
integer_cross_entropy = compiled(enable_forward_mode(_rule, tangent=tangent), static_argnums=5)


def _zero_if_ignored(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  return masked(x, index != IGNORED, 0) if static.ignores else x


def _stop_gradient_if_ignored(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  return stop_gradient_unless(index != IGNORED, x) if static.ignores else x
