"""Several host devices for the tests of sharding, set before JAX starts; the marker `without`."""

import contextlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Runs a test with the settings of JAX off that its marker names, though all others have them."""
  with contextlib.ExitStack() as stack:
    for marker in item.iter_markers("without"):
      for setting in marker.args:
        # Not the context managers of these names: that of leak checks only switches on.
        name = f"jax_{setting}"
        stack.callback(jax.config.update, name, getattr(jax.config, name))
        jax.config.update(name, False)
    return (yield)
