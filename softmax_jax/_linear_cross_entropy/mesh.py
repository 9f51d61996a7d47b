"""Arguments whose types say how they are spread over a mesh (explicit sharding).

Chunks of tokens are then cut on each device from its own, in a `jax.shard_map` around the loss: cut
from all tokens, they would be gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from softmax_jax import _devices as devices
from softmax_jax._linear_cross_entropy.rules import Static


class Arrays(NamedTuple):
  """The arrays among the arguments of the loss, None where there is no such argument.

  Attributes:
    x: ``[*B, H]``.
    index: the labels, ``[*B]``.
    weight: ``[H, V]`` or ``[V, H]``.
    bias: ``[V]``.
    class_weights: ``[V]``.
    softcap, label_smoothing, z_loss: scalars.
  """

  x: Any
  index: Any
  weight: Any
  bias: Any
  class_weights: Any
  softcap: Any
  label_smoothing: Any
  z_loss: Any


def on_mesh(f: Callable[..., Any], arrays: Arrays, static: Static, summed: bool) -> Any:
  """``f(arrays, static)``, on each device for its tokens and classes where these are spread.

  ``f`` returns one number per token or, if ``summed``, a pair of sums over the tokens. Each device
  gets all features of its tokens and classes. Where both are spread over one mesh axis, it gets the
  classes of all devices of that axis.
  """
  specs = Arrays(*(None if a is None else _spec(a) for a in arrays))
  if not any(any(s) for s in specs if s is not None):
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
      # Arguments of `jax.jit` may have types without a mesh, while other arrays have one.
      arrays = jax.tree.map(_whole, arrays)
    return f(arrays, static)
  names, vocab_axis = devices.mesh_axes, static.projection.vocab_axis
  *rows, _ = specs.x
  vocab = tuple(name for name in names(specs.weight[vocab_axis]) if name not in names(*rows))
  # x and the weight say how tokens and classes are spread; where they do not, the others.
  of_classes = [(*rows, *s) for s in (specs.bias, specs.class_weights) if s is not None]
  *rows, vocab = devices.filled((*rows, vocab or None), (*specs.index, None), *of_classes)
  over_rows, over_classes = names(*rows), names(vocab)
  spec = PartitionSpec
  specs = Arrays(
    x=spec(*rows, None),
    index=spec(*rows),
    weight=spec(None, vocab) if vocab_axis == 1 else spec(vocab, None),
    bias=spec(vocab),
    class_weights=spec(vocab),
    softcap=spec(),
    label_smoothing=spec(),
    z_loss=spec(),
  )
  specs = Arrays(*(None if a is None else s for a, s in zip(arrays, specs, strict=True)))

  def placed(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(array, spec)

  static = static._replace(axis_name=over_classes or None)
  added_over = over_rows if summed else ()
  out_specs = (spec(), spec()) if summed else spec(*rows)
  arrays = jax.tree.map(placed, arrays, specs)
  return _on_devices(arrays, f, static, added_over, specs, out_specs)  # pyright: ignore[reportUnknownVariableType]


# One function, so that calls outside of `jax.jit` are compiled once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _on_devices(
  arrays: Arrays,
  f: Callable[..., Any],
  static: Static,
  added_over: tuple[str, ...],
  specs: Arrays,
  out_specs: Any,
) -> Any:
  def on_device(arrays: Arrays) -> Any:
    out = f(arrays, static)
    return jax.lax.psum(out, added_over) if added_over else out

  return jax.shard_map(on_device, in_specs=(specs,), out_specs=out_specs)(arrays)


def _spec(x: jax.Array) -> tuple[Any, ...]:
  sharding = devices.explicit_sharding(x)
  return (None,) * x.ndim if sharding is None else tuple(sharding.spec)


def _whole(x: jax.Array) -> jax.Array:
  """``x``, the same on each device of the mesh."""
  return jax.sharding.reshard(x, PartitionSpec())
