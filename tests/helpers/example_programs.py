"""The programs in `examples`, where they are beside the tests."""

import importlib.util
from pathlib import Path

import pytest


def script(name):
  """The path of the example `name`; skips the module that asks for it where it is absent."""
  path = Path(__file__).parents[2] / "examples" / f"{name}.py"
  if not path.exists():
    pytest.skip("the example is not beside the tests", allow_module_level=True)
  return path


def module(name):
  """The example `name`, imported."""
  spec = importlib.util.spec_from_file_location(name, script(name))
  imported = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(imported)
  return imported
