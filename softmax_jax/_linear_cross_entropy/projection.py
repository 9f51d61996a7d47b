"""The logits of a chunk of tokens and their derivatives, by hand.

Products are formed in the dtype of the operands and summed in the dtype of the losses. The weight
is used as it is stored, ``[H, V]`` or ``[V, H]``, and its gradient is summed in the same layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from softmax_jax._products import linear_scale_or_zero


class Inputs(NamedTuple):
  """The differentiable inputs of the loss; also their tangents, or their gradients.

  All but x and weight are in the dtype of the losses, or None where there is no such input.

  Attributes:
    x: the features, ``[T, H]`` or ``[C, H]`` for a chunk.
    weight: ``[H, V]`` or ``[V, H]``.
    bias: ``[V]``.
    logit_scale: the factor k of the logits, a scalar.
    softcap: the bound c of the logits, a scalar.
    class_weights: the weights of the classes in the uniform label, ``[1, V]``.
  """

  x: Any
  weight: Any
  bias: Any
  logit_scale: Any
  softcap: Any
  class_weights: Any


class Projection(NamedTuple):
  """How features become logits.

  Attributes:
    vocab_axis: the axis of the classes in the weight, 0 or 1.
    dtype: of the logits and the losses.
  """

  vocab_axis: int
  dtype: np.dtype

  def product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x W``, from ``[C, H]`` to ``[C, V]``."""
    return self._dot(x, weight, 1, 1 - self.vocab_axis)

  def transposed_product(self, y_bar: jax.Array, weight: jax.Array) -> jax.Array:
    """``y_bar W^T``, from ``[C, V]`` to ``[C, H]``."""
    return self._dot(y_bar, weight, 1, self.vocab_axis)

  def outer_product(self, y_bar: jax.Array, x: jax.Array) -> jax.Array:
    """``x^T y_bar``, in the layout of the weight."""
    factors = (x, y_bar) if self.vocab_axis == 1 else (y_bar, x)
    return self._dot(*factors, 0, 0)

  def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=self.dtype)

  def linear_tangent(self, inputs: Inputs, dots: Inputs) -> jax.Array | None:
    """``x_dot W + x W_dot + b_dot``, or None where none of them moves."""
    terms: list[jax.Array] = []
    if dots.x is not None:
      terms.append(self.product(dots.x, inputs.weight))
    if dots.weight is not None:
      terms.append(self.product(inputs.x, dots.weight))
    if dots.bias is not None:
      shape = (inputs.x.shape[0], dots.bias.shape[0])
      terms.append(jnp.broadcast_to(dots.bias, shape))
    return sum(terms[1:], terms[0]) if terms else None


def scaled_tangent(y: jax.Array, h_dot: jax.Array | None, inputs: Inputs, dots: Inputs) -> Any:
  """``y_dot`` of y = k h, ``k h_dot + k_dot y / k``, or None where nothing moves."""
  k, k_dot = inputs.logit_scale, dots.logit_scale
  if k is None or (h_dot is None and k_dot is None):
    return h_dot
  y_dot = jnp.zeros_like(y) if h_dot is None else k * h_dot
  return y_dot if k_dot is None else y_dot + linear_scale_or_zero(k_dot, y / k)


# The softcap z = c tanh v of y, with v = y / c. Its derivatives keep their digits both where it
# saturates (large |v|) and where it hardly acts (small |v|):
#   dz/dy = 1 - tanh^2 v = 4 E / (1 + E)^2 with E = exp(-2 |v|),
#   dz/dc = tanh v - v dz/dy = (sinh(2v) / 2 - v) dz/dy, by its Taylor series for small v.
def capped(y: jax.Array, softcap: jax.Array | None) -> jax.Array:
  """z, the logits after the softcap c if there is one."""
  return y if softcap is None else softcap * jnp.tanh(y / softcap)


def cap_slope(y: jax.Array, softcap: jax.Array) -> jax.Array:
  """dz/dy."""
  return _tanh_slope(y / softcap)


@jax.custom_jvp
def _tanh_slope(v: jax.Array) -> jax.Array:
  e = jnp.exp(-2 * jnp.abs(v))
  return 4 * e / (1 + e) ** 2


# By hand: the derivative of the formula above has the factor 1 - E, which cancels for small v.
@_tanh_slope.defjvp
def _tanh_slope_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  slope = _tanh_slope(*primals)
  return slope, -2 * jnp.tanh(primals[0]) * slope * tangents[0]


def cap_slope_by_softcap(y: jax.Array, softcap: jax.Array) -> jax.Array:
  """dz/dc."""
  v = jnp.clip(y / softcap, -100, 100)  # where dz/dy is 0 and tanh v is 1
  u = (2 * v) ** 2
  ratio = jnp.ones_like(u)  # and 1 + u/20 (1 + u/42 (...)), as far as float64 can tell
  for k in range(8, 1, -1):
    ratio = 1 + u / (2 * k * (2 * k + 1)) * ratio
  series = v * u / 6 * ratio
  slope = cap_slope(y, softcap)
  return jnp.where(u < 1, series * slope, jnp.tanh(v) - v * slope)


def capped_tangent(y: jax.Array, y_dot: jax.Array | None, inputs: Inputs, dots: Inputs) -> Any:
  """``z_dot``, or None where nothing moves."""
  c, c_dot = inputs.softcap, dots.softcap
  if c is None or (y_dot is None and c_dot is None):
    return y_dot
  z_dot = jnp.zeros_like(y) if y_dot is None else cap_slope(y, c) * y_dot
  return z_dot if c_dot is None else z_dot + cap_slope_by_softcap(y, c) * c_dot
