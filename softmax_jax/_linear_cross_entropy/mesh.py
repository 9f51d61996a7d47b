"""Tokens and classes spread over a mesh as the types of the arguments say, or the caller.

Chunks of tokens are then cut on each device from its own, in a `jax.shard_map` around the loss: cut
from all tokens, they would be gathered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from softmax_jax import _devices as devices
from softmax_jax._linear_cross_entropy.gradients import Static


class Arrays(NamedTuple):
  """The arrays among the arguments of the loss, None where there is no such argument.

  Attributes:
    x: ``[*B, H]``.
    index: the labels, ``[*B]``.
    sample_weights: ``[*B]``.
    weight: ``[H, V]`` or ``[V, H]``.
    bias: ``[V]``.
    class_weights: ``[V]``.
    logit_scale, softcap, label_smoothing, z_loss: scalars.
  """

  x: Any
  index: Any
  sample_weights: Any
  weight: Any
  bias: Any
  class_weights: Any
  logit_scale: Any
  softcap: Any
  label_smoothing: Any
  z_loss: Any


def on_mesh(
  f: Callable[..., Any],
  arrays: Arrays,
  static: Static,
  logits_sharding: NamedSharding | None,
) -> Any:
  """``f(arrays, static)``, on each device for its tokens and classes where these are spread.

  ``f`` returns arrays with one number per token, and sums over the tokens. Each device gets all
  features of its tokens and classes.
  """
  names, vocab_axis, spec = devices.mesh_axes, static.projection.vocab_axis, PartitionSpec
  mesh = None
  if logits_sharding is not None:
    mesh = logits_sharding.mesh
    *rows, vocab = logits_sharding.spec
    arrays, static = _padded(arrays, static, math.prod(mesh.shape[name] for name in names(vocab)))
  elif spread := _spread_by_types(arrays, vocab_axis):
    *rows, vocab = spread
  else:
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
      # Arguments of `jax.jit` may have types without a mesh, while other arrays have one.
      arrays = jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), arrays)
    return f(arrays, static)
  over_rows, over_classes = names(*rows), names(vocab)
  specs = Arrays(
    x=spec(*rows, None),
    index=spec(*rows),
    sample_weights=spec(*rows),
    weight=spec(None, vocab) if vocab_axis == 1 else spec(vocab, None),
    bias=spec(vocab),
    class_weights=spec(vocab),
    logit_scale=spec(),
    softcap=spec(),
    label_smoothing=spec(),
    z_loss=spec(),
  )
  specs = Arrays(*(None if a is None else s for a, s in zip(arrays, specs, strict=True)))
  if mesh is None or AxisType.Explicit in mesh.axis_types:
    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)
  static = static._replace(axis_name=over_classes or None)
  out_specs = spec(*rows), spec()
  return _on_devices(arrays, f, static, over_rows, mesh, specs, out_specs)  # pyright: ignore[reportUnknownVariableType]


def _spread_by_types(arrays: Arrays, vocab_axis: int) -> tuple[Any, ...] | None:
  """What the types of the arrays say of the axes of the logits ``[*B, V]``, None where nothing.

  Where tokens and classes are spread over one mesh axis, it is left to the tokens.
  """
  names = devices.mesh_axes
  specs = Arrays(*(None if a is None else _spec(a) for a in arrays))
  if not any(any(s) for s in specs if s is not None):
    return None
  *rows, _ = specs.x
  vocab = tuple(name for name in names(specs.weight[vocab_axis]) if name not in names(*rows))
  # x and the weight say how tokens and classes are spread; where they do not, the others.
  of_classes = [(*rows, *s) for s in (specs.bias, specs.class_weights) if s is not None]
  of_tokens = [(*s, None) for s in (specs.index, specs.sample_weights) if s is not None]
  return devices.filled((*rows, vocab or None), *of_tokens, *of_classes)


def _padded(arrays: Arrays, static: Static, count: int) -> tuple[Arrays, Static]:
  """The arrays with as many classes that are none as ``count`` devices need for equal parts."""
  vocab_axis = static.projection.vocab_axis
  excess = -arrays.weight.shape[vocab_axis] % count
  if excess == 0:
    return arrays, static

  def padded(x: jax.Array | None, axis: int = 0) -> jax.Array | None:
    return None if x is None else jnp.pad(x, [(0, excess * (i == axis)) for i in range(x.ndim)])

  arrays = arrays._replace(
    weight=padded(arrays.weight, vocab_axis),
    bias=padded(arrays.bias),
    class_weights=padded(arrays.class_weights),
  )
  return arrays, static._replace(padded=True)


# One function, so that calls outside of `jax.jit` are compiled once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _on_devices(
  arrays: Arrays,
  f: Callable[..., Any],
  static: Static,
  added_over: tuple[str, ...],
  mesh: Mesh | AbstractMesh | None,
  specs: Arrays,
  out_specs: Any,
) -> Any:
  def on_device(arrays: Arrays) -> Any:
    of_tokens, sums = f(arrays, static)
    return of_tokens, jax.lax.psum(sums, added_over) if added_over and sums else sums

  return jax.shard_map(on_device, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(arrays)


def _spec(x: jax.Array) -> tuple[Any, ...]:
  sharding = devices.explicit_sharding(x)
  return (None,) * x.ndim if sharding is None else tuple(sharding.spec)
