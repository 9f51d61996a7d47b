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

DTYPES = ("float32", "float64", "bfloat16", "float16")
# What may differ in other dtypes and shapes; all else is looked at in float32.
_ESSENTIAL = ("value", "vjp")


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

  def run(self, seed: int = 0) -> Report:
    """Its report."""
    with jax.enable_x64(self.dtype == "float64" or jax.config.jax_enable_x64):
      return check_derivatives(
        self.f,
        *self.args,
        reference=self.reference,
        kwargs=self.kwargs,
        edge_points=self.edge_points,
        checks=self.checks,
        name=self.name,
        seed=seed,
      )


# --- references, in plain JAX ---------------------------------------------------------------------

_REDUCE = {"none": lambda x: x, "sum": jnp.sum, "mean": jnp.mean}


def _cross_entropy(
  logits, t, axis=-1, label_smoothing=0.0, z_loss=0.0, class_weights=None, reduction="none", **_
):
  log_a = jax.nn.log_softmax(logits, axis=axis)
  num_classes = logits.shape[axis]
  weights = jnp.ones(num_classes) if class_weights is None else class_weights
  shape = [1] * logits.ndim
  shape[axis] = num_classes
  weights = jnp.reshape(weights, shape)
  t = (1 - label_smoothing) * t + label_smoothing / num_classes
  cost = jnp.where(t == 0, 0, log_a)  # 0 log 0 = 0
  loss = -jnp.sum(t * weights * cost, axis=axis)
  loss += z_loss * jax.nn.logsumexp(logits, axis=axis) ** 2
  return _REDUCE[reduction](loss)


def _integer_cross_entropy(logits, labels, axis=-1, reduction="none", **options):
  is_label = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=logits.dtype)
  losses = _cross_entropy(logits, is_label, axis, **options)
  if reduction != "mean" or options.get("class_weights") is None:
    return _REDUCE[reduction](losses)
  return jnp.sum(losses) / jnp.sum(options["class_weights"][labels])


def _linear_cross_entropy(x, weight, labels, bias=0.0, reduction="mean", **options):
  return _integer_cross_entropy(x @ weight + bias, labels, reduction=reduction, **options)


def _nn_jacobian(x):
  return jax.vmap(jax.jacrev(jax.nn.softmax))(x)


# --- cases ----------------------------------------------------------------------------------------


def _logits(shape, dtype, seed=0):
  return jnp.asarray(2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def _labels(rows, num_classes):
  return jnp.asarray(np.random.default_rng(1).integers(0, num_classes - 1, rows), "int32")


def _shares(shape, dtype):
  return jnp.asarray(np.random.default_rng(2).uniform(0.1, 1, shape), dtype)


def _edge(x: jax.Array) -> jax.Array:
  """A row with a logit of -inf, and one far from the others."""
  return x.at[0, -1].set(-jnp.inf).at[-1, 0].set(50)


def _of_dtype(dtype: str, checks: tuple[str, ...] | None, shape: tuple[int, int]) -> Iterator[Case]:
  rows, num_classes = shape
  x, t, y = _logits(shape, dtype), _shares(shape, dtype), _labels(rows, num_classes)

  def case(name, f, args, reference, edge_points=(), only=None, **kwargs):
    options = ", ".join(f"{k}={v}" for k, v in kwargs.items() if not hasattr(v, "shape"))
    name = f"{name}({options})" if options else name
    return Case(name, f, args, reference, kwargs, edge_points, only or checks, dtype)

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
  x, t, y = _logits((8, 4), "float32"), _shares((8, 4), "float32"), _labels((4,), 8)
  b, weights = _shares((8, 4), "float32"), jnp.arange(1.0, 9.0, dtype="float32")
  checks = ("value", "vjp", "jvp")

  def case(name, args, reference, **kwargs):
    options = ", ".join(k if hasattr(v, "shape") else f"{k}={v}" for k, v in kwargs.items())
    f = getattr(softmax_jax, name)
    return Case(f"{name}({options})", f, args, reference, kwargs, (), checks, "float32")

  mask = t > 0.3
  for name in ("softmax", "log_softmax"):
    yield case(name, (x,), getattr(jax.nn, name), axis=0)
  yield case("softmax", (x,), jax.nn.softmax, axis=0, where=mask)
  # By both arguments, the second being `b`.
  yield Case(
    "logsumexp(axis=0, b)",
    lambda a, b: softmax_jax.logsumexp(a, axis=0, b=b),
    (x, b),
    lambda a, b: jax.nn.logsumexp(a, axis=0, b=b),
    {},
    (),
    checks,
    "float32",
  )

  def with_coefficients(f, z, second, smoothing, z_loss, weights):
    coefficients = {"label_smoothing": smoothing, "z_loss": z_loss, "class_weights": weights}
    return f(z, second, 0, reduction="mean", **coefficients)

  for name, second, reference in (
    ("softmax_cross_entropy", t, _cross_entropy),
    ("softmax_cross_entropy_with_integer_labels", y, _integer_cross_entropy),
  ):
    f = getattr(softmax_jax, name)

    yield Case(
      f"{name}(axis=0, all coefficients, reduction=mean)",
      functools.partial(with_coefficients, f),
      (x, second, np.float32(0.1), np.float32(1e-2), weights),
      functools.partial(with_coefficients, _positional(reference)),
      {},
      (),
      checks,
      "float32",
    )


def _positional(reference):
  return lambda z, second, axis, **kwargs: reference(z, second, axis=axis, **kwargs)


def _closed_forms() -> Iterator[Case]:
  """The functions of `softmax_jax.derivatives` beside JAX's autodiff of `jax.nn`."""
  x, v = _logits((4, 8), "float32"), _logits((4, 8), "float32", 5)
  w, t = _logits((4, 8), "float32", 6), _shares((4, 8), "float32")
  nn = jax.nn.softmax
  along = lambda f: lambda x, dot: jax.jvp(f, (x,), (dot,))[1]
  pulled = lambda x, bar: jax.vjp(nn, x)[1](bar)[0]
  lse = lambda x: jax.nn.logsumexp(x, axis=-1)
  gradient = lambda x, t: jax.grad(lambda x: jnp.sum(_cross_entropy(x, t)))(x)
  hessian = jax.vmap(jax.hessian(jax.nn.logsumexp))
  found = {
    "softmax_jacobian": ((x,), _nn_jacobian),
    "softmax_jvp": ((x, v), along(nn)),
    "softmax_vjp": ((x, v), pulled),
    "softmax_hvp": ((x, w, v), lambda x, bar, dot: along(lambda x: pulled(x, bar))(x, dot)),
    "log_softmax_jacobian": ((x,), jax.vmap(jax.jacrev(jax.nn.log_softmax))),
    "logsumexp_hessian": ((x,), hessian),
    "cross_entropy_gradient": ((x, t), gradient),
    "cross_entropy_hessian": ((x,), hessian),
    "cross_entropy_hvp": ((x, v), along(jax.vmap(jax.grad(lambda x: lse(x))))),
  }
  for name, (args, reference) in found.items():
    f = getattr(derivatives, name)
    yield Case(f"derivatives.{name}", f, args, reference, {}, (), ("value", "vjp"), "float32")
