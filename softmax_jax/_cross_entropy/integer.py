"""Cross-entropy with one class index per row."""

from __future__ import annotations

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from softmax_jax import _devices as devices
from softmax_jax._arguments import Arguments, Axis, compute_dtype
from softmax_jax._arrays import broadcast
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.integer_rule import Static, integer_cross_entropy
from softmax_jax._cross_entropy.label import IGNORED, INVALID, class_index
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._cross_entropy.per_row import PerRow
from softmax_jax._products import scale_or_zero
from softmax_jax._rows import Axes, AxisName, Rows


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
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
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
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
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
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
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
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
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

  .. math:: L = s \, \Bigl( (1 - \alpha)\, w_t\, (-\log a_t)
    + \frac{\alpha}{K} \sum_k w_k\, (-\log a_k)
    + \lambda \bigl(\log \sum_k e^{z_k}\bigr)^2 \Bigr)

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
    sample_weights: optional weights s ``[*B]`` of the rows, of any sign, differentiable. A row of
      weight 0 does not count, whatever its label and its logits (loss and gradient are 0); the
      derivative by that weight is the loss without it, or 0 if that is not finite.
    ignore_index: optional integer; rows with this label do not count: their loss is 0 and so is
      their gradient, whatever their logits hold.
    ignore_invalid: whether rows whose label is out of range do not count either, a static bool.
    reduction: "none" for one loss per row, "sum", or "mean": the sum divided by the sum of the
      weights ``s w_t`` of the rows that count (by their number without weights), or 0 where that
      is 0.
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
      z-loss adds, the sum of the weights, all differentiable like the loss, and the number of right
      predictions too.

  Returns:
    Losses ``[*B]``, or one number if reduced, in float32 (float64 for float64 logits). The loss is
    +inf, with derivative -1 at the label, where the logit at the label is -inf or masked (0 at a
    masked entry). Rows that contain NaN, +inf at the label, or -inf alone give NaN. Without classes
    the loss is 0. What has weight 0 adds nothing, even where it is infinite.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels or ``ignore_index`` not of an
      integer dtype, ``where`` is not boolean, a coefficient not a real scalar, ``axis`` not a
      static int, tuple of ints or None, or ``return_aux`` or ``ignore_invalid`` not static bools.
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
  ignore_invalid = arguments.as_flag("ignore_invalid", ignore_invalid)
  weights = None
  if class_weights is not None:
    class_shape = tuple(logits.shape[a] for a in axes)
    weights = arguments.as_class_weights(class_weights, class_shape).astype(dtype)
    if len(axes) != 1 and (sharding := devices.explicit_sharding(weights)):
      weights = devices.put(weights, sharding, *[None] * weights.ndim)
    weights = weights.ravel()
  rows = tuple(size for a, size in enumerate(logits.shape) if a not in axes)
  rows = arguments.rows_of_labels(labels.shape, rows, logits.shape)
  if sample_weights is not None:
    sample_weights = arguments.as_sample_weights(sample_weights, rows).astype(dtype)
  sizes = iter(rows)
  shape = tuple(size if a in axes else next(sizes) for a, size in enumerate(logits.shape))
  mask = None
  if where is not None:
    mask = arguments.as_class_mask(where, logits.shape, labels.shape, shape, axes)
  if axis_name is not None:
    arguments.check_one_class_axis(axes)
    same = {"labels": labels}
    if sample_weights is not None:
      same["sample_weights"] = sample_weights
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
  index = class_index(labels, ignore_index, ignore_invalid, num_classes)
  index = jnp.expand_dims(jnp.broadcast_to(index, rows), class_axis)
  if sample_weights is not None:
    sample_weights = jnp.expand_dims(sample_weights, class_axis)
  logits = broadcast(logits, (*rows[:class_axis], size, *rows[class_axis:]))
  if weights is not None:
    weights = jnp.expand_dims(weights, [a for a in range(logits.ndim) if a != class_axis])
  arrays = logits, index, mask, weights, sample_weights
  logits, index, mask, weights, sample_weights = devices.align(*arrays, without=axis_name)
  if mask is not None and mask.shape[class_axis] != size:  # one value per row: index can hold it
    index, mask = jnp.where(mask, index, IGNORED), None
  weightless = None
  if sample_weights is not None:
    # A row of weight 0 whose loss is no number does not count. One with a finite loss does: that is
    # the derivative by the weight.
    weightless = sample_weights == 0
    index = jnp.where(weightless & (index == INVALID), IGNORED, index)
  # Over the devices that classes are spread over, labels stay the same.
  logits, mask, weights = devices.varying_alike(logits, mask, weights)

  if num_classes == 0:
    per_row = PerRow(*[jnp.zeros(index.shape, dtype)] * 5)
  else:
    static = Static(
      rows=classes,
      num_classes=num_classes,
      smoothed=chosen.label_smoothing is not None,
      ignores=ignore_invalid or any(x is not None for x in (ignore_index, where, sample_weights)),
    )
    per_row = integer_cross_entropy(logits, index, mask, weights, weightless, static)
    if weights is not None:
      per_row = per_row._replace(nll=scale_or_zero(per_row.weight, per_row.nll))

  squeezed = jax.tree.map(lambda x: jnp.squeeze(x, class_axis), (per_row, sample_weights))
  loss, aux = options.combine(chosen, *squeezed)
  return (loss, aux) if return_aux else loss


def _merge_axes(x: jax.Array, axes: Axes) -> jax.Array:
  """``x`` with ``axes``, in that order, made one axis and put last."""
  x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
  rows = x.shape[: x.ndim - len(axes)]
  return x.reshape(*rows, math.prod(x.shape[len(rows) :]))
