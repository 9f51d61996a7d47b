"""enable_forward_mode on JAX's new implementation of custom rules, and what is new about defvjp."""

import jax
import jax.numpy as jnp
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
  spiral_tangent,
  with_tangent,
)
from hijax_flags import FLAGS, NEW, from_0_12, switched
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from transformation_cases import iterated

from softmax_jax import enable_forward_mode

TRANSFORMS = [
  lambda f: f(X),
  lambda f: jax.jvp(f, (X,), (V,)),
  lambda f: jax.linearize(f, X)[1](V),
  lambda f: jax.hessian(total(f))(X),
  lambda f: jax.jacrev(jax.jacfwd(f))(X),
  lambda f: jax.vmap(jax.jacfwd(f))(BATCH),
  lambda f: jax.jvp(jax.vmap(jax.vmap(f), in_axes=1, out_axes=1), (BATCH[None],), (BATCH[None],)),
  lambda f: jax.jvp(lambda x: jnp.sum(iterated(f, x)[0]), (X,), (V,)),
  lambda f: jax.linearize(jax.checkpoint(f), X)[1](V),
  lambda f: jax.hessian(total(jax.checkpoint(f)))(X),
]


@from_0_12
@pytest.mark.parametrize(
  ("flags", "enable"),
  [
    (FLAGS, enable_forward_mode),
    (FLAGS, with_tangent),
    (FLAGS[:1], with_tangent),
    (FLAGS[1:2], enable_forward_mode),
    (FLAGS[2:], with_tangent),
  ],
)
def test_derivatives_under_the_new_implementations(enable, flags):
  with switched(True, flags):
    check(make_spiral(enable=enable), spiral, TRANSFORMS, 5e-6)


@pytest.mark.skipif(NEW, reason="supported")
def test_what_is_not_supported_before_is_said():
  with switched(True, FLAGS[:1]):
    with pytest.raises(TypeError, match=r"does not support jax_custom_vjp3 on JAX 0\.1[01]\..*"):
      make_spiral()
    with pytest.raises(TypeError, match=r"expected a jax\.custom_vjp function, got "):
      enable_forward_mode(spiral)


def norm(x, w):  # the second output does not depend on x: a batch shares it
  return jnp.sum(x * w), jnp.sum(w**2)


def norm_bwd(residuals, y_bar):
  (x, w), (a, b) = residuals, y_bar
  return a * w, a * x + b * 2 * w


def norm_tangent(residuals, args_dot):
  (x, w), (x_dot, w_dot) = residuals, args_dot
  x_dot, w_dot = jnp.zeros_like(x) if x_dot is None else x_dot, w_dot
  return jnp.sum(x_dot * w + x * w_dot), jnp.sum(2 * w * w_dot)


@from_0_12
@pytest.mark.parametrize("tangent", [None, norm_tangent])
def test_an_output_that_a_batch_shares(tangent):
  enable = lambda f: enable_forward_mode(f, tangent)
  f = define(norm, lambda *args: (norm(*args), args), norm_bwd, enable, generic_batching=True)

  def over_batch(f):
    shared = jax.vmap(f, in_axes=(0, None), out_axes=(0, None))
    return lambda w: jnp.sum(shared(BATCH, w)[0]) * shared(BATCH, w)[1]

  transforms = [
    lambda f: jax.grad(over_batch(f))(V),
    lambda f: jax.jvp(over_batch(f), (V,), (X,)),
    lambda f: jax.hessian(over_batch(f))(V),
  ]
  for on in (False, True):
    with switched(on):
      check(f, norm, transforms, 5e-6)


@from_0_12
@pytest.mark.devices(4)
def test_a_batch_over_a_mesh_axis_that_shares_an_argument():
  mesh = jax.make_mesh((2, 2), ("d", "v"), axis_types=(AxisType.Auto,) * 2)
  f = define(
    lambda x, w: x * w**2,
    lambda x, w: (x * w**2, (x, w)),
    lambda residuals, y_bar: (residuals[1] ** 2 * y_bar, 2 * residuals[0] * residuals[1] * y_bar),
  )

  def gradients(f):
    of_batch = jax.vmap(f, (0, None), spmd_axis_name="d")
    return jax.jit(jax.grad(lambda x, w: jnp.sum(of_batch(x, w) ** 2), (0, 1)))(BATCH[:, :2], V[:2])

  on_mesh = lambda x, w: jax.shard_map(f, mesh=mesh, in_specs=P("v"), out_specs=P("v"))(x, w)
  with switched(True, FLAGS[:1]):
    assert_close(gradients(on_mesh), gradients(lambda x, w: x * w**2))


@pytest.mark.parametrize("on", [False, pytest.param(True, marks=from_0_12)])
def test_optimize_remat(on):
  def fwd(x):  # with an operation that the function does not have
    return spiral(x) + jnp.tan(0 * x[0]), (x, jnp.sum(x**2))

  def count(enable):
    f = define(spiral, fwd, spiral_bwd, enable, optimize_remat=True)
    step = jax.checkpoint(lambda y, _: (f(y), None))
    gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(step, x, length=3)[0]))
    assert_close(jax.jit(gradient)(X), jax.grad(lambda x: jnp.sum(spiral(spiral(spiral(x)))))(X))
    return jax.jit(gradient).lower(X).as_text().count("stablehlo.tan ")

  with switched(on):
    assert count(enable_forward_mode) == count(plain) == 0
    if on:
      assert count(with_tangent) == 0
    else:
      with pytest.raises(TypeError, match="optimize_remat of spiral beside a tangent rule only"):
        count(with_tangent)


def with_method(method, enable):
  f = enable(jax.custom_vjp(spiral))
  if method == "defvjp_with_accums":
    f.defvjp_with_accums(spiral_fwd, lambda res, y_bar, x: x.accum(spiral_bwd(res, y_bar)[0]))
  elif method == "defvjp_with_logs":
    f.defvjp_with_logs(spiral_fwd, lambda res, y_bar: (spiral_bwd(res, y_bar), {"y_bar": y_bar}))
  else:
    again = lambda _, x: spiral_fwd(x)
    f.defremat(lambda x: (spiral(x), ()), again, spiral_bwd)
  return f


METHODS = "defvjp_with_accums", "defvjp_with_logs", "defremat"


@from_0_12
@pytest.mark.parametrize("tangent", [None, spiral_tangent])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_that_give_rules(method, tangent):
  f = with_method(method, lambda f: enable_forward_mode(f, tangent))
  with switched(True):
    check(f, spiral, TRANSFORMS[::3], 5e-6)
    if method == "defvjp_with_logs":
      for g in (f, jax.jit(f), jax.checkpoint(f)):
        (x_bar,), logs = jax.vjp(g, X)[1].with_logs(V)
        assert_close(x_bar, jax.vjp(spiral, X)[1](V)[0])
        assert_close(logs["y_bar"], V)
  needed = "requires the jax_custom_vjp3" if method == "defremat" else f"{method} of spiral only"
  with switched(False), pytest.raises((TypeError, NotImplementedError), match=needed):
    jax.grad(total(f))(X)
