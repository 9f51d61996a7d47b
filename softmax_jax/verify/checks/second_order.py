"""Second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from softmax_jax.verify.checks.common import pull_back
from softmax_jax.verify.checks.confirmation import cotangents, unconfirmed
from softmax_jax.verify.problem import Arrays, Leaves, Point
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Comparison, Verifier


def second_order(v: Verifier) -> list[Row]:
  """The derivatives of (x, u) -> J(x)^T u and of (x, v) -> J(x) v, in both modes.

  By x they hold Hv, the Hessian of <u, f> times v, which is compared with finite differences of
  float64 cotangents; forward over forward it is <w, Hv>, with another tangent w. By u or v, in
  which the pass is linear, they are a first derivative: J^T u in reverse mode or Jv in forward.
  """
  v.need_derivatives()
  problem = v.problem
  _need_finite(v)

  def backward(ns: Leaves) -> Callable[[Leaves, Leaves], list[Any]]:
    return lambda xs, us: problem.vjp_of(xs, ns, us)[2]

  def forward(ns: Leaves) -> Callable[[Leaves, Leaves], list[Any]]:
    return lambda xs, vs: problem.jvp_of(xs, ns, vs)

  def forward_over_reverse(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves, ws: Leaves) -> list[Any]:
    return jax.jvp(backward(ns), (xs, us), (vs, ws))[1]

  def reverse_over_reverse(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves) -> list[Any]:
    return pull_back(backward(ns), (xs, us), vs)

  def reverse_over_forward(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves) -> list[Any]:
    return pull_back(forward(ns), (xs, vs), us)

  def forward_over_forward(xs: Leaves, ns: Leaves, vs: Leaves, ws: Leaves, zs: Leaves) -> list[Any]:
    return jax.jvp(forward(ns), (xs, vs), (ws, zs))[1]

  known: dict[Any, tuple[Arrays, Arrays]] = {}

  def hessian_product(point: Point) -> tuple[Arrays, Arrays]:
    if point.key not in known:
      known[point.key] = v.oracle.hvp(point)
    return known[point.key]

  def products(point: Point, bars: Leaves) -> list[Comparison]:
    expected, slacks = hessian_product(point)
    pairs = zip(cotangents(v, bars, expected), slacks, strict=True)
    return [c._replace(of=f"Hv, {c.of}", slack=slack) for c, slack in pairs]

  def product(point: Point, run: Callable[[Arrays], Any], ws: Arrays) -> Comparison:
    """<w, Hv>, where a kink in Hv is left out of w."""
    expected, slacks = hessian_product(point)
    ws = [np.where(np.isnan(e), 0, w).astype(w.dtype) for w, e in zip(ws, expected, strict=True)]
    terms, errors = _products(ws, expected), _products(ws, slacks)
    return Comparison(
      "<w, Hv>",
      problem.out_types[0].dtype,
      np.sum(_products(point.us, run(ws))),
      np.sum(terms),
      np.sum(np.abs(errors)),
      float(np.linalg.norm(terms)),  # of the sum, if no terms cancelled
      next(iter(unconfirmed(v).values()), ""),
    )

  def of_cotangents(note: str, actual: Leaves, expected: Arrays) -> list[Comparison]:
    return [c._replace(of=f"{note}{c.of}") for c in cotangents(v, actual, expected)]

  def of_tangents(note: str, actual: Leaves, expected: tuple[Arrays, Arrays]) -> list[Comparison]:
    # Where an output is not finite its cotangent is 0 and its derivative says nothing.
    dots, slack = expected
    dots = [np.where(mask, dot, np.nan) for mask, dot in zip(problem.masks, dots, strict=True)]
    return v.of_outputs(note, actual, dots, slack)

  def zeros(arrays: Arrays) -> Arrays:
    return [np.zeros_like(a) for a in arrays]

  # In forward mode one term at a time: neither hides an error of the other.
  def of_forward_over_reverse(program: Callable[..., Any], p: Point, q: Point) -> list[Comparison]:
    by_x = program(p.xs, problem.ns, p.us, p.vs, zeros(p.us))
    by_u = program(p.xs, problem.ns, p.us, zeros(p.vs), q.us)
    return products(p, by_x) + of_cotangents("derivative by u, ", by_u, v.oracle.vjp(p, q.us))

  def of_reverse_over_reverse(program: Callable[..., Any], p: Point, q: Point) -> list[Comparison]:
    by_x, by_u = program(p.xs, problem.ns, p.us, p.vs)
    return products(p, by_x) + of_tangents("derivative by u, ", by_u, v.oracle.jvp_at(p))

  def of_reverse_over_forward(program: Callable[..., Any], p: Point, q: Point) -> list[Comparison]:
    by_x, by_v = program(p.xs, problem.ns, p.us, p.vs)
    return products(p, by_x) + of_cotangents("derivative by v, ", by_v, v.oracle.vjp(p))

  def of_forward_over_forward(program: Callable[..., Any], p: Point, q: Point) -> list[Comparison]:
    def by_x(ws: Arrays) -> Any:
      return program(p.xs, problem.ns, p.vs, ws, zeros(p.vs))

    by_v = program(p.xs, problem.ns, p.vs, zeros(p.vs), q.vs)
    expected = v.oracle.jvp(p, q.vs)
    return [product(p, by_x, q.vs), *of_tangents("derivative by v, ", by_v, expected)]

  rows: list[Row] = []
  for name, program, compare in (
    ("forward over reverse", forward_over_reverse, of_forward_over_reverse),
    ("reverse over reverse", reverse_over_reverse, of_reverse_over_reverse),
    ("reverse over forward", reverse_over_forward, of_reverse_over_forward),
    ("forward over forward", forward_over_forward, of_forward_over_forward),
  ):

    def nested(
      v: Verifier,
      name: str = name,
      program: Callable[..., Any] = program,
      compare: Callable[..., list[Comparison]] = compare,
    ) -> list[Row]:
      if name.endswith("forward"):
        v.need_forward()
      run = v.program(name, program, quickly=True)

      def evaluate(probe: int, near: int) -> list[Comparison]:
        return compare(run, problem.point(probe, near), problem.point(probe + 1, near))

      return v.measure("second_order", evaluate, probes=2, near=3, transformation=name)

    rows += v.run(f"second_order: {name}", nested)
  return rows


def _need_finite(v: Verifier) -> None:
  """Skips where a first derivative, or a value that is finite in float64, is infinite."""
  problem, point = v.problem, v.problem.point()
  ys, _, found = problem.vjp(point.xs, problem.ns, point.us)
  if not v.forward:
    ys += problem.jvp(point.xs, problem.ns, point.vs)
  found += [y[mask] for y, mask in zip(ys, problem.masks * 2, strict=False)]
  if any(np.isinf(np.asarray(a, np.float64)).any() for a in found):
    raise Skip("a value or a first derivative is infinite at these arguments")


def _products(xs: Arrays, ys: Any) -> np.ndarray:
  """The products of all entries, 0 where x is 0."""
  pairs = zip(xs, ys, strict=True)
  return np.concatenate(
    [np.where(x == 0, 0, np.float64(x) * np.float64(y)).ravel() for x, y in pairs]
  )
