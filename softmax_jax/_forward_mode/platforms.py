"""The primitive `by_platform`: a function whose value other programs compute on some platforms.

    by_platform_p.bind(*args, program, others) -> values

- ``program``: the function, traced. Its derivatives are those of the call on every platform.
- ``others``: pairs of a platform and the function ``(*args) -> values`` that is compiled there. It
  computes the same, is traced only where it is compiled, and must not close over a tracer.

With `jax.lax.platform_dependent` each program would be traced at each call, and JAX can neither
differentiate all of them nor batch such a branch inside `jax.shard_map`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from softmax_jax._forward_mode.linear import Values, nonzero, replaced

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

by_platform_p = Primitive("by_platform")
by_platform_p.multiple_results = True


def by_platform(
  function: Callable[..., Any], others: Mapping[str, Callable[..., Any]], *args: Any
) -> Any:
  """``function(*args)``, for which another function stands on some of the `PLATFORMS`."""
  leaves, tree = jax.tree.flatten(args)

  def flat(f: Callable[..., Any]) -> Callable[..., Values]:
    return lambda *leaves: jax.tree.leaves(f(*jax.tree.unflatten(tree, leaves)))

  of_leaves = lambda *leaves: function(*jax.tree.unflatten(tree, leaves))
  program, out = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
  flat_others = tuple((platform, flat(other)) for platform, other in others.items())
  values = by_platform_p.bind(*leaves, program=program, others=flat_others)
  return jax.tree.unflatten(jax.tree.structure(out), values)


def _impl(*args: Any, program: Any, others: Any) -> Values:
  return jaxpr_as_fun(program)(*args)


def _lowered(platform: str, *args: Any, program: Any, others: Any) -> Values:
  return dict(others).get(platform, jaxpr_as_fun(program))(*args)


def _jvp(primals: Values, tangents: Values, *, program: Any, others: Any) -> tuple[Values, Values]:
  values = by_platform_p.bind(*primals, program=program, others=others)
  moving = nonzero(tangents)
  _, dots = jax.jvp(
    lambda *moved: jaxpr_as_fun(program)(*replaced(primals, moving, moved)),
    tuple(primals[i] for i in moving),
    tuple(tangents[i] for i in moving),
  )
  is_float = [jnp.issubdtype(value.dtype, jnp.floating) for value in values]
  zeros = [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in values]
  return values, [d if f else zero for d, f, zero in zip(dots, is_float, zeros, strict=True)]


def _batch(
  axis_data: Any, args: Values, dims: Any, *, program: Any, others: Any
) -> tuple[Values, Any]:
  if all(dim is None for dim in dims):  # JAX calls this rule with nothing batched too
    values = by_platform_p.bind(*args, program=program, others=others)
    return values, [None] * len(values)

  def over_batch(f: Callable[..., Values]) -> Callable[..., Values]:
    return jax.vmap(
      f, in_axes=tuple(dims), axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name
    )

  batched = {platform: over_batch(other) for platform, other in others}
  values = by_platform(over_batch(jaxpr_as_fun(program)), batched, *args)
  return values, [0] * len(values)


by_platform_p.def_impl(_impl)
by_platform_p.def_abstract_eval(lambda *_, program, **__: program.out_avals)
ad.primitive_jvps[by_platform_p] = _jvp
batching.fancy_primitive_batchers[by_platform_p] = _batch
for _platform in PLATFORMS:
  _rule = mlir.lower_fun(functools.partial(_lowered, _platform), multiple_results=True)
  mlir.register_lowering(by_platform_p, _rule, platform=_platform)
