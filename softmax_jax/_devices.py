"""Rows whose entries are spread over the devices of a mesh axis.

Inside `jax.shard_map` each device holds a slice of every row. What the devices tell each other are
numbers per row, those of a step in one array: a row costs as many bytes on the wire whatever its
length. Outside, the types of arrays may say how they are spread (explicit sharding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from softmax_jax._typed import pmax, psum, tree_map, unflatten_like

AxisName = str | tuple[str, ...]

Array = TypeVar("Array", bound=jax.Array)
Parts = TypeVar("Parts")
Args = TypeVarTuple("Args")


def add_up(parts: Parts, axis_name: AxisName | None) -> Parts:
  """The sums over the devices of numbers per row, a pytree of arrays that broadcast together."""
  if axis_name is None:
    return parts
  return unflatten_like(parts, psum(_stacked(*jax.tree.leaves(parts)), axis_name))


def _stacked(*arrays: jax.Array) -> jax.Array:
  """`jnp.stack` of arrays that broadcast together.

  That has a rule for `jax.vmap` which fails with an ``spmd_axis_name``, over whose devices only
  what is batched varies.
  """
  return jnp.concatenate([x[None] for x in jnp.broadcast_arrays(*arrays)])


def row_sum(x: jax.Array, axes: tuple[int, ...], axis_name: AxisName | None) -> jax.Array:
  """The sums along ``axes``, which are kept, and over the devices."""
  return add_up(jnp.sum(x, axis=axes, keepdims=True), axis_name)


def largest(
  top: jax.Array, any_: jax.Array | None, axis_name: AxisName
) -> tuple[jax.Array, jax.Array | None]:
  """The largest over the devices of numbers per row, and whether any device has ``any_``."""
  if any_ is None:
    return pmax(top, axis_name), None
  top, count = pmax(_stacked(top, any_.astype(top.dtype)), axis_name)
  return top, count > 0


def barrier(arrays: Parts, axis_name: AxisName | None) -> Parts:
  """`jax.lax.optimization_barrier`, one for each array where they are spread over devices.

  The tangents of one barrier must vary over the same devices, and zeros among them vary over none.
  """
  if axis_name is None:
    return lax.optimization_barrier(arrays)
  return tree_map(lambda x: lax.optimization_barrier(x), arrays)  # the function has no types


def first_entry(size: int, axis_name: AxisName | None) -> jax.Array | int:
  """Where in the whole row the slice of this device, of ``size`` entries, starts."""
  return 0 if axis_name is None else lax.axis_index(axis_name) * size


def count(axis_name: AxisName | None) -> int:
  """The number of devices that a row is spread over."""
  return 1 if axis_name is None else lax.axis_size(axis_name)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
  """How ``x`` is spread where its type says so, as `jax.sharding.AxisType.Explicit` makes it."""
  sharding = jax.typeof(x).sharding
  return sharding if any(part is not None for part in sharding.spec) else None


def index_along(x: jax.Array, axis: int, dtype: DTypeLike = jnp.int32) -> jax.Array:
  """The index along ``axis`` of each entry of ``x``."""
  return lax.broadcasted_iota(dtype, x.shape, axis, out_sharding=explicit_sharding(x))


def put(x: jax.Array, mesh: NamedSharding, *parts: Any) -> jax.Array:
  """``x`` with its axes spread over the ``parts`` of the mesh of another array."""
  own = jax.typeof(x).sharding
  if own.mesh.empty:
    # Without `jax.set_mesh` such an array goes with any, and JAX cannot put it on a mesh.
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


def spread_alike(lead: Array, *others: *Args) -> tuple[Array, *Args]:
  """Arrays of the rank of ``lead``, to which they broadcast, spread over explicit axes like it.

  An axis that ``lead`` has whole on each device is spread as the first of the others that spreads
  it. None stays None. Outside of a rule this is differentiated by JAX: cotangents come back spread
  as the arguments were.
  """
  arrays: Any = (lead, *others)
  shardings = [explicit_sharding(x) for x in arrays if x is not None]
  mesh = next((s for s in shardings if s is not None), None)
  if mesh is None:
    return arrays

  def spec(x: jax.Array, parts: Sequence[Any]) -> tuple[Any, ...]:
    same = (n == size for n, size in zip(x.shape, lead.shape, strict=True))
    return tuple(part if s else None for s, part in zip(same, parts, strict=True))

  common = filled(*(spec(x, jax.typeof(x).sharding.spec) for x in arrays if x is not None))
  placed: Any = tuple(None if x is None else put(x, mesh, *spec(x, common)) for x in arrays)
  return placed
