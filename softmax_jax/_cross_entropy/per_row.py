"""What the rules share: their per-row outputs, products with 0 * inf = 0, and the uniform label.

Arrays of per-row scalars keep the class axes with size 1, so that they broadcast against the
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softmax_jax._devices import varying_alike
from softmax_jax._forward_mode import linear_map
from softmax_jax._normalizer import Normalizer, difference, masked, unbroadcast
from softmax_jax._rows import Rows


class PerRow(NamedTuple):
  """The outputs of a rule; also their tangents, cotangents or shares, None where these are 0.

  Attributes:
    nll: the negative log-likelihood of the label.
    lse: the log-normalizer.
    uniform: the loss against the (weighted) uniform label, or None where labels are not smoothed.
    weight: the weight of the row, 0 if it does not count.
  """

  nll: Any
  lse: Any
  uniform: Any
  weight: Any


# Products in which 0 * inf = 0: what has weight 0 adds nothing, even where it is infinite.


@jax.custom_jvp
def scale_or_zero(
  coefficient: jax.Array, x: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
  """``coefficient * x`` with 0 * inf = 0.

  Derivatives are 0 in rows outside of ``counts``, where x may be NaN.
  """
  nothing = (coefficient == 0) & jnp.isinf(x)
  return coefficient * jnp.where(nothing, jnp.zeros_like(x), x)


@jax.custom_jvp
def linear_scale_or_zero(bar: jax.Array, x: jax.Array) -> jax.Array:
  """The same, of the shape of ``x``; linear in the cotangent ``bar`` for `jax.linear_transpose`."""
  return _linear_product(bar, x, like=x)


# Where the product is not 0 * inf, its derivatives of every order are those of a product: nothing
# is dropped for a coefficient of 0 alone. Where it is, the derivative by the coefficient is 0 by
# definition (it would be infinite), and so are the derivatives of that. The derivative by x is
# stated without x, so that the gradient of a loss need not evaluate the loss.
def _product_jvp(
  product: Callable[..., jax.Array], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  (coefficient, x, *rest), (coefficient_dot, x_dot, *_) = primals, tangents
  nothing = (coefficient == 0) & jnp.isinf(x)
  if rest and rest[0] is not None:  # rows that count
    nothing |= ~rest[0]
    x_dot = jnp.where(rest[0], x_dot, jnp.zeros_like(x_dot))
  finite_x = jnp.where(nothing, jnp.zeros_like(x), x)
  by_x = _linear_product(x_dot, coefficient, like=x)  # coefficient x_dot
  by_coefficient = _linear_product(coefficient_dot, finite_x, like=x)  # coefficient_dot x
  return product(*primals), by_x + by_coefficient


scale_or_zero.defjvp(functools.partial(_product_jvp, scale_or_zero))
linear_scale_or_zero.defjvp(functools.partial(_product_jvp, linear_scale_or_zero))


def _linear_product(v: jax.Array, factor: jax.Array, like: jax.Array) -> jax.Array:
  """``v * factor`` with 0 * inf = 0, and so in its transpose; linear in v, of the type of like."""
  v, factor = varying_alike(v.reshape((1,) * (like.ndim - v.ndim) + v.shape), factor)
  shape = v.shape

  def product(factors: Any, vs: Any) -> tuple[jax.Array]:
    (factor,), (v,) = factors, vs
    nothing = ((v == 0) & jnp.isinf(factor)) | ((factor == 0) & jnp.isinf(v))
    # Before the product: in its derivatives inf would meet 0 after it.
    v, factor = (jnp.where(nothing, jnp.zeros_like(x), x) for x in (v, factor))
    return (v * factor,)

  def transpose(factors: Any, bars: Any) -> tuple[jax.Array]:
    return (unbroadcast(product(factors, bars)[0], shape),)

  return linear_map("product", product, transpose, [factor], v, like=like)


def batched_like(weight: jax.Array, x: jax.Array) -> jax.Array:
  """``weight``, made to depend on ``x``, so that `jax.vmap` batches both or neither.

  JAX 0.10 to 0.12 mix up shapes where a compiled custom_jvp function is batched, differentiated and
  has an output that is not batched with the others.
  """
  return jnp.where(x == x, weight, weight)


def inverse_sum(s: Normalizer) -> jax.Array:
  """``1 / S``; it makes every probability NaN in a row with +inf or of -inf alone."""
  return jnp.where(s.rest == jnp.inf, jnp.nan, 1 / (1 + s.rest))


def minus_log_softmax(z: jax.Array, s: Normalizer) -> jax.Array:
  """``-log a``, as a sum of two terms that are at least 0."""
  # Without the barrier XLA:CPU materializes the broadcast shift that two sums along the row use.
  held = s._replace(shift=jax.lax.optimization_barrier(s.shift))
  return s.log_sum() - held.minus_shift_in_a_sum(z)


def log_sum_from_constant(s: Normalizer) -> jax.Array:
  """``log S``, to add to sums with a constant shift: it carries the derivative by the shift too."""
  return s.log_sum() + (s.shift - jax.lax.stop_gradient(s.shift))


class UniformSums(NamedTuple):
  """Sums over the unmasked classes k of a row, which make the loss against the uniform label.

  Attributes:
    cost: ``sum_k w_k (shift - z_k)`` with a constant shift, w_k being the weights of the classes;
      None where the loss is known already.
    weight: ``sum_k w_k``, or None where all weights are 1.
    classes: the number of unmasked classes, or None where nothing is masked.
  """

  cost: Any
  weight: jax.Array | None
  classes: jax.Array | None

  def loss(self, s: Normalizer, num_classes: int) -> jax.Array:
    """``-sum_k u_k log a_k`` with the (weighted) uniform label u."""
    cost = self.cost / self.divisor(num_classes)
    return cost + self.label_sum(num_classes) * log_sum_from_constant(s)

  def label_sum(self, num_classes: int) -> jax.Array | float:
    """``sum_k u_k``, where ``num_classes`` are all classes, masked or not."""
    weight = self.classes if self.weight is None else self.weight
    return 1.0 if weight is None else weight / self.divisor(num_classes)

  def divisor(self, num_classes: int) -> jax.Array | int:
    """What the weights of the classes are divided by in u: their number, or 1."""
    return num_classes if self.classes is None else jnp.maximum(self.classes, 1)


def uniform_sums(
  weights: jax.Array | None,
  z: jax.Array,
  mask: jax.Array | None,
  counts: jax.Array | None,
  shift: jax.Array,
  rows: Rows,
) -> UniformSums:
  """The sums over the classes of one device, of the entries z and a constant shift.

  ``counts`` says which rows count, or is None where all do that have an entry.
  """
  cost = -difference(z, shift)
  if weights is None and mask is None:
    return UniformSums(rows.local_sum(cost), None, None)
  w = masked(jnp.ones(()) if weights is None else weights, mask, 0)
  return UniformSums(
    rows.local_sum(scale_or_zero(w, cost, counts)),
    None if weights is None else rows.local_sum(w),
    None if mask is None else rows.local_sum(jnp.broadcast_to(mask, z.shape).astype(z.dtype)),
  )


@jax.custom_jvp
def cost_of(label: jax.Array, cost: jax.Array) -> jax.Array:
  """``cost`` with 0 where a label of exactly 0 meets an infinite one."""
  return jnp.where((label == 0) & (cost == jnp.inf), jnp.zeros_like(cost), cost)


# The derivative of -log a_k by the logits, a_j - delta_jk, is finite where the cost is not. With it
# the second derivatives by label and logit are the same in both orders.
@cost_of.defjvp
def _cost_of_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  out = cost_of(*primals)
  return out, jnp.broadcast_to(tangents[1], out.shape)


def uniform_label(
  weights: jax.Array | None, mask: jax.Array | None, divisor: jax.Array | int, like: jax.Array
) -> jax.Array:
  """The uniform label u, the weights of the classes divided by ``divisor``; 0 where masked."""
  u = (jnp.ones((), like.dtype) if weights is None else weights) / divisor
  return masked(jnp.broadcast_to(u, like.shape), mask, 0)
