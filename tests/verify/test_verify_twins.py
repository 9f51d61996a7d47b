"""f in float64: called with it, or traced in its own dtypes and evaluated in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hijax_flags import from_0_12, switched
from verified import X, with_rule

from softmax_jax import softmax_cross_entropy
from softmax_jax.verify import check_derivatives
from softmax_jax.verify.oracle import Oracle, exact
from softmax_jax.verify.problem import Problem
from softmax_jax.verify.widening import operations, widened_program

CHECKS = ("value", "vjp", "finite_differences", "jvp", "vmap_batch")


def loop(x):
  carry = jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + i, x)
  return jax.lax.scan(lambda c, row: (jnp.tanh(c + row), c), carry[0], x)


PROGRAMS = {
  "loops": loop,
  "branch": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
  "while": lambda x: jax.lax.while_loop(
    lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x)
  )[1],
  "rules": lambda x: jax.nn.relu(x) + with_rule(jnp.sin, lambda x, u: u)(x),
  "checkpoint": jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))),
  "linear algebra": lambda x: jnp.linalg.solve(x @ x.T + jnp.eye(2), x),
  "fft": lambda x: jnp.abs(jnp.fft.rfft(x)),
  "scatter": lambda x: x.at[0].add(1.5).at[:, 1].multiply(x[:, 0]),
  "sort": lambda x: jnp.sort(x, axis=-1)[..., ::-1] * jnp.argmax(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_evaluated_program_is_that_of_float64(name):
  check_evaluated(PROGRAMS[name])


@from_0_12
@pytest.mark.parametrize("name", ["rules", "checkpoint"])
def test_so_is_one_with_the_new_implementations(name):
  with switched(True):
    check_evaluated(PROGRAMS[name])
    assert operations(jax.make_jaxpr(PROGRAMS[name])(X).jaxpr) >= {"sin"}


def check_evaluated(f):
  program = jax.make_jaxpr(f)(X)
  with exact():
    found = widened_program(program)(X)
    expected = jax.tree.leaves(f(jnp.asarray(X, np.float64)))
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def test_an_operation_that_calls_a_function_keeps_its_own_dtypes():
  """As the rules of this library, and callbacks, do."""
  f = jax.grad(lambda x: jnp.sum(softmax_cross_entropy(x, jnp.abs(x[::-1])) ** 2))
  with exact():
    (found,) = widened_program(jax.make_jaxpr(f)(X))(X)
    expected = f(jnp.asarray(X, np.float64))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rounding_inside_is_left_out():
  rounded = lambda x: jax.lax.reduce_precision(x, 8, 4)
  f = lambda x: jnp.sin(x.astype(jnp.bfloat16)).astype(jnp.float32) * rounded(x)
  with exact():
    (found,) = widened_program(jax.make_jaxpr(f)(X))(X)
  np.testing.assert_allclose(found, np.sin(np.float64(X)) * X, rtol=1e-14)


def dropout(key, x):
  return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, 0)


def noisy(key, mean, deviation):
  return mean + deviation * jax.random.normal(key, mean.shape)


RANDOM = {
  "dropout": (dropout, (jax.random.key(0), X)),
  "raw key": (dropout, (jax.random.PRNGKey(0), X)),
  "normal numbers": (noisy, (jax.random.key(1), X, X**2)),
  "sixteen bits": (dropout, (jax.random.key(0), X.astype(jnp.bfloat16))),
  "key inside": (lambda x: dropout(jax.random.key(3), x), (X,)),
}


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_in_the_dtype_of_the_function(name, with_reference):
  f, args = RANDOM[name]
  reference = {"reference": f} if with_reference else {}
  check_derivatives(f, *args, checks=CHECKS, **reference).raise_if_failed()


@pytest.mark.parametrize("fault", ["another mask", "a factor"])
def test_a_wrong_rule_of_a_random_function_is_found(fault):
  @jax.custom_vjp
  def f(key, x):
    return dropout(key, x)

  def bwd(key, u):
    if fault == "another mask":
      return None, dropout(jax.random.fold_in(key, 1), u)
    return None, (1 + 1e-5) * dropout(key, u)

  f.defvjp(lambda key, x: (f(key, x), key), bwd)
  report = check_derivatives(f, jax.random.PRNGKey(0), X, checks=["finite_differences"])
  assert report.failed


def adam(x):
  optimizer = optax.adam(0.1)
  state = optimizer.init(x)
  for _ in range(3):
    updates, state = optimizer.update(jnp.sinh(x), state, x)
    x = optax.apply_updates(x, updates)
  return x


def with_constant(constant):
  """x pi, whose rule has its own pi."""
  return with_rule(lambda x: x * np.float32(np.pi), lambda x, u: u * constant)


def kept_in_float32(x):
  rule = jax.custom_vjp(jnp.sin)
  rule.defvjp(
    lambda x: (jnp.sin(x), jnp.cos(x).astype(jnp.float32)), lambda c, u: ((c * u).astype(u.dtype),)
  )
  return rule(x)


CONSTANTS = {
  "constant": with_constant(np.pi),
  "residual": kept_in_float32,
  "resize": lambda x: jax.image.resize(x, (5, 7), "cubic"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_no_more_digits_are_asked_for_than_the_dtype_has(name):
  check_derivatives(CONSTANTS[name], X, checks=CHECKS).raise_if_failed()
  wrong = with_constant(np.float32(np.pi * (1 + 1e-5)))
  assert check_derivatives(wrong, X, checks=["finite_differences"]).failed


def test_rounding_of_constants_that_a_function_computes_is_its_noise():
  """1 - 0.999**step has two digits less than float32, and not the same ones in each program."""
  check_derivatives(adam, X, checks=(*CHECKS[:3], "jit")).raise_if_failed()
  check_derivatives(adam, X, reference=adam, checks=CHECKS[:2]).raise_if_failed()
  wrong = with_rule(adam, lambda x, u: (1 + 1e-4) * jax.vjp(adam, x)[1](u)[0])
  assert check_derivatives(wrong, X, checks=["finite_differences"]).failed


def test_a_constant_is_moved_by_a_unit_and_one_in_sixteen_bits_is_not_rounded():
  f = lambda x: x * jnp.exp(jnp.arange(3.0)) * jnp.exp(jnp.arange(3.0).astype(jnp.bfloat16))
  program = jax.make_jaxpr(f)(X)
  with exact():
    evaluated = (widened_program(program, np.full(16, sign))(X) for sign in (1.0, -1.0))
    up, down = (np.asarray(found) for (found,) in evaluated)
  constant = np.exp(np.arange(3, dtype=np.float32))
  wide = X * np.exp(np.arange(3.0))
  np.testing.assert_allclose((up + down) / 2 / wide, np.broadcast_to(constant, (2, 3)), rtol=1e-7)
  moved = (up - down) / 2 / wide / np.spacing(constant)
  np.testing.assert_allclose(moved, 1, rtol=0.3)


def test_an_index_that_x64_makes_wider():
  f = lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (1, 2))
  check_derivatives(f, X, 1, checks=CHECKS).raise_if_failed()


def in_bfloat16(change):
  """sin, whose gradient ``change`` makes wrong in bfloat16."""
  return with_rule(
    jnp.sin, lambda x, u: change(jnp.cos(x) * u) if x.dtype == jnp.bfloat16 else jnp.cos(x) * u
  )


SIXTEEN = {
  "all by 5 %": lambda bar: (1.05 * bar).astype(bar.dtype),
  "a row by 5 %": lambda bar: bar.at[7].multiply(1.05),
  "an entry of 1,024": lambda bar: bar.at[7, 7].set(0),
}


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("name", SIXTEEN)
def test_a_small_fault_in_a_branch_for_sixteen_bits_is_found(name, with_reference):
  x = np.random.default_rng(0).standard_normal((64, 16)).astype(jnp.bfloat16)
  options = {"reference": jnp.sin} if with_reference else {}
  checks = ["vjp", "finite_differences"]
  report = check_derivatives(in_bfloat16(SIXTEEN[name]), x, checks=checks, **options)
  assert "finite_differences: float64" in {row.check for row in report.failed}
  check_derivatives(in_bfloat16(lambda bar: bar), x, checks=checks, **options).raise_if_failed()


def test_a_function_that_casts_to_sixteen_bits_inside_is_confirmed():
  f = lambda x, w: jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
  x, w = X, X.T @ X
  check_derivatives(f, x, w, checks=CHECKS).raise_if_failed()
  wrong = jax.custom_vjp(f)
  wrong.defvjp(
    lambda x, w: (f(x, w), (x, w)),
    lambda args, u: tuple(
      c * bar for c, bar in zip((1, 1.05), jax.vjp(f, *args)[1](u), strict=True)
    ),
  )
  rows = check_derivatives(wrong, x, w, checks=["finite_differences"]).failed
  assert [row.of for row in rows] == ["gradient of args[1]"]


def test_the_evaluated_program_is_taken_where_the_call_strays():
  problem = Problem(dropout, (jax.random.key(0), X), {})
  assert Oracle(problem, None).evaluated
  assert not Oracle(Problem(jnp.sin, (X,), {}), None).evaluated
