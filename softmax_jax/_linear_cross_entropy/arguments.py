"""Checks of arguments that only the linear loss has."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.export import is_symbolic_dim
from jax.sharding import NamedSharding, PartitionSpec

from softmax_jax._arguments import Arguments, is_concrete
from softmax_jax._devices import are_manual, mesh_axes


class LinearArguments(Arguments):
  """The arguments of a linear layer and a loss on it."""

  def as_vocab_axis(self, axis: Any, shape: tuple[int, ...]) -> int:
    """``axis`` of a weight of ``shape`` as 0 or 1."""
    index = self.as_static_int("vocab_axis", axis, "a static int")
    if len(shape) != 2 or not -2 <= index < 2:
      raise ValueError(
        f"{self} expected weight [H, V] with vocab_axis=-1, or [V, H] with vocab_axis=0, got "
        f"shape {shape} with vocab_axis={index}."
      )
    return index % 2

  def check_features(self, x: tuple[int, ...], weight: tuple[int, ...], vocab_axis: int) -> None:
    """Raises unless arrays of shapes ``x`` and ``weight`` can be multiplied."""
    features = weight[1 - vocab_axis]
    if x and x[-1] == features:
      return
    fix = ""
    if x and x[-1] == weight[vocab_axis]:
      stored = "[V, H]" if vocab_axis == 1 else "[H, V]"
      fix = f" For a weight {stored} pass vocab_axis={0 if vocab_axis == 1 else -1}."
    raise ValueError(
      f"{self} expected x of shape [..., {features}] for weight of shape {weight} with "
      f"vocab_axis={vocab_axis}, got shape {x}.{fix}"
    )

  def check_labels_of_tokens(self, labels: tuple[int, ...], x: tuple[int, ...]) -> None:
    """Raises unless there is one label per token."""
    if labels != x[:-1]:
      raise ValueError(
        f"{self} expected one label per token, of shape {x[:-1]} for x of shape {x}, got shape "
        f"{labels}."
      )

  def as_logits_sharding(self, value: Any, rows: tuple[int, ...]) -> NamedSharding:
    """``value`` as the sharding of logits ``[*rows, V]``, with one part for each axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(value, NamedSharding):
      mesh, value = value.mesh, value.spec
    if not isinstance(value, PartitionSpec):
      got = type(value).__name__ if is_concrete(value) else "a traced value"
      raise TypeError(
        f"{self} expected logits_sharding to be a jax.sharding.PartitionSpec, a NamedSharding or "
        f"None, got {got}."
      )
    if are_manual():
      raise ValueError(
        f"{self} expected no logits_sharding inside jax.shard_map. Pass axis_name, if the classes "
        "are spread there."
      )
    if mesh.empty:
      raise ValueError(
        f"{self} expected a mesh for logits_sharding={value}. Call jax.set_mesh(mesh), or pass "
        "jax.sharding.NamedSharding(mesh, spec)."
      )
    if len(value) > len(rows) + 1:
      raise ValueError(
        f"{self} expected logits_sharding with at most {len(rows) + 1} parts, for the {len(rows)} "
        f"axes of labels and one of classes, got {value}."
      )
    parts = (*value, *[None] * (len(rows) + 1 - len(value)))
    sharding = NamedSharding(mesh, PartitionSpec(*parts))
    for size, part in zip(rows, parts, strict=False):
      count = math.prod(mesh.shape[name] for name in mesh_axes(part))
      if size % count:
        raise ValueError(
          f"{self} expected labels of shape {rows} to be cut into equal parts over the mesh axis "
          f"{part!r} of size {count}, as logits_sharding={value} says. Pad them, and pass "
          "ignore_index."
        )
    return sharding

  def as_bias(self, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """``value`` as an array with one number per class."""
    x = self.as_logits("bias", value)
    if x.shape != shape:
      raise ValueError(
        f"{self} expected one bias per class, of shape {shape}, got shape {x.shape}."
      )
    return x

  def as_chunk_size(self, value: Any) -> int:
    """``value`` as a positive int."""
    size = self.as_static_int("chunk_size", value, "a static int or None")
    if size < 1:
      raise ValueError(f"{self} expected chunk_size to be at least 1, got {size}.")
    return size

  def check_symbolic_sizes(self, num_tokens: Any, num_classes: Any, chunk_size: int | None) -> None:
    """Raises unless sizes that `jax.export` leaves open make whole chunks of a known size."""
    if is_symbolic_dim(num_tokens) and (chunk_size is None or num_tokens % chunk_size != 0):
      raise ValueError(
        f"{self} expected a chunk_size that divides the symbolic number of tokens, {num_tokens}, "
        f"got {chunk_size}. Pass chunk_size=512 for jax.export.symbolic_shape('512*n'), say."
      )
    if is_symbolic_dim(num_classes) and chunk_size is None:
      raise ValueError(
        f"{self} expected a chunk_size for the symbolic number of classes, {num_classes}, got "
        "None. Pass chunk_size=512, say: the memory is that of the logits of as many tokens."
      )

  def as_num_classes(self, value: Any, num_columns: int) -> int:
    """``value`` as an int in [0, num_columns]."""
    size = self.as_static_int("num_classes", value, "a static int or None")
    if not 0 <= size <= num_columns:
      raise ValueError(
        f"{self} expected num_classes in [0, {num_columns}], the number of columns of the weight "
        f"on all devices, got {size}."
      )
    return size
