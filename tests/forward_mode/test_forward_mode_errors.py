"""What enable_forward_mode refuses, and the message that says why."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close, check, total
from custom_rules import (
  BATCH,
  V,
  X,
  define,
  make_spiral,
  plain,
  spiral,
  spiral_bwd,
  spiral_fwd,
  with_tangent,
)
from transformation_cases import iterated

from softmax_jax import enable_forward_mode


@pytest.mark.parametrize(
  ("value", "name"),
  [
    (spiral, "spiral of type function"),
    (jax.jit(make_spiral(enable=plain)), "spiral of type PjitFunction"),
    (functools.partial(make_spiral(enable=plain)), "partial"),
    (jax.custom_jvp(spiral), "spiral of type custom_jvp"),
    (make_spiral(), "spiral of type function"),
    (jax.custom_vjp, "custom_vjp of type type"),
    (None, "NoneType"),
  ],
)
def test_not_a_custom_vjp_function(value, name):
  with pytest.raises(TypeError) as error:
    enable_forward_mode(value)
  assert str(error.value) == (
    f"enable_forward_mode expected a jax.custom_vjp function, got {name}. Apply it directly to the "
    "object that jax.custom_vjp returns, before jit, vmap or functools.partial; a function without "
    "custom_vjp has forward mode already."
  )


def test_tangent_that_is_not_a_function():
  with pytest.raises(TypeError) as error:
    make_spiral(enable=functools.partial(enable_forward_mode, tangent=3))
  assert str(error.value) == "enable_forward_mode expected tangent to be a function, got int."


UNTRANSPOSABLE = {
  "clipped": lambda x, y_bar: jnp.clip(spiral_bwd(x, y_bar)[0], -100, 100),
  "squared": lambda x, y_bar: spiral_bwd(x, jnp.sign(y_bar) * y_bar**2 / jnp.abs(y_bar))[0],
  "selected": lambda x, y_bar: jnp.where(y_bar < 10, spiral_bwd(x, y_bar)[0], 0),
  "branched": lambda x, y_bar: spiral_bwd(x, y_bar if jnp.all(y_bar < 10) else -y_bar)[0],
  "looped": lambda x, y_bar: jax.lax.while_loop(
    lambda c: c[0] < 1, lambda c: (c[0] + 1, spiral_bwd(x, c[1])[0]), (0, y_bar)
  )[1],
}


@pytest.mark.without("disable_jit")  # a loop is none then
@pytest.mark.parametrize("name", UNTRANSPOSABLE)
def test_backward_rule_that_jax_cannot_transpose(name):
  def bwd(residuals, y_bar):
    return (UNTRANSPOSABLE[name](residuals, y_bar),)

  f = define(spiral, spiral_fwd, bwd)
  for transform in (
    lambda: jax.jvp(f, (X,), (V,)),
    lambda: jax.jit(jax.jacfwd(f))(X),
    lambda: jax.vmap(jax.jacfwd(f))(BATCH),
    lambda: jax.linearize(jax.jit(f), X)[1](V),
  ):
    with pytest.raises(TypeError) as error:
      transform()
    assert re.fullmatch(
      r"enable_forward_mode cannot differentiate spiral in forward mode, because JAX cannot "
      r"transpose its backward rule \(\w+: .*\)\. Make the rule linear in the cotangent with "
      r"operations that JAX can transpose, or pass a rule of your own: "
      r"enable_forward_mode\(spiral, tangent=\.\.\.\)\. Reverse mode is not affected\.",
      str(error.value),
      re.DOTALL,
    )
  assert_close(jax.grad(total(f))(X), jax.grad(total(spiral))(X))
  if name != "branched":  # which needs concrete values in reverse mode too
    transforms = [
      lambda f: jax.jit(jax.grad(total(f)))(X),
      lambda f: jax.vmap(jax.grad(total(f)))(BATCH),
      lambda f: jax.grad(total(jax.vmap(f)))(BATCH),
      lambda f: jax.grad(lambda x: jnp.sum(iterated(f, x)[0]))(X),
      lambda f: jax.grad(total(jax.checkpoint(f)))(X),
    ]
    check(f, spiral, transforms, 5e-6)
  f = define(spiral, spiral_fwd, bwd, with_tangent)
  assert_close(jax.jit(jax.jacfwd(f))(X), jax.jacfwd(spiral)(X))


def test_errors_of_the_users_own_rules_are_not_disguised():
  def broken(*_):
    raise ValueError("a mistake of the user")

  f = define(spiral, spiral_fwd, broken)
  for transform in (lambda: jax.jvp(f, (X,), (V,)), lambda: jax.grad(total(f))(X)):
    with pytest.raises(ValueError, match=r"^a mistake of the user"):
      transform()
  f = define(spiral, spiral_fwd, lambda _, y_bar: y_bar)
  for transform in (lambda: jax.jvp(f, (X,), (V,)), lambda: jax.grad(total(f))(X)):
    with pytest.raises(TypeError, match=r"^Custom VJP bwd rule .*must produce a"):
      transform()


@pytest.mark.without("enable_x64", "disable_jit", "check_tracer_leaks")  # the rules do leak
def test_rules_that_close_over_a_traced_value():
  def scaled(scale, transform):
    f = define(
      lambda x: scale * jnp.sin(x),
      lambda x: (scale * jnp.sin(x), jnp.cos(x)),
      lambda c, y_bar: (scale * c * y_bar,),
    )
    return transform(f)

  def everywhere(transform):
    return [
      lambda: jax.jit(lambda s: scaled(s, transform))(2.0),
      lambda: jax.vmap(lambda s: scaled(s, transform))(jnp.array([2.0, 2.0]))[0],
      lambda: jax.jvp(lambda s: scaled(s, transform), (2.0,), (1.0,))[0],
      lambda: jax.lax.scan(lambda s, _: (s, scaled(s, transform)), 2.0, None, length=1)[1][0],
    ]

  for reverse in everywhere(lambda f: jax.grad(lambda x: jnp.sum(f(x)))(X)):
    assert_close(reverse(), jnp.asarray(2 * np.cos(X)))
  for forward in everywhere(lambda f: jax.jvp(f, (X,), (V,))[1]):
    with pytest.raises(TypeError) as error:
      forward()
    assert str(error.value) == (
      "enable_forward_mode cannot differentiate <lambda> in forward mode, because its rules close "
      "over a value that JAX is tracing. Make that value an argument of <lambda>. Reverse mode is "
      "not affected."
    )
