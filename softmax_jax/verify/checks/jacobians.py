"""The whole Jacobian, where it is small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from softmax_jax.verify.problem import Arrays, Leaves, Point, compiled, size_of
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Comparison, Verifier

# The largest Jacobian that is compared, and the largest that is drawn, in entries.
_JACOBIAN_ENTRIES = 4096
_DRAWN_ENTRIES = 262_144


_Pair = tuple[np.ndarray, np.ndarray]  # a matrix, and what its entries may be wrong by
_TRANSFORMS: dict[str, Callable[..., Any]] = {"jacfwd": jax.jacfwd, "jacrev": jax.jacrev}


def jacobian(v: Verifier) -> list[Row]:
  """The whole Jacobian by jacfwd, by jacrev, and in closed form where one was given."""
  v.need_derivatives()
  problem = v.problem
  columns = sum(x.size for x in problem.xs)
  height = sum(math.prod(y.shape) for y in problem.out_types)
  if columns * height > _JACOBIAN_ENTRIES:
    raise Skip(f"it has {height} x {columns} entries; vjp and jvp compare products with vectors")
  if columns * height == 0:
    raise Skip("it is empty")

  expected: dict[int, list[list[_Pair]]] = {}
  near_points = 4 if columns * height >= 64 else 8

  def reference(near: int) -> list[list[_Pair]]:
    if near not in expected:
      expected[near] = reference_jacobian(v, problem.point(0, near))
    return expected[near]

  def rows_of(name: str, blocks_of: Callable[[Arrays], Any]) -> list[Row]:
    def evaluate(_: int, near: int) -> list[Comparison]:
      blocks = blocks_of(problem.point(0, near).xs)
      comparisons: list[Comparison] = []
      for i, out in enumerate(problem.out_names):
        for j, arg in enumerate(problem.names):
          matrix, slack = reference(near)[i][j]
          mask = np.where(problem.masks[i], 1, np.nan)[(...,) + (None,) * problem.xs[j].ndim]
          comparisons.append(
            Comparison(
              f"d {out} / d {arg}", problem.xs[j].dtype, blocks[i][j], matrix * mask, slack
            )
          )
      return comparisons

    return v.measure("jacobian", evaluate, probes=1, near=near_points, transformation=name)

  rows: list[Row] = []
  places = tuple(range(len(problem.xs)))
  for name, transform in _TRANSFORMS.items():

    def attempt(
      v: Verifier, name: str = name, transform: Callable[..., Any] = transform
    ) -> list[Row]:
      if name == "jacfwd":
        v.need_forward()

      def blocks(xs: Leaves, ns: Leaves) -> Any:
        return transform(problem.floating(ns), argnums=places)(*xs)

      program = v.program(name, blocks)
      return rows_of(name, lambda xs: program(xs, problem.ns))

    rows += v.run(f"jacobian: {name}", attempt)
  closed_jacobian = v.options.jacobian
  if closed_jacobian is None:
    reason = "none was given with jacobian="
    return [*rows, Row(v.name, "jacobian: closed form", "skipped", reason=reason)]

  def closed_form(v: Verifier) -> list[Row]:
    def evaluate(_: int, near: int) -> list[Comparison]:
      xs = problem.point(0, near).xs
      matrix = closed_jacobian(*problem.arguments(xs, problem.ns), **problem.kwargs)
      (expected, slack) = reference(near)[0][0]
      if np.shape(matrix) != expected.shape:
        raise ValueError(
          f"jacobian= returned the shape {np.shape(matrix)}, expected {expected.shape}"
        )
      what = f"d {problem.out_names[0]} / d {problem.names[0]}"
      return [Comparison(what, problem.xs[0].dtype, matrix, expected, slack)]

    return v.measure("jacobian", evaluate, probes=1, near=near_points, transformation="closed form")

  return rows + v.run("jacobian: closed form", closed_form)


def jacobian_pair(v: Verifier) -> tuple[np.ndarray, np.ndarray]:
  """The Jacobian of the first output by the first argument by f's own rule, and in float64.

  Both are matrices, for arrays that the caller knows to be small.
  """
  v.need_derivatives()
  problem = v.problem
  entries = math.prod(problem.out_types[0].shape) * problem.xs[0].size
  if not 0 < entries <= _DRAWN_ENTRIES:
    raise ValueError(f"it has {entries:,} entries, expected 1 to {_DRAWN_ENTRIES:,}")
  shape = (-1, problem.xs[0].size)

  def first_output(x: Any) -> Any:
    return problem.outputs([x, *problem.xs[1:]], problem.ns)[0][0]

  forward = not v.forward and problem.xs[0].size < entries**0.5
  transform = _TRANSFORMS["jacfwd" if forward else "jacrev"]
  try:
    matrix = compiled(transform(first_output))(problem.xs[0])
  except ValueError:  # f may have one mode only.
    matrix = compiled(_TRANSFORMS["jacfwd"](first_output))(problem.xs[0])
  right, _ = reference_jacobian(v, problem.point())[0][0]
  return np.asarray(matrix, np.float64).reshape(shape), right.reshape(shape)


def reference_jacobian(v: Verifier, point: Point) -> list[list[_Pair]]:
  """Column by column, as derivatives along the axes; ``[output][argument]`` and its slack."""
  columns: list[list[tuple[Arrays, Arrays]]] = []
  for j, x in enumerate(point.xs):
    found: list[tuple[Arrays, Arrays]] = []
    for place in range(x.size):
      vs = [np.zeros(x.shape) for x in point.xs]
      vs[j].flat[place] = size = size_of(x)
      dots, slack = v.oracle.jvp(point, vs)
      found.append(([dot / size for dot in dots], [s / size for s in slack]))
    columns.append(found)

  def block(part: int, i: int, j: int) -> np.ndarray:
    shape = (*v.problem.out_types[i].shape, *point.xs[j].shape)
    if not point.xs[j].size:
      return np.zeros(shape)
    return np.stack([np.asarray(c[part][i]) for c in columns[j]], axis=-1).reshape(shape)

  return [
    [(block(0, i, j), block(1, i, j)) for j in range(len(point.xs))]
    for i in range(len(v.problem.out_types))
  ]
