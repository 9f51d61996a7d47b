"""What `softmax-jax verify` verifies: every function of the library, beside a plain reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import softmax_jax
from softmax_jax import derivatives
from softmax_jax.verify import Report, check_derivatives
from softmax_jax.verify.problem import vjp

DTYPES = ("float32", "float64", "bfloat16", "float16")
# What may differ in other dtypes and shapes; all else is looked at in float32.
_ESSENTIAL = ("value", "vjp")


Scalar = jax.Array | float


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
  skip: tuple[str, ...] = ()

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


# --- references, in plain JAX ---------------------------------------------------------------------

_REDUCE: dict[str, Callable[[jax.Array], jax.Array]] = {
  "none": lambda x: x,
  "sum": jnp.sum,
  "mean": jnp.mean,
}


def _cross_entropy(
  logits: jax.Array,
  t: jax.Array,
  axis: int = -1,
  where: jax.Array | None = None,
  label_smoothing: Scalar = 0.0,
  z_loss: Scalar = 0.0,
  class_weights: jax.Array | None = None,
  reduction: str = "none",
  **_: Any,
) -> jax.Array:
  if where is not None:  # rows that count
    logits, t = (jnp.where(jnp.expand_dims(where, axis), x, 0) for x in (logits, t))
  log_a = jax.nn.log_softmax(logits, axis=axis)
  num_classes = logits.shape[axis]
  weights = jnp.ones(num_classes) if class_weights is None else class_weights
  shape = [1] * logits.ndim
  shape[axis] = num_classes
  weights = jnp.reshape(weights, shape)
  t = (1 - label_smoothing) * t + label_smoothing / num_classes
  cost = jnp.where(log_a == -jnp.inf, 0, log_a)  # 0 log 0 = 0, and no other labels are there
  loss = -jnp.sum(t * weights * cost, axis=axis)
  loss += z_loss * jax.nn.logsumexp(logits, axis=axis) ** 2
  if where is not None:
    loss = jnp.where(where, loss, 0)
    if reduction == "mean":
      return jnp.sum(loss) / jnp.sum(where)
  return _REDUCE[reduction](loss)


def _integer_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  axis: int = -1,
  where: jax.Array | None = None,
  ignore_index: int | None = None,
  reduction: str = "none",
  **options: Any,
) -> jax.Array:
  if ignore_index is not None:
    counted = labels != ignore_index
    where = counted if where is None else where & counted
  is_label = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=logits.dtype)
  losses = _cross_entropy(logits, is_label, axis, where, **options)
  if reduction != "mean" or options.get("class_weights") is None:
    return _REDUCE[reduction](losses)
  weights = options["class_weights"][labels]
  return jnp.sum(losses) / jnp.sum(weights if where is None else jnp.where(where, weights, 0))


def _linear_cross_entropy(
  x: jax.Array,
  weight: jax.Array,
  labels: jax.Array,
  bias: Scalar = 0.0,
  softcap: jax.Array | None = None,
  ignore_index: int | None = None,
  reduction: str = "mean",
  **options: Any,
) -> jax.Array:
  if ignore_index is not None:  # whose features may be NaN, of which the weight is to see none
    x = jnp.where((labels != ignore_index)[:, None], x, 0)
  logits = x @ weight + bias
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  return _integer_cross_entropy(
    logits, labels, ignore_index=ignore_index, reduction=reduction, **options
  )


def _logsumexp(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """The logarithm of the sum of b e^a; that of `jax.nn` is constant around a b of 0."""
  top = jax.lax.stop_gradient(jnp.max(a, axis, keepdims=True))
  return jnp.log(jnp.sum(b * jnp.exp(a - top), axis)) + jnp.squeeze(top, axis)


def _of_rows(derivative: Any, f: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jacrev`, `jax.grad` or the like of f, row by row."""
  return jax.vmap(derivative(f))


# --- cases ----------------------------------------------------------------------------------------


def _logits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
  return jnp.asarray(2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def _labels(rows: int, num_classes: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(1).integers(0, num_classes - 1, rows), "int32")


def _shares(shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jnp.asarray(np.random.default_rng(2).uniform(0.1, 1, shape), dtype)


def _edge(x: jax.Array) -> jax.Array:
  """A row with a logit of -inf, and one far from the others."""
  return x.at[0, -1].set(-jnp.inf).at[-1, 0].set(50)


def _of_dtype(dtype: str, checks: tuple[str, ...] | None, shape: tuple[int, int]) -> Iterator[Case]:
  rows, num_classes = shape
  x, t, y = _logits(shape, dtype), _shares(shape, dtype), _labels(rows, num_classes)

  def case(
    name: str,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    reference: Callable[..., Any],
    edge_points: tuple[Any, ...] = (),
    **kwargs: Any,
  ) -> Case:
    options = ", ".join(f"{k}={v}" for k, v in kwargs.items() if not hasattr(v, "shape"))
    name = f"{name}({options})" if options else name
    # Second derivatives take long: those of the losses are left to `_with_coefficients`.
    first = dtype != "float32" or "cross_entropy" in name
    skip = ("second_order",) if first else ()
    return Case(name, f, args, reference, kwargs, edge_points, checks, dtype, skip)

  edge = _edge(x)
  for name in ("softmax", "log_softmax"):
    yield case(name, getattr(softmax_jax, name), (x,), getattr(jax.nn, name), ((edge,),))
  yield case("logsumexp", softmax_jax.logsumexp, (x,), jax.nn.logsumexp, ((edge,),), axis=-1)
  yield case(
    "softmax_cross_entropy",
    softmax_jax.softmax_cross_entropy,
    (x, t),
    _cross_entropy,
    ((edge, t.at[0, -1].set(0)),),
  )
  yield case(
    "softmax_cross_entropy_with_integer_labels",
    softmax_jax.softmax_cross_entropy_with_integer_labels,
    (x, y),
    _integer_cross_entropy,
    ((edge, y),),
  )
  weight = _logits((4, num_classes), dtype, 3)
  features = _logits((rows, 4), dtype, 4)
  yield case(
    "linear_softmax_cross_entropy",
    softmax_jax.linear_softmax_cross_entropy,
    (features, weight, y),
    _linear_cross_entropy,
  )


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


def _with_options() -> Iterator[Case]:
  x, t = _logits((8, 4), "float32"), _shares((8, 4), "float32")
  checks = ("value", "vjp", "jvp")

  def case(name: str, args: tuple[Any, ...], reference: Callable[..., Any], **kwargs: Any) -> Case:
    options = ", ".join(k if hasattr(v, "shape") else f"{k}={v}" for k, v in kwargs.items())
    f = getattr(softmax_jax, name)
    return Case(f"{name}({options})", f, args, reference, kwargs, (), checks, "float32")

  mask = t > 0.3
  for name in ("softmax", "log_softmax"):
    yield case(name, (x,), getattr(jax.nn, name), axis=0)
  yield case("softmax", (x,), jax.nn.softmax, axis=0, where=mask)
  yield from _with_coefficients((*checks, "second_order", "edge_points"))


def _with_coefficients(checks: tuple[str, ...]) -> Iterator[Case]:
  """By every coefficient, also where it is 0 or 1; with rows that do not count, whatever they hold.

  Some have more than 16 classes, of which the library treats rows otherwise than shorter ones.
  """
  rows, smoothing, z_loss, zero = 4, np.float32(0.1), np.float32(1e-2), np.float32(0)
  all_rows, last_row = jnp.ones(rows, bool), jnp.arange(rows) == rows - 1

  def arrays(num_classes: int) -> tuple[Any, ...]:
    z, y = _logits((num_classes, rows), "float32"), _labels(rows, num_classes)
    weights = jnp.linspace(0.5, 2, num_classes, dtype="float32")
    anything = z.at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf).at[:, 2].set(-jnp.inf)
    impossible = z.at[-1].set(-jnp.inf)  # No label is there.
    return z, y, weights, weights.at[y[0]].set(0).at[-1].set(0), anything, impossible

  # `start` is 0 or 1, and an integer: points near a smoothing of 1 are at 1 too. Where a logit is
  # -inf any smoothing makes the loss infinite; a factor of 0 keeps it and its derivatives out, but
  # none that is NaN. So it does with a label.
  def coefficients(z: Any, counts: Any, start: Any, alpha: Any, penalty: Any, w: Any) -> Any:
    possible = (z != -jnp.inf) | ~counts
    options = {"z_loss": penalty, "class_weights": w, "reduction": "mean"}
    return possible, options | {"label_smoothing": start + alpha * jnp.all(possible)}

  def by_both(f: Callable[..., Any], a: Any, b: Any) -> Any:
    return f(a, axis=0, b=b)

  def soft(f: Any, z: Any, t: Any, counts: Any, *given: Any) -> Any:
    possible, options = coefficients(z, counts, *given)
    return f(z, t * possible, 0, counts, **options)

  def integer(f: Any, z: Any, y: Any, counts: Any, *given: Any) -> Any:
    _, options = coefficients(z, counts, *given)
    return f(z, y, 0, counts, ignore_index=-1, **options)

  def linear(f: Any, x: Any, w: Any, y: Any, bias: Any, cap: Any, *given: Any) -> Any:
    _, options = coefficients(zero, True, *given)
    return f(x, w, y, bias=bias, softcap=cap, ignore_index=-1, **options)

  def case(
    name: str,
    f: Callable[..., Any],
    reference: Callable[..., Any],
    adapted: Callable[..., Any],
    args: tuple[Any, ...],
    *edge_points: tuple[Any, ...],
  ) -> Case:
    f, reference = functools.partial(adapted, f), functools.partial(adapted, reference)
    return Case(name, f, args, reference, {}, edge_points, checks, "float32")

  z, y, weights, weightless, anything, impossible = arrays(20)
  t = _shares(z.shape, "float32")
  inside = (0, smoothing, z_loss, weights)
  at_0, at_1 = (0, zero, zero, weightless), (1, zero, zero, weightless)
  yield case(
    "logsumexp(axis=0, b)",
    softmax_jax.logsumexp,
    _logsumexp,
    by_both,
    (z, t),
    (z, t.at[1:].set(0)),
    (impossible, t.at[2:4].set(0).at[-1].set(0)),
  )
  yield case(
    "softmax_cross_entropy(axis=0, all coefficients, reduction=mean)",
    softmax_jax.softmax_cross_entropy,
    _cross_entropy,
    soft,
    (z, t, all_rows, *inside),
    (z, t.at[:3].set(0), all_rows, *at_0),
    (z, t, all_rows, *at_1),
    (impossible, t, all_rows, 0, zero, z_loss, weights),
    (anything, t.at[0, 0].set(jnp.nan), last_row, *inside),
  )
  x, weight = _logits((rows, 3), "float32", 4), _logits((3, 20), "float32", 3)
  nothing = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2].set(-jnp.inf)
  bias, cap, unlabeled = 0.1 * weights, np.float32(5), jnp.where(last_row, y, -1)
  yield case(
    "linear_softmax_cross_entropy(all coefficients, reduction=mean)",
    softmax_jax.linear_softmax_cross_entropy,
    _linear_cross_entropy,
    linear,
    (x, weight, y, bias, cap, *inside),
    (x.at[1].set(0), weight, y, 0 * bias, cap, *at_0),
    (x, weight, y, bias, cap, *at_1),
    (nothing, weight, unlabeled, bias, cap, *inside),
  )

  z, y, weights, weightless, anything, impossible = arrays(8)
  yield case(
    "softmax_cross_entropy_with_integer_labels(axis=0, all coefficients, reduction=mean)",
    softmax_jax.softmax_cross_entropy_with_integer_labels,
    _integer_cross_entropy,
    integer,
    (z, y, all_rows, 0, smoothing, z_loss, weights),
    (z, y, all_rows, 0, zero, zero, weightless),
    (z, y, all_rows, 1, zero, zero, weightless),
    (impossible, y, all_rows, 0, zero, z_loss, weights),
    (anything, y, last_row, 0, smoothing, z_loss, weights),
    (anything, jnp.where(last_row, y, -1), all_rows, 0, smoothing, z_loss, weights),
  )


def _closed_forms() -> Iterator[Case]:
  """The functions of `softmax_jax.derivatives` beside JAX's autodiff of `jax.nn`."""
  x, v = _logits((4, 8), "float32"), _logits((4, 8), "float32", 5)
  w, t = _logits((4, 8), "float32", 6), _shares((4, 8), "float32")
  nn = jax.nn.softmax
  hessian = _of_rows(jax.hessian, jax.nn.logsumexp)

  def pushed(f: Callable[..., Any], x: Any, dot: Any) -> Any:
    return jax.jvp(f, (x,), (dot,))[1]

  def pulled(x: Any, bar: Any) -> Any:
    return vjp(nn, x)[1](bar)[0]

  def hvp(x: Any, bar: Any, dot: Any) -> Any:
    return pushed(functools.partial(pulled, bar=bar), x, dot)

  found: dict[str, tuple[tuple[jax.Array, ...], Callable[..., Any]]] = {
    "softmax_jacobian": ((x,), _of_rows(jax.jacrev, nn)),
    "softmax_jvp": ((x, v), functools.partial(pushed, nn)),
    "softmax_vjp": ((x, v), pulled),
    "softmax_hvp": ((x, w, v), hvp),
    "log_softmax_jacobian": ((x,), _of_rows(jax.jacrev, jax.nn.log_softmax)),
    "logsumexp_hessian": ((x,), hessian),
    "cross_entropy_gradient": ((x, t), _of_rows(jax.grad, _cross_entropy)),
    "cross_entropy_hessian": ((x,), hessian),
    "cross_entropy_hvp": ((x, v), functools.partial(pushed, _of_rows(jax.grad, jax.nn.logsumexp))),
  }
  for name, (args, reference) in found.items():
    f = getattr(derivatives, name)
    yield Case(f"derivatives.{name}", f, args, reference, {}, (), ("value", "vjp"), "float32")
