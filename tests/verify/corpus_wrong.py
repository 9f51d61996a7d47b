"""More than 150 wrong rules, each a right one with a fault in it, for `scoreboard.py`.

`rules()` yields a name, the modes that the rule has, the wrong function, its right twin and their
arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), "float32")


def recurrent(x, w):
  return jax.lax.scan(lambda h, row: (jnp.tanh(w @ h + row),) * 2, x[0], x)[1]


def layer_norm(x, gain):
  centered = x - x.mean(axis=-1, keepdims=True)
  return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5) * gain


FUNCTIONS = {
  "sin": (jnp.sin, (normal(2, 3),)),
  "softmax": (jax.nn.softmax, (normal(3, 4),)),
  "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1), (normal(3, 4),)),
  "product": (lambda x, w: x @ w, (normal(2, 3), normal(3, 2))),
  "layer norm": (layer_norm, (normal(2, 4), normal(4))),
  "mean square": (lambda x, y: jnp.mean((x - y) ** 3), (normal(2, 3), normal(2, 3, seed=1))),
  "recurrent": (recurrent, (normal(2, 3), normal(3, 3))),
}


@jax.custom_batching.custom_vmap
def only_alone(x):
  return x


@only_alone.def_vmap
def _(axis_size, in_batched, x):
  return jnp.roll(x, 1, axis=0), True


def noisy(x):
  """x with other noise of 1 % in each call."""
  rng = np.random.default_rng()
  call = lambda x: np.asarray(x * (1 + 0.01 * rng.standard_normal(x.shape)), x.dtype)
  return jax.pure_callback(
    call, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims"
  )


# What is done to a cotangent (or tangent) of the array x; the first only to that of the first.
OF_THE_RESULT = {
  "sign": lambda x, bar: -bar,
  "twice": lambda x, bar: 2 * bar,
  "zero": lambda x, bar: 0 * bar,
  "a tenth of a percent": lambda x, bar: 1.001 * bar,
  "one entry missing": lambda x, bar: bar.at[(-1,) * bar.ndim].set(0),
  "one row off by 5 %": lambda x, bar: bar.at[0].multiply(1.05),
  "moved by an entry": lambda x, bar: jnp.roll(bar, 1),
  "a constant too much": lambda x, bar: bar + 0.01,
  "NaN in an entry": lambda x, bar: bar.at[(0,) * bar.ndim].set(jnp.nan),
  "clipped by norm": lambda x, bar: bar / (1 + jnp.linalg.norm(bar)),
  "divided by the size": lambda x, bar: bar / bar.size,
  "only where x < 0": lambda x, bar: jnp.where(x < 0, 1.1 * bar, bar),
  "only in float32": lambda x, bar: 1.5 * bar if x.dtype == jnp.float32 else bar,
  "rounded to bfloat16": lambda x, bar: bar.astype(jnp.bfloat16).astype(bar.dtype),
  "only under vmap": lambda x, bar: only_alone(bar),
  "other noise in each call": lambda x, bar: noisy(bar),
}
# What is done to the cotangent of the output before the rule.
OF_THE_COTANGENT = {
  "cotangent ignored": jnp.ones_like,
  "cotangent without sign": jnp.abs,
  "cotangent clipped": lambda u: jnp.clip(u, -1, 1),
}


def with_backward_rule(f, of_result=None, of_cotangent=None, detached=False):
  """f with its right rule in reverse mode, but for the fault that is named."""

  def backward(args, u):
    bars = list(jax.vjp(f, *jax.lax.stop_gradient(args) if detached else args)[1](
      u if of_cotangent is None else of_cotangent(u)
    ))  # fmt: skip
    if of_result is not None:
      bars[0] = of_result(args[0], bars[0])
    return tuple(bars)

  rule = jax.custom_vjp(lambda *args: f(*args))
  rule.defvjp(lambda *args: (f(*args), args), backward)
  return rule


def with_forward_rule(f, of_result=None):
  """f with its right rule in forward mode, but for the fault that is named."""
  rule = jax.custom_jvp(lambda *args: f(*args))

  @rule.defjvp
  def _(args, dots):
    y, dot = jax.jvp(f, args, dots)
    return y, dot if of_result is None else of_result(y, dot)

  return rule


FORWARD = ("sign", "one entry missing", "a tenth of a percent")


def rules():
  """A name, the modes of the rule, the wrong function, its right twin and their arguments."""
  for name, (f, args) in FUNCTIONS.items():
    twin = with_backward_rule(f)
    for fault, function in OF_THE_RESULT.items():
      yield f"{name}: {fault}", ("rev",), with_backward_rule(f, function), twin, args
    for fault, function in OF_THE_COTANGENT.items():
      wrong = with_backward_rule(f, of_cotangent=function)
      yield f"{name}: {fault}", ("rev",), wrong, twin, args
    wrong = with_backward_rule(f, detached=True)
    yield f"{name}: only second order", ("rev",), wrong, twin, args
    twin = with_forward_rule(f)
    for fault in FORWARD[: 2 if name in ("recurrent", "mean square") else 3]:
      if fault == "one entry missing" and not jax.eval_shape(f, *args).shape:
        fault = "twice"
      wrong = with_forward_rule(f, OF_THE_RESULT[fault])
      yield f"{name}: forward mode, {fault}", ("fwd", "rev"), wrong, twin, args
