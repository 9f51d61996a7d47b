r"""The textbook formulas of all that the library computes, to compare it with.

Each function has the name, the arguments and the mathematics of the one in `softmax_jax`, in plain
`jax.numpy` without a rule of its own: JAX differentiates it, in any mode and to any order. Nothing
guards it against overflow or cancellation, so evaluate it in float64. There exponentials overflow
above 709, and next to a probability of 1 - d results that depend on d are off by about 1e-15 / d.

Rounding apart, results and derivatives are those of the library for finite arguments, for logits of
-inf beside finite ones, and with masks, whatever is masked. Arguments are not checked. Missing are
``axis_name`` and ``chunk_size``, which do not change a result.

In the formulas m is 1 where an entry takes part, and 0 where ``where`` masks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softmax_jax import CrossEntropyAux

__all__ = [
  "chunked_softmax_cross_entropy",
  "linear_softmax_cross_entropy",
  "log_softmax",
  "logsumexp",
  "softmax",
  "softmax_cross_entropy",
  "softmax_cross_entropy_with_integer_labels",
  "softmax_entropy",
  "softmax_kl_divergence",
]

Axis = int | Sequence[int] | None
Scalar = jax.Array | float


def softmax(x: jax.Array, axis: Axis = -1, where: jax.Array | None = None) -> jax.Array:
  r"""Exponentials of ``x``, normalized to sum to one along ``axis``.

  .. math:: a_j = \frac{m_j e^{x_j}}{\sum_k m_k e^{x_k}}

  Args:
    x: array of any shape and a floating dtype, differentiable.
    axis: the axis or axes along which the entries sum to one; None stands for all.
    where: optional booleans that broadcast to the shape of ``x``, False at masked entries.

  Returns:
    Array of the shape and dtype of ``x``; 0 at masked entries.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> print(reference.softmax(jnp.log(jnp.array([1.0, 3.0]))))
    [0.25 0.75]

  Source: seed step 1.
  """
  e = jnp.exp(_masked(x, where))
  s = jnp.sum(e, axis, keepdims=True)
  return e / jnp.where(s == 0, 1, s)


def log_softmax(x: jax.Array, axis: Axis = -1, where: jax.Array | None = None) -> jax.Array:
  r"""The logarithm of `softmax`.

  .. math:: \log a_j = x_j - \log \sum_k m_k e^{x_k}

  Args:
    x: array of any shape and a floating dtype, differentiable.
    axis: the axis or axes along which the probabilities sum to one; None stands for all.
    where: optional booleans that broadcast to the shape of ``x``, False at masked entries.

  Returns:
    Array of the shape and dtype of ``x``; -inf at masked entries.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> with jnp.printoptions(precision=4):
    ...   print(reference.log_softmax(jnp.array([0.0, 0.0])))
    [-0.6931 -0.6931]

  Source: seed step 1.
  """
  x = _masked(x, where)
  lse = logsumexp(x, axis, keepdims=True)
  return _masked(x - jnp.where(lse == -jnp.inf, 0, lse), where)


def logsumexp(
  a: jax.Array,
  axis: Axis = None,
  b: jax.Array | None = None,
  keepdims: bool = False,
  return_sign: bool = False,
  where: jax.Array | None = None,
) -> Any:
  r"""The logarithm of a sum of exponentials.

  .. math:: \operatorname{lse}(a, b) = \log \sum_k m_k b_k e^{a_k}

  Args:
    a: array of any shape and a floating dtype, differentiable.
    axis: the axis or axes to sum over; None stands for all.
    b: optional coefficients of the exponentials, differentiable; ``a`` and ``b`` broadcast against
      each other.
    keepdims: whether the axes that are summed over are kept with size 1.
    return_sign: whether to return the logarithm of the absolute value of the sum, and its sign.
    where: optional booleans that broadcast to the shape of ``a``, False at masked entries.

  Returns:
    Array of the shape of ``a`` without ``axis``, or with ``return_sign`` a pair of two. A sum of 0
    gives -inf with derivative 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> print(f"{reference.logsumexp(jnp.zeros(2)):.4f}")
    0.6931

  Source: seed step 1.
  """
  e = jnp.exp(_masked(a, where))
  s = jnp.sum(e if b is None else b * e, axis, keepdims=keepdims)
  magnitude = jnp.abs(s) if return_sign else s
  lse = jnp.where(s == 0, -jnp.inf, jnp.log(jnp.where(s == 0, 1, magnitude)))
  return (lse, jnp.sign(s)) if return_sign else lse


def softmax_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  axis: Axis = -1,
  where: jax.Array | None = None,
  **options: Any,
) -> Any:
  r"""Cross-entropy between the softmax of logits and a distribution over the classes.

  .. math:: L = s \, \Bigl( -\sum_k w_k \bigl((1 - \alpha)\, t_k + \frac{\alpha}{K}\bigr) \log a_k
    + \lambda \bigl(\log \sum_k e^{z_k}\bigr)^2 \Bigr)

  where all three sums, and the number K of classes, leave out masked ones.

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable.
    labels: array ``[*B, V]`` of that dtype, differentiable; it broadcasts against the logits.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans of the rank of the logits, or one per row, False where masked.
    **options: ``label_smoothing`` (alpha), ``z_loss`` (lambda), ``class_weights`` (w, in the
      shape of the class axes) and ``sample_weights`` (s, ``[*B]``), all differentiable;
      ``reduction``: "none", "sum" or "mean", over the rows with an unmasked class by their s; and
      ``return_aux``, for a `softmax_jax.CrossEntropyAux` too.

  Returns:
    The losses ``[*B]``, or one number if reduced, in the dtype of the logits. A row without an
    unmasked class has loss 0, and so has one of sample weight 0, whatever it holds. What has weight
    0 adds nothing, even where it is infinite.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> loss = reference.softmax_cross_entropy(jnp.zeros(2), jnp.array([0.5, 0.5]))
    >>> print(f"{loss:.4f}")
    0.6931

  Source: seed step 6.
  """
  logits, labels = jnp.broadcast_arrays(logits, labels)
  z, m = _rows(logits, axis), _mask(where, logits, axis)
  t = jnp.where(m, _rows(labels, axis), 0)
  return _cross_entropy(z, t, m, by_label=False, **options)


def softmax_cross_entropy_with_integer_labels(
  logits: jax.Array,
  labels: jax.Array,
  axis: Axis = -1,
  where: jax.Array | None = None,
  *,
  ignore_index: int | None = None,
  ignore_invalid: bool = False,
  **options: Any,
) -> Any:
  r"""Cross-entropy between the softmax of logits and one correct class per row.

  .. math:: L = s \, \Bigl( (1 - \alpha)\, w_t\, (-\log a_t)
    + \frac{\alpha}{K} \sum_k w_k\, (-\log a_k)
    + \lambda \bigl(\log \sum_k e^{z_k}\bigr)^2 \Bigr)

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable.
    labels: integers ``[*B]`` in ``[0, V)``, whose axes may broadcast; with several class axes a
      label is a flat index into them, in their order.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans of the rank of the logits, or one per row, False where masked.
    ignore_index: optional integer; rows with this label do not count.
    ignore_invalid: whether rows whose label is out of range do not count either.
    **options: those of `softmax_cross_entropy`; a mean divides by the sum of the weights ``s w_t``.

  Returns:
    The losses ``[*B]``, or one number if reduced, in the dtype of the logits. A row that does not
    count has loss 0, one whose label is masked +inf.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> loss = reference.softmax_cross_entropy_with_integer_labels(jnp.zeros(2), jnp.array(0))
    >>> print(f"{loss:.4f}")
    0.6931

  Source: seed step 6.
  """
  z = _rows(logits, axis)
  t = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)
  z, t = jnp.broadcast_arrays(z, t)
  m = jnp.broadcast_to(_mask(where, logits, axis), z.shape)
  if ignore_index is not None:
    m &= jnp.broadcast_to(labels[..., None] != ignore_index, m.shape)
  if ignore_invalid:
    m &= jnp.sum(t, axis=-1, keepdims=True) == 1
  return _cross_entropy(z, t, m, by_label=True, **options)


def linear_softmax_cross_entropy(
  x: jax.Array,
  weight: jax.Array,
  labels: jax.Array,
  *,
  bias: jax.Array | None = None,
  vocab_axis: int = -1,
  logit_scale: Scalar | None = None,
  softcap: Scalar | None = None,
  ignore_index: int | None = None,
  num_classes: int | None = None,
  class_weights: jax.Array | None = None,
  sample_weights: jax.Array | None = None,
  reduction: str = "mean",
  **options: Any,
) -> Any:
  r"""Cross-entropy of a linear layer with one correct class per token, from all of its logits.

  .. math:: y = k \, (x W + b), \qquad z = c \tanh(y / c)

  Args:
    x: features ``[*B, H]`` of a floating dtype, differentiable.
    weight: ``[H, V]``, or ``[V, H]`` with ``vocab_axis=0``, differentiable.
    labels: integers ``[*B]`` in ``[0, V)``.
    bias: optional, ``[V]``, differentiable.
    vocab_axis: the axis of the classes in ``weight``.
    logit_scale: optional factor k of the logits, differentiable.
    softcap: optional bound c of the logits, differentiable.
    ignore_index: optional integer; tokens with this label do not count.
    num_classes: how many columns of the weight are classes; None stands for all.
    class_weights: optional weights ``[V]``, differentiable.
    sample_weights: optional weights ``[*B]``, differentiable.
    reduction: "mean", "sum" or "none".
    **options: ``label_smoothing``, ``z_loss``, ``ignore_invalid`` and ``return_aux``.

  Returns:
    The loss of the logits z, that of `softmax_cross_entropy_with_integer_labels`.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> x, weight = jnp.ones((1, 3)), jnp.zeros((3, 2))
    >>> print(f"{reference.linear_softmax_cross_entropy(x, weight, jnp.array([0])):.4f}")
    0.6931

  Source: seed step 6; the softcap is that of Gemma 2 (Gemma Team, 2024).
  """
  # A token that does not count may hold NaN, which the weight must not see.
  if ignore_index is not None:
    x = jnp.where(labels[..., None] != ignore_index, x, 0)
  counts = jnp.ones(labels.shape, bool)
  if sample_weights is not None:
    counts = (sample_weights != 0) | jnp.all(jnp.isfinite(x), axis=-1)
    x = jnp.where(counts[..., None], x, 0)
  z = x @ jnp.moveaxis(weight, vocab_axis, -1)
  if bias is not None:
    z += jnp.broadcast_to(bias, z.shape)
  if logit_scale is not None:
    z = logit_scale * z
  if softcap is not None:
    z = softcap * jnp.tanh(z / softcap)
  if class_weights is not None:
    class_weights = class_weights[:num_classes]
  return softmax_cross_entropy_with_integer_labels(
    z[..., :num_classes],
    labels,
    where=counts,
    ignore_index=ignore_index,
    class_weights=class_weights,
    sample_weights=sample_weights,
    reduction=reduction,
    **options,
  )


def chunked_softmax_cross_entropy(
  head: Callable[[Any, Any], jax.Array],
  params: Any,
  x: Any,
  labels: jax.Array,
  *,
  reduction: str = "mean",
  **options: Any,
) -> Any:
  r"""Cross-entropy of a head with one correct class per token, from all of its logits.

  .. math:: z_i = \mathrm{head}(\theta, x_i)

  Args:
    head: a function ``head(params, x)`` that returns the logits ``[*B, V]``.
    params: what it takes, differentiable.
    x: features ``[*B, ...]``, differentiable.
    labels: integers ``[*B]`` in ``[0, V)``.
    reduction: "mean", "sum" or "none".
    **options: those of `softmax_cross_entropy_with_integer_labels`.

  Returns:
    The loss of the logits z, that of `softmax_cross_entropy_with_integer_labels`.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> head = lambda params, x: x @ params
    >>> args = jnp.zeros((3, 2)), jnp.ones((1, 3)), jnp.array([0])
    >>> print(f"{reference.chunked_softmax_cross_entropy(head, *args):.4f}")
    0.6931

  Source: seed step 6.
  """
  z = head(params, x)
  return softmax_cross_entropy_with_integer_labels(z, labels, reduction=reduction, **options)


def softmax_entropy(
  logits: jax.Array, axis: Axis = -1, where: jax.Array | None = None
) -> jax.Array:
  r"""The entropy of `softmax`.

  .. math:: H = -\sum_k a_k \log a_k

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans of the rank of the logits, or one per row, False where masked.

  Returns:
    The entropies ``[*B]`` in the dtype of the logits. A row without an unmasked class has entropy
    0, and a class without probability adds 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> print(f"{reference.softmax_entropy(jnp.zeros(2)):.4f}")
    0.6931

  Source: seed step 1.
  """
  a, log_a = _probabilities(_rows(logits, axis), _mask(where, logits, axis))
  return -jnp.sum(a * log_a, axis=-1)


def softmax_kl_divergence(
  logits: jax.Array,
  target_logits: jax.Array,
  axis: Axis = -1,
  where: jax.Array | None = None,
  *,
  temperature: Scalar = 1.0,
  reduction: str = "none",
) -> jax.Array:
  r"""The Kullback-Leibler divergence of the `softmax` of logits from that of target logits.

  .. math:: \mathrm{KL} = \sum_k p_k (\log p_k - \log q_k), \qquad
    q = \mathrm{softmax}(z / \tau), \quad p = \mathrm{softmax}(w / \tau)

  Args:
    logits: array z ``[*B, V]`` of a floating dtype, differentiable.
    target_logits: array w ``[*B, V]`` of that dtype, differentiable; both broadcast against each
      other.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans of the rank of the logits, or one per row, False where masked.
    temperature: tau, differentiable.
    reduction: "none", "sum", or "mean" over the rows with an unmasked class.

  Returns:
    The divergences ``[*B]``, or one number if reduced, in the dtype of the logits. A row without an
    unmasked class has divergence 0, and a class of target probability 0 adds 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import reference
    >>> divergence = reference.softmax_kl_divergence(jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2))
    >>> print(f"{divergence:.4f}")
    0.1438

  Source: seed step 1.
  """
  m = _mask(where, logits, axis)
  logits, target_logits = jnp.broadcast_arrays(logits, target_logits)
  z, w = (_rows(x, axis) for x in (logits, target_logits))
  # -inf / temperature would have the derivative NaN.
  z, w = (jnp.where(x == -jnp.inf, x, jnp.where(x == -jnp.inf, 0, x) / temperature) for x in (z, w))
  _, log_q = _probabilities(z, m)
  p, log_p = _probabilities(w, m)
  divergence = jnp.sum(p * (log_p - log_q), axis=-1)
  counts = jnp.broadcast_to(jnp.any(m, axis=-1), divergence.shape)
  if reduction == "none":
    return divergence
  total = jnp.sum(divergence)
  return total if reduction == "sum" else total / jnp.maximum(jnp.sum(counts), 1)


# --- parts ---------------------------------------------------------------------------------------


def _cross_entropy(
  z: jax.Array,
  t: jax.Array,
  m: jax.Array,
  *,
  by_label: bool,
  label_smoothing: Scalar = 0.0,
  z_loss: Scalar = 0.0,
  class_weights: jax.Array | None = None,
  sample_weights: jax.Array | None = None,
  reduction: str = "none",
  return_aux: bool = False,
) -> Any:
  """The loss of logits z, labels t and masks m, each ``[*B, K]``.

  ``by_label`` says whether a mean divides by the weights of the labels, or by the number of rows.
  """
  if sample_weights is None:
    sample_weights = jnp.ones(z.shape[:-1], z.dtype)
  # A row of weight 0 without a finite loss does not count.
  finite = jnp.isfinite(logsumexp(z, axis=-1, where=m)) & jnp.all(jnp.isfinite(t), axis=-1)
  m &= ((sample_weights != 0) | finite)[..., None]
  counts = jnp.any(m, axis=-1)
  t = jnp.where(counts[..., None], t, 0)
  num_classes = jnp.sum(m, axis=-1, keepdims=True, dtype=z.dtype)
  u = m.astype(z.dtype) / jnp.maximum(num_classes, 1)
  w = jnp.ones_like(z)
  if class_weights is not None:
    w = jnp.broadcast_to(class_weights.ravel(), z.shape)
  log_a = log_softmax(z, where=m)
  lse = jnp.where(counts, logsumexp(z, axis=-1, where=m), 0)

  def cross_entropy(p: jax.Array) -> jax.Array:
    nothing = (p == 0) & (log_a == -jnp.inf)  # 0 log 0 = 0
    return -jnp.sum(p * jnp.where(nothing, 0, log_a), axis=-1)

  weight = sample_weights * (jnp.sum(w * t, axis=-1) if by_label else counts.astype(z.dtype))
  total = jnp.sum(weight)
  reduce: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "sum": jnp.sum,
    "mean": lambda x: jnp.where(total == 0, 0, jnp.sum(x) / jnp.where(total == 0, 1, total)),
  }
  penalty = sample_weights * z_loss * lse**2
  loss = cross_entropy(w * ((1 - label_smoothing) * t + label_smoothing * u))
  loss = sample_weights * loss + penalty
  loss, penalty = reduce[reduction](loss), reduce[reduction](penalty)
  nll = sample_weights * cross_entropy(w * t)
  correct = None
  if by_label:
    largest = jnp.max(jnp.where(m, z, -jnp.inf), axis=-1, keepdims=True)
    right = jnp.any((t == 1) & m & (z == largest), axis=-1) & (sample_weights != 0)
    correct = jnp.sum(right, dtype=jnp.int32)
  aux = CrossEntropyAux(nll, lse, penalty, total, correct)
  return (loss, aux) if return_aux else loss


def _probabilities(z: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The softmax of logits ``[*B, K]`` and its logarithm, with 0 for that of 0."""
  a, log_a = softmax(z, where=m), log_softmax(z, where=m)
  return a, jnp.where(log_a == -jnp.inf, 0, log_a)


def _masked(x: jax.Array, where: jax.Array | None) -> jax.Array:
  """``x`` with logits of -inf, which add nothing to a sum of exponentials, where it is masked."""
  return x if where is None else jnp.where(where, x, -jnp.inf)


def _rows(x: jax.Array, axis: Axis) -> jax.Array:
  """``x`` as ``[*B, K]``: the class axes, in the order given, merged into one last axis."""
  axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
  x = jnp.moveaxis(x, tuple(axes), tuple(range(-len(axes), 0)))
  batch = x.shape[: x.ndim - len(axes)]
  return x.reshape(*batch, math.prod(x.shape[len(batch) :]))


def _mask(where: jax.Array | None, logits: jax.Array, axis: Axis) -> jax.Array:
  """``where`` as ``[*B, K]``, of one value per row or of the rank of the logits."""
  rows = _rows(logits, axis)
  if where is None:
    return jnp.ones(rows.shape, bool)
  if where.ndim < logits.ndim:
    return jnp.broadcast_to(where[..., None], (*where.shape, rows.shape[-1]))
  return _rows(jnp.broadcast_to(where, jnp.broadcast_shapes(where.shape, logits.shape)), axis)
