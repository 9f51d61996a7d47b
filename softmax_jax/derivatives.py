r"""The closed forms: the derivatives of softmax and of the losses built on it.

Notation: z is a row of K logits and a its softmax, which always run along the last axis; any axes
before it are batch axes ``*B``. The code of the whole package cites these steps as "seed step 1" to
"seed step 6":

1. The definition: ``a_j = e^{z_j} / S`` with the normalizer ``S = sum_k e^{z_k}``.
2. The aim: da_i/dz_j for all i and j, as each a_i depends on every z_j through S.
3. For i = j, by the quotient rule: ``da_i/dz_i = e^{z_i} (S - e^{z_i}) / S^2 = a_i (1 - a_i)``.
4. For i != j: ``da_i/dz_j = -e^{z_i} e^{z_j} / S^2 = -a_i a_j``.
5. Both in one formula: ``J_ij = da_i/dz_j = a_i (delta_ij - a_j)``.
6. With the cross-entropy ``L = -sum_i t_i log a_i`` of a label t that sums to 1, the chain rule
   ``dL/dz_j = sum_i (-t_i / a_i) J_ij`` leaves ``dL/dz_j = a_j - t_j``.

All functions here are built from step 5 as a matrix and from the projection P inside it:

    J = diag(a) - a a^T = J^T = diag(a) P,    P = I - 1 a^T.

log softmax has the Jacobian P, logsumexp the gradient a and the Hessian J, and cross-entropy the
gradient a - t and again the Hessian J. So has the KL divergence from a given distribution t to a,
and there J is the Fisher information of the logits. The entropy of a has the gradient -J z.

The functions named after a matrix return it; the products with a vector (``*_jvp``, ``*_vjp``,
``*_hvp``) never build a K x K matrix. All are plain JAX, differentiable further in both modes, and
written without `softmax_jax.softmax`, so that each can check the other.

For every function:

* Results have the dtype of the logits. What is sixteen bits wide is computed in float32, narrower
  floats are refused.
* An entry of -inf has probability 0 and all derivatives of a are exactly 0 there. A row with NaN or
  +inf, or of -inf alone, gives NaN in that row only. K = 0 and batches of size 0 give empty arrays.
* The error, relative to the norm of the result, is a few units of rounding (u = 2**-24 in float32)
  also in rows where one probability rounds to 1 and the result is tiny (until it underflows).
  Exceptions, which come from the problem and not from the formula, are named where they occur.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from softmax_jax import _devices as devices
from softmax_jax._arguments import Arguments, compute_dtype

__all__ = [
  "cross_entropy_gradient",
  "cross_entropy_hessian",
  "cross_entropy_hvp",
  "log_softmax_jacobian",
  "logsumexp_hessian",
  "softmax_hvp",
  "softmax_jacobian",
  "softmax_jvp",
  "softmax_vjp",
]


# --- softmax -------------------------------------------------------------------------------------


def softmax_jacobian(x: ArrayLike) -> jax.Array:
  r"""The Jacobian of softmax.

  .. math:: J_{ij} = \frac{\partial a_i}{\partial x_j} = a_i (\delta_{ij} - a_j), \qquad
    J = \operatorname{diag}(a) - a a^T

  It is symmetric, its rows sum to zero and its eigenvalues are not negative. For the largest
  probability 1 - a_i is formed as the sum of the others, so that no digit cancels.

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.

  Returns:
    Array ``[*B, K, K]`` of the (floating) dtype of ``x``, the output along the second-to-last axis.

  Raises:
    TypeError: if ``x`` is not an array of real numbers.
    ValueError: if ``x`` is 0-d.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import softmax_jacobian
    >>> print(softmax_jacobian(jnp.array([0.0, 0.0])))
    [[ 0.25 -0.25]
     [-0.25  0.25]]

  Source: seed steps 2 to 5; step 3 is the diagonal, step 4 the rest.
  """
  x = _Arguments("softmax_jacobian").as_rows("x", x)
  return _jacobian(_softmax(x)).astype(x.dtype)


def softmax_jvp(x: ArrayLike, x_dot: ArrayLike) -> jax.Array:
  r"""The tangent of softmax: its Jacobian times ``x_dot``.

  .. math:: \dot a_i = \sum_j J_{ij} \dot x_j = a_i \Big(\dot x_i - \sum_k a_k \dot x_k\Big)

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.
    x_dot: tangent of ``x``, of the same shape and any real dtype, differentiable (linear).

  Returns:
    Array ``[*B, K]`` of the (floating) dtype of ``x``.

  Raises:
    TypeError: if an argument is not an array of real numbers.
    ValueError: if ``x`` is 0-d or ``x_dot`` has another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import softmax_jvp
    >>> print(softmax_jvp(jnp.array([0.0, 0.0]), jnp.array([2.0, 1.0])))
    [ 0.25 -0.25]

  Source: seed step 5.
  """
  arguments = _Arguments("softmax_jvp")
  x = arguments.as_rows("x", x)
  x_dot = arguments.as_vector("x_dot", x_dot, "x", x)
  x, x_dot = devices.align(x, x_dot)
  return _times_jacobian(_softmax(x, x_dot), x_dot).astype(x.dtype)


def softmax_vjp(x: ArrayLike, y_bar: ArrayLike) -> jax.Array:
  r"""The cotangent of softmax's input: its transposed Jacobian times ``y_bar``.

  .. math:: \bar x_j = \sum_i \bar y_i J_{ij} = a_j \Big(\bar y_j - \sum_k a_k \bar y_k\Big)

  J is symmetric (seed step 5), so this is the same expression as `softmax_jvp`.

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.
    y_bar: cotangent of the softmax of ``x``, of the same shape and any real dtype, differentiable
      (linear).

  Returns:
    Array ``[*B, K]`` of the (floating) dtype of ``x``.

  Raises:
    TypeError: if an argument is not an array of real numbers.
    ValueError: if ``x`` is 0-d or ``y_bar`` has another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import softmax_vjp
    >>> print(softmax_vjp(jnp.array([0.0, 0.0]), jnp.array([2.0, 1.0])))
    [ 0.25 -0.25]

  Source: seed step 5.
  """
  arguments = _Arguments("softmax_vjp")
  x = arguments.as_rows("x", x)
  y_bar = arguments.as_vector("y_bar", y_bar, "x", x)
  x, y_bar = devices.align(x, y_bar)
  return _times_jacobian(_softmax(x, y_bar), y_bar).astype(x.dtype)


# The derivative of g = softmax_vjp(x, c), g_i = a_i (c_i - s) with s = <a, c>, along v. By step 5
#   a_dot = a * w,   w = P v = v - <a, v>,   so <a, w> = 0 and
#   s_dot = <a * w, c> = <a, w * (c - s)>,
#   g_dot_i = a_dot_i (c_i - s) - a_i s_dot = a_i (p_i - <a, p>),   p = (P c) * (P v).
# That is J p: the same product once more, and it is symmetric in c and v.
def softmax_hvp(x: ArrayLike, y_bar: ArrayLike, x_dot: ArrayLike) -> jax.Array:
  r"""The derivative of ``softmax_vjp(x, y_bar)`` along ``x_dot``.

  It is the product of ``x_dot`` with the Hessian of ``sum(y_bar * softmax(x))``.

  .. math:: \sum_{jk} \bar y_j \frac{\partial^2 a_j}{\partial x_i \partial x_k} \dot x_k
    = a_i \Big(p_i - \sum_k a_k p_k\Big), \qquad
    p_i = \Big(\bar y_i - \sum_k a_k \bar y_k\Big) \Big(\dot x_i - \sum_k a_k \dot x_k\Big)

  The error is a few units of rounding relative to the norm of a p. The result is smaller than that
  only where p is the same at all likely classes (exactly two tied classes give 0), and there it
  depends on the last digits of ``x``.

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.
    y_bar: cotangent of the softmax of ``x``, of the same shape and any real dtype, differentiable
      (linear).
    x_dot: tangent of ``x``, likewise. Exchanging it with ``y_bar`` does not change the result.

  Returns:
    Array ``[*B, K]`` of the (floating) dtype of ``x``.

  Raises:
    TypeError: if an argument is not an array of real numbers.
    ValueError: if ``x`` is 0-d or ``y_bar`` or ``x_dot`` has another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import softmax_hvp
    >>> y_bar, x_dot = jnp.array([3.0, 0.0, 0.0]), jnp.array([0.0, 9.0, 0.0])
    >>> with jnp.printoptions(precision=3):
    ...   print(softmax_hvp(jnp.zeros(3), y_bar, x_dot))
    [-1. -1.  2.]

  Source: seed step 5, applied twice.
  """
  arguments = _Arguments("softmax_hvp")
  x = arguments.as_rows("x", x)
  y_bar = arguments.as_vector("y_bar", y_bar, "x", x)
  x_dot = arguments.as_vector("x_dot", x_dot, "x", x)
  x, y_bar, x_dot = devices.align(x, y_bar, x_dot)
  row = _softmax(x, y_bar, x_dot)
  return _times_jacobian(row, _center(row, y_bar) * _center(row, x_dot)).astype(x.dtype)


# --- log softmax and logsumexp -------------------------------------------------------------------


def log_softmax_jacobian(x: ArrayLike) -> jax.Array:
  r"""The Jacobian of log softmax.

  .. math:: \frac{\partial \log a_i}{\partial x_j} = \frac{1}{a_i}\, a_i (\delta_{ij} - a_j)
    = \delta_{ij} - a_j, \qquad P = I - \mathbf{1} a^T

  Its rows sum to zero. It is not symmetric, and P P = P.

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.
      The formula also holds where an entry is -inf: its column is 0 but for a 1 on the diagonal.

  Returns:
    Array ``[*B, K, K]`` of the (floating) dtype of ``x``, the output along the second-to-last axis.

  Raises:
    TypeError: if ``x`` is not an array of real numbers.
    ValueError: if ``x`` is 0-d.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import log_softmax_jacobian
    >>> with jnp.printoptions(precision=3):
    ...   print(log_softmax_jacobian(jnp.log(jnp.array([1.0, 3.0]))))
    [[ 0.75 -0.75]
     [-0.25  0.25]]

  Source: seed step 5, and the chain rule of step 6.
  """
  x = _Arguments("log_softmax_jacobian").as_rows("x", x)
  row = _softmax(x)
  return _matrix(row.complement, -_across(row.a)).astype(x.dtype)


def logsumexp_hessian(x: ArrayLike) -> jax.Array:
  r"""The Hessian of logsumexp over the last axis.

  .. math:: \frac{\partial}{\partial x_i} \log \sum_k e^{x_k} = a_i, \qquad
    \frac{\partial^2}{\partial x_i \partial x_j} \log \sum_k e^{x_k}
    = \frac{\partial a_i}{\partial x_j} = a_i (\delta_{ij} - a_j)

  The gradient of logsumexp is softmax; its Hessian is therefore the Jacobian of softmax (and that
  is symmetric because it is a Hessian).

  Args:
    x: logits ``[*B, K]`` of a floating dtype, differentiable; integers promote as in `jnp.exp`.

  Returns:
    Array ``[*B, K, K]`` of the (floating) dtype of ``x``. A row of -inf alone, where logsumexp is
    -inf with derivative 0, gives 0: the only difference from `softmax_jacobian`.

  Raises:
    TypeError: if ``x`` is not an array of real numbers.
    ValueError: if ``x`` is 0-d.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import logsumexp_hessian
    >>> print(logsumexp_hessian(jnp.array([0.0, 0.0])))
    [[ 0.25 -0.25]
     [-0.25  0.25]]

  Source: seed steps 1 (the gradient) and 5.
  """
  x = _Arguments("logsumexp_hessian").as_rows("x", x)
  # The select comes before the formula, so that no NaN meets further derivatives.
  empty = jnp.all(x == -jnp.inf, axis=-1, keepdims=True)
  jacobian = _jacobian(_softmax(jnp.where(empty, jnp.zeros_like(x), x)))
  return jnp.where(empty[..., None], 0, jacobian).astype(x.dtype)


# --- cross-entropy -------------------------------------------------------------------------------


def cross_entropy_gradient(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  r"""The gradient of cross-entropy in the logits: the prediction minus the label.

  .. math:: L = -\sum_k t_k \log a_k, \qquad
    \frac{\partial L}{\partial z_j} = -\sum_k t_k (\delta_{kj} - a_j) = a_j \sum_k t_k - t_j

  which is a - t for labels that sum to one. An integer label t stands for the row that is 1 at
  t and 0 elsewhere.

  The entry at the true class is never formed as a_t - 1, which is 0 as soon as a_t rounds to 1.
  Where probabilities agree with the prediction a - t itself cancels, and the error is a few units
  of rounding of the entries of a and t that it is formed from.

  Args:
    logits: ``[*B, K]`` of a floating dtype, differentiable.
    labels: class indices ``[*B]`` of an integer dtype, or probabilities ``[*B, K]`` of a floating
      dtype, differentiable, which need not sum to one.

  Returns:
    Array ``[*B, K]`` of the dtype of ``logits``: for every row the gradient of its own loss. A row
    whose integer label is outside [0, K) is NaN. Where ``logits`` is -inf it is -t_j.

  Raises:
    TypeError: if ``logits`` is not a floating array or ``labels`` is neither kind of array.
    ValueError: if ``logits`` is 0-d, or the shapes do not belong together.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import cross_entropy_gradient
    >>> logits = jnp.log(jnp.array([[1.0, 3.0, 4.0], [2.0, 2.0, 4.0]]))
    >>> with jnp.printoptions(precision=3):
    ...   print(cross_entropy_gradient(logits, jnp.array([1, 2])))
    [[ 0.125 -0.625  0.5  ]
     [ 0.25   0.25  -0.5  ]]

  Source: seed step 6.
  """
  arguments = _Arguments("cross_entropy_gradient")
  x = arguments.as_rows("logits", logits, floating=True)
  x, t = devices.align(x, arguments.as_label_rows(labels, x))
  a, complement, largest = _softmax(x, t)
  # At the largest probability a_k sum(t) - t_k = a_k (sum of the other t) - (1 - a_k) t_k, where
  # nothing is lost if a_k or t_k rounds to 1. All other a_j are at most 1/2 and need no such care.
  t = t.astype(a.dtype)
  others = jnp.sum(jnp.where(largest, 0, t), axis=-1, keepdims=True)
  total = others + _at(largest, t)
  return jnp.where(largest, a * others - complement * t, a * total - t).astype(x.dtype)


def cross_entropy_hessian(logits: ArrayLike) -> jax.Array:
  r"""The Hessian of cross-entropy in the logits, for labels that sum to one.

  .. math:: \frac{\partial^2 L}{\partial z_i \partial z_j}
    = \frac{\partial}{\partial z_j} (a_i - t_i) = a_i (\delta_{ij} - a_j)

  The label is a constant in the gradient a - t, so the Hessian is the Jacobian of softmax and
  depends on no label. It has no negative eigenvalue: the loss is convex in the logits. Labels that
  sum to another number multiply it by that number.

  Args:
    logits: ``[*B, K]`` of a floating dtype, differentiable.

  Returns:
    Array ``[*B, K, K]`` of the dtype of ``logits``.

  Raises:
    TypeError: if ``logits`` is not a floating array.
    ValueError: if ``logits`` is 0-d.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import cross_entropy_hessian
    >>> print(cross_entropy_hessian(jnp.array([0.0, 0.0])))
    [[ 0.25 -0.25]
     [-0.25  0.25]]

  Source: seed steps 5 and 6.
  """
  x = _Arguments("cross_entropy_hessian").as_rows("logits", logits, floating=True)
  return _jacobian(_softmax(x)).astype(x.dtype)


def cross_entropy_hvp(logits: ArrayLike, x_dot: ArrayLike) -> jax.Array:
  r"""The Hessian of cross-entropy in the logits, times ``x_dot``, for labels that sum to one.

  .. math:: \sum_j \frac{\partial^2 L}{\partial z_i \partial z_j} \dot x_j
    = a_i \Big(\dot x_i - \sum_k a_k \dot x_k\Big)

  It is the product in the middle of a Gauss-Newton step. Labels that sum to another number multiply
  it by that number.

  Args:
    logits: ``[*B, K]`` of a floating dtype, differentiable.
    x_dot: tangent of ``logits``, of the same shape and any real dtype, differentiable (linear).

  Returns:
    Array ``[*B, K]`` of the dtype of ``logits``.

  Raises:
    TypeError: if ``logits`` is not a floating array or ``x_dot`` not an array of real numbers.
    ValueError: if ``logits`` is 0-d or ``x_dot`` has another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.derivatives import cross_entropy_hvp
    >>> print(cross_entropy_hvp(jnp.array([0.0, 0.0]), jnp.array([2.0, 1.0])))
    [ 0.25 -0.25]

  Source: seed steps 5 and 6.
  """
  arguments = _Arguments("cross_entropy_hvp")
  x = arguments.as_rows("logits", logits, floating=True)
  x_dot = arguments.as_vector("x_dot", x_dot, "logits", x)
  x, x_dot = devices.align(x, x_dot)
  return _times_jacobian(_softmax(x, x_dot), x_dot).astype(x.dtype)


# --- the formulas --------------------------------------------------------------------------------


class _Softmax(NamedTuple):
  """A row's softmax a, 1 - a without cancellation, and where the largest entry stands (one-hot)."""

  a: jax.Array
  complement: jax.Array
  largest: jax.Array


# Seed step 1 with e_j = exp(x_j - x_k), x_k the largest entry: e_k = 1, S = 1 + r, r the sum of the
# other e_j. Then 1 - a_k = r / S; no other a_j exceeds 1/2, so that 1 - a_j loses nothing there.
# The derivative by x flows through x_k as well, which makes that of e_k exactly 0, so that further
# derivatives are as exact as the formulas.
def _softmax(x: jax.Array, *vectors: jax.Array) -> _Softmax:
  """The softmax of x [*B, K] in the compute dtype of x and the vectors."""
  x = x.astype(compute_dtype(x.dtype, *(v.dtype for v in vectors)))
  if x.shape[-1] == 0:
    return _Softmax(x, x, jnp.zeros(x.shape, bool))
  column = devices.index_along(x, x.ndim - 1)
  largest = column == jnp.argmax(x, axis=-1, keepdims=True).astype(column.dtype)
  top = _at(largest, x)
  difference, lost = _subtract(x, top)
  lost = lax.stop_gradient(jnp.where(jnp.isfinite(difference), lost, 0))
  e = jnp.exp(difference)
  others = jnp.where(largest, 0, e + e * lost)
  r = jnp.sum(others, axis=-1, keepdims=True)
  one = jnp.where(jnp.isfinite(top), jnp.ones_like(r), jnp.nan)  # e_k
  s = one + r
  a = jnp.where(largest, one, others) / s
  return _Softmax(a, jnp.where(largest, r / s, 1 - a), largest)


def _jacobian(row: _Softmax) -> jax.Array:
  """Seed step 3, a_i (1 - a_i), on the diagonal and step 4, -a_i a_j, off it."""
  return _matrix(row.a * row.complement, -row.a[..., :, None] * _across(row.a))


def _times_jacobian(row: _Softmax, v: jax.Array) -> jax.Array:
  """J v = diag(a) P v, seed step 5."""
  return row.a * _center(row, v)


# P 1 = 0, so v may first be shifted by its value at the largest probability: where that is nearly 1
# the result depends on how v differs from this value elsewhere, and would drown in it. P P = P, so
# P may be applied twice: the second time removes the rounding error of the first <a, v>. What the
# shift itself rounds off goes back in between, when the large common part is gone.
def _center(row: _Softmax, v: jax.Array) -> jax.Array:
  """P v = v - <a, v>."""
  v = v.astype(row.a.dtype)
  v, lost = _subtract(v, _at(row.largest, v))
  v = (v - jnp.sum(row.a * v, axis=-1, keepdims=True)) + lost
  return v - jnp.sum(row.a * v, axis=-1, keepdims=True)


def _matrix(diagonal: jax.Array, off_diagonal: jax.Array) -> jax.Array:
  """[*B, K, K] with the given diagonal [*B, K] ; off it, what ``off_diagonal`` broadcasts to."""
  eye = jnp.eye(diagonal.shape[-1], dtype=bool)
  if sharding := devices.explicit_sharding(diagonal):
    eye = devices.put(eye, sharding, sharding.spec[-1], None)
  return jnp.where(eye, diagonal[..., None], off_diagonal)


def _across(a: jax.Array) -> jax.Array:
  """``a`` as a row [1, K] of a matrix, whole on each device (the matrix is spread by rows)."""
  if sharding := devices.explicit_sharding(a):
    a = devices.put(a, sharding, *sharding.spec[:-1], None)
  return a[..., None, :]


def _at(one_hot: jax.Array, v: jax.Array) -> jax.Array:
  """The entry of each row of v that is marked; 0 where none is."""
  return jnp.sum(jnp.where(one_hot, v, 0), axis=-1, keepdims=True)


# Knuth's error-free transformation of a sum. It is linear, so it can be transposed.
def _subtract(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """p - q rounded, and what the rounding lost."""
  difference = p - q
  minus_q = difference - p
  return difference, (p - (difference - minus_q)) - (q + minus_q)


# --- the arguments -------------------------------------------------------------------------------


class _Arguments(Arguments):
  """The arguments of a closed form, whose classes lie along the last axis."""

  def as_rows(self, name: str, value: Any, floating: bool = False) -> jax.Array:
    """``value`` as rows [*B, K]; if it must be ``floating`` integers are refused."""
    x = self.as_logits(name, value) if floating else self.as_real(name, value)
    if x.ndim == 0:
      raise ValueError(
        f"{self} expected {name} of shape [*B, K] with at least one axis, got shape (). "
        f"Pass {name}.reshape(1)."
      )
    return x

  def as_vector(self, name: str, value: Any, of: str, x: jax.Array) -> jax.Array:
    """``value`` as an array of the shape of ``x``, the argument named ``of``."""
    v = self.as_real(name, value)
    if v.shape != x.shape:
      raise ValueError(
        f"{self} expected {name} of the shape of {of}, {x.shape}, got shape {v.shape}. "
        f"Broadcast it with jnp.broadcast_to({name}, {of}.shape)."
      )
    return v

  def as_label_rows(self, labels: Any, x: jax.Array) -> jax.Array:
    """The labels as rows t [*B, K]; NaN for a class that does not exist."""
    t = self.as_array("labels", labels)
    if not jnp.issubdtype(t.dtype, jnp.integer):
      t = self.as_probabilities(t)
      if t.shape != x.shape:
        raise ValueError(
          f"{self} expected probabilities as labels to have the shape of logits, {x.shape}, got "
          f"shape {t.shape}. Class indices need an integer dtype."
        )
      return t
    t = self.as_class_indices(t)
    if t.shape != x.shape[:-1]:
      raise ValueError(
        f"{self} expected integer labels of shape {x.shape[:-1]}, one class index per row of "
        f"logits of shape {x.shape}, got shape {t.shape}. Probabilities need a floating dtype."
      )
    x, t = devices.align(x, t[..., None])
    one_hot = (devices.index_along(x, x.ndim - 1, t.dtype) == t).astype(x.dtype)
    return jnp.where((t >= 0) & (t < x.shape[-1]), one_hot, jnp.nan)
