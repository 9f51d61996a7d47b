"""Reverse mode is the user's rule and nothing else: it costs, saves and traces no more."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from comparisons import assert_close, cost, total
from custom_rules import (
  BATCH,
  SCALED_RULES,
  V,
  X,
  define,
  make_orbit,
  make_spiral,
  plain,
  scaled,
  spiral,
  spiral_bwd,
  spiral_fwd,
  spiral_tangent,
  with_orbit_tangent,
  with_scaled_tangent,
  with_tangent,
)
from transformation_cases import iterated

from softmax_jax import enable_forward_mode


def settings(f, x):
  """Programs whose backward pass runs `f`'s rule, and their arguments."""
  batch = jnp.stack([x, -x])
  dots = jax.checkpoint_policies.dots_saveable
  names = jax.checkpoint_policies.save_only_these_names("residual")
  return {
    "vjp": (lambda x, y_bar: jax.vjp(f, x)[1](y_bar), x, x),
    "vmap grad": (jax.vmap(jax.grad(total(f))), batch),
    "grad vmap": (jax.grad(total(jax.vmap(f))), batch),
    "grad scan": (jax.grad(lambda x: jnp.sum(iterated(f, x)[0])), x),
    "grad checkpoint": (jax.grad(total(jax.checkpoint(lambda x: f(f(x)), policy=dots))), x),
    "grad checkpoint names": (jax.grad(total(jax.checkpoint(lambda x: f(f(x)), policy=names))), x),
    "grad of grad": (jax.grad(total(jax.grad(total(f)))), x),
  }


@pytest.mark.parametrize(
  ("rule", "setting"),
  [("spiral", setting) for setting in settings(spiral, X)]
  + [("orbit", setting) for setting in ("vjp", "grad vmap", "grad checkpoint")],
)
def test_reverse_mode_costs_what_the_plain_function_costs(rule, setting):
  make, tangent = {
    "spiral": (make_spiral, with_tangent),
    "orbit": (make_orbit, with_orbit_tangent),
  }[rule]
  x = jnp.linspace(-1, 1, 64)
  expected = cost(*settings(make(enable=plain), x)[setting])
  for enable in (enable_forward_mode, tangent):
    assert cost(*settings(make(enable=enable), x)[setting]) == expected


@pytest.mark.parametrize("enable", [enable_forward_mode, with_scaled_tangent])
@pytest.mark.parametrize("rules", SCALED_RULES)
def test_backward_pass_stops_where_the_rule_has_no_cotangent(rules, enable):
  options, fwd, bwd = SCALED_RULES[rules]

  def programs(enable):
    f = define(scaled, fwd, bwd, enable, **options)

    def loss(a, x):  # all that leads to the shift has no gradient
      return jnp.sum(f(x @ a, x @ a, jnp.tanh(x @ a @ a) @ a)[0])

    def mean_loss(a, xs):
      return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(a, xs))

    return [(jax.grad(loss), a, x), (jax.grad(mean_loss), a, jnp.stack([x, -x]))]

  a, x = jnp.linspace(-1, 1, 64).reshape(8, 8), jnp.ones((4, 8))
  for ours, expected in zip(programs(enable), programs(plain), strict=True):
    assert cost(*ours) == cost(*expected)
    program, *args = ours
    assert_close(jax.jit(program)(*args), jax.jit(expected[0])(*args), 1e-6)


@pytest.mark.parametrize("enable", [enable_forward_mode, with_tangent])
def test_backward_pass_stops_where_no_rule_after_it_has_a_cotangent(enable):
  def never(*_):
    raise AssertionError("the rule has no cotangent to pull back")

  f = define(spiral, spiral_fwd, never, enable)
  without_gradient = define(lambda y: 2 * y, lambda y: (2 * y, None), lambda *_: (None,), enable)
  gradient = jax.grad(lambda x: jnp.sum(without_gradient(f(x)) + x**2))
  assert_close(gradient(X), 2 * X)
  assert_close(jax.jit(gradient)(X), 2 * X)


@pytest.mark.parametrize("enable", [enable_forward_mode, with_tangent])
def test_saved_residuals_are_those_of_the_plain_function(enable):
  def saved(f):
    pullbacks = [
      jax.vjp(f, X)[1],
      jax.vjp(jax.jit(f), X)[1],
      jax.vjp(jax.vmap(f), BATCH)[1],
      jax.vjp(lambda x: f(2 * x), X)[1],
      jax.vjp(jax.checkpoint(f), X)[1],
    ]
    return [sorted(jax.tree.leaves(pullback), key=jnp.size) for pullback in pullbacks]

  assert_close(saved(make_spiral(enable=enable)), saved(make_spiral(enable=plain)))


@pytest.mark.parametrize("tangent", [None, lambda c, args_dot: c * args_dot[0]])
def test_nothing_but_residuals_stays_alive(tangent):
  enable = functools.partial(enable_forward_mode, tangent=tangent)
  f = define(jnp.sin, lambda x: (jnp.sin(x), jnp.cos(x)), lambda c, y_bar: (c * y_bar,), enable)
  x = 2 * jnp.asarray(X)
  alive = weakref.ref(x)
  pullback = jax.vjp(f, x)[1]
  del x
  gc.collect()
  assert alive() is None
  pullback(V)


def counting(enable):
  """The spiral function and a dictionary of how often each of its parts has run."""
  counts = {"function": 0, "fwd": 0, "bwd": 0, "tangent": 0}

  def counted(name, part):
    def wrapped(*args):
      counts[name] += 1
      return part(*args)

    return wrapped

  parts = {"function": spiral, "fwd": spiral_fwd, "bwd": spiral_bwd, "tangent": spiral_tangent}
  parts = {name: counted(name, part) for name, part in parts.items()}
  tangent = parts.pop("tangent")
  f = jax.custom_vjp(parts["function"])
  f.defvjp(parts["fwd"], parts["bwd"])
  return enable(f, tangent), counts


@pytest.mark.parametrize("tangent", [True, False])
def test_rules_are_traced_once(tangent):
  def enable(f, rule):
    return enable_forward_mode(f, rule if tangent else None)

  def counts(enable, transform):
    f, counts = counting(enable)
    jax.block_until_ready(jax.jit(lambda: transform(f))())
    return counts

  for transform in (
    lambda f: jax.grad(total(f))(X),
    lambda f: jax.vmap(jax.grad(total(f)))(BATCH),
    lambda f: jax.grad(total(jax.vmap(f)))(BATCH),
    lambda f: jax.grad(lambda x: jnp.sum(iterated(f, x)[0]))(X),
    lambda f: jax.grad(total(jax.checkpoint(f)))(X),
  ):
    expected = counts(lambda f, _: f, transform)
    assert expected["bwd"] > 0
    assert counts(enable, transform) == expected
  for transform in (lambda f: jax.jvp(f, (X,), (V,)), lambda f: jax.jacfwd(f)(X)):
    # JAX's new implementation traces the function for the type of its output.
    function = int(jax.config.jax_custom_vjp3)
    expected = {"function": function, "fwd": 1, "bwd": int(not tangent), "tangent": int(tangent)}
    assert counts(enable, transform) == expected
