"""The tangent rule that a user gives to enable_forward_mode."""

import functools

import jax
import jax.numpy as jnp
import pytest
from comparisons import assert_close, check, total
from custom_rules import (
  BATCH,
  PARAMS,
  V,
  X,
  define,
  make_spiral,
  mixed,
  mixed_bwd,
  mixed_fwd,
  mixed_tangent,
  scaled,
  scaled_bwd,
  scaled_fwd,
  spiral,
  spiral_tangent,
)
from transformation_cases import iterated

from softmax_jax import enable_forward_mode


def refuse(*_):
  raise AssertionError("the tangent rule ran")


def test_tangent_rule_is_never_used_in_reverse_mode():
  f = make_spiral(enable=functools.partial(enable_forward_mode, tangent=refuse))
  transforms = [
    lambda f: jax.grad(total(f))(X),
    lambda f: jax.jacrev(jax.jacrev(f))(X),
    lambda f: jax.vmap(jax.jacrev(f))(BATCH),
    lambda f: jax.jacrev(jax.vmap(f))(BATCH),
    lambda f: jax.grad(lambda x: jnp.sum(iterated(f, x)[0]))(X),
    lambda f: jax.grad(total(jax.checkpoint(jax.jit(f))))(X),
    lambda f: jax.linear_transpose(jax.linearize(f, X)[1], X)(V),
  ]
  check(f, spiral, transforms, 5e-6)
  for forward in (lambda: jax.jvp(f, (X,), (V,)), lambda: jax.jit(jax.jacfwd(f))(X)):
    with pytest.raises(AssertionError, match="the tangent rule ran"):
      forward()


def test_tangent_rule_replaces_the_transpose():
  def half(residuals, args_dot):
    return spiral_tangent(residuals, args_dot) / 2

  f = make_spiral(enable=functools.partial(enable_forward_mode, tangent=half))
  expected = jax.jacfwd(spiral)(X)
  for jacfwd in (jax.jacfwd(f), jax.jit(jax.jacfwd(f)), lambda x: jax.linearize(f, x)[1](V)):
    actual = jacfwd(X)
    assert_close(actual, (expected @ V if actual.ndim == 1 else expected) / 2)
  assert_close(jax.vmap(jax.jacfwd(f))(BATCH), jax.vmap(jax.jacfwd(spiral))(BATCH) / 2)
  assert_close(jax.jacrev(f)(X), expected)


def test_tangent_rule_gets_none_for_what_is_not_differentiated():
  seen = []

  def rule(residuals, args_dot):
    seen.append(jax.tree.map(lambda dot: dot is not None, args_dot, is_leaf=lambda d: d is None))
    return mixed_tangent(residuals, args_dot)

  f = define(mixed, mixed_fwd, mixed_bwd, functools.partial(enable_forward_mode, tangent=rule))
  jax.jvp(lambda x: f(PARAMS, x, 3), (V,), (X,))
  jax.jvp(lambda w: f({"weight": w, "shift": (1.0,)}, V, 3), (X,), (X,))
  jax.jvp(lambda scale: f(PARAMS, V, 3, scale), (2.0,), (1.0,))
  jax.vmap(jax.jacfwd(f, argnums=1), in_axes=(None, 0, None))(PARAMS, BATCH, 3)
  assert seen == [
    ({"weight": False, "shift": (False,)}, True, False, False),
    ({"weight": True, "shift": (False,)}, False, False, False),
    ({"weight": False, "shift": (False,)}, False, False, True),
    ({"weight": False, "shift": (False,)}, True, False, False),
  ]


@pytest.mark.without("enable_x64")
def test_tangent_rule_may_return_none_for_a_zero():
  def rule(x, args_dot):
    return None, args_dot[0]

  def fwd(x):
    return (jnp.round(x), x), None

  enable = functools.partial(enable_forward_mode, tangent=rule)
  f = define(lambda x: fwd(x)[0], fwd, lambda _, bars: (bars[1],), enable)
  assert_close(jax.jvp(f, (X,), (V,))[1], (jnp.zeros(3), jnp.asarray(V)))
  assert_close(jax.jit(jax.jacfwd(f))(X), (jnp.zeros((3, 3)), jnp.eye(3)))


def test_tangent_rule_with_the_wrong_structure():
  def check_message(returned, structure):
    rule = functools.partial(enable_forward_mode, tangent=lambda *_: returned)
    f = define(scaled, scaled_fwd, scaled_bwd, rule)
    with pytest.raises(TypeError) as error:
      jax.jvp(f, (X, V, X), (V, V, V))
    assert str(error.value) == (
      "the tangent rule of scaled must return the structure of its output, PyTreeDef((*, *)), "
      f"got {structure}."
    )

  check_message(X, "PyTreeDef(*)")
  check_message((X,), "PyTreeDef((*,))")
  check_message((X, [X, X]), "PyTreeDef((*, [*, *]))")


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (
      lambda y_dot: (y_dot, y_dot),
      "the tangent rule of spiral must return the structure of its output, PyTreeDef(*), "
      "got PyTreeDef((*, *)).",
    ),
    (
      lambda y_dot: y_dot[:2],
      "the tangent rule of spiral must return tangents of the shape and dtype of its output, "
      "float32[3], got float32[2].",
    ),
    (
      lambda y_dot: y_dot.astype(jnp.bfloat16),
      "the tangent rule of spiral must return tangents of the shape and dtype of its output, "
      "float32[3], got bfloat16[3].",
    ),
  ],
)
def test_tangent_rule_with_a_wrong_result(wrong, message):
  def rule(residuals, args_dot):
    return wrong(spiral_tangent(residuals, args_dot))

  f = make_spiral(enable=functools.partial(enable_forward_mode, tangent=rule))
  for transform in (
    lambda: jax.jvp(f, (X,), (V,)),
    lambda: jax.jit(jax.jacfwd(f))(X),
    lambda: jax.vmap(jax.jacfwd(f))(BATCH),
  ):
    with pytest.raises(TypeError) as error:
      transform()
    assert str(error.value) == message
  assert_close(jax.jacrev(f)(X), jax.jacrev(spiral)(X))
