"""Functions with jax.custom_vjp rules as users write them, and the arrays they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from softmax_jax import enable_forward_mode

X = np.array([0.3, -1.1, 0.7], np.float32)
V = np.array([1.0, 0.4, -0.6], np.float32)
BATCH = np.stack([X, V, X - V, X * V])


def define(function, fwd, bwd, enable=enable_forward_mode, **options):
  """A custom_vjp function with these rules; `enable=plain` leaves it as it is."""
  nondiff = {k: options.pop(k) for k in list(options) if k.startswith("nondiff")}
  f = jax.custom_vjp(function, **nondiff)
  f.defvjp(fwd, bwd, **options)
  return enable(f)


def plain(f):
  return f


# The function of most tests: its Jacobian is neither diagonal nor symmetric.
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
