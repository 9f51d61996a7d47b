"""Functions of JAX with types, where its own have none.

Without them a checker knows nothing of what is computed from their results.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, TypeVarTuple

import jax
from jax import lax

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
Args = TypeVarTuple("Args")


class CustomVJP(Protocol[P, R_co]):
  """A function with a backward rule, such as `jax.custom_vjp` returns."""

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
    """What the function computes."""
    ...

  def defvjp(
    self, fwd: Callable[..., Any], bwd: Callable[..., Any], *, symbolic_zeros: bool = False
  ) -> Any:
    """Gives the function its rule."""


def custom_vjp(f: Callable[P, R], nondiff_argnums: Sequence[int]) -> CustomVJP[P, R]:
  """`jax.custom_vjp`."""
  return jax.custom_vjp(f, nondiff_argnums=nondiff_argnums)


class CustomJVP(Protocol[P, R_co]):
  """A function with a forward rule, such as `jax.custom_jvp` returns."""

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
    """What the function computes."""
    ...

  def defjvp(self, jvp: Callable[..., Any]) -> Any:
    """Gives the function its rule."""


def custom_jvp(f: Callable[P, R], nondiff_argnums: Sequence[int]) -> CustomJVP[P, R]:
  """`jax.custom_jvp`."""
  return jax.custom_jvp(f, nondiff_argnums=nondiff_argnums)


def psum(x: T, axis_name: str | tuple[str, ...]) -> T:
  """`jax.lax.psum`."""
  return lax.psum(x, axis_name)


def pmax(x: T, axis_name: str | tuple[str, ...]) -> T:
  """`jax.lax.pmax`."""
  return lax.pmax(x, axis_name)


def cond(
  pred: jax.Array, true_fun: Callable[[*Args], R], false_fun: Callable[[*Args], R], *args: *Args
) -> R:
  """`jax.lax.cond`."""
  return lax.cond(pred, true_fun, false_fun, *args)


def platform_dependent(*args: *Args, cpu: Callable[[*Args], R], default: Callable[[*Args], R]) -> R:
  """`jax.lax.platform_dependent`, for programs that differ on a CPU."""
  return lax.platform_dependent(*args, cpu=cpu, default=default)


def fori_loop(lower: int, upper: int, body: Callable[[Any, T], T], init: T) -> T:
  """`jax.lax.fori_loop`."""
  return lax.fori_loop(lower, upper, body, init)


def checkpoint(f: Callable[P, R], *, prevent_cse: bool) -> Callable[P, R]:
  """`jax.checkpoint`."""
  return jax.checkpoint(f, prevent_cse=prevent_cse)


def linear_transpose(f: Callable[[T], R], x: T) -> Callable[[R], tuple[T]]:
  """`jax.linear_transpose` of a function of one argument."""
  return jax.linear_transpose(f, x)


def vjp(f: Callable[[T], R], x: T) -> tuple[R, Callable[[R], tuple[T]]]:
  """`jax.vjp` of a function of one argument."""
  return jax.vjp(f, x)


def tree_map(f: Callable[[Any], Any], tree: T, is_leaf: Callable[[Any], bool] | None = None) -> T:
  """`jax.tree.map` over one tree."""
  return jax.tree.map(f, tree, is_leaf=is_leaf)


def unflatten_like(tree: T, leaves: Iterable[Any]) -> T:
  """``leaves`` in the structure of ``tree``."""
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)
