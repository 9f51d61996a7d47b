"""The function to verify as a function of flat lists of arrays, and the points to verify it at."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax._arguments import Arguments
from softmax_jax.verify.widening import equations, operations

Arrays = list[np.ndarray]
# Arrays, tracers or types of arrays: whatever JAX traces a function with.
Leaves = Sequence[Any]

# Functions of JAX whose results have no types.
finfo: Callable[[Any], Any] = jnp.finfo
vjp: Callable[..., Any] = jax.vjp  # pyright: ignore[reportUnknownVariableType]
_flattened: Callable[[Any], Any] = jax.tree_util.tree_flatten_with_path  # pyright: ignore[reportUnknownVariableType]


def _has_dtype(leaf: Any) -> bool:
  return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _is_array(leaf: Any) -> bool:
  return _has_dtype(leaf) or isinstance(leaf, (bool, int, float, complex))


def _is_float(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def widened(tree: Any) -> Any:
  """``tree`` with its floating arrays in float64; for use where JAX has 64 bits enabled."""

  def widen(leaf: Any) -> Any:
    if _has_dtype(leaf) and _is_float(leaf.dtype):
      return jnp.asarray(np.asarray(leaf, np.float64))
    return leaf

  return jax.tree.map(widen, tree)


class Point:
  """Arguments ``xs`` and ``ns``, cotangents ``us`` of the outputs, tangents ``vs`` of ``xs``."""

  def __init__(
    self, key: tuple[Hashable, ...], xs: Arrays, us: Arrays, vs: Arrays, ns: Sequence[Any]
  ):
    """Under a key that tells it from other points: its probe and ``near`` first."""
    self.key, self.xs, self.us, self.vs, self.ns = key, xs, us, vs, ns

  @property
  def near(self) -> Any:
    """The number of a point near the arguments; 0 for the arguments themselves."""
    return self.key[1]

  def only_argument(self, index: int) -> Arrays:
    """The tangents with all but one of them 0."""
    return [v if i == index else np.zeros_like(v) for i, v in enumerate(self.vs)]


# What a function raises that needs the value of a traced number.
_NEEDS_VALUES = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerBoolConversionError,
  jax.errors.TracerIntegerConversionError,
  jax.errors.UnexpectedTracerError,
)


class Problem:
  """``f(*args, **kwargs)`` as a function of its floating leaves ``xs`` and its other arrays ``ns``.

  f is differentiated by the floating leaves of its arguments; other arrays are passed on, and
  everything else (strings, functions, None) stays as it is, as do the keyword arguments.
  """

  def __init__(
    self,
    f: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    seed: int = 0,
    like: Problem | None = None,
  ):
    """Of ``f(*args, **kwargs)``; ``seed`` decides its points.

    The compiled programs are those of ``like``, a problem of the same f, where they fit.
    """
    self.f, self.kwargs, self.seed = f, dict(kwargs), seed
    paths, self.tree = _flattened(tuple(args))
    names = [f"args{jax.tree_util.keystr(path)}" for path, _ in paths]
    self.leaves = [
      Arguments("check_derivatives").as_array(name, leaf) if _is_array(leaf) else leaf
      for name, (_, leaf) in zip(names, paths, strict=True)
    ]  # in the dtypes that JAX gives them
    dtypes = [leaf.dtype if isinstance(leaf, jax.Array) else None for leaf in self.leaves]
    if any(d is not None and jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
      raise TypeError("check_derivatives expected real arguments, got a complex one.")
    self.float_places = [i for i, d in enumerate(dtypes) if d is not None and _is_float(d)]
    other = [i for i, d in enumerate(dtypes) if d is not None and not _is_float(d)]
    self.other_places = other
    self.names = [names[i] for i in self.float_places]
    self.other_names = [names[i] for i in other]
    self.xs = [np.asarray(self.leaves[i]) for i in self.float_places]
    self.ns = [self.leaves[i] for i in other]
    self.dtypes = [x.dtype for x in self.xs]

    try:
      jaxpr, out = jax.make_jaxpr(functools.partial(self.call, f, self.kwargs), return_shape=True)(
        self.xs, self.ns
      )
    except Exception as error:
      needed = self._needed([leaf for _, leaf in paths], names)
      if not needed and not isinstance(error, _NEEDS_VALUES):
        raise
      raise TypeError(
        f"f needs the value of {needed or 'an argument'}, which check_derivatives traces; pass it "
        "in kwargs=. Where it is inside of another argument, let f close over that."
      ) from error
    outs, _ = _flattened(out)  # with types in place of arrays
    if any(jnp.issubdtype(y.dtype, jnp.complexfloating) for _, y in outs):
      raise TypeError("check_derivatives expected f to return real numbers, got complex ones.")
    self.num_outs = len(outs)
    self.float_outs = [i for i, (_, y) in enumerate(outs) if _is_float(y.dtype)]
    self.out_types = [outs[i][1] for i in self.float_outs]
    self.out_names = [f"out{jax.tree_util.keystr(outs[i][0])}" for i in self.float_outs]
    # Where the outputs are finite: everywhere, until an oracle was asked.
    self.masks: Arrays = [np.ones(y.shape, bool) for y in self.out_types]
    self.size = max((math.prod(a.shape) for a in (*self.xs, *self.out_types)), default=0)
    self.float_dtypes = [*self.dtypes, *(y.dtype for y in self.out_types)]
    self.unit_dtypes = [*self.float_dtypes, *rounded_to(jaxpr.jaxpr)]
    self._coarsest = coarsest(self.unit_dtypes)
    self.operations = operations(jaxpr.jaxpr)

    # Programs, compiled once for all points.
    if like is not None and (self.tree, self._types()) == (like.tree, like._types()):
      self.vjp, self.jvp, self.value = like.vjp, like.jvp, like.value
    else:
      self.vjp, self.jvp = compiled(self.vjp_of), compiled(self.jvp_of)
      self.value = compiled(self.outputs)

  def _needed(self, given: list[Any], names: list[str]) -> str:
    """The arguments that f runs with if they are not traced: one, or all that are no arrays."""
    python = [i for i, leaf in enumerate(given) if isinstance(leaf, (bool, int, float))]
    alone = dict.fromkeys((*python, *self.other_places))
    for fixed in (*([place] for place in alone), python):
      traced = {i: x for i, x in enumerate(self.leaves) if _is_array(x) and i not in fixed}

      def call(traced: dict[int, Any]) -> Any:
        leaves = [traced.get(i, leaf) for i, leaf in enumerate(given)]
        return self.f(*jax.tree.unflatten(self.tree, leaves), **self.kwargs)

      try:
        jax.eval_shape(call, traced)
      except Exception:
        continue
      return ", ".join(names[i] for i in fixed)
    return ""

  def at(self, args: Sequence[Any], seed: int) -> tuple[Problem, bool]:
    """The same function at other arguments, and whether its compiled programs are the same."""
    other = Problem(self.f, args, self.kwargs, seed, like=self)
    return other, other.vjp is self.vjp

  def _types(self) -> list[Any]:
    """What a program of f is compiled for: the types of arrays, and what is no array itself."""
    return [
      (leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf for leaf in self.leaves
    ]

  def arguments(self, xs: Leaves, ns: Leaves) -> tuple[Any, ...]:
    """The arguments of f with these leaves."""
    leaves = list(self.leaves)
    for place, x in zip(self.float_places, xs, strict=True):
      leaves[place] = x
    for place, n in zip(self.other_places, ns, strict=True):
      leaves[place] = n
    return jax.tree.unflatten(self.tree, leaves)

  def call(self, f: Callable[..., Any], kwargs: Any, xs: Leaves, ns: Leaves) -> Any:
    """What f returns."""
    return f(*self.arguments(xs, ns), **kwargs)

  def outputs(self, xs: Leaves, ns: Leaves) -> tuple[list[Any], list[Any]]:
    """The floating outputs and the others."""
    return split(jax.tree.leaves(self.call(self.f, self.kwargs, xs, ns)))

  def floating(self, ns: Leaves) -> Callable[..., list[Any]]:
    """The floating outputs as a function of the floating leaves, for JAX to differentiate."""
    return lambda *xs: self.outputs(xs, ns)[0]

  def vjp_of(self, xs: Leaves, ns: Leaves, us: Leaves) -> tuple[list[Any], list[Any], list[Any]]:
    """``(floating outputs, other outputs, cotangents of xs)``; a function for JAX to transform."""

    def outputs(*xs: Any) -> tuple[list[Any], list[Any]]:
      return self.outputs(xs, ns)

    ys, pull, others = vjp(outputs, *xs, has_aux=True)
    return ys, others, list(pull(list(us)))

  def jvp_of(self, xs: Leaves, ns: Leaves, vs: Leaves) -> list[Any]:
    """The tangents of the floating outputs."""
    return jax.jvp(self.floating(ns), tuple(xs), tuple(vs))[1]

  # --- points -------------------------------------------------------------------------------------

  def point(self, probe: int = 0, near: int = 0, row: int = 0, wide: bool = False) -> Point:
    """The arguments with random cotangents and tangents, a set of them for each ``probe``.

    With ``near`` > 0 everything is moved at random by a few ulps: by ulps of float64 if ``wide``,
    in which case all arrays are of that dtype. With ``row`` > 0 the arguments are other ones,
    within 10 % of those given, so that signs and infinities stay; zeros become positive. Cotangents
    are normal numbers around 1 or -1 (in one of four probes around 0), so that a term with the sum
    of the cotangents shows; they are 0 where the output is infinite or NaN. Tangents are normal
    numbers of the size of the argument; in every other probe smaller for its small entries, which
    may be near to the end of a domain.
    """
    rng = np.random.default_rng([self.seed, probe, row])
    offset = 0.0 if probe % 4 == 3 else rng.choice([-1.0, 1.0])
    us = [
      np.asarray(rng.standard_normal(tuple(y.shape)) + offset).astype(y.dtype)
      for y in self.out_types
    ]
    size = _sizes if probe % 2 else size_of
    vs = [np.asarray(size(x) * rng.standard_normal(x.shape)).astype(x.dtype) for x in self.xs]
    xs = self.xs
    if row:
      xs = [_moved(_without_zeros(x, 0.1, rng), 0.1, rng) for x in xs]
    if near:
      rng = np.random.default_rng([self.seed, probe, row, near])
      ulps = _few_ulps(np.float64 if wide else self._coarsest)
      if wide:
        xs, us, vs = ([a.astype(np.float64) for a in group] for group in (xs, us, vs))
      xs, us, vs = ([_moved(a, ulps, rng) for a in group] for group in (xs, us, vs))
    us = [np.where(mask, u, np.zeros_like(u)) for u, mask in zip(us, self.masks, strict=True)]
    return Point((probe, near, row, wide), xs, us, vs, self.ns)

  def others(self, row: int) -> list[Any]:
    """The arrays without derivatives in a row of a batch: in row 0 as given, then moved around.

    Labels and the like are then others, and yet such as f takes.
    """
    return [n if n.size < 2 or not row else jnp.roll(n, row) for n in self.ns]


def split(outs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """The floating arrays of a list and the others; Python numbers become arrays."""
  outs = [y if hasattr(y, "dtype") else jnp.asarray(y) for y in outs]
  floats = [y for y in outs if _is_float(jnp.result_type(y))]
  return floats, [y for y in outs if not _is_float(jnp.result_type(y))]


def compiled(f: Callable[..., Any], *, quickly: bool = False) -> Callable[..., Any]:
  """``f`` compiled, with NumPy arrays as results.

  ``quickly`` leaves out, on a CPU, the optimization of machine code, which takes up to half of the
  time to compile a large program. XLA's optimization of the operations stays.
  """
  options = {"xla_backend_optimization_level": 0}
  program = jax.jit(
    f, compiler_options=options if quickly and jax.default_backend() == "cpu" else None
  )
  return lambda *args: jax.device_get(program(*args))


def rounded_to(jaxpr: Any) -> set[Any]:
  """The floating dtypes to which a program rounds wider values."""
  found: set[Any] = set()
  for eqn in equations(jaxpr):
    if eqn.primitive.name == "convert_element_type":
      old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
      if _is_float(old) and _is_float(new) and finfo(new).eps > finfo(old).eps:
        found.add(new)
  return found


def coarsest(dtypes: Sequence[Any]) -> Any:
  """The dtype with the largest unit roundoff."""
  return np.dtype(max(dtypes, key=lambda dtype: float(finfo(dtype).eps), default=np.float64))


def _few_ulps(dtype: Any) -> float:
  # Enough to round differently; in sixteen bits one ulp is already much.
  limits = finfo(dtype)
  return float(limits.eps) * (1.5 if limits.bits == 16 else 64)


def _moved(x: np.ndarray, by: float, rng: np.random.Generator) -> np.ndarray:
  factor = 1 + by * rng.uniform(-1, 1, x.shape)
  return np.asarray(x.astype(np.float64) * factor).astype(x.dtype)


def _without_zeros(x: np.ndarray, by: float, rng: np.random.Generator) -> np.ndarray:
  size = by * size_of(x) * rng.uniform(0, 1, x.shape)
  return np.where(x == 0, size, x).astype(x.dtype)


def size_of(x: np.ndarray) -> float:
  """The root mean square of the finite entries, or 1 if that is 0."""
  finite = np.asarray(x, np.float64)
  finite = finite[np.isfinite(finite)]
  return (math.sqrt(np.mean(finite**2)) if finite.size else 0.0) or 1.0


def norm_of_products(xs: Sequence[Any], ys: Sequence[Any]) -> float:
  """The root of the sum of the squares: the size of the sum of the products if nothing cancels."""
  products = [np.asarray(x, np.float64) * y for x, y in zip(xs, ys, strict=True)]
  return math.sqrt(sum(np.sum(p**2, where=np.isfinite(p)) for p in products))


def _sizes(x: np.ndarray) -> np.ndarray:
  """The geometric mean of the size of each entry that is not 0 or infinite and of the array."""
  sizes, size = np.abs(np.asarray(x, np.float64)), size_of(x)
  return np.where(np.isfinite(sizes) & (sizes > 0), np.sqrt(sizes) * math.sqrt(size), size)
