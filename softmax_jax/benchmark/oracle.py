"""What the compared functions should return, in float64 or wider, and how far a result is from it.

`softmax_jax.reference` is too coarse for that: at a label of probability 1 - 1e-10 it keeps five
digits in float64, fewer than a float32 number has, and JAX has no dtype to measure float64 with.
The formulas here lose none.

Everything is over the last axis of z ``[B, K]``, a = softmax(z). With m the place of a largest
logit of a row, s = z - z_m and r the sum of exp(s_j) over j other than m,

    log a_j = s_j - log1p(r),

and whatever would cancel where a_m is close to 1 is formed from r: the gradient -(1 - a_m) of a
loss is -r / (1 + r), and a cotangent c enters softmax's VJP as d = c - c_m,

    a_j (c_j - sum_k a_k c_k) = a_j (d_j - sum_k a_k d_k),  in which d_m = 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

_NONE = np.zeros(0)


class Expected(NamedTuple):
  """The true values, the size beside which an error of each counts, and how errors are counted.

  unit: "ulp", for each element by itself, or "u", for each row in norm.
  """

  values: np.ndarray
  sizes: np.ndarray
  unit: str


def wide(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """`array` in a type that has digits to spare beside `dtype`."""
  array = np.asarray(array)
  if array.dtype != np.longdouble:
    array = array.astype(np.float64)  # NumPy has no other way from a bfloat16.
  return array.astype(np.longdouble if np.dtype(dtype) == np.float64 else np.float64)


class _Rows:
  """s, r, log a and a of every row, as above; `at_max` is True at m."""

  def __init__(self, z: np.ndarray):
    self.z = z
    self.argmax = z.argmax(axis=-1, keepdims=True)
    self.at_max = self.at(self.argmax)
    self.max = np.take_along_axis(z, self.argmax, -1)
    s = z - self.max
    self.r: np.ndarray = np.sum(np.where(self.at_max, 0, np.exp(s)), axis=-1, keepdims=True)
    self.log_a = s - np.log1p(self.r)
    self.a: np.ndarray = np.exp(self.log_a)

  def at(self, places: np.ndarray) -> np.ndarray:
    """True at one place of every row."""
    classes: int = self.z.shape[-1]
    return np.arange(classes) == places


def _pick(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
  return np.take_along_axis(rows, labels[:, None].astype(np.int64), -1)[:, 0]


def _log_ratio(rows: _Rows, target: _Rows) -> np.ndarray:
  """log p - log q, from the differences of the logits: these keep their digits."""
  difference = (target.z - target.max) - (rows.z - rows.max)
  terms = np.where(difference < 0, -np.exp(rows.z - rows.max), np.exp(target.z - target.max))
  excess = np.sum(terms * np.expm1(-np.abs(difference)), axis=-1, keepdims=True)  # S_q - S_p
  # log S_p - log S_q, which is that of p's logits minus that of q's
  smaller = 1 + np.minimum(rows.r, target.r)
  return difference + np.sign(excess) * np.log1p(np.abs(excess) / smaller)


def _gap(rows: _Rows, target: _Rows) -> np.ndarray:
  """q - p."""
  log_ratio = _log_ratio(rows, target)
  return np.where(log_ratio < 0, -rows.a, target.a) * np.expm1(-np.abs(log_ratio))


def _divergence(rows: _Rows, target: _Rows) -> np.ndarray:
  """The sum of q - p + p (log p - log q), whose terms are not negative.

  Each is formed from the larger of p and q: the other one may underflow.
  """
  log_ratio = _log_ratio(rows, target).astype(np.longdouble)
  size = np.abs(log_ratio)
  minus_gap = np.expm1(-size)  # of the larger one as a unit
  of_p, of_q = minus_gap + size, -minus_gap - size * np.exp(-size)
  terms = np.where(log_ratio > 0, target.a * of_p, rows.a * of_q)
  return np.sum(terms, axis=-1).astype(rows.z.dtype)


def values(function: str, z: np.ndarray, labels: np.ndarray | None = None) -> Expected:
  """What `function` returns at wide logits z: ``[B, K]`` or, where it reduces, ``[B]``."""
  rows = _Rows(z)
  if function == "logsumexp":
    y = (rows.max + np.log1p(rows.r))[:, 0]
    # The largest logit can cancel against log1p(r); its own rounding is then all that is left.
    return Expected(y, np.maximum(np.abs(y), np.abs(rows.max[:, 0])), "ulp")
  if function == "softmax":
    y = rows.a
  elif function == "log_softmax":
    y = rows.log_a
  elif function == "softmax_entropy":
    y = -np.sum(rows.a * rows.log_a, axis=-1)
  elif function == "softmax_kl_divergence":
    assert labels is not None
    y = _divergence(rows, _Rows(labels))
  else:
    assert labels is not None  # A loss has some.
    soft = function == "softmax_cross_entropy"
    y = -(np.sum(labels * rows.log_a, axis=-1) if soft else _pick(rows.log_a, labels))
  return Expected(y, np.abs(y), "ulp")


def gradients(
  function: str, z: np.ndarray, second: np.ndarray = _NONE, *, rows_of_mean: int = 1
) -> Expected:
  """The VJP of `function` with cotangent `second`; of a loss the gradient at labels `second`.

  In place of labels a divergence has target logits, and an entropy nothing.

  `rows_of_mean` is the number of rows over which the loss is averaged.
  """
  rows = _Rows(z)
  a = rows.a
  if function == "softmax":
    bar = _softmax_vjp(rows, second)
  elif function == "log_softmax":
    bar = second - a * np.sum(second, axis=-1, keepdims=True)
  elif function == "logsumexp":
    bar = a * second[:, None]
  elif function == "softmax_entropy":
    entropy = -np.sum(a * rows.log_a, axis=-1, keepdims=True)
    bar = -a * (rows.log_a + entropy)
  elif function == "softmax_kl_divergence":
    bar = _gap(rows, _Rows(second))
  elif function == "softmax_cross_entropy":
    bar = a * np.sum(second, axis=-1, keepdims=True) - second
  else:
    is_label = rows.at(second[:, None])
    at_label = np.where(rows.at_max, -rows.r / (1 + rows.r), a - 1)
    bar = np.where(is_label, at_label, a)
  bar = bar / rows_of_mean
  return Expected(bar, np.abs(bar), "u")


def gradients_by_target(z: np.ndarray, w: np.ndarray, *, rows_of_mean: int = 1) -> Expected:
  """Those of the mean divergence by the target logits w: p (log p - log q - KL)."""
  target = _Rows(w)
  bar = _softmax_vjp(target, _log_ratio(_Rows(z), target)) / rows_of_mean
  return Expected(bar, np.abs(bar), "u")


def _softmax_vjp(rows: _Rows, cotangents: np.ndarray) -> np.ndarray:
  d = cotangents - np.take_along_axis(cotangents, rows.argmax, -1)
  return rows.a * (d - np.sum(rows.a * d, axis=-1, keepdims=True))


def linear(x: np.ndarray, weight: np.ndarray, labels: np.ndarray) -> tuple[Expected, ...]:
  """The mean loss of the logits x @ weight and its gradients by x and by weight, wide arguments."""
  name = "softmax_cross_entropy_with_integer_labels"
  z = x @ weight
  loss = np.mean(values(name, z, labels).values, keepdims=True)
  z_bar = gradients(name, z, labels, rows_of_mean=len(labels)).values
  x_bar, weight_bar = z_bar @ weight.T, x.T @ z_bar
  return (
    Expected(loss, np.abs(loss), "ulp"),
    Expected(x_bar, np.abs(x_bar), "u"),
    Expected(weight_bar.reshape(1, -1), np.abs(weight_bar.reshape(1, -1)), "u"),
  )


def _ulp(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The distance of neighboring numbers of `dtype` at `size`."""
  info = cast(Any, jnp.finfo(dtype))
  _, exponent = np.frexp(size)  # size = m 2^exponent, m in [1/2, 1)
  return np.ldexp(np.ones_like(size), np.maximum(exponent - 1, info.minexp) - info.nmant)


def errors(actual: np.ndarray, expected: Expected, dtype: np.dtype) -> tuple[float, float]:
  """The worst error in the expected unit, and the worst relative error.

  u is one rounding error of `dtype`, half the distance from 1 to the next number. What is smaller
  than 1e8 times the smallest normal number (1e-30 in float32), where XLA's exp is coarse, may be
  off or flush to zero: it does not count. An infinity or a NaN makes both errors infinite, and they
  are NaN where nothing counts.
  """
  info = cast(Any, jnp.finfo(dtype))
  difference = np.abs(wide(actual, dtype).reshape(expected.values.shape) - expected.values)
  size = expected.sizes
  # float16 has no such range to give away.
  smallest = float(info.tiny) * (1e8 if info.minexp < -100 else 1)
  if expected.unit == "u":
    # Scaled, so that the squares of small numbers do not underflow.
    scale = np.max(size, axis=-1, keepdims=True)
    scale = np.where(scale == 0, 1, scale)
    norm: Callable[[np.ndarray], np.ndarray] = lambda v: (
      np.sqrt(np.sum((v / scale) ** 2, axis=-1)) * scale[:, 0]
    )
    difference, size = norm(difference), norm(size)
  counts = size >= smallest
  if not np.all(np.isfinite(difference)):
    return np.inf, np.inf
  if not np.any(counts):
    return np.nan, np.nan
  difference, size = difference[counts], size[counts]
  relative = difference / size
  if expected.unit == "u":
    return float(np.max(relative) / (float(info.eps) / 2)), float(np.max(relative))
  return float(np.max(difference / _ulp(size, dtype))), float(np.max(relative))
