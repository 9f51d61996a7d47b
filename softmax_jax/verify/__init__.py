"""Verification of derivatives: find the wrong gradient in anybody's function.

`check_derivatives` compares a function and its derivatives with float64, in every mode and under
every transformation that applies, and returns a `Report`. Nothing in it knows of softmax. The
checks are in `CHECKS`, by name. ``softmax_jax/verify/bounds.py`` says what an error is and where
the bounds come from, ``softmax_jax/verify/oracle.py`` what results are compared with, and
``softmax_jax/verify/differences.py`` how finite differences are taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from softmax_jax.verify.checks import CHECKS, FAST
from softmax_jax.verify.checks.confirmation import confirmed
from softmax_jax.verify.options import Options, names, require
from softmax_jax.verify.oracle import Oracle, compiled_with_all_digits
from softmax_jax.verify.problem import Problem
from softmax_jax.verify.report import DerivativeError, Report, Row, tells
from softmax_jax.verify.verifier import Verifier

__all__ = ["CHECKS", "DerivativeError", "Report", "Row", "check_derivatives", "describe_checks"]


def check_derivatives(
  f: Callable[..., Any],
  *args: Any,
  reference: Callable[..., Any] | None = None,
  jacobian: Callable[..., Any] | None = None,
  kwargs: Mapping[str, Any] | None = None,
  edge_points: Sequence[Sequence[Any]] = (),
  checks: Collection[str] | None = None,
  skip: Collection[str] = (),
  fast: bool = False,
  bounds: Mapping[str, float] | None = None,
  max_residual_bytes: int | None = None,
  name: str | None = None,
  seed: int = 0,
  progress: Callable[[int, int, str], object] | None = None,
) -> Report:
  r"""Checks the value and the derivatives of ``f(*args, **kwargs)`` in every way that applies.

  Derivatives are compared with float64: with autodiff of ``reference`` if there is one. Otherwise
  the derivatives of ``f`` itself in float64 are the reference, after the check
  ``finite_differences`` has compared them with

  .. math:: \langle J^T u, v \rangle = \langle u, J v \rangle, \qquad
    J v = \frac{d}{dh} f(x + h v) \Big|_{h = 0}

  where the right side comes from values of ``f`` alone. Errors are relative and in norm, over the
  whole array and over every slice of it; bounds come from the dtype, the size of the problem and
  the rounding noise that ``f`` shows, and do not grow with the array. Steps follow the size of the
  arguments and end before the domain of ``f`` does. Where the Jacobian has more than 4096 entries,
  products with random vectors stand for it.

  A function that draws random numbers, casts to sixteen bits inside or does not run in float64 is
  traced in its own dtypes and evaluated in float64, with the same random numbers. So is one in
  sixteen bits, beside f called with float64.

  A derivative dominated by rounding error fails: that of `jax.nn.softmax` where one probability
  rounds to 1, for instance. So does one that is right only to the tolerance of a solver, such as a
  gradient through an ODE by its adjoint: pass ``bounds``. Where this can be told, the row says so.

  Args:
    f: any function of arrays that JAX can differentiate, in whatever way it is differentiated. Keys
      of random numbers are arguments like others.
    *args: its arguments: arrays, Python numbers and pytrees of them, all of which are traced.
      ``f`` is differentiated by those of a floating dtype; integers and booleans are passed on, and
      anything else is left as it is.
    reference: a function with the arguments and outputs of ``f`` that is known to be right, in
      plain JAX. It is evaluated in float64 and differentiated by JAX.
    jacobian: the closed form of ``jax.jacobian(f)``: a function with the arguments of ``f`` that
      returns the derivatives of the first floating output by the first floating argument.
    kwargs: keyword arguments for ``f``, ``reference`` and ``jacobian``. They are held fixed and not
      traced: the place for flags, axes and sizes.
    edge_points: other tuples of arguments, such as rows with -inf, huge numbers or coefficients of
      0. There the value and the first derivatives must not be NaN; they and the second derivatives
      must agree with the reference. A rule that is wrong only at special arguments shows only here.
    checks: the names in `CHECKS` of the checks to run; None stands for all.
    skip: the names of checks to leave out, also at edge points.
    fast: runs only the checks that compile little, for suites that run often: a small function
      takes less than a second of CPU time, a fifth of what all checks take. Second derivatives and
      most transformations are left out; the report names them.
    bounds: relative bounds by the name of the check, in place of the derived ones.
    max_residual_bytes: how many bytes the backward pass may hold beside arguments and outputs, for
      the check ``residuals``.
    name: what the report calls ``f``.
    seed: decides the random cotangents and tangents.
    progress: is called after each check with how many are done, how many there are, and the name
      of the last. `print` will do.

  Returns:
    A `Report` with a row per check, or several where a check has parts, each passed, failed or
    skipped with its reason. It is true if none failed and the derivatives of every floating output
    by every floating argument agreed with something other than the rules of ``f`` itself (or any
    check passed, if ``checks`` asks for none of these). The last line names what did not, the line
    before it what was not looked at.

  Raises:
    TypeError: if ``f`` is not callable, an argument or a result is complex, ``f`` needs the value
      of an argument (which it names), or an option is of another type.
    ValueError: if a check has no such name, ``checks`` and ``fast`` are given, ``reference``
      returns other shapes than ``f``, or a bound or ``seed`` is negative.
    Exception: whatever ``f`` raises at its arguments, or ``reference`` in float64. What they raise
      when they are differentiated or transformed becomes a row that failed.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax.verify import check_derivatives
    >>> @jax.custom_vjp
    ... def square(x):
    ...   return x**2
    >>> square.defvjp(lambda x: (x**2, x), lambda x, y_bar: (2 * x,))  # y_bar is forgotten
    >>> report = check_derivatives(square, jnp.array([1.0, 2.0]))
    >>> bool(report)
    False
    >>> {"finite_differences", "linearity"} <= {row.check for row in report.failed}
    True
    >>> bool(check_derivatives(jnp.square, jnp.array([1.0, 2.0])))
    True

  Source: C. J. F. Ridders (1982) for the finite differences; the identity of the dot products is
  the classical test of an adjoint.
  """
  chosen = chosen_checks(checks, skip, fast)
  require(progress is None or callable(progress), "progress", "a function", progress)
  slow = CHECKS.keys() - FAST if fast else ()
  v = verifier(
    f,
    *args,
    reference=reference,
    jacobian=jacobian,
    kwargs=kwargs,
    edge_points=edge_points,
    bounds=bounds,
    max_residual_bytes=max_residual_bytes,
    name=name,
    seed=seed,
    skip=(*names("skip", skip), *slow),
  )
  return run_checks(v, chosen, progress)


def describe_checks() -> dict[str, str]:
  """What each check compares, by its name.

  Returns:
    The description of every check in `CHECKS`, in their order; empty under ``python -OO``, which
    drops docstrings.

  Example:
    >>> from softmax_jax.verify import describe_checks
    >>> print(describe_checks()["dot_product"])
    <u, Jv> = <J^T u, v> with f's own forward and reverse mode; no reference is needed.
  """
  return {name: inspect.getdoc(check) or "" for name, check in CHECKS.items()}


# The parts of `check_derivatives`, to verify one function at many points: `Verifier.at` keeps the
# compiled programs.


def chosen_checks(
  checks: Collection[str] | None, skip: Collection[str] = (), fast: bool = False
) -> list[str]:
  """The checks in their order, without those to be skipped."""
  require(type(fast) is bool, "fast", "a bool", fast)
  if fast and checks is not None:
    raise ValueError("check_derivatives expected one of checks and fast, got both.")
  wanted = names("checks", (FAST if fast else CHECKS) if checks is None else checks)
  unwanted = names("skip", skip)
  for name in (*wanted, *unwanted):
    if name not in CHECKS:
      raise ValueError(f"check_derivatives knows no check {name!r}; there are {', '.join(CHECKS)}.")
  return [name for name in CHECKS if name in wanted and name not in unwanted]


def verifier(f: Callable[..., Any], *args: Any, **options: Any) -> Verifier:
  """What `run_checks` runs on; the options are those of `check_derivatives` but ``checks``."""
  require(callable(f), "f", "a function", f)
  chosen = Options(**options)
  chosen_checks(chosen.bounds)  # Their names must be those of checks.
  with compiled_with_all_digits():
    problem = Problem(f, args, chosen.kwargs or {}, chosen.seed)
    return Verifier(problem, Oracle(problem, chosen.reference), chosen)


def run_checks(
  v: Verifier,
  chosen: Sequence[str],
  progress: Callable[[int, int, str], object] | None = None,
) -> Report:
  """The report of these checks; ``progress`` is as in `check_derivatives`."""
  rows: list[Row] = []
  with compiled_with_all_digits():
    for done, name in enumerate(chosen, 1):
      rows += v.run(name, CHECKS[name])
      if progress is not None:
        progress(done, len(chosen), name)
    if any(map(tells, chosen)):
      rows += confirmed(v)
  return Report(tuple(rows), tuple(name for name in CHECKS if name not in chosen))
