"""The whole Jacobian, where it is small."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from softmax_jax.verify.problem import Point
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Comparison, Verifier

# The largest Jacobian that is compared, and the largest that is drawn, in entries.
_JACOBIAN_ENTRIES = 4096
_DRAWN_ENTRIES = 262_144


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

  expected: dict[int, Any] = {}
  near_points = 4 if columns * height >= 64 else 8

  def reference(near):
    if near not in expected:
      expected[near] = reference_jacobian(v, problem.point(0, near))
    return expected[near]

  def rows_of(name, program):
    def evaluate(_, near):
      blocks = program(problem.point(0, near).xs)
      comparisons = []
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

  rows = []
  places = tuple(range(len(problem.xs)))
  for name, transform in (("jacfwd", jax.jacfwd), ("jacrev", jax.jacrev)):

    def attempt(v, name=name, transform=transform):
      if name == "jacfwd":
        v.need_forward()
      program = v.program(
        name, lambda xs, ns: transform(lambda *xs: problem.outputs(xs, ns)[0], argnums=places)(*xs)
      )
      return rows_of(name, lambda xs: program(xs, problem.ns))

    rows += v.run(f"jacobian: {name}", attempt)
  if v.jacobian is None:
    reason = "none was given with jacobian="
    return [*rows, Row(v.name, "jacobian: closed form", "skipped", reason=reason)]

  def closed_form(v):
    def evaluate(_, near):
      xs = problem.point(0, near).xs
      matrix = v.jacobian(*problem.arguments(xs, problem.ns), **problem.kwargs)
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

  def first_output(x):
    return problem.outputs([x, *problem.xs[1:]], problem.ns)[0][0]

  transform = jax.jacfwd if not v.forward and problem.xs[0].size < entries**0.5 else jax.jacrev
  try:
    matrix = jax.jit(transform(first_output))(problem.xs[0])
  except ValueError:  # f may have one mode only.
    matrix = jax.jit(jax.jacfwd(first_output))(problem.xs[0])
  right, _ = reference_jacobian(v, problem.point())[0][0]
  return np.asarray(matrix, np.float64).reshape(shape), right.reshape(shape)


def reference_jacobian(v: Verifier, point: Point) -> list[list[tuple[np.ndarray, np.ndarray]]]:
  """Column by column, as derivatives along the axes; ``[output][argument]`` and its slack."""
  columns: list[Any] = []
  for j, x in enumerate(point.xs):
    found = []
    for place in range(x.size):
      vs = [np.zeros(x.shape) for x in point.xs]
      vs[j].flat[place] = 1
      found.append(v.oracle.jvp(point.xs, vs))
    columns.append(found)
  return [
    [
      tuple(
        np.stack([np.asarray(c[part][i]) for c in found], axis=-1).reshape(
          (*v.problem.out_types[i].shape, *x.shape)
        )
        for part in (0, 1)
      )
      for found, x in zip(columns, point.xs, strict=True)
    ]
    for i in range(len(v.problem.out_types))
  ]
