"""How the loops of the rules fit the platform, and the devices that arrays are spread over.

With automatic sharding XLA decides how arrays are spread when it compiles. Left to itself it would
gather all tokens to cut chunks of them. `jax.experimental.custom_partitioning` hands the decision
to us, and each device then computes its own tokens and classes, as inside `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softmax_jax import _devices as devices
from softmax_jax._forward_mode import PLATFORMS, by_platform, rule_with_loops
from softmax_jax._linear_cross_entropy import chunks
from softmax_jax._linear_cross_entropy.chunks import Tiling
from softmax_jax._linear_cross_entropy.projection import Inputs

Function = Callable[..., Any]


def with_loops(f: Function) -> Function:
  """``f(static, *args)`` as a rule with loops, of chunks that fit the platform and the devices."""

  # It is compiled: outside of `jax.jit` a loop would be compiled in every call, as its body is a
  # new function each time.
  @functools.partial(rule_with_loops, static_argnums=0)
  def rule(static: Any, *args: Any) -> Any:
    def tiled(tiling: Tiling) -> Function:
      return lambda axis_name, *args: f(static._replace(tiling=tiling, axis_name=axis_name), *args)

    on_cpu, on_accelerator = tiled(chunks.ON_CPU), tiled(chunks.ON_ACCELERATOR)
    functions = {p: on_cpu if p == "cpu" else on_accelerator for p in PLATFORMS}
    whole = {p: functools.partial(g, static.axis_name) for p, g in functions.items()}
    spread: dict[str, Function] = {}
    if not devices.are_manual():
      vocab_axis = static.projection.vocab_axis
      spread = {p: Partitioned(g, vocab_axis) for p, g in functions.items()}
      # XLA:TPU refuses it: https://github.com/jax-ml/jax/issues/38196. Of chunks that are not of
      # neighbors XLA spreads the tokens itself, but adds up their gradients once per chunk.
      spread["tpu"] = lambda n, *args: tiled(chunks.ON_ACCELERATOR.on_devices(n))(None, *args)
    return by_platform(whole.pop("cpu"), whole, *args, spread=spread)

  return rule


# The axes of arrays: tokens, classes, and those that are never spread, features and a single one.
TOKENS, CLASSES, FEATURES, ONE = "t", "v", "h", "u"


@dataclasses.dataclass(frozen=True)
class Partitioned:
  """``f(axis_name, *args)``, on each device with the mesh axes that the classes are spread over.

  The leaves of ``args`` are those of `Inputs` and arrays ``[T, 1]``; the outputs are arrays
  ``[T, 1]`` and gradients, as `Inputs`, which are sums over the tokens and classes of a device.
  """

  f: Function
  vocab_axis: int

  def __call__(self, num_devices: int, *args: Any) -> Any:
    of_args, of_outputs = self._axes(args), list[tuple[str, ...]]()

    def whole(*args: Any) -> Any:
      outputs = self.f(None, *args)
      of_outputs[:] = self._axes(outputs)
      return outputs

    def rule(*_: Any) -> tuple[str, dict[str, Any]]:
      sides = (", ".join(map(" ".join, side)) for side in (of_args, of_outputs))
      return " -> ".join(sides), {"need_replication_factors": (FEATURES, ONE)}

    def infer(mesh: Mesh, args: Any, outputs: Any) -> Any:
      return self._shardings(outputs, mesh, self._spread(args))

    def partition(mesh: Mesh, args: Any, outputs: Any) -> Any:
      spread = self._spread(args)
      of_devices = lambda *args: self._added(self.f(spread[CLASSES] or None, *args), spread)
      shardings = (self._shardings(tree, mesh, spread) for tree in (outputs, args))
      return mesh, of_devices, *shardings

    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return partitioned(*args)

  def _axes(self, tree: Any) -> list[tuple[str, ...]]:
    """For each array of ``tree``, what its axes are."""
    weight = (FEATURES, CLASSES) if self.vocab_axis == 1 else (CLASSES, FEATURES)
    of_inputs = Inputs((TOKENS, FEATURES), weight, (CLASSES,), (), (ONE, CLASSES))
    found = list[tuple[str, ...]]()
    for node in jax.tree.leaves(tree, is_leaf=_is_inputs):
      if _is_inputs(node):
        found += [axes for axes, x in zip(of_inputs, node, strict=True) if x is not None]
      else:
        found.append((TOKENS, ONE))
    return found

  def _spread(self, args: Any) -> dict[str, tuple[str, ...]]:
    """The mesh axes that tokens and classes are spread over, as they are in ``args``.

    What is spread over none, or does not divide, is whole on each device.
    """
    spread: dict[str, tuple[str, ...]] = {TOKENS: (), CLASSES: ()}
    for name in spread:
      for x, axes in zip(jax.tree.leaves(args), self._axes(args), strict=True):
        if name in axes and not spread[name] and isinstance(x.sharding, NamedSharding):
          axis, sizes = axes.index(name), x.sharding.mesh.shape
          taken = {*spread[TOKENS]}
          names = devices.mesh_axes(x.sharding.spec[axis])
          names = tuple(n for n in names if n not in taken)
          if x.shape[axis] % math.prod(sizes[n] for n in names) == 0:
            spread[name] = names
    return spread

  def _shardings(self, tree: Any, mesh: Mesh, spread: dict[str, tuple[str, ...]]) -> Any:
    """That of each array of ``tree``."""
    specs = (PartitionSpec(*(spread.get(a) or None for a in axes)) for axes in self._axes(tree))
    return jax.tree.unflatten(jax.tree.structure(tree), [NamedSharding(mesh, s) for s in specs])

  def _added(self, outputs: Any, spread: dict[str, tuple[str, ...]]) -> Any:
    """The outputs of a device, with gradients added over the devices that have a part of them."""

    def added(node: Any) -> Any:
      if not _is_inputs(node):
        return node
      sums = list[jax.Array]()
      for x, axes in zip(jax.tree.leaves(node), self._axes(node), strict=True):
        over = [name for key, names in spread.items() if key not in axes for name in names]
        sums.append(lax.psum(x, tuple(over)) if over else x)
      return jax.tree.unflatten(jax.tree.structure(node), sums)

    return jax.tree.map(added, outputs, is_leaf=_is_inputs)


def _is_inputs(node: Any) -> bool:
  return isinstance(node, Inputs)
