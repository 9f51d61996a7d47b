"""Where the entries of a row are: along some axes of an array, and on the devices of a mesh axis.

Inside `jax.shard_map` each device may hold a slice of every row. Devices exchange only per-row
scalars, all those of a step in one array: a row costs as many bytes on the wire whatever its
length.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

Axes = tuple[int, ...]
AxisName = str | tuple[str, ...]
Parts = TypeVar("Parts")

# Up to this many entries XLA:CPU unrolls a row.
_SHORT = 16


class Rows(NamedTuple):
  """The rows of an array. Reductions keep ``axes`` with size 1.

  Attributes:
    axes: the axes along which the entries of a row lie.
    axis_name: the mesh axis (or axes) over whose devices each row is spread, or None where every
      device has whole rows.
  """

  axes: Axes
  axis_name: AxisName | None = None

  def local_sum(self, x: jax.Array) -> jax.Array:
    """The sum over the entries on this device."""
    return jnp.sum(x, axis=self.axes, keepdims=True)

  def local_max(self, x: jax.Array) -> jax.Array:
    """The largest entry on this device, a constant for every derivative."""
    return lax.stop_gradient(jnp.max(x, axis=self.axes, keepdims=True, initial=-jnp.inf))

  def local_any(self, mask: jax.Array | None) -> jax.Array | None:
    """Whether any entry on this device counts; None where there is no mask."""
    return None if mask is None else jnp.any(mask, axis=self.axes, keepdims=True)

  def max(self, x: jax.Array) -> jax.Array:
    """The largest of all entries."""
    top = self.local_max(x)
    return top if self.axis_name is None else self.max_over_devices(top, None)[0]

  def sum(self, x: jax.Array) -> jax.Array:
    """The sum over all entries."""
    return self.sum_over_devices(self.local_sum(x))

  def sum_over_devices(self, parts: Parts) -> Parts:
    """The sums over the devices of a pytree of per-row scalars, which broadcast together."""
    if self.axis_name is None:
      return parts
    leaves, tree = jax.tree.flatten(parts)
    return jax.tree.unflatten(tree, _unstacked(lax.psum(_stacked(*leaves), self.axis_name)))

  def max_over_devices(
    self, top: jax.Array, any_: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """The largest over the devices of ``top``, and whether any device has ``any_``."""
    if any_ is None:
      return lax.pmax(top, self.axis_name), None
    top, count = _unstacked(lax.pmax(_stacked(top, any_.astype(top.dtype)), self.axis_name))
    return top, count > 0

  def first_entry(self, size: int) -> jax.Array | int:
    """Where in the whole row the slice of this device, of ``size`` entries, starts."""
    return 0 if self.axis_name is None else lax.axis_index(self.axis_name) * size

  def num_devices(self) -> int:
    """The number of devices that a row is spread over."""
    return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

  def are_short(self, shape: tuple[int, ...]) -> bool:
    """Whether the rows of an array of this shape have so few entries that XLA:CPU unrolls them."""
    size = math.prod(shape[axis] for axis in self.axes)
    return not is_symbolic_dim(size) and size <= _SHORT

  def barrier(self, arrays: Parts) -> Parts:
    """`jax.lax.optimization_barrier`, one for each array where rows are spread over devices.

    The tangents of one barrier must vary over the same devices, and zeros among them vary over
    none. (Newer JAX leaves out the zeros: https://github.com/jax-ml/jax/pull/39429.)
    """
    if self.axis_name is None:
      return lax.optimization_barrier(arrays)
    return jax.tree.map(lax.optimization_barrier, arrays)


def _stacked(*arrays: jax.Array) -> jax.Array:
  """`jnp.stack` of arrays that broadcast together.

  `jnp.stack` cannot be vmapped with an ``spmd_axis_name``, over whose devices only what is batched
  varies.
  """
  return jnp.concatenate([x[None] for x in jnp.broadcast_arrays(*arrays)])


def _unstacked(x: jax.Array) -> list[jax.Array]:
  """The arrays along the first axis.

  To iterate over ``x`` is not enough: its transpose is a `jnp.stack` from JAX 0.12 on.
  """
  return [lax.index_in_dim(x, i, keepdims=False) for i in range(x.shape[0])]
