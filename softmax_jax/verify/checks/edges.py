"""Points that the user names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from softmax_jax.verify.checks.first_order import finite_differences, jvp, value, vjp
from softmax_jax.verify.checks.second_order import second_order
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Verifier


def edge_points(v: Verifier) -> list[Row]:
  """At the arguments named with edge_points: no NaN in derivatives, and the reference's numbers.

  Values may be infinite there (their cotangents are then 0 in the comparison with the reference,
  and ones in the search for NaN), but not NaN. Second derivatives must be the reference's where it
  has them: at a kink they are skipped.
  """
  if not v.options.edge_points:
    raise Skip("none was named with edge_points=")
  v.need_floats()
  rows: list[Row] = []
  for place, args in enumerate(v.options.edge_points):
    rows += v.run(f"edge_points: {place}", lambda v, place=place, args=args: _edge(v, place, args))
  return rows


def _edge(v: Verifier, place: int, args: Any) -> list[Row]:
  at = v.at(args, v.problem.seed)
  problem, label = at.problem, f"edge_points: {place}"
  us = [np.ones(y.shape, y.dtype) for y in problem.out_types]
  ys, _, bars = problem.vjp(problem.xs, problem.ns, us)
  arrays = [(f"value of {n}", y) for n, y in zip(problem.out_names, ys, strict=True)]
  arrays += [(f"cotangent of {n}", bar) for n, bar in zip(problem.names, bars, strict=True)]
  if not v.forward:
    vs = [np.ones_like(x) for x in problem.xs]
    dots = problem.jvp(problem.xs, problem.ns, vs)
    arrays += [(f"tangent of {n}", dot) for n, dot in zip(problem.out_names, dots, strict=True)]
  for name, array in arrays:
    nan = np.argwhere(np.isnan(np.asarray(array, np.float64)))
    if len(nan):
      index = tuple(int(i) for i in nan[0])
      return [
        Row(
          v.name, label, "failed", name, str(array.dtype), array.shape, math.nan, math.nan,
          index, f"{len(nan)} NaN",
        )
      ]  # fmt: skip
  rows: list[Row] = []
  for check in (value, finite_differences, vjp, jvp):
    if check.__name__ not in v.options.skip:
      rows += at.run(check.__name__, check)
  rows = [row for row in rows if row.status != "skipped"] or rows
  if second_order.__name__ not in v.options.skip:
    told = {v.forward}  # Why second derivatives are skipped here, once each.
    for row in at.run(second_order.__name__, second_order):
      if row.status != "skipped" or row.reason not in told:
        rows.append(row)
      told.add(row.reason)
  return [dataclasses.replace(row, check=f"{label}: {row.check}") for row in rows]
