"""The checks, each of them a function from a `Verifier` to rows, listed in `CHECKS` by name.

In their docstrings u is a random cotangent of the outputs, v a random tangent of the arguments, and
J the Jacobian. Unless it says otherwise a check compares with the float64 reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax.verify.problem import Point
from softmax_jax.verify.report import Row
from softmax_jax.verify.verifier import Comparison, Skip, Verifier

CHECKS: dict[str, Callable[[Verifier], list[Row]]] = {}

# The largest Jacobian that is formed, in entries.
_JACOBIAN_ENTRIES = 4096
# More arguments than this are not looked at one by one.
_ARGUMENTS = 8
_BATCH = 3
# The largest Jacobian that is drawn.
_DRAWN_ENTRIES = 262_144


def _check(function: Callable[[Verifier], list[Row]]) -> Callable[[Verifier], list[Row]]:
  CHECKS[function.__name__] = function
  return function


# --- values and first derivatives ------------------------------------------------------------------


@_check
def value(v: Verifier) -> list[Row]:
  """The outputs. Those that are not floating must be equal."""
  problem = v.problem

  def evaluate(probe, near):
    xs = problem.point(probe, near).xs
    (ys, _), (expected, _) = problem.value(xs, problem.ns), v.oracle.value(xs)
    return v.of_outputs("", ys, expected)

  (_, others), (_, expected) = problem.value(problem.xs, problem.ns), v.oracle.value(problem.xs)
  differ = sum(int(np.sum(np.asarray(a) != b)) for a, b in zip(others, expected, strict=True))
  rows = v.count("value", differ, 0, of="entries of outputs without dtype float") if others else []
  if not problem.out_types:
    return rows
  if v.oracle.own_dtype:
    return [*rows, Row(v.name, "value", "skipped", reason="f itself is all there is to compare with")]
  return rows + v.measure("value", evaluate, probes=1, near=8)


@_check
def vjp(v: Verifier) -> list[Row]:
  """Reverse mode: J^T u, with cotangents of all outputs together, and the outputs it computes."""
  v.need_oracle()

  def evaluate(probe, near):
    point = v.problem.point(probe, near)
    ys, _, bars = v.problem.vjp(point.xs, v.problem.ns, point.us)
    outputs = v.of_outputs("value under vjp of ", ys, v.oracle.value(point.xs)[0])
    return v.cotangents(bars, v.oracle.vjp(point)) + outputs

  return v.measure("vjp", evaluate)


@_check
def each_output(v: Verifier) -> list[Row]:
  """Reverse mode with a cotangent for one output at a time, so that none can hide another."""
  v.need_oracle()
  problem = v.problem
  if len(problem.out_types) < 2:
    raise Skip("f has one output, to which vjp applies")

  def evaluate(probe, near):
    point = problem.point(probe, near)
    comparisons = []
    for note, us in _one_by_one(v, point.us):
      bars = problem.vjp(point.xs, problem.ns, us)[2]
      comparisons += v.cotangents(bars, v.oracle.vjp(point, us), note)
    return comparisons

  return v.measure("each_output", evaluate, probes=2, near=4)


@_check
def finite_differences(v: Verifier) -> list[Row]:
  """The rule of f in float64: <J^T u, v> = <u, Jv>, with Jv by differences of the values alone.

  That makes f in float64 a reference for its own derivatives in all other checks. v moves one
  argument at a time, and all together; so does u among several outputs.
  """
  v.need_derivatives()
  if v.oracle.given:
    raise Skip("the reference that was given takes their place")
  problem = v.problem

  def evaluate(probe, near):
    point = problem.point(probe, near)
    comparisons = []
    for name, vs in _directions(v, point):
      dots, slack = v.oracle.differences(point.xs, vs)
      kinks = [np.isnan(dot) & (u != 0) for u, dot in zip(point.us, dots, strict=True)]
      us = point.us
      if any(kink.any() for kink in kinks):
        us = [np.where(kink, 0, u).astype(u.dtype) for u, kink in zip(us, kinks, strict=True)]
      for out, chosen in [("", us), *_one_by_one(v, us)]:
        bars = v.oracle.vjp(point, None if chosen is point.us else chosen)
        comparisons.append(
          Comparison(
            f"<cotangent, tangent> of {name}{out}",
            np.float64,
            _inner(bars, vs),
            _inner(chosen, dots),
            sum(float(np.sum(np.abs(u.astype(float)) * s)) for u, s in zip(chosen, slack)),
          )
        )
    return comparisons

  unit = 2.0**-53 if not v.oracle.narrow else None
  return v.measure("finite_differences", evaluate, near=2, useless=0.05, unit=unit)


@_check
def jvp(v: Verifier) -> list[Row]:
  """Forward mode: Jv, where v moves one argument at a time, and all together."""
  v.need_forward()
  problem = v.problem

  def evaluate(probe, near):
    point = problem.point(probe, near)
    comparisons = []
    for name, vs in _directions(v, point):
      expected, slack = v.oracle.jvp(point.xs, vs)
      dots = problem.jvp(point.xs, problem.ns, vs)
      comparisons += v.of_outputs(f"tangent by {name} of ", dots, expected, slack)
    return comparisons

  return v.measure("jvp", evaluate, near=2)


@_check
def dot_product(v: Verifier) -> list[Row]:
  """<u, Jv> = <J^T u, v> with f's own forward and reverse mode; no reference is needed."""
  v.need_forward()

  def evaluate(probe, near):
    point = v.problem.point(probe, near)
    dots = v.problem.jvp(point.xs, v.problem.ns, point.vs)
    return [
      Comparison(
        "<u, Jv>",
        v.problem.dtypes[0],
        _inner(point.us, dots),
        _inner(_pulled(v, point), point.vs),
      )
    ]

  return v.measure("dot_product", evaluate, near=8)


@_check
def linearity(v: Verifier) -> list[Row]:
  """Reverse mode is linear in its cotangent: J^T(2u - 4w) = 2 J^T u - 4 J^T w, and J^T 0 = 0."""
  v.need_derivatives()
  problem = v.problem

  def evaluate(probe, near):
    point, other = problem.point(probe, near), problem.point(probe + 1, near)
    us, ws = point.us, [w.astype(np.float64) for w in other.us]
    combined = [(2 * u.astype(np.float64) - 4 * w).astype(u.dtype) for u, w in zip(us, ws)]
    pull = lambda us: problem.vjp(point.xs, problem.ns, us)[2]
    wide = lambda arrays: [np.asarray(a, np.float64) for a in arrays]
    first, second = wide(pull(us)), wide(pull([w.astype(u.dtype) for u, w in zip(us, ws)]))
    expected = [2 * a - 4 * b for a, b in zip(first, second)]
    zero = pull([np.zeros_like(u) for u in us])
    return [
      *v.cotangents(pull(combined), expected),
      *v.cotangents(zero, [np.zeros(x.shape) for x in point.xs], " by zeros"),
    ]

  return v.measure("linearity", evaluate, probes=2, near=4)


@_check
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
  near_points = 2 if columns * height >= 64 else 8

  def reference(near):
    if near not in expected:
      expected[near] = _reference_jacobian(v, problem.point(0, near))
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
            Comparison(f"d {out} / d {arg}", problem.xs[j].dtype, blocks[i][j], matrix * mask, slack)
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

    return v.measure(
      "jacobian", evaluate, probes=1, near=near_points, transformation="closed form"
    )

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
  right, _ = _reference_jacobian(v, problem.point())[0][0]
  return np.asarray(matrix, np.float64).reshape(shape), right.reshape(shape)


def _reference_jacobian(v: Verifier, point: Point) -> list[list[tuple[np.ndarray, np.ndarray]]]:
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


# --- under transformations ------------------------------------------------------------------------


@_check
def jit(v: Verifier) -> list[Row]:
  """Without jit (every other check compiles f), at two different arguments one after the other."""
  v.need_derivatives()
  problem = v.problem

  first: dict[int, Any] = {}

  def without_jit(point):
    xs, us = ([jnp.asarray(a) for a in group] for group in (point.xs, point.us))
    return [np.asarray(bar, np.float64) for bar in problem.vjp_of(xs, problem.ns, us)[2]]

  def evaluate(_, near):
    comparisons = []
    for row in (0, 1):
      point = problem.point(0, near, row)
      bars = [np.asarray(bar, np.float64) for bar in _pulled(v, point)]
      if near == 0:
        first[row] = bars, without_jit(point)
      # Without jit loops compile again in each call: the noise is that of the compiled program.
      bars = [e + (bar - b) for bar, b, e in zip(bars, *first[row], strict=True)]
      comparisons += v.cotangents(bars, v.oracle.vjp(point), " without jit")
    return comparisons

  return v.measure("jit", evaluate, probes=1, near=6)


@_check
def vmap_each_argument(v: Verifier) -> list[Row]:
  """J^T u and Jv under vmap over one argument at a time; u and v are batched too."""
  v.need_derivatives()
  problem, rows = v.problem, []
  places = [("x", j, name) for j, name in enumerate(problem.names)]
  places += [("n", j, name) for j, name in enumerate(problem.other_names)]
  for kind, place, name in places[:_ARGUMENTS]:
    axes_x = [0 if (kind, place) == ("x", j) else None for j in range(len(problem.xs))]
    axes_n = [0 if (kind, place) == ("n", j) else None for j in range(len(problem.ns))]
    rows += v.run(
      f"vmap_each_argument: {name}",
      lambda v, x=axes_x, n=axes_n, name=name: _vmapped(v, "vmap_each_argument", name, x, n),
    )
  if len(places) > _ARGUMENTS:
    reason = f"only {_ARGUMENTS} of {len(places)} arguments are mapped one by one"
    rows.append(Row(v.name, "vmap_each_argument: the others", "skipped", reason=reason))
  return rows


@_check
def vmap_batch(v: Verifier) -> list[Row]:
  """J^T u and Jv under vmap over a batch of all arguments, cotangents and tangents."""
  v.need_derivatives()
  problem = v.problem
  return _vmapped(v, "vmap_batch", "", [0] * len(problem.xs), [0] * len(problem.ns))


def _vmapped(v: Verifier, check: str, name: str, axes_x: list[Any], axes_n: list[Any]) -> list[Row]:
  problem, forward = v.problem, not v.forward  # found out before anything is traced
  name_key = (name,) if name else ()  # the points of a whole batch are those of scan
  program = v.program(
    f"{check} {name}",
    jax.vmap(
      lambda xs, ns, us, vs: _both(v, forward, xs, ns, us, vs), in_axes=(axes_x, axes_n, 0, 0), axis_size=_BATCH
    ),
  )
  ns = [jnp.stack([n] * _BATCH) if a == 0 else n for n, a in zip(problem.ns, axes_n, strict=True)]

  def evaluate(_, near):
    points = [problem.point(0, near, row) for row in range(_BATCH)]
    mixed = [
      Point((*p.key, *name_key), [x if a == 0 else x0 for x, x0, a in zip(p.xs, points[0].xs, axes_x)], p.us, p.vs)
      for p in points
    ]
    expected = [v.oracle.vjp(p) for p in mixed]
    xs = [
      np.stack([p.xs[j] for p in points]) if a == 0 else points[0].xs[j]
      for j, a in enumerate(axes_x)
    ]
    bars, dots = program(xs, ns, *_batched(points))
    return _batch_comparisons(v, mixed, expected, bars, dots, " under vmap")

  return v.measure(check, evaluate, probes=1, near=4, transformation=name)


@_check
def checkpoint(v: Verifier) -> list[Row]:
  """Reverse mode through jax.checkpoint."""
  v.need_derivatives()
  problem = v.problem

  def program(xs, ns, us):
    f = jax.checkpoint(lambda *xs: problem.outputs(xs, ns)[0])
    return list(jax.vjp(f, *xs)[1](list(us)))

  program = v.program("checkpoint", program)

  def evaluate(probe, near):
    point = problem.point(probe, near)
    bars = program(point.xs, problem.ns, point.us)
    return v.cotangents(bars, v.oracle.vjp(point), " under checkpoint")

  return v.measure("checkpoint", evaluate, probes=2)


@_check
def scan(v: Verifier) -> list[Row]:
  """J^T u and Jv of a scan whose body calls f, with other arguments at every step."""
  v.need_derivatives()
  problem, forward = v.problem, not v.forward

  def outputs(xs, ns):
    return jax.lax.scan(lambda _, xs: (None, problem.outputs(xs, ns)[0]), None, list(xs))[1]

  def both(xs, ns, us, vs):
    f = lambda *xs: outputs(xs, ns)
    bars = list(jax.vjp(f, *xs)[1](list(us)))
    return bars, jax.jvp(f, tuple(xs), tuple(vs))[1] if forward else None

  program = v.program("scan", both)

  def evaluate(_, near):
    points = [problem.point(0, near, row) for row in range(_BATCH)]
    xs = [np.stack(group) for group in zip(*(p.xs for p in points), strict=True)]
    bars, dots = program(xs, problem.ns, *_batched(points))
    expected = [v.oracle.vjp(p) for p in points]
    return _batch_comparisons(v, points, expected, bars, dots, " under scan")

  return v.measure("scan", evaluate, probes=1, near=4)


def _both(v: Verifier, forward: bool, xs: Any, ns: Any, us: Any, vs: Any) -> tuple[Any, Any]:
  """J^T u, and Jv or None without forward mode."""
  bars = v.problem.vjp_of(xs, ns, us)[2]
  return bars, v.problem.jvp_of(xs, ns, vs) if forward else None


def _batched(points: list[Point]) -> tuple[list[np.ndarray], list[np.ndarray]]:
  return tuple(  # type: ignore[return-value]
    [np.stack(group) for group in zip(*(getattr(p, name) for p in points), strict=True)]
    for name in ("us", "vs")
  )


def _batch_comparisons(
  v: Verifier, points: list[Point], expected: list[Any], bars: Any, dots: Any, note: str
) -> list[Comparison]:
  comparisons = v.cotangents(bars, [np.stack(group) for group in zip(*expected)], note)
  if dots is not None:
    pairs = [v.oracle.jvp_at(p) for p in points]
    wanted, slack = ([np.stack(g) for g in zip(*(pair[i] for pair in pairs))] for i in (0, 1))
    comparisons += v.of_outputs("tangent of ", dots, wanted, slack)
  return comparisons


# --- second order ------------------------------------------------------------------------------------


@_check
def second_order(v: Verifier) -> list[Row]:
  """The derivative of x -> J(x)^T u along v, forward over reverse and reverse over reverse.

  Both are the Hessian of <u, f> times v. The reference is a finite difference of float64 cotangents.
  """
  v.need_derivatives()
  problem = v.problem
  cotangent = lambda xs, ns, us: problem.vjp_of(xs, ns, us)[2]

  def forward_over_reverse(xs, ns, us, vs):
    return jax.jvp(lambda *xs: cotangent(xs, ns, us), tuple(xs), tuple(vs))[1]

  def reverse_over_reverse(xs, ns, us, vs):
    return list(jax.vjp(lambda *xs: cotangent(xs, ns, us), *xs)[1](list(vs)))

  known: dict[Any, Any] = {}

  def reference(point):
    if point.key not in known:
      known[point.key] = v.oracle.hvp(point.xs, point.us, point.vs)
    return known[point.key]

  def rows_of(name, program):
    def evaluate(probe, near):
      point = problem.point(probe, near)
      bars = program(point.xs, problem.ns, point.us, point.vs)
      pairs = zip(v.cotangents(bars, reference(point)[0]), reference(point)[1], strict=True)
      return [c._replace(of=f"Hv, {c.of}", slack=slack) for c, slack in pairs]

    return v.measure("second_order", evaluate, probes=2, near=3, transformation=name)

  rows = []
  for name, program in (
    ("forward over reverse", forward_over_reverse),
    ("reverse over reverse", reverse_over_reverse),
  ):
    rows += v.run(
      f"second_order: {name}",
      lambda v, name=name, program=program: rows_of(name, v.program(name, program)),
    )
  return rows


# --- structure, memory, traces -----------------------------------------------------------------------


@_check
def structure(v: Verifier) -> list[Row]:
  """Cotangents have shape, dtype and weak type of their arguments; those of integers are float0."""
  v.need_derivatives()
  problem = v.problem
  places = sorted(problem.float_places + problem.other_places)

  def f(*arrays):
    leaves = list(problem.leaves)
    for place, array in zip(places, arrays, strict=True):
      leaves[place] = array
    return jax.tree.leaves(problem.f(*jax.tree.unflatten(problem.tree, leaves), **problem.kwargs))

  arrays = [problem.leaves[place] for place in places]
  ys, pull = jax.vjp(f, *arrays)
  bars = pull([_ones(y) for y in ys])
  wrong = []
  for place, x, bar in zip(places, arrays, bars, strict=True):
    if place in problem.float_places:
      name = problem.names[problem.float_places.index(place)]
      if (bar.shape, bar.dtype) != (x.shape, x.dtype):
        wrong.append(f"{name} is {_described(x)}, its cotangent {_described(bar)}")
      elif jax.typeof(bar).weak_type and not jax.typeof(x).weak_type:
        wrong.append(f"the cotangent of {name} is weakly typed")
    elif bar.dtype != jax.dtypes.float0:
      name = problem.other_names[problem.other_places.index(place)]
      wrong.append(f"the cotangent of {name} has dtype {bar.dtype}, expected float0")
  return v.count("structure", len(wrong), 0, of="wrong cotangents", reason="; ".join(wrong))


@_check
def residuals(v: Verifier) -> list[Row]:
  """The bytes of what the backward pass holds beside the arguments and the outputs."""
  v.need_derivatives()
  problem = v.problem
  xs = [jnp.asarray(x) for x in problem.xs]
  ys, pull = jax.vjp(lambda *xs: problem.outputs(xs, problem.ns)[0], *xs)
  alive = {_buffer(a) for a in (*xs, *ys, *problem.leaves) if isinstance(a, jax.Array)}
  held = {_buffer(a): a for a in jax.tree.leaves(pull) if isinstance(a, jax.Array) and a.size}
  kept = [a for buffer, a in held.items() if buffer not in alive]
  number = sum(a.nbytes for a in kept)
  arrays = f"{len(kept)} array{'' if len(kept) == 1 else 's'} of {number:,} bytes"
  if v.max_residual_bytes is None:
    raise Skip(f"{arrays}; max_residual_bytes= sets a bound")
  return v.count("residuals", number, v.max_residual_bytes, of="bytes", reason=arrays)


@_check
def traces(v: Verifier) -> list[Row]:
  """A jitted step x -> x - J^T 1, called thrice, each on the result of the one before.

  It is traced once; a cotangent of another dtype makes JAX trace and compile again.
  """
  v.need_derivatives()
  problem, number = v.problem, 0

  @jax.jit
  def step(xs):
    nonlocal number
    number += 1
    ys, pull = jax.vjp(lambda *xs: problem.outputs(xs, problem.ns)[0], *xs)
    return [x - bar for x, bar in zip(xs, pull([jnp.ones_like(y) for y in ys]), strict=True)]

  xs = [problem.leaves[place] for place in problem.float_places]
  # A Python number has a weak type, which it may lose in the first step.
  allowed = 2 if any(jax.typeof(x).weak_type for x in xs) else 1
  for _ in range(3):
    xs = step(xs)
  return v.count("traces", number, allowed, of="traces")


@_check
def edge_points(v: Verifier) -> list[Row]:
  """At the arguments named with edge_points: no NaN in derivatives, and the reference's numbers.

  Values may be infinite there (their cotangents are then 0 in the comparison with the reference, and
  ones in the search for NaN), but not NaN.
  """
  if not v.edge_points:
    raise Skip("none was named with edge_points=")
  v.need_derivatives()
  rows = []
  for place, args in enumerate(v.edge_points):
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
  rows = []
  for check in (value, finite_differences, vjp, jvp):
    rows += at.run(check.__name__, check)
  import dataclasses

  rows = [dataclasses.replace(row, check=f"{label}: {row.check}") for row in rows]
  return [row for row in rows if row.status != "skipped"] or rows


# --- helpers -----------------------------------------------------------------------------------------


def _pulled(v: Verifier, point: Point) -> Any:
  return v.problem.vjp(point.xs, v.problem.ns, point.us)[2]


def _directions(v: Verifier, point: Point) -> list[tuple[str, list[np.ndarray]]]:
  """The tangents of a point: of all arguments, and of each one where there are a few."""
  names = v.problem.names
  if len(names) == 1:
    return [(names[0], point.vs)]
  directions = [("all arguments", point.vs)]
  if len(names) <= _ARGUMENTS:
    directions += [(name, point.only_argument(j)) for j, name in enumerate(names)]
  return directions


def _one_by_one(v: Verifier, us: list[np.ndarray]) -> list[tuple[str, list[np.ndarray]]]:
  """The cotangents with all but one of them 0, for each of several outputs."""
  if len(us) < 2:
    return []
  return [
    (f" by {name}", [u if i == j else np.zeros_like(u) for j, u in enumerate(us)])
    for i, name in enumerate(v.problem.out_names[:_ARGUMENTS])
  ]


def _inner(xs: Any, ys: Any) -> float:
  # What is NaN on the second side is not defined there, and has cotangent 0.
  total = 0.0
  for x, y in zip(xs, ys, strict=True):
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    total += float(np.sum(np.where((np.asarray(x, np.float64) == 0) | np.isnan(y), 0, product)))
  return total


def _ones(y: jax.Array) -> Any:
  if jnp.issubdtype(y.dtype, jnp.floating):
    return jnp.ones_like(y)
  return np.zeros(y.shape, jax.dtypes.float0)


def _described(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _buffer(array: jax.Array) -> Any:
  try:
    return array.unsafe_buffer_pointer()
  except Exception:  # An array on several devices has no single buffer.
    return id(array)
