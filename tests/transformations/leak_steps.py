"""Steps that call every public function, eager and compiled, and what is held after them.

As a program, with `PYTHONPATH=tests/helpers` and a number such as 1000000, it makes that many calls
and prints what they hold on the way.
"""

import functools
import gc
import itertools
import os
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from compilations import compilations

import softmax_jax
from softmax_jax import derivatives, enable_forward_mode

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
WEIGHT = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
SHARES = jax.nn.softmax(V)
LABELS = jnp.array([1, 3, -1])
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": V[0]}


def linear(**options):
  return lambda f, z: f(z, WEIGHT, LABELS, ignore_index=-1, **options)


def head(params, x):
  return jnp.tanh(x) @ params


# How each public function is called; the losses with all options. (Two chunks of the same size make
# a loop.)
CALLS = {
  "softmax": lambda f, z: f(z, where=V > -1),
  "log_softmax": lambda f, z: f(z),
  "logsumexp": lambda f, z: f(z, axis=-1, b=SHARES),
  "softmax_cross_entropy": lambda f, z: f(z, SHARES, **OPTIONS),
  "softmax_cross_entropy_with_integer_labels": lambda f, z: f(
    z, LABELS, ignore_index=-1, where=V > -1, **OPTIONS
  ),
  "linear_softmax_cross_entropy": linear(chunk_size=1, softcap=5.0, bias=WEIGHT[0]),
  "chunked_softmax_cross_entropy": lambda f, z: f(
    head, WEIGHT, z, LABELS, ignore_index=-1, chunk_size=1
  ),
  "softmax_entropy": lambda f, z: f(z, where=V > -1),
  "softmax_kl_divergence": lambda f, z: f(z, V, where=V > -1, temperature=2.0),
  "softmax_jacobian": lambda f, z: f(z),
  "softmax_jvp": lambda f, z: f(z, V),
  "softmax_vjp": lambda f, z: f(z, V),
  "softmax_hvp": lambda f, z: f(z, V, SHARES),
  "log_softmax_jacobian": lambda f, z: f(z),
  "logsumexp_hessian": lambda f, z: f(z),
  "cross_entropy_gradient": lambda f, z: f(z, SHARES),
  "cross_entropy_hessian": lambda f, z: f(z),
  "cross_entropy_hvp": lambda f, z: f(z, V),
}
MORE = {
  "linear loss of each token": (
    softmax_jax.linear_softmax_cross_entropy,
    linear(chunk_size=1, reduction="none"),
  ),
  "cross_entropy_gradient of classes": (
    derivatives.cross_entropy_gradient,
    lambda f, z: f(z, LABELS),
  ),
}


def public():
  """Each public function that takes arrays, as a function of one array to one number."""
  for module in (softmax_jax, derivatives):
    for name in module.__all__:
      if name not in ("CrossEntropyAux", "enable_forward_mode"):
        yield name, (getattr(module, name), CALLS[name])
  yield from MORE.items()


def total(f, call, z):
  return jnp.sum(jnp.cos(call(f, z)))


PUBLIC = {name: functools.partial(total, *pair) for name, pair in public()}


def square(x):
  return x * x


def enabled():
  """A new function of a user with forward mode."""
  f = jax.custom_vjp(lambda x: square(x))
  f.defvjp(lambda x: (square(x), x), lambda x, y_bar: (2 * x * y_bar,))
  return enable_forward_mode(f)


def enabled_with_tangent():
  f = jax.custom_vjp(lambda x: square(x))
  f.defvjp(lambda x: (square(x), x), lambda x, y_bar: (2 * x * y_bar,))
  return enable_forward_mode(f, tangent=lambda x, args_dot: 2 * x * args_dot[0])


# What is done with a function. Each wraps it in a new one, which no cache of JAX knows.
EAGER = {
  "value": lambda f: f(Z),
  "grad": lambda f: jax.value_and_grad(lambda z: f(z))(Z),
  "jvp": lambda f: jax.jvp(functools.partial(f), (Z,), (V,)),
  "linearize": lambda f: jax.linearize(lambda z: f(z), Z)[1](V),
  "vmap": lambda f: jax.vmap(lambda s: f(Z * s))(V[:, 0]),
}


def of_user(make, mode):
  f = make()
  return mode(lambda z: jnp.sum(f(z)))


def eager(names):
  """Steps without `jax.jit`: all modes of these functions and of functions of a user."""
  functions = [functools.partial(mode, PUBLIC[name]) for name in names for mode in EAGER.values()]
  makers = (enabled, enabled_with_tangent)
  return functions + [
    functools.partial(of_user, m, mode) for m in makers for mode in EAGER.values()
  ]


def jitted(names):
  """Steps with `jax.jit`: value and derivatives in both modes, as one program."""

  def step(name):
    f = PUBLIC[name]
    both = lambda z, v: (jax.value_and_grad(f)(z), jax.jvp(f, (z,), (v,)))
    return functools.partial(jax.jit(both), Z, V)

  return [step(name) for name in names]


def run(steps, rounds):
  for _ in range(rounds):
    for step in steps:
      step()


def held():
  """How many arrays and objects are alive, but for references to what is dead.

  JAX drops those late, of its own functions too.
  """
  gc.collect()
  dead = lambda x: type(x) is weakref.ref and x() is None
  return len(jax.live_arrays()), sum(not dead(x) for x in gc.get_objects())


def resident():
  """MiB of memory that this process holds, where Linux tells."""
  with open("/proc/self/statm", encoding="ascii") as statm:
    return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(steps):
  """Makes so many calls of all functions, one in a hundred of them eager."""
  slow, fast = itertools.cycle(eager(PUBLIC)), itertools.cycle(jitted(PUBLIC))
  run(eager(PUBLIC), 2)
  run([next(fast) for _ in PUBLIC], 1)
  begin = time.monotonic()
  with compilations() as compiled:
    for i in range(steps + 1):
      if i in {steps * percent // 100 for percent in (0, 1, 10, 25, 50, 75, 100)}:
        arrays, objects = held()
        print(
          f"{i:>9} calls: {resident():7.1f} MiB, {arrays} arrays, {objects} objects, "
          f"{len(compiled)} compilations, {time.monotonic() - begin:.0f} s",
          flush=True,
        )
      next(fast if i % 100 else slow)()


if __name__ == "__main__":
  main(int(sys.argv[1]))
