"""The primitive `rule`: a rule that loops, inside `jax.shard_map`.

    rule_p.bind(*xs, f, out_types) -> ys, where f(*xs) -> ys

With `jax.vmap(..., spmd_axis_name=...)` around the `jax.shard_map`, what is batched varies over
more mesh axes. JAX hides that from the function that it batches, and its rules for `jax.lax.scan`
and `jax.checkpoint` then mix it with what does not vary. So `jax.vmap` and differentiation start
again from ``f``, in which all arguments vary over those axes and nothing is hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from softmax_jax._devices import varying_as, varying_axes, varying_over
from softmax_jax._forward_mode.linear import (
  Values,
  axes_of_batch,
  linear_map_p,
  nonzero,
  replaced,
)

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., Values]

rule_p = Primitive("rule")
rule_p.multiple_results = True


def _bind(f: Function, *xs: Any) -> Values:
  """``f(*xs)``, as a call of `rule_p`."""
  out_types = tuple(jax.make_jaxpr(f)(*xs).out_avals)
  return rule_p.bind(*xs, f=f, out_types=out_types)


def _jvp(
  primals: Values, tangents: Values, *, f: Function, out_types: Values
) -> tuple[Values, Values]:
  ys = rule_p.bind(*primals, f=f, out_types=out_types)
  y_types = [y_type.to_tangent_aval() for y_type in out_types]
  y_dots: list[Any] = [ad.Zero(y_type) for y_type in y_types]
  moving = nonzero(tangents)
  if not moving:
    return ys, y_dots
  differentiable = [i for i, y_type in enumerate(y_types) if y_type.dtype != jax.dtypes.float0]
  push, pull = _derivatives(f, len(primals), moving, differentiable)

  def apply(residuals: Values, x_dots: Values) -> Values:
    return tuple(_bind(push, *residuals, *x_dots))

  def transpose(residuals: Values, y_bars: Values) -> Values:
    bars = [
      ad.zeros_like_aval(y_types[i].to_ct_aval()) if bar is None else bar
      for i, bar in zip(differentiable, y_bars, strict=True)
    ]
    return tuple(_bind(pull, *residuals, *bars))

  moved = linear_map_p.bind(
    *primals,
    *(varying_as(jax.typeof(primals[i]), tangents[i]) for i in moving),
    name="rule",
    num_residuals=len(primals),
    apply=apply,
    transpose=transpose,
    out_types=tuple(y_types[i] for i in differentiable),
  )
  return ys, replaced(y_dots, differentiable, moved)


def _derivatives(
  f: Function, num_primals: int, moving: Sequence[int], differentiable: Sequence[int]
) -> tuple[Function, Function]:
  """The functions ``(*primals, *x_dots) -> y_dots`` and ``(*primals, *y_bars) -> x_bars``.

  They differentiate the outputs ``differentiable`` by the arguments ``moving``. Each stays the same
  function in all its calls, so that JAX traces it once.
  """

  def of_moving(primals: Values) -> tuple[Function, Values]:
    def f_of_moving(*moved: Any) -> Values:
      ys = f(*replaced(primals, moving, moved))
      return tuple(ys[i] for i in differentiable)

    return f_of_moving, tuple(primals[i] for i in moving)

  def push(*args: Any) -> Values:
    f_of_moving, xs = of_moving(args[:num_primals])
    return jax.jvp(f_of_moving, xs, args[num_primals:])[1]

  def pull(*args: Any) -> Values:
    f_of_moving, xs = of_moving(args[:num_primals])
    return jax.vjp(f_of_moving, *xs)[1](args[num_primals:])

  return push, pull


def _batch(
  axis_data: Any,
  args: Values,
  dims: Sequence[int | None],
  *,
  f: Function,
  out_types: Values,
) -> tuple[Values, Sequence[int | None]]:
  if all(dim is None for dim in dims):
    return rule_p.bind(*args, f=f, out_types=out_types), [None] * len(out_types)
  axes = axes_of_batch(axis_data, args)
  over_batch = jax.vmap(
    f,
    in_axes=tuple(dims),
    axis_size=axis_data.size,
    spmd_axis_name=None if axes else axis_data.spmd_name,
  )
  ys = _bind(over_batch, *(varying_over(axes, x) for x in args))
  return ys, [0] * len(ys)


rule_p.def_impl(lambda *xs, f, **_: f(*xs))
rule_p.def_abstract_eval(lambda *_, out_types, **__: list(out_types))
ad.primitive_jvps[rule_p] = _jvp
batching.fancy_primitive_batchers[rule_p] = _batch
mlir.register_lowering(rule_p, mlir.lower_fun(lambda *xs, f, **_: f(*xs), multiple_results=True))


def rule_with_loops(f: Callable[P, R], static_argnums: int | tuple[int, ...]) -> Callable[P, R]:
  """``f`` as a compiled function, which can be vmapped and differentiated inside `jax.shard_map`.

  There it is a call of `rule_p`; it must not close over a tracer.
  """
  numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
  as_jitted = jax.jit(f, static_argnums=static_argnums, inline=True)

  # One function for all arguments of the same structure, so that it is traced and compiled once.
  @functools.cache
  def on_leaves(tree: Any, static: tuple[Any, ...]) -> tuple[Function, list[Any]]:
    out_trees: list[Any] = []

    def of_leaves(*leaves: Any) -> Values:
      arguments = list(jax.tree.unflatten(tree, leaves))
      for i, value in zip(numbers, static, strict=True):
        arguments.insert(i, value)
      ys, out_tree = jax.tree.flatten(f(*arguments))  # pyright: ignore[reportCallIssue]
      out_trees[:] = [out_tree]
      return tuple(ys)

    return jax.jit(of_leaves, inline=True), out_trees

  @functools.wraps(f)
  def rule(*args: P.args, **kwargs: P.kwargs) -> R:
    traced = [arg for i, arg in enumerate(args) if i not in numbers]
    leaves, tree = jax.tree.flatten(traced)
    if not any(map(varying_axes, leaves)):
      return as_jitted(*args, **kwargs)
    of_leaves, out_trees = on_leaves(tree, tuple(args[i] for i in numbers))
    ys = _bind(of_leaves, *leaves)
    return jax.tree.unflatten(out_trees[0], ys)

  return rule
