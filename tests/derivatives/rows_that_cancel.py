"""Rows and vectors on which textbook formulas lose digits, and their derivatives by mpmath."""

import mpmath
import numpy as np
from closed_forms import MATRICES

# Rows in which the textbook formulas lose some or all digits in float32, K = 6 each.
ROWS = {
  "mild": [0.3, -1.2, 2.1, 0.7, -0.4, 1.9],
  "nearly uniform": [0.01, -0.02, 0.015, 0.0, 0.003, 0.0121],
  "uniform": [7.0] * 6,
  "confident": [30.0, 0.0, 1.0, -2.0, 0.5, 0.25],
  "more confident": [-4.0, 0.5, -3.0, 80.0, 1.0, 2.0],
  "inexact difference": [0.7771234, 83.123456, -0.3330011, 2.7182817, -1.414213, 1.23456],
  "far from zero": [1e4, 1e4 - 40, 1e4 - 41.5, 1e4 - 38, 1e4 - 50, 1e4 - 39],
  "two tied": [50.1, 0.3, 50.1, -3.0, 1.0, 2.0],
  "two nearly tied": [50.1, 0.3, 50.100006, -3.0, 1.0, 2.0],
  "three likely": [50.1, 0.3, 49.4, -3.0, 50.7, 2.0],
  "all but one": [60.0, 60.5, 61.0, 60.25, -20.0, 60.75],
}
# Vectors that make a sum of a_k v_k in float32 cancel: a shift, an outlier, a one-hot.
VECTORS = {
  "random": lambda k, v: v,
  "shifted": lambda k, v: v + 1e4,
  "one-hot at the largest": lambda k, v: np.arange(len(v)) == k,
  "one-hot elsewhere": lambda k, v: np.arange(len(v)) == (k + 1) % len(v),
  "outlier at the largest": lambda k, v: v + 1e3 * (np.arange(len(v)) == k),
  "constant where likely": lambda k, v: np.where(np.arange(len(v)) % 2 == 0, 1e4, v),
}


def by_definition(z, c, v, label, t):
  """One row in 80 digits, straight from the definitions. Also |a p|, the scale of softmax_hvp."""
  with mpmath.workdps(80):
    z, c, v, t = ([mpmath.mpf(float(i)) for i in row] for row in (z, c, v, t))
    K = range(len(z))
    dot = lambda p, q: mpmath.fsum(i * j for i, j in zip(p, q, strict=True))
    s = mpmath.fsum(map(mpmath.exp, z))
    a = [mpmath.exp(i) / s for i in z]
    times_j = lambda v: [a[i] * (v[i] - dot(a, v)) for i in K]
    a_dot = times_j(v)
    j = [[a[i] * ((i == k) - a[k]) for k in K] for i in K]
    rows = {
      **dict.fromkeys(MATRICES, j),
      "log_softmax_jacobian": [[(i == k) - a[k] for k in K] for i in K],
      **dict.fromkeys(("softmax_jvp", "cross_entropy_hvp"), a_dot),
      "softmax_vjp": times_j(c),
      "softmax_hvp": [a_dot[i] * (c[i] - dot(a, c)) - a[i] * dot(a_dot, c) for i in K],
      "integer_gradient": [a[i] - (i == label) for i in K],
      "soft_gradient": [a[i] * mpmath.fsum(t) - t[i] for i in K],
    }
    scale = [a[i] * (c[i] - dot(a, c)) * (v[i] - dot(a, v)) for i in K]
    to_array = lambda v: np.array(v, dtype=object).astype(np.longdouble)
    return {name: to_array(v) for name, v in rows.items()}, np.linalg.norm(to_array(scale))
