"""Values and derivatives of rows in extended precision, and the size of their terms."""

import numpy as np


def wide(x):
  return np.asarray(x, np.longdouble)


def at(x, index):
  return np.take_along_axis(x, index[:, None], -1)


def truth(x, label, c):
  """Values and derivatives for rows x, class indices and (co)tangents c of x.

  a_t is 1 - r / S at the largest class, which is therefore kept apart; the mean of the cotangent is
  taken after centering at that class, as both would cancel in extended precision too.
  """
  x, c = wide(x), wide(c)
  top = x.argmax(-1)
  e = np.exp(x - at(x, top))
  others = e.copy()
  np.put_along_axis(others, top[:, None], 0, -1)
  r = others.sum(-1, keepdims=True)
  a = e / (1 + r)
  log_a = (x - at(x, top)) - np.log1p(r)
  rest = 1 - a
  np.put_along_axis(rest, top[:, None], r / (1 + r), -1)
  gradient = a.copy()
  np.put_along_axis(gradient, label[:, None], -at(rest, label), -1)
  centered = c - at(c, top)
  mean = (a * centered).sum(-1, keepdims=True)
  log_bar, bar_scale = without_own(c, a, rest, top, sum_of=lambda c: c, factor=a)
  log_dot, dot_scale = without_own(c, a, rest, top, sum_of=lambda c: a * c, factor=np.ones_like(a))
  from_label = c - at(c, label)
  return {
    "softmax": a,
    "log_softmax": log_a,
    "logsumexp": (at(x, top) + np.log1p(r))[:, 0],
    "nll": -at(log_a, label)[:, 0],
    "gradient": gradient,
    "softmax_bar": a * (centered - mean),
    "log_softmax_bar": log_bar,
    "log_softmax_bar_scale": bar_scale,
    "log_softmax_dot": log_dot,
    "log_softmax_dot_scale": dot_scale,
    "nll_dot": (a * from_label).sum(-1),
    "nll_dot_scale": (a * np.abs(from_label)).sum(-1),
    "lse_dot_scale": (a * np.abs(c)).sum(-1),
    "lse_dot": (a * c).sum(-1),
  }


def without_own(c, a, rest, top, sum_of, factor):
  """``c_j - factor_j sum_i sum_of(c)_i``, and the size of its terms for each row.

  At the largest class it is ``(1 - a_t) c_t - factor_t`` times the sum over the others.
  """

  def terms(c):
    terms = sum_of(c)
    others = terms.copy()
    np.put_along_axis(others, top[:, None], 0, -1)
    own, all_ = c.copy(), terms.sum(-1, keepdims=True) * factor
    np.put_along_axis(own, top[:, None], at(rest * c, top), -1)
    np.put_along_axis(all_, top[:, None], others.sum(-1, keepdims=True) * at(factor, top), -1)
    return own, all_

  own, all_ = terms(c)
  return own - all_, np.linalg.norm(sum(terms(np.abs(c))).astype(np.float64), axis=-1)
