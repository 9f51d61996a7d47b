"""The arguments of `check_derivatives` and of the functions that it checks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verified import X, statuses, with_rule

from softmax_jax import softmax
from softmax_jax.verify import DerivativeError, check_derivatives, describe_checks


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


def test_fast_leaves_out_what_compiles_much_and_says_so():
  done = []
  report = check_derivatives(
    jnp.sin, X, edge_points=[(X,)], skip="jvp", fast=True, progress=lambda *x: done.append(x)
  ).raise_if_failed()
  assert {"jvp", "jit", "second_order", "jacobian"} <= set(report.left_out)
  assert not any(name in row.check for row in report.rows for name in report.left_out)
  assert "\nNot looked at: each_argument, jvp, " in str(report)
  assert [(i, number) for i, number, _ in done] == [(i + 1, 10) for i in range(10)]
  assert done[0][2] == "value"
  assert report.to_dict()["left_out"] == list(report.left_out) == list((report + report).left_out)
  for options in ({"fast": True, "checks": ["vjp"]}, {"fast": 1}, {"progress": 1}):
    with pytest.raises((TypeError, ValueError), match=r"fast|progress"):
      check_derivatives(jnp.sin, X, **options)


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


def with_nondiff_argnums():
  f = jax.custom_vjp(lambda x, axis: jnp.sum(x, axis), nondiff_argnums=(1,))
  f.defvjp(lambda x, axis: (jnp.sum(x, axis), x), lambda axis, x, u: (jnp.ones_like(x),))
  return f


@pytest.mark.parametrize(
  "f, args, needed",
  [
    (lambda x, flag: x if flag else -x, (X, True), "args[1]"),
    (lambda x, n, axis: jnp.sum(x, axis), (X, 2, 1), "args[2]"),
    (lambda x, n: x * range(n)[-1], (X, 3), "args[1]"),
    (lambda p: p["x"] if p["on"] else -p["x"], ({"x": X, "on": True},), "args[0]['on']"),
    (jax.jit(jnp.sum, static_argnums=1), (X, 1), "args[1]"),
    (with_nondiff_argnums(), (X, 1), "args[1]"),
    (lambda x, a, b: x if a and b else -x, (X, True, 2), "args[1], args[2]"),
  ],
  ids=["flag", "axis", "size", "leaf", "static_argnums", "nondiff_argnums", "two"],
)
def test_an_argument_that_must_not_be_traced_is_to_be_passed_by_name(f, args, needed):
  with pytest.raises(TypeError, match="pass it in kwargs=") as error:
    check_derivatives(f, *args)
  assert f"needs the value of {needed}, " in str(error.value)


def test_an_error_of_f_itself_stays_what_it_is():
  with pytest.raises(ValueError, match="of its own"):
    check_derivatives(lambda x, n: (_ for _ in ()).throw(ValueError("of its own")), X, 3)


@pytest.mark.without("enable_x64")  # which has integers of 64 bits
def test_what_is_too_large_or_complex_is_refused():
  with pytest.raises(TypeError, match="integers of at most 32 bits"):
    check_derivatives(lambda x, n: x, X, 2**40)
  with pytest.raises(TypeError, match="real numbers, got complex ones"):
    check_derivatives(lambda x: jax.lax.complex(x, x), X)
