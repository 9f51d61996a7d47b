"""What results are compared with: values and derivatives of f or of a reference, in float64.

There are two ways to run a function in float64. Usually it is *called* with float64. Where that
fails, or returns something else than f itself (f draws random numbers, which differ between
dtypes, or its constants lose digits in its own dtype), or rounds to sixteen bits inside, it is
traced in its own dtypes and *evaluated* in float64 (``softmax_jax/verify/widening.py``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from softmax_jax.verify import differences
from softmax_jax.verify.bounds import NOISE, rounding
from softmax_jax.verify.errors import first_line
from softmax_jax.verify.problem import (
  Arrays,
  Leaves,
  Point,
  Problem,
  coarsest,
  compiled,
  finfo,
  rounded_to,
  split,
  vjp,
  widened,
)
from softmax_jax.verify.report import Skip
from softmax_jax.verify.widening import coarse_calls, widened_program


@contextlib.contextmanager
def compiled_with_all_digits() -> Generator[None]:
  """Float32 products keep all digits on accelerators too; jit compiles even if it is disabled."""
  with jax.default_matmul_precision("highest"), jax.disable_jit(False):
    yield


@contextlib.contextmanager
def exact() -> Generator[None]:
  """As `compiled_with_all_digits`, in float64."""
  with compiled_with_all_digits(), jax.enable_x64(True):
    yield


_Outputs = Callable[..., tuple[list[Any], list[Any]]]
# How many constants of an evaluated program are moved one by one.
_MOVES = 16


class _Programs(NamedTuple):
  """A function of ``(xs, ns)`` and its derivatives, for JAX to compile.

  ``outputs`` are the floating and the others, ``vjp`` takes ``(xs, ns, us)`` and ``jvp`` takes
  ``(xs, ns, vs)``. All take the moves of constants too, by which only an evaluated program differs.
  """

  outputs: _Outputs
  vjp: Callable[..., list[Any]]
  jvp: Callable[..., list[Any]]


def _differentiated(outputs: _Outputs) -> _Programs:
  def floating(ns: Leaves) -> Callable[..., list[Any]]:
    return lambda *xs: outputs(xs, ns)[0]

  def pull(xs: Leaves, ns: Leaves, us: Leaves, *_: Any) -> list[Any]:
    ys, pull = vjp(floating(ns), *xs)
    return list(pull([u.astype(y.dtype) for u, y in zip(us, ys, strict=True)]))

  def push(xs: Leaves, ns: Leaves, vs: Leaves, *_: Any) -> list[Any]:
    return jax.jvp(floating(ns), tuple(xs), tuple(vs))[1]

  return _Programs(outputs, pull, push)


class Oracle:
  """Values and derivatives in float64, of ``reference`` or of f itself.

  Attributes:
    given: whether a reference was given. Otherwise f is differentiated by its own rule, which the
      check `finite_differences` has to confirm.
    narrow: why f could not be run in float64, or "". It then runs in its own dtypes, and its own
      rule is no reference for itself.
    inside: the coarsest dtype to which the function rounds inside.
    evaluated: whether it is evaluated, not called.
  """

  def __init__(
    self, problem: Problem, reference: Callable[..., Any] | None, *, evaluated: bool = False
  ):
    """Of `problem.f` if there is no ``reference``; ``evaluated`` if that is possible."""
    self.problem, self.given, self.narrow = problem, reference is not None, ""
    self._function = problem.f if reference is None else reference
    self._x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    self._known: dict[Any, Any] = {}
    self._has_jvp = self.given
    if not (evaluated and self._evaluates()):
      self._choose()

  def _choose(self) -> None:
    try:
      self._use(self._called())
    except Exception as error:
      if self._evaluates():
        return
      if self.given:
        raise
      self.narrow = f"f does not run in float64 ({first_line(error)})"
      self._use(self._unchanged())
      self.inside = coarsest(self.problem.unit_dtypes)
      return
    if finfo(self.inside).bits < 32:
      self._evaluates()
    elif (strays := self._strays()) > 1:
      called = copy.copy(self)
      if self._evaluates() and not self._strays() < strays / 4:
        self.__dict__ = called.__dict__

  def _evaluates(self) -> bool:
    before = dict(self.__dict__)
    try:
      self._use(self._evaluated(), evaluated=True)
      self.value(self.problem.xs)
    except Exception:  # JAX may have no such operation in float64, or only find out as it compiles.
      self.__dict__ = before
      return False
    return True

  def _use(self, programs: _Programs, *, evaluated: bool = False) -> None:
    """Raises if the function does not run like this, or returns other shapes than f."""
    with exact():
      jaxpr, (ys, others) = jax.make_jaxpr(programs.outputs, return_shape=True)(
        self._wide(self.problem.xs), self.problem.ns
      )
    self._check_shapes(ys, others)
    rounded = rounded_to(jaxpr.jaxpr)
    if evaluated:  # All roundings are gone but those of what cannot be widened.
      rounded = coarse_calls(jaxpr.jaxpr)
    self.inside, self.evaluated = coarsest([np.float64, *rounded]), evaluated
    self._value = compiled(programs.outputs, quickly=True)
    self._values = compiled(functools.partial(_mapped, programs.outputs), quickly=True)
    self._vjp = compiled(programs.vjp, quickly=True)
    self._jvp = compiled(programs.jvp, quickly=True)

  def _called(self) -> _Programs:
    with exact():
      kwargs = widened(self.problem.kwargs)
    return _differentiated(self._calls(kwargs))

  def _unchanged(self) -> _Programs:
    own, dtypes = self._calls(self.problem.kwargs), self.problem.dtypes
    return _differentiated(
      lambda xs, ns, *_: own([x.astype(d) for x, d in zip(xs, dtypes, strict=True)], ns)
    )

  def _calls(self, kwargs: Any) -> _Outputs:
    problem, f = self.problem, self._function
    return lambda xs, ns, *_: split(jax.tree.leaves(problem.call(f, kwargs, xs, ns)))

  def _evaluated(self) -> _Programs:
    own, problem = _differentiated(self._calls(self.problem.kwargs)), self.problem
    of_outputs = [y.dtype for y in problem.out_types]
    number = len(of_outputs)

    def evaluate(
      f: Callable[..., Any], dtypes: Sequence[Any], moves: Any, *groups: Leaves
    ) -> list[Any]:
      leaves = jax.tree.leaves(groups)
      types = [jax.ShapeDtypeStruct(x.shape, d) for x, d in zip(leaves, dtypes, strict=True)]
      with jax.enable_x64(self._x64):
        program = jax.make_jaxpr(f)(*jax.tree.unflatten(jax.tree.structure(groups), types))
      return widened_program(program, moves)(*leaves)

    dtypes = [*problem.dtypes, *(n.dtype for n in problem.ns)]

    def outputs(xs: Leaves, ns: Leaves, moves: Any = None) -> tuple[list[Any], list[Any]]:
      leaves = evaluate(own.outputs, dtypes, moves, list(xs), list(ns))
      return leaves[:number], leaves[number:]

    def derivative(f: Callable[..., Any], of_tangents: Sequence[Any]) -> Callable[..., list[Any]]:
      return lambda xs, ns, ts, moves: evaluate(
        f, [*dtypes, *of_tangents], moves, list(xs), list(ns), list(ts)
      )

    return _Programs(outputs, derivative(own.vjp, of_outputs), derivative(own.jvp, problem.dtypes))

  def _strays(self) -> float:
    """How far the values of f are from these, beside what its own dtype may lose.

    That is its rounding, and the last digit of constants that it computes.
    """
    problem = self.problem
    moved = [self.value(problem.xs, near)[0] for near in range(1, 5)] if self.evaluated else []
    ys, others = problem.value(problem.xs, problem.ns)
    expected, expected_others = self.value(problem.xs)
    if any(np.any(a != b) for a, b in zip(others, expected_others, strict=True)):
      return np.inf
    unit = max((float(finfo(dtype).eps) for dtype in problem.unit_dtypes), default=0.0)
    found = 0.0
    for place, (y, e) in enumerate(zip(ys, expected, strict=True)):
      known = np.isfinite(y) & np.isfinite(e)
      of_constants = NOISE * max(
        (float(np.linalg.norm(m[place][known] - e[known])) for m in moved), default=0.0
      )
      allowed = rounding(unit, max(problem.size, 1)) * np.linalg.norm(e[known]) + of_constants
      error = np.linalg.norm(np.asarray(y, np.float64)[known] - e[known])
      found = max(found, float(error / allowed) if allowed > 0 else 0.0)
    return found

  def at(self, problem: Problem) -> Oracle:
    """The same oracle and compiled programs, at other arguments of the same types."""
    other = copy.copy(self)
    other.problem, other._known = problem, {}
    return other

  @property
  def own_dtype(self) -> bool:
    """Whether the reference is f itself in its own dtype, which proves nothing about f."""
    wide = all(d == np.float64 for d in self.problem.float_dtypes)
    return bool(self.narrow) or (wide and not self.given)

  def value(self, xs: Sequence[np.ndarray], near: int = 0) -> tuple[Arrays, Arrays]:
    """The floating outputs in float64, and the others.

    Constants that f computes are moved by the last digit of its own dtype where ``near`` > 0, as in
    the derivatives at such a point: their rounding is part of the noise of f.
    """
    with exact():
      ys, others = self._value(self._wide(xs), self.problem.ns, _moves(near))
    return [np.asarray(y, np.float64) for y in ys], others

  def vjp(self, point: Point, us: Sequence[np.ndarray] | None = None) -> Arrays:
    """The cotangents of the arguments; those of the cotangents of the point are remembered."""
    if us is None:
      if point.key not in self._known:
        self._known[point.key] = self._vjp_at(point, point.xs, point.us)
      return self._known[point.key]
    return self._vjp_at(point, point.xs, us)

  def _vjp_at(self, point: Point, xs: Sequence[np.ndarray], us: Sequence[np.ndarray]) -> Arrays:
    with exact():
      bars = self._vjp(self._wide(xs), point.ns, self._wide(us), _moves(point.near))
    return [np.asarray(bar, np.float64) for bar in bars]

  def jvp(self, point: Point, vs: Sequence[np.ndarray]) -> tuple[Arrays, Arrays]:
    """The tangents of the outputs along ``vs``, and the errors that they may have."""
    if self._has_jvp:
      try:
        with exact():
          dots = self._jvp(self._wide(point.xs), point.ns, self._wide(vs), _moves(point.near))
        dots = [np.asarray(dot, np.float64) for dot in dots]
        return dots, [np.zeros_like(dot) for dot in dots]
      except Exception:  # A reference without forward mode is differentiated by differences.
        self._has_jvp = False
    return self.differences(point, vs)

  def jvp_at(self, point: Point) -> tuple[Arrays, Arrays]:
    """The tangents at a point along its own tangent, remembered."""
    key = ("jvp", *point.key)
    if key not in self._known:
      self._known[key] = self.jvp(point, point.vs)
    return self._known[key]

  def hvp(self, point: Point) -> tuple[Arrays, Arrays]:
    """The derivative of J^T u by x along v, and the error that it may have."""

    def values(scale: float) -> Arrays:
      moved = self._moved(point.xs, point.vs, scale)
      at = [
        self._vjp_at(point, [x[i] for x in moved], point.us) for i in range(len(differences.SHIFTS))
      ]
      return [np.stack(bars) for bars in zip(*at, strict=True)]

    return self._derivatives(values, point.xs, point.vs)

  def differences(self, point: Point, vs: Sequence[np.ndarray]) -> tuple[Arrays, Arrays]:
    """The derivative of the outputs along ``vs`` by differences, and its estimated error."""

    def values(scale: float) -> Arrays:
      with exact():
        return self._values(self._moved(point.xs, vs, scale), point.ns, _moves(point.near))

    return self._derivatives(values, point.xs, vs)

  def _derivatives(
    self, values: Callable[[float], Arrays], xs: Sequence[np.ndarray], vs: Sequence[np.ndarray]
  ) -> tuple[Arrays, Arrays]:
    if finfo(self.inside).bits < 32:
      raise Skip(f"f rounds to {self.inside} inside, too coarse for differences")
    if "random_gamma" in self.problem.operations:
      raise Skip("the derivative of jax.random.gamma is not that of the number that a key draws")
    eps = float(finfo(self.inside).eps)
    return differences.derivatives(values, self._wide(xs), self._wide(vs), eps)

  def _moved(self, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray], scale: float) -> Arrays:
    """The arguments after all shifts, stacked."""
    shifts = scale * differences.SHIFTS
    with np.errstate(invalid="ignore", over="ignore"):
      return [
        x + shifts.reshape(-1, *(1,) * x.ndim) * v
        for x, v in zip(self._wide(xs), self._wide(vs), strict=True)
      ]

  def _wide(self, arrays: Sequence[np.ndarray]) -> Arrays:
    return [np.asarray(a, np.float64) for a in arrays]

  def _check_shapes(self, ys: Leaves, others: Leaves) -> None:
    expected = [y.shape for y in self.problem.out_types]
    got = [y.shape for y in ys]
    if expected != got or len(others) != self.problem.num_outs - len(expected):
      whose = "the reference" if self.given else "f in float64"
      raise ValueError(
        f"check_derivatives expected {whose} to return floating arrays of shapes {expected}, as f "
        f"does, got {got}."
      )


def _moves(near: int) -> np.ndarray:
  """The signs of the moves of constants near a point; 0 at the point itself."""
  return np.random.default_rng(near).choice([-1.0, 1.0], _MOVES) if near else np.zeros(_MOVES)


def _mapped(outputs: _Outputs, stacked: Leaves, ns: Leaves, moves: Any) -> list[Any]:
  """The floating outputs at each of several points."""
  return jax.lax.map(lambda xs: outputs(xs, ns, moves)[0], stacked)  # pyright: ignore[reportUnknownVariableType]  # untyped in JAX
