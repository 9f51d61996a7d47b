"""Puts the helpers on the path, gives JAX eight devices, keeps what it compiles, and implements
three markers.

The folders are no packages, so the basename of each module in them is unique: pytest then needs no
more than these files, in the repository or copied beside an installed wheel.
"""

import collections
import contextlib
import os
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "helpers"))
SHARED = [path for path in TESTS.rglob("*.py") if not path.name.startswith(("conftest", "test_"))]
# They assert too, which `python -O` would drop.
pytest.register_assert_rewrite(*(path.stem for path in SHARED))
# They hold no tests, and some import a package that only their test asks for.
collect_ignore = [str(path) for path in SHARED]

# Before JAX starts. A smaller number shows here what happens on a machine with one GPU.
if "JAX_NUM_CPU_DEVICES" not in os.environ:
  jax.config.update("jax_num_cpu_devices", 8)
# Most of the time goes into compilation: what one run compiles the next one reads.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  jax.config.update("jax_compilation_cache_dir", str(TESTS.parent / "build" / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items):
  """Of the cases of a test, marks all but the number that its marker `few` says as `long`."""
  cases = collections.defaultdict(list)
  for item in items:
    if (few := item.get_closest_marker("few")) and not item.get_closest_marker("long"):
      cases[item.nodeid.partition("[")[0], few.args[0]].append(item)
  for (_, number), of_test in cases.items():
    last = len(of_test) - 1
    kept = {round(i * last / max(number - 1, 1)) for i in range(number)}
    for i, item in enumerate(of_test):
      if i not in kept:
        item.add_marker("long")


def pytest_runtest_setup(item):
  """Skips a test that needs more devices than there are, by its marker `devices`."""
  wanted = max((marker.args[0] for marker in item.iter_markers("devices")), default=0)
  if wanted > 1 and (found := len(jax.devices())) < wanted:
    pytest.skip(f"needs {wanted} devices; {jax.default_backend()} has {found}")


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
