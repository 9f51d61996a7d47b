"""The public function: checks, options, and how the rule is called."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softmax_jax import _devices as devices
from softmax_jax._arguments import compute_dtype
from softmax_jax._chunked_cross_entropy.arguments import HeadArguments
from softmax_jax._chunked_cross_entropy.rule import Head, Shared, Static, Tokens, losses_in_chunks
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.integer_rule import Static as DenseStatic
from softmax_jax._cross_entropy.label import IGNORED, INVALID, class_index, weight_of_label
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._linear_cross_entropy.chunks import ON_ACCELERATOR
from softmax_jax._rows import Rows


@overload
def chunked_softmax_cross_entropy(
  head: Head,
  params: Any,
  x: Any,
  labels: ArrayLike,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  return_aux: Literal[False] = False,
) -> jax.Array: ...


@overload
def chunked_softmax_cross_entropy(
  head: Head,
  params: Any,
  x: Any,
  labels: ArrayLike,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  return_aux: Literal[True],
) -> tuple[jax.Array, CrossEntropyAux]: ...


@overload
def chunked_softmax_cross_entropy(
  head: Head,
  params: Any,
  x: Any,
  labels: ArrayLike,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]: ...


def chunked_softmax_cross_entropy(
  head: Head,
  params: Any,
  x: Any,
  labels: ArrayLike,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  ignore_index: ArrayLike | None = None,
  ignore_invalid: bool = False,
  reduction: Reduction = "mean",
  chunk_size: int | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]:
  r"""Cross-entropy of a head that is a function, with one correct class per token; in chunks.

  .. math:: z_i = \mathrm{head}(\theta, x_i), \qquad L_i = -\log \mathrm{softmax}(z_i)_{t_i}

  The same loss as ``softmax_cross_entropy_with_integer_labels(head(params, x), labels)``, value and
  derivatives, but the logits ``[T, V]`` of all T tokens never exist: the head is called for
  ``chunk_size`` tokens at a time. It may hold a norm, an adapter, tied or quantized weights, or
  dropout. `linear_softmax_cross_entropy` is the faster choice where it is a matrix and a bias.

  For a reduced loss that is differentiated, the gradients of a chunk are formed together with its
  loss, so that the head runs once; gradients by the parameters are summed over the chunks in
  float32. Arguments that are not differentiated (frozen parameters) take no part in that. With
  ``reduction="none"`` the head runs a second time in the backward pass.

  .. math:: \bar z_i = (a_i - t_i) \, \bar L, \qquad (\bar\theta, \bar x_i) =
    \text{the vector-Jacobian product of the head with } \bar z_i

  Args:
    head: a function ``head(params, x)`` of the parameters and the features ``[C, ...]`` of a chunk
      of C tokens, that returns their logits ``[C, V]``, of a floating dtype of at least 16 bits,
      each from the features of its own token alone. What JAX traces must come to it in
      ``params`` or ``x``, not by closing over it. Random numbers must come from keys in ``x``, one
      per token: a key in ``params`` draws the same for each chunk. Outside of `jax.jit`, pass the
      same function in each call: every other one is compiled anew. As there, the function, or the
      object it is a method of, is read once: it must not change.
    params: a pytree of arrays; those of a floating dtype are differentiable.
    x: features, a pytree of arrays ``[*B, ...]``; those of a floating dtype are differentiable.
    labels: integers ``[*B]`` in ``[0, V)`` of any integer dtype; not differentiable. A label out of
      range gives a loss of NaN, and a gradient of NaN in its own features and in ``params``.
    label_smoothing: the share alpha of the label that is spread evenly over all classes; a scalar
      in [0, 1], differentiable.
    z_loss: the coefficient of the squared log-normalizer; a scalar, differentiable.
    class_weights: optional weights ``[V]`` of the classes, differentiable.
    sample_weights: optional weights ``[*B]`` of the tokens, of any sign, differentiable. A token of
      weight 0 does not count, whatever its label and its logits. But features of NaN make the
      gradients by ``params`` NaN, as the head sees them: replace them before.
    ignore_index: optional integer; tokens with this label do not count, whatever their logits hold.
      What is said of features of NaN holds for them too.
    ignore_invalid: whether tokens whose label is out of range do not count either, a static bool.
    reduction: "mean" (the sum divided by the sum over the tokens that count of the sample weight
      times the class weight of the label; 0 where that is 0), "sum", or "none" for one loss per
      token.
    chunk_size: the number of tokens of a chunk, a static int; the last one may be smaller. None
      stands for as many as have logits of 512 MiB in float32, but for no more than T / 4 beyond 128
      MiB; or for somewhat fewer (half as many at least) that divide T. A chunk is made of every
      n-th token, so that with automatic sharding each device computes its own; the gradients by
      what the devices share are then added up once for each chunk. With explicit axes it must
      divide T, and the devices must divide it.
    return_aux: whether to return a `CrossEntropyAux` with the log-normalizer of each token, the
      part that the z-loss adds, the sum of the weights, all differentiable like the loss, and the
      number of right predictions too. If one that depends on the logits is differentiated, the
      head runs a second time.

  Returns:
    The loss, one number or ``[*B]``, in float32 (float64 where the logits have it). Gradients come
    back in the dtypes of their arguments.

  Raises:
    TypeError: if ``head`` is no function or returns no array of a floating dtype, the labels or
      ``ignore_index`` are not of an integer dtype, a coefficient not a real scalar, ``chunk_size``
      not a static int, or ``ignore_invalid`` or ``return_aux`` not static bools.
    ValueError: if the head closes over a traced array or does not return one row of logits per
      token, the features do not begin with the axes of the labels, ``reduction`` is unknown,
      ``chunk_size`` is not positive, or a coefficient is known while tracing and out of its range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import chunked_softmax_cross_entropy
    >>> def head(params, x):  # a norm, and an embedding that is tied
    ...   x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    ...   return (params["scale"] * x) @ params["embedding"].T
    >>> embedding = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> params = {"scale": jnp.ones(2), "embedding": embedding}
    >>> x, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    >>> loss = lambda params: chunked_softmax_cross_entropy(head, params, x, labels, chunk_size=1)
    >>> value, gradients = jax.value_and_grad(loss)(params)
    >>> with jnp.printoptions(precision=4):
    ...   print(f"{value:.4f}", gradients["scale"])
    1.5055 [-0.1495  1.3079]

  Source: gradients formed in the forward pass, chunk by chunk, as in Liger Kernel (Hsu et al.,
  2024). Digits and options are those of `softmax_cross_entropy_with_integer_labels`.
  """
  arguments = HeadArguments("chunked_softmax_cross_entropy")
  labels = arguments.as_class_indices(labels)
  rows = labels.shape
  x = arguments.as_features(x, rows)
  params = jax.tree.map(jnp.asarray, params)
  head = arguments.as_head(head)
  logits = arguments.logits_of_head(head, params, x, rows)
  dtype, num_classes = compute_dtype(logits.dtype), logits.shape[-1]
  chosen = options.checked(arguments, dtype, label_smoothing, z_loss, reduction)
  ignore_invalid = arguments.as_flag("ignore_invalid", ignore_invalid)
  return_aux = arguments.as_flag("return_aux", return_aux)
  weights = samples = None
  if class_weights is not None:
    weights = arguments.as_class_weights(class_weights, (num_classes,)).astype(dtype)
  if sample_weights is not None:
    samples = arguments.as_sample_weights(sample_weights, rows).astype(dtype)
  if ignore_index is not None:
    ignore_index = arguments.as_ignore_index(ignore_index, labels.dtype)
  num_tokens = math.prod(rows)
  if chunk_size is None:
    chunk_size = ON_ACCELERATOR.chunk_size(num_tokens, 0, num_classes, dtype.itemsize)
  else:
    chunk_size = arguments.as_chunk_size(chunk_size)

  if num_tokens == 0 or num_classes == 0:
    loss, aux = options.of_nothing(chosen, rows, dtype)
    return (loss, aux) if return_aux else loss
  index = class_index(labels, ignore_index, ignore_invalid, num_classes)
  if samples is not None:
    # A token of weight 0 does not count, if its loss is no number.
    index = jnp.where((samples == 0) & (index == INVALID), IGNORED, index)
  counted = _weights_that_count(index, weights, samples, dtype)
  of_classes = None if weights is None else weights[None]
  shared = Shared(params, of_classes, chosen.label_smoothing, chosen.z_loss)
  tokens = Tokens(x, index, samples)
  tokens = jax.tree.map(lambda a: a.reshape(num_tokens, *a.shape[len(rows) :]), tokens)
  leaves, tree = jax.tree.flatten((shared, tokens))
  # Before the rule, so that what the devices of a `jax.shard_map` share is summed over them once.
  leaves = list(devices.varying_alike(*leaves))
  dense = DenseStatic(
    rows=Rows((1,), None),
    num_classes=num_classes,
    smoothed=chosen.label_smoothing is not None,
    ignores=ignore_invalid or ignore_index is not None or samples is not None,
  )
  num_shared = len(jax.tree.leaves(shared))
  is_sum = reduction != "none"
  static = Static(head, tree, num_shared, chunk_size, dense, dtype, is_sum)
  total, of_tokens = losses_in_chunks(leaves, static)
  of_tokens = jax.tree.map(lambda a: a.reshape(rows), of_tokens)
  total_weight = jnp.sum(counted)
  loss = of_tokens.loss
  if is_sum:
    loss = options.reduced(total, total_weight, reduction)
  if not return_aux:
    return loss
  z_loss = options.reduced(of_tokens.z_loss, total_weight, reduction)
  correct = options.number_of_right(of_tokens.right, samples)
  return loss, CrossEntropyAux(of_tokens.nll, of_tokens.lse, z_loss, total_weight, correct)


def _weights_that_count(
  index: jax.Array, weights: jax.Array | None, samples: jax.Array | None, dtype: np.dtype
) -> jax.Array:
  """The weight of each token, by which a mean divides: 0 where the token does not count."""
  weight = jnp.ones(index.shape, dtype)
  if weights is not None:
    rows = Rows((index.ndim,), None)
    of_rank = jnp.expand_dims(weights, range(index.ndim))
    weight = weight_of_label(of_rank, index[..., None], rows)[..., 0]
  if samples is not None:
    weight = weight * samples
  return jnp.where(index == IGNORED, 0, weight)
