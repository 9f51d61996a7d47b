"""Masks, broadcasting, cotangents that are 0, sums that are known or that only some rows need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from softmax_jax._devices import varying_axes
from softmax_jax._forward_mode import IfAny, by_platform
from softmax_jax._rows import Rows

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Args = TypeVarTuple("Args")


def compiled(rule: Callable[P, R], static_argnums: int | tuple[int, ...]) -> Callable[P, R]:
  """``rule`` as one program, not many small ones, where no `jax.jit` surrounds the call."""
  return jax.jit(rule, static_argnums=static_argnums, inline=True)


def is_zero(bar: Any) -> bool:
  """Whether a cotangent is 0 by its type, as a rule with symbolic zeros gets it."""
  return type(bar) is SymbolicZero


def instantiated(bars: T) -> T:
  """Cotangents with arrays of 0 in place of those that are 0 by their type."""
  zeros = lambda bar: jnp.zeros(bar.shape, bar.dtype) if is_zero(bar) else bar
  return jax.tree.map(zeros, bars, is_leaf=is_zero)


def masked(x: jax.Array, mask: jax.Array | None, fill: float) -> jax.Array:
  """``x`` with ``fill`` where the mask is False."""
  return x if mask is None else jnp.where(mask, x, jnp.full((), fill, x.dtype))


def broadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """``x`` with shape ``shape``; itself, not a copy, where it has that already."""
  return x if x.shape == shape else jnp.broadcast_to(x, shape)


def with_rank(x: jax.Array, ndim: int) -> jax.Array:
  """``x`` with axes of size 1 in front."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The sum of ``x`` over the axes along which an array of ``shape`` was repeated."""
  axes = tuple(i for i, size in enumerate(shape) if size != x.shape[i])
  return jnp.sum(x, axis=axes, keepdims=True) if axes else x


def batched_like(value: jax.Array, x: jax.Array) -> jax.Array:
  """``value``, broadcast with ``x`` and made to depend on it: batched and spread over devices so.

  JAX 0.10 to 0.12 mix up shapes where a compiled custom_jvp function is batched, differentiated and
  has an output that is not batched with the others.
  """
  return jnp.where(x == x, value, value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def known_sum(terms: jax.Array, total: jax.Array, rows: Rows) -> jax.Array:
  """``total``, which is ``rows.sum(terms)``, with the derivative of that."""
  return total


@known_sum.defjvp
def _known_sum_jvp(rows: Rows, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  total, total_dot = known_sum(*primals, rows), rows.sum(tangents[0])
  if rows.axis_name is not None:  # JAX 0.12 does not spread a tangent like its sum.
    total_dot = batched_like(total_dot, total)
  return total, total_dot


def where_needed(needed: jax.Array, careful: Callable[[*Args], R], quick: R, *args: *Args) -> R:
  """``careful(*args)``; the known arrays ``quick`` if no row is ``needed`` and that is cheaper.

  A second pass over an array costs as much as the first where arithmetic is the limit, as on a CPU:
  there it is skipped if no row needs it. Elsewhere it is fused with the first, and a branch would
  only separate them. Inside `jax.shard_map` there is no branch either: JAX cannot vmap one there.
  Both are computed then, from arguments apart: what they share XLA:CPU would materialize.

  The derivative is always that of ``careful``: that of ``quick`` may be NaN where its value is
  replaced.
  """
  if any(varying_axes(x) for x in jax.tree.leaves((quick, args))):
    own: tuple[*Args] = jax.tree.map(_apart, args)
    return careful(*own)

  def everywhere(needed: jax.Array, quick: R, *args: *Args) -> R:
    return careful(*args)

  return by_platform(everywhere, {"cpu": IfAny(careful)}, needed, quick, *args)


def _apart(x: jax.Array) -> jax.Array:
  """The same, in which XLA:CPU sees another array: what is computed from both is not shared."""
  return by_platform(lambda x: x, {"cpu": lax.optimization_barrier}, x)
