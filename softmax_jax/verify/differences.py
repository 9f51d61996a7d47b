r"""Derivatives by finite differences in float64, and the errors that they may have.

Differences of g(h) = f(x + h v) are taken by Ridders' method: central differences

    d(h) = (g(h) - g(-h)) / (2 h) = g'(0) + c_1 h^2 + c_2 h^4 + ...

with steps h from 1/8 to 2^-17, each a quarter of the one before, are extrapolated to h = 0 by
T[i][j] = T[i][j-1] + (T[i][j-1] - T[i-1][j-1]) / (16^j - 1). For each entry of f that T is taken
which has the least error: how much it differs from the two that it is formed from, and the rounding
of values and arguments, eps (|g| + |g'| |x| / |v|) / h. For smooth f an error of 1e-10 remains.

Where an entry stays unknown other steps are tried: shorter ones, as f may vary fast, have a kink or
the end of its domain nearby; longer ones, up to a tangent of 1, as the values of f may hardly move.
An entry at a kink (of a relu, say), or where f is finite on one side only, has no derivative: NaN.

Source: C. J. F. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering
Software 4 (1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from softmax_jax.verify.problem import Arrays

_STEPS = 2.0**-3 * 4.0 ** -np.arange(8)
# The shifts at which values are taken, as multiples of the tangent at a scale of 1.
SHIFTS = np.concatenate([_STEPS, -_STEPS, [0.0]])
_SCALE = 2.0**8  # between one set of steps and the next
_SHORTER = 3  # sets of shorter steps; beyond them the rounding of float64 is all there is
_LONGER = 10

# A derivative along a tangent of 1 that is below this share of the value counts as 0: it is a sum
# of terms that cancel.
NEGLIGIBLE = 2e-5
# Entries known less well than this, relative to the typical one, are left out if they are few.
_KNOWN = 1e-3
# Other steps are tried until all entries are known as well as this.
_WANTED = 1e-6


def derivatives(
  values: Callable[[float], Sequence[np.ndarray]],
  xs: Sequence[np.ndarray],
  vs: Sequence[np.ndarray],
  eps: float,
) -> tuple[Arrays, Arrays]:
  """The derivatives at xs along vs, and their errors.

  Args:
    values: the values of each output at ``xs + scale * SHIFTS * vs``, stacked, by the scale.
    xs: the arguments.
    vs: the tangents.
    eps: the precision of the values, that of the coarsest dtype to which f rounds inside.
  """
  best: list[tuple[np.ndarray, np.ndarray]] = []
  moved = _largest([x[v != 0] for x, v in zip(xs, vs, strict=True)])
  size = _largest(vs)
  # How far the arguments are rounded, in tangents.
  of_arguments = np.finfo(np.float64).eps * moved / size if size > 0 else 0.0
  for scale in _scales(size, eps):
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
      ys = values(scale)
      found = [_of_output(np.asarray(y, np.float64), scale, eps, of_arguments) for y in ys]
      best = [_better(*pair) for pair in zip(best, found, strict=True)] if best else found
      zeros = [NEGLIGIBLE * min(1.0, size) * _norm(np.asarray(y)[-1]) for y in ys]
    if all(_unknown(*pair, zero) <= _WANTED for pair, zero in zip(best, zeros, strict=True)):
      break
  return [dot for dot, _ in best], [error for _, error in best]


def _scales(size: float, eps: float) -> Iterator[float]:
  """The scales of the steps, in the order in which they are tried."""
  yield 1.0
  # Where f rounds to a dtype below float64 its values are a staircase on the scale of short steps.
  if eps <= np.finfo(np.float64).eps:
    yield from (_SCALE**-i for i in range(1, _SHORTER + 1))
  for i in range(1, _LONGER + 1):
    if 0 < size * _SCALE ** (i - 1) < 1:
      yield min(_SCALE**i, 1 / size)


def _largest(arrays: Sequence[np.ndarray]) -> float:
  """The largest finite entry."""
  return max(
    (float(np.max(np.abs(a), initial=0, where=np.isfinite(a))) for a in arrays), default=0.0
  )


def _better(
  one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Of each entry the derivative with the smaller error, or their difference if that is larger."""
  known, apart = ~np.isnan(other[0]), np.abs(one[0] - other[0])
  take = known & (np.isnan(one[0]) | (other[1] < one[1]))
  best, error = np.where(take, other[0], one[0]), np.where(take, other[1], one[1])
  return best, np.where(apart > one[1] + other[1], apart, error)  # False where one is NaN


def _unknown(best: np.ndarray, error: np.ndarray, zero: float) -> float:
  """How much of derivatives is not known: the share of the entries, or of the norm."""
  nan, size = np.isnan(best), max(_norm(best), zero)
  of_norm = _norm(np.where(nan, 0, error)) / size if size > 0 else 0.0
  return max(of_norm, float(nan.mean())) if best.size else 0.0


def _norm(x: np.ndarray) -> float:
  """The norm of the finite entries."""
  return math.sqrt(np.sum(x**2, where=np.isfinite(x)))


def _of_output(
  y: np.ndarray, scale: float, eps: float, of_arguments: float
) -> tuple[np.ndarray, np.ndarray]:
  """The derivatives of one output and their errors, from its values after the shifts."""
  steps = scale * _STEPS
  up, down, here = y[: len(steps)], y[len(steps) : -1], y[-1]
  column = steps.reshape(-1, *(1,) * here.ndim)
  slopes = (up - down) / (2 * column)
  rounding = (eps * np.abs(here) + of_arguments * np.abs(slopes)) / column
  best, error, step = _extrapolated(slopes, rounding, steps)
  # Long steps may agree with each other where f varies on the scale of the shortest.
  shortest = slopes[-1] + (slopes[-1] - slopes[-2]) / 15
  error = np.fmax(error, np.abs(shortest - best) - 4 * rounding[-1])
  # Slopes that only grow are those of a jump, or of a pole that all steps reach across.
  growth = slopes[-3:] / slopes[-4:-1]
  diverges = np.all((growth > 2) & (growth < 40), axis=0) & (np.abs(slopes[-1]) > 4 * rounding[-1])
  error = np.where(diverges, np.inf, error)
  finite = np.isfinite(here) & np.isfinite(error)  # Where f is infinite it has no derivative.
  best, error = np.where(finite, best, np.nan), np.where(finite, error, 0)
  return _without_kinks(best, error, (up - 2 * here + down) / (2 * column), rounding, step, steps)


def _without_kinks(
  best: np.ndarray,
  error: np.ndarray,
  bends: np.ndarray,
  rounding: np.ndarray,
  step: np.ndarray,
  steps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """The derivatives with NaN for those at a kink, where there is none, and their errors.

  A bend is half the difference of the slopes on both sides, over the distance of a step. From one
  step to the next it shrinks to a quarter where f is smooth, and grows where it is only noise.
  Where the step reaches across a kink it does neither; so may a small bend, once, by chance.
  """
  finite = np.isfinite(best)
  typical = math.sqrt(np.mean(best[finite] ** 2)) if finite.any() else 0.0
  rough = _KNOWN * np.maximum(typical, np.abs(best))
  before, after = np.abs(bends[3:-1]), np.abs(bends[4:])
  clear = after > np.maximum(rough, 4 * rounding[4:])
  kink = np.any(clear & (before / 2 < after) & (after < 1.5 * before), axis=0)
  before, after = before[-2:], after[-2:]
  constant = (0.8 * before < after) & (after < 1.25 * before) & (after > 4 * rounding[-2:])
  kink |= np.all(constant, axis=0)
  unknown = finite & (kink | (error > rough))
  if unknown.sum() > 0.1 * finite.sum():
    unknown = finite & kink
  best, error = np.where(unknown, np.nan, best), np.where(unknown, 0, error)
  known = finite & ~unknown
  if not known.any():
    return best, error
  # What does not shrink to a quarter at the smallest step is noise of the values. Two
  # extrapolations may agree by chance: no entry counts as known better than is typical.
  sizes = np.abs(best) + (_KNOWN * typical or 1.0)

  def usual(x: np.ndarray) -> np.ndarray:
    return math.sqrt(np.mean((x / sizes)[known] ** 2)) * sizes

  change: np.ndarray = bends[-1] - bends[-2] / 4
  noise = usual(np.where(np.isfinite(change), change, 0)) * steps[-1]
  return best, np.where(known, 3 * error + usual(error) + 2 * noise / step, 0)


def _extrapolated(
  slopes: np.ndarray, rounding: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For each entry the extrapolation with the smallest estimated error, that error, the step."""
  best, error = slopes[-1], np.full(slopes.shape[1:], np.inf)
  chosen = np.full(slopes.shape[1:], steps[-1])
  previous: list[np.ndarray] = []
  for difference, of_values, step in zip(slopes, rounding, steps, strict=True):
    current = [difference]
    for j, before in enumerate(previous[:4], 1):
      current.append(current[-1] + (current[-1] - before) / (16.0**j - 1))
      spread = np.maximum(np.abs(current[-1] - current[-2]), np.abs(current[-1] - before))
      spread = spread + of_values
      better = spread < error  # False where it is NaN.
      best, error = np.where(better, current[-1], best), np.where(better, spread, error)
      chosen = np.where(better, step, chosen)
    previous = current
  return best, error, chosen
