"""The public transform: forward mode from the backward rule, or from a rule of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import jax
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import set_current_trace, take_current_trace
from jax.interpreters import ad
from jax.interpreters.partial_eval import JaxprTracer

from softmax_jax._devices import varying_as
from softmax_jax._forward_mode.linear import Values, linear_map_p, replaced

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# What a function raises that needs the value of a traced array.
_CONCRETE = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)


class CustomVJP(Protocol[P, R_co]):
  """A function with a backward rule, such as `jax.custom_vjp` returns."""

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
    """What the function computes."""
    ...

  def defvjp(
    self, fwd: Callable[..., Any], bwd: Callable[..., Any], *, symbolic_zeros: bool = False
  ) -> Any:
    """Gives the function its rule."""


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
  # Around the plain function: without differentiation g needs no rule, and an eager jax.shard_map
  # refuses custom_vjp functions with symbolic zeros.
  g = jax.custom_jvp(f.fun, nondiff_argnums=f.nondiff_argnums)
  g.defjvp(_Rules(name, f, tangent).jvp, symbolic_zeros=True)

  # A function, because `g` itself cannot be pickled by its name.
  @functools.wraps(f, updated=())
  def forward_mode(*args: P.args, **kwargs: P.kwargs) -> R:
    # jax.custom_jvp stops the gradient of a tracer among the nondiff_argnums, where f refuses it.
    if f.nondiff_argnums and _any_traced(_static(f, name, args, kwargs)):
      return f(*args, **kwargs)
    return g(*args, **kwargs)

  enabled: Any = forward_mode
  enabled.defvjp = f.defvjp
  return enabled


def _describe(value: Any) -> str:
  named = getattr(value, "__name__", None)
  return f"{named} of type {type(value).__name__}" if named else f"{type(value).__name__}"


def _static(f: Any, name: str, args: Values, kwargs: dict[str, Any]) -> list[Any]:
  """The arguments at the ``nondiff_argnums`` of ``f``."""
  try:
    bound = inspect.signature(f).bind(*args, **kwargs)
  except TypeError as error:
    raise TypeError(f"{name}() is called with other arguments than it has: {error}.") from None
  bound.apply_defaults()
  return [bound.args[i] for i in f.nondiff_argnums]


def _any_traced(values: list[Any]) -> bool:
  return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Rules:
  """A `jax.custom_vjp` function, and its tangent rule if it has one."""

  name: str
  f: Any
  tangent: Callable[..., Any] | None

  def jvp(self, *args: Any) -> tuple[Any, Any]:
    """The rule for `jax.custom_jvp`: ``(*static, primals, tangents) -> (out, out_dot)``."""
    *static, primals, tangents = args
    leaves, args_tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    moving = [i for i, dot in enumerate(dots) if type(dot) is not SymbolicZero]
    arguments = _Arguments(leaves, args_tree, moving, static, self.f.nondiff_argnums)
    if not moving:
      out = arguments.call(self.f)
      return out, jax.tree.map(lambda y: SymbolicZero(jax.typeof(y).to_tangent_aval()), out)

    xs = [leaves[i] for i in moving]
    x_dots = [varying_as(jax.typeof(leaves[i]), dots[i]) for i in moving]
    watch = _Watch()
    rule_residuals: Any = ()
    with _linearization_suspended(x_dots):
      if self.tangent is None:
        out, pullback = jax.vjp(lambda *moved: arguments.call(self.f, *watch(*moved)), *xs)
      else:
        with_residuals = _with_residuals(self.f, moving)
        out, pullback, rule_residuals = jax.vjp(
          lambda *moved: arguments.call(with_residuals, *watch(*moved)), *xs, has_aux=True
        )

    outs, out_tree = jax.tree.flatten(out)
    out_types = [jax.typeof(y).to_tangent_aval() for y in outs]
    residuals, residuals_tree = jax.tree.flatten((pullback, rule_residuals))
    derivative = _Derivative(
      name=self.name,
      tangent=None if self.tangent is None else functools.partial(self.tangent, *static),
      args_tree=args_tree,
      moving=moving,
      x_types=[jax.typeof(x).to_ct_aval() for x in xs],
      out_tree=out_tree,
      out_types=out_types,
      differentiable=[i for i, y in enumerate(out_types) if y.dtype != jax.dtypes.float0],
      residuals_tree=residuals_tree,
      watch=watch,
    )
    return out, derivative.along(residuals, x_dots)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Arguments:
  """The arguments of one call. Those of their leaves that are ``moving`` are differentiated."""

  leaves: Values
  tree: Any
  moving: Sequence[int]
  static: Values
  nondiff_argnums: Sequence[int]

  def call(self, function: Callable[..., Any], *moved: Any) -> Any:
    """``function`` of these arguments, with ``moved`` in place of the moving leaves."""
    leaves = replaced(self.leaves, self.moving, moved)
    arguments = list(jax.tree.unflatten(self.tree, leaves))
    for i, value in zip(self.nondiff_argnums, self.static, strict=True):
      arguments.insert(i, value)
    return function(*arguments)


@contextlib.contextmanager
def _linearization_suspended(x_dots: Values) -> Generator[None, None, None]:
  """Computes with primal values as if JAX were not linearizing, if it is.

  While JAX linearizes, it partially evaluates every operation. Control flow that is partially
  evaluated is compiled again in every call, even where all its operands are known.
  """
  with take_current_trace() as trace:
    linearizing = any(isinstance(x, JaxprTracer) and x._trace is trace for x in x_dots)  # pyright: ignore[reportPrivateUsage]
    with set_current_trace(trace.parent_trace if linearizing else trace):
      yield


class _Watch(threading.local):
  """The identity on several arrays, which notes the cotangents that arrive in the backward pass.

  `jax.vjp` returns zeros where a backward rule has no cotangent. JAX has to know the difference,
  because the backward pass of a plain `jax.custom_vjp` function stops there.
  """

  arrived: Sequence[int] = ()

  def __call__(self, *xs: Any) -> tuple[Any, ...]:
    identity = jax.custom_vjp(lambda *xs: xs)

    def bwd(_: None, x_bars: tuple[Any, ...]) -> tuple[Any, ...]:
      self.arrived = [i for i, x_bar in enumerate(x_bars) if type(x_bar) is not SymbolicZero]
      return x_bars

    identity.defvjp(lambda *xs: (tuple(x.value for x in xs), None), bwd, symbolic_zeros=True)
    return identity(*xs)


def _with_residuals(f: Any, moving: Sequence[int]) -> Callable[..., Any]:
  """The function ``args -> (out, residuals)`` with the rule of ``f`` for its first output.

  The leaves ``moving`` of its arguments are differentiated.
  """

  def fwd(*args: Any) -> tuple[Any, Any]:
    out, residuals = f.fwd(*args)
    return (out, residuals), residuals

  def bwd(*args: Any) -> tuple[Any, ...]:
    *static, residuals, (out_bar, _) = args
    return f.bwd(*static, residuals, out_bar)

  def values(*args: Any) -> Any:
    """What ``fwd`` returns first. JAX's new implementation traces it even to differentiate."""
    if f.symbolic_zeros:
      arrays = [arg for i, arg in enumerate(args) if i not in f.nondiff_argnums]
      leaves, tree = jax.tree.flatten(arrays)
      marked = [CustomVJPPrimal(leaf, i in moving) for i, leaf in enumerate(leaves)]
      static = [args[i] for i in f.nondiff_argnums]
      args = _Arguments(marked, tree, (), static, f.nondiff_argnums).call(lambda *args: args)
    return f.fwd(*args)

  with_residuals = jax.custom_vjp(values, nondiff_argnums=f.nondiff_argnums)
  with_residuals.defvjp(fwd, bwd, symbolic_zeros=f.symbolic_zeros)
  return with_residuals


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Derivative:
  """The derivative of one call, as two linear maps. It holds no array, only structures and types.

  Attributes:
    name: the name of the function.
    tangent: the user's tangent rule, with its ``nondiff_argnums`` filled in.
    args_tree: the structure of the arguments.
    moving: which of their leaves are differentiated.
    x_types: the types of the cotangents of those.
    out_tree: the structure of the output.
    out_types: the types of the tangents of its leaves.
    differentiable: which of its leaves have tangents; those of integers do not.
    residuals_tree: the structure of the pullback and of the residuals that ``tangent`` takes.
    watch: tells which cotangents the pullback returned.
  """

  name: str
  tangent: Callable[..., Any] | None
  args_tree: Any
  moving: Sequence[int]
  x_types: Values
  out_tree: Any
  out_types: Values
  differentiable: Sequence[int]
  residuals_tree: Any
  watch: _Watch

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name})"  # printed programs show it

  def along(self, residuals: Values, x_dots: Values) -> Any:
    """The tangent of the output, as a call of the primitive `linear_map`."""
    y_dots: list[Any] = [SymbolicZero(y_type) for y_type in self.out_types]
    if self.differentiable:
      moved = linear_map_p.bind(
        *residuals,
        *x_dots,
        name=self.name,
        num_residuals=len(residuals),
        apply=self.push_by_transposition if self.tangent is None else self.push_by_rule,
        transpose=self.pull,
        out_types=tuple(self.y_types),
      )
      y_dots = replaced(y_dots, self.differentiable, moved)
    return jax.tree.unflatten(self.out_tree, y_dots)

  @property
  def y_types(self) -> Values:
    return [self.out_types[i] for i in self.differentiable]

  def pull(self, residuals: Values, y_bars: Values) -> Values:
    """``y_bar -> J^T y_bar``: the backward rule."""
    bars = [ad.Zero(y_type.to_ct_aval()) for y_type in self.out_types]
    for i, y_bar in zip(self.differentiable, y_bars, strict=True):
      bars[i] = bars[i] if y_bar is None else y_bar
    pullback, _ = jax.tree.unflatten(self.residuals_tree, residuals)
    self.watch.arrived = []
    x_bars = pullback(jax.tree.unflatten(self.out_tree, bars))
    return [x_bar if i in self.watch.arrived else None for i, x_bar in enumerate(x_bars)]

  def push_by_transposition(self, residuals: Values, x_dots: Values) -> Values:
    """``x_dot -> J x_dot``: the transpose of `pull`."""

    def rule(*y_bars: Any) -> tuple[Any, ...]:
      return tuple(
        ad.zeros_like_aval(x) if x_bar is None else jax.lax.convert_element_type(x_bar, x.dtype)
        for x_bar, x in zip(self.pull(residuals, y_bars), self.x_types, strict=True)
      )

    try:
      transposed = jax.linear_transpose(rule, *self.y_types)
    except _CONCRETE as error:
      raise _untransposable(self.name, error) from error
    try:
      return tuple(transposed(tuple(x_dots)))
    except jax.errors.UnexpectedTracerError:
      raise
    except Exception as error:
      raise _untransposable(self.name, error) from error

  def push_by_rule(self, residuals: Values, x_dots: Values) -> Values:
    """``x_dot -> J x_dot``: the tangent rule."""
    assert self.tangent is not None
    _, rule_residuals = jax.tree.unflatten(self.residuals_tree, residuals)
    args_dot = replaced([None] * self.args_tree.num_leaves, self.moving, x_dots)
    out_dot = self.tangent(rule_residuals, jax.tree.unflatten(self.args_tree, args_dot))
    return _checked_tangent(self.name, out_dot, self.out_tree, self.out_types, self.differentiable)


def _untransposable(name: str, error: Exception) -> TypeError:
  return TypeError(
    f"enable_forward_mode cannot differentiate {name} in forward mode, because JAX cannot "
    f"transpose its backward rule ({type(error).__name__}: {error}). Make the rule linear in "
    "the cotangent with operations that JAX can transpose, or pass a rule of your own: "
    f"enable_forward_mode({name}, tangent=...). Reverse mode is not affected."
  )


def _checked_tangent(
  name: str, out_dot: Any, out_tree: Any, out_types: Values, differentiable: Sequence[int]
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
  for i in differentiable:
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
    checked.append(varying_as(expected, dot))
  return tuple(checked)
