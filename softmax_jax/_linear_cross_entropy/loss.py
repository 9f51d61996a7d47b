"""The public function: checks, options, and the choice of the rule."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from softmax_jax import _devices as devices
from softmax_jax._arguments import cast, compute_dtype
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.label import IGNORED, INVALID, class_index, weight_of_label
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._cross_entropy.per_row import PerRow
from softmax_jax._linear_cross_entropy import rules
from softmax_jax._linear_cross_entropy.arguments import LinearArguments
from softmax_jax._linear_cross_entropy.gradients import Static
from softmax_jax._linear_cross_entropy.mesh import Arrays, on_mesh
from softmax_jax._linear_cross_entropy.projection import Inputs, Projection
from softmax_jax._products import scale_or_zero
from softmax_jax._rows import AxisName, Rows

T = TypeVar("T")


@overload
def linear_softmax_cross_entropy(
  x: ArrayLike,
  weight: ArrayLike,
  labels: ArrayLike,
  *,
  bias: ArrayLike | None = None,
  vocab_axis: int = -1,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  logit_scale: ArrayLike | None = None,
  softcap: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  num_classes: int | None = None,
  axis_name: AxisName | None = None,
  logits_sharding: PartitionSpec | NamedSharding | None = None,
  return_aux: Literal[False] = False,
) -> jax.Array: ...


@overload
def linear_softmax_cross_entropy(
  x: ArrayLike,
  weight: ArrayLike,
  labels: ArrayLike,
  *,
  bias: ArrayLike | None = None,
  vocab_axis: int = -1,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  logit_scale: ArrayLike | None = None,
  softcap: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  num_classes: int | None = None,
  axis_name: AxisName | None = None,
  logits_sharding: PartitionSpec | NamedSharding | None = None,
  return_aux: Literal[True],
) -> tuple[jax.Array, CrossEntropyAux]: ...


@overload
def linear_softmax_cross_entropy(
  x: ArrayLike,
  weight: ArrayLike,
  labels: ArrayLike,
  *,
  bias: ArrayLike | None = None,
  vocab_axis: int = -1,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  logit_scale: ArrayLike | None = None,
  softcap: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  num_classes: int | None = None,
  axis_name: AxisName | None = None,
  logits_sharding: PartitionSpec | NamedSharding | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]: ...


def linear_softmax_cross_entropy(
  x: ArrayLike,
  weight: ArrayLike,
  labels: ArrayLike,
  *,
  bias: ArrayLike | None = None,
  vocab_axis: int = -1,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  logit_scale: ArrayLike | None = None,
  softcap: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  num_classes: int | None = None,
  axis_name: AxisName | None = None,
  logits_sharding: PartitionSpec | NamedSharding | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]:
  r"""Cross-entropy of a linear layer with one correct class per token; the logits are never held.

  .. math:: y = k \, (x W + b), \qquad z = c \tanh(y / c), \qquad L = -\log a_t, \quad
    a = \mathrm{softmax}(z)

  The same loss as ``softmax_cross_entropy_with_integer_labels(x @ weight + bias, labels)``, value
  and derivatives, but the logits ``[T, V]`` of all T tokens never exist: they are formed for
  ``chunk_size`` tokens at a time, and so is everything of their size, in reverse and in forward
  mode and in Hessian-vector products. For a reduced loss that is differentiated, the gradients are
  formed together with the loss: three matrix products, the sum of the weight's gradient in
  float32. A loss that is not differentiated costs one product, and an argument that is not
  differentiated (a frozen weight, say) none. With ``reduction="none"`` the logits are computed a
  second time in the backward pass: four products.

  .. math:: \frac{\partial L}{\partial y} = (a - t) \odot (1 - \tanh^2(y / c)), \qquad
    \bar x = k \, \bar y W^T, \quad \bar W = k \, x^T \bar y

  Args:
    x: features ``[*B, H]`` of a floating dtype of at least 16 bits, differentiable.
    weight: ``[H, V]``, or ``[V, H]`` with ``vocab_axis=0``, of such a dtype, differentiable. It
      is used as it is stored, without a transposed copy. Where the dtypes of x and weight differ,
      both are promoted to the common one first.
    labels: integers ``[*B]`` in ``[0, V)`` of any integer dtype; not differentiable. A label out of
      range gives a loss of NaN, a gradient of NaN in its own row of x, and in all that the tokens
      share (weight, bias, class_weights, softcap).
    bias: optional, ``[V]``, differentiable.
    vocab_axis: the axis of the classes in ``weight``, a static int.
    label_smoothing: the share alpha of the label that is spread evenly over all classes; a scalar
      in [0, 1], differentiable.
    z_loss: the coefficient of the squared log-normalizer; a scalar, differentiable.
    class_weights: optional weights ``[V]`` of the classes, differentiable.
    sample_weights: optional weights ``[*B]`` of the tokens, by which their losses are multiplied,
      of any sign, differentiable: loss masks, advantages. A token of weight 0 does not count,
      whatever its label and its features (loss and gradient are 0, unless features that are finite
      have logits that are not); the derivative by that weight is the loss without it, or 0 if the
      label is out of range or a feature not finite.
    logit_scale: optional factor k of the logits before the softcap, a positive scalar such as the
      inverse of a temperature, differentiable; it may be traced.
    softcap: optional bound c of the logits, a positive scalar, differentiable; it may be traced.
    ignore_index: optional integer; tokens with this label do not count: their loss and their part
      of every gradient are 0, whatever their features hold.
    ignore_invalid: whether tokens whose label is out of range do not count either, a static bool.
    reduction: "mean" (the sum divided by the sum over the tokens that count of the sample weight
      times the class weight of the label, by their number without weights; 0 where that is 0),
      "sum", or "none" for one loss per token.
    chunk_size: the number of tokens whose logits are held at a time, a static int; the last chunk
      may be smaller. None stands for as many as have logits of 128 MiB, or for H / 4 if that is
      more; on a GPU or TPU for as many as have 512 MiB, or for H if that is more, but for no more
      than T / 4 beyond 128 MiB; or for somewhat fewer (half as many at least) that divide T. Beside
      its arguments and results, the loss with its gradients takes the bytes of the logits of a
      chunk in float32 (on a CPU or GPU twice those with a softcap; on a TPU 1.5 times those
      more), whatever T, and on a CPU 12 MiB or an eighth of those of the weight. Where the
      gradients are of sixteen bits, add the bytes of their sums in float32. A Hessian-vector
      product takes about six times the logits of a chunk of a CPU. `jax.export` with a symbolic
      number of tokens needs a size that divides it: 512 for ``symbolic_shape("512*n")``. With a
      symbolic number of classes it needs one too, and the bytes of the logits of a chunk and of the
      weight once more.
    num_classes: how many columns of the weight are classes, a static int; None stands for all. The
      columns after them are padding: they take no part, and their gradients are 0. They have to
      hold finite numbers.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      classes are spread: each device holds a slice of the weight, of the bias and of
      ``class_weights``, all slices of one size (pad them and pass ``num_classes`` where it does not
      divide). x and the labels, which count the classes of all devices, are the same on all of
      them, and so is the loss. Several names must be in the order of the
      `jax.sharding.PartitionSpec` that spreads the classes, ``("a", "b")`` for ``P(("a", "b"))``:
      labels and ``num_classes`` count in that order. In another order the loss is that of other
      classes; JAX does not tell a function how its arguments are spread, so that this is no error.
      For each chunk it takes one reduction of one number per token and one of three to six; class
      weights take one more, and the gradient one of x's cotangent.
    logits_sharding: outside of `jax.shard_map`, how logits ``[*B, V]`` would be spread over a mesh,
      a `jax.sharding.NamedSharding`, or a `jax.sharding.PartitionSpec` for the mesh of
      `jax.set_mesh`. Each device then computes the loss of its tokens and classes from all of their
      features. The axes of labels must divide; classes that do not are padded. None stands for what
      the arguments say: their types with explicit axes of the mesh, and with automatic axes XLA,
      which on a TPU adds up the gradient of the weight once for each chunk where tokens are spread.
    return_aux: whether to return a `CrossEntropyAux` with the log-normalizer of each token, the
      part that the z-loss adds, the sum of the weights, all differentiable like the loss, and the
      number of right predictions too. They take no further product, unless one that depends on the
      logits is differentiated: then the gradients are those of ``reduction="none"``, with four.

  Returns:
    The loss, one number or ``[*B]``, in float32 (float64 where an argument has it). The products
    are formed in the dtype of x and weight and summed in float32; of sixteen-bit arguments the
    logits are not rounded to sixteen bits, but their cotangents are, once, before the products that
    give the gradients. Gradients come back in the dtypes of their arguments.

  Raises:
    TypeError: if x, weight or bias are not of a floating dtype, the labels or ``ignore_index`` not
      of an integer dtype, a coefficient not a real scalar, ``vocab_axis``, ``chunk_size`` or
      ``num_classes`` not static ints, ``ignore_invalid`` or ``return_aux`` not static bools, or
      ``logits_sharding`` no sharding.
    ValueError: if the shapes do not fit, ``reduction`` is unknown, ``chunk_size`` is not positive
      or does not divide a symbolic number of tokens or is missing where the number of classes is
      symbolic, a coefficient is known while tracing and out of its range, ``axis_name`` is no axis
      of a surrounding `jax.shard_map` with ``check_vma=True`` over which the weight, but not x and
      the labels, is spread, or ``logits_sharding`` is given inside one, without a mesh, or does not
      divide the labels.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import linear_softmax_cross_entropy
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> weight = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    >>> labels = jnp.array([0, 1])
    >>> loss, gradient = jax.value_and_grad(linear_softmax_cross_entropy)(x, weight, labels)
    >>> print(f"{loss:.4f}")
    1.2047
    >>> with jnp.printoptions(precision=4):
    ...   print(gradient)
    [[-0.213   0.213 ]
     [ 0.042   0.8228]]

  Source: the gradients formed in the forward pass, chunk by chunk, are those of Liger Kernel (Hsu
  et al., 2024); the loss that never holds the logits is that of Wijmans et al., "Cut your losses in
  large-vocabulary language models" (2024). Seed step 6 for the gradient; the softcap is that of
  Gemma 2 (Gemma Team, 2024). Digits and the other options are those of
  `softmax_cross_entropy_with_integer_labels`.
  """
  arguments = LinearArguments("linear_softmax_cross_entropy")
  x, weight = arguments.as_logits("x", x), arguments.as_logits("weight", weight)
  x, weight = arguments.promoted("x", x, "weight", weight)
  vocab_axis = arguments.as_vocab_axis(vocab_axis, weight.shape)
  arguments.check_features(x.shape, weight.shape, vocab_axis)
  rows, size = x.shape[:-1], weight.shape[vocab_axis]
  dtypes = [x.dtype]
  if bias is not None:
    bias = arguments.as_bias(bias, (size,))
    dtypes.append(bias.dtype)
  dtype = compute_dtype(*dtypes)
  x, weight = (cast(a, dtype) if dtype == jnp.float64 else a for a in (x, weight))
  chosen = options.checked(arguments, dtype, label_smoothing, z_loss, reduction)
  if softcap is not None:
    softcap = arguments.as_positive("softcap", softcap, dtype, " Pass None for no softcap.")
  if logit_scale is not None:
    logit_scale = arguments.as_positive(
      "logit_scale", logit_scale, dtype, " Pass None for no scale."
    )
  weights = None
  if class_weights is not None:
    weights = arguments.as_class_weights(class_weights, (size,)).astype(dtype)
  labels = arguments.as_class_indices(labels)
  arguments.check_labels_of_tokens(labels.shape, x.shape)
  ignore_invalid = arguments.as_flag("ignore_invalid", ignore_invalid)
  return_aux = arguments.as_flag("return_aux", return_aux)
  samples = None
  if sample_weights is not None:
    samples = arguments.as_sample_weights(sample_weights, rows).astype(dtype)
  if chunk_size is not None:
    chunk_size = arguments.as_chunk_size(chunk_size)
  arguments.check_symbolic_sizes(math.prod(rows), size, chunk_size)
  if logits_sharding is not None:
    logits_sharding = arguments.as_logits_sharding(logits_sharding, rows)
  if axis_name is not None:
    same = {"labels": labels, "x": x}
    if samples is not None:
      same["sample_weights"] = samples
    arguments.check_axis_name(axis_name, "weight", weight, **same)
  num_columns = size * Rows((), axis_name).num_devices()
  if num_classes is None:
    num_classes = num_columns
  else:
    num_classes = arguments.as_num_classes(num_classes, num_columns)

  if math.prod(rows) == 0 or num_classes == 0:
    loss, aux = options.of_nothing(chosen, rows, dtype)
    return (loss, aux) if return_aux else loss
  if ignore_index is not None:
    ignore_index = arguments.as_ignore_index(ignore_index, labels.dtype)
  arrays = Arrays(
    x=x,
    index=class_index(labels, ignore_index, ignore_invalid, num_classes),
    sample_weights=samples,
    weight=weight,
    bias=None if bias is None else bias.astype(dtype),
    class_weights=weights,
    logit_scale=logit_scale,
    softcap=softcap,
    label_smoothing=chosen.label_smoothing,
    z_loss=chosen.z_loss,
  )
  static = Static(
    Projection(vocab_axis, dtype),
    chunk_size,
    num_classes,
    padded=num_classes != num_columns,
    smoothed=chosen.label_smoothing is not None,
    ignores=ignore_invalid or ignore_index is not None or samples is not None,
    with_aux=return_aux,
    axis_name=axis_name,
  )
  if reduction == "none":
    (loss, *of_tokens), of_all = on_mesh(_losses, arrays, static, logits_sharding)
    return (loss, CrossEntropyAux(*of_tokens, *of_all)) if return_aux else loss
  of_tokens, (loss, total_weight, *of_all) = on_mesh(_sums, arrays, static, logits_sharding)
  loss = options.reduced(loss, total_weight, reduction)
  if not return_aux:
    return loss
  (nll, lse), (penalty, correct) = of_tokens, of_all
  penalty = options.reduced(penalty, total_weight, reduction)
  return loss, CrossEntropyAux(nll, lse, penalty, total_weight, correct)


def _losses(arrays: Arrays, static: Static) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
  """The loss of each token, and if asked for the rest of the aux: by token, and of all."""
  inputs, index, weight, samples = _of_rules(arrays, static)
  inputs, index = _inputs_varying_alike(inputs, index, static.axis_name)
  per_row = rules.losses(inputs, index, static)._replace(weight=_weight_that_counts(weight, index))
  if arrays.class_weights is not None:
    per_row = per_row._replace(nll=scale_or_zero(weight, per_row.nll))
  chosen = options.Options(arrays.label_smoothing, arrays.z_loss, "none")
  loss, aux = options.combine(chosen, per_row, samples)
  if not static.with_aux:
    return (loss[..., 0],), ()
  of_tokens = (x[..., 0] for x in (loss, aux.nll, aux.lse, aux.z_loss))
  return tuple(of_tokens), (aux.weight, aux.correct)


def _sums(arrays: Arrays, static: Static) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
  """The sums of the losses and of the weights of the tokens that count, after the aux by token.

  If asked for, the sum of the z-losses and the number of right predictions follow.
  """
  inputs, index, weight, samples = _of_rules(arrays, static)
  weight = weight if samples is None else weight * samples
  counted = _weight_that_counts(weight, index)

  def share(coefficient: jax.Array | None) -> jax.Array | None:
    """The share of each token in the sum of a part of the losses with this coefficient."""
    if coefficient is None:
      return None
    return jnp.broadcast_to(coefficient if samples is None else coefficient * samples, index.shape)

  alpha, of_lse = arrays.label_smoothing, share(arrays.z_loss)
  nll = weight if alpha is None else (1 - alpha) * weight
  shares = PerRow(nll=nll, lse=of_lse, uniform=share(alpha), weight=None)
  unit = jnp.ones((), static.projection.dtype)
  if arrays.class_weights is not None or samples is not None:
    # A mean divides only after gradients are summed: tiny weights would make those sums subnormal.
    # So weights below 2^-64 are given in this unit, a power of two, by which the sum is multiplied.
    unit = jnp.where(jnp.max(jnp.abs(counted)) < 2.0**-64, unit * 2.0**-64, unit)
    shares = jax.tree.map(lambda x: x / unit, shares)
    if arrays.class_weights is not None and inputs.class_weights is not None:
      inputs = inputs._replace(class_weights=inputs.class_weights / unit)
      shares = shares._replace(uniform=share(alpha))
  inputs, (shares, index) = _inputs_varying_alike(inputs, (shares, index), static.axis_name)
  total, per_row = rules.sum_of_losses(inputs, shares, index, static)
  sums = unit * total, jnp.sum(counted)
  if not static.with_aux:
    return (), sums
  nll = scale_or_zero(weight, per_row.nll)
  z_loss = jnp.zeros_like(nll) if of_lse is None else scale_or_zero(of_lse, per_row.lse**2)
  correct = options.number_of_right(per_row.right, samples)
  return (nll[..., 0], per_row.lse[..., 0]), (*sums, jnp.sum(z_loss), correct)


def _of_rules(
  arrays: Arrays, static: Static
) -> tuple[Inputs, jax.Array, jax.Array, jax.Array | None]:
  """What the rules take, the weights of the labels, and those of the tokens."""
  dtype = static.projection.dtype
  index, samples = arrays.index[..., None], arrays.sample_weights
  if samples is not None:
    # A token of weight 0 whose loss is no number does not count. One with a finite loss does: that
    # is the derivative by the weight.
    samples = samples[..., None]
    finite = jnp.all(jnp.isfinite(arrays.x), axis=-1, keepdims=True)
    index = jnp.where((samples == 0) & ((index == INVALID) | ~finite), IGNORED, index)
  weight = jnp.ones(index.shape, dtype)
  class_weights = None
  if arrays.class_weights is not None:
    class_weights = arrays.class_weights[None]
    axis = index.ndim - 1
    of_rank = jnp.expand_dims(arrays.class_weights, range(axis))
    weight = weight_of_label(of_rank, index, static.rows._replace(axes=(axis,)))
  if static.padded:
    size = arrays.weight.shape[static.projection.vocab_axis]
    classes = static.rows.first_entry(size) + jnp.arange(size)[None]
    class_weights = 1 if class_weights is None else class_weights
    class_weights = jnp.where(classes < static.num_classes, class_weights, 0).astype(dtype)
  softcap = arrays.softcap
  if softcap is not None:
    # Far above all logits any bound is the same; y / c is 0 for the largest ones.
    softcap = jnp.minimum(softcap, 2.0**100)
  class_weights = class_weights if static.smoothed else None
  inputs = Inputs(arrays.x, arrays.weight, arrays.bias, arrays.logit_scale, softcap, class_weights)
  return inputs, index, weight, samples


def _weight_that_counts(weight: jax.Array, index: jax.Array) -> jax.Array:
  """The weights of the rows, by which a mean divides: 0 where a row does not count."""
  return jnp.where(index == IGNORED, 0, weight)


def _inputs_varying_alike(
  inputs: Inputs, per_row: T, axis_name: AxisName | None
) -> tuple[Inputs, T]:
  """The arguments, varying over the same axes of a `jax.shard_map` as far as the rules need it.

  The inputs vary over ``axis_name`` too, over which the cotangents of those that are the same on
  all devices are thereby summed; the per-row scalars do not.
  """
  leaves, tree = jax.tree.flatten((inputs, per_row))
  inputs, per_row = jax.tree.unflatten(tree, devices.varying_alike(*leaves, without=axis_name))
  leaves, tree = jax.tree.flatten(inputs)
  return jax.tree.unflatten(tree, devices.varying_alike(*leaves)), per_row
