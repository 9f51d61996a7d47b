"""What every public docstring tells: arguments, results, errors, an example, its source."""

import importlib
import inspect
import re
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.flags.optimize == 2, reason="python -OO drops docstrings")

MODULES = ("softmax_jax", "softmax_jax.derivatives", "softmax_jax.verify")
PUBLIC = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]
FUNCTIONS = [
  pair for pair in PUBLIC if inspect.isfunction(getattr(importlib.import_module(pair[0]), pair[1]))
]


def documentation(module, name):
  public = getattr(importlib.import_module(module), name)
  return public, inspect.getdoc(public) or ""


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_tells_what_its_user_must_know(module, name):
  function, text = documentation(module, name)
  parameters = inspect.signature(function).parameters
  sections = [*(["Args:", "Raises:", "Source:"] if parameters else []), "Returns:", "Example:"]
  for section in sections:
    assert re.search(rf"^{section}", text, flags=re.MULTILINE), section
  assert ">>>" in text
  if name != "enable_forward_mode" and parameters:
    assert ".. math::" in text
  if module != "softmax_jax.verify" and name != "enable_forward_mode":
    assert "differentiable" in text
    assert "shape" in text or "``[*B" in text
    assert "dtype" in text + importlib.import_module(module).__doc__


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_every_argument_is_described(module, name):
  function, text = documentation(module, name)
  for parameter in inspect.signature(function).parameters:
    assert re.search(rf"^  \S*(\w+, )*\b{parameter}\b.*:", text, flags=re.MULTILINE), parameter


@pytest.mark.parametrize(("module", "name"), sorted(set(PUBLIC) - set(FUNCTIONS)))
def test_a_class_has_a_docstring_of_its_own(module, name):
  public, text = documentation(module, name)
  if inspect.isclass(public):
    assert text
    assert text != inspect.getdoc(public.__mro__[1])
