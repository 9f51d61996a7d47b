"""Rows whose entries are spread over the devices of a mesh axis, inside `jax.shard_map`.

Each device holds a slice of every row. What the devices tell each other are numbers per row, those
of a step in one array: a row costs as many bytes on the wire whatever its length.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from softmax_jax._typed import pmax, psum, unflatten_like

AxisName = str | tuple[str, ...]

Parts = TypeVar("Parts")


def add_up(parts: Parts, axis_name: AxisName | None) -> Parts:
  """The sums over the devices of numbers per row, a pytree of arrays that broadcast together."""
  if axis_name is None:
    return parts
  stacked = jnp.stack(jnp.broadcast_arrays(*jax.tree.leaves(parts)))
  return unflatten_like(parts, psum(stacked, axis_name))


def row_sum(x: jax.Array, axes: tuple[int, ...], axis_name: AxisName | None) -> jax.Array:
  """The sums along ``axes``, which are kept, and over the devices."""
  return add_up(jnp.sum(x, axis=axes, keepdims=True), axis_name)


def largest(
  top: jax.Array, any_: jax.Array | None, axis_name: AxisName
) -> tuple[jax.Array, jax.Array | None]:
  """The largest over the devices of numbers per row, and whether any device has ``any_``."""
  if any_ is None:
    return pmax(top, axis_name), None
  both = jnp.broadcast_arrays(top, any_.astype(top.dtype))
  top, count = pmax(jnp.stack(both), axis_name)
  return top, count > 0


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
