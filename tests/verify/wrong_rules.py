"""A family of wrong derivative rules for each function, such as libraries have shipped.

`planted(function, fault)` is one of seven functions with a textbook rule and one fault in it, and
`right(function)` the same without. A function takes (x, axis=-1), the losses (x, labels, axis=-1);
the labels of a divergence are the target's logits.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax import enable_forward_mode

ONE_ARGUMENT = ("softmax", "log_softmax", "logsumexp", "entropy")
LOSSES = ("soft labels", "integer labels", "divergence")
FUNCTIONS = (*ONE_ARGUMENT, *LOSSES)


def _softmax(x, axis):
  top = jnp.max(x, axis=axis, keepdims=True)
  e = jnp.exp(x - jnp.where(jnp.isfinite(top), top, 0))
  return e / jnp.sum(e, axis=axis, keepdims=True)


def _lse(x, axis):
  top = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
  return (top + jnp.log(jnp.sum(jnp.exp(x - top), axis=axis, keepdims=True))).squeeze(axis)


def _is_label(x, labels, axis):
  return jax.nn.one_hot(labels, x.shape[axis], axis=axis, dtype=x.dtype)


def _times(t, x):
  """t x, where 0 times -inf is 0."""
  return jnp.where(t == 0, 0, t * jnp.where(t == 0, 0, x))


def _value(function, x, labels, axis):
  if function == "softmax":
    return _softmax(x, axis)
  log_a = x - jnp.expand_dims(_lse(x, axis), axis)
  if function == "log_softmax":
    return log_a
  if function == "logsumexp":
    return _lse(x, axis)
  if function == "entropy":
    return -jnp.sum(_times(jnp.exp(log_a), log_a), axis=axis)
  if function == "divergence":
    log_p = labels - jnp.expand_dims(_lse(labels, axis), axis)
    return jnp.sum(_times(jnp.exp(log_p), log_p - log_a), axis=axis)
  t = labels if function == "soft labels" else _is_label(x, labels, axis)
  return -jnp.sum(_times(t, log_a), axis=axis)


def _cotangents(function, x, labels, axis, u, fault=None):
  """The cotangents of x and of the labels, with a fault that is a slip in the formula."""
  a = _softmax(x, axis)
  row_sum = lambda y: jnp.sum(y, axis=-1 if fault == "wrong axis" else axis, keepdims=True)
  dropped, no_factor = fault == "dropped sum", fault == "missing factor"
  if fault == "cotangent ignored":
    u = jnp.ones_like(u)
  labels_bar = None
  if function == "softmax":
    x_bar = (1 if no_factor else a) * (u - (0 if dropped else row_sum(a * u)))
  elif function == "log_softmax":
    if fault == "transposed":
      x_bar = u - row_sum(a * u)
    else:
      x_bar = u - (0 if dropped else (1 if no_factor else a) * row_sum(u))
  elif function == "logsumexp":
    if dropped:
      a = jnp.exp(x - jnp.max(x, axis=axis, keepdims=True))
    if fault == "wrong axis":
      a = _softmax(x, -1)
    x_bar = (jnp.ones_like(a) if no_factor else a) * jnp.expand_dims(u, axis)
  elif function == "entropy":
    if fault == "wrong axis":
      a = _softmax(x, -1)
    log_a = _times(a, x - jnp.expand_dims(_lse(x, axis), axis))  # a log a
    mean = 0 if dropped else row_sum(log_a)
    x_bar = -((log_a / a if no_factor else log_a) - a * mean) * jnp.expand_dims(u, axis)
  elif function == "divergence":
    u, p = jnp.expand_dims(u, axis), _softmax(labels, axis)
    log_a, log_p = (y - jnp.expand_dims(_lse(y, axis), axis) for y in (x, labels))
    ratio = jnp.where(p == 0, 0, log_p - jnp.where(p == 0, 0, log_a))
    labels_bar = p * (ratio - jnp.sum(p * ratio, axis=axis, keepdims=True)) * u
    if fault == "label off by one":
      p = jnp.roll(p, 1, axis)
    if fault == "wrong axis":
      a = _softmax(x, -1)
    x_bar = ((0 if dropped else a) - p) * u * (0.5 if no_factor else 1)
  else:
    u = jnp.expand_dims(u, axis)
    index = labels
    if fault == "label off by one":
      index = jnp.roll(labels, 1, axis) if function == "soft labels" else labels + 1
    if fault == "wrong axis":
      a = _softmax(x, -1)
    if function == "soft labels":
      total = 1 if dropped else row_sum(labels)
      x_bar = (a * total - index) * u * (0.5 if no_factor else 1)
      log_a = x - jnp.expand_dims(_lse(x, axis), axis)
      labels_bar = -jnp.where(log_a == -jnp.inf, 0, log_a) * u
    else:
      x_bar = ((0 if dropped else a) - _is_label(x, index, axis)) * u * (0.5 if no_factor else 1)
  return x_bar, labels_bar


# Faults beyond the formula: what the rule makes of the right x_bar.


def _only_bfloat16(function, x, x_bar, axis):
  return 1.5 * x_bar if x.dtype == jnp.bfloat16 else x_bar


def _only_vmap(function, x, x_bar, axis):
  @jax.custom_batching.custom_vmap
  def identity(x_bar):
    return x_bar

  @identity.def_vmap
  def _(axis_size, in_batched, x_bar):
    return jnp.roll(x_bar, 1, axis=0), True  # each element gets the cotangent of another

  return identity(x_bar)


def _only_infinite_rows(function, x, x_bar, axis):
  infinite = jnp.any(x == -jnp.inf, axis=axis, keepdims=True)
  return jnp.where(infinite, 1.5 * x_bar, x_bar)


def _nan_in_infinite_rows(function, x, x_bar, axis):
  return x_bar + (x - x) * 0


def _one_row(function, x, x_bar, axis):
  rows = x_bar.reshape(-1, x_bar.shape[-1]) if x_bar.ndim > 1 else x_bar[:, None]
  return rows.at[-1].multiply(-1).reshape(x_bar.shape)


AFTER = {
  "sign": lambda function, x, x_bar, axis: -x_bar,
  "zero": lambda function, x, x_bar, axis: 0 * x_bar,
  "only bfloat16": _only_bfloat16,
  "only under vmap": _only_vmap,
  "only rows with -inf": _only_infinite_rows,
  "NaN in rows with -inf": _nan_in_infinite_rows,
  "one row": _one_row,
}
FORMULA = {
  "dropped sum": FUNCTIONS,
  "missing factor": FUNCTIONS,
  "cotangent ignored": FUNCTIONS,
  "transposed": ("log_softmax",),  # the Jacobian of softmax is symmetric
  "label off by one": LOSSES,
  "wrong axis": FUNCTIONS,
}
OTHER = {
  "labels without gradient": ("soft labels", "divergence"),
  "second output ignored": FUNCTIONS,
  "mean for sum": FUNCTIONS[1:],  # the sum of a softmax is constant
  "stale residual": FUNCTIONS,
  "wrong forward": FUNCTIONS,
  "wrong second order": FUNCTIONS,
}
ALL = [
  (function, fault)
  for faults in (dict.fromkeys(AFTER, FUNCTIONS), FORMULA, OTHER)
  for fault, functions in faults.items()
  for function in functions
]


# Faults that only second derivatives show, and only at special arguments.
SPECIAL = ("coefficient of 0", "NaN in rows that do not count")


def weighted(function, fault=None):
  """c times the function in rows that count, 0 elsewhere, with one of these faults or none.

  It takes (x, labels, c, counts), with labels of None for functions of one argument.
  """

  def primal(x, labels, c, counts):
    y = _value(function, x, labels, -1)
    return jnp.where(_rows(counts, y), c * y, 0)

  def bwd(residuals, u):
    x, labels, c, counts = residuals
    if fault != "NaN in rows that do not count":  # Then only the result is replaced below.
      x = jnp.where(_rows(counts, x), x, 0)
    u = jnp.where(_rows(counts, u), u, 0)
    c_bar = jnp.sum(u * jnp.where(_rows(counts, u), _value(function, x, labels, -1), 0))
    if fault == "coefficient of 0":
      c = jnp.where(c == 0, 0, c)
    x_bar, labels_bar = _cotangents(function, x, labels, -1, c * u, fault)
    x_bar = jnp.where(_rows(counts, x), x_bar, 0)
    if labels_bar is not None:
      labels_bar = jnp.where(_rows(counts, labels_bar), labels_bar, 0)
    return x_bar, labels_bar, c_bar, None

  rule = jax.custom_vjp(primal)
  rule.defvjp(lambda *args: (primal(*args), args), bwd)
  return enable_forward_mode(rule)


def _rows(counts, y):
  return counts.reshape(counts.shape + (1,) * (y.ndim - counts.ndim))


def weighted_arguments(function, shape, fault=None):
  """Arguments at which the fault shows; arguments like any others without one."""
  x, *labels = arguments(function, shape)
  c, counts = np.float32(0 if fault == "coefficient of 0" else 0.5), np.arange(shape[0]) > 0
  if fault == "NaN in rows that do not count":
    x = x.at[0].set(np.nan)
  return x, labels[0] if labels else None, c, counts


def right(function):
  """The function without a fault."""
  return planted(function, None)


def planted(function, fault):
  """The function with the fault in its rule."""
  stale = {}
  reduced, pair = fault == "mean for sum", fault == "second output ignored"

  def primal(x, labels, axis):
    y = _value(function, x, labels, axis)
    if pair:
      return y, _lse(x, axis)
    return jnp.sum(y) if reduced else y

  def fwd(x, labels, axis):
    saved = x
    if fault == "stale residual" and not isinstance(x, jax.core.Tracer):
      saved = stale.setdefault((x.shape, x.dtype), x)
    if fault == "wrong second order":
      saved = jax.lax.stop_gradient(x)
    return primal(x, labels, axis), (saved, labels)

  def bwd(axis, residuals, u):
    x, labels = residuals
    if pair:
      u, _ = u  # the cotangent of the second output
    if reduced:
      shape = jax.eval_shape(lambda: _value(function, x, labels, axis)).shape
      u = jnp.broadcast_to(u / math.prod(shape), shape)
    x_bar, labels_bar = _cotangents(function, x, labels, axis, u, fault)
    if fault in AFTER:
      x_bar = AFTER[fault](function, x, x_bar, axis)
    if fault == "labels without gradient":
      labels_bar = jnp.zeros_like(labels)
    return x_bar.astype(x.dtype), labels_bar

  def tangent(axis, residuals, dots):
    x, labels = residuals
    x_dot, _ = dots
    out = jax.jvp(lambda x: _value(function, x, labels, axis), (x,), (x_dot,))[1]
    return -out

  rule = jax.custom_vjp(primal, nondiff_argnums=(2,))
  rule.defvjp(fwd, bwd)
  f = enable_forward_mode(rule, tangent=tangent if fault == "wrong forward" else None)
  if fault == "stale residual":
    f = rule  # whose fwd sees the arrays themselves without jit

  if function in ONE_ARGUMENT:
    named = lambda x, axis=-1: f(x, None, axis)
  else:
    named = lambda x, labels, axis=-1: f(x, labels, axis)
  named.__name__ = f"{function}, {fault}" if fault else function
  return named


def arguments(function, shape, axis=-1, dtype="float32", seed=0, scale=1.0):
  """Random logits, and labels for the losses."""
  rng = np.random.default_rng([seed, *shape])
  x = jnp.asarray(scale * rng.standard_normal(shape), dtype)
  if function == "soft labels":
    return x, jnp.asarray(rng.uniform(0.1, 1, shape), dtype)
  if function == "divergence":
    return x, jnp.asarray(scale * rng.standard_normal(shape), dtype)
  if function == "integer labels":
    rows = np.delete(shape, axis)
    return x, jnp.asarray(rng.integers(0, shape[axis], rows), "int32")
  return (x,)


def with_infinity(function, args):
  """The same with a logit of -inf at the end (where no label is)."""
  x, *labels = args
  x = x.at[(-1,) * x.ndim].set(-jnp.inf)
  if function == "divergence":
    labels = [labels[0].at[(-1,) * x.ndim].set(-jnp.inf)]
  elif labels and jnp.issubdtype(labels[0].dtype, jnp.floating):
    labels = [labels[0].at[(-1,) * x.ndim].set(0)]
  elif labels:
    labels = [jnp.zeros_like(labels[0])]
  return x, *labels
