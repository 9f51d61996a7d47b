"""Products in which 0 * inf = 0: what has weight 0 adds nothing, even where it is infinite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from softmax_jax._arrays import unbroadcast, with_rank
from softmax_jax._devices import varying_alike
from softmax_jax._forward_mode import linear_map


@jax.custom_jvp
def scale_or_zero(
  coefficient: jax.Array, x: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
  """``coefficient * x`` with 0 * inf = 0.

  In rows outside of ``counts`` derivatives are 0 where one of them is not finite, NaN say.
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
  (coefficient, x, *optional), (coefficient_dot, x_dot, *_) = primals, tangents
  nothing = (coefficient == 0) & jnp.isinf(x)
  if optional and optional[0] is not None:  # rows that count
    gone = ~optional[0] & ~(jnp.isfinite(coefficient) & jnp.isfinite(x))
    nothing |= gone
    x_dot, coefficient = (jnp.where(gone, jnp.zeros_like(v), v) for v in (x_dot, coefficient))
  finite_x = jnp.where(nothing, jnp.zeros_like(x), x)
  by_x = _linear_product(x_dot, coefficient, like=x)  # coefficient x_dot
  by_coefficient = _linear_product(coefficient_dot, finite_x, like=x)  # coefficient_dot x
  return product(*primals), by_x + by_coefficient


scale_or_zero.defjvp(functools.partial(_product_jvp, scale_or_zero))
linear_scale_or_zero.defjvp(functools.partial(_product_jvp, linear_scale_or_zero))


def _linear_product(v: jax.Array, factor: jax.Array, like: jax.Array) -> jax.Array:
  """``v * factor`` with 0 * inf = 0, and so in its transpose; linear in v, of the type of like."""
  v, factor = varying_alike(with_rank(v, like.ndim), factor)
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
