"""Cross-entropy with one class index per row."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from softmax_jax import _devices as devices
from softmax_jax._arguments import Arguments, Axis, compute_dtype
from softmax_jax._arrays import batched_like, broadcast, compiled, masked, unbroadcast
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.label import (
  IGNORED,
  Label,
  bar_by_row,
  by_row,
  class_index,
  is_label,
  stop_gradient_unless,
  weight_of_label,
)
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._cross_entropy.per_row import PerRow, inverse_sum, minus_log_softmax
from softmax_jax._cross_entropy.uniform import UniformSums, uniform_label
from softmax_jax._exponentials import entries
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, local_normalizer
from softmax_jax._products import cost_of, linear_scale_or_zero, scale_or_zero
from softmax_jax._row_sums import Weights
from softmax_jax._rows import Axes, AxisName, Rows


class Static(NamedTuple):
  """What is known while tracing.

  Attributes:
    rows: the rows of the logits, along one class axis.
    num_classes: the number of classes on all devices.
    smoothed: whether the loss against the uniform label is needed.
    ignores: whether there may be rows that do not count.
  """

  rows: Rows
  num_classes: int
  smoothed: bool
  ignores: bool


class Residuals(NamedTuple):
  logits: jax.Array
  class_index: jax.Array  # of the label of each row, or INVALID or IGNORED
  mask: jax.Array | None
  weights: jax.Array | None
  normalizer: Normalizer
  uniform: UniformSums | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rule(
  logits: jax.Array,
  index: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  static: Static,
) -> PerRow:
  return fwd(logits, index, mask, weights, static)[0]


def fwd(
  logits: jax.Array,
  index: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  static: Static,
) -> tuple[PerRow, Residuals]:
  rows, (axis,) = static.rows, static.rows.axes
  dtype = compute_dtype(logits.dtype)
  x = logits  # [*B, V]
  if rows.axis_name is not None:
    # The sums over devices share one array. Their cotangents of 0 reach the exponentials there, and
    # would meet NaN.
    x = _zero_if_ignored(logits, index, static)
  x = _stop_gradient_if_ignored(x, index, static)
  smoothing = ()
  if static.smoothed:
    smoothing = (Weights(None, weights, index != IGNORED if static.ignores else None),)
  local, costs = local_normalizer(x, mask, smoothing, rows, dtype)
  label = Label.of(index, logits.shape[axis], rows)
  z_t = label.take_entry(x, mask, local.any, dtype, axis)  # [*B, 1], as all that follows
  w_t = None
  if weights is not None:
    w_t = label.take_weight(weights, axis, logits)
  uniform = None
  if static.smoothed:
    uniform = UniformSums.of(costs[0].total, weights, mask, logits.shape, dtype, rows)
  s, (z_t, w_t, uniform) = local.over_devices((z_t, w_t, uniform), rows)
  z = entries(x, mask, s.any, dtype)
  if s.any is not None:  # a row without any class does not count
    index = jnp.where(s.any, index, IGNORED)
  s = s._replace(
    shift=_stop_gradient_if_ignored(s.shift, index, static),
    rest=_zero_if_ignored(s.rest, index, static),
  )
  s = differentiable(s, z, rows)

  nll = by_row(index, s.log_sum() - s.minus_shift(z_t))  # -log a_t = log S - (z_t - shift)
  lse = jnp.where(index == IGNORED, 0, s.shift + s.log_sum())  # shift + log S
  weight = jnp.where(index == IGNORED, 0, jnp.ones_like(nll) if w_t is None else w_t)
  uniform_loss = None
  if uniform is not None:
    uniform_loss = by_row(index, uniform.loss(s, static.num_classes))  # -sum_k u_k log a_k
    uniform = uniform._replace(cost=None)
  per_row = PerRow(nll, lse, uniform_loss, batched_like(weight, lse))
  return per_row, Residuals(logits, index, mask, weights, s, uniform)


# Seed step 6: nll = -log a_t, d nll/dz_j = a_j - delta_tj. Seed step 1: d lse/dz_j = a_j. And with
# the uniform label u: uniform = -sum_k u_k log a_k, d uniform/dz_j = a_j sum_k u_k - u_j. Together,
# with g = lse_bar + uniform_bar sum_k u_k,
#   z_bar_j = a_j (g + nll_bar) - delta_tj nll_bar - u_j uniform_bar.
# By the weights, d uniform/du_j = -log a_j and d weight/dw_j = delta_tj.
def bwd(
  static: Static, residuals: Residuals, bars: PerRow
) -> tuple[jax.Array, None, None, jax.Array | None]:
  rows, (axis,) = static.rows, static.rows.axes
  logits, index, mask, weights, s, uniform = residuals
  z = entries(logits, mask, s.any, s.shift.dtype)  # [*B, V]
  z = _stop_gradient_if_ignored(z, index, static)
  s = s._replace(shift=_stop_gradient_if_ignored(s.shift, index, static))
  s = differentiable(s, z, rows)
  bars = bars._replace(
    nll=bar_by_row(index, bars.nll),
    uniform=None if uniform is None else bar_by_row(index, bars.uniform),
  )

  g, u = bars.lse, None
  if uniform is not None:
    u = uniform_label(weights, mask, uniform.divisor(static.num_classes), z)
    g = g + bars.uniform * uniform.label_sum(static.num_classes)  # + uniform_bar sum_k u_k
  # z may be NaN in a row that does not count. The select keeps that NaN out of derivatives by g.
  g = jnp.where(index == IGNORED, jnp.zeros_like(g), g)
  label = Label.of(index, z.shape[axis], rows)
  z_t = label.take_entry(logits, mask, s.any, z.dtype, axis, elsewhere=-jnp.inf)
  z_t = _stop_gradient_if_ignored(z_t, index, static)
  z_bar = logits_bar(z, z_t, index, s, g, bars.nll, rows)  # a_j (g + nll_bar) - delta_tj nll_bar
  if u is not None:
    z_bar = z_bar - u * bars.uniform  # - u_j uniform_bar
  # What does not count may hold anything. Its derivative is 0.
  z_bar = masked(_zero_if_ignored(z_bar, index, static), mask, 0).astype(logits.dtype)
  return z_bar, None, None, _weights_bar(z, s, u, static, residuals, bars)


# a_j (g + nll_bar) - delta_tj nll_bar, where the term of the label would cancel when a_t is close
# to 1:
#   a_t (g + nll_bar) - nll_bar = a_t g - (1 - a_t) nll_bar,   1 - a_t = ((1 - e_t) + rest) / S.
def logits_bar(
  z: jax.Array,
  z_t: jax.Array,
  index: jax.Array,
  s: Normalizer,
  g: jax.Array,
  nll_bar: jax.Array,
  rows: Rows,
) -> jax.Array:
  """The cotangent of the logits without that of the uniform label; z_t is the z of the label."""
  inverse = inverse_sum(s)
  e_t = s.exp(z_t)
  # Exactly 1 for the largest entry, however XLA rounds it, but with the derivative of e_t.
  e_t += lax.stop_gradient(jnp.where(s.minus_shift(z_t) == 0, 1 - e_t, jnp.zeros_like(e_t)))
  # a_t g - (1 - a_t) nll_bar
  at_label = (e_t * inverse) * g - (((1 - e_t) + s.rest) * inverse) * nll_bar
  elsewhere = s.exp(z) * ((g + nll_bar) * inverse)  # a_j (g + nll_bar)
  return jnp.where(is_label(z, index, rows), at_label, elsewhere)


def _weights_bar(
  z: jax.Array,
  s: Normalizer,
  u: jax.Array | None,
  static: Static,
  residuals: Residuals,
  bars: PerRow,
) -> jax.Array | None:
  """The cotangent of the class weights, by the weight of the label and by the uniform label."""
  _, index, mask, weights, _, uniform = residuals
  if weights is None:
    return None
  (axis,) = static.rows.axes
  label = Label.of(index, z.shape[axis], static.rows)
  weight_bar = jnp.where(index == IGNORED, 0, bars.weight)
  weight_bar, _ = devices.varying_alike(weight_bar, weights)
  # delta_tj weight_bar
  (weights_bar,) = jax.linear_transpose(lambda w: label.take_weight(w, axis, z), weights)(
    weight_bar
  )
  if u is None or uniform is None:
    return weights_bar
  # -log a_j uniform_bar, divided as the weights are in u
  u_bar = linear_scale_or_zero(bars.uniform, cost_of(u, minus_log_softmax(z, s)))
  u_bar = masked(_zero_if_ignored(u_bar, index, static), mask, 0)
  u_bar = u_bar / uniform.divisor(static.num_classes)
  return weights_bar + unbroadcast(u_bar, weights.shape)


# The same derivative along z_dot and weights_dot, in the form that keeps its digits near a_t = 1:
#   nll_dot = sum_j a_j z_dot_j - z_dot_t = sum_{j != t} a_j (z_dot_j - z_dot_t),
#   lse_dot = sum_j a_j z_dot_j,
#   uniform_dot = lse_dot sum_k u_k - sum_k u_k z_dot_k - sum_k u_dot_k log a_k.
def tangent(static: Static, residuals: Residuals, args_dot: tuple[Any, ...]) -> PerRow:
  rows, (axis,) = static.rows, static.rows.axes
  logits, index, mask, weights, s, uniform = residuals
  logits_dot, _, _, weights_dot = args_dot
  dtype = s.shift.dtype
  z = _zero_if_ignored(entries(logits, mask, s.any, dtype), index, static)
  s = s._replace(
    shift=_zero_if_ignored(s.shift, index, static), rest=_zero_if_ignored(s.rest, index, static)
  )
  s = differentiable(s, z, rows)
  z_dot = nll_dot = lse_dot = uniform_dot = weight_dot = None
  if logits_dot is not None:
    z_dot = masked(logits_dot.astype(dtype), mask, 0)
    label = Label.of(index, z.shape[axis], rows)
    z_dot_t = rows.sum_over_devices(label.take(z_dot, axis))
    a = s.exp(z) * inverse_sum(s)
    others = jnp.where(is_label(z, index, rows), jnp.zeros_like(a), a)
    terms = others * (z_dot - z_dot_t), a * z_dot  # a_j (z_dot_j - z_dot_t), a_j z_dot_j
    nll_dot, lse_dot = rows.sum_over_devices([rows.local_sum(term) for term in terms])
  if weights_dot is not None:
    weight_dot = weight_of_label(weights_dot, index, rows, z)
    weight_dot = jnp.where(index == IGNORED, 0, weight_dot)
  if uniform is not None:
    divisor = uniform.divisor(static.num_classes)
    u = uniform_label(weights, mask, divisor, z)
    terms_dot = jnp.zeros((), dtype)
    if z_dot is not None:
      terms_dot -= u * z_dot  # - u_k z_dot_k
    if weights_dot is not None:
      u_dot = uniform_label(weights_dot, mask, divisor, z)
      cost = cost_of(u, minus_log_softmax(z, s))
      terms_dot += linear_scale_or_zero(u_dot, cost)  # - u_dot_k log a_k
    uniform_dot = rows.sum(jnp.broadcast_to(terms_dot, z.shape))
    if lse_dot is not None:
      uniform_dot += lse_dot * uniform.label_sum(static.num_classes)  # lse_dot sum_k u_k
    uniform_dot = by_row(index, uniform_dot)
  if nll_dot is not None and lse_dot is not None:
    nll_dot, lse_dot = by_row(index, nll_dot), jnp.where(index == IGNORED, 0, lse_dot)
  return PerRow(nll_dot, lse_dot, uniform_dot, weight_dot)


_rule.defvjp(fwd, bwd)
_integer_cross_entropy = compiled(enable_forward_mode(_rule, tangent=tangent), static_argnums=4)


def _zero_if_ignored(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  return masked(x, index != IGNORED, 0) if static.ignores else x


def _stop_gradient_if_ignored(x: jax.Array, index: jax.Array, static: Static) -> jax.Array:
  return stop_gradient_unless(index != IGNORED, x) if static.ignores else x


@overload
def softmax_cross_entropy_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: Literal[False] = False,
) -> jax.Array: ...


@overload
def softmax_cross_entropy_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: Literal[True],
) -> tuple[jax.Array, CrossEntropyAux]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]: ...


def softmax_cross_entropy_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]:
  r"""Cross-entropy between the softmax of logits and one correct class per row.

  .. math:: L = -\log a_t = \log \sum_k e^{z_k} - z_t, \qquad
    \frac{\partial L}{\partial z_j} = a_j - \delta_{tj}

  A drop-in replacement for the function of this name in `optax.losses`, differentiable in both
  modes. Unlike there, loss and gradient keep all digits where the correct class has probability
  close to 1. No one-hot array is built, and only the inputs and a few scalars per row are saved for
  the backward pass, whatever the options. With all options, the loss of a row is

  .. math:: L = (1 - \alpha)\, w_t\, (-\log a_t) + \frac{\alpha}{K} \sum_k w_k\, (-\log a_k)
    + \lambda \Bigl(\log \sum_k e^{z_k}\Bigr)^2

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32, narrower ones are refused.
    labels: integers ``[*B]`` in ``[0, V)`` of any integer dtype; not differentiable. Their axes may
      broadcast against those of the logits. A label out of range gives a loss of NaN and, in
      its own row, a gradient of NaN in the logits (of 0, if a select discards that loss; in the
      options it is NaN even then).
    axis: the axis of the classes. With a tuple (or None, for all axes) a label is a flat index into
      those axes of the logits, in the order given.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row, of the shape of the losses. Classes where it is False have probability 0 and derivative
      0, whatever their logits hold; a row without any class does not count: its loss is 0.
    label_smoothing: the share alpha of the label that is spread evenly over the K unmasked classes;
      a scalar in [0, 1], differentiable.
    z_loss: the coefficient lambda of the squared log-normalizer, which keeps that near 0; a scalar,
      differentiable.
    class_weights: optional weights w ``[V]`` of the classes (of the shape of the class axes, where
      ``axis`` is a tuple), differentiable.
    ignore_index: optional integer; rows with this label do not count: their loss is 0 and so is
      their gradient, whatever their logits hold.
    reduction: "none" for one loss per row, "sum", or "mean": the sum divided by the sum of the
      weights ``w_t`` of the rows that count (by their number without class weights), or 0 where
      that is 0.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      classes are spread: each device holds a slice of the logits, of ``where`` and of
      ``class_weights``, all slices of one size. Labels are the same on all of these devices and
      count the classes of all of them; the loss is the same too. Several names must be in the order
      of the `jax.sharding.PartitionSpec` that spreads the classes, ``("a", "b")`` for ``P(("a",
      "b"))``: labels count in that order. In another order the loss is that of other classes; JAX
      does not tell a function how its arguments are spread, so that this is no error. One reduction
      of one or two scalars per row and one of three to seven make the loss, and none its gradient.
      Where the number of classes is no multiple of that of the devices, pad the logits and leave
      out the padding with ``where``.
    return_aux: whether to return a `CrossEntropyAux` with the log-normalizer, the part that the
      z-loss adds and the sum of the weights too. They are differentiable like the loss.

  Returns:
    Losses ``[*B]``, or one number if reduced, in float32 (float64 for float64 logits). The loss is
    +inf, with derivative -1 at the label, where the logit at the label is -inf or masked (0 at a
    masked entry). Rows that contain NaN, +inf at the label, or -inf alone give NaN. Without classes
    the loss is 0. What has weight 0 adds nothing, even where it is infinite.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels or ``ignore_index`` not of an
      integer dtype, ``where`` is not boolean, a coefficient not a real scalar, ``axis`` not a
      static int, tuple of ints or None, or ``return_aux`` not a static bool.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not fit, ``reduction``
      is unknown, ``label_smoothing`` is known while tracing and outside [0, 1], or ``axis_name`` is
      no axis of a surrounding `jax.shard_map` with ``check_vma=True`` over which the logits, but
      not the labels, are spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy
    >>> logits, labels = jnp.array([[2.0, 0.0], [20.0, 0.0]]), jnp.array([1, 0])
    >>> with jnp.printoptions(precision=4):
    ...   print(cross_entropy(logits, labels))
    ...   print(jax.grad(lambda z: cross_entropy(z, labels).sum())(logits))
    [2.1269e+00 2.0612e-09]
    [[ 8.8080e-01 -8.8080e-01]
     [-2.0612e-09  2.0612e-09]]
    >>> loss, aux = cross_entropy(
    ...   logits, labels, label_smoothing=0.1, z_loss=1e-4, reduction="mean", return_aux=True
    ... )
    >>> print(f"{loss:.2f}, of which {aux.z_loss:.2f} z-loss")
    1.53, of which 0.02 z-loss

  Source: seed step 6; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and
  softmax functions", IMA Journal of Numerical Analysis (2021), for the sum without the largest
  class; Szegedy et al. (2016) for label smoothing; t5x for the z-loss.
  """
  arguments = Arguments("softmax_cross_entropy_with_integer_labels")
  logits = arguments.as_logits("logits", logits)
  dtype = compute_dtype(logits.dtype)
  labels = arguments.as_class_indices(labels)
  axes = arguments.as_axes("logits", axis, logits.shape)
  chosen = options.checked(arguments, dtype, label_smoothing, z_loss, reduction)
  return_aux = arguments.as_flag("return_aux", return_aux)
  weights = None
  if class_weights is not None:
    class_shape = tuple(logits.shape[a] for a in axes)
    weights = arguments.as_class_weights(class_weights, class_shape).astype(dtype)
    if len(axes) != 1 and (sharding := devices.explicit_sharding(weights)):
      weights = devices.put(weights, sharding, *[None] * weights.ndim)
    weights = weights.ravel()
  rows = tuple(size for a, size in enumerate(logits.shape) if a not in axes)
  rows = arguments.rows_of_labels(labels.shape, rows, logits.shape)
  sizes = iter(rows)
  shape = tuple(size if a in axes else next(sizes) for a, size in enumerate(logits.shape))
  mask = None
  if where is not None:
    mask = arguments.as_class_mask(where, logits.shape, labels.shape, shape, axes)
  if axis_name is not None:
    arguments.check_one_class_axis(axes)
    same = {"labels": labels}
    if mask is not None and mask.shape[axes[0]] != logits.shape[axes[0]]:
      same["where"] = mask
    arguments.check_axis_name(axis_name, "logits", logits, **same)
  if len(axes) != 1:
    spec = jax.typeof(logits).sharding.spec
    arguments.check_merged(axes, [spec[a] for a in axes if logits.shape[a] != 1])
    if mask is not None:
      mask = jnp.broadcast_to(mask, shape)
      if sharding := devices.explicit_sharding(logits) or devices.explicit_sharding(mask):
        mask = devices.put(mask, sharding, *spec)
      mask = _merge_axes(mask, axes)
    logits = _merge_axes(logits, axes)
    axes = (logits.ndim - 1,)

  (class_axis,) = axes
  size = logits.shape[class_axis]
  classes = Rows((class_axis,), axis_name)
  num_classes = size * classes.num_devices()
  if ignore_index is not None:
    ignore_index = arguments.as_ignore_index(ignore_index, labels.dtype)
  index = class_index(labels, ignore_index, num_classes)
  index = jnp.expand_dims(jnp.broadcast_to(index, rows), class_axis)
  logits = broadcast(logits, (*rows[:class_axis], size, *rows[class_axis:]))
  if weights is not None:
    weights = jnp.expand_dims(weights, [a for a in range(logits.ndim) if a != class_axis])
  arrays = logits, index, mask, weights
  logits, index, mask, weights = devices.align(*arrays, without=axis_name)
  if mask is not None and mask.shape[class_axis] != size:  # one value per row: index can hold it
    index, mask = jnp.where(mask, index, IGNORED), None
  # Over the devices that classes are spread over, labels stay the same.
  logits, mask, weights = devices.varying_alike(logits, mask, weights)

  if num_classes == 0:
    per_row = PerRow(*[jnp.zeros(index.shape, dtype)] * 4)
  else:
    static = Static(
      rows=classes,
      num_classes=num_classes,
      smoothed=chosen.label_smoothing is not None,
      ignores=ignore_index is not None or where is not None,
    )
    per_row = _integer_cross_entropy(logits, index, mask, weights, static)
    if weights is not None:
      per_row = per_row._replace(nll=scale_or_zero(per_row.weight, per_row.nll))

  per_row = jax.tree.map(lambda x: jnp.squeeze(x, class_axis), per_row)
  loss, aux = options.combine(chosen, per_row)
  return (loss, aux) if return_aux else loss


def _merge_axes(x: jax.Array, axes: Axes) -> jax.Array:
  """``x`` with ``axes``, in that order, made one axis and put last."""
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  rows = x.shape[: x.ndim - len(axes)]
  return x.reshape(*rows, math.prod(x.shape[len(rows) :]))
