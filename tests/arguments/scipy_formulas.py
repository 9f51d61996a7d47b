"""The public functions by SciPy and NumPy in float64, by name in `ORACLE`."""

import numpy as np
import scipy.special


def _jacobian(x):
  a = scipy.special.softmax(x, axis=-1)
  return a[..., None] * np.eye(a.shape[-1]) - a[..., :, None] * a[..., None, :]


def _product(x, v):
  return np.einsum("...ij,...j->...i", _jacobian(x), v)


def _hvp(x, y_bar, x_dot):
  a = scipy.special.softmax(x, axis=-1)
  p = (y_bar - np.sum(a * y_bar, -1, keepdims=True)) * (
    x_dot - np.sum(a * x_dot, -1, keepdims=True)
  )
  return _product(x, p)


def _soft_loss(logits, labels, axis=-1, where=True, weights=None, smoothing=0.0, z_loss=0.0):
  """Losses per row, and their log-normalizers."""
  logits, labels, where = np.broadcast_arrays(logits, labels, where)
  z = np.where(where, logits, -np.inf)
  axes = tuple(range(z.ndim)) if axis is None else axis
  any_ = np.any(where, axis=axes)
  count = np.maximum(np.sum(where, axis=axes, keepdims=True), 1)
  with np.errstate(all="ignore"):
    lse = scipy.special.logsumexp(z, axis=axes, keepdims=True)
    cost = np.where(where, lse - z, 0)
    w = 1.0 if weights is None else weights
    label = (1 - smoothing) * labels + smoothing / count
    lse = np.where(any_, np.squeeze(lse, axes), 0)
    return np.sum(w * label * cost, axis=axes) + z_loss * lse**2, lse


def _reduced(losses, reduction, weight):
  if reduction == "none":
    return losses
  return np.sum(losses) / (weight if reduction == "mean" else 1)


def softmax_cross_entropy(
  logits,
  labels,
  axis=-1,
  where=None,
  class_weights=None,
  sample_weights=None,
  label_smoothing=0.0,
  z_loss=0.0,
  reduction="none",
  return_aux=False,
  axis_name=None,
):
  where = True if where is None else where
  losses, lse = _soft_loss(logits, labels, axis, where, class_weights, label_smoothing, z_loss)
  s = np.ones(losses.shape) if sample_weights is None else sample_weights
  losses = s * losses
  loss = _reduced(losses, reduction, np.sum(s))
  return (loss, (losses, lse, 0 * loss, np.sum(s))) if return_aux else loss


def _one_hot(labels, classes):
  """NaN in a row whose label is no class."""
  invalid = (labels < 0) | (labels >= classes)
  return np.where(invalid[:, None], np.nan, np.arange(classes) == labels[:, None])


def integer_cross_entropy(
  logits,
  labels,
  axis=-1,
  where=None,
  class_weights=None,
  sample_weights=None,
  label_smoothing=0.0,
  z_loss=0.0,
  ignore_index=None,
  ignore_invalid=False,
  reduction="none",
  return_aux=False,
  axis_name=None,
):
  where = np.broadcast_to(True if where is None else where, logits.shape)
  w = np.ones(logits.shape[-1]) if class_weights is None else class_weights
  losses, lse = _soft_loss(logits, _one_hot(labels, len(w)), -1, where, w, label_smoothing, z_loss)
  counts = np.any(where, -1)
  if ignore_index is not None:
    counts = counts & (labels != ignore_index)
  labels = labels % len(w)  # those that are no class have a loss of NaN already
  at_label = where[np.arange(len(labels)), labels]
  s = np.ones(len(labels)) if sample_weights is None else sample_weights
  losses = s * np.where(counts, np.where(at_label, losses, np.inf), 0)
  weight = np.sum(np.where(counts, s * w[labels], 0))
  loss = _reduced(losses, reduction, weight)
  largest = np.max(np.where(where, logits, -np.inf), -1)
  correct = np.sum(logits[np.arange(len(labels)), labels] > largest - 1e-6)  # a tie counts
  return (loss, (losses, lse, 0 * loss, weight, correct)) if return_aux else loss


def linear_cross_entropy(
  x,
  weight,
  labels,
  bias=None,
  logit_scale=None,
  softcap=None,
  reduction="mean",
  vocab_axis=-1,
  **options,
):
  for name in ("chunk_size", "axis_name", "logits_sharding"):
    options.pop(name, None)
  num_classes = options.pop("num_classes", None)
  if num_classes is not None:  # without classes the loss is 0; class 3 is not the only one
    return np.nan if num_classes else 0.0
  z = x @ weight + (0 if bias is None else bias)
  z = z if logit_scale is None else logit_scale * z
  z = z if softcap is None else softcap * np.tanh(z / softcap)
  return integer_cross_entropy(z, labels, reduction=reduction, **options)


def chunked_cross_entropy(head, params, x, labels, chunk_size=None, reduction="mean", **options):
  return integer_cross_entropy(head(params, x), labels, reduction=reduction, **options)


def _masked(function, fill):
  def f(x, axis=-1, where=None, axis_name=None):
    where = np.broadcast_to(True if where is None else where, x.shape)
    with np.errstate(all="ignore"):
      return np.where(where, function(np.where(where, x, -np.inf), axis=axis), fill)

  return f


def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False, where=None, axis_name=None):
  if where is not None:
    a = np.where(where, a, -np.inf)
  with np.errstate(all="ignore"):
    return scipy.special.logsumexp(a, axis, b, keepdims, return_sign)


def _probabilities(logits, axis, where):
  """The probabilities along ``axis``, their logarithms, and the axes."""
  z = np.where(np.broadcast_to(True if where is None else where, logits.shape), logits, -np.inf)
  axes = tuple(range(z.ndim)) if axis is None else axis
  a = scipy.special.softmax(z, axis=axes)
  return a, np.where(a == 0, 0, scipy.special.log_softmax(z, axis=axes)), axes


def entropy(logits, axis=-1, where=None, axis_name=None):
  if where is not None and not np.any(where):
    return 0 * np.sum(logits, axis=axis)
  with np.errstate(all="ignore"):
    a, log_a, axes = _probabilities(logits, axis, where)
  return -np.sum(a * log_a, axis=axes)


def kl_divergence(
  logits,
  target_logits,
  axis=-1,
  where=None,
  temperature=1.0,
  reduction="none",
  axis_name=None,
):
  logits, target_logits = np.broadcast_arrays(logits, target_logits)
  if where is not None and not np.any(where):
    return 0 * np.sum(logits, axis=axis)
  with np.errstate(all="ignore"):
    _, log_q, axes = _probabilities(logits / temperature, axis, where)
    p, log_p, _ = _probabilities(target_logits / temperature, axis, where)
  divergence = np.sum(p * (log_p - log_q), axis=axes)
  return _reduced(divergence, reduction, divergence.size)


def _cross_entropy_gradient(logits, labels):
  labels = labels if labels.ndim == logits.ndim else _one_hot(labels, logits.shape[-1])
  return scipy.special.softmax(logits, axis=-1) * np.sum(labels, -1, keepdims=True) - labels


ORACLE = {
  "softmax": _masked(scipy.special.softmax, 0),
  "log_softmax": _masked(scipy.special.log_softmax, -np.inf),
  "logsumexp": logsumexp,
  "softmax_cross_entropy": softmax_cross_entropy,
  "softmax_cross_entropy_with_integer_labels": integer_cross_entropy,
  "linear_softmax_cross_entropy": linear_cross_entropy,
  "chunked_softmax_cross_entropy": chunked_cross_entropy,
  "softmax_entropy": entropy,
  "softmax_kl_divergence": kl_divergence,
  "softmax_jacobian": _jacobian,
  "softmax_jvp": lambda x, x_dot: _product(x, x_dot),
  "softmax_vjp": lambda x, y_bar: _product(x, y_bar),
  "softmax_hvp": _hvp,
  "log_softmax_jacobian": lambda x: (
    np.eye(x.shape[-1]) - scipy.special.softmax(x, axis=-1)[..., None, :]
  ),
  "logsumexp_hessian": _jacobian,
  "cross_entropy_hessian": lambda logits: _jacobian(logits),
  "cross_entropy_hvp": lambda logits, x_dot: _product(logits, x_dot),
  "cross_entropy_gradient": _cross_entropy_gradient,
}
