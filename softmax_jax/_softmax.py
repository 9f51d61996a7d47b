r"""Softmax, its logarithm, and the logarithm of its normalizer.

The notation is that of `softmax_jax._normalizer`. Shapes are given for the last axis: ``[*B, K]``
for the entries of rows, ``[*B, 1]`` for one scalar per row.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from softmax_jax import _maps as maps
from softmax_jax._arguments import Arguments, Axis, compute_dtype
from softmax_jax._arrays import broadcast, compiled, masked, unbroadcast, with_rank
from softmax_jax._devices import align
from softmax_jax._exponentials import entries, finite_or_zero
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, normalizer
from softmax_jax._rows import AxisName, Rows

# --- softmax --------------------------------------------------------------------------------------


class _SoftmaxResiduals(NamedTuple):
  y: jax.Array  # the output
  largest: jax.Array  # where the largest entry of each row is, or 0 (`maps.Softmax`)
  mask: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _softmax_rule(x: jax.Array, mask: jax.Array | None, rows: Rows) -> jax.Array:
  return _softmax_fwd(x, mask, rows)[0]


def _softmax_fwd(
  x: jax.Array, mask: jax.Array | None, rows: Rows
) -> tuple[jax.Array, _SoftmaxResiduals]:
  a, largest = maps.softmax(x, mask, rows, compute_dtype(x.dtype))
  y = masked(a.astype(x.dtype), mask, 0)
  return y, _SoftmaxResiduals(y, largest, mask)


@functools.partial(compiled, static_argnums=0)
def _softmax_bwd(
  rows: Rows, residuals: _SoftmaxResiduals, y_bar: jax.Array
) -> tuple[jax.Array, None]:
  y, largest, mask = residuals
  x_bar = maps.softmax_vjp(y, largest, masked(y_bar, mask, 0), rows, compute_dtype(y.dtype))
  return masked(x_bar, mask, 0).astype(y.dtype), None


# J is symmetric, so that J x_dot is the same expression.
def _softmax_tangent(
  rows: Rows, residuals: _SoftmaxResiduals, args_dot: tuple[jax.Array, None]
) -> jax.Array:
  return _softmax_bwd(rows, residuals, args_dot[0])[0]


_softmax_rule.defvjp(_softmax_fwd, _softmax_bwd)
_softmax = compiled(enable_forward_mode(_softmax_rule, tangent=_softmax_tangent), static_argnums=2)


def softmax(
  x: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array:
  r"""Exponentials of ``x``, normalized to sum to one along ``axis``.

  .. math:: a_j = \frac{e^{x_j}}{\sum_k e^{x_k}}, \qquad
    \frac{\partial a_i}{\partial x_j} = a_i (\delta_{ij} - a_j)

  A drop-in replacement for `jax.nn.softmax`, differentiable in both modes with the hand-derived
  Jacobian above. Only the output and one index per row are saved for the backward pass. Entries are
  right to a few units in the last place, derivatives to a few of the norm of their row. Float32
  rows of up to 16 entries have larger errors on a CPU: values of up to 66 units, as those of
  `jax.nn` anywhere, and derivatives of up to 36 of the norm.

  Args:
    x: array of any shape and a floating dtype, differentiable; integers are converted as
      `jax.nn` converts them. Sixteen-bit input is computed in float32, narrower is refused.
    axis: the axis or axes along which the entries sum to one; None stands for all.
    where: optional boolean array that broadcasts to the shape of ``x``. Entries where it is False
      take no part: their result is 0 and so is their derivative, whatever they hold.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      rows are spread: each holds a slice of every row along ``axis``, and gets that slice of the
      result. The order of several names does not matter. It takes one reduction of one or two
      scalars per row for the largest entries, one for the sums, and two in the backward pass.

  Returns:
    Array of the shape and (floating) dtype of ``x``. An entry of -inf gives 0. A row that contains
    NaN or +inf, or -inf alone, gives NaN; a row that is masked altogether gives 0.

  Raises:
    TypeError: if ``x`` is not an array of real numbers, ``where`` is not boolean, or ``axis`` is
      not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, ``where`` does not broadcast to the
      shape of ``x``, or ``axis_name`` is no axis of a surrounding `jax.shard_map` with
      ``check_vma=True`` over which ``x`` is spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax
    >>> with jnp.printoptions(precision=4, suppress=True):
    ...   print(softmax(jnp.array([1.0, 2.0, 3.0])))
    ...   print(jax.jacfwd(softmax)(jnp.array([0.0, 0.0])))
    [0.09   0.2447 0.6652]
    [[ 0.25 -0.25]
     [-0.25  0.25]]

  Source: seed steps 1 (value) and 5 (derivative).
  """
  return _softmax(*_as_input(Arguments("softmax"), "x", x, axis, where, axis_name))


# --- log_softmax ----------------------------------------------------------------------------------


class _LogSoftmaxResiduals(NamedTuple):
  y: jax.Array
  mask: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_softmax_rule(x: jax.Array, mask: jax.Array | None, rows: Rows) -> jax.Array:
  return _log_softmax_fwd(x, mask, rows)[0]


def _log_softmax_fwd(
  x: jax.Array, mask: jax.Array | None, rows: Rows
) -> tuple[jax.Array, _LogSoftmaxResiduals]:
  y = maps.log_softmax(x, mask, rows, compute_dtype(x.dtype)).astype(x.dtype)
  y = masked(y, mask, -jnp.inf)
  return y, _LogSoftmaxResiduals(y, mask)


@functools.partial(compiled, static_argnums=0)
def _log_softmax_bwd(
  rows: Rows, residuals: _LogSoftmaxResiduals, y_bar: jax.Array
) -> tuple[jax.Array, None]:
  y, mask = residuals
  x_bar = maps.log_softmax_vjp(y, masked(y_bar, mask, 0), rows, compute_dtype(y.dtype))
  return masked(x_bar, mask, 0).astype(y.dtype), None


# y_i = log a_i, so   y_dot_i = x_dot_i - sum_j a_j x_dot_j,   the product with P = I - 1 a^T. As
# that is a projection, P P = P, a second one removes rounding errors.
@functools.partial(compiled, static_argnums=0)
def _log_softmax_tangent(
  rows: Rows, residuals: _LogSoftmaxResiduals, args_dot: tuple[jax.Array, None]
) -> jax.Array:
  y, mask = residuals
  dtype = compute_dtype(y.dtype)
  a, y_dot = jnp.exp(y.astype(dtype)), masked(args_dot[0], mask, 0).astype(dtype)
  for _ in range(2):
    y_dot = y_dot - rows.sum(a * y_dot)  # x_dot_i - sum_j a_j x_dot_j
  return masked(y_dot, mask, 0).astype(y.dtype)


_log_softmax_rule.defvjp(_log_softmax_fwd, _log_softmax_bwd)
_log_softmax = compiled(
  enable_forward_mode(_log_softmax_rule, tangent=_log_softmax_tangent), static_argnums=2
)


def log_softmax(
  x: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array:
  r"""The logarithm of `softmax`, without forming the softmax.

  .. math:: \log a_j = x_j - \log \sum_k e^{x_k}, \qquad
    \frac{\partial \log a_i}{\partial x_j} = \delta_{ij} - a_j

  A drop-in replacement for `jax.nn.log_softmax`, differentiable in both modes. Unlike there, an
  entry whose probability is close to one keeps all its digits, and its derivative is not lost. The
  output is all that is saved for the backward pass; as it is rounded, derivatives are right to
  :math:`|\log a_j|` roundings of its dtype in each term.

  Args:
    x: array of any shape and a floating dtype, differentiable; integers are converted as
      `jax.nn` converts them. Sixteen-bit input is computed in float32, narrower is refused.
    axis: the axis or axes along which the probabilities sum to one; None stands for all.
    where: optional boolean array that broadcasts to the shape of ``x``. Entries where it is False
      take no part: their result is -inf and their derivative 0, whatever they hold.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      rows are spread: each holds a slice of every row along ``axis``, and gets that slice of the
      result. The order of several names does not matter. It takes one reduction of one or two
      scalars per row for the largest entries, one for the sums, and one in the backward pass.

  Returns:
    Array of the shape and (floating) dtype of ``x``. An entry of -inf gives -inf. A row that
    contains NaN or +inf, or -inf alone, gives NaN; a row that is masked altogether gives -inf.

  Raises:
    TypeError: if ``x`` is not an array of real numbers, ``where`` is not boolean, or ``axis`` is
      not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, ``where`` does not broadcast to the
      shape of ``x``, or ``axis_name`` is no axis of a surrounding `jax.shard_map` with
      ``check_vma=True`` over which ``x`` is spread.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax import log_softmax
    >>> with jnp.printoptions(precision=4):
    ...   print(log_softmax(jnp.array([20.0, 0.0])))  # jax.nn.log_softmax gives [0, -20]
    [-2.0612e-09 -2.0000e+01]

  Source: seed steps 1 and 5; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp
  and softmax functions", IMA Journal of Numerical Analysis (2021).
  """
  return _log_softmax(*_as_input(Arguments("log_softmax"), "x", x, axis, where, axis_name))


# --- logsumexp ------------------------------------------------------------------------------------


class _LogSumExpResiduals(NamedTuple):
  a: jax.Array
  mask: jax.Array | None
  normalizer: Normalizer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logsumexp_rule(a: jax.Array, mask: jax.Array | None, rows: Rows) -> jax.Array:
  return _logsumexp_fwd(a, mask, rows)[0]


def _logsumexp_fwd(
  a: jax.Array, mask: jax.Array | None, rows: Rows
) -> tuple[jax.Array, _LogSumExpResiduals]:
  s, _ = normalizer(a, mask, rows, compute_dtype(a.dtype))
  lse = masked(s.shift + s.log_sum(), s.any, -jnp.inf)  # shift + log S
  return lse.astype(a.dtype), _LogSumExpResiduals(a, mask, s)


# lse = shift + log S, so d lse/da_j = (1 / S) exp(a_j - shift): the softmax (seed step 1), and
#   a_bar_j = exp(a_j - shift) lse_bar / S.
# In a row of -inf alone S = 0; every entry has probability 0 there and the derivative 0.
def _logsumexp_bwd(
  rows: Rows, residuals: _LogSumExpResiduals, lse_bar: jax.Array
) -> tuple[jax.Array, None]:
  a, mask, s = residuals
  z = entries(a, mask, s.any, s.shift.dtype)  # [*B, K]
  s = differentiable(s, z, rows)  # of [*B, 1]
  scale = lse_bar.astype(z.dtype) / jnp.where(s.rest == -1, 1, 1 + s.rest)  # lse_bar / S
  a_bar = s.exp(z) * scale  # exp(a_j - shift) lse_bar / S
  return masked(a_bar, mask, 0).astype(a.dtype), None


_logsumexp_rule.defvjp(_logsumexp_fwd, _logsumexp_bwd)
_logsumexp = compiled(enable_forward_mode(_logsumexp_rule), static_argnums=2)


class _Signed(NamedTuple):
  log: jax.Array
  sign: jax.Array


class _ScaledResiduals(NamedTuple):
  a: jax.Array
  b: jax.Array
  mask: jax.Array | None
  shift: jax.Array
  total: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_logsumexp_rule(
  a: jax.Array, b: jax.Array, mask: jax.Array | None, rows: Rows
) -> _Signed:
  return _scaled_logsumexp_fwd(a, b, mask, rows)[0]


def _scaled_logsumexp_fwd(
  a: jax.Array, b: jax.Array, mask: jax.Array | None, rows: Rows
) -> tuple[_Signed, _ScaledResiduals]:
  z, w = _scaled_entries(a, b, mask)  # [*B, K]
  weighted = lax.stop_gradient(jnp.where(w != 0, z, -jnp.inf))
  top = rows.max(weighted)
  shift = finite_or_zero(top)
  total = rows.sum(w * _bounded_exp(z - shift))  # T = sum_k b_k e_k, [*B, 1]
  sign = jnp.sign(total)
  # A sum over nothing gets derivative 0: the backward rule divides by T, which is set to inf.
  nothing = top == -jnp.inf
  total = jnp.where(nothing, jnp.inf, total)
  log = jnp.where(nothing, -jnp.inf, shift + jnp.log(jnp.abs(total)))  # shift + log|T|
  out = _Signed(log.astype(a.dtype), sign.astype(a.dtype))
  return out, _ScaledResiduals(a, b, mask, shift, total)


# log = shift + log|T| with T = sum_k b_k e_k, and the sign of T is piecewise constant, so
#   a_bar_j = b_j (e_j log_bar / T),   b_bar_j = e_j log_bar / T.
# An entry with b_j = 0 takes part in both, and in their derivatives, unless a_j is infinite or NaN.
def _scaled_logsumexp_bwd(
  rows: Rows, residuals: _ScaledResiduals, bars: _Signed
) -> tuple[jax.Array, jax.Array, None]:
  a, b, mask, shift, total = residuals
  z, w = _scaled_entries(a, b, mask)
  scale = bars.log.astype(z.dtype) / total  # log_bar / T
  d = z - shift
  b_bar = _bounded_exp(d) * scale  # e_j log_bar / T
  a_bar = w * b_bar  # b_j (e_j log_bar / T)
  overflow = jnp.where(d > _largest_exponent(d), np.finfo(d.dtype).max, jnp.ones_like(d))
  b_bar = b_bar * overflow
  return (
    masked(a_bar, mask, 0).astype(a.dtype),
    unbroadcast(masked(b_bar, mask, 0), b.shape).astype(b.dtype),
    None,
  )


_scaled_logsumexp_rule.defvjp(_scaled_logsumexp_fwd, _scaled_logsumexp_bwd)
_scaled_logsumexp = compiled(enable_forward_mode(_scaled_logsumexp_rule), static_argnums=3)


def _scaled_entries(
  a: jax.Array, b: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Entries and coefficients; -inf and 0 if masked or if b = 0 meets an infinite or NaN entry."""
  dtype = compute_dtype(a.dtype)
  w = masked(jnp.broadcast_to(b, a.shape).astype(dtype), mask, 0)
  z = masked(a.astype(dtype), mask, -jnp.inf)
  return jnp.where((w == 0) & ~jnp.isfinite(z), -jnp.inf, z), w


def _bounded_exp(d: jax.Array) -> jax.Array:
  """``exp(d)``, finite: an entry above the shift, whose coefficient is 0, could overflow."""
  return jnp.exp(jnp.minimum(d, _largest_exponent(d)))


def _largest_exponent(d: jax.Array) -> float:
  return float(np.log(np.finfo(d.dtype).max)) - 1


@overload
def logsumexp(
  a: ArrayLike,
  axis: Axis = None,
  b: ArrayLike | None = None,
  keepdims: bool = False,
  return_sign: Literal[False] = False,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array: ...


@overload
def logsumexp(
  a: ArrayLike,
  axis: Axis = None,
  b: ArrayLike | None = None,
  keepdims: bool = False,
  *,
  return_sign: Literal[True],
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def logsumexp(
  a: ArrayLike,
  axis: Axis,
  b: ArrayLike | None,
  keepdims: bool,
  return_sign: Literal[True],
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def logsumexp(
  a: ArrayLike,
  axis: Axis = None,
  b: ArrayLike | None = None,
  keepdims: bool = False,
  return_sign: bool = False,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


def logsumexp(
  a: ArrayLike,
  axis: Axis = None,
  b: ArrayLike | None = None,
  keepdims: bool = False,
  return_sign: bool = False,
  where: ArrayLike | None = None,
  *,
  axis_name: AxisName | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  r"""The logarithm of a sum of exponentials.

  .. math:: \operatorname{lse}(a, b) = \log \sum_k b_k e^{a_k}, \qquad
    \frac{\partial \operatorname{lse}}{\partial a_j} = \frac{b_j e^{a_j}}{\sum_k b_k e^{a_k}}, \quad
    \frac{\partial \operatorname{lse}}{\partial b_j} = \frac{e^{a_j}}{\sum_k b_k e^{a_k}}

  A drop-in replacement for `jax.nn.logsumexp` on real numbers, differentiable in both modes.
  Without ``b`` the derivative is `softmax`. Only the inputs and a few scalars per row are saved for
  the backward pass.

  Args:
    a: array of any shape and a floating dtype, differentiable; integers are converted as
      `jax.nn` converts them. Sixteen-bit input is computed in float32, narrower is refused.
    axis: the axis or axes to sum over; None (the default) stands for all.
    b: optional coefficients of the exponentials, differentiable; ``a`` and ``b`` broadcast against
      each other. An entry whose coefficient is 0 adds nothing, even where it is
      infinite or NaN.
    keepdims: whether the axes that are summed over are kept with size 1.
    return_sign: whether to return the sign of the sum too, and the logarithm of its absolute
      value.
    where: optional boolean array that broadcasts to the shape of ``a``. Entries where it is False
      take no part: their derivative is 0, whatever they hold.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      rows are spread: each holds a slice of every row along ``axis``, and all get the same result.
      The order of several names does not matter. It takes one reduction of one or two numbers per
      row for the largest entries, one for the sums, and none in the backward pass.

  Returns:
    Array of the shape of ``a`` without ``axis`` and of the (floating) dtype of ``a`` and ``b``;
    with ``return_sign`` a pair of two; the sign has derivative 0. A sum over nothing, over
    masked entries or over entries of -inf gives -inf with derivative 0; +inf gives +inf. A negative
    sum gives NaN unless ``return_sign`` is set.

  Raises:
    TypeError: if ``a`` or ``b`` is not an array of real numbers, ``where`` is not boolean, ``axis``
      is not a static int, tuple of ints or None, or ``keepdims`` or ``return_sign`` not a static
      bool.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not broadcast, or
      ``axis_name`` is no axis of a surrounding `jax.shard_map` with ``check_vma=True`` over which
      ``a`` is spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import logsumexp
    >>> print(f"{logsumexp(jnp.array([1e4, 1e4])):.3f}")
    10000.693
    >>> print(jax.grad(logsumexp)(jnp.array([0.0, 0.0, -jnp.inf])))
    [0.5 0.5 0. ]

  Source: seed step 1 (S and its derivative); Blanchard, Higham and Higham, "Accurately computing
  the log-sum-exp and softmax functions", IMA Journal of Numerical Analysis (2021).
  """
  arguments = Arguments("logsumexp")
  if b is not None:
    a, b = arguments.promoted("a", a, "b", b)
    a = broadcast(a, arguments.common_shape("a", a.shape, "b", b.shape))
    b = with_rank(b, a.ndim)
  a, mask, rows = _as_input(arguments, "a", a, axis, where, axis_name)
  keepdims = arguments.as_flag("keepdims", keepdims)
  return_sign = arguments.as_flag("return_sign", return_sign)
  if b is None:
    out = _logsumexp(a, mask, rows)
    sign = jnp.where(jnp.isnan(out), out, jnp.where(out == -jnp.inf, 0, 1).astype(out.dtype))
    sign = lax.stop_gradient(sign)
  else:
    out, sign = _scaled_logsumexp(*align(a, b, mask), rows)
  if not keepdims:
    out, sign = jnp.squeeze(out, rows.axes), jnp.squeeze(sign, rows.axes)
  if return_sign:
    return out, sign
  return out if b is None else jnp.where(sign < 0, jnp.nan, out)


# --- arguments ----------------------------------------------------------------------------------


def _as_input(
  arguments: Arguments, name: str, value: Any, axis: Axis, where: Any, axis_name: Any
) -> tuple[jax.Array, jax.Array | None, Rows]:
  x = arguments.as_real(name, value)
  axes = arguments.as_axes(name, axis, x.shape)
  mask = None if where is None else arguments.as_mask(where, name, x.shape)
  if axis_name is not None:
    arguments.check_axis_name(axis_name, name, x)
  return *align(x, mask), Rows(axes, axis_name)
