"""The loss against the uniform label, which label smoothing mixes in."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softmax_jax._arrays import masked
from softmax_jax._cross_entropy.per_row import log_sum_from_constant
from softmax_jax._normalizer import Normalizer
from softmax_jax._rows import Rows


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

  @classmethod
  def of(
    cls,
    cost: jax.Array,
    weights: jax.Array | None,
    mask: jax.Array | None,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    rows: Rows,
  ) -> UniformSums:
    """Those over the classes of one device, of which the cost is known; for logits of ``shape``."""
    if mask is None:
      return cls(cost, None if weights is None else rows.local_sum(weights), None)
    weight = None if weights is None else rows.local_sum(masked(weights, mask, 0))
    return cls(cost, weight, rows.local_sum(jnp.broadcast_to(mask, shape).astype(dtype)))

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


def uniform_label(
  weights: jax.Array | None, mask: jax.Array | None, divisor: jax.Array | int, like: jax.Array
) -> jax.Array:
  """The uniform label u, the weights of the classes divided by ``divisor``; 0 where masked."""
  u = (jnp.ones((), like.dtype) if weights is None else weights) / divisor
  return masked(jnp.broadcast_to(u, like.shape), mask, 0)
