"""The bounds of the checks, and the error of finite differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import X, with_rule

from softmax_jax import softmax
from softmax_jax.verify import bounds, check_derivatives
from softmax_jax.verify.oracle import Oracle
from softmax_jax.verify.problem import Problem


def test_bounds_do_not_grow_with_the_array():
  rows = [
    check_derivatives(softmax, jnp.full((n, 16), X[0, 0]), checks=["vjp"]).rows[0]
    for n in (1, 4096)
  ]
  assert rows[1].bound < 2 * rows[0].bound < 1e-5


@pytest.mark.parametrize(
  "f",
  [jax.scipy.special.digamma, jax.scipy.special.gammaln, jax.scipy.special.erfinv],
  ids=["digamma", "gammaln", "erfinv"],
)
def test_a_series_is_right_to_some_ten_units(f):
  x = np.random.default_rng(3).uniform(0.2, 0.9, (4, 6)).astype(np.float32)
  checks = ["vjp", "finite_differences", "jvp", "jacobian"]
  check_derivatives(f, x, checks=checks).raise_if_failed()
  wrong = with_rule(f, lambda x, u: (1 + 1e-5) * jax.vjp(f, x)[1](u)[0])
  assert check_derivatives(wrong, x, checks=["finite_differences"]).failed
  (row,) = check_derivatives(wrong, x, reference=f, checks=["vjp"]).failed
  assert row.error == pytest.approx(1e-5, rel=0.2)


def test_bounds_can_be_overridden():
  check = functools.partial(check_derivatives, softmax, X, checks=["vjp"])
  (row,) = check(bounds={"vjp": 1e-12}).failed
  assert row.bound == pytest.approx(1e-12)
  assert check(bounds={"vjp": 1e-3}).rows[0].bound == pytest.approx(1e-3)


def test_condition_is_not_held_against_a_function():
  """In a sum of large terms that cancel, rounding is as large as the result."""
  f = lambda x: jnp.sum(jnp.array([1e6, -1e6, 1.0]) * x, axis=-1)
  check_derivatives(f, jnp.array([1.0, 1.0, 1e-3])).raise_if_failed()
  (row,) = check_derivatives(f, jnp.array([1.0, 1.0, 1e-3]), checks=["value"]).rows
  assert row.status == "skipped" or row.bound > 1e-4


def differences(f, x, v=None):
  """The derivatives of f at x along v, or along ones, and the errors that they may have."""
  problem = Problem(f, (x,), {})
  v = np.ones_like(x) if v is None else v
  (dot,), (slack,) = Oracle(problem, None).differences(problem.point(), [v])
  return dot, slack


def judge(errors, expected, **options):
  settings = {"dtype": np.float32, "unit": 2.0**-24, "size": np.size(expected)} | options
  return bounds.judge(
    [np.float64(e) for e in errors], np.float64(expected), np.zeros(np.shape(expected)), **settings
  )


def test_judge_finds_a_slice_and_an_infinity():
  expected = np.ones((1, 1000, 40))
  error = np.zeros_like(expected)
  error[0, 123, 7] = 1e-3  # 5e-6 of the whole, 1.6e-4 of the row
  verdict = judge([error, error], expected)
  assert not verdict.passed
  assert verdict.index == (123, 7)
  error[0, 5, 6] = math.nan
  assert judge([error, error], expected).index == (5, 6)
  assert judge([0 * expected] * 2, expected).passed


def test_judge_says_when_noise_hides_everything():
  expected = np.ones((1, 1000))
  noise = np.random.default_rng(0).standard_normal((3, 1, 1000))
  verdict = judge(list(noise), expected)
  assert verdict.passed
  assert verdict.useless


@pytest.mark.parametrize(
  ("f", "derivative", "known"),
  [
    (jnp.sin, np.cos, 1e-10),
    (jnp.exp, np.exp, 1e-10),
    (lambda x: jnp.sqrt(jnp.abs(x)), lambda x: np.sign(x) / (2 * np.sqrt(np.abs(x))), 1e-8),
    (lambda x: jnp.sin(x.astype(jnp.float32)), np.cos, 1e-3),
  ],
  ids=["sin", "exp", "root", "float32 inside"],
)
def test_finite_differences_know_their_error(f, derivative, known):
  x = np.linspace(-2, 2, 40).astype(np.float32)
  dot, slack = differences(f, x)
  error = np.abs(dot - derivative(np.float64(x)))
  judged = np.isfinite(dot)
  assert judged.mean() > 0.8
  assert np.all(error[judged] <= slack[judged] + 1e-12)
  assert np.linalg.norm(error[judged]) < known * np.linalg.norm(dot[judged])


def test_finite_differences_leave_kinks_out():
  x = np.float32([-1, -1e-5, 0, 1e-5, 1])
  dot, _ = differences(jax.nn.relu, x)
  np.testing.assert_array_equal(np.isnan(dot), [False, False, True, False, False])
  np.testing.assert_allclose(dot[[0, 1, 3, 4]], [0, 0, 1, 1], atol=1e-10)


def test_finite_differences_leave_kinks_out_along_a_small_tangent():
  """Beside others that are large."""
  x, v = np.float32([0, 1, 2, 3]), np.float32([1e-4, 1, 1, 1])
  for f in (jax.nn.relu, lambda x: jax.nn.relu(x) + jnp.sin(x)):
    dot, _ = differences(f, x, v)
    np.testing.assert_array_equal(np.isnan(dot), [True, False, False, False])


def test_finite_differences_of_huge_arguments_know_that_they_know_nothing():
  x = np.float32([1e17, 1e18])
  dot, slack = differences(jnp.square, x)
  assert np.all(np.abs(dot - 2 * np.float64(x)) <= slack)
