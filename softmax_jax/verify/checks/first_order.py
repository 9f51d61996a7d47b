"""Values and first derivatives, by products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from softmax_jax.verify import bounds
from softmax_jax.verify.checks.common import (
  MAX_ARGUMENTS,
  directions,
  inner,
  one_by_one,
  pull_back,
  pulled,
)
from softmax_jax.verify.checks.confirmation import cotangents, differences
from softmax_jax.verify.checks.location import located
from softmax_jax.verify.problem import Arrays, Leaves
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Comparison, Verifier


def value(v: Verifier) -> list[Row]:
  """The outputs. Those that are not floating must be equal."""
  problem = v.problem

  def evaluate(probe: int, near: int) -> list[Comparison]:
    xs = problem.point(probe, near).xs
    (ys, _), (expected, _) = problem.value(xs, problem.ns), v.oracle.value(xs, near)
    return v.of_outputs("", ys, expected)

  (_, others), (_, expected) = problem.value(problem.xs, problem.ns), v.oracle.value(problem.xs)
  differ = sum(
    int(np.count_nonzero(np.asarray(a) != b)) for a, b in zip(others, expected, strict=True)
  )
  rows = v.count("value", differ, 0, of="entries of outputs without dtype float") if others else []
  if not problem.out_types:
    return rows
  if v.oracle.own_dtype:
    return [
      *rows,
      Row(v.name, "value", "skipped", reason="f itself is all there is to compare with"),
    ]
  return rows + v.measure("value", evaluate, probes=1, near=8)


def vjp(v: Verifier) -> list[Row]:
  """Reverse mode: J^T u, with cotangents of all outputs together, and the outputs it computes."""
  v.need_float64()

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = v.problem.point(probe, near)
    ys, _, bars = v.problem.vjp(point.xs, v.problem.ns, point.us)
    outputs = v.of_outputs("value under vjp of ", ys, v.oracle.value(point.xs, near)[0])
    return cotangents(v, bars, v.oracle.vjp(point)) + outputs

  judged = v.judge("vjp", evaluate, 4, 4)
  number = len(v.problem.names)
  v.known["silent"] = {
    name: verdict.useless
    for name, (_, _, verdict) in zip(v.problem.names, judged, strict=False)
    if verdict.useless and verdict.useless != bounds.EMPTY
  }
  if v.oracle.own_dtype:  # These cotangents would be compared with themselves.
    reason = "f is in float64 already; see finite_differences, or pass reference="
    return [Row(v.name, "vjp", "skipped", reason=reason), *v.rows("vjp: value", judged[number:])]
  rows = v.rows("vjp", judged[:number])
  if all(row.status == "skipped" for row in rows):  # Values alone do not make this check pass.
    return rows + v.rows("vjp: value", judged[number:])
  return v.rows("vjp", judged)


def repeated(v: Verifier) -> list[Row]:
  """Values and J^T u, computed twice from the same arrays, are the same numbers.

  To all digits on a CPU; accelerators may add in another order, and so may round differently.
  """
  v.need_derivatives()
  problem, point = v.problem, v.problem.point()

  def arrays() -> list[np.ndarray]:
    ys, _, bars = problem.vjp(point.xs, problem.ns, point.us)
    return [np.asarray(a, np.float64) for a in (*ys, *bars)]

  names = [f"value of {name}" for name in problem.out_names]
  names += [f"cotangent of {name}" for name in problem.names]
  unit = bounds.unit_roundoff(problem.unit_dtypes)
  allowed = 0.0 if jax.default_backend() == "cpu" else bounds.rounding(unit, problem.size)
  differ = [
    int(
      np.sum(~np.isclose(a, b, rtol=0, atol=allowed * np.max(np.abs(a), initial=0), equal_nan=True))
    )
    for a, b in zip(arrays(), arrays(), strict=True)
  ]
  worst = int(np.argmax(differ))
  of = f"entries of the {names[worst]} that differ between two calls"
  return v.count("repeated", differ[worst], 0, of=of)


def each_output(v: Verifier) -> list[Row]:
  """Reverse mode with a cotangent for one output at a time, so that none can hide another.

  The others have cotangents of zeros, and none at all (`jax.custom_vjp` may tell these apart).
  """
  v.need_float64()
  problem = v.problem
  if len(problem.out_types) < 2:
    raise Skip("f has one output, to which vjp applies")

  def program_of(place: int) -> Callable[..., Any]:
    def program(xs: Leaves, ns: Leaves, u: Any) -> list[Any]:
      def output(*xs: Any) -> Any:
        return problem.outputs(xs, ns)[0][place]

      return pull_back(output, xs, u)

    return v.program(f"each_output {place}", program)

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = problem.point(probe, near)
    comparisons: list[Comparison] = []
    for place, note, us in one_by_one(v, point.us):
      expected = v.oracle.vjp(point, us)
      bars = problem.vjp(point.xs, problem.ns, us)[2]
      comparisons += cotangents(v, bars, expected, note)
      bars = program_of(place)(point.xs, problem.ns, us[place])
      comparisons += cotangents(v, bars, expected, f"{note} alone")
    return comparisons

  return v.measure("each_output", evaluate, probes=2, near=4)


def each_argument(v: Verifier) -> list[Row]:
  """J^T u and Jv by one argument at a time, where the others are not differentiated at all.

  `jax.custom_vjp` and `jax.custom_jvp` may tell that (symbolic_zeros) from tangents of zeros.
  """
  v.need_float64()
  problem, forward = v.problem, not v.forward
  names = problem.names
  if len(names) == 1:
    raise Skip("f has one floating argument, to which vjp and jvp apply")

  def rows_of(j: int) -> list[Row]:
    if not problem.xs[j].size:
      raise Skip("it is empty")

    def both(xs: Leaves, ns: Leaves, us: Leaves, tangent: Any) -> tuple[Any, Any]:
      f: Callable[[Any], Any] = lambda x: problem.outputs([*xs[:j], x, *xs[j + 1 :]], ns)[0]
      (bar,) = pull_back(f, [xs[j]], us)
      return bar, jax.jvp(f, (xs[j],), (tangent,))[1] if forward else None

    program = v.program(f"each_argument {j}", both)

    def evaluate(probe: int, near: int) -> list[Comparison]:
      point = problem.point(probe, near)
      bar, dots = program(list(point.xs), problem.ns, list(point.us), point.vs[j])
      bars = [bar if i == j else None for i in range(len(names))]
      comparisons = [cotangents(v, bars, v.oracle.vjp(point))[j]]
      if dots is not None:
        expected, slack = v.oracle.jvp(point, point.only_argument(j))
        comparisons += v.of_outputs("tangent of ", dots, expected, slack)
      return comparisons

    return v.measure("each_argument", evaluate, probes=2, near=4, transformation=names[j])

  rows: list[Row] = []
  for j, name in enumerate(names[:MAX_ARGUMENTS]):
    rows += v.run(f"each_argument: {name}", lambda v, j=j: rows_of(j))
  if len(names) > MAX_ARGUMENTS:
    reason = f"only {MAX_ARGUMENTS} of {len(names)} arguments are taken one by one"
    rows.append(Row(v.name, "each_argument: the others", "skipped", reason=reason))
  return rows


def finite_differences(v: Verifier) -> list[Row]:
  """The rule of f in float64: <J^T u, v> = <u, Jv>, with Jv by differences of the values alone.

  v moves one argument at a time, and all together; so does u among several outputs. Where this
  passes, f in float64 is a reference for its own derivatives in other checks. They run it for
  themselves where it was not asked for, and are skipped where it fails or cannot tell. A reference
  that was given takes the place of the differences.
  """
  v.need_derivatives()
  rows: list[Row] = []
  if not v.oracle.given:
    found = differences(v)
    # Where one argument or output fails alone, the sum of all would not say which.
    failed = [d for d in found if not d.judged[2].passed]
    one = [d for d in failed if d.argument in v.problem.names and d.output]
    one = one or [d for d in failed if d.argument in v.problem.names or d.output]
    rows = v.rows("finite_differences", [d.judged for d in one or found])
    rows = [located(v, row, found) if row.status == "failed" else row for row in rows]
  if v.own is v.oracle or v.own.narrow:
    return rows

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = v.problem.point(probe, near)
    note = " in float64, without rounding"
    return v.of_arguments(v.own.vjp(point), v.oracle.vjp(point), note)

  unit = bounds.unit_of_constants(v.problem.unit_dtypes)
  judged = v.judge("finite_differences", evaluate, 4, 2, unit=unit)
  return rows + v.rows("finite_differences: float64", judged)


def jvp(v: Verifier) -> list[Row]:
  """Forward mode: Jv, where v moves one argument at a time, and all together."""
  v.need_forward()
  problem = v.problem

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = problem.point(probe, near)
    comparisons: list[Comparison] = []
    for name, vs in directions(v, point):
      expected, slack = v.oracle.jvp(point, vs)
      dots = problem.jvp(point.xs, problem.ns, vs)
      comparisons += v.of_outputs(f"tangent by {name} of ", dots, expected, slack)
    return comparisons

  return v.measure("jvp", evaluate, near=2)


def dot_product(v: Verifier) -> list[Row]:
  """<u, Jv> = <J^T u, v> with f's own forward and reverse mode; no reference is needed."""
  v.need_forward()

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = v.problem.point(probe, near)
    dots = v.problem.jvp(point.xs, v.problem.ns, point.vs)
    return [
      Comparison(
        "<u, Jv>",
        v.problem.dtypes[0],
        inner(point.us, dots),
        inner(pulled(v, point), point.vs),
      )
    ]

  return v.measure("dot_product", evaluate, near=8)


def linearity(v: Verifier) -> list[Row]:
  """Reverse mode is linear in its cotangent: J^T(2u - 4w) = 2 J^T u - 4 J^T w, and J^T 0 = 0."""
  v.need_derivatives()
  problem = v.problem

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point, other = problem.point(probe, near), problem.point(probe + 1, near)
    us, ws = point.us, [w.astype(np.float64) for w in other.us]
    combined = [
      (2 * u.astype(np.float64) - 4 * w).astype(u.dtype) for u, w in zip(us, ws, strict=True)
    ]

    def pull(us: Arrays) -> Arrays:
      return problem.vjp(point.xs, problem.ns, us)[2]

    first, second = (
      [np.asarray(bar, np.float64) for bar in pull(group)]
      for group in (us, [w.astype(u.dtype) for u, w in zip(us, ws, strict=True)])
    )
    expected = [2 * a - 4 * b for a, b in zip(first, second, strict=True)]
    zero = pull([np.zeros_like(u) for u in us])
    return [
      *v.of_arguments(pull(combined), expected),
      *v.of_arguments(zero, [np.zeros(x.shape) for x in point.xs], " by zeros"),
    ]

  return v.measure("linearity", evaluate, probes=2, near=4)
