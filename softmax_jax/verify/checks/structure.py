"""Beyond numbers: types of cotangents, memory, traces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax.verify.problem import vjp
from softmax_jax.verify.report import Row, Skip
from softmax_jax.verify.verifier import Verifier


def structure(v: Verifier) -> list[Row]:
  """Cotangents have shape, dtype and weak type of their arguments; those of integers are float0."""
  v.need_floats()
  problem = v.problem
  places = sorted(problem.float_places + problem.other_places)

  def f(*arrays: Any) -> list[jax.Array]:
    leaves = list(problem.leaves)
    for place, array in zip(places, arrays, strict=True):
      leaves[place] = array
    out = problem.f(*jax.tree.unflatten(problem.tree, leaves), **problem.kwargs)
    return [jnp.asarray(y) for y in jax.tree.leaves(out)]

  def cotangents(*arrays: Any) -> Any:
    ys, pull = vjp(f, *arrays)
    return pull([_ones(y) for y in ys])

  arrays = [problem.leaves[place] for place in places]
  bars = jax.eval_shape(cotangents, *arrays)  # Nothing is computed: only types matter.
  wrong: list[str] = []
  for place, x, bar in zip(places, arrays, bars, strict=True):
    if place in problem.float_places:
      name = problem.names[problem.float_places.index(place)]
      if (bar.shape, bar.dtype) != (x.shape, x.dtype):
        wrong.append(f"{name} is {_described(x)}, its cotangent {_described(bar)}")
      elif bar.weak_type and not jax.typeof(x).weak_type:
        wrong.append(f"the cotangent of {name} is weakly typed")
    elif bar.dtype != jax.dtypes.float0:
      name = problem.other_names[problem.other_places.index(place)]
      wrong.append(f"the cotangent of {name} has dtype {bar.dtype}, expected float0")
  return v.count("structure", len(wrong), 0, of="wrong cotangents", reason="; ".join(wrong))


def residuals(v: Verifier) -> list[Row]:
  """The bytes of what the backward pass holds beside the arguments and the outputs."""
  v.need_floats()
  problem = v.problem
  xs = [jnp.asarray(x) for x in problem.xs]
  ys, pull = vjp(problem.floating(problem.ns), *xs)
  alive = {_buffer(a) for a in (*xs, *ys, *problem.leaves) if isinstance(a, jax.Array)}
  held = {_buffer(a): a for a in jax.tree.leaves(pull) if isinstance(a, jax.Array) and a.size}
  kept = [a for buffer, a in held.items() if buffer not in alive]
  number = sum(a.nbytes for a in kept)
  arrays = f"{len(kept)} array{'' if len(kept) == 1 else 's'} of {number:,} bytes"
  allowed = v.options.max_residual_bytes
  if allowed is None:
    raise Skip(f"{arrays}; max_residual_bytes= sets a bound")
  return v.count("residuals", number, allowed, of="bytes", reason=arrays)


def traces(v: Verifier) -> list[Row]:
  """A jitted step x -> x - J^T 1, called three times, each on the result before.

  It is traced once; a cotangent of another dtype makes JAX trace and compile again.
  """
  v.need_floats()
  problem, number = v.problem, 0

  @jax.jit
  def step(xs: list[Any]) -> list[Any]:
    nonlocal number
    number += 1
    ys, pull = vjp(problem.floating(problem.ns), *xs)
    return [x - bar for x, bar in zip(xs, pull([jnp.ones_like(y) for y in ys]), strict=True)]

  xs = [problem.leaves[place] for place in problem.float_places]
  # A Python number has a weak type, which it may lose in the first step.
  allowed = 2 if any(jax.typeof(x).weak_type for x in xs) else 1
  for _ in range(3):
    xs = step(xs)  # pyright: ignore[reportUnknownVariableType]  # untyped in JAX
  return v.count("traces", number, allowed, of="traces")


def _ones(y: jax.Array) -> Any:
  if jnp.issubdtype(y.dtype, jnp.floating):
    return jnp.ones_like(y)
  return np.zeros(y.shape, jax.dtypes.float0)


def _described(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _buffer(array: jax.Array) -> Any:
  try:
    return array.unsafe_buffer_pointer()
  except Exception:  # An array on several devices has no single buffer.
    return id(array)
