"""What the rules return per row, and what they compute from the normalizer.

Arrays of per-row scalars keep the class axes with size 1, so that they broadcast against the
logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softmax_jax._normalizer import Normalizer


class PerRow(NamedTuple):
  """The outputs of a rule; also their tangents, cotangents or shares, None where these are 0.

  Attributes:
    nll: the negative log-likelihood of the label.
    lse: the log-normalizer.
    uniform: the loss against the (weighted) uniform label, or None where labels are not smoothed.
    weight: the weight of the row, 0 if it does not count.
    right: 1 if no class is more likely than the label, 0 if one is or the row does not count; it
      has no derivative. None where the label is no class.
  """

  nll: Any
  lse: Any
  uniform: Any
  weight: Any
  right: Any = None


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
