r"""Softmax cross-entropy with integer and with soft labels.

Notation, for the logits z_k of one row: shift, e_k, S and the softmax a_k = e_k / S are those of
`softmax_jax._normalizer`; ``rest`` is S - 1 to its own last digits, and t is the label.

Each kind of label has one rule with two outputs per row, the negative log-likelihood ``nll`` and
the log-normalizer ``lse``, whose cotangents are both honored. Everything else is plain JAX on
arrays of one number per row.

Near a_t = 1, where training ends, the textbook terms ``lse - z_t`` and ``a_t - 1`` lose all their
digits. Here they are sums of terms of one sign,

    nll = (shift - z_t) + log1p(rest),      1 - a_t = ((1 - e_t) + rest) / S,

of which the second is exact in its first term where t is the largest class, and at least 1
elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from softmax_jax import _arguments as arguments
from softmax_jax._arguments import Axis
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Axes, Normalizer, fill_masked, normalizer, unbroadcast


def _inverse_sum(s: Normalizer) -> jax.Array:
  """``1 / S``; it makes every probability NaN in a row with +inf or of -inf alone."""
  return jnp.where(s.rest == jnp.inf, jnp.nan, 1 / (1 + s.rest))


# --- integer labels ------------------------------------------------------------------------------


class _IntegerResiduals(NamedTuple):
  logits: jax.Array
  index: jax.Array
  normalizer: Normalizer


class _PerRow(NamedTuple):
  nll: jax.Array
  lse: jax.Array


def _at_label(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """The entries of ``x`` at the labels, ``axis`` kept; any entry where a label is invalid."""
  return jnp.take_along_axis(x, jnp.maximum(index, 0), axis=axis)


def _integer_primal(logits: jax.Array, index: jax.Array, axis: int) -> _PerRow:
  return _integer_fwd(logits, index, axis)[0]


def _integer_fwd(
  logits: jax.Array, index: jax.Array, axis: int
) -> tuple[_PerRow, _IntegerResiduals]:
  dtype = arguments.compute_dtype(logits.dtype)
  s = normalizer(logits.astype(dtype), (axis,))
  log_sum = s.log_sum()
  nll = (s.shift - _at_label(logits, index, axis).astype(dtype)) + log_sum
  per_row = _PerRow(jnp.where(index < 0, jnp.nan, nll), s.shift + log_sum)
  return per_row, _IntegerResiduals(logits, index, s)


# Seed step 6: nll = -log a_t and d nll/dz_j = a_j - delta_tj. Seed step 1: d lse/dz_j = a_j.
# Together   z_bar_j = a_j (nll_bar + lse_bar)                for j != t,
#   z_bar_t = a_t lse_bar - (1 - a_t) nll_bar,
# of which the second line is one number per row.
def _integer_bwd(axis: int, residuals: _IntegerResiduals, bars: _PerRow) -> tuple[jax.Array, None]:
  logits, index, s = residuals
  dtype = s.shift.dtype
  nll_bar = jnp.where(index < 0, jnp.nan, bars.nll)
  inverse = _inverse_sum(s)
  e_t = jnp.exp(_at_label(logits, index, axis).astype(dtype) - s.shift)
  at_label = (e_t * bars.lse - ((1 - e_t) + s.rest) * nll_bar) * inverse
  elsewhere = jnp.exp(logits.astype(dtype) - s.shift) * ((nll_bar + bars.lse) * inverse)
  classes = jax.lax.broadcasted_iota(index.dtype, logits.shape, axis)
  return jnp.where(classes == index, at_label, elsewhere).astype(logits.dtype), None


# The same derivative along z_dot, in the form that keeps its digits near a_t = 1:
#   nll_dot = sum_j a_j z_dot_j - z_dot_t = sum_j a_j (z_dot_j - z_dot_t),    lse_dot = nll_dot +
# z_dot_t.
def _integer_tangent(
  axis: int, residuals: _IntegerResiduals, args_dot: tuple[jax.Array, None]
) -> _PerRow:
  logits, index, s = residuals
  dtype = s.shift.dtype
  z_dot = args_dot[0].astype(dtype)
  z_dot_t = jnp.where(index < 0, jnp.nan, _at_label(z_dot, index, axis))
  a = jnp.exp(logits.astype(dtype) - s.shift) * _inverse_sum(s)
  nll_dot = jnp.sum(a * (z_dot - z_dot_t), axis=axis, keepdims=True)
  return _PerRow(nll_dot, nll_dot + z_dot_t)


_integer_rule = jax.custom_vjp(_integer_primal, nondiff_argnums=(2,))
_integer_rule.defvjp(_integer_fwd, _integer_bwd)
_integer_cross_entropy = enable_forward_mode(_integer_rule, tangent=_integer_tangent)


def softmax_cross_entropy_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  r"""Cross-entropy between the softmax of logits and one correct class per row.

  .. math:: L = -\log a_t = \log \sum_k e^{z_k} - z_t, \qquad
    \frac{\partial L}{\partial z_j} = a_j - \delta_{tj}

  A drop-in replacement for the function of this name in `optax.losses`, differentiable in both
  modes. Unlike there, loss and gradient keep all digits where the correct class has probability
  close to 1. No one-hot array is built, and only the inputs and two numbers per row are saved for
  the backward pass.

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32.
    labels: integers ``[*B]`` in ``[0, V)`` of any integer dtype; not differentiable. Their axes may
      broadcast against those of the logits. A label out of range gives a loss and a gradient of NaN
      in its own row.
    axis: the axis of the classes. With a tuple (or None, for all axes) a label is a flat index into
      those axes of the logits, in the order given.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row. Classes where it is False have probability 0 and derivative 0, whatever their logits
      hold; a row without any class has loss 0.

  Returns:
    Losses ``[*B]``, at least 0, in float32 (float64 for float64 logits). The loss is +inf, with
    derivative -1 at the label, where the logit at the label is -inf or masked (0 at a masked
    entry). Rows that contain NaN, +inf at the label, or -inf alone give NaN. Without classes the
    loss is 0.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels not of an integer dtype,
      ``where`` is not boolean, or ``axis`` is not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, or the shapes do not fit.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy
    >>> logits, labels = jnp.array([[2.0, 0.0], [20.0, 0.0]]), jnp.array([1, 0])
    >>> print(cross_entropy(logits, labels))
    [2.1269281e+00 2.0611537e-09]
    >>> print(jax.grad(lambda z: cross_entropy(z, labels).sum())(logits))
    [[ 8.8079703e-01 -8.8079703e-01]
     [-2.0611537e-09  2.0611537e-09]]

  Source: seed step 6; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and
  softmax functions", IMA Journal of Numerical Analysis (2021), for the sum without the largest
  class.
  """
  name = "softmax_cross_entropy_with_integer_labels"
  logits = arguments.as_logits(name, "logits", logits)
  labels = arguments.as_class_indices(name, labels)
  axes = arguments.as_axes(name, "logits", axis, logits.shape)
  mask = None
  if where is not None:
    mask = arguments.as_mask(name, where, "logits", logits.shape, row_axes=axes)
  if len(axes) != 1:
    logits = _merge_axes(logits, axes)
    mask = None if mask is None else _merge_axes(mask, axes)
    axes = (logits.ndim - 1,)
  (class_axis,) = axes
  rows = logits.shape[:class_axis] + logits.shape[class_axis + 1 :]
  rows = arguments.rows_of_labels(name, labels.shape, rows, logits.shape)
  num_classes = logits.shape[class_axis]
  if num_classes == 0:
    return jnp.zeros(rows, arguments.compute_dtype(logits.dtype))

  shape = (*rows[:class_axis], num_classes, *rows[class_axis:])
  if mask is not None:
    logits = fill_masked(logits, mask, axes)
  logits = jnp.broadcast_to(logits, shape)
  in_range = (labels >= 0) & (labels < num_classes)
  index = jnp.broadcast_to(jnp.where(in_range, labels, -1).astype(jnp.int32), rows)
  nll, _ = _integer_cross_entropy(logits, jnp.expand_dims(index, class_axis), class_axis)
  if mask is not None:
    nll = jnp.where(jnp.any(mask, axis=axes, keepdims=True), nll, 0)
  return jnp.squeeze(nll, class_axis)


def _merge_axes(x: jax.Array, axes: Axes) -> jax.Array:
  """``x`` with ``axes``, in that order, made one axis and put last."""
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  rows = x.shape[: x.ndim - len(axes)]
  size = 1
  for n in x.shape[len(rows) :]:
    size *= n
  return x.reshape(*rows, size)


# --- soft labels ---------------------------------------------------------------------------------


class _SoftResiduals(NamedTuple):
  logits: jax.Array
  labels: jax.Array
  normalizer: Normalizer


def _minus_log_softmax(logits: jax.Array, s: Normalizer) -> jax.Array:
  """``-log a``, as a sum of two terms that are at least 0."""
  return (s.shift - logits.astype(s.shift.dtype)) + s.log_sum()


def _soft_primal(logits: jax.Array, labels: jax.Array, axes: Axes) -> _PerRow:
  return _soft_fwd(logits, labels, axes)[0]


def _soft_fwd(logits: jax.Array, labels: jax.Array, axes: Axes) -> tuple[_PerRow, _SoftResiduals]:
  dtype = arguments.compute_dtype(logits.dtype, labels.dtype)
  s = normalizer(logits.astype(dtype), axes)
  t, cost = labels.astype(dtype), _minus_log_softmax(logits, s)
  # By convention 0 log 0 = 0.
  terms = jnp.where((t == 0) & (cost == jnp.inf), 0, t * cost)
  nll = jnp.sum(terms, axis=axes, keepdims=True)
  return _PerRow(nll, s.shift + s.log_sum()), _SoftResiduals(logits, labels, s)


# nll = -sum_k t_k log a_k with any t, not only one that sums to 1. By seed steps 5 and 6
#   d nll/dz_j = a_j sum_k t_k - t_j = a_j (sum_k t_k - t_j) - t_j (1 - a_j),
# whose right side loses nothing where t is one-hot and a_t close to 1. And
#   d nll/dt_j = -log a_j.
def _soft_bwd(axes: Axes, residuals: _SoftResiduals, bars: _PerRow) -> tuple[jax.Array, jax.Array]:
  logits, labels, s = residuals
  dtype = s.shift.dtype
  t = jnp.broadcast_to(labels.astype(dtype), logits.shape)
  others = jnp.sum(t, axis=axes, keepdims=True) - t
  e = jnp.exp(logits.astype(dtype) - s.shift)
  z_bar = e * (others * bars.nll + bars.lse) - t * ((1 - e) + s.rest) * bars.nll
  z_bar = (z_bar * _inverse_sum(s)).astype(logits.dtype)
  cost = _minus_log_softmax(logits, s)
  t_bar = jnp.where((t == 0) & (cost == jnp.inf), 0, cost) * bars.nll
  return z_bar, unbroadcast(t_bar, labels.shape).astype(labels.dtype)


_soft_rule = jax.custom_vjp(_soft_primal, nondiff_argnums=(2,))
_soft_rule.defvjp(_soft_fwd, _soft_bwd)
_soft_cross_entropy = enable_forward_mode(_soft_rule)


def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  r"""Cross-entropy between the softmax of logits and a distribution over the classes.

  .. math:: L = -\sum_k t_k \log a_k, \qquad
    \frac{\partial L}{\partial z_j} = a_j \sum_k t_k - t_j, \qquad
    \frac{\partial L}{\partial t_j} = -\log a_j

  A drop-in replacement for the function of this name in `optax.losses`, differentiable in both
  modes and in both arguments. Unlike there, loss and gradient keep all digits where the softmax is
  close to a one-hot label. Only the inputs and two numbers per row are saved for the backward pass.

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32.
    labels: array ``[*B, V]`` of a real dtype, differentiable if floating: the weight t of each
      class, not necessarily summing to 1. Logits and labels broadcast against each other.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row. Classes where it is False take no part: they have probability 0, their label is left out
      of the sum, and their derivatives are 0, whatever they hold. A row without any class has loss
      0.

  Returns:
    Losses ``[*B]`` in float32 (float64 where an argument has it). A class whose logit is -inf adds
    +inf, or 0 where its label is exactly 0, in which case its derivatives are 0 too. Rows that
    contain NaN or +inf, or logits of -inf alone, give NaN.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels not of a real dtype, ``where``
      is not boolean, or ``axis`` is not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, or the shapes do not fit.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy
    >>> logits, labels = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.5, 0.5, 0.0])
    >>> with jnp.printoptions(precision=4):
    ...   print(softmax_cross_entropy(logits, labels))
    ...   print(jax.grad(softmax_cross_entropy)(logits, labels))
    1.2395449
    [ 0.287  -0.3935  0.1065]

  Source: seed step 6; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and
  softmax functions", IMA Journal of Numerical Analysis (2021), for the sum without the largest
  class.
  """
  name = "softmax_cross_entropy"
  logits = arguments.as_logits(name, "logits", logits)
  labels = arguments.as_probabilities(name, labels)
  axes = arguments.as_axes(name, "logits", axis, logits.shape)
  shape = arguments.common_shape(name, "logits", logits.shape, "labels", labels.shape)
  axes = tuple(a + len(shape) - logits.ndim for a in axes)
  logits = jnp.broadcast_to(logits, shape)
  labels = labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape)
  if where is not None:
    mask = arguments.as_mask(name, where, "logits", shape, row_axes=axes)
    logits = fill_masked(logits, mask, axes)
    labels = jnp.where(mask, labels, jnp.zeros((), labels.dtype))
  nll, _ = _soft_cross_entropy(logits, labels, axes)
  return jnp.squeeze(nll, axes)
