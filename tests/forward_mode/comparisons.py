"""What the tests of enable_forward_mode compare: results, and the cost of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


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


# For programs that run once: compilation is fast, the program is not.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def check(f, reference, transforms, tolerance=2e-6):
  """That `f` and `reference` agree under each transformation, all in one compiled program."""
  results = fast_jit(lambda: [(t(f), t(reference)) for t in transforms])()
  for actual, expected in results:
    assert_close(actual, expected, tolerance)


def total(f):
  return lambda *args: jnp.sum(f(*args) ** 2)


def cost(f, *args):
  """Floating-point operations, bytes accessed and temporary bytes of the compiled program."""
  compiled = jax.jit(f).lower(*args).compile()
  analysis = compiled.cost_analysis()
  memory = compiled.memory_analysis()
  return analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes
