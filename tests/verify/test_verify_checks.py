"""What each check of `check_derivatives` finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import ORDERS, X, statuses, with_rule

from softmax_jax import derivatives, enable_forward_mode, log_softmax, softmax
from softmax_jax.verify import CHECKS, check_derivatives


def test_every_check_passes_on_softmax_with_everything_given():
  report = check_derivatives(
    softmax,
    X,
    reference=jax.nn.softmax,
    jacobian=lambda x: (
      jax.vmap(jax.jacfwd(jax.nn.softmax))(x)[:, :, None] * np.eye(2)[:, None, :, None]
    ),
    edge_points=[(np.float32([[0, -np.inf, 1], [90, 0, 1]]),)],
    max_residual_bytes=8,  # where the largest entry is, for each of the two rows
  )
  report.raise_if_failed()
  skipped = [row.check for row in report.rows if row.status == "skipped"]
  assert skipped == ["each_output", "each_argument"]
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


def one_output_alone():
  """The sine and the cosine, whose gradient is wrong where only the latter has a cotangent."""
  f = jax.custom_vjp(lambda x: (jnp.sin(x), jnp.cos(x)))

  def bwd(x, us):
    zero = [isinstance(u, jax.custom_derivatives.SymbolicZero) for u in us]
    a, b = (0.0 if z else u for z, u in zip(zero, us, strict=True))
    return (a * jnp.cos(x) - (2 if zero[0] else 1) * b * jnp.sin(x),)

  f.defvjp(lambda x: (f(x.value), x.value), bwd, symbolic_zeros=True)
  return f


def test_rule_that_is_wrong_by_one_output_alone_is_found():
  checks = ["vjp", "finite_differences", "each_output"]
  (row,) = check_derivatives(one_output_alone(), X, checks=checks).failed
  assert (row.check, row.of) == ("each_output", "cotangent of args[0] by out[1] alone")


@pytest.mark.parametrize("with_reference", [False, True])
def test_float64_is_compared_in_every_way_too(with_reference):
  """Beside a reference, and with the rule of f in float64 as the only one."""
  off_by_little = with_rule(
    jnp.sin, lambda x, u: jnp.cos(x) * u, fwd=lambda x: (jnp.sin(x) * (1 + 1e-9), x)
  )
  product, both = lambda x, y: x * y, lambda x: (jnp.sin(x), jnp.cos(x))
  with jax.enable_x64(True):
    x, y = X.astype(np.float64), X[::-1].astype(np.float64)
    for f, reference, args, check in (
      (off_by_little, jnp.sin, (x,), "vjp"),
      (one_argument_alone("reverse"), product, (x, y), "each_argument"),
      (one_argument_alone("forward"), product, (x, y), "each_argument"),
      (one_output_alone(), both, (x,), "each_output"),
    ):
      options = {"reference": reference} if with_reference else {}
      checks = ["value", "finite_differences", check]
      rows = check_derivatives(f, *args, checks=checks, **options).failed
      assert {row.check.partition(":")[0] for row in rows} == {check}


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


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("with_reference", [False, True])
def test_a_gradient_that_is_another_in_each_call_is_found(noise, with_reference):
  rng = np.random.default_rng(0)

  def bwd(x, u):
    draw = lambda bar: (bar * (1 + noise * rng.standard_normal(bar.shape))).astype(bar.dtype)
    return jax.pure_callback(draw, x, jnp.cos(x) * u, vmap_method="expand_dims")

  options = {"reference": jnp.sin} if with_reference else {}
  check = functools.partial(check_derivatives, checks=["repeated"], **options)
  (row,) = check(with_rule(jnp.sin, bwd), X).failed
  assert row.of == "entries of the cotangent of args[0] that differ between two calls"
  assert not check(jnp.sin, X).failed


@jax.custom_batching.custom_vmap
def same_for_all(x):
  return x


@same_for_all.def_vmap
def _(size, mapped, x):
  return jnp.broadcast_to(x[:1], x.shape), True


def test_labels_differ_from_one_element_of_a_batch_to_the_next():
  hot = lambda labels: jax.nn.one_hot(labels, 3)
  right = lambda x, labels: -jnp.sum(jax.nn.log_softmax(x) * hot(labels), axis=-1)
  f = jax.custom_vjp(right)
  f.defvjp(
    lambda x, labels: (f(x, labels), (x, labels)),
    lambda r, u: (u[:, None] * (jax.nn.softmax(r[0]) - hot(same_for_all(r[1]))), None),
  )
  for options in ({}, {"reference": right}):
    checks = ["vjp", "vmap_each_argument", "vmap_batch"]
    rows = check_derivatives(f, X, jnp.array([0, 2]), checks=checks, **options).failed
    assert {row.check for row in rows} == {"vmap_each_argument: args[1]", "vmap_batch"}
    assert check_derivatives(right, X, jnp.array([0, 2]), checks=checks, **options)


def test_zeros_differ_from_one_element_of_a_batch_to_the_next():
  f = with_rule(jnp.sin, lambda x, u: jnp.cos(same_for_all(x)) * u)
  rows = check_derivatives(f, 0 * X, checks=["vjp", "vmap_batch"]).failed
  assert {row.check for row in rows} == {"vmap_batch"}


def test_all_arguments_are_mapped():
  f = jax.custom_vjp(lambda *xs: sum(jnp.sin(x) for x in xs))
  f.defvjp(
    lambda *xs: (f(*xs), xs),
    lambda xs, u: (*(jnp.cos(x) * u for x in xs[:-1]), jnp.cos(same_for_all(xs[-1])) * u),
  )
  rows = check_derivatives(f, *[X[0] + i for i in range(10)], checks=["vmap_each_argument"]).failed
  assert {row.check for row in rows} == {"vmap_each_argument: the others"}


def test_jit_finds_a_rule_that_is_wrong_without_it():
  def bwd(x, u):
    return jnp.cos(x) * u * (1 if isinstance(u, jax.core.Tracer) else 2)

  report = check_derivatives(
    with_rule(jnp.sin, bwd), X, checks=["vjp", "finite_differences", "jit"]
  )
  assert [row.check for row in report.failed] == ["jit"]


def test_jit_finds_a_rule_that_is_wrong_where_two_arguments_are_one_array():
  f = jax.custom_vjp(lambda x, y: x * y)
  f.defvjp(
    lambda x, y: (x * y, (x, y)),
    lambda r, u: (r[1] * u, 0 * u if r[0] is r[1] else r[0] * u),
  )
  for options in ({}, {"reference": lambda x, y: x * y}):
    report = check_derivatives(f, X, X[::-1], checks=["vjp", "jit"], **options)
    assert {row.check for row in report.failed} == {"jit"}


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
  """A weak type makes a jitted function of the gradient compile again."""
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
  """The mixed derivatives of c x^2 by c and x, which a wrong rule makes 0 where c is 0."""
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
    (jnp.sin, 1e17, "gradient unconfirmed by finite differences"),
  ],
  ids=["kink", "overflow", "huge"],
)
def test_second_derivatives_that_nothing_tells_are_skipped_at_an_edge_point(f, x, reason):
  report = check_derivatives(f, X, edge_points=[(np.full_like(X, x),)], checks=["edge_points"])
  assert not report.failed
  reasons = [row.reason for row in report.rows if "second_order" in row.check and row.reason]
  assert any(r.startswith(reason) for r in reasons)
  assert len(set(reasons)) == len(reasons)  # each is told once


def root(a):
  off = lambda x: jnp.max(jnp.abs(x * x - a)) > 1e-2
  return jax.lax.while_loop(off, lambda x: (x + a / x) / 2, jnp.ones_like(a))


def turned(f):
  """f with the derivative of -f."""
  return with_rule(f, lambda a, u: -jax.vjp(f, a)[1](u)[0])


PERHAPS_RIGHT = {
  "solver": (
    with_rule(root, lambda x, u: u / (2 * jnp.sqrt(x))),
    [2, 3],
    "right to the tolerance of a solver? f has a while loop",
  ),
  "eigenvectors": (
    turned(lambda a: jnp.linalg.eigh(a + a.T)[1]),
    [[1, 2], [3, -2]],
    "right up to a sign? f calls eigh",
  ),
  "singular vectors": (
    turned(lambda a: jnp.linalg.svd(a)[0]),
    [[1, 2], [3, -2]],
    "right up to a sign? f calls svd",
  ),
  "saturated": (jnp.tanh, [12, 13], "saturated? f moves by less than its values round"),
}


@pytest.mark.parametrize("name", PERHAPS_RIGHT)
def test_a_failure_says_what_may_be_right_all_the_same(name):
  f, x, reason = PERHAPS_RIGHT[name]
  checks = ["vjp" if name == "saturated" else "finite_differences"]
  report = check_derivatives(f, np.float32(x), checks=checks)
  assert [row.reason for row in report.failed] == [reason]
  assert f", {reason} ({checks[0]})" in " ".join(report.failures().split())


def test_a_failure_elsewhere_is_not_excused():
  (row,) = check_derivatives(with_rule(jnp.tanh, lambda x, u: u), X, checks=["jvp"]).failed
  assert not row.reason
