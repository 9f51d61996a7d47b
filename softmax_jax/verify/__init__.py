"""Verification of the derivatives of any function, and a report of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from softmax_jax.verify.checks import CHECKS
from softmax_jax.verify.oracle import Oracle
from softmax_jax.verify.problem import Problem
from softmax_jax.verify.report import DerivativeError, Report, Row
from softmax_jax.verify.verifier import Verifier

__all__ = ["CHECKS", "DerivativeError", "Report", "Row", "check_derivatives"]


def check_derivatives(
  f: Callable[..., Any],
  *args: Any,
  reference: Callable[..., Any] | None = None,
  jacobian: Callable[..., Any] | None = None,
  kwargs: Mapping[str, Any] | None = None,
  edge_points: Sequence[Sequence[Any]] = (),
  checks: Collection[str] | None = None,
  skip: Collection[str] = (),
  bounds: Mapping[str, float] | None = None,
  max_residual_bytes: int | None = None,
  name: str | None = None,
  seed: int = 0,
) -> Report:
  """TODO."""
  chosen = chosen_checks(checks, skip)
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
  )
  return run_checks(v, chosen)


def verifier(
  f,
  *args,
  reference=None,
  jacobian=None,
  kwargs=None,
  edge_points=(),
  bounds=None,
  max_residual_bytes=None,
  name=None,
  seed=0,
) -> Verifier:
  problem = Problem(f, args, kwargs or {}, seed)
  return Verifier(
    problem,
    Oracle(problem, reference),
    name=name or getattr(f, "__name__", None) or getattr(getattr(f, "func", None), "__name__", "f"),
    jacobian=jacobian,
    edge_points=edge_points,
    limits=bounds,
    max_residual_bytes=max_residual_bytes,
  )


def chosen_checks(checks: Collection[str] | None, skip: Collection[str]) -> list[str]:
  return [n for n in CHECKS if (checks is None or n in checks) and n not in skip]


def run_checks(v: Verifier, chosen: Sequence[str]) -> Report:
  import jax

  rows = []
  with jax.default_matmul_precision("highest"):
    for check in chosen:
      rows += v.run(check, CHECKS[check])
  return Report(tuple(rows))
