"""enable_forward_mode on rules with named axes, and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close, check, fast_jit, total
from custom_rules import (
  BATCH,
  V,
  X,
  coupled,
  define,
  make_coupled,
  make_spiral,
  spiral,
  with_coupled_tangent,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

NAMED_AXIS = {
  "jvp inside": lambda f: jax.vmap(lambda x, v: jax.jvp(f, (x,), (v,)), axis_name="i")(
    BATCH, -BATCH
  ),
  "jvp inside, x alike": lambda f: jax.vmap(lambda v: jax.jvp(f, (X,), (v,)), axis_name="i")(BATCH),
  "jvp inside, all alike": lambda f: jax.vmap(
    lambda x: x * jax.jvp(f, (X,), (V,))[1], axis_name="i"
  )(BATCH),
  "jacfwd inside": lambda f: jax.vmap(jax.jacfwd(f), axis_name="i")(BATCH),
  "jacrev inside": lambda f: jax.vmap(jax.jacrev(f), axis_name="i", in_axes=1)(BATCH.T),
  "hessian inside": lambda f: jax.vmap(jax.hessian(f), axis_name="i")(BATCH),
  "jacfwd outside": lambda f: jax.jacfwd(jax.vmap(f, axis_name="i"))(BATCH),
  "jacrev outside": lambda f: jax.jacrev(jax.vmap(f, axis_name="i", in_axes=1))(BATCH.T),
  "hessian outside": lambda f: jax.hessian(total(jax.vmap(f, axis_name="i")))(BATCH),
  "all alike, jvp outside": lambda f: jax.jvp(
    lambda x: jax.vmap(lambda y: y * f(x), axis_name="i")(BATCH), (X,), (V,)
  ),
  "all alike, grad outside": lambda f: jax.grad(
    lambda x: jnp.sum(jax.vmap(lambda y: y * f(x), axis_name="i")(BATCH))
  )(X),
}


@pytest.mark.parametrize("name", NAMED_AXIS)
def test_collective_in_the_rules_under_vmap(name):
  transform = NAMED_AXIS[name]
  functions = [make_coupled(), make_coupled(enable=with_coupled_tangent), coupled]
  *ours, expected = fast_jit(lambda: [transform(f) for f in functions])()
  for actual in ours:
    assert_close(actual, expected, 3e-6)


def gated(weight, x):  # the weight is whole on every device, x is split
  return weight * jnp.sin(x)


def gated_bwd(residuals, y_bar):
  weight, x = residuals
  return jax.lax.psum(jnp.sum(y_bar * jnp.sin(x)), "i"), weight * jnp.cos(x) * y_bar


make_gated = functools.partial(define, gated, lambda w, x: (gated(w, x), (w, x)), gated_bwd)
SHARDED = {
  "psum": (make_coupled(), coupled),
  "psum, tangent": (make_coupled(enable=with_coupled_tangent), coupled),
  "weight": (functools.partial(make_gated(), np.float32(0.7)), lambda x: gated(0.7, x)),
}

# The functions inside shard_map, and the functions made of what shard_map returns.
INSIDE = {
  "value": lambda f: f,
  "grad": lambda f: jax.grad(total(f)),
  "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x * x,))[1],
  "jacfwd": lambda f: lambda x: jax.jacfwd(f)(x).sum(-1),
  "hvp": lambda f: lambda x: jax.jvp(jax.grad(total(f)), (x,), (jnp.cos(x),))[1],
  # Neither the tangents nor the batch vary over the mesh.
  "vmap jvp": lambda f: (
    lambda x: jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(jnp.eye(x.size, dtype=x.dtype)).sum(0)
  ),
}
OUTSIDE = {
  "value": lambda f: f,
  "grad": lambda f: jax.grad(total(f)),
  "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x * x,)),
  "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x * x),
  "jacfwd": lambda f: jax.jacfwd(f),
  "hessian": lambda f: jax.hessian(total(f)),
  "grad checkpoint": lambda f: jax.grad(total(jax.checkpoint(f))),
}


@pytest.mark.few(2)
@pytest.mark.devices(2)
@pytest.mark.parametrize(
  ("name", "axis_type"),
  [(name, AxisType.Auto) for name in SHARDED] + [("psum", AxisType.Explicit)],
)
def test_shard_map(name, axis_type):
  mesh = jax.make_mesh((2,), ("i",), axis_types=(axis_type,), devices=jax.devices()[:2])
  spec = PartitionSpec("i")
  x = jax.device_put(np.linspace(-1, 1, 4, dtype=np.float32), NamedSharding(mesh, spec))

  def sharded(f):
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)

  def programs(f):
    inside = [sharded(transform(f)) for transform in INSIDE.values()]
    return inside + [transform(sharded(f)) for transform in OUTSIDE.values()]

  def results(f):
    return fast_jit(lambda x: [program(x) for program in programs(f)])(x)

  with jax.set_mesh(mesh):
    ours = results(SHARDED[name][0])
    with jax.enable_checks(False), jax.disable_jit(False):  # JAX's own function needs both
      expected = results(SHARDED[name][1])
    assert_close(ours, expected, 5e-6)
    eager, expected = (sharded(INSIDE["jvp"](f))(x) for f in SHARDED[name])
    assert_close(eager, expected)


@pytest.mark.devices(2)
@pytest.mark.without("enable_x64")
def test_weight_that_is_whole_on_every_device():
  mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  args = (jnp.float32(0.7), jnp.linspace(-1, 1, 4))

  def sharded(f):
    specs = (PartitionSpec(), PartitionSpec("i"))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[1])

  transforms = [
    lambda f: jax.jvp(sharded(f), args, args),
    lambda f: jax.grad(total(sharded(f)), argnums=(0, 1))(*args),
    lambda f: jax.jacfwd(sharded(f), argnums=(0, 1))(*args),
    lambda f: jax.hessian(total(sharded(f)), argnums=(0, 1))(*args),
    lambda f: jax.vmap(jax.grad(total(sharded(f))), (0, None))(jnp.stack(args[:1] * 2), args[1]),
    lambda f: jax.jvp(lambda w: sharded(f)(w, args[1]), args[:1], args[:1]),
  ]
  check(make_gated(), gated, transforms)


@pytest.mark.devices(4)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(axis_type):
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type,) * 2)
  f = make_spiral()
  with jax.set_mesh(mesh):
    x = jax.device_put(BATCH[:, :2], NamedSharding(mesh, PartitionSpec("a", "b")))
    transforms = [
      lambda f: jax.jvp(f, (x,), (2 * x,)),
      lambda f: jax.grad(total(f))(x),
      lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (x,)), in_axes=1, out_axes=1)(x),
      lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x),
      lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f)(x)))(x),
      lambda f: jax.jvp(lambda x: jax.vmap(f)(x), (x,), (x,)),
      lambda f: jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (x,))[1]))(x),
    ]
    check(f, spiral, transforms)
    ours, reference = (
      jax.make_jaxpr(lambda g=g: [t(g) for t in transforms])() for g in (f, spiral)
    )
    assert [v.aval for v in ours.jaxpr.outvars] == [v.aval for v in reference.jaxpr.outvars]
    assert_close(transforms[2](f), transforms[2](spiral))  # without jit


@pytest.mark.devices(4)
def test_spmd_axis_name():
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

  def constrained(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec("b"))

  def bwd(c, y_bar):
    return (constrained(c * y_bar),)

  f = define(jnp.sin, lambda x: (jnp.sin(x), jnp.cos(x)), bwd)
  x = BATCH[:, :2]
  transforms = [
    lambda f: jax.vmap(jax.jacfwd(f), spmd_axis_name="a")(x),
    lambda f: jax.jacfwd(jax.vmap(f, spmd_axis_name="a"))(x),
    lambda f: jax.jacrev(jax.vmap(f, spmd_axis_name="a"))(x),
  ]
  with jax.set_mesh(mesh):
    check(f, jnp.sin, transforms)
    for transform in transforms:
      text = jax.jit(lambda t=transform: t(f)).lower().as_text()
      constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
      assert constraints
      assert all('"a"' in line and '"b"' in line for line in constraints)
