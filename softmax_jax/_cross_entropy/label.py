"""Labels that are class indices: which rows count, and the entries of a row at its label."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from softmax_jax import _devices as devices
from softmax_jax._arrays import batched_like, masked
from softmax_jax._exponentials import entries
from softmax_jax._forward_mode import linear_map
from softmax_jax._rows import Rows

# What stands in place of the class index in a row whose label is out of range, and in a row that
# does not count.
INVALID, IGNORED = -1, -2


def class_index(
  labels: jax.Array, ignore_index: jax.Array | None, ignore_invalid: bool, num_classes: int
) -> jax.Array:
  """The labels as int32, with `INVALID` and `IGNORED` in place of those that are no class."""
  valid = (labels >= 0) & (labels < num_classes)
  index = jnp.where(valid, labels, IGNORED if ignore_invalid else INVALID)
  if ignore_index is not None:
    index = jnp.where(labels == ignore_index, IGNORED, index)
  return index.astype(jnp.int32)


class Label(NamedTuple):
  """Where the labels are in the slice of the classes that this device holds.

  Attributes:
    position: the index of the label in the slice, which may lie outside of it; where there is no
      label, that of class 0.
    here: whether the label is in the slice, or None where that is all classes.
  """

  position: jax.Array
  here: jax.Array | None

  @classmethod
  def of(cls, index: jax.Array, size: int, rows: Rows) -> Label:
    """Those in the slice of this device, of ``size`` classes."""
    position = jnp.maximum(index, 0) - rows.first_entry(size)
    return cls(position, None if rows.axis_name is None else (position >= 0) & (position < size))

  def take(self, x: jax.Array, axis: int, elsewhere: float = 0) -> jax.Array:
    """The entries of ``x`` at the labels, ``axis`` kept."""
    mode = None if self.here is None else "clip"
    x_t = devices.entry_at(x, self.position, axis, mode)
    return masked(x_t, self.here, elsewhere)

  def take_entry(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    any_: jax.Array | None,
    dtype: DTypeLike,
    axis: int,
    elsewhere: float = 0,
  ) -> jax.Array:
    """The `entries` of ``x`` at the labels.

    Taken before they are converted: XLA would write the whole converted array to take them from.
    """
    if mask is None:
      return self.take(x, axis, elsewhere).astype(dtype)
    mask_t = self.take(jnp.broadcast_to(mask, x.shape), axis)
    return masked(entries(self.take(x, axis), mask_t, any_, dtype), self.here, elsewhere)

  def take_weight(self, weights: jax.Array, axis: int, like: jax.Array | None) -> jax.Array:
    """The weights of the labels, from an array with one weight per class along ``axis``.

    ``like`` are the logits, to whose shape the weights are broadcast where JAX does not index.
    """
    if like is not None and devices.explicit_sharding(like):
      return self.take(weights + jnp.zeros_like(like, weights.dtype), axis)
    return masked(weights.ravel().at[self.position].get(mode="clip"), self.here, 0)


def weight_of_label(
  weights: jax.Array, index: jax.Array, rows: Rows, like: jax.Array | None = None
) -> jax.Array:
  """The weight of the label of each row, from an array with one per class along the class axis."""
  (axis,) = rows.axes
  label = Label.of(index, weights.shape[axis], rows)
  return rows.sum_over_devices(label.take_weight(weights, axis, like))


def is_label(z: jax.Array, index: jax.Array, rows: Rows) -> jax.Array:
  """Whether each entry of ``z`` is that of the label of its row."""
  (axis,) = rows.axes
  return devices.index_along(z, axis) == index - rows.first_entry(z.shape[axis])


def by_row(index: jax.Array, valid: jax.Array) -> jax.Array:
  """``valid`` in rows with a label, NaN where that is invalid, 0 in rows that do not count."""
  return jnp.where(index >= 0, valid, jnp.where(index == INVALID, jnp.nan, 0))


def bar_by_row(index: jax.Array, bar: jax.Array) -> jax.Array:
  """The cotangent that `by_row` passes on, NaN where the label is invalid.

  There 0 stays 0, for those who discard such a row with a select.
  """

  def apply(residuals: Any, bars: Any) -> tuple[jax.Array]:
    (index,), (bar,) = residuals, bars
    poison = jnp.where((index == INVALID) & (bar != 0), jnp.nan, jnp.zeros_like(bar))
    return (jnp.where(index >= 0, bar, poison),)

  return linear_map("bar_by_row", apply, apply, [index], bar, like=bar)


# The results of rows that do not count are replaced by 0 at the end, which is faster than masking
# their entries first. That is too late for derivatives: their products would be 0 * NaN. (In a scan
# that is differentiated twice they still are, as JAX before 0.12 drops this rule there.)
@jax.custom_jvp
def stop_gradient_unless(counts: jax.Array, x: jax.Array) -> jax.Array:
  """``x``, but for derivatives 0 in rows that do not count, which may hold anything."""
  return batched_like(x, counts)  # as the tangent is


@stop_gradient_unless.defjvp
def _stop_gradient_unless_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  counts, x = primals
  return masked(x, counts, 0), masked(tangents[1], counts, 0)
