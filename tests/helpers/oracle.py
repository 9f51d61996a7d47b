"""The core functions in plain NumPy and extended precision: one row at a time, nothing clever.

A row is a vector z of logits with the masked ones left out. Each rule below returns its output y
and then dy/dz (and dy/dt for a second argument t), the closed forms of the article. Only one thing
asks for care: where a_i is close to 1, 1 - a_i cancels in extended precision too, so it is always
summed from the other probabilities.

`linearize` lifts a rule to arrays: any axis, a mask, labels and weights that broadcast.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np


def _others(v):
  """For every i the sum of v over all entries but the i-th."""
  return (1 - np.eye(len(v), dtype=v.dtype)) @ v


def _matrix(diagonal, off_diagonal):
  return np.where(np.eye(len(diagonal), dtype=bool), np.diag(diagonal), off_diagonal)


def _log_probabilities(z):
  """log a_i = (z_i - max z) - log(1 + r), r the sum of exp(z - max z) over all but one maximum."""
  if z.size == 0:
    return z
  r = np.sum(np.exp(np.sort(z)[:-1] - np.max(z)))
  return (z - np.max(z)) - np.log1p(r)


def _softmax(z):
  """Steps 3 to 5: da_i/dz_i = a_i (1 - a_i), da_i/dz_j = -a_i a_j."""
  a = np.exp(_log_probabilities(z))
  return a, _matrix(a * _others(a), -np.outer(a, a))


def _log_softmax(z):
  """d log a_i / dz_j = delta_ij - a_j."""
  log_a = _log_probabilities(z)
  a = np.exp(log_a)
  return log_a, _matrix(_others(a), -a)


def _logsumexp(z, b):
  """log |s| with s = sum_k b_k exp(z_k); by z b_j exp(z_j) / s, by b exp(z_j) / s."""
  if not np.any(b):
    return -np.inf, np.zeros_like(z), np.zeros_like(z)
  largest = np.max(z[b != 0])
  exp = np.exp(z - largest)
  s = np.sum(exp[b != 0] * b[b != 0])
  # Without weights s is 1 + r, and log1p keeps the digits of a small r.
  log_s = -np.max(_log_probabilities(z)) if np.all(b == 1) else np.log(np.abs(s))
  return largest + log_s, np.where(b == 0, 0, b * exp / s), exp / s


def _softmax_cross_entropy(z, t):
  """Step 6 for any t: -sum_k t_k log a_k, where a t_k of 0 adds 0; by t it is -log a_j.

  By z it is a_j sum_k t_k - t_j. The terms with k = j are -t_j (1 - a_j).
  """
  log_a = _log_probabilities(z)
  a = np.exp(log_a)
  loss = -np.sum(t[t != 0] * log_a[t != 0])
  return loss, a * _others(t) - t * _others(a), -log_a


def _softmax_cross_entropy_with_integer_labels(z, is_label):
  """Step 6: -log a_t and a_j - delta_tj. A masked label is no entry of the row: +inf, a_j."""
  log_a = _log_probabilities(z)
  a = np.exp(log_a)
  loss = np.sum(-log_a[is_label]) if np.any(is_label) or z.size == 0 else np.inf
  return loss, np.where(is_label, -_others(a), a)


def _softmax_entropy(z):
  """-sum_k a_k log a_k; by z -a_j (log a_j + H), which is -sum_k a_j a_k (log a_j - log a_k)."""
  log_a = _log_probabilities(z)
  a = np.exp(log_a)
  log_a = np.where(a == 0, 0, log_a)
  return -np.sum(a * log_a), -a * ((log_a[:, None] - log_a) @ a)


def _softmax_kl_divergence(z, w):
  """sum_k p_k l_k with l = log p - log q; by z q - p, by w p_j (l_j - KL).

  These are sum_k (q_k - p_k + p_k l_k), with no term below 0, and sum_k p_j p_k (l_j - l_k). Where
  p is 0, so is l.
  """
  log_q, log_p = _log_probabilities(z), _log_probabilities(w)
  q, p = np.exp(log_q), np.exp(log_p)
  log_ratio = np.where(p == 0, 0, np.where(p == 0, 0, log_p) - np.where(p == 0, 0, log_q))
  by_w = p * ((log_ratio[:, None] - log_ratio) @ p)
  return np.sum(q - p + p * log_ratio), q - p, by_w


_RULES = {
  f.__name__.removeprefix("_"): f
  for f in (
    _softmax,
    _log_softmax,
    _logsumexp,
    _softmax_cross_entropy,
    _softmax_cross_entropy_with_integer_labels,
    _softmax_entropy,
    _softmax_kl_divergence,
  )
}
_FILL = {"softmax": 0, "log_softmax": -np.inf}  # the output at masked entries; the others reduce


def _is_loss(name):
  """Whether results are float32 numbers, and a mask may have one value per row."""
  return "entropy" in name or "divergence" in name


def _axes(axis, ndim):
  axes = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
  return tuple(i % ndim for i in axes)


def _to_rows(v, shape, axes):
  """Returns v, broadcast to shape, as [B, K]: `axes` in the last place, in their given order."""
  batch = tuple(i for i in range(len(shape)) if i not in axes)
  sizes = [int(np.prod([shape[i] for i in group])) for group in (batch, axes)]
  return np.broadcast_to(v, shape).transpose(batch + axes).reshape(sizes)


def _from_rows(rows, shape, axes):
  order = (*(i for i in range(len(shape)) if i not in axes), *axes)
  return rows.reshape([shape[i] for i in order]).transpose(np.argsort(order).astype(int))


def _sum_to_shape(v, shape):
  """The transpose of broadcasting from `shape`."""
  v = v.sum(tuple(range(v.ndim - len(shape))))
  return v.sum(tuple(i for i, n in enumerate(shape) if n != v.shape[i]), keepdims=True)


def wide(x):
  """x in extended precision (by way of float64, which NumPy knows how to make of a bfloat16)."""
  x = np.asarray(x)
  return x if x.dtype == np.longdouble else x.astype(np.float64).astype(np.longdouble)


def linearize(name, x, second=None, *, axis=-1, where=None, keepdims=False):
  """Returns y, jvp and vjp of the function called `name` at x.

  `second` is logsumexp's b or the labels of a loss. jvp(x_dot, second_dot) is the tangent of y and
  vjp(y_bar) the tuple of cotangents. A second argument that is missing or an integer label has
  neither tangent nor cotangent.
  """
  x = wide(x)
  axes = _axes(axis, x.ndim)
  of = lambda v: _to_rows(v, x.shape, axes)
  z = of(x)

  mask = np.asarray(True if where is None else where)
  if _is_loss(name) and mask.ndim not in (0, x.ndim):
    mask = np.expand_dims(mask, axes)  # one value per row
  mask = of(mask)

  shapes = [x.shape]  # of the arguments that are differentiated
  if name.endswith("integer_labels"):
    seconds = [np.arange(z.shape[1]) == np.asarray(second, np.int64).reshape(-1, 1)]
  elif second is not None:
    seconds = [of(wide(second))]
    shapes.append(np.shape(second))
  else:
    seconds = [np.ones_like(z)] if name == "logsumexp" else []

  outputs = [_RULES[name](z[i, m], *(s[i, m] for s in seconds)) for i, m in enumerate(mask)]

  def assemble(rows, fill):
    """From one output per row (a vector of the unmasked entries or a number) to an array."""
    if name in _FILL:
      y = np.full_like(z, fill)
      for i, row in enumerate(rows):
        y[i, mask[i]] = row
      return _from_rows(y, x.shape, axes)
    y = np.array(rows, np.longdouble).reshape([n for i, n in enumerate(x.shape) if i not in axes])
    return np.expand_dims(y, axes) if keepdims else y

  def jvp(*dots):
    dots = [of(wide(dot)) for dot in dots]
    rows = [
      sum(by @ dot[i, mask[i]] for by, dot in zip(output[1:], dots, strict=False))
      for i, output in enumerate(outputs)
    ]
    return assemble(rows, 0)

  def vjp(y_bar):
    y_bar = of(wide(y_bar)) if name in _FILL else wide(y_bar).reshape(-1)
    bars = [np.zeros_like(z) for _ in shapes]
    for i, output in enumerate(outputs):
      for bar, by in zip(bars, output[1:], strict=False):
        bar[i, mask[i]] = np.dot(y_bar[i, mask[i]] if name in _FILL else y_bar[i], by)
    arrays = [_from_rows(bar, x.shape, axes) for bar in bars]
    return tuple(_sum_to_shape(v, shape) for v, shape in zip(arrays, shapes, strict=True))

  return assemble([output[0] for output in outputs], _FILL.get(name)), jvp, vjp


def jacobian(name, z, second=None):
  """dy/dz for one row z."""
  _, jvp, _ = linearize(name, z, second)
  return np.stack([jvp(e) for e in np.eye(len(z))], axis=-1)


def hessian(name, z, second=None):
  """d2y/dz2 for one row z, all made of the softmax a and its Jacobian J. A b must be positive."""
  z = wide(z)
  if name == "logsumexp" and second is not None:
    z = z + np.log(wide(second))
  a, j = _softmax(z)
  if name == "softmax":  # of a_i (delta_ij - a_j) by z_k
    return np.einsum("ij,ik->ijk", np.eye(len(a)), j) - (
      np.einsum("ik,j->ijk", j, a) + np.einsum("i,jk->ijk", a, j)
    )
  if name == "log_softmax":  # of delta_ij - a_j
    return np.broadcast_to(-j, (len(a), *j.shape))
  if name == "softmax_entropy":  # of g_j = -a_j (log a_j + H)
    entropy, g = _softmax_entropy(z)
    log_a = np.log(np.where(a == 0, 1, a))
    return -j * (log_a + entropy + 1)[:, None] - np.outer(a, g)
  return j * np.sum(wide(second)) if name == "softmax_cross_entropy" else j


def relative_error(actual, expected):
  """The norm of the difference relative to the norm of `expected`, over the finite entries.

  Infinite where the shapes differ, where entries that are not finite do not match exactly, or where
  `expected` is zero and `actual` is not.
  """
  actual, expected = wide(actual), wide(expected)
  if actual.shape != expected.shape:
    return np.inf
  finite = np.isfinite(expected)
  if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
    return np.inf
  difference = np.sqrt(np.sum((actual[finite] - expected[finite]) ** 2))
  norm = np.sqrt(np.sum(expected[finite] ** 2))
  if np.isnan(difference):
    return np.inf
  return 0.0 if difference == 0 else float(difference / norm) if norm else np.inf


# Comparison of a JAX function with the oracle.


@contextlib.contextmanager
def default_promotion():
  """Switches JAX's default promotion on, for peers and formulas that rely on it."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def tolerance(dtype):
  """A few roundings; for sixteen bits the single one at the end, as the work is done in float32."""
  eps = float(jnp.finfo(dtype).eps)
  return 0.51 * eps if jnp.finfo(dtype).bits == 16 else 12 * eps


def random(seed, shape, dtype=np.float32, scale=1.0):
  """Normal numbers as a NumPy array, reproducible and without compiling anything."""
  return (scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivatives(f, peer, args, args_dot, y_bar):
  """((y, *args_bar), y_dot) of f and (y, *args_bar) of its peer, in one compilation."""

  def reverse(f):
    y, pull = jax.vjp(f, *args)
    return y, *pull(y_bar.astype(y.dtype))

  return reverse(f), jax.jvp(f, args, args_dot)[1], reverse(peer) if peer else ()


def check(name, f, peer, x, second=None, *, loosen=1, **options):
  """Asserts value, vjp and jvp of f at x against the oracle, and against the autodiff of `peer`.

  f and its peer take x, `second` if there is one, and the options. The tangents and cotangents are
  random and not one. `loosen` multiplies the tolerance of the derivatives in sixteen bits.
  """
  args = (jnp.asarray(x),)
  peer = peer and default_promotion()(peer)
  if second is None:
    bind = lambda f, up: lambda x: f(up(x), **options)
  elif jnp.issubdtype(jnp.result_type(second), jnp.integer):
    bind = lambda f, up: lambda x: f(up(x), second, **options)
  else:
    args += (jnp.asarray(second),)
    bind = lambda f, up: lambda x, t: f(up(x), up(t), **options)
  at_least_float32 = lambda dtype: default_promotion()(jnp.promote_types)(dtype, jnp.float32)
  up = lambda v: v.astype(at_least_float32(v.dtype))  # peers do not do so themselves

  y, jvp, vjp = linearize(name, x, second, **options)
  dtype = at_least_float32(args[0].dtype) if _is_loss(name) else jnp.result_type(*args)
  args_dot = tuple(jnp.asarray(random(i, v.shape, v.dtype)) for i, v in enumerate(args, start=7))
  y_bar = jnp.asarray(random(9, y.shape, dtype))

  ours, y_dot, theirs = _derivatives(
    bind(f, lambda v: v), peer and bind(peer, up), args, args_dot, y_bar
  )
  assert [v.dtype for v in (*ours, y_dot)] == [dtype, *(v.dtype for v in args), dtype]

  parts = ("y", *(f"args_bar[{i}]" for i in range(len(args))), "y_dot")
  actual, expected = (*ours, y_dot), (y, *vjp(y_bar)[: len(args)], jvp(*args_dot))
  for i, part in enumerate(parts):
    sixteen_bits = jnp.finfo(actual[i].dtype).bits == 16
    allowed = tolerance(actual[i].dtype) * (loosen if sixteen_bits and part != "y" else 1)
    assert relative_error(actual[i], expected[i]) <= allowed, (name, part)
    if i < len(theirs):
      assert relative_error(actual[i], theirs[i]) <= 8 * allowed, (name, part, "peer")
