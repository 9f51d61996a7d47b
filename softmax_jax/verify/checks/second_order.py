"""Second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from softmax_jax.verify.checks.common import pull_back
from softmax_jax.verify.checks.confirmation import cotangents
from softmax_jax.verify.problem import Arrays, Leaves, Point
from softmax_jax.verify.report import Row
from softmax_jax.verify.verifier import Comparison, Evaluate, Verifier


def second_order(v: Verifier) -> list[Row]:
  """The derivative of (x, u) -> J(x)^T u, forward over reverse and reverse over reverse.

  By x along v that is Hv, the Hessian of <u, f> times v, which is compared with finite differences
  of float64 cotangents. By u, in which a backward pass is linear, it is the backward pass itself,
  J^T w along w; and in reverse mode, where v is the cotangent of J^T u, it is J v.
  """
  v.need_derivatives()
  problem = v.problem

  def backward(ns: Leaves) -> Callable[[Leaves, Leaves], list[Any]]:
    return lambda xs, us: problem.vjp_of(xs, ns, us)[2]

  def forward_over_reverse(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves, ws: Leaves) -> list[Any]:
    return jax.jvp(backward(ns), (xs, us), (vs, ws))[1]

  def reverse_over_reverse(xs: Leaves, ns: Leaves, us: Leaves, vs: Leaves) -> list[Any]:
    return pull_back(backward(ns), (xs, us), vs)

  known: dict[Any, tuple[Arrays, Arrays]] = {}

  def hessian_product(point: Point) -> tuple[Arrays, Arrays]:
    if point.key not in known:
      known[point.key] = v.oracle.hvp(point.xs, point.us, point.vs)
    return known[point.key]

  def products(point: Point, bars: Leaves) -> list[Comparison]:
    pairs = zip(
      cotangents(v, bars, hessian_product(point)[0]), hessian_product(point)[1], strict=True
    )
    return [c._replace(of=f"Hv, {c.of}", slack=slack) for c, slack in pairs]

  def forward(program: Callable[..., Any]) -> Evaluate:
    def evaluate(probe: int, near: int) -> list[Comparison]:
      point, other = problem.point(probe, near), problem.point(probe + 1, near)
      no_vs, no_us = ([np.zeros_like(a) for a in group] for group in (point.vs, point.us))
      run = functools.partial(program, point.xs, problem.ns, point.us)
      # One at a time: neither term hides an error of the other.
      by_u = cotangents(v, run(no_vs, other.us), v.oracle.vjp(point, other.us))
      return [
        *products(point, run(point.vs, no_us)),
        *(c._replace(of=f"derivative by u, {c.of}") for c in by_u),
      ]

    return evaluate

  def reverse(program: Callable[..., Any]) -> Evaluate:
    def evaluate(probe: int, near: int) -> list[Comparison]:
      point = problem.point(probe, near)
      by_x, by_u = program(point.xs, problem.ns, point.us, point.vs)
      dots, slack = v.oracle.jvp_at(point)
      # Where an output is not finite the cotangent is 0 and its derivative says nothing.
      dots = [np.where(mask, dot, np.nan) for mask, dot in zip(problem.masks, dots, strict=True)]
      return products(point, by_x) + v.of_outputs("derivative by u, ", by_u, dots, slack)

    return evaluate

  rows: list[Row] = []
  for name, program, evaluator in (
    ("forward over reverse", forward_over_reverse, forward),
    ("reverse over reverse", reverse_over_reverse, reverse),
  ):
    rows += v.run(
      f"second_order: {name}",
      lambda v, name=name, program=program, evaluator=evaluator: v.measure(
        "second_order",
        evaluator(v.program(name, program)),
        probes=2,
        near=3,
        transformation=name,
      ),
    )
  return rows
