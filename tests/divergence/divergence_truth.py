"""Entropies and divergences of rows ``[B, K]`` with their gradients, in 60 digits."""

import mpmath
import numpy as np

DIGITS = 60


def softmax(z):
  top = max(z)
  e = [mpmath.exp(v - top) for v in z]
  total = mpmath.fsum(e)
  return [v / total for v in e]


def sum_of_products(x, y):
  return mpmath.fsum(a * b for a, b in zip(x, y, strict=True))


def exact(row):
  return [mpmath.mpf(float(v)) for v in row]


def numbers(values):
  values = [v if abs(v) > mpmath.mpf("1e-4000") else 0 for v in values]
  return np.array([np.longdouble(mpmath.nstr(v, 25)) for v in values])


def entropy(logits):
  """The entropies, and their gradients."""
  values, gradients = [], []
  with mpmath.workdps(DIGITS):
    for row in logits:
      a = softmax(exact(row))
      log_a = [mpmath.log(v) for v in a]
      h = -sum_of_products(a, log_a)
      values.append(h)
      gradients.append(numbers(-v * (w + h) for v, w in zip(a, log_a, strict=True)))
    return numbers(values), np.stack(gradients)


def kl_divergence(logits, target_logits, temperature=1):
  """The divergences, and their gradients by the logits, by the target, and by the temperature."""
  rows = []
  with mpmath.workdps(DIGITS):
    tau = mpmath.mpf(float(temperature))
    for z, w in zip(logits, target_logits, strict=True):
      z, w = ([v / tau for v in exact(row)] for row in (z, w))
      q, p = softmax(z), softmax(w)
      ratio = [mpmath.log(a) - mpmath.log(b) for a, b in zip(p, q, strict=True)]
      divergence = sum_of_products(p, ratio)
      by_z = [b - a for a, b in zip(p, q, strict=True)]
      by_w = [a * (r - divergence) for a, r in zip(p, ratio, strict=True)]
      by_tau = -(sum_of_products(z, by_z) + sum_of_products(w, by_w)) / tau
      bars = (numbers(v / tau for v in bar) for bar in (by_z, by_w))
      rows.append((numbers([divergence])[0], *bars, numbers([by_tau])[0]))
    return tuple(np.stack(parts) for parts in zip(*rows, strict=True))
