"""JAX's new implementations of functions with rules and of checkpoints, which flags switch on."""

import contextlib

import jax
import pytest

FLAGS = "jax_custom_vjp3", "jax_custom_jvp3", "jax_remat3"
NEW = jax.__version_info__ >= (0, 12)
from_0_12 = pytest.mark.skipif(not NEW, reason="not supported before JAX 0.12")


@contextlib.contextmanager
def switched(on, flags=FLAGS):
  """With the new implementations, or without."""
  before = {flag: getattr(jax.config, flag) for flag in flags if hasattr(jax.config, flag)}
  try:
    for flag in before:
      jax.config.update(flag, on)
    yield
  finally:
    for flag, value in before.items():
      jax.config.update(flag, value)
