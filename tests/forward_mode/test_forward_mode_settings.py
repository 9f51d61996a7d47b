"""enable_forward_mode under JAX's switches, call after call, in threads and exported."""

import concurrent.futures
import functools
import gc
import sys

import jax
import jax.numpy as jnp
import pytest
from comparisons import assert_close, total
from compilations import compilations
from custom_rules import (
  BATCH,
  V,
  X,
  define,
  make_orbit,
  make_spiral,
  scaled,
  scaled_bwd,
  scaled_fwd,
  with_tangent,
)

from softmax_jax import enable_forward_mode


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
