r"""The entropy of a softmax.

With the shift, e_k and S of `softmax_jax._normalizer` and the spread C = sum_k e_k (shift - z_k),

    H = -sum_k a_k log a_k = log S + C / S,

two terms that are at least 0, so that nothing cancels however sure of one class a row is: there
log S comes from the sum without that class, which adds 0 to C.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from softmax_jax._arguments import Arguments, Axis, compute_dtype
from softmax_jax._arrays import compiled, known_sum, masked
from softmax_jax._cross_entropy.per_row import inverse_sum
from softmax_jax._devices import align
from softmax_jax._exponentials import entries
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, local_normalizer
from softmax_jax._row_sums import row_sums
from softmax_jax._rows import AxisName, Rows

_with_spread = functools.partial(row_sums, with_spread=True)


class _Residuals(NamedTuple):
  logits: jax.Array
  mask: jax.Array | None
  normalizer: Normalizer
  spread: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rule(logits: jax.Array, mask: jax.Array | None, rows: Rows) -> jax.Array:
  return _fwd(logits, mask, rows)[0]


def _fwd(logits: jax.Array, mask: jax.Array | None, rows: Rows) -> tuple[jax.Array, _Residuals]:
  dtype = compute_dtype(logits.dtype)
  local, _ = local_normalizer(logits, mask, (), rows, dtype, _with_spread)
  s, spread = local.over_devices(local.spread, rows)
  z = entries(logits, mask, s.any, dtype)
  s = differentiable(s, z, rows)
  spread = known_sum(s.exp(z) * s.cost(z), spread, rows)
  entropy = s.log_sum() + spread * inverse_sum(s)  # log S + C / S
  return masked(entropy, s.any, 0), _Residuals(logits, mask, s, spread)


# By seed step 5, dH/dz_j = -sum_i (log a_i + 1) a_i (delta_ij - a_j) = -a_j (log a_j + H), and with
# log a_j = (z_j - shift) - log S
#   dH/dz_j = a_j ((shift - z_j) - C / S).
# The first difference is 0 for the largest class, whose derivative is minus the sum of all others.
def _bwd(rows: Rows, residuals: _Residuals, entropy_bar: jax.Array) -> tuple[jax.Array, None]:
  logits, mask, s, spread = residuals
  dtype = s.shift.dtype
  z = entries(logits, mask, s.any, dtype)
  s = differentiable(s, z, rows)
  inverse = inverse_sum(s)
  mean = known_sum(s.exp(z) * s.cost(z), spread, rows) * inverse
  scale = entropy_bar * inverse
  mean, scale = rows.barrier(mean), jax.lax.optimization_barrier(scale)
  z_bar = scale * s.exp(z) * (s.cost(z) - mean)
  return masked(z_bar, mask, 0).astype(logits.dtype), None


_rule.defvjp(_fwd, _bwd)
_entropy = compiled(enable_forward_mode(_rule), static_argnums=2)


def softmax_entropy(
  logits: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array:
  r"""The entropy of the softmax of logits, in nats.

  .. math:: H = -\sum_k a_k \log a_k, \qquad
    \frac{\partial H}{\partial z_j} = -a_j (\log a_j + H)

  Differentiable in both modes. Value and gradient keep all digits where one class has nearly all of
  the probability, and the entropy is small. Only the logits and a few scalars per row are saved for
  the backward pass.

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32, narrower ones are refused.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row, of the shape of the result (a mask that fits both is one of classes). Classes where it is
      False take no part: they have probability 0 and their derivatives are 0, whatever they hold.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      classes are spread: each device holds a slice of the logits and of ``where``. The entropy is
      the same on all of these devices. One reduction of one or two scalars per row and one of three
      make it, and none its gradient.

  Returns:
    Entropies ``[*B]`` in float32 (float64 where the logits have it), from 0 to log V. A class whose
    logit is -inf adds 0, and its derivative is 0. Rows that contain NaN or +inf, or -inf alone,
    give NaN. A row that is masked altogether, or without classes, has entropy 0 and gradient 0.

  Raises:
    TypeError: if the logits are not of a floating dtype, ``where`` is not boolean, or ``axis`` is
      not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not fit, or
      ``axis_name`` is no axis of a surrounding `jax.shard_map` with ``check_vma=True`` over which
      the logits are spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_entropy
    >>> with jnp.printoptions(precision=4):
    ...   print(softmax_entropy(jnp.array([[0.0, 0.0], [30.0, 0.0]])))
    ...   print(jax.grad(softmax_entropy)(jnp.array([30.0, 0.0])))
    [6.9315e-01 2.9009e-12]
    [-2.8073e-12  2.8073e-12]

  Source: seed steps 1 and 5; Shannon, "A mathematical theory of communication" (1948).
  """
  arguments = Arguments("softmax_entropy")
  logits = arguments.as_logits("logits", logits)
  shape = logits.shape
  axes = arguments.as_axes("logits", axis, shape)
  mask = None
  if where is not None:
    mask = arguments.as_class_mask(where, shape, shape, shape, axes)
  if axis_name is not None:
    arguments.check_axis_name(axis_name, "logits", logits)
  rows = Rows(axes, axis_name)
  if math.prod(shape[a] for a in axes) == 0:
    batch = tuple(size for a, size in enumerate(shape) if a not in axes)
    return jnp.zeros(batch, compute_dtype(logits.dtype))
  return jnp.squeeze(_entropy(*align(logits, mask), rows), axes)
