r"""The float64 reference of a verification: autodiff of a given function, or finite differences.

Finite differences of g(h) = f(x + h v) in float64 are taken by Ridders' method: central differences

    d(h) = (g(h) - g(-h)) / (2 h) = g'(0) + c_1 h^2 + c_2 h^4 + ...

with steps h from 1/8 to 2^-17 times the size of x, each a quarter of the one before, are
extrapolated to h = 0 by T[i][j] = T[i][j-1] + (T[i][j-1] - T[i-1][j-1]) / (16^j - 1). For each
entry of f that T is taken which differs least from the two that it is formed from; the difference
also estimates its error. Large steps win where f is smooth or its values are noisy (float32
inside), small ones near kinks: the step is chosen by the noise that f shows, not by the name of a
dtype. For smooth f an error of about 1e-10 remains. Entries at a kink (of a relu, say) have no
derivative: NaN. Where much stays unknown, steps 2^-8 times as long are tried, unless f rounds to a
dtype below float64 inside: on that scale its values are a staircase with slopes of 0. Where f
rounds to sixteen bits they are one on the scale of the longer steps too, and none is taken.

Source: C. J. F. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering
Software 4 (1982).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np

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

_STEPS = 2.0**-3 * 4.0 ** -np.arange(8)
_FINE = 2.0**-8  # times the steps, for values that vary fast
# Entries known less well than this, relative to the typical one, are left out if they are few.
_KNOWN = 1e-3


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


class Oracle:
  """Values and derivatives in float64, of ``reference`` or of f itself.

  Attributes:
    given: whether a reference was given. Otherwise f is differentiated by its own rule, which the
      check `finite_differences` has to confirm.
    narrow: why f could not be evaluated in float64, or "". It is then evaluated in its own dtype,
      and its own rule is no reference for itself.
    inside: the coarsest dtype to which the function rounds inside.
  """

  def __init__(self, problem: Problem, reference: Callable[..., Any] | None):
    """Of `problem.f` if there is no ``reference``."""
    self.problem, self.given, self.narrow = problem, reference is not None, ""
    self._known: dict[Any, Any] = {}
    function = problem.f if reference is None else reference
    with exact():
      kwargs = widened(problem.kwargs)

    def outputs(xs: Leaves, ns: Leaves) -> tuple[list[Any], list[Any]]:
      return split(jax.tree.leaves(problem.call(function, kwargs, xs, ns)))

    def narrow_outputs(xs: Leaves, ns: Leaves) -> tuple[list[Any], list[Any]]:
      return problem.outputs([x.astype(d) for x, d in zip(xs, problem.dtypes, strict=True)], ns)

    self._outputs = outputs
    try:
      with exact():
        jaxpr, (ys, others) = jax.make_jaxpr(outputs, return_shape=True)(
          self._wide(problem.xs), problem.ns
        )
    except Exception as error:
      if self.given:
        raise
      self.narrow = f"f does not run in float64 ({first_line(error)})"
      self._outputs = narrow_outputs
      self.inside = coarsest(problem.unit_dtypes)
    else:
      self.inside = coarsest([np.float64, *rounded_to(jaxpr.jaxpr)])
      self._check_shapes(ys, others)
    self._value = compiled(self._outputs, quickly=True)
    self._values = compiled(self._values_of, quickly=True)
    self._vjp = compiled(self._vjp_of, quickly=True)
    self._jvp = compiled(self._jvp_of, quickly=True)
    self._has_jvp = self.given

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

  def value(self, xs: Sequence[np.ndarray]) -> tuple[Arrays, Arrays]:
    """The floating outputs in float64, and the others."""
    with exact():
      ys, others = self._value(self._wide(xs), self.problem.ns)
    return [np.asarray(y, np.float64) for y in ys], others

  def vjp(self, point: Point, us: Sequence[np.ndarray] | None = None) -> Arrays:
    """The cotangents of the arguments; those of the cotangents of the point are remembered."""
    if us is None:
      if point.key not in self._known:
        self._known[point.key] = self.vjp_at(point.xs, point.us)
      return self._known[point.key]
    return self.vjp_at(point.xs, us)

  def vjp_at(self, xs: Sequence[np.ndarray], us: Sequence[np.ndarray]) -> Arrays:
    """The cotangents of the arguments ``xs`` for the cotangents ``us``."""
    with exact():
      bars = self._vjp(self._wide(xs), self.problem.ns, self._wide(us))
    return [np.asarray(bar, np.float64) for bar in bars]

  def jvp(self, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray]) -> tuple[Arrays, Arrays]:
    """The tangents of the outputs, and the errors that they may have."""
    if self._has_jvp:
      try:
        with exact():
          dots = self._jvp(self._wide(xs), self.problem.ns, self._wide(vs))
        dots = [np.asarray(dot, np.float64) for dot in dots]
        return dots, [np.zeros_like(dot) for dot in dots]
      except Exception:  # A reference without forward mode is differentiated by differences.
        self._has_jvp = False
    return self.differences(xs, vs)

  def jvp_at(self, point: Point) -> tuple[Arrays, Arrays]:
    """The tangents at a point along its own tangent, remembered."""
    key = ("jvp", *point.key)
    if key not in self._known:
      self._known[key] = self.jvp(point.xs, point.vs)
    return self._known[key]

  def hvp(
    self, xs: Sequence[np.ndarray], us: Sequence[np.ndarray], vs: Sequence[np.ndarray]
  ) -> tuple[Arrays, Arrays]:
    """The derivative of `vjp_at` by xs along vs, and the error that it may have."""

    def values(moved: Arrays) -> Arrays:
      at = [self.vjp_at([x[i] for x in moved], us) for i in range(2 * len(_STEPS) + 1)]
      return [np.stack(bars) for bars in zip(*at, strict=True)]

    return self._derivatives(values, xs, vs)

  def differences(
    self, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray]
  ) -> tuple[Arrays, Arrays]:
    """The derivative of the outputs at xs along vs by differences, and its estimated error."""

    def values(moved: Arrays) -> Arrays:
      with exact():
        return self._values(moved, self.problem.ns)

    return self._derivatives(values, xs, vs)

  def _derivatives(
    self, values: Callable[[Arrays], Any], xs: Sequence[np.ndarray], vs: Sequence[np.ndarray]
  ) -> tuple[Arrays, Arrays]:
    """The derivatives of ``values`` at xs along vs."""
    if finfo(self.inside).bits < 32:
      raise Skip(f"f rounds to {self.inside} inside, too coarse for differences")
    eps = float(finfo(self.inside).eps)
    found = _derivatives(values(self._moved(xs, vs, _STEPS)), _STEPS, eps)
    if self.inside == np.float64 and any(_unknown(*pair) > _KNOWN for pair in found):
      steps = _FINE * _STEPS
      fine = _derivatives(values(self._moved(xs, vs, steps)), steps, eps)
      found = [
        min(pairs, key=lambda pair: _unknown(*pair)) for pairs in zip(found, fine, strict=True)
      ]
    return [d for d, _ in found], [error for _, error in found]

  def _moved(self, xs: Sequence[np.ndarray], vs: Sequence[np.ndarray], steps: np.ndarray) -> Arrays:
    """The arguments after the steps forward, those backward, and none, stacked."""
    shifts = np.concatenate([steps, -steps, [0.0]])
    with np.errstate(invalid="ignore"):
      return [
        x + shifts.reshape(-1, *(1,) * x.ndim) * v
        for x, v in zip(self._wide(xs), self._wide(vs), strict=True)
      ]

  def _wide(self, arrays: Sequence[np.ndarray]) -> Arrays:
    return [np.asarray(a, np.float64) for a in arrays]

  def _floating(self, ns: Leaves) -> Callable[..., list[Any]]:
    return lambda *xs: self._outputs(xs, ns)[0]

  def _values_of(self, stacked: Leaves, ns: Leaves) -> list[Any]:
    def outputs(xs: Leaves) -> list[Any]:
      return self._outputs(xs, ns)[0]

    return jax.lax.map(outputs, stacked)  # pyright: ignore[reportUnknownVariableType]  # untyped in JAX

  def _vjp_of(self, xs: Leaves, ns: Leaves, us: Leaves) -> list[Any]:
    ys, pull = vjp(self._floating(ns), *xs)
    return list(pull([u.astype(y.dtype) for u, y in zip(us, ys, strict=True)]))

  def _jvp_of(self, xs: Leaves, ns: Leaves, vs: Leaves) -> list[Any]:
    return jax.jvp(self._floating(ns), tuple(xs), tuple(vs))[1]

  def _check_shapes(self, ys: Leaves, others: Leaves) -> None:
    expected = [y.shape for y in self.problem.out_types]
    got = [y.shape for y in ys]
    if expected != got or len(others) != self.problem.num_outs - len(expected):
      whose = "the reference" if self.given else "f in float64"
      raise ValueError(
        f"check_derivatives expected {whose} to return floating arrays of shapes {expected}, as f "
        f"does, got {got}."
      )


def _derivatives(
  values: Sequence[Any], steps: np.ndarray, eps: float
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Derivatives and their errors, from values after the shifts that `Oracle._moved` stacks."""
  found: list[tuple[np.ndarray, np.ndarray]] = []
  with np.errstate(invalid="ignore", over="ignore"):
    for y in values:
      y = np.asarray(y, np.float64)
      up, down, here = y[: len(steps)], y[len(steps) : -1], y[-1]
      half_steps = 2 * steps.reshape(-1, *(1,) * here.ndim)
      best, error, step = _extrapolated(list((up - down) / half_steps), steps)
      finite = np.isfinite(here)
      best = np.where(finite, best, np.nan)
      bends = (up - 2 * here + down) / half_steps
      best, error = _without_kinks(best, error, bends, step, steps[-1])
      # Rounding of the values, which do not change at all where arguments are huge.
      found.append((best, error + np.where(finite, eps * np.abs(here) / step, 0)))
  return found


def _unknown(best: np.ndarray, error: np.ndarray) -> float:
  """How much of derivatives is not known: the share of the entries, or of the norm."""
  nan = np.isnan(best)
  norm = math.sqrt(np.sum(best[~nan] ** 2))
  of_norm = math.sqrt(np.sum(error[~nan] ** 2)) / norm if norm > 0 else 0.0
  return max(of_norm, float(nan.mean()) if nan.mean() > 0.1 else 0.0) if best.size else 0.0


def _without_kinks(
  best: np.ndarray, error: np.ndarray, bends: np.ndarray, step: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
  """The derivatives with NaN for those at a kink, where there is none, and their errors.

  A bend is half the difference of the slopes on both sides, over the distance of a step. From one
  step to the next it shrinks to a quarter where f is smooth, and grows where it is only noise.
  Where the step reaches across a kink it does neither; so may a small bend, once, by chance.
  """
  finite = np.isfinite(best)
  typical = math.sqrt(np.mean(best[finite] ** 2)) if finite.any() else 0.0
  rough = _KNOWN * np.maximum(typical, np.abs(best))
  before, after = np.abs(bends[3:-1]), np.abs(bends[4:])
  kink = np.any((after > rough) & (before / 2 < after) & (after < 1.5 * before), axis=0)
  before, after = before[-2:], after[-2:]
  kink |= np.all((0.8 * before < after) & (after < 1.25 * before), axis=0)
  unknown = finite & (kink | (error > rough))
  if unknown.sum() > 0.1 * finite.sum():
    unknown = finite & kink
  best, error = np.where(unknown, np.nan, best), np.where(unknown, 0, error)
  known = finite & ~unknown
  if not known.any():
    return best, error
  # What does not shrink to a quarter at the smallest step is noise of the values. Two
  # extrapolations may agree by chance: no entry counts as known better than is typical.
  change: np.ndarray = bends[-1] - bends[-2] / 4
  noise = math.sqrt(np.mean(change[known] ** 2)) * smallest
  return best, 3 * error + math.sqrt(np.mean(error[known] ** 2)) + 2 * noise / step


def _extrapolated(
  differences: list[np.ndarray], steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For each entry the extrapolation with the smallest estimated error, that error, the step."""
  finite = np.isfinite(differences[-1])  # Where f is infinite it has no derivative.
  best, error = differences[-1], np.full(finite.shape, np.inf)
  chosen = np.full(finite.shape, steps[-1])
  previous: list[np.ndarray] = []
  for difference, step in zip(differences, steps, strict=True):
    current = [difference]
    for j, before in enumerate(previous[:4], 1):
      current.append(current[-1] + (current[-1] - before) / (16.0**j - 1))
      spread = np.maximum(np.abs(current[-1] - current[-2]), np.abs(current[-1] - before))
      better = spread < error  # False where it is NaN.
      best, error = np.where(better, current[-1], best), np.where(better, spread, error)
      chosen = np.where(better, step, chosen)
    previous = current
  return np.where(finite, best, np.nan), np.where(finite, error, 0), chosen
