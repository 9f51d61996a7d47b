"""enable_forward_mode on users' own jax.custom_vjp functions, against plain JAX."""

import concurrent.futures
import functools
import gc
import inspect
import itertools
import re
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import default_promotion

from softmax_jax import enable_forward_mode

X = np.array([0.3, -1.1, 0.7], np.float32)
V = np.array([1.0, 0.4, -0.6], np.float32)
BATCH = np.stack([X, V, X - V, X * V])


def assert_close(actual, expected, tolerance=2e-6):
  """The same structure, shapes and dtypes, and values to `tolerance` of the norm, leaf by leaf."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(e), jnp.result_type(e))
    if jnp.result_type(e) == jax.dtypes.float0:
      continue
    wide = complex if jnp.iscomplexobj(e) else float
    a, e = np.asarray(a).astype(wide), np.asarray(e).astype(wide)
    assert np.linalg.norm(a - e) <= tolerance * np.linalg.norm(e), f"{a} is not {e}"


# Compiles fast what runs once.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def check(f, reference, transforms, tolerance=2e-6):
  """That `f` and `reference` agree under each transformation, all in one compiled program."""
  results = fast_jit(lambda: [(t(f), t(reference)) for t in transforms])()
  for actual, expected in results:
    assert_close(actual, expected, tolerance)


def define(function, fwd, bwd, enable=enable_forward_mode, **options):
  """A custom_vjp function with these rules; `enable=plain` leaves it as it is."""
  nondiff = {k: options.pop(k) for k in list(options) if k.startswith("nondiff")}
  f = jax.custom_vjp(function, **nondiff)
  f.defvjp(fwd, bwd, **options)
  return enable(f)


def plain(f):
  return f


# The function of the tests below: its Jacobian is neither diagonal nor symmetric.
def spiral(x):
  return jnp.sin(x) * jnp.sum(x**2)


def spiral_fwd(x):
  return spiral(x), (x, checkpoint_name(jnp.sum(x**2), "residual"))


def spiral_bwd(residuals, y_bar):
  x, s = residuals
  return (jnp.cos(x) * s * y_bar + 2 * x * jnp.sum(jnp.sin(x) * y_bar),)


def spiral_tangent(residuals, args_dot):
  (x, s), (x_dot,) = residuals, args_dot
  return jnp.cos(x) * s * x_dot + jnp.sin(x) * jnp.sum(2 * x * x_dot)


make_spiral = functools.partial(define, spiral, spiral_fwd, spiral_bwd)
with_tangent = functools.partial(enable_forward_mode, tangent=spiral_tangent)


# A function whose backward pass is a scan that recomputes what the forward pass did not save.
# (The loop bodies stand apart so that JAX recognizes them and compiles them once.)
def orbit_step(carry, _):
  x, c = carry
  return (x, jnp.sin(c) + x), c


def orbit_step_bwd(carry, c):
  c_bar, x_bar = carry
  return (c_bar * jnp.cos(c), x_bar + c_bar), None


def orbit(x):
  return jax.lax.scan(orbit_step, (x, x), None, length=3)[0][1]


def orbit_bwd(x, y_bar):
  _, cs = jax.lax.scan(orbit_step, (x, x), None, length=3)
  bars, _ = jax.lax.scan(orbit_step_bwd, (y_bar, jnp.zeros_like(x)), cs, reverse=True)
  return (sum(bars),)


def orbit_tangent(x, args_dot):
  (x_dot,) = args_dot
  c, c_dot = x, x_dot
  for _ in range(3):
    c, c_dot = jnp.sin(c) + x, jnp.cos(c) * c_dot + x_dot
  return c_dot


make_orbit = functools.partial(define, orbit, lambda x: (orbit(x), x), orbit_bwd)
with_orbit_tangent = functools.partial(enable_forward_mode, tangent=orbit_tangent)


def iterated(f, x):
  return jax.lax.scan(lambda c, a: (0.5 * f(c) + a, f(c)), x, jnp.stack([x, x]))


def looped(f, x):
  return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 0.5 * f(c[1])), (0, x))[1]


def branched(f, x):
  return jax.lax.cond(x[0] > 0, f, lambda x: f(x * x), x)


def counted(f, x):
  return jax.lax.fori_loop(0, 2, lambda _, c: 0.5 * f(c), x)


def custom_jvp_around(f):
  g = jax.custom_jvp(lambda x: f(x) + x)
  g.defjvp(lambda xs, dots: jax.jvp(lambda x: f(x) + x, xs, dots))
  return g


def custom_vjp_around(f):
  g = jax.custom_vjp(lambda x: f(x) + x)
  g.defvjp(lambda x: jax.vjp(lambda x: f(x) + x, x), lambda pullback, y_bar: pullback(y_bar))
  return g


def total(f):
  return lambda *args: jnp.sum(f(*args) ** 2)


TRANSFORMATIONS = {
  "value": lambda f: f(X),
  "jvp": lambda f: jax.jvp(f, (X,), (V,)),
  "vjp": lambda f: jax.vjp(f, X)[1](V),
  "linearize": lambda f: jax.linearize(f, X)[1](V),
  "linear_transpose linearize": lambda f: jax.linear_transpose(jax.linearize(f, X)[1], X)(V),
  "linear_transpose twice": lambda f: jax.linear_transpose(
    lambda t: jax.linear_transpose(jax.linearize(f, X)[1], X)(t)[0], X
  )(V),
  "hessian": lambda f: jax.hessian(f)(X),
  "grad": lambda f: jax.grad(total(f))(X),
  "jvp of grad": lambda f: jax.jvp(jax.grad(total(f)), (X,), (V,)),
  "grad of jvp": lambda f: jax.grad(lambda x: total(lambda v: jax.jvp(f, (x,), (v,))[1])(V))(X),
  "vjp of jvp": lambda f: jax.vjp(lambda x, v: jax.jvp(f, (x,), (v,)), X, V)[1]((V, X)),
  "vmap jvp": lambda f: jax.vmap(lambda x, v: jax.jvp(f, (x,), (v,)))(BATCH, -BATCH),
  "vmap jvp x": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (V,)))(BATCH),
  "vmap jvp v": lambda f: jax.vmap(lambda v: jax.jvp(f, (X,), (v,)), out_axes=(None, 1))(BATCH),
  "vmap jvp of a constant": lambda f: jax.vmap(lambda x: x + jax.jvp(f, (X,), (V,))[1])(BATCH),
  "vmap jacfwd": lambda f: jax.vmap(jax.jacfwd(f), in_axes=1, out_axes=2)(BATCH.T),
  "vmap jacrev": lambda f: jax.vmap(jax.jacrev(f), in_axes=-1, out_axes=-1)(BATCH.T),
  "vmap hessian": lambda f: jax.vmap(jax.hessian(f))(BATCH),
  "vmap vmap jacfwd": lambda f: jax.vmap(jax.vmap(jax.jacfwd(f)), in_axes=1)(BATCH[:, None]),
  "jacfwd vmap": lambda f: jax.jacfwd(jax.vmap(f, in_axes=1, out_axes=1))(BATCH.T),
  "jacrev vmap": lambda f: jax.jacrev(jax.vmap(f))(BATCH),
  "jacfwd vmap grad": lambda f: jax.jacfwd(jax.vmap(jax.grad(total(f))))(BATCH),
  "jacrev vmap jacfwd": lambda f: jax.jacrev(jax.vmap(jax.jacfwd(f)))(BATCH),
  "vmap grad jit": lambda f: jax.vmap(jax.grad(total(jax.jit(f))))(BATCH),
  "jacfwd jit vmap jit": lambda f: jax.jacfwd(jax.jit(jax.vmap(jax.jit(f))))(BATCH),
  "hessian jit": lambda f: jax.hessian(jax.jit(f))(X),
  "jvp checkpoint": lambda f: jax.jvp(jax.checkpoint(f), (X,), (V,)),
  "grad checkpoint": lambda f: jax.grad(total(jax.checkpoint(lambda x: f(f(x)))))(X),
  "hessian checkpoint": lambda f: jax.hessian(jax.checkpoint(f))(X),
  "grad checkpoint jvp": lambda f: jax.grad(
    total(jax.checkpoint(lambda x: jax.jvp(f, (x,), (V,))[1]))
  )(X),
  "jacfwd scan": lambda f: jax.jacfwd(functools.partial(iterated, f))(X),
  "jacrev scan": lambda f: jax.jacrev(functools.partial(iterated, f))(X),
  "hessian scan": lambda f: jax.hessian(lambda x: iterated(f, x)[0])(X),
  "scan jvp": lambda f: iterated(lambda x: jax.jvp(f, (x,), (V,))[1], X),
  "scan jvp grad": lambda f: iterated(lambda x: jax.jvp(jax.grad(total(f)), (x,), (V,))[1], X),
  "grad scan jacfwd": lambda f: jax.grad(
    lambda x: jnp.sum(iterated(lambda x: jax.jacfwd(f)(x) @ x, x)[0])
  )(X),
  "jvp while_loop": lambda f: jax.jvp(functools.partial(looped, f), (X,), (V,)),
  "jacfwd while_loop": lambda f: jax.jacfwd(functools.partial(looped, f))(X),
  "while_loop jvp": lambda f: looped(lambda x: jax.jvp(f, (x,), (V,))[1], X),
  "while_loop grad": lambda f: looped(jax.grad(total(f)), X),
  "vmap jvp while_loop": lambda f: jax.vmap(
    lambda x: jax.jvp(functools.partial(looped, f), (x,), (V,))
  )(BATCH),
  "jacfwd fori_loop": lambda f: jax.jacfwd(functools.partial(counted, f))(X),
  "jacrev fori_loop": lambda f: jax.jacrev(functools.partial(counted, f))(X),
  "jacfwd cond": lambda f: jax.jacfwd(functools.partial(branched, f))(X),
  "jacrev cond": lambda f: jax.jacrev(functools.partial(branched, f))(-X),
  "vmap jacfwd cond": lambda f: jax.vmap(jax.jacfwd(functools.partial(branched, f)))(BATCH),
  "jacfwd map": lambda f: jax.jacfwd(lambda xs: jax.lax.map(f, xs))(BATCH),
  "jacrev map": lambda f: jax.jacrev(lambda xs: jax.lax.map(f, xs))(BATCH),
  "map jacfwd": lambda f: jax.lax.map(jax.jacfwd(f), BATCH),
  "jacfwd custom_jvp": lambda f: jax.jacfwd(custom_jvp_around(f))(X),
  "hessian custom_jvp": lambda f: jax.hessian(custom_jvp_around(f))(X),
  "jacrev custom_vjp": lambda f: jax.jacrev(custom_vjp_around(f))(X),
} | {
  " ".join(nest): functools.partial(
    lambda nest, f: functools.reduce(lambda g, d: getattr(jax, d)(g), reversed(nest), f)(X), nest
  )
  for depth in (1, 2, 3)
  for nest in itertools.product(["jacfwd", "jacrev"], repeat=depth)
}


def check_transformation(transformation, functions, reference):
  transform = TRANSFORMATIONS[transformation]
  *ours, expected = fast_jit(lambda: [transform(f) for f in (*functions, reference)])()
  for actual in ours:
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformation(transformation):
  check_transformation(transformation, [make_spiral(), make_spiral(enable=with_tangent)], spiral)


@pytest.mark.parametrize(
  "transformation",
  ["linearize", "hessian", "vmap jacfwd", "jacrev vmap", "jacfwd scan", "jacrev scan"],
)
def test_transformation_of_a_rule_that_scans(transformation):
  functions = [make_orbit(), make_orbit(enable=with_orbit_tangent)]
  check_transformation(transformation, functions, orbit)


# Reverse mode is the user's rule and nothing else.


def cost(f, *args):
  """Floating-point operations, bytes accessed and temporary bytes of the compiled program."""
  compiled = jax.jit(f).lower(*args).compile()
  analysis = compiled.cost_analysis()
  memory = compiled.memory_analysis()
  return analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes


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


def scaled(x, weight, shift):
  return x * weight + shift, jnp.sin(x)


def scaled_fwd(x, weight, shift):
  return scaled(x, weight, shift), (x, weight)


def scaled_bwd(residuals, bars):  # the shift is declared not to matter
  x, weight = residuals
  return bars[0] * weight + bars[1] * jnp.cos(x), bars[0] * x, None


def scaled_fwd_with_symbolic_zeros(x, weight, shift):
  return scaled_fwd(x.value, weight.value, shift.value)


def scaled_bwd_with_symbolic_zeros(residuals, bars):
  x, weight = residuals
  y_bar, z_bar = (None if type(bar) is SymbolicZero else bar for bar in bars)
  x_bar = 0 * x if y_bar is None else y_bar * weight
  x_bar = x_bar if z_bar is None else x_bar + z_bar * jnp.cos(x)
  return x_bar, None if y_bar is None else y_bar * x, None


def scaled_tangent(residuals, args_dot):
  (x, weight), (x_dot, weight_dot, _) = residuals, args_dot
  y_dot = 0 * x if x_dot is None else x_dot * weight
  y_dot = y_dot if weight_dot is None else y_dot + x * weight_dot
  return y_dot, None if x_dot is None else jnp.cos(x) * x_dot


SCALED_RULES = {
  "zeros": ({}, scaled_fwd, scaled_bwd),
  "symbolic zeros": (
    {"symbolic_zeros": True},
    scaled_fwd_with_symbolic_zeros,
    scaled_bwd_with_symbolic_zeros,
  ),
}
with_scaled_tangent = functools.partial(enable_forward_mode, tangent=scaled_tangent)


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


@pytest.mark.parametrize("enable", [enable_forward_mode, with_scaled_tangent])
@pytest.mark.parametrize("rules", SCALED_RULES)
def test_arguments_and_outputs_without_derivative(rules, enable):
  options, fwd, bwd = SCALED_RULES[rules]
  f = define(scaled, fwd, bwd, enable, **options)

  def reference(x, weight, shift):
    return scaled(x, weight, jax.lax.stop_gradient(shift))

  transforms = [
    lambda f: jax.jvp(f, (X, V, X), (V, X, X)),
    lambda f: jax.jvp(lambda x: f(x, V, V), (X,), (V,)),
    lambda f: jax.jvp(lambda weight: f(X, weight, V), (X,), (V,)),
    lambda f: jax.jvp(lambda shift: f(X, V, shift), (X,), (V,)),
    lambda f: jax.jacfwd(f, argnums=(0, 1, 2))(X, V, X),
    lambda f: jax.jacrev(f, argnums=(2, 0))(X, V, X),
    lambda f: jax.hessian(lambda x, weight: f(x, weight, x)[0], argnums=(0, 1))(X, V),
    lambda f: jax.vmap(jax.grad(lambda *args: f(*args)[1]), (0, None, None))(X, V[0], X[0]),
  ]
  check(f, reference, transforms, 1e-6)


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
    expected = {"function": 0, "fwd": 1, "bwd": int(not tangent), "tangent": int(tangent)}
    assert counts(enable, transform) == expected


# Arguments and outputs of every kind.


def mixed(params, x, count, scale=2.0):
  y = jnp.sin(params["weight"] * x) + params["shift"][0] * count
  return {"y": scale * y, "count": count + 1, "pair": (jnp.sum(x * x), scale)}


def mixed_fwd(params, x, count, scale=2.0):
  return mixed(params, x, count, scale), (params, x, count, scale, {"units": 1})


def mixed_bwd(residuals, bars):
  params, x, count, scale, _ = residuals
  slope = jnp.cos(params["weight"] * x) * scale * bars["y"]
  y = jnp.sin(params["weight"] * x) + params["shift"][0] * count
  params_bar = {"weight": slope * x, "shift": (jnp.sum(scale * bars["y"] * count),)}
  x_bar = slope * params["weight"] + 2 * x * bars["pair"][0]
  return params_bar, x_bar, None, jnp.sum(y * bars["y"]) + bars["pair"][1]


def mixed_tangent(residuals, args_dot):
  params, x, count, scale, units = residuals
  assert list(units) == ["units"]
  params_dot, x_dot, count_dot, scale_dot = args_dot
  assert count_dot is None
  dots = (params_dot["weight"], params_dot["shift"][0], x_dot, scale_dot)
  likes = (params["weight"], params["shift"][0], x, scale)
  weight_dot, shift_dot, x_dot, scale_dot = (
    jnp.zeros_like(like) if dot is None else dot for dot, like in zip(dots, likes, strict=True)
  )
  angle = params["weight"] * x
  y_dot = jnp.cos(angle) * (weight_dot * x + params["weight"] * x_dot) + shift_dot * count
  y_dot = scale * y_dot + scale_dot * (jnp.sin(angle) + params["shift"][0] * count)
  return {"y": y_dot, "count": None, "pair": (2 * jnp.sum(x * x_dot), scale_dot)}


PARAMS = {"weight": X, "shift": (np.float32(0.5),)}
FLOAT0 = np.zeros((), jax.dtypes.float0)


@pytest.mark.without("enable_x64")
@pytest.mark.parametrize(
  "enable", [enable_forward_mode, functools.partial(enable_forward_mode, tangent=mixed_tangent)]
)
@default_promotion()
def test_pytrees_integers_keywords_and_defaults(enable):
  f = define(mixed, mixed_fwd, mixed_bwd, enable)
  args = (PARAMS, V, 3, np.float32(1.5))
  params_dot = {"weight": V, "shift": (np.float32(2),)}
  transforms = [
    lambda f: jax.jvp(f, args, (params_dot, X, FLOAT0, np.float32(1))),
    lambda f: jax.jvp(lambda params, x: f(params, x, 3), (PARAMS, V), (params_dot, X)),
    lambda f: jax.jvp(lambda x: f(x=x, count=3, params=PARAMS), (V,), (X,)),
    lambda f: jax.jvp(lambda scale: f(PARAMS, V, scale=scale, count=3), (0.5,), (1.0,)),
    lambda f: jax.linearize(lambda x: f(PARAMS, x, jnp.int32(3)), V)[1](X),
    lambda f: jax.jacfwd(lambda *args: f(*args)["y"], argnums=(0, 1, 3))(*args),
    lambda f: jax.jacrev(lambda *args: f(*args)["pair"], argnums=(3, 1))(*args),
    lambda f: jax.hessian(lambda *args: f(*args)["y"], argnums=(0, 1, 3))(*args),
    lambda f: jax.vmap(
      lambda params, x, count: jax.jvp(lambda x: f(params, x, count), (x,), (x,)),
      in_axes=({"weight": 1, "shift": None}, None, 0),
    )(PARAMS | {"weight": np.stack([X, V], 1)}, V, np.arange(2)),
  ]
  check(f, mixed, transforms, 3e-6)
  assert_close(transforms[0](f), transforms[0](mixed))  # without jit


def test_signature_name_and_documentation_are_those_of_the_function():
  f = define(mixed, mixed_fwd, mixed_bwd)
  assert inspect.signature(f) == inspect.signature(mixed)
  assert (f.__name__, f.__doc__) == (mixed.__name__, mixed.__doc__)


def test_rules_can_be_defined_after_decoration():
  @enable_forward_mode
  @jax.custom_vjp
  def f(x):
    return spiral(x)

  with pytest.raises(AttributeError, match="No VJP defined for custom_vjp function f"):
    jax.jvp(f, (X,), (V,))
  f.defvjp(spiral_fwd, spiral_bwd)
  assert_close(jax.jacfwd(f)(X), jax.jacfwd(spiral)(X))
  assert_close(jax.jacrev(f)(X), jax.jacfwd(spiral)(X))


def power(kind, x, options, y):
  return kind(x) ** options["exponent"] * y


def power_fwd(kind, x, options, y):
  return power(kind, x, options, y), (x, y)


def power_bwd(kind, options, residuals, z_bar):
  x, y = residuals
  _, pullback = jax.vjp(lambda x, y: power(kind, x, options, y), x, y)
  return pullback(z_bar)


def power_tangent(kind, options, residuals, args_dot):
  x, y = residuals
  return jax.jvp(lambda x, y: power(kind, x, options, y), (x, y), args_dot)[1]


@pytest.mark.parametrize(
  "nondiff", [{"nondiff_argnums": (0, 2)}, {"nondiff_argnames": ["kind", "options"]}]
)
@pytest.mark.parametrize("tangent", [None, power_tangent])
def test_arguments_that_are_no_arrays(nondiff, tangent):
  enable = functools.partial(enable_forward_mode, tangent=tangent)
  f = define(power, power_fwd, power_bwd, enable, **nondiff)
  options = {"exponent": 3}  # not even hashable
  transforms = [
    lambda f: jax.jvp(lambda x, y: f(jnp.sin, x, options, y), (X, V), (V, X)),
    lambda f: jax.jvp(lambda x, y: f(y=y, kind=jnp.sin, x=x, options=options), (X, V), (V, X)),
    lambda f: jax.vmap(jax.hessian(lambda x: f(jnp.cos, x, options, V)))(BATCH),
  ]
  check(f, power, transforms, 5e-6)
  with pytest.raises(jax.errors.UnexpectedTracerError, match="nondiff_argnums"):
    jax.grad(lambda t: f(jnp.sin, 1.0, {"exponent": t}, 1.0))(2.0)


def test_random_keys():
  def dropout(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * x, 0)

  def fwd(key, x):
    return dropout(key, x), (key, x)

  def bwd(residuals, y_bar):
    key, x = residuals
    return None, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x * y_bar, 0)

  f = define(dropout, fwd, bwd)
  keys = jax.random.split(jax.random.key(0), 4)
  transforms = [
    lambda f: jax.jvp(lambda x: f(keys[0], x), (X,), (V,)),
    lambda f: jax.vmap(jax.jacfwd(f, argnums=1))(keys, BATCH),
    lambda f: jax.jit(jax.vmap(jax.hessian(f, argnums=1), in_axes=(0, None)))(keys, X),
  ]
  check(f, dropout, transforms)


ALIASES = {
  # outputs that are inputs or residuals, or twice the same array
  "identity": (lambda x, y: (x, y), lambda x, y: ((x, y), None), lambda _, bars: bars),
  "twice": (
    lambda x, y: (x * y,) * 2,
    lambda x, y: ((z := x * y, z), (x, y, y)),
    lambda r, bars: ((bars[0] + bars[1]) * r[1], (bars[0] + bars[1]) * r[2] * r[0] / r[1]),
  ),
  "output as residual": (
    lambda x, y: (jnp.exp(x), y),
    lambda x, y: ((z := jnp.exp(x), y), (z, z)),
    lambda r, bars: (bars[0] * r[1], bars[1]),
  ),
  "no residuals": (
    lambda x, y: (x + 2 * y, 3 * x),
    lambda x, y: ((x + 2 * y, 3 * x), ()),
    lambda _, bars: (bars[0] + 3 * bars[1], 2 * bars[0]),
  ),
}


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("name", ALIASES)
def test_aliases_and_empty_residuals(name, tangent):
  function, fwd, bwd = ALIASES[name]

  def rule(residuals, args_dot):
    return jax.linear_transpose(lambda bars: bwd(residuals, bars), args_dot)(args_dot)[0]

  enable = functools.partial(enable_forward_mode, tangent=rule if tangent else None)
  f, unchanged = (define(function, fwd, bwd, e) for e in (enable, plain))
  transforms = [
    lambda f: jax.jvp(f, (X, V), (V, X)),
    lambda f: jax.jvp(lambda x: f(x, x), (X,), (V,)),
    lambda f: jax.jacfwd(f, argnums=(0, 1))(X, V),
    lambda f: jax.vmap(jax.jacrev(f, argnums=(1, 0)), in_axes=(0, None))(BATCH, V),
  ]
  check(f, function, transforms, 1e-6)
  ours, theirs = (jax.tree.leaves(jax.vjp(f, X, V)[1]) for f in (f, unchanged))
  assert_close(ours, theirs)


def test_none_and_variadic_arguments():
  def masked(x, mask=None, *xs):
    y = sum(xs, jnp.sin(x))
    return y if mask is None else jnp.where(mask, y, 0), None, ()

  def bwd(residuals, bars):
    x, mask, xs = residuals
    y_bar = bars[0] if mask is None else jnp.where(mask, bars[0], 0)
    return jnp.cos(x) * y_bar, None, *(y_bar for _ in xs)

  def rule(residuals, args_dot):
    x, mask, _ = residuals
    y_dot = jnp.cos(x) * args_dot[0] + sum(dot for dot in args_dot[2:] if dot is not None)
    return y_dot if mask is None else jnp.where(mask, y_dot, 0), None, ()

  def fwd(x, mask=None, *xs):
    return masked(x, mask, *xs), (x, mask, xs)

  for tangent in (None, rule):
    f = define(masked, fwd, bwd, functools.partial(enable_forward_mode, tangent=tangent))
    transforms = [
      lambda f: jax.jvp(f, (X,), (V,)),
      lambda f: jax.jvp(lambda x, y: f(x, X > 0, y, y), (X, V), (V, X)),
      lambda f: jax.vmap(lambda x, mask: jax.jacfwd(f)(x, mask, V))(BATCH, BATCH > 0),
      lambda f: jax.hessian(f)(X, None, X),
    ]
    check(f, masked, transforms)


def test_forward_rule_that_calls_the_decorated_function():
  @enable_forward_mode
  @jax.custom_vjp
  def f(x):
    return spiral(x)

  f.defvjp(lambda x: (f(x), (x, jnp.sum(x**2))), spiral_bwd)
  transforms = [
    lambda f: jax.jvp(f, (X,), (V,)),
    lambda f: jax.hessian(f)(X),
    lambda f: jax.jacrev(jax.jacrev(f))(X),
    lambda f: jax.jacfwd(jax.jacrev(jax.jacfwd(f)))(X),
  ]
  check(f, spiral, transforms, 1e-5)


@pytest.mark.without("enable_x64")
def test_nothing_moves():
  f = define(mixed, mixed_fwd, mixed_bwd)
  expected = mixed(PARAMS, V, 3)
  out, out_dot = jax.jvp(lambda count: f(PARAMS, V, count), (3,), (FLOAT0,))
  assert_close(out, expected)
  assert_close(out_dot, jax.jvp(lambda count: mixed(PARAMS, V, count), (3,), (FLOAT0,))[1])
  signs = define(lambda x: x > 0, lambda x: (x > 0, None), lambda *_: (None,))
  assert_close(jax.jvp(signs, (X,), (V,)), (jnp.asarray(X > 0), np.zeros(3, jax.dtypes.float0)))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)])
def test_shapes(shape):
  x = jnp.linspace(0.5, 2, max(1, int(np.prod(shape))))[: int(np.prod(shape))].reshape(shape)
  transforms = [
    lambda f: jax.jvp(f, (x,), (2 * x,)),
    lambda f: jax.jacfwd(f)(x),
    lambda f: jax.hessian(f)(x),
  ]
  check(make_spiral(), spiral, transforms)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float64", 1e-14), ("bfloat16", 3e-2), ("float16", 3e-3)]
)
@pytest.mark.parametrize("enable", [enable_forward_mode, with_tangent])
def test_dtypes(dtype, tolerance, enable):
  with jax.enable_x64(dtype == "float64"):
    x, v = X.astype(dtype), V.astype(dtype)
    f = make_spiral(enable=enable)
    transforms = [
      lambda f: jax.jvp(f, (x,), (v,)),
      lambda f: jax.jacrev(f)(x),
      lambda f: jax.jit(jax.hessian(f))(x),
    ]
    check(f, spiral, transforms, tolerance)


COMPLEX = {
  "holomorphic": (lambda z: z * jnp.sum(z), lambda z, b: b * jnp.sum(z) + jnp.sum(b * z)),
  "to real": (lambda z: jnp.abs(z) ** 2, lambda z, b: 2 * jnp.conj(z) * b),
  "from real": (
    lambda z: jnp.exp(1j * z.real),
    lambda z, b: (1j * jnp.exp(1j * z.real) * b).real + 0j,
  ),
}


@pytest.mark.parametrize("name", COMPLEX)
@default_promotion()
def test_complex_dtypes(name):
  function, bwd = COMPLEX[name]
  f = define(function, lambda z: (function(z), z), lambda z, b: (bwd(z, b).astype(z.dtype),))
  z, z_dot = X + 1j * V, V - 2j * X
  assert_close(jax.jvp(f, (z,), (z_dot,)), jax.jvp(function, (z,), (z_dot,)))
  assert_close(jax.vjp(f, z)[1](function(z)), jax.vjp(function, z)[1](function(z)))
  assert_close(jax.jit(jax.linearize(f, z)[1])(z_dot), jax.linearize(function, z)[1](z_dot))


def test_python_scalars_and_weak_types():
  cube = (lambda x: x**3, lambda x: (x**3, x), lambda x, y_bar: (3 * x**2 * y_bar,))
  f, unchanged = define(*cube), define(*cube, enable=plain)
  for x in (2.0, np.float32(2), np.float64(2), jnp.float32(2), jnp.bfloat16(2)):
    for g in (lambda f: f, jax.grad):
      assert jax.typeof(g(f)(x)) == jax.typeof(g(unchanged)(x))
    for ours, theirs in zip(jax.jvp(f, (x,), (x,)), jax.jvp(cube[0], (x,), (x,)), strict=True):
      assert_close(ours, theirs)
      assert jax.typeof(ours) == jax.typeof(theirs)
  assert jax.hessian(jax.grad(f))(2.0) == 6


def test_backward_rule_of_higher_precision_than_its_argument():
  def fwd(x):
    x = x.astype(jnp.float32)
    return jnp.sin(x), x

  f, unchanged = (
    define(lambda x: fwd(x)[0], fwd, lambda x, y_bar: (jnp.cos(x) * y_bar,), enable)
    for enable in (enable_forward_mode, plain)
  )
  x = X.astype(jnp.bfloat16)
  assert_close(jax.grad(total(f))(x), jax.grad(total(unchanged))(x))
  y_dot = jax.jit(lambda: jax.jvp(f, (x,), (x,))[1])()
  assert_close(y_dot, jax.jvp(lambda x: fwd(x)[0], (x,), (x,))[1], 1e-6)


@pytest.mark.parametrize("name", ["method", "partial", "object", "custom_gradient"])
def test_callables(name):
  class Model:
    def __call__(self, x):
      return spiral(x)

    def method(self, x):
      return spiral(x)

  if name == "custom_gradient":
    f = enable_forward_mode(
      jax.custom_gradient(lambda x: (spiral(x), lambda y: spiral_bwd((x, jnp.sum(x**2)), y)[0]))
    )
  else:
    function = {
      "method": Model().method,
      "partial": functools.partial(lambda _, x: spiral(x), 0),
      "object": Model(),
    }[name]
    f = define(function, spiral_fwd, spiral_bwd)
  transforms = [
    lambda f: jax.jacfwd(f)(X),
    lambda f: jax.jacrev(f)(X),
    lambda f: jax.vmap(jax.hessian(f))(BATCH),
  ]
  check(f, spiral, transforms)


def test_optimize_remat():
  ours, theirs = (make_spiral(enable=e, optimize_remat=True) for e in (enable_forward_mode, plain))
  assert_close(jax.hessian(ours)(X), jax.hessian(spiral)(X), 1e-6)
  programs = [jax.grad(total(jax.checkpoint(lambda x, f=f: f(f(x))))) for f in (ours, theirs)]
  assert_close(programs[0](X), programs[1](X))
  assert cost(programs[0], X) == cost(programs[1], X)


def test_rules_with_effects():
  def calls(enable, transform):
    log = []

    def fwd(x):
      jax.debug.callback(log.append, ("fwd"))
      return spiral_fwd(x)

    def bwd(residuals, y_bar):
      jax.debug.callback(lambda x: log.append(float(x)), residuals[0][0])
      return spiral_bwd(residuals, y_bar)

    result = transform(define(spiral, fwd, bwd, enable))
    jax.effects_barrier()
    return sorted(map(str, log)), result

  for transform in (
    lambda f: jax.grad(total(f))(X),
    lambda f: jax.jit(jax.grad(total(f)))(X),
    lambda f: jax.vmap(jax.grad(total(f)))(BATCH),
  ):
    log, result = calls(enable_forward_mode, transform)
    expected_log, expected = calls(plain, transform)
    assert log == expected_log
    assert_close(result, expected)
  for transform in (jax.jvp, jax.jit(jax.jvp, static_argnums=0)):
    log, result = calls(enable_forward_mode, lambda f, t=transform: t(f, (X,), (V,)))
    assert len(log) == 2
    assert_close(result, jax.jvp(spiral, (X,), (V,)))


# The tangent rule.


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


# Errors.


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
    with pytest.raises(
      TypeError, match=r"^Custom VJP bwd rule must produce an output with the sam"
    ):
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


# Under JAX's switches, and call after call.


@pytest.mark.parametrize(
  "context",
  [
    jax.checking_leaks,
    jax.disable_jit,
    functools.partial(jax.debug_nans, True),
    functools.partial(jax.enable_checks, True),
    functools.partial(jax.numpy_dtype_promotion, "strict"),
  ],
  ids=["leaks", "no jit", "nans", "checks", "promotion"],
)
@pytest.mark.parametrize("enable", [enable_forward_mode, with_tangent])
def test_switches_of_jax(context, enable):
  def product(x):
    return jnp.sin(x) * jnp.sum(x * x)

  def programs(f):
    return [
      jax.jvp(f, (X,), (V,)),
      jax.grad(lambda x: jnp.sum(f(x)))(X),
      jax.jacfwd(jax.jacrev(f))(X),
      jax.vmap(jax.jacfwd(f))(BATCH),
      jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(f)(x))))(BATCH),
    ]

  with context():
    ours = programs(make_spiral(enable=enable))
  assert_close(ours, programs(product), 2e-6)


@pytest.mark.without("check_tracer_leaks")  # under which JAX keeps no programs
def test_eager_calls_neither_compile_again_nor_keep_arrays():
  spiral, orbit = make_spiral(), make_orbit()
  steps = [
    lambda x: jax.grad(total(spiral))(x),
    lambda x: jax.jvp(spiral, (x,), (x,)),
    lambda x: jax.jacfwd(jax.grad(total(spiral)))(x),
    lambda x: jax.grad(total(orbit))(x),
  ]
  for step in steps:
    with compilations() as compiled:
      step(jnp.asarray(V))
    del compiled[:]
    step(jnp.asarray(V))
    gc.collect()
    arrays = len(jax.live_arrays())
    with compilations() as compiled:
      for _ in range(10):
        step(jnp.asarray(X))
    assert not compiled
    gc.collect()
    assert len(jax.live_arrays()) == arrays


def test_threads_may_share_a_pullback():
  f = define(scaled, scaled_fwd, scaled_bwd)
  pullback = jax.vjp(f, X, V, X)[1]
  expected = pullback((X, V))
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for actual in pool.map(lambda _: pullback((X, V)), range(100)):
      assert_close(actual, expected)
  sys.setswitchinterval(interval)


def test_export():
  f = make_spiral()
  for transform in (jax.jacfwd, jax.jacrev, jax.hessian):
    exported = jax.export.export(jax.jit(transform(f)))(X)
    assert_close(exported.call(X), transform(f)(X))


# Named axes and several devices.


def coupled(x):
  return jnp.sin(x) * jax.lax.psum(jnp.sum(x), "i")


def coupled_fwd(x):
  s = jax.lax.psum(jnp.sum(x), "i")
  return jnp.sin(x) * s, (x, s)


def coupled_bwd(residuals, y_bar):
  x, s = residuals
  return (jnp.cos(x) * s * y_bar + jax.lax.psum(jnp.sum(jnp.sin(x) * y_bar), "i"),)


def coupled_tangent(residuals, args_dot):
  (x, s), (x_dot,) = residuals, args_dot
  return jnp.cos(x) * s * x_dot + jnp.sin(x) * jax.lax.psum(jnp.sum(x_dot), "i")


make_coupled = functools.partial(define, coupled, coupled_fwd, coupled_bwd)
with_coupled_tangent = functools.partial(enable_forward_mode, tangent=coupled_tangent)

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
