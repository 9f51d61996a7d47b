"""Right functions of every scale, at the end of their domain and at kinks pass; wrong ones fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import with_rule

from softmax_jax.verify import check_derivatives
from softmax_jax.verify.oracle import Oracle
from softmax_jax.verify.problem import Problem

V = np.random.default_rng(1).standard_normal(5).astype(np.float32)
CHECKS = ("vjp", "finite_differences", "jvp", "jacobian", "vmap_batch", "second_order")
POWERS = (-20, -8, 8, 20)
OF_SCALE = {
  "affine": lambda x, scale: 2 * x + 1,
  "abs": lambda x, scale: jnp.abs(x),
  "product": lambda x, scale: x * np.float32(3),
  "tanh": lambda x, scale: jnp.tanh(x / scale),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", OF_SCALE)
def test_a_function_of_any_scale(name, power):
  scale = np.float32(10.0**power)
  f = lambda x: OF_SCALE[name](x, scale)
  checks = CHECKS if name == "tanh" else CHECKS[:-1]
  right = check_derivatives(f, V * scale, checks=checks)
  right.raise_if_failed()
  passed = {row.check for row in right.rows if row.status == "passed"}
  assert {"vjp", "finite_differences", "jvp"} <= passed
  # At 1e20 the affine function is 2 x to all digits, and at 1e-20 it is 1.
  wrong = with_rule(f, lambda x, u: 1.01 * jax.vjp(f, x)[1](u)[0])
  assert not check_derivatives(wrong, V * scale, checks=["finite_differences"])


@pytest.mark.parametrize("power", (-12, -8, 0, 1))
def test_softmax_of_any_scale(power):
  check_derivatives(jax.nn.softmax, V * np.float32(10.0**power), checks=CHECKS).raise_if_failed()


SMALL = np.float32([[1e-9, 0.3, 0.7, 1e-4], [1e-5, 0.2, 0.8, 1e-12]])
IN_DOMAIN = {
  "root": (lambda x: jnp.sqrt(x - 1), np.float32([1.000001, 2])),
  "entropy": (lambda p: -jnp.sum(p * jnp.log(p), axis=-1), SMALL),
  "log": (lambda p: jnp.log(p + 1e-6), SMALL),
  "log of many scales": (jnp.log, np.float32([1e-10, 1e-3, 1, 1e4])),
  "arc sine": (jnp.arcsin, np.float32([0.99999, -0.9999, 0.5])),
  "cholesky": (
    lambda a: jnp.linalg.cholesky(a),
    np.float32([[1 / (i + j + 1) for j in range(4)] for i in range(4)]),
  ),
}


@pytest.mark.parametrize("name", IN_DOMAIN)
def test_steps_stay_in_the_domain(name):
  f, x = IN_DOMAIN[name]
  report = check_derivatives(f, x, checks=CHECKS).raise_if_failed()
  assert not any(np.isnan(row.bound) for row in report.rows if row.status == "passed")
  for factor in (1.01, jnp.ones_like(x).at[..., 0].set(1.05)):  # of all, or of an entry at the end
    wrong = with_rule(f, lambda x, u, c=factor: c * jax.vjp(f, x)[1](u)[0])
    assert check_derivatives(wrong, x, checks=["finite_differences"]).failed


def test_differences_never_claim_more_than_they_know():
  """At distances from a kink or the end of the domain, and at frequencies, of all magnitudes."""
  distance = np.float32(10.0 ** -np.arange(0, 13))
  for f, derivative in (
    (lambda x: jnp.abs(x), lambda x: np.sign(x)),
    (lambda x: jnp.sqrt(x), lambda x: 0.5 / np.sqrt(x)),
    (lambda x: jnp.maximum(x, 0) ** 2 + jnp.sin(1024 * x), None),
  ):
    problem = Problem(f, (distance,), {})
    for v in (np.ones_like(distance), distance):
      (dot,), (slack,) = Oracle(problem, None).differences(problem.point(), [v])
      x = np.float64(distance)
      exact = derivative(x) if derivative else 2 * x + 1024 * np.cos(1024 * x)
      known = np.isfinite(dot)
      assert known.mean() > 0.6
      assert np.all(
        np.abs(dot - exact * v)[known] <= slack[known] + 1e-12 * np.abs(exact * v)[known]
      )


def mlp(weights, x):
  for w, b in weights[:-1]:
    x = jax.nn.relu(x @ w + b)
  w, b = weights[-1]
  return x @ w + b


@pytest.mark.parametrize("seed", range(4))
def test_second_order_of_a_network_with_kinks(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  weights = [(draw(3, 8), draw(8)), (draw(8, 8), draw(8)), (draw(8, 2), draw(2))]
  checks = ["finite_differences", "second_order"]
  check_derivatives(mlp, weights, draw(3, 3), checks=checks, seed=seed).raise_if_failed()
