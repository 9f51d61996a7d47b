"""Every function of one masked row in extended precision, and the comparison with it."""

import jax
import jax.numpy as jnp
import numpy as np
from drawn_cases import INF, NAN

import softmax_jax
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy


def functions_and_gradients(z, mask, labels, shares):
  """Each function of the masked logits, and the gradient of those with one number per row."""
  per_row = {
    "logsumexp": lambda z: softmax_jax.logsumexp(z, axis=-1, where=mask),
    "integer": lambda z: cross_entropy(z, labels, where=mask),
    "soft": lambda z: softmax_jax.softmax_cross_entropy(z, shares, where=mask),
  }
  softmax, log_softmax = softmax_jax.softmax, softmax_jax.log_softmax
  values = {"softmax": softmax(z, where=mask), "log_softmax": log_softmax(z, where=mask)}
  values |= {name: f(z) for name, f in per_row.items()}
  gradients = {name: jax.grad(lambda z, f=f: f(z).sum())(z) for name, f in per_row.items()}
  return values, gradients


def of_one_row(z, label, shares, wide):
  """The same for the unmasked entries of one row, in extended precision.

  ``label`` is None where it is masked, and a result where that is left open.
  """
  size = len(z)
  z, t = z.astype(np.longdouble), shares.astype(np.longdouble)
  one_hot = np.arange(size) == (-1 if label is None else label)
  if size == 0:
    empty = np.zeros(0)
    values = {"softmax": empty, "log_softmax": empty, "logsumexp": -INF, "integer": 0, "soft": 0}
    return values, {"logsumexp": empty, "integer": empty, "soft": empty}
  top = z.max()
  if not np.isfinite(top):
    bad = np.full(size, NAN)
    integer = INF if top == INF and label is not None and z[label] != INF else NAN
    values = {"softmax": bad, "log_softmax": bad, "logsumexp": top, "integer": integer, "soft": NAN}
    if label is None:
      values["integer"] = None
    if not t.any():
      values["soft"] = None
    zero = np.zeros(size) if top == -INF else None
    return values, {"logsumexp": zero, "integer": None, "soft": None}
  k = np.argmax(z)
  others = np.exp(z - top)
  others[k] = 0
  rest = others.sum()
  e = others + (np.arange(size) == k)
  a, log_sum = e / (1 + rest), np.log1p(rest)
  minus_log_a = (top - z) + log_sum
  # 1 - a_k as the sum of the others, which keeps its digits where class k is dominant.
  complement = np.where(np.arange(size) == k, rest, 1 + rest - e) / (1 + rest)
  values = {
    "softmax": a,
    "log_softmax": -minus_log_a,
    "logsumexp": top + log_sum,
    "integer": INF if label is None else minus_log_a[label],
    # Each term overflows where its difference of logits does.
    "soft": sum(p * as_dtype(c, wide) for p, c in zip(t, minus_log_a, strict=True) if p),
  }
  gradients = {
    "logsumexp": a,
    "integer": None if label is None else np.where(one_hot, -complement, a),
    "soft": a * (t.sum() - t) - complement * t,
  }
  return values, gradients


def as_dtype(x, dtype):
  """``x`` rounded to a dtype, as an array of wider numbers."""
  with np.errstate(over="ignore", under="ignore"):
    return np.asarray(x).astype(jnp.finfo(dtype).dtype).astype(np.longdouble)


def assert_entries(actual, expected, dtype, bound, terms=0):
  """Equal to ``bound`` units of rounding beyond what underflows, with the same infinities and NaN.

  A unit is one of the result or of the ``terms`` that it is a sum of.
  """
  limits = jnp.finfo(dtype)
  actual, expected = as_dtype(actual, dtype), as_dtype(expected, dtype)
  finite = np.isfinite(expected)
  # A result near the largest number may round to infinity, and the other way round.
  near_largest = np.abs(np.where(finite, expected, limits.max)) >= 0.99 * float(limits.max)
  special = ~finite & ~(near_largest & np.isinf(expected) & (np.abs(actual) >= limits.max))
  np.testing.assert_array_equal(actual[special], expected[special])
  x, y = actual[finite & ~near_largest], expected[finite & ~near_largest]
  units = np.maximum(np.abs(y), terms) * (float(limits.eps) / 2) + 4 * float(limits.tiny)
  assert np.all(np.abs(x - y) <= bound * units), (x, y)


# Rows of up to 16 entries of float32 have errors of up to 66 units, as `softmax` says.
BOUNDS = {"softmax": 140, "log_softmax": 16, "logsumexp": 16, "integer": 16, "soft": 24}


def assert_gradient(actual, expected, terms, dtype):
  """In norm, relative to that of the gradient or of the terms that it is a difference of."""
  assert np.all(np.isfinite(actual.astype(float)))
  limits = jnp.finfo(dtype)
  size = max(np.linalg.norm(expected.astype(float)), terms)
  floor = 4 * len(expected) * float(limits.smallest_normal)
  difference = np.linalg.norm((actual.astype(np.longdouble) - expected).astype(float))
  assert difference <= 64 * float(limits.eps) * size + floor, (actual, expected)
