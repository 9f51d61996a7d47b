"""Whether finite differences confirm the rule of f in float64, the reference of most checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from softmax_jax.verify.bounds import EMPTY, rounding, unit_of_constants, unit_roundoff
from softmax_jax.verify.checks.common import (
  directions,
  inner,
  one_by_one,
)
from softmax_jax.verify.differences import NEGLIGIBLE
from softmax_jax.verify.errors import first_line, not_offered
from softmax_jax.verify.problem import Arrays, norm_of_products
from softmax_jax.verify.report import UNCONFIRMED, Row, Skip
from softmax_jax.verify.verifier import MANY, Comparison, Judged, Verifier

# A bound above this share of the derivative confirms nothing.
_CONFIRMS = 0.05
# Below this bound differences have converged.
_RESOLVED = 1e-5


class Difference(NamedTuple):
  """<J^T u, v> beside <u, Jv> by differences, judged.

  v moves the ``argument`` of this name, or all of them, and u is a cotangent of one ``output``, or
  of all.
  """

  argument: str
  output: str
  judged: Judged

  @property
  def silent(self) -> str:
    """Why nothing is known, or ""."""
    verdict = self.judged[2]
    return "" if verdict.useless == EMPTY else verdict.useless


def differences(v: Verifier) -> list[Difference]:
  """The comparisons of f's own rule with differences, made once."""
  if "differences" not in v.known:
    try:
      v.known["differences"] = _differences(v)
    except (Exception, SystemExit) as error:
      v.known["differences"] = error
  found = v.known["differences"]
  if isinstance(found, BaseException):
    raise found
  return found


def _differences(v: Verifier) -> list[Difference]:
  # Tangents of two kinds (`Problem.point`), each of which may know what the other does not.
  return [d for kind in (0, 1) for d in _differences_along(v, kind)]


def _differences_along(v: Verifier, kind: int) -> list[Difference]:
  problem, own = v.problem, v.own
  of_constants = rounding(unit_of_constants(problem.unit_dtypes), problem.size)
  subjects: list[tuple[str, str]] = []

  def evaluate(probe: int, near: int, wide: bool = False) -> list[Comparison]:
    point = problem.point(2 * probe + kind, near, wide=wide)
    ys, _ = own.value(point.xs, near)
    comparisons: list[Comparison] = []
    subjects.clear()
    for name, vs in directions(v, point):
      dots, slack = own.differences(point, vs)
      kinks = [np.isnan(dot) & (u != 0) for u, dot in zip(point.us, dots, strict=True)]
      us = point.us
      if any(kink.any() for kink in kinks):
        us = [np.where(kink, 0, u).astype(u.dtype) for u, kink in zip(us, kinks, strict=True)]
      for _, out, chosen in [(-1, "", us), *one_by_one(v, us)]:
        bars = own.vjp(point, None if chosen is point.us else chosen)
        sizes = [np.abs(u.astype(np.float64)) for u in chosen]
        some = any(u.any() for u in chosen)
        subjects.append((name, out.removeprefix(" by ")))
        comparisons.append(
          Comparison(
            f"<cotangent, tangent> of {name}{out}",
            np.float64,
            inner(bars, vs),
            inner(chosen, dots) if some else np.nan,
            sum(float(np.sum(u * s)) for u, s in zip(sizes, slack, strict=True))
            + of_constants * norm_of_products(bars, vs),
            NEGLIGIBLE
            * min(1.0, max(float(np.max(np.abs(v), initial=0)) for v in vs))
            * sum(np.sum(u * np.abs(y), where=u > 0) for u, y in zip(sizes, ys, strict=True)),
            "" if some else "f has no derivative here: a kink, or it is not finite",
          )
        )
    return comparisons

  unit = unit_roundoff(problem.unit_dtypes) if own.narrow else 2.0**-53

  def judge(wide: bool) -> list[Judged]:
    compare = functools.partial(evaluate, wide=wide)
    probes = 1 if problem.size > MANY else 2
    return v.judge("finite_differences", compare, probes, 2, useless=_CONFIRMS, unit=unit)

  # If f is in float64 so are both sides, and their noise is that of float64. Only where values vary
  # faster than the steps resolve, and so look like noise, may it be that of coarser arguments.
  wide = own.inside == np.float64
  judged = judge(wide)
  if wide and any(not verdict.passed and verdict.bound > _RESOLVED for _, _, verdict in judged):
    pairs = zip(judged, judge(False), strict=True)
    judged = [a if a[2].passed or a[2].bound <= _RESOLVED else b for a, b in pairs]
  return [Difference(*s, j) for s, j in zip(subjects, judged, strict=True)]


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
  together = [d for d in found if d.argument not in names]
  reasons: dict[str, str] = {}
  for name in names:
    about = [d for d in found if d.argument == name]
    if not all(d.judged[2].passed for d in about + together):
      reasons[name] = "gradient contradicted by finite_differences; pass reference="
    else:
      silent = [d.silent for d in about or together if not d.output]
      if silent and all(silent):
        reasons[name] = _reason(silent[0])
  return reasons


def confirmed(v: Verifier) -> list[Row]:
  """A row for each argument and output that no derivative confirmed, with the reason."""
  silent = v.known.get("silent", {}) if v.oracle.given else _silent(v)
  return [Row(v.name, UNCONFIRMED, "skipped", of=n, reason=why) for n, why in silent.items()]


def _silent(v: Verifier) -> dict[str, str]:
  """The arguments and outputs with a derivative of one by the other that nothing confirmed."""
  problem = v.problem
  try:
    found = differences(v)
  except (Exception, SystemExit):  # Rows of the checks say why, and forward mode may be confirmed.
    return {}
  pairs: dict[tuple[str, str], list[str]] = {}
  for d in found:
    pairs.setdefault((d.argument, d.output), []).append(d.silent)
  # One argument and one output, where there were not too many to take them one by one.
  by_argument = any(argument in problem.names for argument, _ in pairs)
  by_output = any(output for _, output in pairs)
  reasons: dict[str, str] = {}
  for (argument, output), silent in pairs.items():
    one = (argument in problem.names, bool(output)) == (by_argument, by_output)
    if one and all(silent):
      arguments = [argument] if by_argument else problem.names
      for name in (*arguments, *([output] if by_output else problem.out_names)):
        reasons.setdefault(name, silent[0])
  for name, mask in zip(problem.out_names, problem.masks, strict=True):
    if mask.size and not mask.any():
      reasons[name] = "it is not finite anywhere"
  return {n: reasons[n] for n in (*problem.names, *problem.out_names) if n in reasons}


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
