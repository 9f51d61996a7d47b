"""A program in the dtypes that JAX traced it in, evaluated in float64.

It differs from the same function called with float64: its constants are those of its own dtypes, so
are the random numbers that it draws, it takes the branches for its own dtypes, and nothing inside
is rounded. A program of a derivative holds what the rules of the function did when it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Primitives that only hold a program, by the name of its parameter.
_INLINED = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat2": "jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "by_platform": "program",  # of this library: what it computes on other platforms is the same
}
# What works on bits, or is compiled by others, runs in its own dtypes.
_BITS = ("bitcast_convert_type", "nextafter", "random_", "threefry", "rng_")
_CALLS = ("pure_callback", "io_callback", "debug_callback", "ffi_call", "pallas_call")


def widened_program(closed: Any) -> Callable[..., list[Any]]:
  """A function that evaluates a traced program with floating numbers in float64.

  It takes and returns flat lists; where it is called JAX must have 64 bits enabled.
  """
  return lambda *args: _evaluated(closed.jaxpr, closed.consts, args)


def equations(jaxpr: Any) -> Iterator[Any]:
  """The operations of a program, also of those inside: a loop, a branch, a function with a rule."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _programs(eqn.params):
      yield from equations(inner)


def coarse_calls(jaxpr: Any) -> set[Any]:
  """The floating dtypes of what keeps its own dtypes and takes floating numbers."""
  return {
    v.aval.dtype
    for eqn in equations(jaxpr)
    if _is_call(eqn) or eqn.primitive.name.startswith("random_")
    for v in eqn.invars
    if _wide_dtype(v.aval.dtype) == np.float64
  }


def _is_call(eqn: Any) -> bool:
  """Whether an operation calls a function that is no program of JAX."""
  functions = [f for f in eqn.params.values() if callable(f) and not isinstance(f, type)]
  return eqn.primitive.name.startswith(_CALLS) or bool(functions and not _programs(eqn.params))


def operations(jaxpr: Any) -> set[str]:
  """The names of the operations of a program."""
  return {eqn.primitive.name for eqn in equations(jaxpr)}


def _programs(params: Any) -> list[Any]:
  leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_program)
  return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if _is_program(leaf)]


def _is_program(value: Any) -> bool:
  return hasattr(value, "eqns")


def _wide_dtype(dtype: Any) -> Any:
  """The dtype in which numbers of this one are held; None for those that stay."""
  if jnp.issubdtype(dtype, jnp.floating):
    return np.float64
  return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else None


def _wide(x: Any) -> Any:
  dtype = _wide_dtype(x.dtype) if hasattr(x, "dtype") else None
  if dtype is None or x.dtype == dtype:
    return x
  if isinstance(x, jax.Array):
    return x.astype(dtype)
  return np.asarray(x).astype(dtype)[()]


def _narrow(x: Any, dtype: Any) -> Any:
  return x if _wide_dtype(dtype) is None else jnp.asarray(x).astype(dtype)


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  known: dict[Any, Any] = {}

  def read(v: Any) -> Any:
    return _wide(v.val) if hasattr(v, "val") else known[v]  # a literal or a variable

  known |= zip(jaxpr.constvars, map(_wide, consts), strict=True)
  known |= zip(jaxpr.invars, map(_wide, args), strict=True)
  for eqn in jaxpr.eqns:
    outs = _applied(eqn, [read(v) for v in eqn.invars])
    known |= zip(eqn.outvars, map(_wide, outs), strict=True)
  return [read(v) for v in jaxpr.outvars]


def _applied(eqn: Any, args: list[Any]) -> list[Any]:
  """The results of one operation."""
  name, params = eqn.primitive.name, eqn.params
  if name in _INLINED:
    program = params[_INLINED[name]]
    return _evaluated(getattr(program, "jaxpr", program), getattr(program, "consts", ()), args)
  if name == "reduce_precision":
    return args
  if _is_call(eqn) or name.startswith(_BITS):
    args = [_narrow(x, v.aval.dtype) for x, v in zip(args, eqn.invars, strict=True)]
  else:
    params = {key: _widened_parameter(value) for key, value in params.items()}
  outs = eqn.primitive.bind(*args, **params)
  return list(outs) if eqn.primitive.multiple_results else [outs]


def _widened_parameter(value: Any) -> Any:
  return jax.tree.map(_widened_leaf, value, is_leaf=_is_program)


def _widened_leaf(value: Any) -> Any:
  """A dtype or a program in float64; anything else as it is."""
  if _is_program(value):
    closed = hasattr(value, "consts")
    inner, consts = (value.jaxpr, value.consts) if closed else (value, ())
    types = [
      jax.ShapeDtypeStruct(v.aval.shape, _wide_dtype(v.aval.dtype) or v.aval.dtype)
      for v in inner.invars
    ]
    made = jax.make_jaxpr(lambda *args: _evaluated(inner, consts, args))(*types)
    return made if closed else made.jaxpr
  dtype = _wide_dtype(value) if isinstance(value, (np.dtype, type)) else None
  return value if dtype is None else np.dtype(dtype)
