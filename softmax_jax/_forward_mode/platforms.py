"""The primitive `by_platform`: a function whose value other programs compute on some platforms.

    by_platform_p.bind(*leaves, program, others, spread, tree, needs_devices) -> values

- ``program``: the function of the leaves, traced. Its derivatives are those of the call, whatever
  the platform. Without `jax.jit` it is also its value.
- ``others``: pairs of a platform and the function that is compiled there. It computes the same, of
  arguments of the structure ``tree``; it is traced only where it is compiled, and must not close
  over a tracer. No function has a collective over an axis of `jax.vmap`.
- ``spread``: likewise, the functions for a program of several devices.

With `jax.lax.platform_dependent` each program would be traced at each call, and JAX can neither
differentiate all of them nor batch such a branch inside `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from softmax_jax._forward_mode.linear import Values, nonzero, replaced

Function = Callable[..., Any]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

by_platform_p = Primitive("by_platform")
by_platform_p.multiple_results = True


def by_platform(
  function: Function,
  others: Mapping[str, Function],
  *args: Any,
  spread: Mapping[str, Function] | None = None,
) -> Any:
  """``function(*args)``, for which another function stands on some of the `PLATFORMS`.

  In a program of several devices, those of ``spread`` come first. They are called with the number
  of devices before the arguments, and may use `jax.experimental.custom_partitioning`. `jax.vmap`
  and `jax.export` do without them.
  """
  leaves, tree = jax.tree.flatten(args)
  of_leaves = lambda *leaves: function(*jax.tree.unflatten(tree, leaves))
  program, out = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
  values = by_platform_p.bind(
    *leaves,
    program=program,
    others=tuple(others.items()),
    spread=tuple((spread or {}).items()),
    tree=tree,
    needs_devices=_needs_devices() if spread else None,
  )
  return jax.tree.unflatten(jax.tree.structure(out), values)


@functools.cache
def _needs_devices() -> Any:
  """A program for which JAX, when it finds it in the parameters, lowers with known devices.

  `custom_partitioning` asks for that, and JAX looks for it before any function is traced here.
  """
  identity = custom_partitioning(lambda x: x)
  identity.def_partition(lambda mesh, args, out: (mesh, lambda x: x, out, args), sharding_rule="->")
  return jax.make_jaxpr(identity)(0.0)


def with_derivative_of(function: Function, value: Function, *args: Any) -> Any:
  """``value(*args)``, which is ``function(*args)``, with the derivative of ``function``."""
  return by_platform(function, dict.fromkeys(PLATFORMS, value), *args)


def _lowered(platform: str | None, context: Any, *values: Any, **params: Any) -> Any:
  """The operations of the function for the platform."""
  program, tree = params["program"], params["tree"]
  other = dict(params["others"]).get(platform)
  module = context.module_context
  num_devices = getattr(module.axis_context, "num_devices", 1)
  on_several = dict(params["spread"]).get(platform)
  if on_several and num_devices > 1 and not module.lowering_parameters.for_export:
    other = functools.partial(on_several, num_devices)
  if other is None:
    chosen = jaxpr_as_fun(program)
  else:
    chosen = lambda *leaves: jax.tree.leaves(other(*jax.tree.unflatten(tree, leaves)))
  return mlir.lower_fun(chosen, multiple_results=True)(context, *values)


def _jvp(
  primals: Values, tangents: Values, *, program: Any, **params: Any
) -> tuple[Values, Values]:
  values = by_platform_p.bind(*primals, program=program, **params)
  moving = nonzero(tangents)
  _, dots = jax.jvp(
    lambda *moved: jaxpr_as_fun(program)(*replaced(primals, moving, moved)),
    tuple(primals[i] for i in moving),
    tuple(tangents[i] for i in moving),
  )
  types = [value_type.to_tangent_aval() for value_type in program.out_avals]
  is_float0 = [x_type.dtype == jax.dtypes.float0 for x_type in types]
  return values, [
    ad.Zero(x_type) if zero else dot
    for x_type, zero, dot in zip(types, is_float0, dots, strict=True)
  ]


def _transpose(y_bars: Values, *args: Any, program: Any, **_: Any) -> Values:
  linear = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]
  _, transpose = jax.vjp(
    lambda *xs: jaxpr_as_fun(program)(*replaced(args, linear, xs)),
    *(ad.zeros_like_aval(args[i].aval) for i in linear),  # any point: it is linear
  )
  x_bars = transpose([ad.instantiate_zeros(y_bar) for y_bar in y_bars])
  return replaced([None] * len(args), linear, x_bars)


def _batch(
  axis_data: Any, leaves: Values, dims: Any, *, program: Any, others: Any, tree: Any, **params: Any
) -> tuple[Values, Any]:
  if all(dim is None for dim in dims):  # JAX calls this rule with nothing batched too
    values = by_platform_p.bind(*leaves, program=program, others=others, tree=tree, **params)
    return values, [None] * len(values)
  over_batch = functools.partial(
    jax.vmap, axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name
  )
  flat = over_batch(jaxpr_as_fun(program), in_axes=tuple(dims))
  axes = jax.tree.unflatten(tree, dims)
  batched = {
    platform: other.over_batch(over_batch, axes)
    if isinstance(other, IfAny)
    else over_batch(other, in_axes=axes)
    for platform, other in others
  }
  args = jax.tree.unflatten(tree, leaves)
  values = by_platform(lambda *args: flat(*jax.tree.leaves(args)), batched, *args)
  return values, [0] * len(values)


# Only what calls a program lowers it. JAX asks because it finds one among the parameters.
by_platform_p.is_high = lambda *_, **__: False
by_platform_p.def_impl(lambda *leaves, program, **_: jaxpr_as_fun(program)(*leaves))
by_platform_p.def_abstract_eval(lambda *_, program, **__: program.out_avals)
ad.primitive_jvps[by_platform_p] = _jvp
ad.primitive_transposes[by_platform_p] = _transpose
batching.fancy_primitive_batchers[by_platform_p] = _batch
for _platform in (None, *PLATFORMS):
  mlir.register_lowering(by_platform_p, functools.partial(_lowered, _platform), platform=_platform)


def _same(quick: Any) -> Any:
  return quick


@dataclasses.dataclass(frozen=True)
class IfAny:
  """The function ``(needed, quick, *args)``: ``careful(*args)`` if any is needed, else ``quick``.

  `jax.vmap` would make a select of the condition of each element of a batch, and compute both.
  Here the batch has one condition.
  """

  careful: Function
  as_result: Function = _same  # makes of ``quick`` what ``careful`` returns

  def __call__(self, needed: jax.Array, quick: Any, *args: Any) -> Any:
    careful = lambda quick, *args: self.careful(*args)
    return lax.cond(jnp.any(needed), careful, lambda quick, *_: self.as_result(quick), quick, *args)

  def over_batch(self, vmap: Function, axes: Any) -> IfAny:
    """The same function of batches along ``axes``."""
    _, quick_axes, *args_axes = axes
    return IfAny(
      vmap(self.careful, in_axes=tuple(args_axes)), vmap(self.as_result, in_axes=(quick_axes,))
    )
