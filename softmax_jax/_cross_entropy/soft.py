"""Cross-entropy with soft labels: a distribution over the classes for each row."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

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
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.label import stop_gradient_unless
from softmax_jax._cross_entropy.options import CrossEntropyAux, Reduction
from softmax_jax._cross_entropy.per_row import (
  PerRow,
  inverse_sum,
  log_sum_from_constant,
  minus_log_softmax,
)
from softmax_jax._cross_entropy.uniform import UniformSums, uniform_label
from softmax_jax._devices import align, varying_alike
from softmax_jax._exponentials import entries
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._normalizer import Normalizer, differentiable, local_normalizer
from softmax_jax._products import cost_of, linear_scale_or_zero
from softmax_jax._row_sums import Cost, Weights
from softmax_jax._rows import AxisName, Rows


class _Static(NamedTuple):
  rows: Rows
  num_classes: int  # on all devices
  smoothed: bool


class _Residuals(NamedTuple):
  logits: jax.Array
  labels: jax.Array
  mask: jax.Array | None
  weights: jax.Array | None
  normalizer: Normalizer
  total: jax.Array  # the sum of the weighted label
  uniform: UniformSums | None
  counts: jax.Array | None  # the rows that count; None where all with a class do

  def kept(self) -> jax.Array | None:
    """The entries that have derivatives, None where all have."""
    if self.mask is None or self.counts is None:
      return self.mask if self.counts is None else self.counts
    return self.mask & self.counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rule(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  weightless: jax.Array | None,
  static: _Static,
) -> PerRow:
  return _fwd(logits, labels, mask, weights, weightless, static)[0]


def _fwd(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  weights: jax.Array | None,
  weightless: jax.Array | None,
  static: _Static,
) -> tuple[PerRow, _Residuals]:
  rows = static.rows
  dtype = compute_dtype(logits.dtype, labels.dtype)
  finite_rows = None if weightless is None else ~weightless
  of_costs = Weights(labels, weights, finite_rows), Weights(None, weights, finite_rows)
  of_costs = of_costs[: 1 + static.smoothed]
  local, costs = local_normalizer(logits, mask, of_costs, rows, dtype)
  uniform = uniform_loss = None
  if static.smoothed:
    uniform = UniformSums.of(costs[1].total, weights, mask, logits.shape, dtype, rows)
  s, (cost, uniform) = local.over_devices((costs[0], uniform), rows)
  z, counts = entries(logits, mask, s.any, dtype), None
  if weightless is not None:  # a row of sample weight 0 whose loss is no number does not count
    is_number = s.is_finite() & jnp.isfinite(cost.weight) & ~jnp.isnan(cost.total)
    counts = ~weightless | is_number
    z = stop_gradient_unless(counts, z)
    s = s._replace(shift=masked(s.shift, counts, 0), rest=masked(s.rest, counts, 0))
    cost = Cost(masked(cost.total, counts, 0), masked(cost.weight, counts, 0))
    if uniform is not None:
      uniform = uniform._replace(cost=masked(uniform.cost, counts, 0))
  s = differentiable(s, z, rows)

  nll = cost.total + cost.weight * log_sum_from_constant(s)  # -sum_k p_k log a_k
  nll = jnp.where(s.rest == jnp.inf, jnp.nan, nll)  # a row with +inf
  if uniform is not None:
    uniform_loss = uniform.loss(s, static.num_classes)  # -sum_k u_k log a_k
    uniform = uniform._replace(cost=None)
  # A row without any class does not count; its labels are all 0.
  lse = masked(s.shift + s.log_sum(), s.any, 0)
  weight = masked(masked(jnp.ones_like(nll), s.any, 0), counts, 0)
  weight = batched_like(weight, lse)
  per_row = PerRow(nll, lse, uniform_loss, weight)
  residuals = _Residuals(logits, labels, mask, weights, s, cost.weight, uniform, counts)
  return per_row, residuals


# With p = w t the weighted label and u the weighted uniform one, nll = -sum_k p_k log a_k for any
# p, not only one that sums to 1, and uniform likewise with u. By seed steps 5 and 6
#   d nll/dz_j = a_j sum_k p_k - p_j = ((e_j sum_k p_k - p_j) - p_j rest) / S,
# whose right side loses nothing where t is one-hot and a_t close to 1: there e_t is 1 and the first
# difference 0. Seed step 1: d lse/dz_j = a_j. With g = lse_bar + uniform_bar sum_k u_k,
#   z_bar_j = nll_bar d nll/dz_j + a_j g - u_j uniform_bar.
# And d nll/dp_j = -log a_j = d uniform/du_j.
def _bwd(
  static: _Static, residuals: _Residuals, bars: PerRow
) -> tuple[jax.Array, jax.Array, None, jax.Array | None, None]:
  rows, num_classes, _ = static
  logits, labels, mask, weights, s, total, uniform, counts = residuals
  dtype, kept = s.shift.dtype, residuals.kept()
  z = entries(logits, mask, s.any, dtype)
  if counts is not None:
    z, labels = stop_gradient_unless(counts, z), stop_gradient_unless(counts, labels)
  s = differentiable(s, z, rows)
  p = jnp.broadcast_to(Weights(labels, weights).p(mask, dtype), z.shape)  # [*B, V]
  # sum_k p_k. In the loss the derivative by a weight of 0 of an infinite cost is 0, also that of
  # its share in this sum, which here has the derivative of a sum.
  total = known_sum(p, total, rows)
  cost = minus_log_softmax(z, s)  # -log a
  e, inverse = s.exp(z), inverse_sum(s)
  g = bars.lse
  u, divisor = None, 1
  if uniform is not None:
    divisor = uniform.divisor(num_classes)
    u = uniform_label(weights, mask, divisor, z)
    g = g + bars.uniform * uniform.label_sum(num_classes)  # + uniform_bar sum_k u_k
  scale = bars.nll * inverse  # nll_bar / S
  total = total * scale
  # g has its own barrier, as it is linear in other cotangents: JAX cannot transpose half a barrier.
  total, scale, rest = rows.barrier((total, scale, s.rest * scale))
  g = jax.lax.optimization_barrier(g * inverse)
  # (e_j sum_k p_k - p_j) nll_bar / S + (e_j g / S - p_j rest nll_bar / S)
  z_bar = (e * total - p * scale) + (e * g - p * rest)
  if u is not None:
    z_bar = z_bar - u * bars.uniform  # - u_j uniform_bar

  p_bar = masked(linear_scale_or_zero(bars.nll, cost_of(p, cost)), kept, 0)  # -log a_j nll_bar
  labels_bar = p_bar if weights is None else p_bar * weights
  weights_bar = None
  if weights is not None:
    weights_bar = p_bar * masked(labels.astype(dtype), kept, 0)
    if u is not None:
      u_bar = linear_scale_or_zero(bars.uniform, cost_of(u, cost))  # -log a_j uniform_bar
      weights_bar = weights_bar + masked(u_bar, kept, 0) / divisor
    weights_bar = unbroadcast(weights_bar, weights.shape)
  return (
    masked(z_bar, kept, 0).astype(logits.dtype),
    unbroadcast(labels_bar, labels.shape).astype(labels.dtype),
    None,
    weights_bar,
    None,
  )


# The same derivative along z_dot, p_dot and u_dot, in the form that keeps its digits near a_t = 1.
# With lse_dot = sum_k a_k z_dot_k and v_j = z_dot_j - lse_dot,
#   nll_dot = -sum_j p_j v_j - sum_j p_dot_j log a_j,
#   uniform_dot = -sum_j u_j v_j - sum_j u_dot_j log a_j.
# The rounding error of lse_dot is the same number in every v_j. As sum_k a_k v_k should be 0, that
# sum is the error. We subtract it, and once more the error of the error.
def _tangent(
  static: _Static, residuals: _Residuals, args_dot: tuple[jax.Array | None, ...]
) -> PerRow:
  rows, num_classes, _ = static
  logits, labels, mask, weights, s, _, uniform, counts = residuals
  logits_dot, labels_dot, _, weights_dot, _ = args_dot
  dtype, kept = s.shift.dtype, residuals.kept()
  z = masked(entries(logits, mask, s.any, dtype), counts, 0)
  labels = masked(labels, counts, 0)
  s = differentiable(s, z, rows)

  def sums(*xs: jax.Array) -> list[jax.Array]:
    return rows.sum_over_devices([rows.local_sum(jnp.broadcast_to(x, z.shape)) for x in xs])

  nll_dot = uniform_dot = jnp.zeros_like(z)
  lse_dot = jnp.zeros_like(s.shift)
  p = Weights(labels, weights).p(mask, dtype)
  u, divisor = None, 1
  if uniform is not None:
    divisor = uniform.divisor(num_classes)
    u = uniform_label(weights, mask, divisor, z)

  if logits_dot is not None:
    z_dot = masked(logits_dot.astype(dtype), kept, 0)
    a = s.exp(z) * inverse_sum(s)
    (lse_dot,) = sums(a * z_dot)
    v = z_dot - lse_dot
    for _ in range(2):
      v = v - sums(a * v)[0]
    nll_dot -= p * v  # - p_j v_j
    if u is not None:
      uniform_dot -= u * v  # - u_j v_j
  if labels_dot is not None or weights_dot is not None:
    cost = minus_log_softmax(z, s)
    p_dot = jnp.zeros_like(z)
    if labels_dot is not None:
      p_dot += Weights(labels_dot, weights).p(mask, dtype)
    if weights_dot is not None:
      p_dot += Weights(labels, weights_dot).p(mask, dtype)
    nll_dot += linear_scale_or_zero(masked(p_dot, kept, 0), cost_of(p, cost))  # - p_dot_j log a_j
    if u is not None and weights_dot is not None:
      u_dot = uniform_label(weights_dot, kept, divisor, z)
      uniform_dot += linear_scale_or_zero(u_dot, cost_of(u, cost))  # - u_dot_j log a_j
  nll_dot, uniform_dot = sums(nll_dot, uniform_dot)
  return PerRow(nll_dot, lse_dot, None if u is None else uniform_dot, None)


_rule.defvjp(_fwd, _bwd)
_soft_cross_entropy = compiled(enable_forward_mode(_rule, tangent=_tangent), static_argnums=5)


@overload
def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: Literal[False] = False,
) -> jax.Array: ...


@overload
def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: Literal[True],
) -> tuple[jax.Array, CrossEntropyAux]: ...


@overload
def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]: ...


def softmax_cross_entropy(
  logits: ArrayLike,
  labels: ArrayLike,
  axis: Axis = -1,
  where: ArrayLike | None = None,
  *,
  label_smoothing: ArrayLike = 0.0,
  z_loss: ArrayLike = 0.0,
  class_weights: ArrayLike | None = None,
  sample_weights: ArrayLike | None = None,
  reduction: Reduction = "none",
  axis_name: AxisName | None = None,
  return_aux: bool = False,
) -> jax.Array | tuple[jax.Array, CrossEntropyAux]:
  r"""Cross-entropy between the softmax of logits and a distribution over the classes.

  .. math:: L = -\sum_k t_k \log a_k, \qquad
    \frac{\partial L}{\partial z_j} = a_j \sum_k t_k - t_j, \qquad
    \frac{\partial L}{\partial t_j} = -\log a_j

  A drop-in replacement for the function of this name in `optax.losses`, differentiable in both
  modes and in both arguments. Unlike there, loss and gradient keep all digits where the softmax is
  close to a one-hot label. Only the inputs and a few scalars per row are saved for the backward
  pass, whatever the options. With all options, the loss of a row is

  .. math:: L = s \, \Bigl( -\sum_k w_k \bigl((1 - \alpha)\, t_k + \frac{\alpha}{K}\bigr) \log a_k
    + \lambda \bigl(\log \sum_k e^{z_k}\bigr)^2 \Bigr)

  Args:
    logits: array ``[*B, V]`` of a floating dtype, differentiable. Sixteen-bit logits are computed
      in float32, narrower ones are refused.
    labels: array ``[*B, V]`` of a real dtype, differentiable if floating: the share t of each
      class, not necessarily summing to 1. Logits and labels broadcast against each other.
    axis: the axis or axes of the classes; None stands for all.
    where: optional booleans, either of the rank of the logits, to which they broadcast, or one per
      row, of the shape of the losses (a mask that fits both is one of classes). Classes where it is
      False take no part: they have probability 0, their label is left out of the sum, and their
      derivatives are 0, whatever they hold. A row without any class does not count: its loss is 0.
    label_smoothing: the share alpha of the label that is replaced by the uniform distribution over
      the K unmasked classes; a scalar in [0, 1], differentiable.
    z_loss: the coefficient lambda of the squared log-normalizer, which keeps that near 0; a scalar,
      differentiable.
    class_weights: optional weights w ``[V]`` of the classes (of the shape of the class axes, where
      ``axis`` is a tuple), differentiable.
    sample_weights: optional weights s ``[*B]`` of the rows, of any sign, differentiable. A row of
      weight 0 does not count, whatever its label and its logits (loss and gradient are 0); the
      derivative by that weight is the loss without it, or 0 if that is not finite.
    reduction: "none" for one loss per row, "sum", or "mean": the sum divided by the sum of the
      sample weights of the rows that count (by their number without these; whatever their labels
      sum to, and also with class weights), or 0 where that is 0.
    axis_name: inside `jax.shard_map`, the name (or names) of the mesh axis over whose devices the
      classes are spread: each device holds a slice of the logits, of the labels, of ``where`` and
      of ``class_weights``. The loss is the same on all of these devices. The order of several
      names does not matter. One reduction of one or two scalars per row and one of four to seven
      make it, and none its gradient.
    return_aux: whether to return a `CrossEntropyAux` with the log-normalizer, the part that the
      z-loss adds and what the mean divides by too. They are differentiable like the loss.

  Returns:
    Losses ``[*B]``, or one number if reduced, in float32 (float64 where an argument has it). A
    class whose logit is -inf, or so far below the largest that their difference overflows, adds
    +inf, or 0 where its weighted label is exactly 0, in which case its derivatives are 0 too. Rows
    that contain NaN or +inf, or logits of -inf alone, give NaN. Without classes the loss is 0.

  Raises:
    TypeError: if the logits are not of a floating dtype, the labels not of a real dtype, ``where``
      is not boolean, a coefficient not a real scalar, ``axis`` not a static int, tuple of ints or
      None, or ``return_aux`` not a static bool.
    ValueError: if ``axis`` is out of range or repeats an axis, the shapes do not fit, ``reduction``
      is unknown, ``label_smoothing`` is known while tracing and outside [0, 1], or ``axis_name`` is
      no axis of a surrounding `jax.shard_map` with ``check_vma=True`` over which the logits are
      spread.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy
    >>> logits, labels = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.5, 0.5, 0.0])
    >>> with jnp.printoptions(precision=4):
    ...   print(f"{softmax_cross_entropy(logits, labels):.4f}")
    ...   print(jax.grad(softmax_cross_entropy)(logits, labels))
    ...   print(jax.grad(softmax_cross_entropy, argnums=1)(logits, labels))
    1.2395
    [ 0.287  -0.3935  0.1065]
    [0.2395 2.2395 2.2395]

  Source: seed step 6; Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and
  softmax functions", IMA Journal of Numerical Analysis (2021), for the sum without the largest
  class; Szegedy et al. (2016) for label smoothing; t5x for the z-loss.
  """
  arguments = Arguments("softmax_cross_entropy")
  logits = arguments.as_logits("logits", logits)
  labels = arguments.as_probabilities(labels)
  dtype = compute_dtype(logits.dtype, labels.dtype)
  axes = arguments.as_axes("logits", axis, logits.shape)
  chosen = options.checked(arguments, dtype, label_smoothing, z_loss, reduction)
  return_aux = arguments.as_flag("return_aux", return_aux)
  shape = arguments.common_shape("logits", logits.shape, "labels", labels.shape)
  axes = tuple(a + len(shape) - logits.ndim for a in axes)
  weights = None
  if class_weights is not None:
    class_shape = tuple(shape[a] for a in axes)
    weights = arguments.as_class_weights(class_weights, class_shape).astype(dtype)
    weights = jnp.transpose(weights, tuple(np.argsort(axes)))
    weights = jnp.expand_dims(weights, [a for a in range(len(shape)) if a not in axes])
  if sample_weights is not None:
    rows = tuple(size for a, size in enumerate(shape) if a not in axes)
    sample_weights = arguments.as_sample_weights(sample_weights, rows).astype(dtype)
    sample_weights = jnp.expand_dims(sample_weights, axes)
  mask = None
  if where is not None:
    mask = arguments.as_class_mask(where, logits.shape, labels.shape, shape, axes)
  logits = broadcast(logits, shape)
  labels = with_rank(labels, len(shape))
  if axis_name is not None:
    same = {} if sample_weights is None else {"sample_weights": sample_weights}
    arguments.check_axis_name(axis_name, "logits", logits, **same)

  classes = Rows(axes, axis_name)
  num_classes = math.prod(shape[a] for a in axes) * classes.num_devices()
  if num_classes == 0:  # then no row counts
    rows = tuple(1 if a in axes else size for a, size in enumerate(shape))
    per_row = PerRow(*[jnp.zeros(rows, dtype)] * 4)
  else:
    static = _Static(classes, num_classes, chosen.label_smoothing is not None)
    arrays = logits, labels, mask, weights, sample_weights
    *arrays, sample_weights = align(*arrays, without=axis_name)
    # Over the devices that classes are spread over, sample weights stay the same.
    arrays = varying_alike(*arrays)
    weightless = None if sample_weights is None else sample_weights == 0
    per_row = _soft_cross_entropy(*arrays, weightless, static)
  squeezed = jax.tree.map(lambda x: jnp.squeeze(x, axes), (per_row, sample_weights))
  loss, aux = options.combine(chosen, *squeezed)
  return (loss, aux) if return_aux else loss
