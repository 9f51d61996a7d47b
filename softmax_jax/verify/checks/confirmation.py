"""Whether finite differences confirm the rule of f in float64, the reference of most checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from softmax_jax.verify.checks.common import MAX_ARGUMENTS, directions, inner, one_by_one
from softmax_jax.verify.errors import first_line, not_offered
from softmax_jax.verify.problem import Arrays
from softmax_jax.verify.report import Skip
from softmax_jax.verify.verifier import Comparison, Judged, Verifier

# A bound above this share of the derivative confirms nothing. A derivative below this share of the
# value counts as 0: it is a sum of terms that cancel.
_CONFIRMS = 0.05
_NEGLIGIBLE = 2e-5
# Below this bound differences have converged.
_RESOLVED = 1e-5


def differences(v: Verifier) -> list[tuple[str, Judged]]:
  """<J^T u, v> beside <u, Jv> by differences, judged, and which arguments v moves; done once."""
  if "differences" not in v.known:
    try:
      v.known["differences"] = _differences(v)
    except (Exception, SystemExit) as error:
      v.known["differences"] = error
  found = v.known["differences"]
  if isinstance(found, BaseException):
    raise found
  return found


def _differences(v: Verifier) -> list[tuple[str, Judged]]:
  problem = v.problem
  subjects: list[str] = []

  def evaluate(probe: int, near: int, wide: bool = False) -> list[Comparison]:
    point = problem.point(probe, near, wide=wide)
    ys, _ = v.oracle.value(point.xs)
    comparisons: list[Comparison] = []
    subjects.clear()
    for name, vs in directions(v, point):
      dots, slack = v.oracle.differences(point.xs, vs)
      kinks = [np.isnan(dot) & (u != 0) for u, dot in zip(point.us, dots, strict=True)]
      us = point.us
      if any(kink.any() for kink in kinks):
        us = [np.where(kink, 0, u).astype(u.dtype) for u, kink in zip(us, kinks, strict=True)]
      for _, out, chosen in [(-1, "", us), *one_by_one(v, us)]:
        bars = v.oracle.vjp(point, None if chosen is point.us else chosen)
        sizes = [np.abs(u.astype(np.float64)) for u in chosen]
        some = any(u.any() for u in chosen)
        subjects.append(name)
        comparisons.append(
          Comparison(
            f"<cotangent, tangent> of {name}{out}",
            np.float64,
            inner(bars, vs),
            inner(chosen, dots) if some else np.nan,
            sum(float(np.sum(u * s)) for u, s in zip(sizes, slack, strict=True)),
            _NEGLIGIBLE
            * sum(np.sum(u * np.abs(y), where=u > 0) for u, y in zip(sizes, ys, strict=True)),
            "" if some else "f has no derivative here: a kink, or it is not finite",
          )
        )
    return comparisons

  unit = 2.0**-53 if not v.oracle.narrow else None

  def judge(wide: bool) -> list[Judged]:
    compare = functools.partial(evaluate, wide=wide)
    return v.judge("finite_differences", compare, 4, 2, useless=_CONFIRMS, unit=unit)

  # If f is in float64 so are both sides, and their noise is that of float64. Only where values vary
  # faster than the steps resolve, and so look like noise, may it be that of coarser arguments.
  wide = v.oracle.inside == np.float64
  judged = judge(wide)
  if wide and any(not verdict.passed and verdict.bound > _RESOLVED for _, _, verdict in judged):
    pairs = zip(judged, judge(False), strict=True)
    judged = [a if a[2].passed or a[2].bound <= _RESOLVED else b for a, b in pairs]
  return list(zip(subjects, judged, strict=True))


def unconfirmed(v: Verifier) -> dict[str, str]:
  """The arguments by which f's own rule in float64 is no reference, and why."""
  if "unconfirmed" not in v.known:
    v.known["unconfirmed"] = {} if v.oracle.given else _unconfirmed(v)
  return v.known["unconfirmed"]


def _unconfirmed(v: Verifier) -> dict[str, str]:
  names = v.problem.names
  try:
    found = differences(v)
  except (Exception, SystemExit) as error:
    why = str(error) if isinstance(error, Skip) else not_offered(error) or first_line(error)
    return dict.fromkeys(names, _reason(why))
  reasons: dict[str, str] = {}
  for subject, (_, _, verdict) in found:
    together = subject not in names
    if not verdict.passed:
      why = "gradient contradicted by finite_differences; pass reference="
      reasons |= dict.fromkeys(names if together else [subject], why)
    elif verdict.useless and (not together or len(names) > MAX_ARGUMENTS):
      for name in names if together else [subject]:
        reasons.setdefault(name, _reason(verdict.useless))
  return reasons


def _reason(why: str) -> str:
  return f"gradient unconfirmed by finite differences ({why}); pass reference="


def cotangents(
  v: Verifier, actual: Sequence[Any], expected: Arrays, note: str = ""
) -> list[Comparison]:
  """Cotangents of the arguments compared with those of the oracle, where those can be trusted."""
  reasons = unconfirmed(v)
  comparisons = v.of_arguments(actual, expected, note)
  return [
    c._replace(unknown=reasons.get(name, ""))
    for name, c in zip(v.problem.names, comparisons, strict=True)
  ]
