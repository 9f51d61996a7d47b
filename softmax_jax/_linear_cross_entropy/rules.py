"""The two rules: the losses of all rows, and a weighted sum of them.

The sum has the cheaper rule. Its cotangent is one number, so that the gradients are known up to
that factor as soon as the logits of a chunk are. They are formed in the forward pass, with three
matrix products altogether. The losses of all rows have one cotangent per row, known only in the
backward pass. That recomputes the logits, with four products altogether.

Both rules know which inputs are differentiated, and form no product for the others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from softmax_jax._arrays import instantiated, is_zero
from softmax_jax._cross_entropy import integer_rule as integer
from softmax_jax._cross_entropy.label import Label
from softmax_jax._cross_entropy.per_row import PerRow
from softmax_jax._cross_entropy.uniform import UniformSums
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._linear_cross_entropy.chunks import Put
from softmax_jax._linear_cross_entropy.gradients import (
  Chunk,
  Static,
  add_gradients,
  as_gradients,
  features_that_count,
  logits,
  over_all_chunks,
  poison_of,
  zeros,
)
from softmax_jax._linear_cross_entropy.partition import with_loops
from softmax_jax._linear_cross_entropy.projection import (
  Inputs,
  capped,
  capped_tangent,
  scaled_tangent,
)
from softmax_jax._normalizer import Normalizer
from softmax_jax._products import scale_or_zero


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
  """Which inputs are differentiated."""

  inputs: Inputs

  @classmethod
  def of(cls, perturbed: Inputs) -> _Wanted:
    return cls(Inputs(*(x is not None and x.perturbed for x in perturbed)))


def _values(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.value, tree)


# --- the losses of all rows -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses_rule(inputs: Inputs, index: jax.Array, static: Static) -> PerRow:
  return _forward(static, inputs, index)[0]


def _losses_fwd(inputs: Any, index: Any, static: Static) -> tuple[PerRow, Any]:
  wanted = _Wanted.of(inputs)
  inputs, index = _values((inputs, index))
  per_row, normalizer, uniform_sum = _forward(static, inputs, index)
  return per_row, (wanted, inputs, index, normalizer, uniform_sum)


# The derivation is above `add_gradients`, which forms the gradients.
def _losses_bwd(static: Static, residuals: Any, bars: Any) -> tuple[Inputs, None]:
  bars = instantiated(bars)
  _, inputs, index, *_ = residuals
  gradients = _losses_gradients(static, residuals, bars._replace(right=None))
  return as_gradients(gradients, inputs, poison_of(index, bars)), None


@with_loops
def _forward(
  static: Static, inputs: Inputs, index: jax.Array
) -> tuple[PerRow, Normalizer, jax.Array | None]:
  def body(carry: tuple[()], tokens: Any, put: Put) -> tuple[tuple[()], Any]:
    x, index = tokens
    of_chunk, y, z = logits(inputs._replace(x=x), index, static)
    per_row, residuals = _of_logits(of_chunk, index, y, z, static)
    uniform_sum = _uniform_sum(residuals, static)
    return carry, (_wanted_of(per_row, static), residuals.normalizer, uniform_sum)

  return over_all_chunks(body, (), (inputs.x, index), inputs, static)[1]


def _of_logits(
  inputs: Inputs, index: jax.Array, y: jax.Array, z: jax.Array, static: Static
) -> tuple[PerRow, integer.Residuals]:
  """What the rule of the dense loss returns for a chunk."""
  # Cut out before the softcap: z would be written to cut it out.
  z_t = capped(Label.of(index, y.shape[1], static.rows).take(y, 1), inputs.softcap)
  return integer.fwd(z, index, None, inputs.class_weights, None, static.dense, z_t)


def _wanted_of(per_row: PerRow, static: Static) -> PerRow:
  """What a rule returns of the outputs of that of the dense loss."""
  return per_row._replace(weight=None, right=per_row.right if static.with_aux else None)


def _uniform_sum(residuals: integer.Residuals, static: Static) -> jax.Array | None:
  """The sum over the uniform label, for each row."""
  if residuals.uniform is None:
    return None
  total = residuals.uniform.label_sum(static.num_classes)
  return jnp.broadcast_to(total, residuals.class_index.shape)


@with_loops
def _losses_gradients(static: Static, residuals: Any, bars: PerRow) -> Inputs:
  wanted, inputs, index, normalizer, uniform_sum = residuals

  def body(sums: Inputs, tokens: Any, put: Put) -> tuple[Inputs, None]:
    x, index, s, uniform_sum, bars = tokens
    of_chunk, y, z = logits(inputs._replace(x=x), index, static)
    chunk = Chunk(of_chunk, index, y, z, s, uniform_sum)
    return add_gradients(sums, chunk, bars, put, wanted.inputs, static), None

  sums = zeros(wanted.inputs, inputs, static)
  tokens = inputs.x, index, normalizer, uniform_sum, bars
  return over_all_chunks(body, sums, tokens, inputs, static)[0]


# The tangent of the logits goes through the tangent rule of the dense loss, chunk by chunk.
@with_loops
def _losses_tangent(static: Static, residuals: Any, args_dot: tuple[Any, ...]) -> PerRow:
  _, inputs, index, normalizer, uniform_sum = residuals
  dots: Inputs = args_dot[0]

  def body(carry: tuple[()], tokens: Any, put: Put) -> tuple[tuple[()], PerRow]:
    x, x_dot, index, normalizer, uniform_sum = tokens
    of_chunk, y, z = logits(inputs._replace(x=x), index, static)
    chunk_dots = dots
    if x_dot is not None:
      chunk_dots = dots._replace(x=features_that_count(x_dot, index, static))
    h_dot = static.projection.linear_tangent(of_chunk, chunk_dots)
    y_dot = scaled_tangent(y, h_dot, of_chunk, chunk_dots)
    z_dot = capped_tangent(y, y_dot, of_chunk, chunk_dots)
    uniform = None
    if uniform_sum is not None:
      uniform = UniformSums(None, uniform_sum * static.num_classes, None)
    dense = integer.Residuals(z, index, None, of_chunk.class_weights, normalizer, uniform)
    per_row = integer.tangent(static.dense, dense, (z_dot, None, None, dots.class_weights, None))
    return carry, per_row._replace(weight=None)

  tokens = inputs.x, dots.x, index, normalizer, uniform_sum
  return over_all_chunks(body, (), tokens, inputs, static)[1]


_losses_rule.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)
losses = enable_forward_mode(_losses_rule, tangent=_losses_tangent)


# --- their weighted sum ---------------------------------------------------------------------------

# The sum is sum_i p_i nll_i + q_i uniform_i + r_i lse_i^2, where `shares` holds p as nll,
# q as uniform and r as lse.


def _weighted_sum(shares: PerRow, per_row: PerRow) -> jax.Array:
  total = jnp.sum(scale_or_zero(shares.nll, per_row.nll))
  if shares.uniform is not None:
    total += jnp.sum(scale_or_zero(shares.uniform, per_row.uniform))
  if shares.lse is not None:
    total += jnp.sum(scale_or_zero(shares.lse, per_row.lse**2))
  return total


# Beside it come, if asked for, nll, lse and right of all rows.
_SumAndRows = tuple[jax.Array, PerRow]
_NOTHING = PerRow(None, None, None, None, None)


def _rows_beside(per_row: PerRow, static: Static) -> PerRow:
  return per_row._replace(uniform=None) if static.with_aux else _NOTHING


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_rule(inputs: Inputs, shares: PerRow, index: jax.Array, static: Static) -> _SumAndRows:
  per_row, *_ = _forward(static, inputs, index)
  return _weighted_sum(shares, per_row), _rows_beside(per_row, static)


# In the forward pass, for a cotangent of 1: nll_bar = p, uniform_bar = q, lse_bar = 2 r lse.
def _sum_fwd(inputs: Any, shares: Any, index: Any, static: Static) -> tuple[_SumAndRows, Any]:
  wanted = _Wanted.of(inputs)
  inputs, shares, index = _values((inputs, shares, index))
  gradients, (per_row, *sums) = _sum_gradients(static, inputs, shares, index, wanted)
  # Empty arrays carry the dtypes of the gradients: a residual must be an array.
  likes = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), inputs)
  of_losses = (wanted, inputs, index, *sums) if static.with_aux else None
  outputs = _weighted_sum(shares, per_row), _rows_beside(per_row, static)
  return outputs, (gradients, likes, per_row, shares, index, of_losses)


def _bars(shares: PerRow, lse: jax.Array) -> PerRow:
  """The cotangents of all rows for one of 1 of the sum."""
  lse_bar = jnp.zeros_like(lse) if shares.lse is None else 2 * shares.lse * lse
  return shares._replace(lse=lse_bar)


@with_loops
def _sum_gradients(
  static: Static, inputs: Inputs, shares: PerRow, index: jax.Array, wanted: _Wanted
) -> tuple[Inputs, tuple[PerRow, Normalizer | None, jax.Array | None]]:
  def body(sums: Inputs, tokens: Any, put: Put) -> tuple[Inputs, Any]:
    x, shares, index = tokens
    of_chunk, y, z = logits(inputs._replace(x=x), index, static)
    per_row, dense = _of_logits(of_chunk, index, y, z, static)
    s, uniform_sum = dense.normalizer, _uniform_sum(dense, static)
    chunk = Chunk(of_chunk, index, y, z, s, uniform_sum)
    bars = _bars(shares, per_row.lse)
    sums = add_gradients(sums, chunk, bars, put, wanted.inputs, static)
    of_losses = (s, uniform_sum) if static.with_aux else (None, None)
    return sums, (_wanted_of(per_row, static), *of_losses)

  sums = zeros(wanted.inputs, inputs, static)
  return over_all_chunks(body, sums, (inputs.x, shares, index), inputs, static)


# All gradients are those of `_sum_fwd`, times bar; unless the rows beside have cotangents of their
# own. Then they are those of the losses, and nothing needs what `_sum_fwd` summed up.
def _sum_bwd(static: Static, residuals: Any, bars: Any) -> tuple[Any, ...]:
  gradients, likes, per_row, shares, index, of_losses = residuals
  bar, beside = bars
  beside = beside._replace(right=None)
  of_rows = not all(map(is_zero, jax.tree.leaves(beside, is_leaf=is_zero)))
  if is_zero(bar):
    if not of_rows:
      return None, None, None
    bar = instantiated(bar)
  _, pull = jax.vjp(lambda shares: _weighted_sum(shares, per_row), shares)
  if of_rows:
    bars = jax.tree.map(lambda share: bar * share, _bars(shares, per_row.lse))
    nll, lse = (
      x if is_zero(y) else x + y for x, y in ((bars.nll, beside.nll), (bars.lse, beside.lse))
    )
    bars = bars._replace(nll=nll, lse=lse)
    return _losses_bwd(static, of_losses, bars)[0], pull(bar)[0], None
  gradients = jax.tree.map(lambda gradient: bar * gradient, gradients)
  bars = jax.tree.map(lambda share: bar * share, shares)
  inputs_bar = as_gradients(gradients, likes, poison_of(index, bars))
  return inputs_bar, pull(bar)[0], None


# The gradients are known by now: the tangent is their product with the tangents of the inputs.
def _sum_tangent(static: Static, residuals: Any, args_dot: tuple[Any, ...]) -> _SumAndRows:
  gradients, _, per_row, shares, index, of_losses = residuals
  dots, shares_dot, _ = args_dot
  dots = Inputs(*dots)
  if dots.x is not None:
    dots = dots._replace(x=features_that_count(dots.x, index, static))
  total = jnp.zeros((), static.projection.dtype)
  for gradient, dot in zip(gradients, dots, strict=True):
    if dot is not None:
      total += jnp.sum(gradient * dot.astype(gradient.dtype))
  total = static.rows.sum_over_devices(total)
  if any(dot is not None for dot in dots):
    total += jnp.sum(poison_of(index, shares))
  moving = [
    jnp.zeros_like(share) if dot is None and share is not None else dot
    for share, dot in zip(shares, shares_dot, strict=True)
  ]

  def weigh(shares: PerRow) -> jax.Array:
    return _weighted_sum(shares, per_row)

  total += jax.jvp(weigh, (shares,), (PerRow(*moving),))[1]
  beside = _NOTHING
  if static.with_aux and any(dot is not None for dot in args_dot[0]):
    beside = _losses_tangent(static, of_losses, args_dot[:1])._replace(uniform=None)
  return total, beside


_sum_rule.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)
sum_of_losses = enable_forward_mode(_sum_rule, tangent=_sum_tangent)
