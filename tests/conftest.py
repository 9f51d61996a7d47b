"""Puts the helpers on the path, gives JAX eight devices, and implements the marker `without`.

The folders are no packages, so the basename of each module in them is unique: pytest then needs no
more than these files, in the repository or copied beside an installed wheel.
"""

import contextlib
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "helpers"))
# Modules that tests share assert too, which `python -O` would drop.
pytest.register_assert_rewrite(
  *(path.stem for path in TESTS.rglob("*.py") if not path.name.startswith(("conftest", "test_")))
)

# Before JAX starts.
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
