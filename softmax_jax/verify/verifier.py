"""The machinery under the checks: evaluates both sides of a comparison, judges, makes rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from softmax_jax.verify import bounds
from softmax_jax.verify.errors import first_line, not_offered
from softmax_jax.verify.options import Options
from softmax_jax.verify.oracle import Oracle
from softmax_jax.verify.problem import Arrays, Problem, compiled, finfo, norm_of_products, size_of
from softmax_jax.verify.report import Row, Skip

# For arrays with more entries fewer probes suffice, and then fewer points near each.
MANY = 10_000
_LARGE = 1_000_000


# What is right although it differs, by the operation, and where the derivative is almost 0.
_CAVEATS = {
  "eigh": "right up to a sign? f calls eigh",
  "svd": "right up to a sign? f calls svd",
  "while": "right to the tolerance of a solver? f has a while loop",
}
_SATURATED = "saturated? f moves by less than its values round"


class Comparison(NamedTuple):
  """One array, what it should be, and how far off that may be.

  ``floor``, for a single number, is a size beside which no difference matters. ``unknown``, if any,
  is the reason why ``expected`` proves nothing: agreement with it is then skipped, not passed.
  """

  of: str
  dtype: Any
  actual: Any
  expected: Any
  slack: Any = 0.0
  floor: float = 0.0
  unknown: str = ""


# What a check compares, by the number of the probe and that of a point near it.
Evaluate = Callable[[int, int], list[Comparison]]
# A comparison, the shape of its array, and the verdict on it.
Judged = tuple[Comparison, tuple[int, ...], bounds.Verdict]


@dataclasses.dataclass
class _Compiled:
  """What verifiers of one function share where their arguments are of the same types."""

  programs: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict[str, Any])
  no_forward: str | None = None  # `Verifier.forward`, once it was asked for
  own: Oracle | None = None  # `Verifier.own`, at the first arguments


class Verifier:
  """A function at its arguments, its oracle, and what the caller asked for."""

  def __init__(
    self, problem: Problem, oracle: Oracle, options: Options, compiled: _Compiled | None = None
  ):
    """``compiled`` comes from another verifier of the same function."""
    self.problem, self.oracle, self.options = problem, oracle, options
    self.name = _name(problem.f) if options.name is None else options.name
    self.known: dict[str, Any] = {}  # what checks found out at these arguments
    self._compiled = _Compiled() if compiled is None else compiled
    ys, _ = oracle.value(problem.xs)
    problem.masks = [np.isfinite(y) for y in ys]

  @functools.cached_property
  def own(self) -> Oracle:
    """The oracle of f itself, whose rule `finite_differences` confirms.

    Where f is in sixteen bits it is evaluated in float64, not called with it: so a fault of a few
    percent in a branch for sixteen bits does not hide behind rounding.
    """
    coarse = min(finfo(dtype).bits for dtype in self.problem.unit_dtypes) < 32
    if not self.oracle.given and (self.oracle.evaluated or not coarse):
      return self.oracle
    if self._compiled.own is None:
      self._compiled.own = self._oracle_of_f(coarse)
    return self._compiled.own.at(self.problem)

  def _oracle_of_f(self, evaluated: bool) -> Oracle:
    if evaluated:
      found = Oracle(self.problem, None, evaluated=True)
      try:
        found.vjp(self.problem.point())
        return found
      except Exception:  # An operation that only the derivative has may not be in float64.
        pass
    return Oracle(self.problem, None)

  @property
  def forward(self) -> str:
    """Why f has no forward mode, or ""."""
    if self._compiled.no_forward is None:
      self._compiled.no_forward = self._no_forward()
    return self._compiled.no_forward

  def _no_forward(self) -> str:
    # Some reasons only show when JAX compiles.
    try:
      self.problem.jvp(self.problem.xs, self.problem.ns, self.problem.xs)
    except (Exception, SystemExit) as error:
      return not_offered(error)
    return ""

  def at(self, args: Sequence[Any], seed: int) -> Verifier:
    """The same at other arguments, with programs that are compiled already where they fit."""
    problem, shared = self.problem.at(args, seed)
    if shared:
      return Verifier(problem, self.oracle.at(problem), self.options, self._compiled)
    return Verifier(problem, Oracle(problem, self.options.reference), self.options)

  def program(
    self, name: str, f: Callable[..., Any], *, quickly: bool = False
  ) -> Callable[..., Any]:
    """``f`` compiled, once under this name."""
    return self._compiled.programs.setdefault(name, compiled(f, quickly=quickly))

  # --- conditions ---------------------------------------------------------------------------------

  def need_floats(self) -> None:
    """Skips where there is nothing to differentiate."""
    if not self.problem.xs:
      raise Skip("no argument has a floating dtype")
    if not self.problem.out_types:
      raise Skip("no output has a floating dtype")

  def need_derivatives(self) -> None:
    """Skips where there is no derivative."""
    self.need_floats()
    masks = self.problem.masks
    if not any(x.size for x in self.problem.xs):
      raise Skip("no argument with a floating dtype has an entry")
    if not any(mask.size for mask in masks):
      raise Skip("no output with a floating dtype has an entry")
    if not any(mask.any() for mask in masks):
      raise Skip("no output is finite at these arguments")

  def need_float64(self) -> None:
    """Skips where f does not run in float64, and so would be compared with itself."""
    self.need_derivatives()
    if self.oracle.narrow:
      raise Skip(f"{self.oracle.narrow}; see finite_differences, or pass reference=")

  def need_forward(self) -> None:
    """Skips where f has no forward mode."""
    self.need_derivatives()
    if self.forward:
      raise Skip(self.forward)

  # --- comparisons --------------------------------------------------------------------------------

  def of_arguments(
    self, actual: Sequence[Any], expected: Arrays, note: str = ""
  ) -> list[Comparison]:
    """Comparisons of cotangents of the arguments."""
    return [
      Comparison(f"cotangent of {name}{note}", x.dtype, a, e)
      for name, x, a, e in zip(self.problem.names, self.problem.xs, actual, expected, strict=True)
    ]

  def of_outputs(
    self, what: str, actual: Sequence[Any], expected: Arrays, slack: Arrays | None = None
  ) -> list[Comparison]:
    """Comparisons of outputs or their tangents."""
    slack = [np.zeros_like(e) for e in expected] if slack is None else slack
    return [
      Comparison(f"{what}{name}", y.dtype, a, e, s)
      for name, y, a, e, s in zip(
        self.problem.out_names, self.problem.out_types, actual, expected, slack, strict=True
      )
    ]

  def measure(
    self,
    check: str,
    evaluate: Evaluate,
    *,
    probes: int = 4,
    near: int = 4,
    transformation: str = "",
  ) -> list[Row]:
    """Evaluates a check at several probes and near them, and judges it: a row for the worst array.

    Arrays that are too noisy to be judged get a row of their own.
    """
    judged = self.judge(check, evaluate, probes, near)
    return self.rows(f"{check}: {transformation}" if transformation else check, judged)

  def judge(
    self,
    check: str,
    evaluate: Evaluate,
    probes: int,
    near: int,
    *,
    useless: float = bounds.USELESS,
    unit: float | None = None,
  ) -> list[Judged]:
    """The verdict on each array."""
    if self.problem.size > MANY:
      probes = min(probes, 2)
    if self.problem.size > _LARGE:
      near = 1
    with np.errstate(all="ignore"):  # Infinities are judged below.
      runs = [[evaluate(p, k) for p in range(probes)] for k in range(near + 1)]
    # A comparison is known by its place in the list.
    judged: list[Judged] = []
    for place, first in enumerate(runs[0][0]):

      def stack(k: int, field: str, place: int = place) -> np.ndarray:
        return np.stack([np.asarray(getattr(run[place], field), np.float64) for run in runs[k]])

      expected = _rounded_to_infinity(stack(0, "expected"), first.dtype)
      slack = np.broadcast_to(
        np.stack([np.broadcast_to(r[place].slack, expected.shape[1:]) for r in runs[0]]),
        expected.shape,
      )
      errors = [
        _difference(stack(k, "actual"), _rounded_to_infinity(stack(k, "expected"), first.dtype))
        for k in range(near + 1)
      ]
      verdict = bounds.judge(
        errors,
        expected,
        slack,
        dtype=first.dtype,
        unit=self._unit() if unit is None else unit,
        size=self.problem.size,
        bound=(self.options.bounds or {}).get(check),
        useless=useless,
        floor=max(run[place].floor for run in runs[0]),
      )
      if verdict.passed and first.unknown:
        verdict = dataclasses.replace(verdict, useless=first.unknown)
      judged.append((first, expected.shape[1:], verdict))
    return judged

  def _unit(self) -> float:
    unit = bounds.unit_roundoff(self.problem.unit_dtypes)
    return unit * bounds.inexactness(self.problem.operations)

  def rows(self, label: str, judged: Sequence[Judged]) -> list[Row]:
    """A row for the worst array, and one for each that cannot be judged."""
    rows: list[Row] = []
    telling = [j for j in judged if not j[2].useless]
    silent = {(j[0].of, j[2].useless): j for j in judged if j[2].useless}
    for of, shape, verdict in silent.values():
      rows.append(
        Row(
          self.name, label, "skipped", of.of, str(np.dtype(of.dtype)), shape,
          verdict.error, verdict.bound, verdict.index, verdict.useless,
        )
      )  # fmt: skip
    if telling:
      of, shape, worst = max(telling, key=lambda j: _ratio(j[2]))
      rows.insert(
        0,
        Row(
          self.name, label, "passed" if worst.passed else "failed", of.of, str(np.dtype(of.dtype)),
          shape, worst.error, worst.bound, worst.index, "" if worst.passed else self._caveat,
          worst.got, worst.expected,
        ),
      )  # fmt: skip
    return rows

  @property
  def _caveat(self) -> str:
    """Why a right function may fail, as far as its operations tell, or ""."""
    found = [why for name, why in _CAVEATS.items() if name in self.problem.operations]
    return "; ".join([*found, _SATURATED] if self._saturated else found)

  @functools.cached_property
  def _saturated(self) -> bool:
    """Whether arguments that move by their own size move the values by less than these round."""
    problem = self.problem
    point = problem.point()
    try:
      bars, (ys, _) = self.oracle.vjp(point), self.oracle.value(point.xs)
    except Exception:  # f may have no reverse mode.
      return False
    moved = norm_of_products([size_of(x) for x in point.xs], bars)
    rounding = bounds.unit_roundoff(problem.unit_dtypes) * norm_of_products(point.us, ys)
    return 0 < moved < rounding

  def count(
    self, check: str, number: float, allowed: float, *, of: str = "", reason: str = ""
  ) -> list[Row]:
    """A row about a number and its limit."""
    status = "passed" if number <= allowed else "failed"
    return [
      Row(self.name, check, status, of=of, error=float(number), bound=float(allowed), reason=reason)
    ]

  def run(self, check: str, function: Callable[[Verifier], list[Row]]) -> list[Row]:
    """The rows of a check; where it does not apply or raises, that is a row too."""
    try:
      return function(self)
    except Skip as skip:
      return [Row(self.name, check, "skipped", reason=str(skip))]
    except (Exception, SystemExit) as error:  # A rule may do anything.
      reason = not_offered(error)
      if reason:
        return [Row(self.name, check, "skipped", reason=reason)]
      return [Row(self.name, check, "failed", reason=first_line(error))]


def _name(f: Callable[..., Any]) -> str:
  return getattr(f, "__name__", None) or getattr(getattr(f, "func", None), "__name__", "f")


def _rounded_to_infinity(x: np.ndarray, dtype: Any) -> np.ndarray:
  """``x`` with infinities for what is too large for the dtype."""
  return np.where(np.abs(x) > float(finfo(dtype).max), np.copysign(np.inf, x), x)


def _difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
  with np.errstate(invalid="ignore"):
    same = (actual == expected) | (np.isnan(expected))
    return np.where(same, 0.0, actual - expected)


def _ratio(verdict: bounds.Verdict) -> float:
  if math.isnan(verdict.error):
    return -1.0
  if verdict.bound == 0:
    return math.inf if verdict.error > 0 else 0.0
  return verdict.error / verdict.bound
