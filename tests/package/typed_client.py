"""A user's program with types: tests/package/test_types.py has it checked by pyright, and runs it.

What JAX's own transformations return has no type, so the program gives them theirs.
"""

from collections.abc import Callable
from typing import Literal, ParamSpec, Protocol, TypeVar, assert_type, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softmax_jax as sj
from softmax_jax import (
  CrossEntropyAux,
  derivatives,
  enable_forward_mode,
  linear_softmax_cross_entropy,
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)
from softmax_jax.verify import CHECKS, DerivativeError, Report, Row, check_derivatives

P = ParamSpec("P")
R = TypeVar("R")


class Transformation(Protocol):
  def __call__(self, f: Callable[P, R], /) -> Callable[P, R]: ...


jit = cast(Transformation, jax.jit)
grad = cast(Transformation, jax.grad)
jacfwd = cast(Transformation, jax.jacfwd)
jacrev = cast(Transformation, jax.jacrev)


def loss(weights: Array, x: Array, labels: Array) -> Array:
  losses = softmax_cross_entropy_with_integer_labels(x @ weights, labels, label_smoothing=0.1)
  return assert_type(losses, Array).mean()


@jit
def step(weights: Array, x: Array, labels: Array) -> tuple[Array, Array]:
  value, gradient = jax.value_and_grad(loss)(weights, x, labels)
  return weights - 0.5 * gradient, value


def train(x: Array, labels: Array, steps: int) -> tuple[Array, list[float]]:
  weights = jnp.zeros((x.shape[-1], 3))
  losses: list[float] = []
  for _ in range(steps):
    weights, value = step(weights, x, labels)
    losses.append(float(value))
  return weights, losses


def map_over_a_batch(logits: Array, labels: Array) -> Array:
  assert_type(jax.vmap(softmax)(logits), Array)
  assert_type(jax.vmap(softmax_cross_entropy)(logits, softmax(logits)), Array)
  gradients = jax.vmap(grad(softmax_cross_entropy_with_integer_labels))(logits, labels)
  return assert_type(gradients, Array)


def verify_jacobians(x: Array) -> Array:
  forward, backward = jacfwd(softmax)(x), jacrev(softmax)(x)
  closed = assert_type(derivatives.softmax_jacobian(x), Array)
  assert_type(sj.derivatives.softmax_jacobian(x), Array)
  assert_type(sj.verify.check_derivatives(softmax, x), Report)
  return jnp.abs(jnp.stack([forward, backward]) - closed).max()


def cube_fwd(x: Array) -> tuple[Array, Array]:
  return x**3, x


def cube_bwd(x: Array, y_bar: Array) -> tuple[Array]:
  return (3 * x**2 * y_bar,)


def cube_tangent(x: Array, args_dot: tuple[Array]) -> Array:
  return 3 * x**2 * args_dot[0]


@enable_forward_mode
@jax.custom_vjp
def cube(x: Array) -> Array:
  return x**3


cube.defvjp(cube_fwd, cube_bwd)


@jax.custom_vjp
def reverse_cube(x: Array) -> Array:
  return x**3


reverse_cube.defvjp(cube_fwd, cube_bwd)


def with_a_tangent(rule: Callable[[Array], Array], x: Array) -> Array:
  both_modes = enable_forward_mode(rule, tangent=cube_tangent)
  assert_type(both_modes(x), Array)
  return jacfwd(both_modes)(x)


def inputs(flag: bool, reduction: Literal["none", "mean"]) -> Array:
  """The types that array, axis and option arguments accept."""
  assert_type(softmax(np.ones((2, 3), np.float32), axis=(0, 1), where=True), Array)
  assert_type(log_softmax(np.float32(1), axis=None), Array)
  assert_type(logsumexp(1.0), Array)
  assert_type(logsumexp(jnp.ones(3), keepdims=flag, b=2), Array)
  log, sign = assert_type(logsumexp(jnp.ones(3), return_sign=True), tuple[Array, Array])
  assert_type(logsumexp(jnp.ones(3), return_sign=flag), Array | tuple[Array, Array])
  logits, soft = jnp.ones((2, 3)), jnp.full((2, 3), 1 / 3)
  total = softmax_cross_entropy(logits, soft, -1, flag, z_loss=1e-4, reduction=reduction)
  return assert_type(total, Array).sum() + log * sign


def losses_with_aux(logits: Array, labels: Array, flag: bool) -> Array:
  hard = softmax_cross_entropy_with_integer_labels(
    logits, labels, class_weights=jnp.ones(3), ignore_index=-100, reduction="sum", return_aux=True
  )
  soft = softmax_cross_entropy(logits, softmax(logits), z_loss=jnp.ones(()), return_aux=True)
  either = softmax_cross_entropy_with_integer_labels(logits, labels, return_aux=flag)
  assert_type(either, Array | tuple[Array, CrossEntropyAux])
  assert_type(hard, tuple[Array, CrossEntropyAux])
  value, aux = assert_type(soft, tuple[Array, CrossEntropyAux])
  assert_type(aux.z_loss, Array)
  return value + assert_type(aux.nll, Array) + aux.lse * aux.weight


def linear(x: Array, weight: Array, labels: Array) -> Array:
  total = linear_softmax_cross_entropy(x, weight, labels, vocab_axis=0, softcap=30, chunk_size=2)
  weighted, aux = linear_softmax_cross_entropy(
    x,
    weight,
    labels,
    vocab_axis=0,
    sample_weights=jnp.ones(3),
    logit_scale=0.5,
    ignore_invalid=True,
    return_aux=True,
  )
  assert_type(aux.correct, Array | None)
  return assert_type(total, Array) + assert_type(weighted, Array) * aux.weight


def divergences(logits: Array, target: Array, reduction: Literal["none", "mean"]) -> Array:
  assert_type(softmax_entropy(logits, (0, 1), where=True), Array)
  total = softmax_kl_divergence(logits, target, temperature=2, reduction=reduction)
  return assert_type(total, Array)


def closed_forms(x: Array) -> list[Array]:
  forms = [
    derivatives.softmax_jvp(x, x),
    derivatives.softmax_vjp(x, x),
    derivatives.softmax_hvp(x, x, x),
    derivatives.log_softmax_jacobian(x),
    derivatives.logsumexp_hessian(x),
    derivatives.cross_entropy_gradient(x, 0),
    derivatives.cross_entropy_hessian(x),
    derivatives.cross_entropy_hvp(x, x),
  ]
  return assert_type(forms, list[Array])


def report_on(f: Callable[[Array], Array], x: Array) -> str:
  report = check_derivatives(f, x, reference=f, checks=["vjp", "jvp"], bounds={"vjp": 1e-5})
  try:
    assert_type(report, Report).raise_if_failed()
  except DerivativeError as error:
    return str(error)
  for row in assert_type(report.rows, tuple[Row, ...]):
    assert_type(row.status, Literal["passed", "failed", "skipped"])
    assert row.check in CHECKS
  return report.summary() if report else assert_type(str(report), str)


def main() -> None:
  x, labels = jnp.eye(3, 4), jnp.arange(3)
  weights, losses = train(x, labels, steps=2)
  assert losses[1] < losses[0]
  logits = x @ weights
  assert map_over_a_batch(logits, labels).shape == (3, 3)
  assert verify_jacobians(logits[0]) < 1e-6
  assert jacfwd(cube)(jnp.float32(2)) == 12
  assert with_a_tangent(cast(Callable[[Array], Array], reverse_cube), jnp.float32(2)) == 12
  assert inputs(True, "mean").shape == ()
  assert losses_with_aux(logits, labels, False).shape == (3,)
  assert linear(x, weights.T, labels).shape == ()
  assert len(closed_forms(logits[0])) == 8
  assert report_on(softmax, logits[0]) == "2 passed, 0 failed, 0 skipped"
