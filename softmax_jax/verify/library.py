"""What `softmax-jax verify` verifies: every function of the library, against its formula."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import softmax_jax
from softmax_jax import derivatives, reference
from softmax_jax.verify import Report, check_derivatives
from softmax_jax.verify.problem import vjp

DTYPES = ("float32", "float64", "bfloat16", "float16")
# The checks whose result may depend on dtype and shape; all others run in float32 only.
_ESSENTIAL = ("value", "vjp")
# In float32 a rule is compared with the formula as it is: run in float64 it would tell no more.
_IN_FLOAT32 = ("finite_differences",)


class Case(NamedTuple):
  """A function at one shape and dtype."""

  name: str
  f: Callable[..., Any]
  args: tuple[Any, ...]
  reference: Callable[..., Any]
  kwargs: dict[str, Any]
  edge_points: tuple[Any, ...]
  checks: tuple[str, ...] | None
  dtype: str
  skip: tuple[str, ...] = _IN_FLOAT32

  def run(self, seed: int = 0) -> Report:
    """Its report."""
    wide = self.dtype == "float64"
    with jax.enable_x64(wide or jax.config.jax_enable_x64):  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
      return check_derivatives(
        self.f,
        *self.args,
        reference=self.reference,
        kwargs=self.kwargs,
        edge_points=self.edge_points,
        checks=self.checks,
        skip=self.skip,
        name=self.name,
        seed=seed,
      )


def _logits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
  return jnp.asarray(2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def _labels(rows: int, num_classes: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(1).integers(0, num_classes - 1, rows), "int32")


def _shares(shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jnp.asarray(np.random.default_rng(2).uniform(0.1, 1, shape), dtype)


def cases() -> Iterator[Case]:
  """Every public function: all checks in float32, the essential ones elsewhere."""
  yield from _of_dtype("float32", None, (4, 8))
  yield from _with_options()
  for dtype in DTYPES[1:]:
    with jax.enable_x64(dtype == "float64"):
      edges = ("edge_points",) if dtype == "bfloat16" else ()
      found = list(_of_dtype(dtype, _ESSENTIAL + edges, (4, 8)))
    yield from found
  yield from _of_dtype("float32", ("vjp",), (64, 1000))
  yield from _closed_forms()


def _of_dtype(dtype: str, checks: tuple[str, ...] | None, shape: tuple[int, int]) -> Iterator[Case]:
  rows, num_classes = shape
  x, t, y = _logits(shape, dtype), _shares(shape, dtype), _labels(rows, num_classes)
  weight, features = _logits((4, num_classes), dtype, 3), _logits((rows, 4), dtype, 4)
  # One row has a logit of -inf, and another a logit far from the others.
  edge = x.at[0, -1].set(-jnp.inf).at[-1, 0].set(50)

  def case(name: str, args: tuple[Any, ...], *edge_points: tuple[Any, ...], **kwargs: Any) -> Case:
    f, formula = getattr(softmax_jax, name), getattr(reference, name)
    # Second derivatives take long: `_with_coefficients` checks those of the losses.
    skip = ("second_order",) if dtype != "float32" or "cross_entropy" in name else ()
    skip += _IN_FLOAT32 if dtype == "float32" else ()
    title = f"{name}({_shown(kwargs)})" if kwargs else name
    return Case(title, f, args, formula, kwargs, edge_points, checks, dtype, skip)

  yield case("softmax", (x,), (edge,))
  yield case("log_softmax", (x,), (edge,))
  yield case("logsumexp", (x,), (edge,), axis=-1)
  yield case("softmax_cross_entropy", (x, t), (edge, t.at[0, -1].set(0)))
  yield case("softmax_cross_entropy_with_integer_labels", (x, y), (edge, y))
  yield case("linear_softmax_cross_entropy", (features, weight, y))
  yield _of_head(case("chunked_softmax_cross_entropy", (weight, features, y), chunk_size=3))
  w = _logits(shape, dtype, 7)
  yield case("softmax_entropy", (x,), (edge,))
  yield case("softmax_kl_divergence", (x, w), (edge, w.at[0, -1].set(-jnp.inf)))


def _of_head(case: Case) -> Case:
  """``case`` with a softcap over a product as the head."""

  def head(weight: jax.Array, x: jax.Array) -> jax.Array:
    return 3 * jnp.tanh(x @ weight / 3)

  kwargs = {k: v for k, v in case.kwargs.items() if k != "chunk_size"}
  f = functools.partial(case.f, head, **case.kwargs)
  return case._replace(f=f, reference=functools.partial(case.reference, head), kwargs=kwargs)


def _shown(kwargs: dict[str, Any]) -> str:
  """Keyword arguments as a title shows them, arrays by their name alone."""
  return ", ".join(k if hasattr(v, "shape") else f"{k}={v}" for k, v in kwargs.items())


def _with_options() -> Iterator[Case]:
  x = _logits((8, 4), "float32")
  checks = ("value", "vjp", "jvp")
  masked: dict[str, Any] = {"axis": 0, "where": _shares((8, 4), "float32") > 0.3}
  for name, kwargs in (("softmax", {"axis": 0}), ("log_softmax", {"axis": 0}), ("softmax", masked)):
    f, formula = getattr(softmax_jax, name), getattr(reference, name)
    yield Case(f"{name}({_shown(kwargs)})", f, (x,), formula, kwargs, (), checks, "float32")
  yield from _with_coefficients((*checks, "second_order", "edge_points"))


def _with_coefficients(checks: tuple[str, ...]) -> Iterator[Case]:
  """By every coefficient, also where it is 0 or 1, and with rows that hold NaN but do not count.

  Some have more than 16 classes: the library computes such rows differently from shorter ones.
  """
  rows, smoothing, z_loss, zero = 4, np.float32(0.1), np.float32(1e-2), np.float32(0)
  all_rows, last_row = jnp.ones(rows, bool), jnp.arange(rows) == rows - 1
  samples = jnp.asarray([1.5, 0.75, -0.5, 2], "float32")

  def arrays(num_classes: int) -> tuple[Any, ...]:
    z, y = _logits((num_classes, rows), "float32"), _labels(rows, num_classes)
    weights = jnp.linspace(0.5, 2, num_classes, dtype="float32")
    anything = z.at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf).at[:, 2].set(-jnp.inf)
    impossible = z.at[-1].set(-jnp.inf)  # No label is there.
    return z, y, weights, weights.at[y[0]].set(0).at[-1].set(0), anything, impossible

  # `start`, the smoothing at an edge point, is 0 or 1. It is an integer, so that points nearby have
  # the same; likewise rows that are not `weighty` keep a sample weight of 0. A logit of -inf makes
  # any smoothed loss infinite, and so does a label there: a factor of 0 takes both out.
  def coefficients(
    z: Any, counts: Any, start: Any, alpha: Any, penalty: Any, w: Any, s: Any, weighty: Any
  ) -> Any:
    possible = (z != -jnp.inf) | ~(counts & weighty)
    options = {"z_loss": penalty, "class_weights": w, "sample_weights": jnp.where(weighty, s, 0)}
    options |= {"reduction": "mean", "label_smoothing": start + alpha * jnp.all(possible)}
    return possible, options

  def by_both(f: Callable[..., Any], a: Any, b: Any) -> Any:
    return f(a, axis=0, b=b)

  def soft(f: Any, z: Any, t: Any, counts: Any, *given: Any) -> Any:
    possible, options = coefficients(z, counts, *given)
    return f(z, t * possible, 0, counts, **options)

  def integer(f: Any, z: Any, y: Any, counts: Any, *given: Any) -> Any:
    _, options = coefficients(z, counts, *given)
    return f(z, y, 0, counts, ignore_index=-1, **options)

  def linear(f: Any, x: Any, w: Any, y: Any, bias: Any, k: Any, cap: Any, *given: Any) -> Any:
    _, options = coefficients(zero, np.True_, *given)
    return f(x, w, y, bias=bias, logit_scale=k, softcap=cap, ignore_index=-1, **options)

  def divergence(f: Callable[..., Any], z: Any, w: Any, counts: Any, temperature: Any) -> Any:
    return f(z, w, 0, counts, temperature=temperature, reduction="mean")

  def case(
    title: str, adapted: Callable[..., Any], args: tuple[Any, ...], *edge_points: tuple[Any, ...]
  ) -> Case:
    name, _, _ = title.partition("(")
    f, formula = (
      functools.partial(adapted, getattr(module, name)) for module in (softmax_jax, reference)
    )
    return Case(title, f, args, formula, {}, edge_points, checks, "float32")

  z, y, weights, weightless, anything, impossible = arrays(20)
  t = _shares(z.shape, "float32")
  inside = (0, smoothing, z_loss, weights, samples, all_rows)
  at_0 = (0, zero, zero, weightless, samples.at[1].set(0), all_rows)
  at_1 = (1, zero, zero, weightless, samples, all_rows)
  yield case(
    "logsumexp(axis=0, b)",
    by_both,
    (z, t),
    (z, t.at[1:].set(0)),
    (impossible, t.at[2:4].set(0).at[-1].set(0)),
  )
  yield case(
    "softmax_cross_entropy(axis=0, all coefficients, reduction=mean)",
    soft,
    (z, t, all_rows, *inside),
    (z, t.at[:3].set(0), all_rows, *at_0),
    (z, t, all_rows, *at_1),
    (impossible, t, all_rows, 0, zero, z_loss, weights, samples, all_rows),
    (anything, t.at[0, 0].set(jnp.nan), last_row, *inside),
    (anything, t.at[0, 0].set(jnp.nan), all_rows, *inside[:-1], last_row),
  )
  w = _logits(z.shape, "float32", 7)
  yield case(
    "softmax_kl_divergence(axis=0, temperature, reduction=mean)",
    divergence,
    (z, w, all_rows, np.float32(1.5)),
    (z, w, all_rows, np.float32(1)),
    (z, z, all_rows, np.float32(1.5)),
    (impossible, w.at[-1].set(-jnp.inf), all_rows, np.float32(1.5)),
    (anything, w.at[0, 0].set(jnp.nan), last_row, np.float32(1.5)),
  )
  x, weight = _logits((rows, 3), "float32", 4), _logits((3, 20), "float32", 3)
  nothing = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2].set(-jnp.inf)
  bias, scales = 0.1 * weights, (np.float32(1.5), np.float32(5))
  unlabeled = jnp.where(last_row, y, -1)
  yield case(
    "linear_softmax_cross_entropy(all coefficients, reduction=mean)",
    linear,
    (x, weight, y, bias, *scales, *inside),
    (x.at[1].set(0), weight, y, 0 * bias, *scales, *at_0),
    (x, weight, y, bias, *scales, *at_1),
    (nothing, weight, unlabeled, bias, *scales, *inside),
    (nothing, weight, y, bias, *scales, *inside[:-1], last_row),
  )

  z, y, weights, weightless, anything, impossible = arrays(8)
  yield case(
    "softmax_cross_entropy_with_integer_labels(axis=0, all coefficients, reduction=mean)",
    integer,
    (z, y, all_rows, *inside[:3], weights, samples, all_rows),
    (z, y, all_rows, 0, zero, zero, weightless, samples.at[1].set(0), all_rows),
    (z, y, all_rows, 1, zero, zero, weightless, samples, all_rows),
    (impossible, y, all_rows, 0, zero, z_loss, weights, samples, all_rows),
    (anything, y, last_row, *inside[:3], weights, samples, all_rows),
    (anything, jnp.where(last_row, y, -1), all_rows, *inside[:3], weights, samples, all_rows),
    (anything, jnp.where(last_row, y, -7), all_rows, *inside[:3], weights, samples, last_row),
  )


def _of_rows(derivative: Any, f: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jacrev`, `jax.grad` or the like of f, row by row."""
  return jax.vmap(derivative(f))


def _closed_forms() -> Iterator[Case]:
  """The functions of `softmax_jax.derivatives` beside JAX's autodiff of the formulas."""
  x, v = _logits((4, 8), "float32"), _logits((4, 8), "float32", 5)
  w, t = _logits((4, 8), "float32", 6), _shares((4, 8), "float32")
  hessian = _of_rows(jax.hessian, reference.logsumexp)

  def pushed(f: Callable[..., Any], x: Any, dot: Any) -> Any:
    return jax.jvp(f, (x,), (dot,))[1]

  def pulled(x: Any, bar: Any) -> Any:
    return vjp(reference.softmax, x)[1](bar)[0]

  def hvp(x: Any, bar: Any, dot: Any) -> Any:
    return pushed(functools.partial(pulled, bar=bar), x, dot)

  found: dict[str, tuple[tuple[jax.Array, ...], Callable[..., Any]]] = {
    "softmax_jacobian": ((x,), _of_rows(jax.jacrev, reference.softmax)),
    "softmax_jvp": ((x, v), functools.partial(pushed, reference.softmax)),
    "softmax_vjp": ((x, v), pulled),
    "softmax_hvp": ((x, w, v), hvp),
    "log_softmax_jacobian": ((x,), _of_rows(jax.jacrev, reference.log_softmax)),
    "logsumexp_hessian": ((x,), hessian),
    "cross_entropy_gradient": ((x, t), _of_rows(jax.grad, reference.softmax_cross_entropy)),
    "cross_entropy_hessian": ((x,), hessian),
    "cross_entropy_hvp": (
      (x, v),
      functools.partial(pushed, _of_rows(jax.grad, reference.logsumexp)),
    ),
  }
  for name, (args, formula) in found.items():
    f = getattr(derivatives, name)
    yield Case(f"derivatives.{name}", f, args, formula, {}, (), ("value", "vjp"), "float32")
