"""First derivatives under the transformations of JAX."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax.verify.checks.common import MAX_ARGUMENTS, pull_back, pulled
from softmax_jax.verify.checks.confirmation import cotangents
from softmax_jax.verify.problem import Arrays, Leaves, Point
from softmax_jax.verify.report import Row
from softmax_jax.verify.verifier import Comparison, Verifier

# How many points a batch and a scan are made of.
_BATCH = 3


def jit(v: Verifier) -> list[Row]:
  """Without jit (every other check compiles f), at two different arguments one after the other.

  Then once more with one array in place of two, where f takes two of one kind.
  """
  v.need_derivatives()
  problem = v.problem

  first: dict[Any, tuple[Arrays, Arrays]] = {}

  def without_jit(point: Point) -> Arrays:
    arrays = {id(a): jnp.asarray(a) for a in point.xs}  # one array stays one
    xs, us = [arrays[id(a)] for a in point.xs], [jnp.asarray(u) for u in point.us]
    return [np.asarray(bar, np.float64) for bar in problem.vjp_of(xs, problem.ns, us)[2]]

  def evaluate(_: int, near: int) -> list[Comparison]:
    comparisons: list[Comparison] = []
    points = [problem.point(0, near, row) for row in (0, 1)]
    for row, point in enumerate([*points, *_with_one_array_twice(points[0])]):
      bars = [np.asarray(bar, np.float64) for bar in pulled(v, point)]
      if near == 0:
        first[row] = bars, without_jit(point)
      # Without jit loops compile again in each call: the noise is that of the compiled program.
      bars = [e + (bar - b) for bar, b, e in zip(bars, *first[row], strict=True)]
      comparisons += cotangents(v, bars, v.oracle.vjp(point), " without jit")
    return comparisons

  return v.measure("jit", evaluate, probes=1, near=6)


def _with_one_array_twice(point: Point) -> list[Point]:
  """The point with one array for the first two arguments of the same type, if there are two."""
  kinds = [(x.shape, x.dtype) for x in point.xs]
  for j, kind in enumerate(kinds):
    if (i := kinds.index(kind)) < j:
      xs = [*point.xs[:j], point.xs[i], *point.xs[j + 1 :]]
      return [Point((*point.key, "twice"), xs, point.us, point.vs, point.ns)]
  return []


def vmap_each_argument(v: Verifier) -> list[Row]:
  """J^T u and Jv under vmap over one argument at a time; u and v are batched too.

  From one element to the next integers are moved around, so that labels differ.
  """
  v.need_derivatives()
  problem = v.problem
  rows: list[Row] = []
  places = [("x", j, name) for j, name in enumerate(problem.names)]
  places += [("n", j, name) for j, name in enumerate(problem.other_names)]
  groups = {name: [(kind, j)] for kind, j, name in places[:MAX_ARGUMENTS]}
  if others := [(kind, j) for kind, j, _ in places[MAX_ARGUMENTS:]]:
    groups["the others"] = others  # together
  for name, group in groups.items():
    axes_x = [0 if ("x", j) in group else None for j in range(len(problem.xs))]
    axes_n = [0 if ("n", j) in group else None for j in range(len(problem.ns))]
    rows += v.run(
      f"vmap_each_argument: {name}",
      lambda v, x=axes_x, n=axes_n, name=name: _vmapped(v, "vmap_each_argument", name, x, n),
    )
  return rows


def vmap_batch(v: Verifier) -> list[Row]:
  """J^T u and Jv under vmap over a batch of all arguments, cotangents and tangents."""
  v.need_derivatives()
  problem = v.problem
  return _vmapped(v, "vmap_batch", "", [0] * len(problem.xs), [0] * len(problem.ns))


def _vmapped(v: Verifier, check: str, name: str, axes_x: list[Any], axes_n: list[Any]) -> list[Row]:
  problem, forward = v.problem, not v.forward  # found out before anything is traced
  both = functools.partial(_both, v, forward)
  program = v.program(
    f"{check} {name}",
    jax.vmap(both, in_axes=(axes_x, axes_n, 0, 0), axis_size=_BATCH),
  )
  batches = [problem.others(row) for row in range(_BATCH)]
  ns = [
    jnp.stack(group) if a == 0 else group[0]
    for group, a in zip(zip(*batches, strict=True), axes_n, strict=True)
  ]

  def mapped(axes: list[Any], own: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    return [x if a == 0 else x0 for x, x0, a in zip(own, shared, axes, strict=True)]

  def evaluate(_: int, near: int) -> list[Comparison]:
    points = [problem.point(0, near, row) for row in range(_BATCH)]
    mixed = [
      Point(
        (*p.key, check, name),
        mapped(axes_x, p.xs, points[0].xs),
        p.us,
        p.vs,
        mapped(axes_n, others, problem.ns),
      )
      for p, others in zip(points, batches, strict=True)
    ]
    expected = [v.oracle.vjp(p) for p in mixed]
    xs = [
      np.stack([p.xs[j] for p in points]) if a == 0 else points[0].xs[j]
      for j, a in enumerate(axes_x)
    ]
    bars, dots = program(xs, ns, *_batched(points))
    return _batch_comparisons(v, mixed, expected, bars, dots, " under vmap")

  return v.measure(check, evaluate, probes=1, near=4, transformation=name)


def checkpoint(v: Verifier) -> list[Row]:
  """Reverse mode through jax.checkpoint."""
  v.need_derivatives()
  problem = v.problem

  def pulled_through(xs: Leaves, ns: Leaves, us: Leaves) -> list[Any]:
    return pull_back(jax.checkpoint(problem.floating(ns)), xs, list(us))

  program = v.program("checkpoint", pulled_through)

  def evaluate(probe: int, near: int) -> list[Comparison]:
    point = problem.point(probe, near)
    bars = program(point.xs, problem.ns, point.us)
    return cotangents(v, bars, v.oracle.vjp(point), " under checkpoint")

  return v.measure("checkpoint", evaluate, probes=2)


def scan(v: Verifier) -> list[Row]:
  """J^T u and Jv of a scan whose body calls f, with other arguments at every step."""
  v.need_derivatives()
  problem, forward = v.problem, not v.forward

  def both(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves) -> tuple[list[Any], Any]:
    def f(*xs: Any) -> list[Any]:
      return jax.lax.scan(lambda _, xs: (None, problem.outputs(xs, ns)[0]), None, list(xs))[1]

    bars = pull_back(f, xs, list(us))
    return bars, jax.jvp(f, tuple(xs), tuple(vs))[1] if forward else None

  program = v.program("scan", both)

  def evaluate(_: int, near: int) -> list[Comparison]:
    points = [problem.point(0, near, row) for row in range(_BATCH)]
    xs = _stacked(p.xs for p in points)
    bars, dots = program(xs, problem.ns, *_batched(points))
    expected = [v.oracle.vjp(p) for p in points]
    return _batch_comparisons(v, points, expected, bars, dots, " under scan")

  return v.measure("scan", evaluate, probes=1, near=4)


def _both(
  v: Verifier, forward: bool, xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves
) -> tuple[list[Any], Any]:
  """J^T u, and Jv or None without forward mode."""
  bars = v.problem.vjp_of(xs, ns, us)[2]
  return bars, v.problem.jvp_of(xs, ns, vs) if forward else None


def _batched(points: list[Point]) -> tuple[Arrays, Arrays]:
  return _stacked(p.us for p in points), _stacked(p.vs for p in points)


def _stacked(lists: Iterable[Arrays]) -> Arrays:
  return [np.stack(group) for group in zip(*lists, strict=True)]


def _batch_comparisons(
  v: Verifier, points: list[Point], expected: list[Arrays], bars: Any, dots: Any, note: str
) -> list[Comparison]:
  comparisons = cotangents(v, bars, _stacked(expected), note)
  if dots is not None:
    pairs = [v.oracle.jvp_at(p) for p in points]
    wanted, slack = (_stacked(pair[i] for pair in pairs) for i in (0, 1))
    comparisons += v.of_outputs("tangent of ", dots, wanted, slack)
  return comparisons
