"""`check_derivatives`: what each check finds, skips and reports."""

import functools
import html
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmax_jax import derivatives, enable_forward_mode, log_softmax, softmax
from softmax_jax.verify import CHECKS, DerivativeError, bounds, check_derivatives, describe_checks
from softmax_jax.verify.oracle import Oracle
from softmax_jax.verify.problem import Problem

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


BESIDE_NUMBERS = ("structure", "residuals", "traces")
MODES = ("forward", "reverse")
ORDERS = [f"{a} over {b}" for a in MODES for b in MODES]


def statuses(report):
  return {row.check: row.status for row in report.rows}


def with_rule(f, bwd, fwd=None):
  """The function f of one array with the rule bwd(x, u) and forward mode."""
  rule = jax.custom_vjp(f)
  rule.defvjp(fwd or (lambda x: (f(x), x)), lambda x, u: (bwd(x, u),))
  return enable_forward_mode(rule)


# --- the report ----------------------------------------------------------------------------------


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
  with pytest.raises(DerivativeError, match=r"wrong sine +finite_differences .*failed") as error:
    failing.raise_if_failed()
  assert isinstance(error.value, AssertionError)
  assert "passed: " not in str(error.value)


def test_report_as_text_data_and_html(failing):
  lines = str(failing).splitlines()
  assert lines[0].split()[:2] == ["function", "check"]
  assert lines[-1] == "1 passed, 2 failed, 1 skipped"
  data = json.loads(json.dumps(failing.to_dict(), allow_nan=False))
  assert data["passed"] is False
  assert [row["check"] for row in data["rows"]] == list(statuses(failing))
  assert data["rows"][0]["shape"] == [2, 3]
  table = failing._repr_html_()
  assert table.count("<tr") == 5
  assert html.escape("<cotangent, tangent> of args[0]") in table


def test_nothing_but_skipped_is_not_passed():
  report = check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["vjp", "jvp"])
  assert set(statuses(report).values()) == {"skipped"}
  assert not report
  with pytest.raises(DerivativeError, match="no argument has a floating dtype"):
    report.raise_if_failed()


def oscillating(frequency):
  """x + 1e-3 sin(frequency x) with half of its gradient."""
  f = lambda x: x + 1e-3 * jnp.sin(frequency * x)
  half = lambda x: 0.5 * (1 + 1e-3 * frequency * jnp.cos(frequency * x))
  return with_rule(f, lambda x, u: half(x) * u)


def test_finite_differences_take_smaller_steps_where_those_tell_more():
  (row,) = check_derivatives(oscillating(1e5), X, checks=["finite_differences"]).rows
  assert row.status == "failed"
  f = lambda x: x + 1e-3 * jnp.sin(1e5 * x)
  (row,) = check_derivatives(f, X, checks=["finite_differences"]).rows
  assert row.status == "passed"
  assert row.bound < 1e-2


def test_gradient_that_differences_cannot_confirm_is_not_passed():
  """Then the rule of f is all there is to compare its gradient with."""
  f = oscillating(1e9)
  for options in ({}, {"checks": ["vjp"]}, {"skip": ["finite_differences"]}):
    report = check_derivatives(f, X, **options)
    assert not report
    reasons = [row.reason for row in report.rows if row.check == "vjp"]
    assert "gradient unconfirmed by finite differences" in reasons[0]
    assert "pass reference=" in reasons[0]
  with pytest.raises(DerivativeError, match="no derivative was confirmed"):
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
  f = lambda x, y: x + y + 1e-3 * jnp.sin(1e9 * y)
  rows = check_derivatives(f, X, X[::-1], checks=["vjp"]).rows
  found = {row.of: row.status for row in rows if row.of.startswith("cotangent")}
  assert found["cotangent of args[1]"] == "skipped"
  assert found.get("cotangent of args[0]", "passed") == "passed"


def test_derivative_that_cancels_to_zero_is_confirmed():
  """The sum of a softmax is 1, whatever its argument; rounding is all that differences see."""
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
    assert passed <= {"value", "vjp: value", "dot_product", "linearity", *BESIDE_NUMBERS}


@pytest.mark.without("debug_nans")
def test_output_that_is_nowhere_finite_does_not_pass_beside_another():
  f = lambda x: (jnp.sin(x), jnp.log(-1 - x**2))
  report = check_derivatives(f, X, checks=["value", "vjp", "each_output", "finite_differences"])
  report.raise_if_failed()
  assert not any("out[1]" in row.of for row in report.rows if row.status == "passed")


def test_value_alone_can_be_asked_for():
  assert check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["value"])
  assert not check_derivatives(lambda n: n + 1, jnp.arange(3))
  assert not check_derivatives(lambda n: n + 1, jnp.arange(3), checks=["value", "vjp"])


def test_every_function_of_a_sum_needs_a_derivative_that_passed():
  right = check_derivatives(jnp.sin, X, checks=["vjp"], name="right")
  unknown = check_derivatives(oscillating(1e9), X, checks=["vjp"], name="unknown")
  assert right + right
  assert not right + unknown


# --- what each check finds -----------------------------------------------------------------------


def test_every_check_passes_on_softmax_with_everything_given():
  report = check_derivatives(
    softmax,
    X,
    reference=jax.nn.softmax,
    jacobian=lambda x: (
      jax.vmap(jax.jacfwd(jax.nn.softmax))(x)[:, :, None] * np.eye(2)[:, None, :, None]
    ),
    edge_points=[(np.float32([[0, -np.inf, 1], [90, 0, 1]]),)],
    max_residual_bytes=0,
  )
  report.raise_if_failed()
  skipped = [row.check for row in report.rows if row.status == "skipped"]
  assert skipped == ["each_output", "each_argument", "finite_differences"]
  assert {row.check.partition(":")[0] for row in report.rows} == set(CHECKS)


def test_what_is_compiled_is_checked_where_jit_is_disabled():
  with jax.disable_jit():
    report = check_derivatives(jnp.sin, X, checks=["vjp", "jit", "traces"])
  assert statuses(report) == dict.fromkeys(("vjp", "jit", "traces"), "passed")


def test_closed_form_is_compared():
  x, checks = X[0], ["jacobian"]
  right = check_derivatives(softmax, x, jacobian=derivatives.softmax_jacobian, checks=checks)
  right.raise_if_failed()
  wrong = check_derivatives(
    log_softmax, x, jacobian=lambda x: jax.jacfwd(log_softmax)(x).T, checks=checks
  )
  assert [row.check for row in wrong.failed] == ["jacobian: closed form"]


def test_transposed_square_jacobian_is_found():
  matrix = np.float32([[1, 2], [3, 4]])
  f = with_rule(lambda x: matrix @ x, lambda x, u: matrix @ u)
  report = check_derivatives(f, X[0, :2], checks=["jacobian"])
  assert {row.check for row in report.failed} == {"jacobian: jacfwd", "jacobian: jacrev"}


def test_linearity_finds_a_rule_that_is_not_linear():
  for bwd in (lambda x, u: jnp.cos(x) * jnp.abs(u), lambda x, u: jnp.cos(x) * u + 1e-3):
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, u, bwd=bwd: (bwd(x, u),))
    assert statuses(check_derivatives(rule, X, checks=["linearity"])) == {"linearity": "failed"}


def test_value_finds_a_primal_that_differs_from_the_rule_under_differentiation():
  f = with_rule(jnp.sin, lambda x, u: jnp.cos(x) * u, fwd=lambda x: (jnp.sin(x) + 1e-3, x))
  assert [row.of for row in check_derivatives(f, X, checks=["vjp"], reference=jnp.sin).failed] == [
    "value under vjp of out"
  ]


def test_dot_product_needs_no_reference():
  rule = jax.custom_vjp(jnp.sin)
  rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, u: (jnp.cos(x) * u,))
  f = enable_forward_mode(rule, tangent=lambda x, dots: 1.001 * jnp.cos(x) * dots[0])
  assert statuses(check_derivatives(f, X, checks=["dot_product"])) == {"dot_product": "failed"}


def test_dropped_cotangent_of_one_of_two_outputs_is_named():
  f = jax.custom_vjp(lambda x: {"loss": jnp.sum(x**2), "z": jnp.sum(x)})
  f.defvjp(
    lambda x: (f(x), x),
    lambda x, bars: (2 * x * bars["loss"],),
  )
  for checks, options in (
    ("finite_differences", {}),
    ("each_output", {"reference": lambda x: {"loss": jnp.sum(x**2), "z": jnp.sum(x)}}),
  ):
    (row,) = check_derivatives(f, X, checks=[checks], **options).failed
    assert "by out['z']" in row.of


def one_argument_alone(wrong_mode):
  """x y with a rule that forgets a factor where only one argument is differentiated."""
  f = lambda x, y: x * y
  if wrong_mode == "reverse":
    rule = jax.custom_vjp(f)

    def fwd(x, y):
      return x.value * y.value, (x.value, y.value, x.perturbed and y.perturbed)

    def bwd(residuals, u):
      x, y, both = residuals
      return (u * y, u * x) if both else (u * y, u)

    rule.defvjp(fwd, bwd, symbolic_zeros=True)
  else:
    rule = jax.custom_jvp(f)
    zero = lambda dot: isinstance(dot, jax.custom_derivatives.SymbolicZero)

    def jvp(args, dots):
      (x, y), (x_dot, y_dot) = args, dots
      if zero(x_dot):
        return x * y, y_dot
      return x * y, x_dot * y + (0 if zero(y_dot) else x * y_dot)

    rule.defjvp(jvp, symbolic_zeros=True)
  return rule


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_rule_that_is_wrong_by_one_argument_alone_is_found(mode):
  f = one_argument_alone(mode)
  assert {row.check for row in check_derivatives(f, X, X[::-1] + 2).failed} <= {
    "each_argument: args[1]",
    "vmap_each_argument: args[1]",
  }
  report = check_derivatives(f, X, X[::-1] + 2, checks=["each_argument"])
  assert statuses(report) == {
    "each_argument: args[0]": "passed",
    "each_argument: args[1]": "failed",
  }


def test_rule_that_is_wrong_by_one_output_alone_is_found():
  f = jax.custom_vjp(lambda x: (jnp.sin(x), jnp.cos(x)))

  def bwd(x, us):
    zero = [isinstance(u, jax.custom_derivatives.SymbolicZero) for u in us]
    a, b = (0.0 if z else u for z, u in zip(zero, us, strict=True))
    return (a * jnp.cos(x) - (2 if zero[0] else 1) * b * jnp.sin(x),)

  f.defvjp(lambda x: (f(x.value), x.value), bwd, symbolic_zeros=True)
  report = check_derivatives(f, X, checks=["vjp", "finite_differences", "each_output"])
  (row,) = report.failed
  assert (row.check, row.of) == ("each_output", "cotangent of args[0] by out[1] alone")


def test_arguments_taken_one_by_one_are_a_few():
  f = lambda xs: sum(jnp.sin(x) for x in xs)
  report = check_derivatives(f, [X[0, 0]] * 10, checks=["each_argument"]).raise_if_failed()
  assert len(report.rows) == 9
  assert "only 8 of 10 arguments" in report.rows[-1].reason


def test_wrong_gradient_of_one_argument_of_a_pytree_is_named():
  f = jax.custom_vjp(lambda params, x: params["w"] * x + params["b"])
  f.defvjp(
    lambda params, x: (f(params, x), (params, x)),
    lambda r, u: ({"w": jnp.sum(u * r[1]), "b": jnp.zeros_like(r[0]["b"])}, r[0]["w"] * u),
  )
  params = {"w": jnp.float32(2), "b": jnp.float32(1)}
  (row,) = check_derivatives(f, params, X, checks=["finite_differences"]).failed
  assert "args[0]['b']" in row.of


def test_jit_finds_a_rule_that_is_wrong_without_it():
  def bwd(x, u):
    return jnp.cos(x) * u * (1 if isinstance(u, jax.core.Tracer) else 2)

  report = check_derivatives(
    with_rule(jnp.sin, bwd), X, checks=["vjp", "finite_differences", "jit"]
  )
  assert [row.check for row in report.failed] == ["jit"]


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_order_finds_a_rule_that_is_constant_in_its_cotangent(order):
  """It is right in the first order, and in the second as long as the cotangent is held fixed."""
  f = with_rule(jnp.sin, lambda x, u: jax.lax.stop_gradient(u) * jnp.cos(x))
  report = check_derivatives(f, X, checks=["finite_differences", "vjp", "second_order"])
  wrong = {row.check: row.of for row in report.failed}
  assert wrong.keys() <= {f"second_order: {order}" for order in ORDERS}
  assert wrong[f"second_order: {order}"].startswith("derivative by u, ")


def test_second_order_finds_a_rule_that_is_constant_in_its_argument():
  """Right in the first order, in forward and in reverse mode."""
  f = jax.custom_jvp(jnp.sin)

  @f.defjvp
  def rule(xs, dots):
    return jnp.sin(xs[0]), jax.lax.stop_gradient(jnp.cos(xs[0])) * dots[0]

  report = check_derivatives(f, X, checks=["finite_differences", "jvp", "second_order"])
  assert {row.check for row in report.failed} == {f"second_order: {order}" for order in ORDERS}


def test_structure_finds_a_weakly_typed_cotangent():
  """Which makes a jitted function that takes the gradient compile again."""
  for x in (2.0, np.float32(2)):
    assert check_derivatives(jnp.sin, x, checks=["structure", "traces"])
  rule = jax.custom_vjp(lambda x: x)
  rule.defvjp(lambda x: (x, None), lambda _, u: (jnp.asarray(1.0),))
  report = check_derivatives(rule, np.array(2, jnp.result_type(float)), checks=["structure"])
  assert "weakly typed" in report.failed[0].reason


def test_integers_have_float0_cotangents():
  f = lambda x, n: x[n].sum()
  assert check_derivatives(f, X, jnp.array([1, 0]), checks=["structure", "vmap_each_argument"])


def test_residuals_are_counted():
  rule = jax.custom_vjp(jnp.sin)
  rule.defvjp(lambda x: (jnp.sin(x), (x, jnp.cos(x))), lambda r, u: (r[1] * u,))
  check = functools.partial(check_derivatives, rule, X, checks=["residuals"])
  (row,) = check(max_residual_bytes=10).failed
  assert (row.error, row.bound) == (X.nbytes, 10)
  assert check(max_residual_bytes=24)
  assert "1 array of 24 bytes" in check().rows[0].reason


def test_nan_at_edge_points():
  f = lambda x: jnp.where(x == 0, 1, jnp.sin(x) / x)  # NaN is in the gradient at 0
  report = check_derivatives(f, X, checks=["edge_points"], edge_points=[(X,), (0 * X,)])
  assert [row.check for row in report.failed] == ["edge_points: 1"]
  assert "6 NaN" in report.failed[0].reason


def test_an_edge_point_with_another_flag():
  """What is no array may be another there than at the arguments."""
  f = lambda x, kind: jnp.sin(x) if kind == "sine" else jnp.cos(x)
  for reference in (None, f):
    check_derivatives(
      f, X, "sine", reference=reference, edge_points=[(X, "cosine")], checks=["edge_points"]
    ).raise_if_failed()


def test_second_derivatives_at_edge_points():
  """Those of c x^2 by c and x, of which a rule makes 0 where c is 0."""
  f = jax.custom_vjp(lambda c, x: c * x**2)
  f.defvjp(
    lambda c, x: (f(c, x), (c, x)),
    lambda r, u: (jnp.sum(u * r[1] ** 2), u * 2 * jnp.where(r[0] == 0, 0, r[0]) * r[1]),
  )
  points = {"edge_points": [(np.float32(2), X), (np.float32(0), X)], "checks": ["edge_points"]}
  f = enable_forward_mode(f)
  report = check_derivatives(f, np.float32(1), X, **points)
  assert {row.check for row in report.failed} == {
    f"edge_points: 1: second_order: {order}" for order in ORDERS
  }
  check_derivatives(f, np.float32(1), X, skip=["second_order"], **points).raise_if_failed()


@pytest.mark.without("debug_nans", "debug_infs")
@pytest.mark.parametrize(
  "f, x, reason",
  [
    (jax.nn.relu, 0, "gradient unconfirmed by finite differences"),
    (jnp.exp, 100, "a value or a first derivative is infinite"),
    (jnp.square, 1e17, "the result is smaller than its rounding errors"),
  ],
  ids=["kink", "overflow", "huge"],
)
def test_second_derivatives_that_nothing_tells_are_skipped_at_an_edge_point(f, x, reason):
  report = check_derivatives(f, X, edge_points=[(np.full_like(X, x),)], checks=["edge_points"])
  assert not report.failed
  reasons = [row.reason for row in report.rows if "second_order" in row.check and row.reason]
  assert any(r.startswith(reason) for r in reasons)
  assert len(set(reasons)) == len(reasons)  # each is told once


# --- what does not apply -------------------------------------------------------------------------


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

  report = check_derivatives(f, X).raise_if_failed()
  (row,) = (row for row in report.rows if row.check == "vjp")
  assert "does not run in float64" in row.reason
  wrong = with_rule(f, lambda x, u: jnp.cos(x) * u * 1.5)
  assert "finite_differences" in {row.check for row in check_derivatives(wrong, X).failed}


def test_float64_needs_no_reference():
  with jax.enable_x64(True):
    x = X.astype(np.float64)
    report = check_derivatives(softmax, x, checks=["vjp", "finite_differences", "scan"])
    assert statuses(report) == {
      "vjp": "skipped",
      "finite_differences": "passed",
      "scan": "passed",
    }
    assert check_derivatives(softmax, x, reference=jax.nn.softmax, checks=["vjp"])


# --- bounds and differences ----------------------------------------------------------------------


def test_bounds_do_not_grow_with_the_array():
  rows = [
    check_derivatives(softmax, jnp.full((n, 16), X[0, 0]), checks=["vjp"]).rows[0]
    for n in (1, 4096)
  ]
  assert rows[1].bound < 2 * rows[0].bound < 1e-5


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
  (dot,), (slack,) = Oracle(Problem(f, (x,), {}), None).differences([x], [np.ones_like(x)])
  error = np.abs(dot - derivative(np.float64(x)))
  judged = np.isfinite(dot)
  assert judged.mean() > 0.8
  assert np.all(error[judged] <= slack[judged] + 1e-12)
  assert np.linalg.norm(error[judged]) < known * np.linalg.norm(dot[judged])


def test_finite_differences_leave_kinks_out():
  x = np.float32([-1, -1e-5, 0, 1e-5, 1])
  (dot,), _ = Oracle(Problem(jax.nn.relu, (x,), {}), None).differences([x], [np.ones_like(x)])
  np.testing.assert_array_equal(np.isnan(dot), [False, False, True, False, False])
  np.testing.assert_allclose(dot[[0, 1, 3, 4]], [0, 0, 1, 1], atol=1e-10)


def test_finite_differences_leave_kinks_out_along_a_small_tangent():
  """Beside others that are large."""
  x, v = np.float32([0, 1, 2, 3]), np.float32([1e-4, 1, 1, 1])
  for f in (jax.nn.relu, lambda x: jax.nn.relu(x) + jnp.sin(x)):
    (dot,), _ = Oracle(Problem(f, (x,), {}), None).differences([x], [v])
    np.testing.assert_array_equal(np.isnan(dot), [True, False, False, False])


def test_finite_differences_of_huge_arguments_know_that_they_know_nothing():
  x = np.float32([1e17, 1e18])
  (dot,), (slack,) = Oracle(Problem(jnp.square, (x,), {}), None).differences([x], [x * 0 + 1])
  assert np.all(np.abs(dot - 2 * np.float64(x)) <= slack)


# --- arguments -----------------------------------------------------------------------------------


def test_bad_arguments():
  with pytest.raises(TypeError, match="expected f to be a function, got int"):
    check_derivatives(3, X)
  with pytest.raises(TypeError, match="expected reference to be a function"):
    check_derivatives(softmax, X, reference=3)
  with pytest.raises(TypeError, match="complex"):
    check_derivatives(softmax, 1j * X)
  for options in ({"checks": ["vpj"]}, {"skip": ["vpj"]}, {"bounds": {"vpj": 1.0}}):
    with pytest.raises(ValueError, match=r"knows no check 'vpj'; there are value, vjp"):
      check_derivatives(softmax, X, **options)
  with pytest.raises(ValueError, match="expected the reference to return floating arrays"):
    check_derivatives(softmax, X, reference=jnp.sum)


def test_checks_and_skip_choose():
  assert list(statuses(check_derivatives(softmax, X, checks=["vjp", "value"]))) == ["value", "vjp"]
  assert not check_derivatives(softmax, X, checks="vjp", skip="vjp").rows
  assert all(describe_checks().values()) or sys.flags.optimize == 2


def test_seed_decides_and_arguments_are_left_alone():
  x = X.copy()
  first, again, other = (
    check_derivatives(softmax, x, checks=["vjp"], seed=seed).rows[0].error for seed in (0, 0, 1)
  )
  assert first == again != other
  np.testing.assert_array_equal(x, X)


def test_a_scalar():
  check_derivatives(jnp.sin, np.float32(0.5)).raise_if_failed()


negative_sine = with_rule(jnp.sin, lambda x, u: -jnp.cos(x) * u)


@pytest.mark.parametrize(
  "f, shape, empty",
  [
    (negative_sine, (0, 3), "argument"),
    (lambda x: negative_sine(x).sum(), (0, 3), "argument"),
    (lambda x: negative_sine(x)[:0], (3,), "output"),
  ],
  ids=["both", "argument", "output"],
)
@pytest.mark.parametrize("with_reference", [False, True])
def test_without_an_entry_nothing_is_confirmed(f, shape, empty, with_reference):
  report = check_derivatives(f, np.zeros(shape, "float32"), reference=f if with_reference else None)
  assert not report.failed
  with pytest.raises(DerivativeError, match=f"no {empty} with a floating dtype has an entry"):
    report.raise_if_failed()


@pytest.mark.parametrize(
  "combined", [lambda y, e: y + e.sum(), lambda y, e: (y, e)], ids=["argument", "output"]
)
@pytest.mark.parametrize("with_reference", [False, True])
def test_what_is_empty_neither_fails_nor_hides_the_others(combined, with_reference):
  right = lambda x, e: combined(jnp.sin(x), e)
  wrong = lambda x, e: combined(negative_sine(x), e)
  options = {"reference": right} if with_reference else {}
  empty = np.zeros((0, 3), np.float32)
  rows = check_derivatives(right, X, empty, **options).raise_if_failed().rows
  assert {row.status for row in rows if 0 in (row.shape or ())} == {"skipped"}
  assert check_derivatives(wrong, X, empty, **options).failed


def test_import_needs_no_extra():
  code = "import sys, softmax_jax.verify; print({'rich', 'matplotlib', 'optax'} & set(sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"


def one_sided(primal):
  """x y, whose rule is wrong if only one argument is differentiated."""
  f = jax.custom_vjp(lambda x, y: x * y)

  def fwd(x, y):
    alone = not (x.perturbed and y.perturbed)
    return x.value * y.value, (x.value, y.value, np.float32(primal if alone else 1))

  f.defvjp(fwd, lambda r, u: (r[2] * r[1] * u, r[0] * u), symbolic_zeros=True)
  return f


def test_a_rule_that_is_wrong_for_one_argument_alone_fails():
  options = {"reference": lambda x, y: x * y}
  found = check_derivatives(one_sided(0.5), X, X[::-1], **options).failed
  assert {row.check.partition(":")[0] for row in found} == {"each_argument"}
  assert check_derivatives(one_sided(1), X, X[::-1], **options)


def test_one_argument_alone_in_forward_mode():
  right, wrong = (lambda x, y: x * y), jax.custom_jvp(lambda x, y: x * y)

  def rule(primals, tangents):
    (x, y), zero = primals, jax.custom_derivatives.SymbolicZero
    alone = any(type(dot) is zero for dot in tangents)
    dots = [jnp.zeros_like(x) if type(dot) is zero else dot for dot in tangents]
    return x * y, (0.5 if alone else 1) * (dots[0] * y + x * dots[1])

  wrong.defjvp(rule, symbolic_zeros=True)
  rows = check_derivatives(wrong, X, X[::-1], reference=right).failed
  assert "each_argument" in {row.check.partition(":")[0] for row in rows}


@pytest.mark.parametrize(
  "f, args",
  [
    (lambda x, flag: x if flag else -x, (X, True)),
    (lambda x, axis: jnp.sum(x, axis), (X, 1)),
    (lambda x, n: x * range(n)[-1], (X, 3)),
  ],
  ids=["flag", "axis", "size"],
)
def test_an_argument_that_must_not_be_traced_is_to_be_passed_by_name(f, args):
  with pytest.raises(TypeError, match="pass it in kwargs="):
    check_derivatives(f, *args)


@pytest.mark.without("enable_x64")  # which has integers of 64 bits
def test_what_is_too_large_or_complex_is_refused():
  with pytest.raises(TypeError, match="integers of at most 32 bits"):
    check_derivatives(lambda x, n: x, X, 2**40)
  with pytest.raises(TypeError, match="real numbers, got complex ones"):
    check_derivatives(lambda x: jax.lax.complex(x, x), X)
