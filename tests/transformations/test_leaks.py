"""Many calls need no more memory than a few, and compile nothing after the first.

Eager calls each make new functions: a cache that outlives them would grow. `leak_steps.py` is a
program too, which makes a million calls.
"""

import jax
import jax.numpy as jnp
import pytest
from compilations import compilations
from jax.sharding import AxisType
from leak_steps import PUBLIC, WEIGHT, Z, eager, held, jitted, run

import softmax_jax

# These tests count compilations, and under leak checks JAX caches no program.
pytestmark = pytest.mark.without("disable_jit", "check_tracer_leaks")


def assert_flat(steps, rounds):
  """That the steps, after a warm-up, compile nothing and leave nothing behind."""
  run(steps, 3)
  arrays, objects = held()
  with compilations() as compiled:
    run(steps, rounds)
  now_arrays, now_objects = held()
  assert not compiled
  assert now_arrays == arrays
  # JAX may add to a cache now and then; one object left by each round would be a leak.
  assert now_objects - objects < rounds


SOME = ["softmax", "linear loss of each token"]


outside_of_new_rules = pytest.mark.skipif(
  getattr(jax.config, "jax_custom_jvp3", False) or getattr(jax.config, "jax_custom_vjp3", False),
  reason="each eager call of such a function of JAX fills a cache until that is full",
)


def test_compilations_are_counted():
  with compilations() as compiled:
    jax.jit(lambda z: z + 1)(Z)
  assert compiled


@outside_of_new_rules
def test_eager_calls_leave_nothing_behind():
  assert_flat(eager(SOME), rounds=10)


@outside_of_new_rules
@pytest.mark.long
def test_eager_calls_of_all_functions_leave_nothing_behind():
  assert_flat(eager(PUBLIC), rounds=20)


def test_jitted_calls_leave_nothing_behind():
  assert_flat(jitted(SOME), rounds=1000)


@pytest.mark.long
def test_jitted_calls_of_all_functions_leave_nothing_behind():
  assert_flat(jitted(PUBLIC), rounds=10_000)


def test_programs_of_functions_that_are_gone_are_dropped():
  def step():
    jax.jit(lambda z: softmax_jax.softmax(z))(Z)

  run([step], 3)
  arrays, objects = held()
  run([step], 5)
  now_arrays, now_objects = held()
  assert now_arrays == arrays
  assert now_objects - objects < 5


@pytest.mark.devices(3)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_eager_calls_on_a_mesh_compile_once(reduction):
  spec = jax.sharding.PartitionSpec
  with jax.set_mesh(jax.make_mesh((3,), ("rows",), axis_types=(AxisType.Explicit,))):
    args = (
      jax.sharding.reshard(Z, spec("rows", None)),
      jax.sharding.reshard(WEIGHT, spec(None, None)),
      jax.sharding.reshard(jnp.arange(3), spec("rows")),
    )

    def step():
      loss = lambda x: jnp.sum(
        softmax_jax.linear_softmax_cross_entropy(x, *args[1:], reduction=reduction)
      )
      jax.grad(loss)(args[0])

    step()
    with compilations() as compiled:
      step()
    assert not compiled
