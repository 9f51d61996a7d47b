"""Forward-mode differentiation for `jax.custom_vjp` functions.

JAX refuses `jvp`, `linearize` and `jacfwd` on a `jax.custom_vjp` function, although its backward
rule y_bar -> J^T y_bar is linear and therefore already contains the forward one: the transpose of
J^T is J. What JAX lacks is a linear call that can be batched and whose transpose is *given*, so
that reverse mode still runs exactly the hand-derived rule. That call is the primitive `linear_map`
below.

This is the one module of the library that goes beyond JAX's documented public API. It uses the
extension points `jax.extend.core` (`Primitive`, `unmapped_aval`, `jaxpr_as_fun`, the current trace
and its `parent_trace`), `jax.interpreters` (`ad`, `batching`, `mlir`, `partial_eval.JaxprTracer`),
the types that `jax.typeof` returns, and the attributes `fun`, `fwd`, `bwd`, `symbolic_zeros` and
`nondiff_argnums` of a `jax.custom_vjp` object.
"""

# JAX gives these no types, or hides them, so that a checker cannot follow what comes of them.
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false, reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import jax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import (
  Primitive,
  jaxpr_as_fun,
  set_current_trace,
  take_current_trace,
  unmapped_aval,
)
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import JaxprTracer

from softmax_jax._typed import CustomVJP

# What a function raises that needs the value of a traced array.
_CONCRETE = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)

P = ParamSpec("P")
R = TypeVar("R")
Args = TypeVarTuple("Args")

Values = Sequence[Any]  # arrays or what JAX traces in their place, and their types
Linear = Callable[[Values, Values], Values]

# linear_map_p.bind(*residuals, *xs, name, num_residuals, apply, transpose, out_types) -> ys
#   name                                    of the user's function, for errors and printed programs
#   apply(residuals, xs) -> ys              linear in xs
#   transpose(residuals, y_bars) -> x_bars  its transpose, None standing for a zero on both sides
#   out_types                               the types of ys, so that `apply` is traced only where it
#                                           runs: in reverse mode only `transpose` ever does
# `transpose` runs in place, while JAX transposes, exactly as the backward rule of a plain
# custom_vjp function does. `apply` runs later, when the program is compiled, and must not close
# over a tracer: whatever is traced travels in `residuals`.
linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True


def _linear_map_impl(*args: Any, name: str, num_residuals: int, apply: Linear, **_: Any) -> Values:
  try:
    return apply(args[:num_residuals], args[num_residuals:])
  except jax.errors.UnexpectedTracerError as error:
    raise _closes_over_tracer(name) from error


def _linear_map_lowered(*args: Any, name: str, **params: Any) -> Values:
  program = jax.make_jaxpr(functools.partial(_linear_map_impl, name=name, **params))(*args)
  if any(isinstance(const, Tracer) for const in program.consts):
    raise _closes_over_tracer(name)
  return jaxpr_as_fun(program)(*args)


def _closes_over_tracer(name: str) -> TypeError:
  return TypeError(
    f"enable_forward_mode cannot differentiate {name} in forward mode, because its rules close "
    f"over a value that JAX is tracing. Make that value an argument of {name}. Reverse mode is not "
    "affected."
  )


def _linear_map_jvp(
  primals: Values,
  tangents: Values,
  *,
  num_residuals: int,
  apply: Linear,
  out_types: Values,
  **params: Any,
) -> tuple[Values, Values]:
  bind = functools.partial(
    linear_map_p.bind, num_residuals=num_residuals, apply=apply, out_types=out_types, **params
  )
  residuals, xs = primals[:num_residuals], primals[num_residuals:]
  residual_dots, x_dots = tangents[:num_residuals], tangents[num_residuals:]
  ys = bind(*primals)
  y_dots = [ad.Zero(y_type) for y_type in out_types]
  if any(type(x_dot) is not ad.Zero for x_dot in x_dots):
    # The map is linear in xs and is its own derivative there.
    y_dots = bind(*residuals, *map(ad.instantiate_zeros, x_dots))
  moving = [i for i, dot in enumerate(residual_dots) if type(dot) is not ad.Zero]
  if moving:
    # The map itself moves with its residuals: this is where second derivatives come from.

    def at(*moved: Any) -> tuple[Any, ...]:
      merged = list(residuals)
      for i, residual in zip(moving, moved, strict=True):
        merged[i] = residual
      return tuple(apply(tuple(merged), xs))

    _, more = jax.jvp(
      at, tuple(residuals[i] for i in moving), tuple(residual_dots[i] for i in moving)
    )
    y_dots = [m if type(y) is ad.Zero else y + m for y, m in zip(y_dots, more, strict=True)]
  return ys, y_dots


def _linear_map_transpose(
  y_bars: Values, *args: Any, num_residuals: int, transpose: Linear, **_: Any
) -> Values:
  residuals = args[:num_residuals]
  x_bars = transpose(residuals, [None if type(y) is ad.Zero else y for y in y_bars])
  return [None] * num_residuals + list(x_bars)


def _linear_map_batch(
  axis_data: Any,
  args: Values,
  dims: Sequence[int | None],
  *,
  num_residuals: int,
  apply: Linear,
  transpose: Linear,
  out_types: Values,
  **params: Any,
) -> tuple[Values, Sequence[int | None]]:
  bind = functools.partial(linear_map_p.bind, num_residuals=num_residuals, **params)
  if all(dim is None for dim in dims) and type(axis_data.name) is object:
    # JAX also calls this rule with nothing batched. The axis does not matter then if it has no name
    # (in place of which JAX puts a bare object); otherwise a collective in the rule may need it.
    ys = bind(*args, apply=apply, transpose=transpose, out_types=out_types)
    return ys, [None] * len(ys)
  size, axes = axis_data.size, _axes_of_batch(axis_data, args)

  def over_batch(linear: Linear) -> Linear:
    return jax.vmap(
      linear,
      in_axes=(tuple(dims[:num_residuals]), 0),
      axis_size=size,
      axis_name=axis_data.name,
      spmd_axis_name=axis_data.spmd_name,
    )

  xs = [
    batching.bdim_at_front(x, dim, size, axis_data.explicit_mesh_axis)
    for x, dim in zip(args[num_residuals:], dims[num_residuals:], strict=True)
  ]
  ys = bind(
    *args[:num_residuals],
    *xs,
    apply=over_batch(apply),
    transpose=over_batch(transpose),
    out_types=tuple(
      _varying_type(unmapped_aval(size, 0, y_type, axis_data.explicit_mesh_axis), axes)
      for y_type in out_types
    ),
  )
  return ys, [0] * len(ys)


def _axes_of_batch(axis_data: Any, args: Values) -> frozenset[str]:
  """The mesh axes that a batch is spread over inside `jax.shard_map`.

  With `jax.vmap(..., spmd_axis_name=...)` around that, what is batched varies over them.
  """
  names = frozenset(axis_data.spmd_name or ())
  return names & frozenset[str]().union(*map(varying_axes, args))


def _varying_type(x_type: Any, axes: frozenset[str]) -> Any:
  """The type of an array that varies over ``axes`` too."""
  manual = x_type.manual_axis_type
  return x_type.update(manual_axis_type=manual.update(varying=manual.varying | axes))


linear_map_p.def_impl(_linear_map_impl)
linear_map_p.def_abstract_eval(lambda *_, out_types, **__: list(out_types))
ad.primitive_jvps[linear_map_p] = _linear_map_jvp
ad.primitive_transposes[linear_map_p] = _linear_map_transpose
batching.fancy_primitive_batchers[linear_map_p] = _linear_map_batch
mlir.register_lowering(linear_map_p, mlir.lower_fun(_linear_map_lowered, multiple_results=True))


def linear_map(
  name: str, apply: Linear, transpose: Linear, residuals: Values, x: Any, like: Any
) -> Any:
  """``apply(residuals, [x])[0]``, of the type of ``like``: linear for JAX though it may compare x.

  Its transpose is ``transpose(residuals, [y_bar])[0]``, of which the same holds.
  """
  x_type, y_type = (jax.typeof(array).to_tangent_aval() for array in (x, like))

  def transposed(residuals: Values, y_bars: Values) -> Values:
    return bind(
      residuals, y_bars, transpose, lambda r, xs: bind(r, xs, apply, transposed, y_type), x_type
    )

  def bind(
    residuals: Values, xs: Values, apply: Linear, transpose: Linear, out_type: Any
  ) -> Values:
    return linear_map_p.bind(
      *residuals,
      *xs,
      name=name,
      num_residuals=len(residuals),
      apply=apply,
      transpose=transpose,
      out_types=(out_type,),
    )

  return bind(residuals, [x], apply, transposed, y_type)[0]


# rule_p.bind(*xs, f, out_types) -> ys, where f(*xs) -> ys
#
# A rule that loops, inside `jax.shard_map`. With `jax.vmap(..., spmd_axis_name=...)` around that,
# JAX hides from the function that it batches that what is batched varies over more axes, and its
# rules for `jax.lax.scan` and `jax.checkpoint` mix it with what does not. So `jax.vmap` and
# differentiation start again from `f`, in which all arguments vary over those axes and nothing is
# hidden.
rule_p = Primitive("rule")
rule_p.multiple_results = True


def _bind_rule(f: Callable[..., Values], *xs: Any) -> Values:
  out_types = tuple(jax.make_jaxpr(f)(*xs).out_avals)
  return rule_p.bind(*xs, f=f, out_types=out_types)


def _rule_jvp(
  primals: Values, tangents: Values, *, f: Callable[..., Values], out_types: Values
) -> tuple[Values, Values]:
  ys = rule_p.bind(*primals, f=f, out_types=out_types)
  moving = [i for i, dot in enumerate(tangents) if type(dot) is not ad.Zero]
  y_types = [y_type.to_tangent_aval() for y_type in out_types]
  linear = [i for i, y_type in enumerate(y_types) if y_type.dtype != jax.dtypes.float0]
  num_residuals = len(primals)

  def at(residuals: Values, moved: Values) -> tuple[Any, ...]:
    merged = list(residuals)
    for i, x in zip(moving, moved, strict=True):
      merged[i] = x
    ys = f(*merged)
    return tuple(ys[i] for i in linear)

  def push(*args: Any) -> tuple[Any, ...]:
    residuals, dots = args[:num_residuals], args[num_residuals:]
    moved = tuple(residuals[i] for i in moving)
    return jax.jvp(lambda *moved: at(residuals, moved), moved, dots)[1]

  def pull(*args: Any) -> tuple[Any, ...]:
    residuals, bars = args[:num_residuals], args[num_residuals:]
    moved = tuple(residuals[i] for i in moving)
    return jax.vjp(lambda *moved: at(residuals, moved), *moved)[1](bars)

  def apply(residuals: Values, dots: Values) -> Values:
    return tuple(_bind_rule(push, *residuals, *dots))

  def transpose(residuals: Values, y_bars: Values) -> Values:
    bars = [
      ad.zeros_like_aval(y_types[i].to_ct_aval()) if bar is None else bar
      for i, bar in zip(linear, y_bars, strict=True)
    ]
    return tuple(_bind_rule(pull, *residuals, *bars))

  y_dots: list[Any] = [ad.Zero(y_type) for y_type in y_types]
  if moving:
    moved = linear_map_p.bind(
      *primals,
      *(_varying_as(jax.typeof(primals[i]), tangents[i]) for i in moving),
      name="rule",
      num_residuals=num_residuals,
      apply=apply,
      transpose=transpose,
      out_types=tuple(y_types[i] for i in linear),
    )
    for i, y_dot in zip(linear, moved, strict=True):
      y_dots[i] = y_dot
  return ys, y_dots


def _rule_batch(
  axis_data: Any,
  args: Values,
  dims: Sequence[int | None],
  *,
  f: Callable[..., Values],
  out_types: Values,
) -> tuple[Values, Sequence[int | None]]:
  if all(dim is None for dim in dims):
    return rule_p.bind(*args, f=f, out_types=out_types), [None] * len(out_types)
  axes = _axes_of_batch(axis_data, args)
  over_batch = jax.vmap(
    f,
    in_axes=tuple(dims),
    axis_size=axis_data.size,
    spmd_axis_name=None if axes else axis_data.spmd_name,
  )
  ys = _bind_rule(over_batch, *(_varying_over(axes, x) for x in args))
  return ys, [0] * len(ys)


rule_p.def_impl(lambda *xs, f, **_: f(*xs))
rule_p.def_abstract_eval(lambda *_, out_types, **__: list(out_types))
ad.primitive_jvps[rule_p] = _rule_jvp
batching.fancy_primitive_batchers[rule_p] = _rule_batch
mlir.register_lowering(rule_p, mlir.lower_fun(lambda *xs, f, **_: f(*xs), multiple_results=True))


def rule_with_loops(f: Callable[P, R], static_argnums: int | tuple[int, ...]) -> Callable[P, R]:
  """``f`` as a compiled function, which can be vmapped and differentiated inside `jax.shard_map`.

  There it is a call of `rule_p`; it must not close over a tracer.
  """
  numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
  as_jitted = jax.jit(f, static_argnums=static_argnums, inline=True)

  # One function for arguments of the same structure, which is traced and compiled once.
  @functools.cache
  def on_leaves(tree: Any, static: tuple[Any, ...]) -> tuple[Callable[..., Values], list[Any]]:
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
    moving = [arg for i, arg in enumerate(args) if i not in numbers]
    leaves, tree = jax.tree.flatten(moving)
    if not any(map(varying_axes, leaves)):
      return as_jitted(*args, **kwargs)
    of_leaves, out_trees = on_leaves(tree, tuple(args[i] for i in numbers))
    ys = _bind_rule(of_leaves, *leaves)
    return jax.tree.unflatten(out_trees[0], ys)

  return rule


def enable_forward_mode(
  f: Callable[P, R], tangent: Callable[..., Any] | None = None
) -> CustomVJP[P, R]:
  r"""Gives a `jax.custom_vjp` function forward-mode differentiation.

  The returned function computes what ``f`` computes and, beside ``grad``, ``vjp`` and ``jacrev``,
  supports ``jax.jvp``, ``jax.linearize``, ``jax.jacfwd``, ``jax.hessian`` and their nestings,
  inside and outside ``jit``, ``vmap``, ``checkpoint``, ``scan``, ``while_loop`` and ``shard_map``.
  Reverse mode runs the backward rule of ``f`` and nothing else: it compiles to the same cost.

  The backward rule is a linear map :math:`\bar y \mapsto J^T \bar y`, and the forward derivative
  :math:`\dot x \mapsto J \dot x` is its transpose, which JAX derives from the rule. Where that
  transpose costs more memory or loses more digits than a formula of your own (the transpose of a
  rule that recomputes in a ``scan`` stores what it recomputes), or where JAX cannot transpose the
  rule, pass the formula as ``tangent``.

  Args:
    f: a `jax.custom_vjp` function whose rules are given by ``f.defvjp(f_fwd, f_bwd)``. Arguments
      and outputs may be pytrees; integer arguments, ``nondiff_argnums``, keyword arguments,
      defaults, ``symbolic_zeros`` and a backward rule that returns ``None`` for an argument all
      keep their meaning.
    tangent: optional rule ``tangent(residuals, args_dot) -> out_dot``, the mirror image of
      ``f_bwd(residuals, out_bar) -> args_bar``: ``residuals`` is what ``f_fwd`` returned for them,
      ``args_dot`` is the tuple of tangents of the arguments, with ``None`` in place of an array
      that is not being differentiated, and ``out_dot`` has the structure, shapes and dtypes of the
      output of ``f``, with ``None`` for an integer output or a zero tangent. As for ``f_bwd``,
      ``nondiff_argnums`` come first. It must be linear in ``args_dot`` and is never used in reverse
      mode.

  Returns:
    A function with the signature of ``f``. Its ``defvjp`` is that of ``f``, so that
    ``enable_forward_mode`` also works as a decorator above ``jax.custom_vjp``.

  Raises:
    TypeError: if ``f`` is not a `jax.custom_vjp` function or ``tangent`` is not callable; when the
      result is differentiated in forward mode, if JAX cannot transpose the backward rule, if a rule
      closes over a value that JAX is tracing (reverse mode still works in both cases), or if
      ``tangent`` returns something that does not look like the output.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import enable_forward_mode
    >>> @enable_forward_mode
    ... @jax.custom_vjp
    ... def cube(x):
    ...   return x**3
    >>> cube.defvjp(lambda x: (x**3, x), lambda x, y_bar: (3 * x**2 * y_bar,))
    >>> print(jax.grad(cube)(2.0), jax.jacfwd(cube)(2.0), jax.hessian(cube)(2.0))
    12.0 12.0 12.0

  Source: transposition of linear maps as in Frostig, Johnson, Maclaurin, Paszke and Radul,
  "Decomposing reverse-mode automatic differentiation" (2021).
  """
  if not isinstance(f, jax.custom_vjp):
    raise TypeError(
      f"enable_forward_mode expected a jax.custom_vjp function, got {_describe(f)}. Apply it "
      "directly to the object that jax.custom_vjp returns, before jit, vmap or functools.partial; "
      "a function without custom_vjp has forward mode already."
    )
  if tangent is not None and not callable(tangent):
    raise TypeError(
      f"enable_forward_mode expected tangent to be a function, got {_describe(tangent)}."
    )
  name = getattr(f, "__name__", "f")
  nondiff_argnums: tuple[int, ...] = f.nondiff_argnums
  # Not differentiated, it needs no rule; an eager shard_map refuses those with symbolic zeros.
  g = jax.custom_jvp(f.fun, nondiff_argnums=nondiff_argnums)

  def jvp(*args: Any) -> tuple[Any, Any]:
    *static, primals, tangents = args
    leaves, args_tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    moving = [i for i, dot in enumerate(dots) if type(dot) is not SymbolicZero]

    def at(function: Callable[..., Any], *moved: Any) -> Any:
      merged = list(leaves)
      for i, leaf in zip(moving, moved, strict=True):
        merged[i] = leaf
      arguments = list(jax.tree.unflatten(args_tree, merged))
      for i, value in zip(nondiff_argnums, static, strict=True):
        arguments.insert(i, value)
      return function(*arguments)

    if not moving:
      out = at(f)
      return out, jax.tree.map(lambda y: SymbolicZero(jax.typeof(y).to_tangent_aval()), out)

    xs = [leaves[i] for i in moving]
    x_dots = [_varying_as(jax.typeof(leaves[i]), dots[i]) for i in moving]
    x_types = [jax.typeof(x).to_ct_aval() for x in xs]
    watch = _Watch()
    rule_residuals: Any = ()
    with _linearization_suspended(x_dots):
      if tangent is None:
        out, pullback = jax.vjp(lambda *moved: at(f, *watch(*moved)), *xs)
      else:
        with_residuals = _with_residuals(f)
        out, pullback, rule_residuals = jax.vjp(
          lambda *moved: at(with_residuals, *watch(*moved)), *xs, has_aux=True
        )
    outs, out_tree = jax.tree.flatten(out)
    out_types = [jax.typeof(y).to_tangent_aval() for y in outs]
    linear = [i for i, y_type in enumerate(out_types) if y_type.dtype != jax.dtypes.float0]

    residuals, residuals_tree = jax.tree.flatten((pullback, rule_residuals))
    num_leaves = len(leaves)

    # y_bar -> J^T y_bar: the rule of f.
    def pull(residuals: Values, y_bars: Values) -> Values:
      bars = [ad.Zero(y_type.to_ct_aval()) for y_type in out_types]
      for i, y_bar in zip(linear, y_bars, strict=True):
        bars[i] = bars[i] if y_bar is None else y_bar
      pullback, _ = jax.tree.unflatten(residuals_tree, residuals)
      watch.arrived = []
      x_bars = pullback(jax.tree.unflatten(out_tree, bars))
      return [x_bar if i in watch.arrived else None for i, x_bar in enumerate(x_bars)]

    # x_dot -> J x_dot: the transpose of `pull`.
    def push_by_transposition(residuals: Values, x_dots: Values) -> Values:
      def rule(*y_bars: Any) -> tuple[Any, ...]:
        return tuple(
          ad.zeros_like_aval(x) if x_bar is None else jax.lax.convert_element_type(x_bar, x.dtype)
          for x_bar, x in zip(pull(residuals, y_bars), x_types, strict=True)
        )

      def untransposable(error: Exception) -> TypeError:
        return TypeError(
          f"enable_forward_mode cannot differentiate {name} in forward mode, because JAX cannot "
          f"transpose its backward rule ({type(error).__name__}: {error}). Make the rule linear in "
          "the cotangent with operations that JAX can transpose, or pass a rule of your own: "
          f"enable_forward_mode({name}, tangent=...). Reverse mode is not affected."
        )

      try:
        transposed = jax.linear_transpose(rule, *[out_types[i] for i in linear])
      except _CONCRETE as error:
        raise untransposable(error) from error
      try:
        return tuple(transposed(tuple(x_dots)))
      except jax.errors.UnexpectedTracerError:
        raise
      except Exception as error:
        raise untransposable(error) from error

    # x_dot -> J x_dot: the hand-written rule.
    def push_by_rule(residuals: Values, x_dots: Values) -> Values:
      assert tangent is not None
      _, rule_residuals = jax.tree.unflatten(residuals_tree, residuals)
      args_dot: list[Any] = [None] * num_leaves
      for i, x_dot in zip(moving, x_dots, strict=True):
        args_dot[i] = x_dot
      out_dot = tangent(*static, rule_residuals, jax.tree.unflatten(args_tree, args_dot))
      return _checked_tangent(name, out_dot, out_tree, out_types, linear)

    y_dots: list[Any] = [SymbolicZero(y_type) for y_type in out_types]
    if linear:
      moved = linear_map_p.bind(
        *residuals,
        *x_dots,
        name=name,
        num_residuals=len(residuals),
        apply=push_by_transposition if tangent is None else push_by_rule,
        transpose=pull,
        out_types=tuple(out_types[i] for i in linear),
      )
      for i, y_dot in zip(linear, moved, strict=True):
        y_dots[i] = y_dot
    return out, jax.tree.unflatten(out_tree, y_dots)

  g.defjvp(jvp, symbolic_zeros=True)

  # A function and not `g` itself, which cannot be pickled by its name.
  @functools.wraps(f, updated=())
  def forward_mode(*args: P.args, **kwargs: P.kwargs) -> R:
    if not nondiff_argnums:
      return g(*args, **kwargs)
    # jax.custom_jvp stops the gradient of a tracer among the nondiff_argnums, where f refuses it.
    try:
      bound = inspect.signature(f).bind(*args, **kwargs)
    except TypeError as error:
      raise TypeError(f"{name}() is called with other arguments than it has: {error}.") from None
    bound.apply_defaults()
    static = [bound.args[i] for i in nondiff_argnums]
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(static))
    return (f if traced else g)(*args, **kwargs)

  enabled: Any = forward_mode
  enabled.defvjp = f.defvjp
  return enabled


@contextlib.contextmanager
def _linearization_suspended(x_dots: Values) -> Generator[None, None, None]:
  """Computes with primal values as if JAX were not linearizing, if it is.

  While JAX linearizes it partially evaluates, and control flow that is partially evaluated is
  compiled again in every call, also where all its operands are known.
  """
  with take_current_trace() as trace:
    linearizing = any(isinstance(x, JaxprTracer) and x._trace is trace for x in x_dots)
    with set_current_trace(trace.parent_trace if linearizing else trace):
      yield


class _Watch(threading.local):
  """The identity of several arrays, which notes which cotangents arrive in the backward pass.

  `jax.vjp` returns zeros where a backward rule has no cotangent. JAX has to know the difference,
  because the backward pass of a plain custom_vjp function stops there.
  """

  arrived: Sequence[int] = ()

  def __call__(self, *xs: Any) -> tuple[Any, ...]:
    identity = jax.custom_vjp(lambda *xs: xs)

    def bwd(_: None, x_bars: tuple[Any, ...]) -> tuple[Any, ...]:
      self.arrived = [i for i, x_bar in enumerate(x_bars) if type(x_bar) is not SymbolicZero]
      return x_bars

    identity.defvjp(lambda *xs: (tuple(x.value for x in xs), None), bwd, symbolic_zeros=True)
    return identity(*xs)


def _with_residuals(f: Any) -> Callable[..., Any]:
  """The function ``args -> (out, residuals)`` with the rule of ``f`` for its first output."""

  def bwd(*args: Any) -> tuple[Any, ...]:
    *static, residuals, (out_bar, _) = args
    return f.bwd(*static, residuals, out_bar)

  def fwd(*args: Any) -> tuple[Any, Any]:
    out, residuals = f.fwd(*args)
    return (out, residuals), residuals

  with_residuals = jax.custom_vjp(lambda *args: f.fwd(*args), nondiff_argnums=f.nondiff_argnums)
  with_residuals.defvjp(fwd, bwd, symbolic_zeros=f.symbolic_zeros)
  return with_residuals


def _checked_tangent(
  name: str, out_dot: Any, out_tree: Any, out_types: Values, linear: Sequence[int]
) -> tuple[Any, ...]:
  """The tangents of the differentiable outputs, as ``tangent`` returned them."""
  dots: list[Any] = []
  try:
    dots = out_tree.flatten_up_to(out_dot)
    fits = jax.tree_util.all_leaves(dots, is_leaf=lambda dot: dot is None)
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise TypeError(
      f"the tangent rule of {name} must return the structure of its output, {out_tree}, "
      f"got {jax.tree.structure(out_dot)}."
    )
  checked: list[Any] = []
  for i in linear:
    expected, dot = out_types[i], dots[i]
    if dot is None:
      dot = ad.zeros_like_aval(expected)
    try:
      actual = jax.typeof(dot)
    except Exception:  # of JAX: no array
      actual = None
    if actual is None or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
      raise TypeError(
        f"the tangent rule of {name} must return tangents of the shape and dtype of its output, "
        f"{expected.str_short()}, got {actual.str_short() if actual else type(dot).__name__}."
      )
    checked.append(_varying_as(expected, dot))
  return tuple(checked)


def _varying_as(like: Any, x: Any) -> Any:
  """``x``, where `jax.shard_map` tracks such things, varying over the axes that ``like`` does."""
  return _varying_over(like.manual_axis_type.varying, x)


def _varying_over(axes: frozenset[str], x: Any) -> Any:
  """``x``, varying over ``axes`` too."""
  axes = axes - varying_axes(x)
  return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying_axes(x: Any) -> frozenset[str]:
  """The mesh axes over which ``x`` may differ between devices, inside `jax.shard_map`."""
  return jax.typeof(x).manual_axis_type.varying


def varying_alike(*arrays: *Args, without: str | tuple[str, ...] | None = None) -> tuple[*Args]:
  """The arrays, varying over the same axes inside `jax.shard_map`, as a rule for several needs.

  Over the axes ``without`` they vary as they did. None stays None.
  """
  union = frozenset[str]().union(*(varying_axes(x) for x in arrays if x is not None))
  union -= {without} if isinstance(without, str) else set(without or ())

  of_same_types: Any = tuple(None if x is None else _varying_over(union, x) for x in arrays)
  return of_same_types


def _describe(value: Any) -> str:
  named = getattr(value, "__name__", None)
  return f"{named} of type {type(value).__name__}" if named else f"{type(value).__name__}"
