"""Forward mode for `jax.custom_vjp` in JAX's new implementation, which calls it as a `HiPrim`.

A `HiPrim` has a backward rule of its own beside its tangent, so that nothing has to be hidden: here
it is the one that JAX made of the user's function, with `lin` and `linearized` added. Reverse mode,
`jax.vmap` and `jax.checkpoint` are JAX's own.
"""

# JAX 0.10 and 0.11 do not have all of it.
# pyright: reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.hijax
from jax.core import Tracer
from jax.experimental.hijax import Zero
from jax.extend.core import Literal

from softmax_jax._devices import varying_as, varying_axes
from softmax_jax._forward_mode.derivative import Derivative, checked_tangent, differentiable
from softmax_jax._forward_mode.linear import Values, replaced

# JAX 0.10 does not call this module, but it can import it.
HiPrim: Any = getattr(jax.experimental.hijax, "HiPrim", object)
GradAccum: Any = getattr(jax.experimental.hijax, "GradAccum", object)
# The residuals, and of all leaves of the arguments the tangent or None -> the output's tangents.
Tangent = Callable[[Any, Values], Values]


def call(
  name: str,
  f: Any,
  tangent: Callable[..., Any] | None,
  bound: inspect.BoundArguments,
) -> Any:
  """``f`` of its arguments, with forward mode."""
  if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((bound.args, bound.kwargs))):
    return f(*bound.args, **bound.kwargs)
  dynamic = [arg for i, arg in enumerate(bound.args) if i not in f.nondiff_argnums]
  static = [bound.args[i] for i in f.nondiff_argnums]

  def of_dynamic(*dynamic: Any) -> Any:
    arguments = list(dynamic)
    for i, value in zip(f.nondiff_argnums, static, strict=True):
      arguments.insert(i, value)
    return f(*arguments, **bound.kwargs)

  reverse, operands = _applied(of_dynamic, *dynamic)
  rule = None
  if tangent is not None:
    rule = _on_leaves(name, functools.partial(tangent, *static), reverse, f.nondiff_argnums)
  return _ForwardMode(name, reverse, rule)(*operands)


def _applied(function: Callable[..., Any], *args: Any) -> tuple[Any, tuple[Any, ...]]:
  """The primitive that ``function(*args)`` applies and nothing else, and what to."""
  leaves, tree = jax.tree.flatten(args)
  of_leaves = lambda *leaves: function(*jax.tree.unflatten(tree, leaves))
  program = jax.make_jaxpr(of_leaves)(*leaves)
  (application,) = program.eqns
  variables = [*program.jaxpr.constvars, *program.jaxpr.invars]
  values = dict(zip(variables, [*program.consts, *leaves], strict=True))
  operands = [x.val if isinstance(x, Literal) else values[x] for x in application.invars]
  primitive = application.params["_prim"]
  return primitive, jax.tree.unflatten(primitive.in_tree, operands)


def program(equation: Any) -> Any:
  """What an equation of a traced program computes if it applies a `HiPrim`, otherwise None."""
  if equation.primitive.name != "call_hi_primitive":
    return None
  primitive = equation.params["_prim"]
  expand = lambda *leaves: primitive.expand(*jax.tree.unflatten(primitive.in_tree, leaves))
  return jax.make_jaxpr(expand)(*(x.aval for x in equation.invars))


def _on_leaves(
  name: str, tangent: Callable[..., Any], reverse: Any, nondiff_argnums: tuple[int, ...]
) -> Tangent:
  """The user's tangent rule. The first two arguments of ``reverse`` are JAX's own."""
  out_types = [y_type.to_tangent_aval() for y_type in reverse.out_avals_flat]
  in_tree, out_tree = reverse.in_tree, reverse.out_tree

  def on_leaves(residuals: Any, dots: Values) -> Values:
    _, _, *args_dot = jax.tree.unflatten(in_tree, dots)
    moving = tuple(dot for i, dot in enumerate(args_dot) if i not in nondiff_argnums)
    return checked_tangent(name, tangent(residuals, moving), out_tree, out_types)

  return on_leaves


class _ForwardMode(HiPrim):
  """The primitive ``reverse``, which has no forward mode, with one."""

  skip_linearization_on_zero_tangents = True
  name: str
  reverse: Any
  tangent: Tangent | None

  def __init__(self, name: str, reverse: Any, tangent: Tangent | None):
    self.in_avals, self.out_aval = reverse.in_avals, reverse.out_aval
    self.effects = reverse.effects
    self.params = {"name": name, "reverse": reverse, "tangent": tangent}
    super().__init__()

  def expand(self, *args: Any) -> Any:
    return self.reverse.expand(*args)

  def vjp_fwd(self, nzs_in: Any, /, *args: Any) -> Any:
    return self.reverse.vjp_fwd(nzs_in, *args)

  def vjp_bwd(self, res: Any, outgrad: Any, /, *arg_accums: Any) -> Any:
    if all(isinstance(y_bar, Zero) for y_bar in self.out_tree.flatten_up_to(outgrad)):
      return None  # where JAX runs the rule on zeros
    if any(map(varying_axes, jax.tree.leaves(outgrad))):
      arg_accums = jax.tree.map(_Summed, arg_accums)
    return self.reverse.vjp_bwd(res, outgrad, *arg_accums)

  def jvp(self, primals: Any, tangents: Any) -> Any:
    return jax.experimental.hijax.jvp_from_lin(self, primals, tangents)

  def lin(self, nzs_in: Any, *primals: Any) -> Any:
    out, residuals = self.reverse.vjp_fwd(nzs_in, *primals)
    has_tangent = lambda y: y.to_tangent_aval().dtype != jax.dtypes.float0
    return out, residuals, jax.tree.map(has_tangent, self.out_aval)

  def linearized(self, residuals: Any, *tangents: Any) -> Any:
    dots = self.in_tree.flatten_up_to(tangents)
    moving = [i for i, dot in enumerate(dots) if not isinstance(dot, Zero)]
    derivative = _derivative(self, moving, jax.tree.structure(residuals))
    x_dots = [varying_as(self.in_avals_flat[i], dots[i]) for i in moving]
    y_dots = derivative.along(jax.tree.leaves(residuals), x_dots)
    out_dots = [
      Zero(y_type) if dot is None else dot
      for y_type, dot in zip(derivative.out_types, y_dots, strict=True)
    ]
    return jax.tree.unflatten(self.out_tree, out_dots)

  def batch(self, axis_data: Any, args: Any, dims: Any) -> Any:
    out_dims = None

    def batched(*args: Any) -> Any:
      nonlocal out_dims
      out, out_dims = self.reverse.batch(axis_data, args, dims)
      return out

    reverse, operands = _applied(batched, *args)
    tangent = self.tangent
    if tangent is not None:
      flat_dims = self.in_tree.flatten_up_to(dims), self.out_tree.flatten_up_to(out_dims)
      tangent = _over_batch(tangent, axis_data, *flat_dims, reverse.out_avals_flat)
    return _ForwardMode(self.name, reverse, tangent)(*operands), out_dims

  def remat(self, trace: Any, *args: Any) -> Any:
    if not trace.custom_vjp_rules or (self.reverse.opt_remat and not self.reverse.remat_rules):
      return super().remat(trace, *args)
    out, saved, again = self.reverse.remat(trace, *args)

    def rematerialized(saved: Any, *args: Any) -> Any:
      reverse, operands = _applied(again, saved, *args)
      return _ForwardMode(self.name, reverse, self.tangent)(*operands)

    return out, saved, rematerialized


class _Summed(GradAccum):
  """Adds up what varies over more mesh axes than the argument, before it is accumulated.

  Inside `jax.shard_map` that is a batch of `jax.vmap(..., spmd_axis_name=...)` which shares the
  argument. JAX forms the sum over the part of the batch that a device holds.
  """

  def __init__(self, accumulator: Any):
    self.accumulator, self.aval = accumulator, accumulator.aval

  def accum(self, x: Any) -> None:
    if not isinstance(x, Zero | None):
      axes = varying_axes(x) - self.aval.manual_axis_type.varying
      x = jax.lax.psum(x, tuple(axes)) if axes else x
    self.accumulator.accum(x)

  def freeze(self) -> Any:
    return self.accumulator.freeze()


def _derivative(primitive: _ForwardMode, moving: list[int], residuals_tree: Any) -> Derivative:
  reverse, tangent = primitive.reverse, primitive.tangent
  x_types = [x_type.to_ct_aval() for x_type in reverse.in_avals_flat]

  def backward(residuals: Any, out_bar: Any) -> Values:
    accumulators = [jax.experimental.hijax.ValAccum(x_type) for x_type in x_types]
    primitive.vjp_bwd(residuals, out_bar, *jax.tree.unflatten(reverse.in_tree, accumulators))
    x_bars = [accumulators[i].freeze() for i in moving]
    return [None if isinstance(x_bar, Zero) else x_bar for x_bar in x_bars]

  def along(residuals: Any, x_dots: Values) -> Values:
    assert tangent is not None
    return tangent(residuals, replaced([None] * len(x_types), moving, x_dots))

  return Derivative(
    name=primitive.name,
    backward=backward,
    tangent=None if tangent is None else along,
    x_types=[x_types[i] for i in moving],
    out_tree=reverse.out_tree,
    out_types=[y_type.to_tangent_aval() for y_type in reverse.out_avals_flat],
    residuals_tree=residuals_tree,
  )


def _over_batch(
  tangent: Tangent, axis_data: Any, dims: Values, out_dims: Values, out_types: Values
) -> Tangent:
  """The tangent rule of a batch. Of a tangent that the batch shares it takes the first."""
  moved = differentiable([y_type.to_tangent_aval() for y_type in out_types])
  out_dims = [out_dims[i] for i in moved]

  def over_batch(residuals: Any, dots: Values) -> Values:
    of_one, of_one_dims = residuals
    moving = [i for i, dot in enumerate(dots) if dot is not None]
    rule = lambda of_one, x_dots: tangent(of_one, replaced([None] * len(dots), moving, x_dots))
    in_axes = of_one_dims.val, [dims[i] for i in moving]
    out_axes = [0 if dim is None else dim for dim in out_dims]
    batched = jax.experimental.hijax.vmap_rule(axis_data, rule, in_axes, out_axes)
    y_dots: Any = batched(of_one, [dots[i] for i in moving])
    return [dot[0] if dim is None else dot for dim, dot in zip(out_dims, y_dots, strict=True)]

  return over_batch
