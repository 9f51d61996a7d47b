"""Over which mesh axes an array varies inside `jax.shard_map`, which JAX tracks in its type."""

from __future__ import annotations

from typing import Any, TypeVarTuple

import jax

Args = TypeVarTuple("Args")


def varying_axes(x: Any) -> frozenset[str]:
  """The mesh axes over which ``x`` may differ between devices, inside `jax.shard_map`."""
  return jax.typeof(x).manual_axis_type.varying


def varying_alike(*arrays: *Args, without: str | tuple[str, ...] | None = None) -> tuple[*Args]:
  """The arrays, all varying over the union of their axes, as a rule with several of them needs.

  Over the axes ``without`` each varies as it did. None stays None.
  """
  union = frozenset[str]().union(*(varying_axes(x) for x in arrays if x is not None))
  union -= {without} if isinstance(without, str) else set(without or ())

  alike: Any = tuple(None if x is None else varying_over(union, x) for x in arrays)
  return alike


def varying_over(axes: frozenset[str], x: Any) -> Any:
  """``x``, varying over ``axes`` too."""
  axes = axes - varying_axes(x)
  return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying_as(like: Any, x: Any) -> Any:
  """``x``, varying over the axes of the type ``like`` too."""
  return varying_over(like.manual_axis_type.varying, x)


def type_varying_over(axes: frozenset[str], x_type: Any) -> Any:
  """The type of an array of type ``x_type`` that varies over ``axes`` too."""
  manual = x_type.manual_axis_type
  return x_type.update(manual_axis_type=manual.update(varying=manual.varying | axes))
