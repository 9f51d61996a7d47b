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
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import set_current_trace, take_current_trace
from jax.interpreters.partial_eval import JaxprTracer

from softmax_jax._devices import varying_as
from softmax_jax._forward_mode import hijax
from softmax_jax._forward_mode.derivative import Derivative, checked_tangent
from softmax_jax._forward_mode.linear import Values, replaced

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


# By which a jax.custom_vjp function gets its rules.
_METHODS = (
  "defvjp",
  "defvjp_with_logs",
  "defvjp_with_accums",
  "defremat",
  "defremat_with_logs",
)


class CustomVJP(Protocol[P, R_co]):
  """A function with a backward rule, such as `jax.custom_vjp` returns."""

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
    """What the function computes."""
    ...

  def defvjp(
    self,
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    *,
    symbolic_zeros: bool = False,
    optimize_remat: bool = False,
    generic_batching: bool = False,
  ) -> Any:
    """Gives the function its rule. JAX has ``generic_batching`` from 0.12 on."""


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
      defaults, ``symbolic_zeros``, ``optimize_remat``, ``generic_batching`` and a backward rule
      that returns ``None`` for an argument all keep their meaning. So do ``f.defremat``,
      ``f.defvjp_with_logs`` and ``f.defvjp_with_accums``, for which ``jax_custom_vjp3`` must be on,
      as for ``optimize_remat`` beside a ``tangent``.
    tangent: optional rule ``tangent(residuals, args_dot) -> out_dot``, the mirror image of
      ``f_bwd(residuals, out_bar) -> args_bar``: ``residuals`` is what ``f_fwd`` returned for them,
      ``args_dot`` is the tuple of tangents of the arguments, with ``None`` in place of an array
      that is not being differentiated, and ``out_dot`` has the structure, shapes and dtypes of the
      output of ``f``, with ``None`` for an integer output or a zero tangent. As for ``f_bwd``,
      ``nondiff_argnums`` come first. It must be linear in ``args_dot`` and is never used in reverse
      mode.

  Returns:
    A function with the signature of ``f``. Its ``defvjp`` is that of ``f``, so that
    ``enable_forward_mode`` also works as a decorator above ``jax.custom_vjp``; likewise the other
    methods that give rules.

  Raises:
    TypeError: if ``f`` is not a `jax.custom_vjp` function, ``tangent`` is not callable, or
      ``jax_custom_vjp3`` is on before JAX 0.12; when the result is differentiated, if its rule
      needs ``jax_custom_vjp3`` and that is off; when it is differentiated in forward mode, if JAX
      cannot transpose the backward rule, if a rule closes over a value that JAX is tracing (reverse
      mode still works in both cases), or if ``tangent`` returns something that does not look like
      the output.

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
  if type(f).__name__ == "custom_vjp3":  # before JAX 0.12
    raise TypeError(
      f"enable_forward_mode does not support jax_custom_vjp3 on JAX {jax.__version__}, but from "
      "JAX 0.12 on. Switch it off, or take a newer JAX."
    )
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
    is_hijax = _is_hijax(f)
    if not (is_hijax or f.nondiff_argnums):
      return g(*args, **kwargs)
    bound = _bound(f, name, args, kwargs)
    # jax.custom_jvp stops the gradient of a tracer among the nondiff_argnums, where f refuses it.
    if _any_traced([bound.args[i] for i in f.nondiff_argnums]):
      return f(*args, **kwargs)
    return hijax.call(name, f, tangent, bound) if is_hijax else g(*args, **kwargs)

  enabled: Any = forward_mode
  for method in _METHODS:
    if hasattr(f, method):
      setattr(enabled, method, getattr(f, method))
  return enabled


def _is_hijax(f: Any) -> bool:
  """Whether JAX calls ``f`` in its new implementation."""
  flag = getattr(jax.config, "jax_custom_vjp3", False)
  return jax.__version_info__ >= (0, 12) and (flag or f.generic_batching)


def _check_supported(name: str, f: Any, tangent: Callable[..., Any] | None) -> None:
  """Refuses what JAX's first implementation would leave out without a word."""
  logs, accums = (getattr(f, option, False) for option in ("with_logs", "with_accums"))
  remat = f.optimize_remat and tangent is not None
  if logs or accums or remat:
    used = "defvjp_with_logs" if logs else "defvjp_with_accums" if accums else "optimize_remat"
    raise TypeError(
      f"enable_forward_mode supports {used} of {name}{' beside a tangent rule' * remat} only with "
      'jax.config.update("jax_custom_vjp3", True), from JAX 0.12 on.'
    )


def _describe(value: Any) -> str:
  named = getattr(value, "__name__", None)
  return f"{named} of type {type(value).__name__}" if named else f"{type(value).__name__}"


def _bound(f: Any, name: str, args: Values, kwargs: dict[str, Any]) -> inspect.BoundArguments:
  """The arguments of a call with their defaults."""
  try:
    bound = inspect.signature(f).bind(*args, **kwargs)
  except TypeError as error:
    raise TypeError(f"{name}() is called with other arguments than it has: {error}.") from None
  bound.apply_defaults()
  return bound


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
    _check_supported(self.name, self.f, self.tangent)
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
      if self.tangent is None or self.f.fwd is None:
        out, pullback = jax.vjp(lambda *moved: arguments.call(self.f, *watch(*moved)), *xs)
      else:
        with_residuals = _with_residuals(self.f)
        out, pullback, rule_residuals = jax.vjp(
          lambda *moved: arguments.call(with_residuals, *watch(*moved)), *xs, has_aux=True
        )

    outs, out_tree = jax.tree.flatten(out)
    out_types = [jax.typeof(y).to_tangent_aval() for y in outs]

    def backward(residuals: Any, out_bar: Any) -> Values:
      pullback, _ = residuals
      watch.arrived = []
      return [x_bar if i in watch.arrived else None for i, x_bar in enumerate(pullback(out_bar))]

    def along(residuals: Any, x_dots: Values) -> Values:
      assert self.tangent is not None
      dots = replaced([None] * args_tree.num_leaves, moving, x_dots)
      out_dot = self.tangent(*static, residuals[1], jax.tree.unflatten(args_tree, dots))
      return checked_tangent(self.name, out_dot, out_tree, out_types)

    residuals, residuals_tree = jax.tree.flatten((pullback, rule_residuals))
    derivative = Derivative(
      name=self.name,
      backward=backward,
      tangent=None if self.tangent is None else along,
      x_types=[jax.typeof(x).to_ct_aval() for x in xs],
      out_tree=out_tree,
      out_types=out_types,
      residuals_tree=residuals_tree,
    )
    out_dots = [
      SymbolicZero(y_type) if dot is None else dot
      for y_type, dot in zip(out_types, derivative.along(residuals, x_dots), strict=True)
    ]
    return out, jax.tree.unflatten(out_tree, out_dots)


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
