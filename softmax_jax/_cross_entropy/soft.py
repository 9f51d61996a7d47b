"""Cross-entropy with one weight per class and row."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softmax_jax import _arguments as arguments
from softmax_jax._arguments import Axis
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._cross_entropy.rows import (
  PerRow,
  class_count,
  cost_of,
  inverse_sum,
  minus_log_softmax,
  uniform_label,
  uniform_loss,
)
from softmax_jax._forward_mode import enable_forward_mode, varying_alike
from softmax_jax._normalizer import (
  Axes,
  Normalizer,
  any_entry,
  broadcast,
  compiled,
  entries,
  exp_of_difference,
  few,
  masked,
  normalizer,
  unbroadcast,
  where_needed,
)


class _Residuals(NamedTuple):
  logits: jax.Array
  labels: jax.Array
  mask: jax.Array | None
  weights: jax.Array | None
  normalizer: Normalizer


class _Static(NamedTuple):
  axes: Axes
  smoothed: bool


def _weighted_label(
  labels: jax.Array, mask: jax.Array | None, weights: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  t = masked(labels.astype(dtype), mask, 0)
  return t if weights is None else t * weights


@functools.partial(jax.jit, static_argnums=5, inline=True)
def _likelihood(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  s: Normalizer,
  axes: Axes,
) -> jax.Array:
  """``-sum_k p_k log a_k`` with the weighted label p, in which 0 log 0 = 0."""

  def likelihood(careful, logits, labels, mask, weights, s):
    dtype = s.shift.dtype
    p = _weighted_label(labels, mask, weights, dtype)
    cost = minus_log_softmax(entries(logits, mask, axes, dtype), s)
    return jnp.sum(p * (cost_of(p, cost) if careful else cost), axis=axes, keepdims=True)

  operands = logits, labels, mask, weights, s
  careful = mask is not None or few(logits.shape, axes)
  nll = likelihood(careful, *operands)
  if careful:
    return nll
  # To see to labels of 0 at infinite costs in every sum would double its time.
  return where_needed(
    jnp.any(jnp.isnan(nll)),
    lambda _, *operands: likelihood(True, *operands),
    lambda nll, *_: nll,
    nll,
    *operands,
  )


def _primal(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  static: _Static,
) -> PerRow:
  return _fwd(logits, labels, mask, weights, static)[0]


def _fwd(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  static: _Static,
) -> tuple[PerRow, _Residuals]:
  axes, smoothed = static
  dtype = arguments.compute_dtype(logits.dtype, labels.dtype)
  s = normalizer(logits, mask, axes, dtype)

  nll = _likelihood(logits, labels, mask, weights, s, axes)
  uniform = uniform_loss(weights, logits, mask, s, axes) if smoothed else None
  # A row without any class does not count; its labels are all 0.
  lse = masked(s.shift + s.log_sum(), any_entry(mask, axes), 0)
  return PerRow(nll, lse, uniform), _Residuals(logits, labels, mask, weights, s)


# With p = w t the weighted label and u the weighted uniform one, nll = -sum_k p_k log a_k for any
# p, not only one that sums to 1, and uniform likewise with u. By seed steps 5 and 6
#   d nll/dz_j = a_j sum_k p_k - p_j = ((e_j sum_k p_k - p_j) - p_j rest) / S,
# whose right side loses nothing where t is one-hot and a_t close to 1: there e_t is 1 and the first
# difference 0. Seed step 1: d lse/dz_j = a_j. And d nll/dp_j = -log a_j.
def _bwd(
  static: _Static, residuals: _Residuals, bars: PerRow
) -> tuple[jax.Array, jax.Array, None, jax.Array | None]:
  axes, smoothed = static
  logits, labels, mask, weights, s = residuals
  dtype = s.shift.dtype
  z = entries(logits, mask, axes, dtype)
  p = jnp.broadcast_to(_weighted_label(labels, mask, weights, dtype), z.shape)
  cost = minus_log_softmax(z, s)
  e, inverse = exp_of_difference(z, s.shift), inverse_sum(s)
  g = bars.lse
  if smoothed:
    u = uniform_label(weights, mask, z.shape, axes, dtype)
    g = g + bars.uniform * jnp.sum(u, axis=axes, keepdims=True)
  scale = bars.nll * inverse
  total = jnp.sum(p, axis=axes, keepdims=True) * scale
  total, scale, g, rest = jax.lax.optimization_barrier((total, scale, g * inverse, s.rest * scale))
  z_bar = (e * total - p * scale) + (e * g - p * rest)
  if smoothed:
    z_bar = z_bar - u * bars.uniform

  p_bar = masked(cost_of(p, cost) * bars.nll, mask, 0)
  labels_bar = p_bar if weights is None else p_bar * weights
  weights_bar = None
  if weights is not None:
    weights_bar = p_bar * masked(labels.astype(dtype), mask, 0)
    if smoothed:
      u_bar = masked(cost_of(u, cost) * bars.uniform, mask, 0)
      weights_bar = weights_bar + u_bar / class_count(mask, z.shape, axes, dtype)
    weights_bar = unbroadcast(weights_bar, weights.shape)
  return (
    masked(z_bar, mask, 0).astype(logits.dtype),
    unbroadcast(labels_bar, labels.shape).astype(labels.dtype),
    None,
    weights_bar,
  )


# The same derivative along z_dot, p_dot and u_dot, in the form that keeps its digits near a_t = 1.
# With lse_dot = sum_k a_k z_dot_k and v_j = z_dot_j - lse_dot,
#   nll_dot = -sum_j p_j v_j - sum_j p_dot_j log a_j,
#   uniform_dot = -sum_j u_j v_j - sum_j u_dot_j log a_j.
# The rounding error of lse_dot is the same number in every v_j; as sum_k a_k v_k = 0, that sum is
# the error, and is taken off, and so is the error of the error.
def _tangent(
  static: _Static, residuals: _Residuals, args_dot: tuple[jax.Array | None, ...]
) -> PerRow:
  axes, smoothed = static
  logits, labels, mask, weights, s = residuals
  logits_dot, labels_dot, _, weights_dot = args_dot
  dtype = s.shift.dtype
  z = entries(logits, mask, axes, dtype)
  row_sum = lambda x: jnp.sum(x, axis=axes, keepdims=True)
  nll_dot = lse_dot = jnp.zeros_like(s.shift)
  uniform_dot = jnp.zeros_like(s.shift) if smoothed else None
  p = _weighted_label(labels, mask, weights, dtype)
  u = uniform_label(weights, mask, z.shape, axes, dtype) if smoothed else None

  if logits_dot is not None:
    z_dot = masked(logits_dot.astype(dtype), mask, 0)
    a = exp_of_difference(z, s.shift) * inverse_sum(s)
    lse_dot = row_sum(a * z_dot)
    v = z_dot - lse_dot
    for _ in range(2):
      v = v - row_sum(a * v)
    nll_dot -= row_sum(p * v)
    if smoothed:
      uniform_dot -= row_sum(u * v)
  if labels_dot is not None or weights_dot is not None:
    cost = minus_log_softmax(z, s)
    p_dot = jnp.zeros_like(z)
    if labels_dot is not None:
      p_dot += _weighted_label(labels_dot, mask, weights, dtype)
    if weights_dot is not None:
      p_dot += _weighted_label(labels, mask, weights_dot, dtype)
    nll_dot += row_sum(cost_of(p, cost) * masked(p_dot, mask, 0))
    if smoothed and weights_dot is not None:
      u_dot = uniform_label(weights_dot, mask, z.shape, axes, dtype)
      uniform_dot += row_sum(cost_of(u, cost) * u_dot)
  return PerRow(nll_dot, lse_dot, uniform_dot)


_rule = jax.custom_vjp(_primal, nondiff_argnums=(4,))
_rule.defvjp(_fwd, _bwd)
_soft_cross_entropy = compiled(enable_forward_mode(_rule, tangent=_tangent), static_argnums=4)


@overload
def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  return_aux: Literal[False] = False,
) -> jax.Array: ...


@overload
def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  return_aux: Literal[True],
) -> tuple[jax.Array, CrossEntropyAux]: ...


def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]:
  r"""Cross-entropy between the softmax of logits and a distribution over the classes.

  .. math:: L = -\sum_k t_k \log a_k, \qquad
    \frac{\partial L}{\partial z_j} = a_j \sum_k t_k - t_j, \qquad
    \frac{\partial L}{\partial t_j} = -\log a_j

  A drop-in replacement for the function of this name in `optax.losses`, differentiable in both
  modes and in both arguments. Unlike there, loss and gradient keep all digits where the softmax is
  close to a one-hot label. Only the inputs and two numbers per row are saved for the backward pass,
  whatever the options. With all options, the loss of a row is

  .. math:: L = -\sum_k w_k \Bigl((1 - \alpha)\, t_k + \frac{\alpha}{K}\Bigr) \log a_k
    + \lambda \Bigl(\log \sum_k e^{z_k}\Bigr)^2

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32.
    labels: array ``[*B, V]`` of a real dtype, differentiable if floating: the share t of each
      class, not necessarily summing to 1. Logits and labels broadcast against each other.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row. Classes where it is False take no part: they have probability 0, their label is left out
      of the sum, and their derivatives are 0, whatever they hold. A row without any class does not
      count: its loss is 0.
    label_smoothing: the share alpha of the label that is replaced by the uniform distribution over
      the K unmasked classes; a scalar in [0, 1], differentiable.
    z_loss: the coefficient lambda of the squared log-normalizer, which keeps that near 0; a scalar,
      differentiable.
    class_weights: optional weights w ``[V]`` of the classes (of the shape of the class axes, where
      ``axis`` is a tuple), differentiable.
    reduction: "none" for one loss per row, "sum", or "mean": the sum divided by the number of rows
      that count (whatever their labels sum to, and also with class weights), or 0 without any.
    return_aux: whether to return a `CrossEntropyAux` with the log-normalizer, the part that the
      z-loss adds and the number of rows that count too. They are differentiable like the loss.

  Returns:
    Losses ``[*B]``, or one number if reduced, in float32 (float64 where an argument has it). A
    class whose logit is -inf adds +inf, or 0 where its weighted label is exactly 0, in which case
    its derivatives are 0 too. Rows that contain NaN or +inf, or logits of -inf alone, give NaN.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels not of a real dtype, ``where``
      is not boolean, a coefficient not a real scalar, or ``axis`` not a static int, tuple of ints
      or None.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not fit, ``reduction``
      is unknown, or ``label_smoothing`` is known while tracing and outside [0, 1].

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy
    >>> logits, labels = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.5, 0.5, 0.0])
    >>> with jnp.printoptions(precision=4):
    ...   print(softmax_cross_entropy(logits, labels))
    ...   print(jax.grad(softmax_cross_entropy)(logits, labels))
    ...   print(jax.grad(softmax_cross_entropy, argnums=1)(logits, labels))
    1.2395449
    [ 0.287  -0.3935  0.1065]
    [0.2395 2.2395 2.2395]

  Source: seed step 6; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and
  softmax functions", IMA Journal of Numerical Analysis (2021), for the sum without the largest
  class; Szegedy et al. (2016) for label smoothing; t5x for the z-loss.
  """
  name = "softmax_cross_entropy"
  logits = arguments.as_logits(name, "logits", logits)
  labels = arguments.as_probabilities(name, labels)
  dtype = arguments.compute_dtype(logits.dtype, labels.dtype)
  axes = arguments.as_axes(name, "logits", axis, logits.shape)
  chosen = options.checked(name, dtype, label_smoothing, z_loss, reduction)
  shape = arguments.common_shape(name, "logits", logits.shape, "labels", labels.shape)
  axes = tuple(a + len(shape) - logits.ndim for a in axes)
  logits = broadcast(logits, shape)
  labels = labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape)
  weights = None
  if class_weights is not None:
    class_shape = tuple(shape[a] for a in axes)
    weights = arguments.as_class_weights(name, class_weights, class_shape).astype(dtype)
    weights = jnp.transpose(weights, np.argsort(axes))
    weights = jnp.expand_dims(weights, [a for a in range(len(shape)) if a not in axes])
  mask = None
  if where is not None:
    mask = arguments.as_mask(name, where, "logits", shape, row_axes=axes)

  static = _Static(axes, smoothed=chosen.label_smoothing is not None)
  per_row = _soft_cross_entropy(*varying_alike(logits, labels, mask, weights), static)
  row_weights = jnp.ones_like(per_row.nll)
  if mask is not None:
    row_weights = masked(row_weights, any_entry(mask, axes), 0)
  squeezed = jax.tree.map(lambda x: jnp.squeeze(x, axes), (per_row, row_weights))
  loss, aux = options.combine(chosen, *squeezed)
  return (loss, aux) if return_aux else loss
