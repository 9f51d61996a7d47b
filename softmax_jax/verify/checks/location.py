"""Which entry of a gradient is wrong, by bisection, where only products with vectors are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from softmax_jax.verify.checks.common import inner
from softmax_jax.verify.checks.confirmation import Difference
from softmax_jax.verify.problem import Point
from softmax_jax.verify.report import Row
from softmax_jax.verify.verifier import Verifier

# An entry is named if it is off by this share of itself or more, and by more than it may be.
_CLEARLY = 1e-6


def located(v: Verifier, row: Row, found: Sequence[Difference]) -> Row:
  """The row of a gradient that differences contradict, with an entry that is wrong if there is one.

  ``found`` are the comparisons that the row is made of.
  """
  failed = next(d for d in found if d.judged[0].of == row.of and not d.judged[2].passed)
  for kind in (0, 1):  # of tangents, as in the check
    point = v.problem.point(kind, wide=v.own.inside == np.float64)
    for entry in _entries(v, point, failed):
      return dataclasses.replace(row, **entry)
  return row


def _entries(v: Verifier, point: Point, failed: Difference) -> list[dict[str, object]]:
  """The entry where <J^T u, v> - <u, Jv> is largest, half of v after half, if it is clearly off."""
  names, outs = v.problem.names, v.problem.out_names
  dots, _ = v.own.differences(point, point.vs)
  us = [
    np.where(np.isnan(dot) | (failed.output not in ("", out)), 0, u)
    for u, dot, out in zip(point.us, dots, outs, strict=True)
  ]
  bars = v.own.vjp(point, us)
  places = [
    (j, k)
    for j, name in enumerate(names)
    if name == failed.argument or failed.argument not in names
    for k in np.flatnonzero(point.vs[j]).tolist()
  ]

  def gap(places: list[tuple[int, int]]) -> tuple[float, float, float]:
    """<J^T u, v> - <u, Jv>, <u, Jv> and its error, for v with these entries alone."""
    vs = [np.zeros(x.shape) for x in point.xs]
    for j, k in places:
      vs[j].flat[k] = point.vs[j].flat[k]
    dots, slack = v.own.differences(point, vs)
    right = inner(us, dots)
    return inner(bars, vs) - right, right, inner([np.abs(u) for u in us], slack)

  if not places:
    return []
  total = gap(places)[0]
  while len(places) > 1:
    half = places[: len(places) // 2]
    part = gap(half)[0]
    first = abs(part) >= abs(total - part)
    places, total = (half, part) if first else (places[len(half) :], total - part)
  (j, k), (off, right, slack) = places[0], gap(places)
  if not abs(off) > 2 * slack + _CLEARLY * abs(right):
    return []
  x, size = point.xs[j], float(point.vs[j].flat[k])
  index = tuple(int(i) for i in np.unravel_index(k, x.shape))
  numbers = {"got": (right + off) / size, "expected": right / size}
  by = f" by {failed.output}" if failed.output else ""
  name = {
    "of": f"gradient of {names[j]}{by}",
    "shape": x.shape,
    "dtype": str(v.problem.xs[j].dtype),
  }
  return [{**name, "index": index, **numbers}]
