"""What several checks share."""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_jax.verify.problem import Leaves, Point, vjp
from softmax_jax.verify.verifier import Verifier

# More arguments or outputs than this are not looked at one by one.
MAX_ARGUMENTS = 8


def pulled(v: Verifier, point: Point) -> Any:
  """The cotangents of the arguments by f's own rule."""
  return v.problem.vjp(point.xs, v.problem.ns, point.us)[2]


def pull_back(f: Any, xs: Leaves, u: Any) -> list[Any]:
  """The cotangents of ``xs`` for the cotangent of ``f(*xs)``; a function for JAX to transform."""
  return list(vjp(f, *xs)[1](u))


def directions(v: Verifier, point: Point) -> list[tuple[str, list[np.ndarray]]]:
  """The tangents of a point: of all arguments, and of each one where there are a few."""
  names = v.problem.names
  if len(names) == 1:
    return [(names[0], point.vs)]
  directions = [("all arguments", point.vs)]
  if len(names) <= MAX_ARGUMENTS:
    directions += [
      (name, point.only_argument(j)) for j, name in enumerate(names) if point.vs[j].size
    ]
  return directions


def one_by_one(v: Verifier, us: list[np.ndarray]) -> list[tuple[int, str, list[np.ndarray]]]:
  """The cotangents with all but one of them 0, for each of several outputs that are finite."""
  if len(us) < 2:
    return []
  return [
    (i, f" by {name}", [u if i == j else np.zeros_like(u) for j, u in enumerate(us)])
    for i, name in enumerate(v.problem.out_names[:MAX_ARGUMENTS])
    if v.problem.masks[i].any()
  ]


def inner(xs: Any, ys: Any) -> float:
  """The sum of the products, without those by a NaN among ys, which is not defined."""
  total = 0.0
  for x, y in zip(xs, ys, strict=True):
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    total += float(np.sum(np.where((np.asarray(x, np.float64) == 0) | np.isnan(y), 0, product)))
  return total
