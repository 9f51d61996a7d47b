"""The logits of a chunk and its part of the gradients, which both rules share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmax_jax._cross_entropy import integer_rule as integer
from softmax_jax._cross_entropy.label import IGNORED, INVALID, Label, bar_by_row
from softmax_jax._cross_entropy.per_row import PerRow, minus_log_softmax
from softmax_jax._linear_cross_entropy.chunks import ON_CPU, Put, Tiling, over_blocks, over_chunks
from softmax_jax._linear_cross_entropy.projection import (
  Inputs,
  Projection,
  cap_slope,
  cap_slope_by_softcap,
  capped,
)
from softmax_jax._normalizer import Normalizer, differentiable
from softmax_jax._products import cost_of, linear_scale_or_zero
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
    with_aux: whether losses come with what a `CrossEntropyAux` needs.
    axis_name: the mesh axis over whose devices the classes are spread, if any.
    tiling: how large chunks and blocks are by default.
  """

  projection: Projection
  chunk_size: int | None
  num_classes: int
  padded: bool
  smoothed: bool
  ignores: bool
  with_aux: bool
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
    y: the logits ``[C, V]`` after the logit scale and before the softcap.
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


def features_that_count(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  """The features, with 0 in rows that do not count: those may hold anything."""
  return jnp.where(index == IGNORED, jnp.zeros_like(x), x) if static.ignores else x


def poison_of(index: jax.Array, bars: PerRow) -> jax.Array:
  """NaN in rows whose label is invalid, unless their loss is discarded; 0 elsewhere."""
  poison = bar_by_row(index, bars.nll)
  if bars.uniform is not None:
    poison += bar_by_row(index, bars.uniform)
  return jnp.where(index == INVALID, poison, jnp.zeros_like(poison))


def logits(inputs: Inputs, index: jax.Array, static: Static) -> tuple[Inputs, jax.Array, jax.Array]:
  """The inputs of a chunk, and its logits before and after the softcap."""
  inputs = inputs._replace(x=features_that_count(inputs.x, index, static))
  y = static.projection.product(inputs.x, inputs.weight)
  num_tokens, num_features = inputs.x.shape
  size = static.tiling.block_size(num_tokens, num_features, y.shape[1], y.dtype.itemsize)

  # Block by block, as XLA:CPU otherwise holds a version of the logits for each of their users.
  def add_bias(y: jax.Array, first: Any, size: int) -> jax.Array:
    bias = lax.dynamic_slice_in_dim(inputs.bias, first, size)
    y_block = lax.dynamic_slice_in_dim(y, first, size, 1)
    return lax.dynamic_update_slice_in_dim(y, y_block + bias[None], first, 1)

  def scale(y: jax.Array, first: Any, size: int) -> jax.Array:
    y_block = lax.dynamic_slice_in_dim(y, first, size, 1)
    return lax.dynamic_update_slice_in_dim(y, inputs.logit_scale * y_block, first, 1)

  def bound(z: jax.Array, first: Any, size: int) -> jax.Array:
    classes = static.rows.first_entry(z.shape[1]) + first + jnp.arange(size)[None]
    z_block = bounded(lax.dynamic_slice_in_dim(y, first, size, 1), classes, inputs, static)
    return lax.dynamic_update_slice_in_dim(z, z_block, first, 1)

  if inputs.bias is not None:
    y = over_blocks(add_bias, y, y.shape[1], size)
  if inputs.logit_scale is not None:
    y = over_blocks(scale, y, y.shape[1], size)
  z = y
  if inputs.softcap is not None or static.padded:
    z = y if inputs.softcap is None else jnp.zeros_like(y)
    z = over_blocks(bound, z, y.shape[1], size)
  return inputs, y, z


def bounded(y: jax.Array, classes: jax.Array, inputs: Inputs, static: Static) -> jax.Array:
  """The logits of the loss from those before the softcap, of these classes of all devices."""
  z = capped(y, inputs.softcap)
  # Padding has the probability 0.
  return jnp.where(classes < static.num_classes, z, -jnp.inf) if static.padded else z


def _scale(
  dtype: jnp.dtype, bars: PerRow, u: jax.Array | None, logit_scale: jax.Array | None
) -> jax.Array | float:
  """The factor of h_bar before it is rounded to ``dtype``; 1 where it is not rounded.

  In float16 most probabilities over a large vocabulary, and all h_bar of a mean over many tokens,
  would be below the smallest normal number. And where all tokens have the same share of the loss,
  h_bar at the labels is close to -k times that share, and they would all have its rounding error.
  """
  if jnp.finfo(dtype).bits > 16:
    return 1.0
  largest = jnp.abs(bars.nll)
  if u is not None:
    largest += jnp.abs(bars.uniform) * jnp.max(jnp.abs(u))
  largest = jnp.maximum(largest, jnp.abs(bars.lse))
  # A row of inf or NaN keeps that for itself.
  largest = jnp.max(jnp.where(jnp.isfinite(largest), largest, 0))
  if logit_scale is not None:
    largest *= logit_scale
  # |h_bar| is at most twice `largest`, which becomes an eighth of the largest float16. The lower
  # bound keeps the scale finite where all cotangents are nearly 0.
  return lax.stop_gradient(2.0**13 / jnp.maximum(largest, 2.0**-112))


Product = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_product(
  product: Product, h_bar: jax.Array, factor: jax.Array, scale: jax.Array | float
) -> jax.Array:
  """``product(h_bar, factor)``, for which h_bar is rounded to the dtype of ``factor``."""
  return product((h_bar * scale).astype(factor.dtype), factor) / scale


# The size of tangents of h_bar is unknown, so that there is no scale for them. bfloat16, with the
# range of float32, needs none; to float16 they are not rounded.
@_rounded_product.defjvp
def _rounded_product_jvp(
  product: Product, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  h_bar, factor, scale = primals
  h_bar_dot, factor_dot, _ = tangents
  if factor.dtype == jnp.bfloat16:
    h_bar_dot = h_bar_dot.astype(factor.dtype)
  dot = product(h_bar_dot, factor) + _rounded_product(product, h_bar, factor_dot, scale)
  return _rounded_product(product, h_bar, factor, scale), dot


# The logits of a chunk are cut into blocks of classes, so that nothing else of their size is held.
# z_bar of a block is that of the dense loss, with u the weighted uniform label:
#   z_bar_j = a_j (lse_bar + uniform_bar sum_k u_k + nll_bar) - delta_tj nll_bar - u_j uniform_bar.
# A row whose label is in another block has its nll_bar added to lse_bar, and none of its own. Then
#   y_bar = z_bar dz/dy,   h_bar = k y_bar,   x_bar = h_bar W^T,   W_bar = x^T h_bar,
#   b_bar = sum_i h_bar_i,   k_bar = sum y_bar y / k,   c_bar = sum z_bar dz/dc,
#   u_bar_j = sum_i uniform_bar (-log a_j),
# where i runs over the tokens.
def add_gradients(
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
  scale = _scale(inputs.x.dtype, bars._replace(lse=g), u, inputs.logit_scale)

  def block(sums: Inputs, first: Any, size: int) -> Inputs:
    def cut(x: jax.Array, axis: int = 1) -> jax.Array:
      return lax.dynamic_slice_in_dim(x, first, size, axis)

    def add(x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
      return lax.dynamic_update_slice_in_dim(x, cut(x, axis) + part, first, axis)

    first_class = static.rows.first_entry(num_classes) + first
    y_block, z_block = cut(y), cut(z)
    if inputs.softcap is not None:
      # Again, and without XLA seeing that: it would keep z beside y since the normalizer.
      y_block = lax.optimization_barrier(y_block)
      z_block = bounded(y_block, first_class + jnp.arange(size)[None], inputs, static)
    here = (label >= first) & (label < first + size)
    index_in_block = jnp.where(here, label - first, 0)
    # Cut out before the softcap: z would be written to cut it out.
    y_t = Label.of(index_in_block, size, Rows((1,))).take(y_block, 1)
    z_bar = integer.logits_bar(  # a_j (g + nll_bar) - delta_tj nll_bar
      z_block,
      bounded(y_t, first_class + index_in_block, inputs, static),
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
    h_bar = y_bar
    if inputs.logit_scale is not None:
      h_bar = inputs.logit_scale * y_bar  # k y_bar
      if wanted.logit_scale:  # sum y_bar y / k, where y may be -inf
        k_bar = jnp.sum(linear_scale_or_zero(y_bar, y_block / inputs.logit_scale))
        sums = sums._replace(logit_scale=sums.logit_scale + k_bar)
    if wanted.bias:  # sum_i h_bar_i
      sums = sums._replace(bias=add(sums.bias, jnp.sum(h_bar, axis=0), 0))
    if wanted.weight:  # x^T h_bar
      weight_bar = _rounded_product(projection.outer_product, h_bar, inputs.x, scale)
      sums = sums._replace(weight=add(sums.weight, weight_bar, projection.vocab_axis))
    if wanted.x:  # h_bar W^T
      weight = cut(inputs.weight, projection.vocab_axis)
      x_bar = _rounded_product(projection.transposed_product, h_bar, weight, scale)
      sums = sums._replace(x=sums.x + x_bar)
    return sums

  all_x_bar = sums.x
  if wanted.x:
    sums = sums._replace(x=jnp.zeros_like(inputs.x, projection.dtype))
  num_tokens, num_features = inputs.x.shape
  size = static.tiling.block_size(num_tokens, num_features, num_classes, y.dtype.itemsize)
  sums = over_blocks(block, sums, num_classes, size)
  return sums._replace(x=put(all_x_bar, sums.x)) if wanted.x else sums


def over_all_chunks(
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


def zeros(wanted: Inputs, inputs: Inputs, static: Static) -> Inputs:
  """Zeros to add gradients to, None where not wanted."""
  sums = [
    jnp.zeros_like(x, static.projection.dtype) if w else None
    for w, x in zip(wanted, inputs, strict=True)
  ]
  return Inputs(*sums)


def as_gradients(gradients: Inputs, inputs: Inputs, poison: jax.Array) -> Inputs:
  """The gradients in the dtypes of the inputs, with ``poison`` [T, 1] added to each row."""

  def with_poison(gradient: Any, like: jax.Array, poison: jax.Array) -> Any:
    return None if gradient is None else (gradient + poison).astype(like.dtype)

  of_any = jnp.sum(poison)
  poisons = Inputs(poison, *[of_any] * 5)
  return Inputs(*map(with_poison, gradients, inputs, poisons))
