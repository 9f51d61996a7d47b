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
  """``f(static, *args)`` as a rule with loops, of chunks that fit the platform and the devices.

  The leaves of ``args`` are those of `Inputs` and arrays of numbers per token, ``[*B, 1]``. ``f``
  gets them as ``[T, 1]``, and x as ``[T, H]``. It returns such arrays, and gradients as `Inputs`.
  """

  # It is compiled: outside of `jax.jit` a loop would be compiled in every call, as its body is a
  # new function each time.
  @functools.partial(rule_with_loops, static_argnums=0)
  def rule(static: Any, *args: Any) -> Any:
    def tiled(tiling: Tiling) -> Function:
      def tiled_f(axis_name: Any, *args: Any) -> Any:
        rows = next(x.shape[:-1] for x in _nodes(args) if not _is_inputs(x))
        merged = _on_tokens(lambda x: x.reshape(math.prod(rows), x.shape[-1]), args)
        outputs = f(static._replace(tiling=tiling, axis_name=axis_name), *merged)
        return _on_tokens(lambda x: x.reshape(*rows, x.shape[-1]), outputs)

      return tiled_f

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


def _is_inputs(node: Any) -> bool:
  return isinstance(node, Inputs)


def _nodes(tree: Any) -> list[Any]:
  """The parts of ``tree``: `Inputs` and arrays."""
  return jax.tree.leaves(tree, is_leaf=_is_inputs)


def _on_tokens(f: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
  """``tree`` with ``f`` of the arrays of all tokens."""

  def of_node(node: Any) -> Any:
    if not _is_inputs(node):
      return f(node)
    return node if node.x is None else node._replace(x=f(node.x))

  return jax.tree.map(of_node, tree, is_leaf=_is_inputs)


# The axes of arrays: classes, and those that are never spread, features and a single one. Those of
# the tokens are numbered: t0, t1, ...
CLASSES, FEATURES, ONE = "v", "h", "u"


@dataclasses.dataclass(frozen=True)
class Partitioned:
  """``f(axis_name, *args)``, on each device with the mesh axes that the classes are spread over.

  ``args`` are those of `with_loops`. Gradients of ``f`` are sums over its tokens and classes.
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
      on_device = lambda *args: self._added(self.f(spread.get(CLASSES) or None, *args), spread)
      shardings = (self._shardings(tree, mesh, spread) for tree in (outputs, args))
      return mesh, on_device, *shardings

    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return partitioned(*args)

  def _axes(self, tree: Any) -> list[tuple[str, ...]]:
    """For each array of ``tree``, what its axes are."""
    weight = (FEATURES, CLASSES) if self.vocab_axis == 1 else (CLASSES, FEATURES)
    tokens = lambda x: tuple(f"t{i}" for i in range(x.ndim - 1))
    found = list[tuple[str, ...]]()
    for node in _nodes(tree):
      if _is_inputs(node):
        x = () if node.x is None else (*tokens(node.x), FEATURES)
        of_inputs = Inputs(x, weight, (CLASSES,), (), (), (ONE, CLASSES))
        found += [axes for axes, x in zip(of_inputs, node, strict=True) if x is not None]
      else:
        found.append((*tokens(node), ONE))
    return found

  def _spread(self, args: Any) -> dict[str, tuple[str, ...]]:
    """By axis of the tokens and the classes the mesh axes that it is spread over in ``args``.

    Tokens come before classes, x and the weight before other arrays. What does not divide is whole.
    """
    spread: dict[str, tuple[str, ...]] = {}
    arrays = [*zip(jax.tree.leaves(args), self._axes(args), strict=True)]
    for of_classes in (False, True):
      for x, axes in arrays:
        for i, axis in enumerate(axes):
          fits = axis not in (FEATURES, ONE) and (axis == CLASSES) == of_classes
          if not fits or spread.get(axis) or not isinstance(x.sharding, NamedSharding):
            continue
          taken = devices.mesh_axes(*spread.values())
          names = tuple(n for n in devices.mesh_axes(x.sharding.spec[i]) if n not in taken)
          if x.shape[i] % math.prod(x.sharding.mesh.shape[n] for n in names) == 0:
            spread[axis] = names
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
        over = devices.mesh_axes(*(names for axis, names in spread.items() if axis not in axes))
        sums.append(lax.psum(x, over) if over else x)
      return jax.tree.unflatten(jax.tree.structure(node), sums)

    return jax.tree.map(added, outputs, is_leaf=_is_inputs)
