"""Every wrong rule is caught, from 4 elements to 65,536, and by the check that is made for it."""

import jax
import jax.numpy as jnp
import pytest
import wrong_rules
from wrong_rules import arguments, planted, right, weighted, weighted_arguments, with_infinity

from softmax_jax.verify import check_derivatives

# The check that a fault is for, where that is not the first derivative in general.
CHECKS = {
  "only bfloat16": "vjp",
  "only under vmap": "vmap_batch",
  "only rows with -inf": "edge_points",
  "NaN in rows with -inf": "edge_points",
  "wrong forward": "jvp",
  "wrong second order": "second_order",
  "stale residual": "jit",
}
EDGE = ("only rows with -inf", "NaN in rows with -inf")
NESTINGS = [f"{a} over {b}" for a in ("forward", "reverse") for b in ("forward", "reverse")]
# One row or several; some faults need several.
SIZES = {"4 elements": ((1, 4), (2, 2)), "65,536 elements": ((512, 128), (512, 128))}


def verify(function, fault, shape, axis=-1, dtype="float32", **options):
  args = arguments(function, shape, axis, dtype)
  f = planted(function, fault) if fault else right(function)
  if fault in EDGE:
    options["edge_points"] = [with_infinity(function, args)]
  return check_derivatives(f, *args, kwargs={"axis": axis}, **options)


@pytest.mark.few(20)
@pytest.mark.parametrize(
  "size", ["4 elements", pytest.param("65,536 elements", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(("function", "fault"), wrong_rules.ALL)
def test_wrong_rule_is_caught(function, fault, size):
  check = CHECKS.get(fault, "finite_differences")
  wrong_axis = fault == "wrong axis"
  report = verify(
    function,
    fault,
    SIZES[size][fault in ("wrong axis", "mean for sum")],
    axis=0 if wrong_axis else -1,
    dtype="bfloat16" if fault == "only bfloat16" else "float32",
    checks=[check],
  )
  assert report.failed
  assert not report


@pytest.mark.few(3)
@pytest.mark.parametrize("function", wrong_rules.FUNCTIONS)
def test_right_rule_passes_all_of_these_checks(function):
  """Otherwise the test above would prove nothing."""
  args, checks = arguments(function, (2, 4)), {"finite_differences", *CHECKS.values()}
  # The cost of a class at -inf is infinite: by its label of 0 there is no second derivative.
  skip = ["second_order"] if function == "soft labels" else []
  reports = [
    check_derivatives(right(function), *args, checks=checks - {"edge_points"}),
    check_derivatives(
      right(function),
      *args,
      checks=["edge_points"],
      edge_points=[with_infinity(function, args)],
      skip=skip,
    ),
  ]
  for report in reports:
    report.raise_if_failed()
  rows = [row for report in reports for row in report.rows]
  assert {row.check.partition(":")[0] for row in rows if row.status == "passed"} == checks


@pytest.mark.parametrize("function", wrong_rules.FUNCTIONS)
def test_wrong_rule_is_caught_beside_a_reference(function):
  """A fault with autodiff of a reference in place of finite differences."""
  report = verify(function, "one row", (512, 128), checks=["vjp"], reference=right(function))
  assert [row.check for row in report.failed] == ["vjp"]


@pytest.mark.few(4)
@pytest.mark.parametrize(
  "size", ["4 elements", pytest.param("65,536 elements", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("fault", wrong_rules.SPECIAL)
@pytest.mark.parametrize("function", wrong_rules.FUNCTIONS)
def test_wrong_second_derivative_is_caught_where_it_shows(function, fault, size):
  """As the arguments themselves and as an edge point."""
  special, others = (weighted_arguments(function, SIZES[size][1], f) for f in (fault, None))
  report = check_derivatives(
    weighted(function, fault),
    *special,
    checks=["second_order", "edge_points"],
    edge_points=[others, special],
  )
  found = {row.check.rpartition(": ")[0] for row in report.failed}
  assert found == {"second_order", "edge_points: 1: second_order"}


@pytest.mark.few(3)
@pytest.mark.parametrize("function", wrong_rules.FUNCTIONS)
def test_right_second_derivatives_pass_at_special_arguments(function):
  args, *edges = (
    weighted_arguments(function, (2, 2), fault) for fault in (None, *wrong_rules.SPECIAL)
  )
  report = check_derivatives(weighted(function), *args, checks=["edge_points"], edge_points=edges)
  report.raise_if_failed()
  passed = {row.check for row in report.rows if row.status == "passed"}
  assert {f"edge_points: {i}: second_order: {n}" for i in (0, 1) for n in NESTINGS} <= passed


def test_faults_of_one_kind_are_right_elsewhere():
  """So what is caught above is indeed the axis, the dtype or the transformation."""
  function = "log_softmax"
  assert verify(function, "wrong axis", (4, 8), axis=-1, checks=["finite_differences"])
  assert verify(function, "only bfloat16", (4, 8), checks=["vjp"])
  assert verify(function, "only under vmap", (4, 8), checks=["vjp", "finite_differences"])
  assert verify(function, "wrong second order", (4, 8), checks=["vjp", "finite_differences"])


def test_one_wrong_row_of_many_is_named():
  """In sixteen bits the error of one row drowns in the norm of 2,048; a slice shows it."""

  @jax.custom_vjp
  def f(x):
    return jax.nn.softmax(x)

  def bwd(a, u):
    x_bar = a * (u - jnp.sum(a * u, axis=-1, keepdims=True))
    return (jnp.where(a.dtype == jnp.bfloat16, x_bar.at[777].multiply(-1), x_bar),)

  f.defvjp(lambda x: (jax.nn.softmax(x),) * 2, bwd)
  x = arguments("softmax", (2048, 32), dtype="bfloat16")
  (row,) = check_derivatives(f, *x, checks=["vjp"]).failed
  assert row.index[0] == 777
  assert row.error == pytest.approx(2, rel=0.05)
