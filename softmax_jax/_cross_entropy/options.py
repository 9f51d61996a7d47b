"""The options of the losses: plain JAX on per-row scalars."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax._arguments import Arguments
from softmax_jax._cross_entropy.per_row import PerRow
from softmax_jax._products import scale_or_zero

Reduction = Literal["none", "sum", "mean"]


class CrossEntropyAux(NamedTuple):
  r"""What a loss returns beside its value with ``return_aux=True``; as differentiable as the value.

  For one row of sample weight s with an integer label t of class weight w_t, and the coefficient c
  of the z-loss:

  .. math:: \mathrm{nll} = s \, w_t \, (\mathrm{lse} - z_t), \qquad
    \mathrm{lse} = \log \sum_k e^{z_k}, \qquad
    \mathrm{z\_loss} = s \, c \, \mathrm{lse}^2

  A row that does not count (ignored, or masked altogether) has 0 in every entry. One of sample
  weight 0 keeps its lse, if that is finite, for it is the derivative by the weight.

  Attributes:
    nll: the loss of each row before smoothing and z-loss, ``[*B]`` also where the loss is reduced.
    lse: the log-normalizer of each row, ``[*B]``.
    z_loss: the part of the loss that the z-loss adds, reduced like the loss.
    weight: what the mean divides by, the sum of the weights of the rows that count; a scalar.
    correct: with integer labels, the number of rows in which no logit is larger than that of the
      label, among those that count and are not of sample weight 0; an int32 scalar without
      derivative. None with soft labels.

  The others are of the dtype of the loss: float32, or float64 where an argument has it.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy
    >>> logits, labels = jnp.array([[0.0, 0.0]]), jnp.array([0])
    >>> loss, aux = cross_entropy(logits, labels, z_loss=0.5, return_aux=True)
    >>> with jnp.printoptions(precision=4):
    ...   print(loss, aux.nll, aux.lse, aux.z_loss, aux.weight, aux.correct)
    [0.9334] [0.6931] [0.6931] [0.2402] 1.0 1

  Source: the z-loss is that of t5x and of A. Chowdhery et al., "PaLM: Scaling language modeling
  with Pathways" (2022).
  """

  nll: jax.Array
  lse: jax.Array
  z_loss: jax.Array
  weight: jax.Array
  correct: jax.Array | None = None


class Options(NamedTuple):
  """The checked options of a loss; a coefficient that is statically 0 is None."""

  label_smoothing: jax.Array | None
  z_loss: jax.Array | None
  reduction: Reduction


def checked(
  arguments: Arguments, dtype: np.dtype, label_smoothing: Any, z_loss: Any, reduction: Any
) -> Options:
  """The options, with coefficients of ``dtype``."""
  arguments.check_reduction(reduction)
  smoothing = arguments.as_label_smoothing(label_smoothing, dtype)
  penalty = arguments.as_coefficient("z_loss", z_loss, dtype)
  return Options(_unless_zero(label_smoothing, smoothing), _unless_zero(z_loss, penalty), reduction)


def _unless_zero(given: Any, coefficient: jax.Array) -> jax.Array | None:
  # A JAX array may be an argument to differentiate by, also where its value is 0.
  return None if not isinstance(given, jax.Array) and given == 0 else coefficient


def combine(
  options: Options, per_row: PerRow, sample_weights: jax.Array | None
) -> tuple[jax.Array, CrossEntropyAux]:
  """The loss and its aux, from the per-row scalars."""
  loss = nll = per_row.nll
  if options.label_smoothing is not None:
    alpha = options.label_smoothing
    loss = scale_or_zero(1 - alpha, loss) + scale_or_zero(alpha, per_row.uniform)
  z_loss = jnp.zeros_like(loss)
  if options.z_loss is not None:
    z_loss = scale_or_zero(options.z_loss, per_row.lse**2)
    loss = loss + z_loss
  weight = per_row.weight
  if sample_weights is not None:
    parts = loss, nll, z_loss, weight
    loss, nll, z_loss, weight = (scale_or_zero(sample_weights, part) for part in parts)
  total_weight = jnp.sum(weight)
  loss, z_loss = (reduced(x, total_weight, options.reduction) for x in (loss, z_loss))
  correct = number_of_right(per_row.right, sample_weights)
  return loss, CrossEntropyAux(nll, per_row.lse, z_loss, total_weight, correct)


def of_nothing(
  options: Options, rows: tuple[int, ...], dtype: np.dtype
) -> tuple[jax.Array, CrossEntropyAux]:
  """The loss of integer labels and its aux, without rows or without classes."""
  none, zero = jnp.zeros(rows, dtype), jnp.zeros((), dtype)
  loss = none if options.reduction == "none" else zero
  return loss, CrossEntropyAux(none, none, loss, zero, jnp.zeros((), jnp.int32))


def number_of_right(right: jax.Array | None, sample_weights: jax.Array | None) -> jax.Array | None:
  """The number of right predictions, but in rows of sample weight 0; None where that is unknown."""
  if right is None:
    return None
  counted = right > 0
  if sample_weights is not None:
    counted &= sample_weights != 0
  return jnp.sum(counted, dtype=jnp.int32)


def reduced(x: jax.Array, weight: jax.Array, reduction: Reduction) -> jax.Array:
  """The losses ``x`` of the rows, their sum, or that divided by ``weight``."""
  if reduction == "none":
    return x
  return jnp.sum(x) if reduction == "sum" else mean(x, weight)


def mean(x: jax.Array, weight: jax.Array) -> jax.Array:
  """The sum of ``x`` divided by ``weight``; 0 where the weight is 0 or subnormal."""
  none = jnp.abs(weight) < np.finfo(weight.dtype).tiny
  return jnp.where(none, 0, _quotient(jnp.sum(x), jnp.where(none, 1, weight)))


@jax.custom_jvp
def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
  return x / y


@jax.custom_jvp
def _inverse(y: jax.Array) -> jax.Array:
  return 1 / y


# JAX's own derivatives divide by y**2, which is 0 or infinite long before y is.
@_quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
  (x, y), (x_dot, y_dot) = primals, tangents
  ratio = _quotient(x, y)
  return ratio, (x_dot - ratio * y_dot) * _inverse(y)


@_inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
  inverse = _inverse(*primals)
  return inverse, -inverse * (inverse * tangents[0])
