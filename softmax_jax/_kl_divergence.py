r"""The Kullback-Leibler divergence of two softmax distributions, from the logits of both.

Notation, for the logits z_k and the target logits w_k of one row, divided by the temperature:
q = softmax(z), p = softmax(w), and the log-ratio l_k = log p_k - log q_k. As p and q sum to 1,

    KL = sum_k p_k l_k = sum_k T_k,    T_k = q_k - p_k + p_k l_k = p_k phi(-l_k),

with phi(x) = exp(x) - 1 - x. In the first sum the terms cancel: it is of second order where p and q
are nearly equal, its terms are of first order. No T_k is negative, and each is formed from l_k.

The log-ratios come from the logits' own differences: l_k = (w_k - z_k) - ratio, with one number per
row. If that is off by eta, the terms sum to KL + phi(eta) instead of KL, and the sum of
q_k - p_k = -p_k (1 - exp(-l_k)) to Q = exp(eta) - 1 instead of 0. So Q, which is as small as the
rounding errors of the ratio, corrects both the sum and the ratio, on which the gradients depend.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softmax_jax import _maps as maps
from softmax_jax._arguments import Arguments, Axis, compute_dtype
from softmax_jax._arrays import (
  batched_like,
  broadcast,
  compiled,
  known_sum,
  masked,
  unbroadcast,
  with_rank,
)
from softmax_jax._cross_entropy.options import Reduction, reduced
from softmax_jax._cross_entropy.per_row import inverse_sum
from softmax_jax._devices import align
from softmax_jax._exponentials import difference_and_error, entries, rounding_error_of_difference
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, local_normalizer
from softmax_jax._row_sums import row_sums, two_row_sums
from softmax_jax._rows import AxisName, Rows

_with_index = functools.partial(row_sums, with_index=True)


class _Residuals(NamedTuple):
  logits: jax.Array
  target_logits: jax.Array
  mask: jax.Array | None
  temperature: jax.Array | None  # None where it is 1
  predicted: Normalizer
  target: Normalizer
  largest: jax.Array | None  # where the largest target logit is, if that is known
  offset: tuple[jax.Array, jax.Array]  # the largest w_k minus the largest z_k, and what that lacks
  ratio: jax.Array  # log S_p - log S_q, so that l_k = (w_k - z_k) - offset - ratio
  divergence: jax.Array


class _Pair(NamedTuple):
  """The two distributions, entry by entry."""

  p: jax.Array
  q: jax.Array
  log_ratio: jax.Array  # l = log p - log q; 0 where p is 0
  centered: jax.Array  # l less a number of the row that is close to KL; 0 where p is 0
  gap: jax.Array  # q - p
  term: jax.Array  # T = q - p + p l, at least 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rule(
  logits: jax.Array,
  target_logits: jax.Array,
  mask: jax.Array | None,
  temperature: jax.Array | None,
  rows: Rows,
) -> tuple[jax.Array, jax.Array]:
  return _fwd(logits, target_logits, mask, temperature, rows)[0]


def _fwd(
  logits: jax.Array,
  target_logits: jax.Array,
  mask: jax.Array | None,
  temperature: jax.Array | None,
  rows: Rows,
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
  dtype = compute_dtype(logits.dtype, target_logits.dtype)
  scaled = [_scaled(x, temperature, dtype) for x in (logits, target_logits)]
  sums = _with_index if len(rows.axes) == 1 else row_sums
  (local, _), (local_target, _) = (local_normalizer(x, mask, (), rows, dtype, sums) for x in scaled)
  predicted, _ = local.over_devices((), rows)
  target, _ = local_target.over_devices((), rows)
  offset = _exact_difference(target.shift, predicted.shift)
  rest = target.rest - predicted.rest
  # One of the two is 0.
  ratio = jnp.log1p(jnp.maximum(rest, 0) / (1 + predicted.rest))
  ratio = ratio - jnp.log1p(jnp.maximum(-rest, 0) / (1 + target.rest))
  residuals = _Residuals(
    logits,
    target_logits,
    mask,
    temperature,
    predicted,
    target,
    local_target.top_index,
    offset,
    ratio,
    ratio,
  )
  pair = _pair_of(residuals, rows)
  total, excess = rows.sum_over_devices(two_row_sums(pair.term, pair.gap, rows))
  total = total - 0.5 * excess * excess  # phi(eta), to the last digit of what is corrected
  divergence = masked(jnp.where(total < 0, 0, total), predicted.any, 0)
  # A row without any class does not count.
  weight = batched_like(masked(jnp.ones_like(total), predicted.any, 0), total)
  residuals = residuals._replace(ratio=ratio - excess, divergence=divergence)
  return (divergence, weight), residuals


def _scaled(x: jax.Array, temperature: jax.Array | None, dtype: np.dtype) -> jax.Array:
  """``x / temperature``; -inf stays -inf, also in derivatives by the temperature."""
  x = x.astype(dtype)
  if temperature is None:
    return x
  gone = x == -jnp.inf
  return jnp.where(gone, x, jnp.where(gone, jnp.zeros_like(x), x) * (1 / temperature))


def _pair_of(residuals: _Residuals, rows: Rows) -> _Pair:
  """The distributions at the logits, differentiable."""
  z, w, predicted, target = _scaled_entries(residuals, rows)
  q = predicted.exp(z) * inverse_sum(predicted)
  p = target.exp(w) * inverse_sum(target)
  log_ratio = jnp.where(p == 0, 0, _log_ratio(residuals))
  centered = jnp.where(p == 0, 0, _centered(residuals, rows))
  # XLA:GPU writes what two sums share. So each has its own, of numbers per row that XLA does not
  # recognize as the same.
  gap, _ = _gap_and_term(residuals, z, w)
  _, term = _gap_and_term(_held(residuals, rows), z, w)
  return _differentiable(rows, z, w, _Pair(p, q, log_ratio, centered, gap, term))


def _held(residuals: _Residuals, rows: Rows) -> _Residuals:
  """The same with barriers, of which XLA computes everything anew."""
  predicted, target = residuals.predicted, residuals.target
  q_shift, p_shift, offset, ratio = rows.barrier(
    (predicted.shift, target.shift, residuals.offset, residuals.ratio)
  )
  return residuals._replace(
    predicted=predicted._replace(shift=q_shift),
    target=target._replace(shift=p_shift),
    offset=offset,
    ratio=ratio,
  )


# With s = |l| the larger of p and q is exp(s) times the other. If p is the larger
#   p - q = p (1 - exp(-s)),   T = p (s - (1 - exp(-s))),
# and otherwise
#   q - p = q (1 - exp(-s)),   T = q ((1 - exp(-s)) - s exp(-s)).
# Below 1 these would cancel. There, with the sum f = 1/2 - s/6 + s^2/24 - ...,
#   1 - exp(-s) = s (1 - s f),   T = p s^2 f   or   q s^2 (1 - s f - f).
def _gap_and_term(residuals: _Residuals, z: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``q - p`` and T from l and the larger of p and q, to the last digits."""
  log_ratio = _log_ratio(residuals)
  is_p, size = log_ratio > 0, jnp.abs(log_ratio)
  of_q, of_p = (
    (*difference_and_error(x, s.shift), inverse_sum(s))
    for x, s in ((z, residuals.predicted), (w, residuals.target))
  )
  d, error, inverse = (jnp.where(is_p, *pair) for pair in zip(of_p, of_q, strict=True))
  larger = jnp.exp(d)
  larger = (larger + larger * error) * inverse

  near = jnp.minimum(size, 1)
  series = jnp.ones_like(near)
  for k in range(18 if near.dtype == jnp.float64 else 10, 2, -1):
    series = 1 - series * near * (1 / k)
  series = 0.5 * series
  slope = 1 - near * series
  small = jnp.exp(-size)
  gap = jnp.where(size < 1, -log_ratio * slope, -jnp.sign(log_ratio) * (1 - small))
  term = jnp.where(
    size < 1,
    near * near * jnp.where(is_p, series, slope - series),
    jnp.where(is_p, size - (1 - small), (1 - small) - size * small),
  )
  return larger * gap, jnp.where(larger == 0, 0, larger * term)


def _scaled_entries(
  residuals: _Residuals, rows: Rows
) -> tuple[jax.Array, jax.Array, Normalizer, Normalizer]:
  """z and w, and their normalizers, differentiable."""
  dtype = residuals.ratio.dtype

  def of(x: jax.Array, s: Normalizer) -> tuple[jax.Array, Normalizer]:
    z = entries(_scaled(x, residuals.temperature, dtype), residuals.mask, s.any, dtype)
    return z, differentiable(s, z, rows)

  z, predicted = of(residuals.logits, residuals.predicted)
  w, target = of(residuals.target_logits, residuals.target)
  return z, w, predicted, target


def _log_ratio(residuals: _Residuals) -> jax.Array:
  """l_k, from the exact differences of the logits."""
  temperature, (offset, offset_low) = residuals.temperature, residuals.offset
  difference, low, nowhere = _differences(residuals)
  if temperature is not None:
    offset, offset_low = offset * temperature, offset_low * temperature
  log_ratio = (difference - offset) + (low - offset_low)
  if temperature is not None:
    log_ratio = log_ratio * (1 / temperature)
  # Finite where w is -inf, as then p l = 0.
  log_ratio = jnp.maximum(log_ratio - residuals.ratio, 0.5 * jnp.finfo(low.dtype).min)
  return jnp.where(nowhere, jnp.zeros_like(log_ratio), log_ratio)


# Log-ratios that are large and nearly agree differ by no more than their own rounding errors, and
# the derivatives by the target depend on nothing else. Less a number near KL they keep them.
def _centered(residuals: _Residuals, rows: Rows) -> jax.Array:
  """l_k less a number of the row that is close to KL, to the last digits of the difference."""
  temperature, (offset, _) = residuals.temperature, residuals.offset
  center = offset + (residuals.ratio + residuals.divergence)
  if temperature is not None:
    center = center * temperature
  # With a zero that XLA does not know it forms the differences anew. On a CPU it would keep them.
  center, zero = rows.barrier((center, 0 * center))
  w = residuals.target_logits.astype(center.dtype) + zero
  difference, low, _ = _differences(residuals._replace(target_logits=w))
  centered = (difference - center) + low
  return centered if temperature is None else centered * (1 / temperature)


def _differences(residuals: _Residuals) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The target logits minus the logits, what that lacks, and where both are -inf."""
  dtype = residuals.ratio.dtype
  z, w = (
    masked(x.astype(dtype), residuals.mask, -jnp.inf)
    for x in (residuals.logits, residuals.target_logits)
  )
  nowhere = (z == -jnp.inf) & (w == -jnp.inf)
  z, w = (jnp.where(nowhere, jnp.zeros_like(x), x) for x in (z, w))
  return *_exact_difference(w, z), nowhere


def _exact_difference(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``x - y`` and what that lacks."""
  difference = x - y
  low = rounding_error_of_difference(x, y)
  return difference, jnp.where(jnp.isfinite(difference), low, jnp.zeros_like(low))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(rows: Rows, z: jax.Array, w: jax.Array, pair: _Pair) -> _Pair:
  """``pair``, computed from the entries z and w, with its derivative by them."""
  return pair


# By seed step 5, with v_j = z_dot_j - sum_k q_k z_dot_k and u_j = w_dot_j - sum_k p_k w_dot_k,
#   q_dot = q v,   p_dot = p u,   l_dot = u - v,   T_dot = (q - p) v + l p_dot,
# so that second derivatives depend on no digits but those of the pair. What is subtracted to center
# l counts as a constant: nothing depends on it.
@_differentiable.defjvp
def _differentiable_jvp(rows: Rows, primals: Any, tangents: Any) -> tuple[_Pair, _Pair]:
  z, w, _ = primals
  pair = _differentiable(rows, *primals)

  def minus_mean(a: jax.Array, x: jax.Array, x_dot: jax.Array) -> jax.Array:
    x_dot = jnp.where(x == -jnp.inf, jnp.zeros_like(x_dot), x_dot)
    for _ in range(2):
      x_dot = x_dot - rows.sum(a * x_dot)
    return x_dot

  v, u = minus_mean(pair.q, z, tangents[0]), minus_mean(pair.p, w, tangents[1])
  q_dot, p_dot = pair.q * v, pair.p * u
  term_dot = pair.gap * v + pair.log_ratio * p_dot
  return pair, _Pair(p_dot, q_dot, u - v, u - v, q_dot - p_dot, term_dot)


# From KL = sum_k p_k l_k and seed step 5 twice,
#   dKL/dz_j = q_j - p_j,   dKL/dw_j = p_j (l_j - KL),
# the second being the product of p's Jacobian with l, or with l less any number. KL depends on
# z / temperature and w / temperature, so that
#   dKL/dtemperature = -(1 / temperature) sum_j (z_j (q_j - p_j) + w_j p_j (l_j - KL))
#     = -(1 / temperature) sum_j ((z_j - shift) (T_j - p_j KL) + l_j p_j (l_j - KL)),
# where w_j = z_j + l_j + const, and adding constants to z or to w changes nothing. Like KL, all of
# these terms are of second order where p and q are nearly equal.
def _bwd(
  rows: Rows, residuals: _Residuals, bars: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, jax.Array | None]:
  logits, target_logits, mask, temperature, *_ = residuals
  # With barriers XLA does not keep the probabilities of the forward pass, two arrays.
  residuals = _held(residuals, rows)
  pair = _pair_of(residuals, rows)
  p, _, _, centered, gap, term = pair
  by_target = maps.softmax_vjp(p, residuals.largest, centered, rows, p.dtype)
  bar, _ = bars
  scale = bar if temperature is None else bar * (1 / temperature)
  z_bar, w_bar = scale * gap, scale * by_target
  temperature_bar = None
  if temperature is not None:
    z, _, predicted, _ = _scaled_entries(residuals, rows)
    divergence = known_sum(term, residuals.divergence, rows)
    by_temperature = predicted.cost(z) * (term - p * divergence) - centered * by_target
    temperature_bar = unbroadcast(masked(scale * by_temperature, mask, 0), temperature.shape)
  return (
    masked(z_bar, mask, 0).astype(logits.dtype),
    masked(w_bar, mask, 0).astype(target_logits.dtype),
    None,
    temperature_bar,
  )


_rule.defvjp(_fwd, _bwd)
_kl_divergence = compiled(enable_forward_mode(_rule), static_argnums=4)


def softmax_kl_divergence(
  logits: ArrayLike,
  target_logits: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  temperature: ArrayLike = 1.0,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
) -> jax.Array:
  r"""The Kullback-Leibler divergence of the softmax of logits from that of target logits.

  .. math:: \mathrm{KL}(p \,\|\, q) = \sum_k p_k (\log p_k - \log q_k), \qquad
    q = \mathrm{softmax}(z / \tau), \quad p = \mathrm{softmax}(w / \tau)

  .. math:: \frac{\partial \mathrm{KL}}{\partial z_j} = \frac{q_j - p_j}{\tau}, \qquad
    \frac{\partial \mathrm{KL}}{\partial w_j}
      = \frac{p_j}{\tau} \Bigl(\log \frac{p_j}{q_j} - \mathrm{KL}\Bigr)

  The loss of distillation, and the distance of two policies, differentiable in both modes and in
  both arguments, in the order of `optax.losses.kl_divergence` and ``torch.nn.functional.kl_div``:
  the prediction first. The reverse divergence KL(q || p) is that of the arguments exchanged.

  Where p and q are nearly equal, or sure of one class, value and gradients keep their digits. From
  1e-14 on (in float32) the divergence is right to a few units in the last place, and both gradients
  to a few of their norms. The result is never negative. Only the inputs and a few scalars per row
  are saved for the backward pass.

  Args:
    logits: array z ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32, narrower ones are refused.
    target_logits: array w ``[*B, V]`` likewise, differentiable: for a constant teacher pass
      ``jax.lax.stop_gradient(target_logits)``. Both broadcast against each other.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row, of the shape of the result (a mask that fits both is one of classes). Classes where it is
      False take no part: both probabilities are 0 there, and so are the derivatives, whatever they
      hold. A row without any class does not count: its divergence is 0.
    temperature: what both logits are divided by, tau; a positive scalar, differentiable. The result
      is not multiplied by its square, as some do to keep the size of the gradients. Where it is no
      power of two, each probability is right to :math:`|z_k / \tau|` roundings.
    reduction: "none" for one divergence per row, "sum", or "mean": the sum divided by the number of
      rows that count ("batchmean" in torch), or 0 without any.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      classes are spread: each device holds a slice of both logits and of ``where``. The divergence
      is the same on all of these devices. Five reductions of one or two scalars per row make it,
      and two more the gradient by the target logits.

  Returns:
    Divergences ``[*B]``, or one number if reduced, in float32 (float64 where an argument has it). A
    class whose target logit is -inf adds what it must, its q. Where only the other is -inf, the
    divergence is +inf; its gradient by the logits is finite then, all others are NaN. Rows in which
    one of both has NaN or +inf, or -inf alone, give NaN. Without classes the divergence is 0.

  Raises:
    TypeError: if the logits are not of a floating dtype, ``where`` is not boolean, the temperature
      not a real scalar, or ``axis`` not a static int, tuple of ints or None.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not fit, ``reduction``
      is unknown, the temperature is known while tracing and not positive and finite, or
      ``axis_name`` is no axis of a surrounding `jax.shard_map` with ``check_vma=True`` over which
      the logits are spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_kl_divergence
    >>> student, teacher = jnp.array([2.0, 0.0, 0.0]), jnp.array([2.0, 1e-4, 0.0])
    >>> with jnp.printoptions(precision=4):
    ...   print(f"{softmax_kl_divergence(student, teacher):.4g}")  # 6.8e-08 by the usual formula
    ...   print(jax.grad(softmax_kl_divergence)(student, teacher))
    4.758e-10
    [ 8.3823e-06 -9.5167e-06  1.1344e-06]

  Source: seed steps 1 and 5; Kullback and Leibler, "On information and sufficiency" (1951); Hinton,
  Vinyals and Dean, "Distilling the knowledge in a neural network" (2015), for the temperature.
  """
  arguments = Arguments("softmax_kl_divergence")
  logits = arguments.as_logits("logits", logits)
  target_logits = arguments.as_logits("target_logits", target_logits)
  dtype = compute_dtype(logits.dtype, target_logits.dtype)
  axes = arguments.as_axes("logits", axis, logits.shape)
  scale = arguments.as_positive("temperature", temperature, dtype)
  arguments.check_reduction(reduction)
  shapes = logits.shape, target_logits.shape
  shape = arguments.common_shape("logits", shapes[0], "target_logits", shapes[1])
  axes = tuple(a + len(shape) - logits.ndim for a in axes)
  mask = None
  if where is not None:
    mask = arguments.as_class_mask(where, *shapes, shape, axes, "target_logits")
  logits, target_logits = broadcast(logits, shape), broadcast(target_logits, shape)
  if axis_name is not None:
    arguments.check_axis_name(axis_name, "logits", logits)
  rows = Rows(axes, axis_name)
  if math.prod(shape[a] for a in axes) == 0:  # then no row counts
    batch = tuple(size for a, size in enumerate(shape) if a not in axes)
    divergences = weight = jnp.zeros(batch, dtype)
  else:
    # A JAX array may be an argument to differentiate by, also where its value is 1.
    given = isinstance(temperature, jax.Array) or temperature != 1
    scale = with_rank(scale, len(shape)) if given else None
    logits, target_logits, mask, scale = align(logits, target_logits, mask, scale)
    per_row = _kl_divergence(logits, target_logits, mask, scale, rows)
    divergences, weight = (jnp.squeeze(x, axes) for x in per_row)
  return reduced(divergences, jnp.sum(weight), reduction)
