"""What `check_derivatives` reports, and when a report has passed."""

import html
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import BESIDE_NUMBERS, X, oscillating, statuses, with_rule

from softmax_jax.verify import DerivativeError, check_derivatives


@pytest.fixture(scope="module")
def failing():
  wrong = with_rule(jnp.sin, lambda x, u: u)
  return check_derivatives(wrong, X, name="wrong sine", checks=["finite_differences", "vjp", "jvp"])


def test_report_of_a_wrong_rule(failing):
  assert not failing
  # The rule is the same in float64, so that vjp agrees with it and proves nothing.
  assert statuses(failing) == {
    "vjp": "skipped",
    "vjp: value": "passed",
    "finite_differences": "failed",
    "jvp": "failed",
  }
  row = failing.failed[-1]
  assert (row.function, row.check, row.dtype, row.shape) == ("wrong sine", "jvp", "float32", (2, 3))
  assert row.error > 1e3 * row.bound
  with pytest.raises(DerivativeError, match=r"^wrong sine:\n +gradient of args\[0\] at ") as error:
    failing.raise_if_failed()
  assert isinstance(error.value, AssertionError)
  assert str(error.value).endswith("\n1 passed, 2 failed, 1 skipped")


def test_report_as_text_data_and_html(failing):
  lines = str(failing).splitlines()
  assert lines[:2] == ["wrong sine:", " failed"]
  assert max(map(len, lines)) <= 80
  assert lines[-1] == "1 passed, 2 failed, 1 skipped"
  data = json.loads(json.dumps(failing.to_dict(), allow_nan=False))
  assert data["passed"] is False
  assert [row["check"] for row in data["rows"]] == list(statuses(failing))
  assert data["rows"][0]["shape"] == [2, 3]
  table = failing._repr_html_()
  assert table.count("<tr") == 5
  assert html.escape("gradient of args[0]") in table


def test_what_is_wrong_is_said_in_a_line():
  twice = with_rule(jnp.sin, lambda x, u: (jnp.cos(x) * u).at[1, 2].multiply(2))
  report = check_derivatives(twice, X, name="sine", checks=["value", "jacobian"])
  lines = str(report).splitlines()
  assert lines[:2] == ["sine:", " failed"]
  right = np.cos(np.float64(X[1, 2]))
  said = f"d out / d args[0] at [1, 2, 1, 2]: got {2 * right:.6g}, expected {right:.6g}"
  assert [row.status for row in report.rows].index("failed") > 0
  # Both modes are wrong in the same way, which is said once.
  assert " ".join(map(str.strip, lines[2:4])) == f"{said} (jacobian: jacfwd, jacobian: jacrev)"
  # Pytest shows 240 characters of what is asserted, in one line.
  assert repr(report).startswith(f"<Report: 1 passed, 2 failed, 1 skipped: {said}")
  assert len(repr(check_derivatives(twice, X))) <= 240
  with pytest.raises(DerivativeError) as error:
    report.raise_if_failed()
  assert str(error.value).startswith(f"sine:\n  {said}")
  assert (
    repr(check_derivatives(jnp.sin, X, checks=["vjp"])) == "<Report: 1 passed, 0 failed, 0 skipped>"
  )


def test_a_wrong_entry_is_found_where_the_jacobian_is_too_large():
  x = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
  f = with_rule(jnp.sin, lambda x, u: (jnp.cos(x) * u).at[23, 7].set(0))
  row = check_derivatives(f, x, checks=["finite_differences"]).failed[0]
  assert (row.of, row.index, row.got) == ("gradient of args[0]", (23, 7), 0)
  y, z = x[:5, :4], x[6:11, :4]
  g = jax.custom_vjp(lambda p, x: (p["w"] * x, x**2))
  g.defvjp(lambda p, x: (g(p, x), (p, x)), lambda r, u: wrong_in_one_entry(*r, *u))
  row = check_derivatives(g, {"w": y}, z, checks=["finite_differences"]).failed[0]
  assert (row.of, row.index) == ("gradient of args[0]['w'] by out[0]", (4, 1))
  assert row.expected == pytest.approx(2 * row.got)


def wrong_in_one_entry(p, x, u, w):
  return {"w": (u * x).at[4, 1].divide(2)}, u * p["w"] + 2 * w * x


def test_errors_of_a_callback_and_those_that_repeat_are_said_once():
  def fails(x):
    raise ValueError("what is wrong")

  f = with_rule(jnp.sin, lambda x, u: jax.pure_callback(fails, x, u))
  report = check_derivatives(f, X, checks=["vjp", "repeated", "linearity", "checkpoint"])
  assert report.failures() == (
    "sin:\n  ValueError: what is wrong (vjp, repeated, linearity, checkpoint)"
  )


def test_an_infinity_is_said_too():
  f = with_rule(jnp.sin, lambda x, u: (jnp.cos(x) * u).at[0, 1].set(jnp.nan))
  row = check_derivatives(f, X, reference=jnp.sin, checks=["vjp"]).failed[0]
  assert str(row).startswith("cotangent of args[0] at [0, 1]: got nan, expected ")


def test_what_no_derivative_confirmed_is_named():
  """One argument or output that was confirmed does not speak for the others."""
  f = lambda x, y: (jnp.sin(x), jnp.maximum(y, 0))
  report = check_derivatives(f, X, 0 * X)
  assert not report.failed
  assert not report
  assert str(report).endswith("not confirmed: args[1], out[1]")
  with pytest.raises(DerivativeError, match="not every derivative was confirmed"):
    report.raise_if_failed()
  assert check_derivatives(f, X, X)
  # The derivative at a tie is a choice, which a reference makes.
  at_tie = check_derivatives(jnp.max, jnp.ones(3), reference=jnp.max).raise_if_failed()
  assert "not confirmed" not in at_tie.summary()


def test_nothing_but_skipped_is_not_passed():
  report = check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["vjp", "jvp"])
  assert set(statuses(report).values()) == {"skipped"}
  assert not report
  with pytest.raises(DerivativeError, match="no argument has a floating dtype"):
    report.raise_if_failed()


def test_finite_differences_take_smaller_steps_where_those_tell_more():
  (row,) = check_derivatives(oscillating(1e5), X, checks=["finite_differences"]).rows
  assert row.status == "failed"
  f = lambda x: x + 1e-3 * jnp.sin(1e5 * x)
  (row,) = check_derivatives(f, X, checks=["finite_differences"]).rows
  assert row.status == "passed"
  assert row.bound < 1e-2


def test_gradient_that_differences_cannot_confirm_is_not_passed():
  """Its own rule is then all there is to compare the gradient with."""
  f = oscillating(1e14)
  for options in ({}, {"checks": ["vjp"]}, {"skip": ["finite_differences"]}):
    report = check_derivatives(f, X, **options)
    assert not report
    reasons = [row.reason for row in report.rows if row.check == "vjp"]
    assert "gradient unconfirmed by finite differences" in reasons[0]
    assert "pass reference=" in reasons[0]
  with pytest.raises(DerivativeError, match="not every derivative was confirmed"):
    check_derivatives(f, X, checks=["vjp", "jit", "structure"]).raise_if_failed()


@pytest.mark.parametrize("check", ["vjp", "jit", "vmap_batch", "scan", "checkpoint"])
def test_gradient_is_confirmed_also_where_finite_differences_are_not_asked_for(check):
  wrong = jax.custom_vjp(jnp.sin)
  wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, u: (0.9 * jnp.cos(x) * u,))
  for options in ({"checks": [check]}, {"checks": [check], "skip": ["finite_differences"]}):
    report = check_derivatives(wrong, X, **options)
    assert not report
    assert "contradicted by finite_differences" in report.rows[0].reason
    assert check_derivatives(jnp.sin, X, **options)


def test_one_argument_without_confirmation_is_not_hidden_by_another():
  f = lambda x, y: x + y + 1e-3 * jnp.sin(1e14 * y)
  rows = check_derivatives(f, X, X[::-1], checks=["vjp"]).rows
  found = {row.of: row.status for row in rows if row.of.startswith("cotangent")}
  assert found["cotangent of args[1]"] == "skipped"
  assert found.get("cotangent of args[0]", "passed") == "passed"


def test_derivative_that_cancels_to_zero_is_confirmed():
  """The sum of a softmax is always 1, so that finite differences see nothing but rounding."""
  check_derivatives(lambda x: jnp.sum(jax.nn.softmax(x)), X).raise_if_failed()
  wrong = with_rule(lambda x: jnp.sum(jax.nn.softmax(x)), lambda x, u: u + 1e-4 * x)
  assert check_derivatives(wrong, X, checks=["finite_differences"]).failed


def test_derivative_that_is_zero_everywhere_is_confirmed():
  rounded = lambda x: jnp.round(x)
  check_derivatives(rounded, X).raise_if_failed()
  straight_through = with_rule(rounded, lambda x, u: u)
  assert check_derivatives(straight_through, X, checks=["finite_differences"]).failed
  assert check_derivatives(
    straight_through, X, reference=lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)
  )


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("f", [jax.nn.relu, jnp.log, jnp.floor], ids=["kinks", "NaN", "jumps"])
def test_points_without_a_derivative_prove_nothing(f):
  wrong = jax.custom_vjp(f)
  wrong.defvjp(lambda x: (f(x), x), lambda x, u: (7 * jnp.sign(x + 1) * u,))
  x = -jnp.ones((2, 3)) if f is jnp.log else jnp.zeros((2, 3))
  for g in (f, wrong):
    report = check_derivatives(g, x)
    assert not report
    passed = {row.check for row in report.rows if row.status == "passed"}
    own = {"vjp: value", "dot_product", "linearity", "repeated"}
    # Elsewhere in a batch there is a derivative, which the right rule gives.
    assert g is f or passed <= {"value", *own, *BESIDE_NUMBERS}


@pytest.mark.without("debug_nans")
def test_output_that_is_nowhere_finite_does_not_pass_beside_another():
  f = lambda x: (jnp.sin(x), jnp.log(-1 - x**2))
  report = check_derivatives(f, X, checks=["value", "vjp", "each_output", "finite_differences"])
  assert not report.failed
  assert not report
  assert report.summary().endswith("not confirmed: out[1]")
  assert not any("out[1]" in row.of for row in report.rows if row.status == "passed")


def test_value_alone_can_be_asked_for():
  assert check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["value"])
  assert not check_derivatives(lambda n: n + 1, jnp.arange(3))
  assert not check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["value", "vjp"])


def test_every_function_of_a_sum_needs_a_derivative_that_passed():
  right = check_derivatives(jnp.sin, X, checks=["vjp"], name="right")
  unknown = check_derivatives(oscillating(1e14), X, checks=["vjp"], name="unknown")
  assert right + right
  assert not right + unknown
