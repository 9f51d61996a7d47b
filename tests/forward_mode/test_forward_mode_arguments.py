"""enable_forward_mode with arguments and outputs of every kind."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close, check, cost, total
from custom_rules import (
  BATCH,
  FLOAT0,
  PARAMS,
  SCALED_RULES,
  V,
  X,
  define,
  make_spiral,
  mixed,
  mixed_bwd,
  mixed_fwd,
  mixed_tangent,
  plain,
  scaled,
  spiral,
  spiral_bwd,
  spiral_fwd,
  with_scaled_tangent,
  with_tangent,
)
from oracle import default_promotion

from softmax_jax import enable_forward_mode


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
