"""A program in the dtypes that JAX traced it in, evaluated in float64.

It differs from the same function called with float64: its constants are those of its own dtypes, so
are the random numbers that it draws, it takes the branches for its own dtypes, and nothing inside
that depends on floating arguments is rounded. What does not, such as 1 - 0.999**step, is a constant
too, and keeps the digits of its own dtype, of which the last may be moved: other programs compute
it otherwise. A program of a derivative holds what the rules of the function did when it was traced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax._forward_mode import hijax

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
# What programs of 32 and 64 bits do not compute alike to the last digit.
_INEXACT = (
  *("pow", "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "logistic", "rsqrt", "cbrt"),
  *("sin", "cos", "tan", "sinh", "cosh", "tanh", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
)
_CALLS = ("pure_callback", "io_callback", "debug_callback", "ffi_call", "pallas_call")


class _Constant(NamedTuple):
  """A value that depends on no floating argument, in its own dtype."""

  value: Any

  def moved(self, sign: Any) -> _Constant:
    """A floating number moved by a unit in its last place; by none if the sign is 0 or None."""
    dtype = self.value.dtype
    if sign is None or _wide_dtype(dtype) is None:
      return self
    # Three quarters of eps are closest to one unit, whatever the mantissa.
    return _Constant((self.value * (1 + 0.75 * jnp.finfo(dtype).eps * sign)).astype(dtype))


def widened_program(closed: Any, moves: Any = None) -> Callable[..., list[Any]]:
  """A function that evaluates a traced program with floating numbers in float64.

  It takes and returns flat lists; where it is called JAX must have 64 bits enabled. ``moves`` are
  the signs of the units by which constants are moved that it computes, but for those in loops.
  """
  signs = itertools.repeat(None) if moves is None else itertools.cycle(list(moves))
  return lambda *args: _wide_results(closed.jaxpr, closed.consts, args, signs)


def equations(jaxpr: Any) -> Iterator[Any]:
  """The operations of a program, also of those inside: a loop, a branch, a function with a rule."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _programs(eqn):
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
  return eqn.primitive.name.startswith(_CALLS) or bool(functions and not _programs(eqn))


def operations(jaxpr: Any) -> set[str]:
  """The names of the operations of a program."""
  return {eqn.primitive.name for eqn in equations(jaxpr)}


def _programs(eqn: Any) -> list[Any]:
  leaves = jax.tree.leaves([*eqn.params.values(), hijax.program(eqn)], is_leaf=_is_program)
  return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if _is_program(leaf)]


def _is_program(value: Any) -> bool:
  return hasattr(value, "eqns")


def _wide_dtype(dtype: Any) -> Any:
  """The dtype in which numbers of this one are held; None for those that stay."""
  if jnp.issubdtype(dtype, jnp.floating):
    return np.float64
  return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else None


def _wide(x: Any) -> Any:
  x = x.value if isinstance(x, _Constant) else x
  dtype = _wide_dtype(x.dtype) if hasattr(x, "dtype") else None
  if dtype is None or x.dtype == dtype:
    return x
  if isinstance(x, jax.Array):
    return x.astype(dtype)
  return np.asarray(x).astype(dtype)[()]


def _narrow(x: Any, dtype: Any) -> Any:
  return x if _wide_dtype(dtype) is None else jnp.asarray(x).astype(dtype)


def _wide_results(
  jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], signs: Iterator[Any]
) -> list[Any]:
  given = [x if _wide_dtype(x.dtype) else _Constant(x) for x in map(_wide, args)]
  return [_wide(x) for x in _evaluated(jaxpr, map(_Constant, consts), given, signs)]


def _evaluated(
  jaxpr: Any, consts: Iterable[Any], args: Sequence[Any], signs: Iterator[Any]
) -> list[Any]:
  """The results of a program, like its arguments each a `_Constant` or in float64."""
  known: dict[Any, Any] = {}

  def read(v: Any) -> Any:
    return _Constant(v.val) if hasattr(v, "val") else known[v]  # a literal or a variable

  known |= zip(jaxpr.constvars, consts, strict=True)
  known |= zip(jaxpr.invars, args, strict=True)
  for eqn in jaxpr.eqns:
    outs = _applied(eqn, [read(v) for v in eqn.invars], signs)
    known |= zip(eqn.outvars, outs, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _applied(eqn: Any, args: list[Any], signs: Iterator[Any]) -> list[Any]:
  """The results of one operation."""
  name, params = eqn.primitive.name, eqn.params
  program = params[_INLINED[name]] if name in _INLINED else hijax.program(eqn)
  if program is not None:
    consts = map(_Constant, getattr(program, "consts", ()))
    return _evaluated(getattr(program, "jaxpr", program), consts, args, signs)
  # In sixteen bits constants are evaluated as all else: there one digit is much.
  constant = all(isinstance(x, _Constant) for x in args) and not any(map(_is_coarse, eqn.outvars))
  if name == "reduce_precision" and not constant:
    return args
  args = [x.value if constant else _wide(x) for x in args]
  if not constant and (_is_call(eqn) or name.startswith(_BITS)):
    args = [_narrow(x, v.aval.dtype) for x, v in zip(args, eqn.invars, strict=True)]
  elif not constant:
    params = {key: _widened_parameter(value) for key, value in params.items()}
  outs = eqn.primitive.bind(*args, **params)
  outs = outs if eqn.primitive.multiple_results else [outs]
  if not constant:
    return list(map(_wide, outs))
  sign = next(signs) if name in _INEXACT else None
  return [_Constant(x).moved(sign) for x in outs]


def _is_coarse(v: Any) -> bool:
  return _wide_dtype(v.aval.dtype) is not None and v.aval.dtype.itemsize < 4


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
    still = itertools.repeat(None)
    made = jax.make_jaxpr(lambda *args: _wide_results(inner, consts, args, still))(*types)
    return made if closed else made.jaxpr
  dtype = _wide_dtype(value) if isinstance(value, (np.dtype, type)) else None
  return value if dtype is None else np.dtype(dtype)
