"""The machinery under the checks: evaluates both sides of a comparison, judges, makes rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from softmax_jax.verify import bounds
from softmax_jax.verify.oracle import Oracle, first_line, message
from softmax_jax.verify.problem import Arrays, Problem, compiled, finfo
from softmax_jax.verify.report import Row, Skip

# With more entries than this in an array fewer probes do, and then fewer points near each.
_MANY = 10_000
_LARGE = 1_000_000


class Comparison(NamedTuple):
  """One array, what it should be, and what that may be wrong by.

  ``floor`` is a size beside which no difference matters, of a single number. If ``unknown`` is a
  reason why ``expected`` proves nothing, agreement with it is skipped and not passed.
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


class Verifier:
  """A function at its arguments, its oracle, and what the caller asked for."""

  def __init__(
    self,
    problem: Problem,
    oracle: Oracle,
    *,
    name: str,
    jacobian: Callable[..., Any] | None = None,
    edge_points: Sequence[Sequence[Any]] = (),
    limits: Mapping[str, float] | None = None,
    max_residual_bytes: int | None = None,
    skip: Collection[str] = (),
  ):
    """The options are those of `check_derivatives`; ``limits`` its ``bounds``."""
    self.problem, self.oracle, self.name = problem, oracle, name
    self.jacobian, self.edge_points = jacobian, edge_points
    self.limits, self.max_residual_bytes = dict(limits or {}), max_residual_bytes
    self.skip = skip  # what edge points are to do without
    self._programs: dict[str, Callable[..., Any]] = {}
    self.known: dict[str, Any] = {}  # what checks found out at these arguments
    self._mask_outputs()

  @functools.cached_property
  def forward(self) -> str:
    """Why f has no forward mode, or ""."""
    # Some reasons only show when JAX compiles.
    try:
      self.problem.jvp(self.problem.xs, self.problem.ns, self.problem.xs)
    except (Exception, SystemExit) as error:
      return not_offered(error)
    return ""

  def at(self, args: Sequence[Any], seed: int) -> Verifier:
    """The same at other arguments, with programs that are compiled already where they fit."""
    other = object.__new__(Verifier)
    other.__dict__.update(self.__dict__)
    other.problem, shared = self.problem.at(args, seed)
    if not shared:
      other._programs = {}
      other.__dict__.pop("forward", None)
    other.oracle = self.oracle.at(other.problem)
    other.known = {}
    other._mask_outputs()
    return other

  def _mask_outputs(self) -> None:
    ys, _ = self.oracle.value(self.problem.xs)
    self.problem.masks = [np.isfinite(y) for y in ys]

  def program(
    self, name: str, f: Callable[..., Any], *, quickly: bool = False
  ) -> Callable[..., Any]:
    """``f`` compiled, once under this name."""
    return self._programs.setdefault(name, compiled(f, quickly=quickly))

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

  def need_oracle(self) -> None:
    """Skips where f compiled would be compared with itself."""
    self.need_derivatives()
    if self.oracle.narrow:
      raise Skip(f"{self.oracle.narrow}; see finite_differences, or pass reference=")
    if self.oracle.own_dtype:
      raise Skip("f is in float64 already; see finite_differences, or pass reference=")

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

    Arrays of which nothing can be said because their noise is too large get a row of their own.
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
    """What `measure` finds of each array."""
    if self.problem.size > _MANY:
      probes = min(probes, 2)
    if self.problem.size > _LARGE:
      near = 1
    with np.errstate(all="ignore"):  # Infinities are judged below.
      runs = [[evaluate(p, k) for p in range(probes)] for k in range(near + 1)]
    # Comparisons are told apart by their place in the list.
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
        unit=bounds.unit_roundoff(self.problem.unit_dtypes) if unit is None else unit,
        size=self.problem.size,
        bound=self.limits.get(check),
        useless=useless,
        floor=max(run[place].floor for run in runs[0]),
      )
      if verdict.passed and first.unknown:
        verdict = dataclasses.replace(verdict, useless=first.unknown)
      judged.append((first, expected.shape[1:], verdict))
    return judged

  def rows(self, label: str, judged: Sequence[Judged]) -> list[Row]:
    """A row for the worst array, and one for each of which nothing can be said."""
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
          shape, worst.error, worst.bound, worst.index,
        ),
      )  # fmt: skip
    return rows

  def count(
    self, check: str, number: float, allowed: float, *, of: str = "", reason: str = ""
  ) -> list[Row]:
    """A row about a number and what it may be."""
    status = "passed" if number <= allowed else "failed"
    return [
      Row(self.name, check, status, of=of, error=float(number), bound=float(allowed), reason=reason)
    ]

  def run(self, check: str, function: Callable[[Verifier], list[Row]]) -> list[Row]:
    """The rows of a check; what it does not apply to, and what it raises, become rows too."""
    try:
      return function(self)
    except Skip as skip:
      return [Row(self.name, check, "skipped", reason=str(skip))]
    except (Exception, SystemExit) as error:  # A rule may do anything.
      reason = not_offered(error)
      if reason:
        return [Row(self.name, check, "skipped", reason=reason)]
      return [Row(self.name, check, "failed", reason=first_line(error))]


def not_offered(error: BaseException) -> str:
  """Why JAX cannot transform a function that way, or "" if ``error`` says something else."""
  text = message(error)
  if isinstance(error, TypeError) and ("forward-mode" in text or "in forward mode" in text):
    return "f has no forward mode (see softmax_jax.enable_forward_mode)"
  if isinstance(error, ValueError) and "Reverse-mode differentiation does not work" in text:
    return "f has no reverse mode"
  if isinstance(error, NotImplementedError) or "do not support JVP" in text:
    return f"JAX cannot do this: {first_line(error)}"
  return ""


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
