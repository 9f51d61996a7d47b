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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from softmax_jax._cross_entropy import integer
from softmax_jax._cross_entropy.label import IGNORED, INVALID, Label, bar_by_row
from softmax_jax._cross_entropy.per_row import PerRow, minus_log_softmax
from softmax_jax._cross_entropy.uniform import UniformSums
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._linear_cross_entropy.chunks import (
  ON_CPU,
  Put,
  Tiling,
  over_blocks,
  over_chunks,
)
from softmax_jax._linear_cross_entropy.partition import with_loops
from softmax_jax._linear_cross_entropy.projection import (
  Inputs,
  Projection,
  cap_slope,
  cap_slope_by_softcap,
  capped,
  capped_tangent,
)
from softmax_jax._normalizer import Normalizer, differentiable
from softmax_jax._products import cost_of, linear_scale_or_zero, scale_or_zero
from softmax_jax._rows import AxisName, Rows


class Static(NamedTuple):
  """What is known while tracing.

  Attributes:
    projection: how features become logits.
    chunk_size: the number of tokens whose logits are held at a time, or None for the default.
    num_classes: the number of classes on all devices, without padding.
    padded: whether there are columns of the weight that are no class.
    smoothed: whether the loss against the uniform label is needed.
    ignores: whether there may be rows that do not count.
    axis_name: the mesh axis over whose devices the classes are spread, if any.
    tiling: how large chunks and blocks are by default.
  """

  projection: Projection
  chunk_size: int | None
  num_classes: int
  padded: bool
  smoothed: bool
  ignores: bool
  axis_name: AxisName | None
  tiling: Tiling = ON_CPU

  @property
  def rows(self) -> Rows:
    """The rows of the logits ``[C, V]`` of a chunk."""
    return Rows((1,), self.axis_name)

  @property
  def dense(self) -> integer.Static:
    """The same for the rule of the dense loss; rows that do not count come to it as zeros."""
    return integer.Static(self.rows, self.num_classes, self.smoothed, ignores=False)


class Chunk(NamedTuple):
  """Some of the tokens, and what is computed from them.

  Attributes:
    inputs: with the features x ``[C, H]`` of the tokens, 0 in rows that do not count.
    class_index: that of their labels ``[C, 1]``.
    y: the logits ``[C, V]`` before the softcap.
    z: the logits ``[C, V]`` of the loss.
    normalizer: that of the rows of z.
    uniform_sum: ``sum_k u_k`` for each row, or None where labels are not smoothed.
  """

  inputs: Inputs
  class_index: jax.Array
  y: jax.Array
  z: jax.Array
  normalizer: Normalizer
  uniform_sum: jax.Array | None


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


def _features(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  """The features, with 0 in rows that do not count: those may hold anything."""
  return jnp.where(index == IGNORED, jnp.zeros_like(x), x) if static.ignores else x


def _poison(index: jax.Array, bars: PerRow) -> jax.Array:
  """NaN in rows whose label is invalid, unless their loss is discarded; 0 elsewhere."""
  poison = bar_by_row(index, bars.nll)
  if bars.uniform is not None:
    poison += bar_by_row(index, bars.uniform)
  return jnp.where(index == INVALID, poison, jnp.zeros_like(poison))


def _logits(
  inputs: Inputs, index: jax.Array, static: Static
) -> tuple[Inputs, jax.Array, jax.Array]:
  """The inputs of a chunk, and its logits before and after the softcap."""
  inputs = inputs._replace(x=_features(inputs.x, index, static))
  y = static.projection.product(inputs.x, inputs.weight)
  num_tokens, num_features = inputs.x.shape
  size = static.tiling.block_size(num_tokens, num_features, y.shape[1], y.dtype.itemsize)

  # Block by block, as XLA:CPU otherwise holds a version of the logits for each of their users.
  def add_bias(y: jax.Array, first: Any, size: int) -> jax.Array:
    bias = lax.dynamic_slice_in_dim(inputs.bias, first, size)
    y_block = lax.dynamic_slice_in_dim(y, first, size, 1)
    return lax.dynamic_update_slice_in_dim(y, y_block + bias[None], first, 1)

  def cap(z: jax.Array, first: Any, size: int) -> jax.Array:
    z_block = capped(lax.dynamic_slice_in_dim(y, first, size, 1), inputs.softcap)
    return lax.dynamic_update_slice_in_dim(z, z_block, first, 1)

  # Padding has the probability 0.
  def pad(z: jax.Array, first: Any, size: int) -> jax.Array:
    z_block = lax.dynamic_slice_in_dim(z, first, size, 1)
    classes = static.rows.first_entry(z.shape[1]) + first + jnp.arange(size)
    z_block = jnp.where(classes[None] < static.num_classes, z_block, -jnp.inf)
    return lax.dynamic_update_slice_in_dim(z, z_block, first, 1)

  if inputs.bias is not None:
    y = over_blocks(add_bias, y, y.shape[1], size)
  z = y
  if inputs.softcap is not None:
    z = over_blocks(cap, jnp.zeros_like(y), y.shape[1], size)
  if static.padded:
    z = over_blocks(pad, z, y.shape[1], size)
  return inputs, y, z


def _scale(dtype: jnp.dtype, bars: PerRow, u: jax.Array | None) -> jax.Array | float:
  """The factor of y_bar before it is rounded to ``dtype``; 1 where it is not rounded.

  In float16 most probabilities over a large vocabulary, and all y_bar of a mean over many tokens,
  would be below the smallest normal number. And where all tokens have the same share of the loss,
  y_bar at the labels is close to -1 times that share, and they would all have its rounding error.
  """
  if jnp.finfo(dtype).bits > 16:
    return 1.0
  largest = jnp.abs(bars.nll)
  if u is not None:
    largest += jnp.abs(bars.uniform) * jnp.max(jnp.abs(u))
  largest = jnp.maximum(largest, jnp.abs(bars.lse))
  # A row of inf or NaN keeps that for itself.
  largest = jnp.max(jnp.where(jnp.isfinite(largest), largest, 0))
  # |y_bar| is at most twice `largest`, which becomes an eighth of the largest float16. The lower
  # bound keeps the scale finite where all cotangents are nearly 0.
  return lax.stop_gradient(2.0**13 / jnp.maximum(largest, 2.0**-112))


Product = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_product(
  product: Product, y_bar: jax.Array, factor: jax.Array, scale: jax.Array | float
) -> jax.Array:
  """``product(y_bar, factor)``, for which y_bar is rounded to the dtype of ``factor``."""
  return product((y_bar * scale).astype(factor.dtype), factor) / scale


# The size of tangents of y_bar is unknown, so that there is no scale for them. bfloat16, with the
# range of float32, needs none; to float16 they are not rounded.
@_rounded_product.defjvp
def _rounded_product_jvp(
  product: Product, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  y_bar, factor, scale = primals
  y_bar_dot, factor_dot, _ = tangents
  if factor.dtype == jnp.bfloat16:
    y_bar_dot = y_bar_dot.astype(factor.dtype)
  dot = product(y_bar_dot, factor) + _rounded_product(product, y_bar, factor_dot, scale)
  return _rounded_product(product, y_bar, factor, scale), dot


# The logits of a chunk are cut into blocks of classes, so that nothing else of their size is held.
# z_bar of a block is that of the dense loss, with u the weighted uniform label:
#   z_bar_j = a_j (lse_bar + uniform_bar sum_k u_k + nll_bar) - delta_tj nll_bar - u_j uniform_bar.
# A row whose label is in another block has its nll_bar added to lse_bar, and none of its own. Then
#   y_bar = z_bar dz/dy,   x_bar = y_bar W^T,   W_bar = x^T y_bar,   b_bar = sum_i y_bar_i,
#   c_bar = sum z_bar dz/dc,   u_bar_j = sum_i uniform_bar (-log a_j),
# where i runs over the tokens.
def _add_gradients(
  sums: Inputs, chunk: Chunk, bars: PerRow, put: Put, wanted: Inputs, static: Static
) -> Inputs:
  """``sums`` plus the part of a chunk; in the gradient of x that part is ``put``."""
  inputs, index, y, z, s, uniform_sum = chunk
  projection = static.projection
  num_classes = y.shape[1]
  s = differentiable(s, z, static.rows)
  # A row without a valid label has no gradient here. The NaN that belongs there comes at the end.
  bars = jax.tree.map(lambda bar: jnp.where(index >= 0, bar, jnp.zeros_like(bar)), bars)
  label = jnp.maximum(index, 0) - static.rows.first_entry(num_classes)
  g, u = bars.lse, None
  if static.smoothed:
    ones = jnp.ones((1, num_classes), y.dtype)
    u = (ones if inputs.class_weights is None else inputs.class_weights) / static.num_classes
    g = g + bars.uniform * uniform_sum
  scale = _scale(inputs.x.dtype, bars._replace(lse=g), u)

  def block(sums: Inputs, first: Any, size: int) -> Inputs:
    def cut(x: jax.Array, axis: int = 1) -> jax.Array:
      return lax.dynamic_slice_in_dim(x, first, size, axis)

    def add(x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
      return lax.dynamic_update_slice_in_dim(x, cut(x, axis) + part, first, axis)

    y_block, z_block = cut(y), cut(z)
    here = (label >= first) & (label < first + size)
    index_in_block = jnp.where(here, label - first, 0)
    z_bar = integer.logits_bar(  # a_j (g + nll_bar) - delta_tj nll_bar
      z_block,
      Label.of(index_in_block, size, Rows((1,))).take(z_block, 1),
      index_in_block,
      s,
      jnp.where(here, g, g + bars.nll),
      jnp.where(here, bars.nll, 0),
      Rows((1,)),
    )
    if u is not None:
      z_bar = z_bar - cut(u) * bars.uniform  # - u_j uniform_bar
    y_bar = z_bar
    if inputs.softcap is not None:
      y_bar = z_bar * cap_slope(y_block, inputs.softcap)  # z_bar dz/dy
    if u is not None and wanted.class_weights:  # sum_i uniform_bar (-log a_j)
      cost = cost_of(cut(u), minus_log_softmax(z_block, s))
      u_bar = jnp.sum(linear_scale_or_zero(bars.uniform, cost), axis=0, keepdims=True)
      sums = sums._replace(class_weights=add(sums.class_weights, u_bar / static.num_classes, 1))
    if inputs.softcap is not None and wanted.softcap:  # sum z_bar dz/dc
      c_bar = jnp.sum(z_bar * cap_slope_by_softcap(y_block, inputs.softcap))
      sums = sums._replace(softcap=sums.softcap + c_bar)
    if wanted.bias:  # sum_i y_bar_i
      sums = sums._replace(bias=add(sums.bias, jnp.sum(y_bar, axis=0), 0))
    if wanted.weight:  # x^T y_bar
      weight_bar = _rounded_product(projection.outer_product, y_bar, inputs.x, scale)
      sums = sums._replace(weight=add(sums.weight, weight_bar, projection.vocab_axis))
    if wanted.x:  # y_bar W^T
      weight = cut(inputs.weight, projection.vocab_axis)
      x_bar = _rounded_product(projection.transposed_product, y_bar, weight, scale)
      sums = sums._replace(x=sums.x + x_bar)
    return sums

  all_x_bar = sums.x
  if wanted.x:
    sums = sums._replace(x=jnp.zeros_like(inputs.x, projection.dtype))
  num_tokens, num_features = inputs.x.shape
  size = static.tiling.block_size(num_tokens, num_features, num_classes, y.dtype.itemsize)
  sums = over_blocks(block, sums, num_classes, size)
  return sums._replace(x=put(all_x_bar, sums.x)) if wanted.x else sums


def _over_chunks(
  body: Callable[..., Any], carry: Any, tokens: Any, inputs: Inputs, static: Static
) -> tuple[Any, Any]:
  """`over_chunks` of the size that ``static`` says."""
  size = static.chunk_size
  if size is None:
    num_tokens, num_features = inputs.x.shape
    num_classes = inputs.weight.shape[static.projection.vocab_axis]
    item_bytes = static.projection.dtype.itemsize
    size = static.tiling.chunk_size(num_tokens, num_features, num_classes, item_bytes)
  return over_chunks(body, carry, tokens, size, static.tiling.of_neighbors)


def _zeros(wanted: Inputs, inputs: Inputs, static: Static) -> Inputs:
  """Zeros to add gradients to, None where not wanted."""
  sums = [
    jnp.zeros_like(x, static.projection.dtype) if w else None
    for w, x in zip(wanted, inputs, strict=True)
  ]
  return Inputs(*sums)


def _as_gradients(gradients: Inputs, inputs: Inputs, poison: jax.Array) -> Inputs:
  """The gradients in the dtypes of the inputs, with ``poison`` [T, 1] added to each row."""

  def with_poison(gradient: Any, like: jax.Array, poison: jax.Array) -> Any:
    return None if gradient is None else (gradient + poison).astype(like.dtype)

  of_any = jnp.sum(poison)
  poisons = Inputs(poison, *[of_any] * 4)
  return Inputs(*map(with_poison, gradients, inputs, poisons))


# --- the losses of all rows -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses_rule(inputs: Inputs, index: jax.Array, static: Static) -> PerRow:
  return _forward(static, inputs, index)[0]


def _losses_fwd(inputs: Any, index: Any, static: Static) -> tuple[PerRow, Any]:
  wanted = _Wanted.of(inputs)
  inputs, index = _values((inputs, index))
  per_row, normalizer, uniform_sum = _forward(static, inputs, index)
  return per_row, (wanted, inputs, index, normalizer, uniform_sum)


# The derivation is above `_add_gradients`, which forms the gradients.
def _losses_bwd(static: Static, residuals: Any, bars: Any) -> tuple[Inputs, None]:
  bars = jax.tree.map(
    lambda bar: jnp.zeros(bar.shape, bar.dtype) if _is_zero(bar) else bar, bars, is_leaf=_is_zero
  )
  _, inputs, index, *_ = residuals
  gradients = _losses_gradients(static, residuals, bars)
  return _as_gradients(gradients, inputs, _poison(index, bars)), None


def _is_zero(bar: Any) -> bool:
  return type(bar) is SymbolicZero


@with_loops
def _forward(
  static: Static, inputs: Inputs, index: jax.Array
) -> tuple[PerRow, Normalizer, jax.Array | None]:
  def body(carry: tuple[()], tokens: Any, put: Put) -> tuple[tuple[()], Any]:
    x, index = tokens
    of_chunk, _, z = _logits(inputs._replace(x=x), index, static)
    per_row, residuals = integer.fwd(z, index, None, of_chunk.class_weights, static.dense)
    uniform_sum = _uniform_sum(residuals, static)
    return carry, (per_row._replace(weight=None), residuals.normalizer, uniform_sum)

  return _over_chunks(body, (), (inputs.x, index), inputs, static)[1]


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
    of_chunk, y, z = _logits(inputs._replace(x=x), index, static)
    chunk = Chunk(of_chunk, index, y, z, s, uniform_sum)
    return _add_gradients(sums, chunk, bars, put, wanted.inputs, static), None

  sums = _zeros(wanted.inputs, inputs, static)
  tokens = inputs.x, index, normalizer, uniform_sum, bars
  return _over_chunks(body, sums, tokens, inputs, static)[0]


# The tangent of the logits goes through the tangent rule of the dense loss, chunk by chunk.
@with_loops
def _losses_tangent(static: Static, residuals: Any, args_dot: tuple[Any, ...]) -> PerRow:
  _, inputs, index, normalizer, uniform_sum = residuals
  dots: Inputs = args_dot[0]

  def body(carry: tuple[()], tokens: Any, put: Put) -> tuple[tuple[()], PerRow]:
    x, x_dot, index, normalizer, uniform_sum = tokens
    of_chunk, y, z = _logits(inputs._replace(x=x), index, static)
    chunk_dots = dots
    if x_dot is not None:
      chunk_dots = dots._replace(x=_features(x_dot, index, static))
    y_dot = static.projection.linear_tangent(of_chunk, chunk_dots)
    z_dot = capped_tangent(y, y_dot, of_chunk, chunk_dots)
    uniform = None
    if uniform_sum is not None:
      uniform = UniformSums(None, uniform_sum * static.num_classes, None)
    dense = integer.Residuals(z, index, None, of_chunk.class_weights, normalizer, uniform)
    per_row = integer.tangent(static.dense, dense, (z_dot, None, None, dots.class_weights))
    return carry, per_row._replace(weight=None)

  tokens = inputs.x, dots.x, index, normalizer, uniform_sum
  return _over_chunks(body, (), tokens, inputs, static)[1]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_rule(inputs: Inputs, shares: PerRow, index: jax.Array, static: Static) -> jax.Array:
  return _weighted_sum(shares, _forward(static, inputs, index)[0])


# In the forward pass, for a cotangent of 1: nll_bar = p, uniform_bar = q, lse_bar = 2 r lse.
def _sum_fwd(inputs: Any, shares: Any, index: Any, static: Static) -> tuple[jax.Array, Any]:
  wanted = _Wanted.of(inputs)
  inputs, shares, index = _values((inputs, shares, index))
  gradients, per_row = _sum_gradients(static, inputs, shares, index, wanted)
  # Empty arrays carry the dtypes of the gradients: a residual must be an array.
  likes = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), inputs)
  return _weighted_sum(shares, per_row), (gradients, likes, per_row, shares, index)


@with_loops
def _sum_gradients(
  static: Static, inputs: Inputs, shares: PerRow, index: jax.Array, wanted: _Wanted
) -> tuple[Inputs, PerRow]:
  def body(sums: Inputs, tokens: Any, put: Put) -> tuple[Inputs, PerRow]:
    x, shares, index = tokens
    of_chunk, y, z = _logits(inputs._replace(x=x), index, static)
    per_row, dense = integer.fwd(z, index, None, of_chunk.class_weights, static.dense)
    lse_bar = jnp.zeros_like(per_row.lse) if shares.lse is None else 2 * shares.lse * per_row.lse
    bars = shares._replace(lse=lse_bar)
    chunk = Chunk(of_chunk, index, y, z, dense.normalizer, _uniform_sum(dense, static))
    sums = _add_gradients(sums, chunk, bars, put, wanted.inputs, static)
    return sums, per_row._replace(weight=None)

  sums = _zeros(wanted.inputs, inputs, static)
  return _over_chunks(body, sums, (inputs.x, shares, index), inputs, static)


# All gradients are those of `_sum_fwd`, times bar.
def _sum_bwd(static: Static, residuals: Any, bar: Any) -> tuple[Any, ...]:
  gradients, likes, per_row, shares, index = residuals
  if _is_zero(bar):
    return None, None, None
  gradients = jax.tree.map(lambda gradient: bar * gradient, gradients)
  bars = jax.tree.map(lambda share: bar * share, shares)
  inputs_bar = _as_gradients(gradients, likes, _poison(index, bars))
  _, pull = jax.vjp(lambda shares: _weighted_sum(shares, per_row), shares)
  return inputs_bar, pull(bar)[0], None


# The gradients are known by now: the tangent is their product with the tangents of the inputs.
def _sum_tangent(static: Static, residuals: Any, args_dot: tuple[Any, ...]) -> jax.Array:
  gradients, _, per_row, shares, index = residuals
  dots, shares_dot, _ = args_dot
  dots = Inputs(*dots)
  if dots.x is not None:
    dots = dots._replace(x=_features(dots.x, index, static))
  total = jnp.zeros((), static.projection.dtype)
  for gradient, dot in zip(gradients, dots, strict=True):
    if dot is not None:
      total += jnp.sum(gradient * dot.astype(gradient.dtype))
  total = static.rows.sum_over_devices(total)
  if any(dot is not None for dot in dots):
    total += jnp.sum(_poison(index, shares))
  moving = [
    jnp.zeros_like(share) if dot is None and share is not None else dot
    for share, dot in zip(shares, shares_dot, strict=True)
  ]

  def weigh(shares: PerRow) -> jax.Array:
    return _weighted_sum(shares, per_row)

  return total + jax.jvp(weigh, (shares,), (PerRow(*moving),))[1]


_sum_rule.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)
sum_of_losses = enable_forward_mode(_sum_rule, tangent=_sum_tangent)
