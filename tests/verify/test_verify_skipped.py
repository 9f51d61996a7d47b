"""Checks that do not apply are skipped, with the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import X, statuses, with_rule

from softmax_jax import softmax
from softmax_jax.verify import check_derivatives


def test_no_forward_mode_is_skipped_with_its_reason():
  rule = jax.custom_vjp(jnp.sin)
  rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, u: (jnp.cos(x) * u,))
  report = check_derivatives(rule, X).raise_if_failed()
  skipped = {row.check: row.reason for row in report.rows if row.status == "skipped"}
  for check in ("jvp", "dot_product", "jacobian: jacfwd"):
    assert "no forward mode" in skipped[check]


def test_no_reverse_mode_is_skipped_with_its_reason():
  f = lambda x: jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y + jnp.exp(y), x)
  report = check_derivatives(f, np.abs(X))
  assert not report.failed
  assert statuses(report)["jvp"] == "passed"
  assert {row.reason for row in report.rows if row.check == "vjp"} == {"f has no reverse mode"}


class Silent(Exception):
  def __str__(self):
    raise ValueError("no words")


@pytest.mark.parametrize(
  "error, reason",
  [
    (ValueError("shapes are wrong\nand more"), "ValueError: shapes are wrong"),
    (Silent(), "Silent"),
  ],
)
def test_error_in_a_rule_is_a_failure_and_does_not_end_the_others(error, reason):
  def bwd(x, u):
    raise error

  report = check_derivatives(with_rule(jnp.sin, bwd), X, checks=["value", "vjp", "scan"])
  assert statuses(report) == {"value": "passed", "vjp": "failed", "scan": "failed"}
  assert report.failed[0].reason == reason


def test_function_that_refuses_float64():
  def f(x):
    assert x.dtype == jnp.float32
    return jnp.sin(x)

  checks = ["value", "vjp", "finite_differences"]
  report = check_derivatives(f, X, checks=checks).raise_if_failed()
  assert statuses(report) == dict.fromkeys(checks, "passed")
  assert report.rows[-1].bound < 1e-5  # It is traced in float32 and evaluated in float64.
  wrong = with_rule(f, lambda x, u: jnp.cos(x) * u * (1 + 1e-5))
  assert "finite_differences" in {row.check for row in check_derivatives(wrong, X).failed}


def test_implicit_derivatives_of_random_numbers_are_not_those_of_differences():
  draw = lambda key, a: jax.random.gamma(key, a)
  report = check_derivatives(draw, jax.random.key(0), X**2 + 1, checks=["vjp", "jvp"])
  assert not report.failed
  assert not report
  assert all("jax.random.gamma" in row.reason for row in report.rows if row.status == "skipped")


def test_float64_needs_no_reference():
  with jax.enable_x64(True):
    x = X.astype(np.float64)
    report = check_derivatives(softmax, x, checks=["vjp", "finite_differences", "scan"])
    assert statuses(report) == {
      "vjp": "skipped",
      "vjp: value": "passed",
      "finite_differences": "passed",
      "scan": "passed",
    }
    assert check_derivatives(softmax, x, reference=jax.nn.softmax, checks=["vjp"])
