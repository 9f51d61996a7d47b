r"""How far a result may be from its reference: errors in norm, and bounds from rounding alone.

A result A in a dtype with unit roundoff u is compared with a float64 reference R. The error is
measured in the Euclidean norm over *groups* of entries: all of them, and every slice along every
axis, so that one wrong row among thousands is not averaged away. For a group g

    error_g = |A_g - R_g| / s_g,    s_g = max(|R_g|, 0.1 * typical entry of R * sqrt(entries in g)),

and the bound on it is the sum of four terms, none of which grows with the size of the array (the
second grows like the root of its logarithm):

* NOISE * (spread of A - R). What rounding does to this function cannot be derived without knowing
  it, but it can be watched: its errors change at random when the inputs move by a few ulps, while
  the error of a wrong formula stays. So A and R are computed again at a few such points, both at
  the same point, so that the condition of the function cancels, and the root mean square of the
  change of A - R over g is the rounding noise of g, times sqrt(2). At least 32 numbers (points x
  probes x entries) go into each estimate, or g is not judged on its own; the estimate is then
  below half of the truth with a probability under 1e-6, which 6 standard deviations outweigh.
* ROUNDING * u * sqrt(2 + log2 n) * s_g. Errors that do not change at random: the last rounding (u),
  the exponential and its like (some ulps, 2u each; four times as many in a series, as of the gamma
  function), and sums. XLA sums n terms in a tree or in
  lanes, so that each term passes about log2 n roundings, which add like a random walk.
* The error of the reference, where that was found by finite differences.
* The smallest normal number per entry (float16: four times the smallest number), for underflow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from softmax_jax.verify.problem import finfo

NOISE = 6.0
ROUNDING = 4.0
# With a larger bound than this a comparison says nothing, and is reported as skipped.
USELESS = 0.5

EMPTY = "it is empty"

_SAMPLES = 32
_FLOOR = 0.1


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The worst group of a comparison: its error and bound, and the worst entry in it.

  ``got`` and ``expected`` are that entry, of the probe in which it is worst.
  """

  error: float
  bound: float
  index: tuple[int, ...]
  passed: bool
  useless: str = ""
  got: float = math.nan
  expected: float = math.nan


def unit_roundoff(dtypes: Sequence[Any]) -> float:
  """The largest unit roundoff among floating dtypes."""
  return max(float(finfo(dtype).eps) / 2 for dtype in dtypes)


# What XLA sums up as a series, or a recurrence, is right to some ten units only.
_SERIES = {
  *("lgamma", "digamma", "polygamma", "zeta", "igamma", "igammac", "igamma_grad_a"),
  *("random_gamma_grad", "regularized_incomplete_beta", "bessel_i0e", "bessel_i1e", "erf_inv"),
}


def inexactness(operations: set[str]) -> float:
  """How many times the usual rounding the errors may be that do not change at random."""
  return 4.0 if operations & _SERIES else 1.0


def rounding(unit: float, size: int) -> float:
  """What a result may be off by, relative to its size, without the errors that change at random."""
  return ROUNDING * unit * math.sqrt(2 + math.log2(size))


def unit_of_constants(dtypes: Sequence[Any]) -> float:
  """The unit for f and its rule in float64, whose constants may be rounded to other dtypes.

  Each may round another constant to its own dtype, and no more than that can be asked of them. In
  sixteen bits, where that is much, an eighth is allowed for: few constants are rounded there, and
  each contributes to a part of the result.
  """
  unit = unit_roundoff(dtypes)
  return unit if unit < 2.0**-12 else unit / 8


def judge(
  errors: Sequence[np.ndarray],
  expected: np.ndarray,
  slack: np.ndarray,
  *,
  dtype: Any,
  unit: float,
  size: int,
  bound: float | None = None,
  useless: float = USELESS,
  floor: float = 0.0,
) -> Verdict:
  """Judges the errors of one array.

  Args:
    errors: A - R at the point itself and at the points near it, each ``[probes, *shape]``, float64.
    expected: R at the point itself, ``[probes, *shape]``. Entries that are NaN are left out.
    slack: the error that R itself may have, ``[probes, *shape]``.
    dtype: of A, for its underflow.
    unit: the unit roundoff of the problem.
    size: the number of entries of its largest array.
    bound: a relative bound in place of the derived one.
    useless: the derived bound above which a comparison says nothing.
    floor: the smallest size that errors are measured against.
  """
  error, near = errors[0], errors[1:]
  if not error.size:
    return Verdict(math.nan, math.nan, (), True, EMPTY)
  undefined = np.isnan(expected)
  if undefined.all():
    return Verdict(math.nan, math.nan, (), True, "the reference is not a number anywhere")
  error = np.where(undefined, 0, error)

  def entry(index: tuple[int, ...]) -> tuple[float, float]:
    errors, right = error[(slice(None), *index)], expected[(slice(None), *index)]
    probe = int(np.argmax(np.nan_to_num(np.abs(errors), nan=np.inf)))
    with np.errstate(invalid="ignore"):
      return float(right[probe] + errors[probe]), float(right[probe])

  wrong = ~np.isfinite(error)
  if wrong.any():
    index = tuple(int(i) for i in np.argwhere(wrong)[0][1:])
    return Verdict(math.inf, bound or unit, index, False, "", *entry(index))
  scale = np.where(np.isfinite(expected), expected, 0)
  typical = math.sqrt(np.mean(scale**2))
  squared_noise = np.zeros_like(error)
  for other in near:
    change = np.where(np.isfinite(other), other - error, 0)
    squared_noise += change**2 / len(near)
  tiny = _underflow(dtype)

  def groups(axis: int | None) -> _Groups:
    others = None if axis is None else tuple(a for a in range(error.ndim) if a != axis)
    count = error.size if axis is None else error.size // error.shape[axis]
    total = functools.partial(_total, axes=others)
    size_g = np.sqrt(np.maximum(total(scale**2), (_FLOOR * typical) ** 2 * count))
    size_g = np.maximum(size_g, floor)
    found, of_reference = np.sqrt(total(error**2)), np.sqrt(total(slack**2))
    if bound is not None:
      return _Groups(axis, found, bound * size_g, size_g, of_reference)
    limit = (
      NOISE * np.sqrt(total(squared_noise))
      + rounding(unit, size) * size_g
      + of_reference
      + tiny * math.sqrt(count)
    )
    return _Groups(axis, found, limit, size_g, of_reference)

  everything = groups(None)
  slices = [
    groups(axis)
    for axis in range(1, error.ndim)
    if error.size // error.shape[axis] * len(near) >= _SAMPLES and error.shape[axis] > 1
  ]
  worst = max((everything, *slices), key=lambda groups: groups.ratio)
  passed = bool(worst.ratio <= 1)
  reason = everything.why_useless(useless, tiny) if bound is None else ""
  if undefined.any() and not np.any(np.nan_to_num(expected)):
    reason = "the reference is not a number anywhere but where it is 0"
  index = worst.entry(error)
  return Verdict(*worst.relative, index, passed, reason if passed else "", *entry(index))


class _Groups:
  """All entries together, or the slices along an axis: one number per group in each array."""

  def __init__(
    self,
    axis: int | None,
    found: np.ndarray,
    limit: np.ndarray,
    size: np.ndarray,
    of_reference: np.ndarray,
  ):
    """The errors, the bounds on them, the sizes of the results, and the bounds' part from R."""
    self.axis, self.found, self.limit, self.size = axis, found, limit, size
    self.of_reference = of_reference
    with np.errstate(divide="ignore", invalid="ignore"):
      ratios = np.where(found > 0, found / limit, 0)
    self.place = int(np.argmax(ratios))  # of the worst group
    self.ratio = float(ratios[self.place])

  @property
  def relative(self) -> tuple[float, float]:
    """The error and the bound of the worst group, relative to its size."""
    size = self.size[self.place]
    unit = size if size > 0 else 1
    return float(self.found[self.place] / unit), float(self.limit[self.place] / unit)

  def entry(self, error: np.ndarray) -> tuple[int, ...]:
    """The index of the entry with the largest error in the worst group."""
    largest = np.abs(error).max(axis=0)
    if self.axis is not None:
      inside = np.zeros(largest.shape, bool)
      inside[(slice(None),) * (self.axis - 1) + (self.place,)] = True
      largest = np.where(inside, largest, -1)
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(largest)), largest.shape))

  def why_useless(self, useless: float, tiny: float) -> str:
    """Why the bound on all entries together is too large to say anything, or ""."""
    found, limit, size, of_reference = (
      float(x[0]) for x in (self.found, self.limit, self.size, self.of_reference)
    )
    if not limit > useless * size:
      return ""
    # A result of 0 is as good as any, unless only the error that R may have makes it agree.
    if size == 0 and found <= limit - of_reference:
      return ""
    share = limit / max(size, tiny)
    if share > 2:
      return "the result is smaller than its rounding errors"
    return f"rounding alone may be {share:.0%} of the result"


def _underflow(dtype: Any) -> float:
  """What an entry of this dtype may lose to underflow."""
  limits = finfo(dtype)
  half = limits.bits == 16 and limits.nmant > 7
  return float(4 * limits.smallest_subnormal if half else limits.tiny)


def _total(x: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
  return np.atleast_1d(np.sum(x, axis=axes))
