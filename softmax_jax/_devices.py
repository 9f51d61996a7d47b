"""How arrays are spread over devices, as their types say.

With explicit sharding the type of an array names the mesh axes that its axes are spread over.
Inside `jax.shard_map` it names the manual axes over which the array may differ between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from softmax_jax._rows import AxisName

Array = TypeVar("Array", bound=jax.Array)
Args = TypeVarTuple("Args")


# Explicit sharding.


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
  """How ``x`` is spread where its type says so, as `jax.sharding.AxisType.Explicit` makes it."""
  sharding = jax.typeof(x).sharding
  return sharding if any(part is not None for part in sharding.spec) else None


def index_along(x: jax.Array, axis: int, dtype: DTypeLike = jnp.int32) -> jax.Array:
  """The index along ``axis`` of each entry of ``x``."""
  return lax.broadcasted_iota(dtype, x.shape, axis, out_sharding=explicit_sharding(x))


def entry_at(x: jax.Array, index: jax.Array, axis: int, mode: str | None = None) -> jax.Array:
  """The entries of ``x`` at one index per row along ``axis``, which is kept."""
  if explicit_sharding(x):  # where JAX does not index
    found = jnp.where(index_along(x, axis) == index, x, jnp.zeros_like(x))
    return jnp.sum(found, axis=axis, keepdims=True)
  return jnp.take_along_axis(x, index, axis=axis, mode=mode)


def put(x: jax.Array, mesh: NamedSharding, *parts: Any) -> jax.Array:
  """``x`` with its axes spread over the ``parts`` of the mesh of another array."""
  own = jax.typeof(x).sharding
  if own.mesh.empty:
    # Without `jax.set_mesh` this array is compatible with any mesh, and JAX cannot put it on one.
    if jax.sharding.get_abstract_mesh().empty:
      return x
  elif parts == tuple(own.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(mesh.mesh, PartitionSpec(*parts)))


def mesh_axes(*parts: AxisName | None) -> tuple[str, ...]:
  """The mesh axes in the parts of a `PartitionSpec`."""
  names = (p if isinstance(p, tuple) else (p,) for p in parts if p is not None)
  return tuple(name for group in names for name in group)


def filled(spec: Sequence[Any], *others: Sequence[Any]) -> tuple[Any, ...]:
  """``spec`` with what ``others`` have where it is None, but no mesh axis twice."""
  parts = list(spec)
  for other in others:
    for i, part in enumerate(other):
      if parts[i] is None and not {*mesh_axes(part)} & {*mesh_axes(*parts)}:
        parts[i] = part
  return tuple(parts)


# Manual axes.


def are_manual() -> bool:
  """Whether this is inside a `jax.shard_map`."""
  return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def varying_axes(x: Any) -> frozenset[str]:
  """The mesh axes over which ``x`` may differ between devices, inside `jax.shard_map`."""
  return jax.typeof(x).manual_axis_type.varying


def varying_over(axes: frozenset[str], x: Any) -> Any:
  """``x``, varying over ``axes`` too."""
  axes = axes - varying_axes(x)
  return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying_as(like: Any, x: Any) -> Any:
  """``x``, varying over the axes of the type ``like`` too."""
  return varying_over(like.manual_axis_type.varying, x)


def varying_alike(*arrays: *Args, without: AxisName | None = None) -> tuple[*Args]:
  """The arrays, varying over the same manual axes, as a rule for several arrays needs.

  Over the axes ``without`` they vary as they did. None stays None.
  """
  union = frozenset[str]().union(*(varying_axes(x) for x in arrays if x is not None))
  union -= {*mesh_axes(without)}
  alike: Any = tuple(None if x is None else varying_over(union, x) for x in arrays)
  return alike


# Both.


def align(lead: Array, *others: *Args, without: AxisName | None = None) -> tuple[Array, *Args]:
  """Arrays of the rank of ``lead``, to which they broadcast, spread over devices like it.

  An axis that is whole on each device in ``lead`` is spread as in the first of the others to
  spread it. Over the manual axes ``without`` the arrays vary as they did. None stays None. Outside
  of a rule this is differentiated by JAX: cotangents come back spread as the arguments were.
  """
  arrays: Any = (lead, *others)
  shardings = [explicit_sharding(x) for x in arrays if x is not None]
  mesh = next((s for s in shardings if s is not None), None)
  if mesh is None:
    return varying_alike(*arrays, without=without)

  def spec(x: jax.Array, parts: Sequence[Any]) -> tuple[Any, ...]:
    same = (n == size for n, size in zip(x.shape, lead.shape, strict=True))
    return tuple(part if s else None for s, part in zip(same, parts, strict=True))

  common = filled(*(spec(x, jax.typeof(x).sharding.spec) for x in arrays if x is not None))
  placed: Any = tuple(None if x is None else put(x, mesh, *spec(x, common)) for x in arrays)
  return varying_alike(*placed, without=without)
