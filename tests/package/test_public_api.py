"""What the library uses of JAX beyond its documented public API, and what importing it loads."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.experimental.hijax
import pytest
from hijax_flags import NEW, from_0_12

import softmax_jax

PACKAGE = Path(softmax_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
BEYOND = [path for path in MODULES if path.parent == PACKAGE / "_forward_mode"]
# If a release of JAX breaks one of these, softmax_jax/_forward_mode is what has to change.
USED = {
  "jax.experimental.hijax",
  "jax.experimental.hijax.Zero",
  "jax.extend.core.Literal",
  "jax.extend.core.Primitive",
  "jax.extend.core.jaxpr_as_fun",
  "jax.extend.core.set_current_trace",
  "jax.extend.core.take_current_trace",
  "jax.extend.core.unmapped_aval",
  "jax.interpreters.ad",
  "jax.interpreters.batching",
  "jax.interpreters.mlir",
  "jax.interpreters.partial_eval.JaxprTracer",
}
FROM_0_12 = {
  "jax.experimental.hijax.ValAccum",
  "jax.experimental.hijax.jvp_from_lin",
  "jax.experimental.hijax.vmap_rule",
}
NOT_DOCUMENTED = ("jax._src", "jax.experimental.hijax", "jax.extend", "jax.interpreters", "jaxlib")
# Of a jax.custom_vjp.
ATTRIBUTES = {"fun", "fwd", "bwd", "symbolic_zeros", "nondiff_argnums", "optimize_remat"}
ATTRIBUTES_FROM_0_12 = {"generic_batching"}


def imported(path):
  """The full names that a module imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes(path):
  """The dotted names in a module, such as `jax.core.Tracer`."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    names = []
    while isinstance(node, ast.Attribute):
      names.append(node.attr)
      node = node.value
    if names and isinstance(node, ast.Name):
      yield ".".join([node.id, *reversed(names)])


def undocumented(path):
  names = {*imported(path), *attributes(path)}
  return {name for name in names if name.startswith(NOT_DOCUMENTED)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_package_alone_goes_beyond_the_public_api(path):
  assert undocumented(path) <= (USED | FROM_0_12 if path in BEYOND else set())


def test_it_uses_what_it_names():
  assert set().union(*map(undocumented, BEYOND)) == USED | FROM_0_12
  of_functions = ATTRIBUTES | ATTRIBUTES_FROM_0_12
  used = {name.split(".")[-1] for path in BEYOND for name in attributes(path)} & of_functions
  assert used == of_functions
  text = (PACKAGE / "_forward_mode" / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
  for name in {name.split(".")[-1] for name in USED | FROM_0_12} | of_functions:
    assert re.search(rf"`[\w.]*\b{name}`", text), name


def broken(name):
  return f"JAX {jax.__version__} has no {name} any more: softmax_jax/_forward_mode has to change"


@pytest.mark.parametrize("name", sorted(USED | FROM_0_12 if NEW else USED))
def test_it_exists_in_this_jax(name):
  module, _, attribute = name.rpartition(".")
  if not hasattr(importlib.import_module(module), attribute):
    try:
      importlib.import_module(name)
    except ModuleNotFoundError:
      pytest.fail(broken(name))


def test_custom_vjp_functions_of_this_jax_have_their_attributes():
  f = jax.custom_vjp(lambda x: x)
  for name in ATTRIBUTES | ATTRIBUTES_FROM_0_12 if NEW else ATTRIBUTES:
    assert hasattr(f, name), broken(f"jax.custom_vjp.{name}")


@from_0_12
def test_custom_vjp_primitives_of_this_jax_have_their_attributes():
  f = jax.custom_vjp(lambda x: x)
  f.defvjp(lambda x: (x, None), lambda _, y_bar: (y_bar,), generic_batching=True)
  (equation,) = jax.make_jaxpr(f)(1.0).eqns
  primitive = equation.params.get("_prim")
  assert isinstance(primitive, jax.experimental.hijax.HiPrim), broken("HiPrim for jax.custom_vjp")
  assert equation.primitive.name == "call_hi_primitive", broken("the name of a HiPrim's equations")
  for name in (
    "opt_remat",
    "remat_rules",
    "in_avals_flat",
    "out_avals_flat",
    "in_tree",
    "out_tree",
  ):
    assert hasattr(primitive, name), broken(f"{name} of a custom_vjp primitive")


def loaded_by(statement, before="import jax"):
  """The modules that a statement loads in a new process, beyond those of ``before``."""
  code = (
    f"import sys\n{before}\nbefore = set(sys.modules)\n{statement}\n"
    "print(*set(sys.modules) - before)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return set(done.stdout.split())


def test_importing_loads_little_beyond_jax():
  """Only JAX, and the parts of the library that `__init__` needs: imports stay cheap."""
  loaded = loaded_by("import softmax_jax")
  assert "softmax_jax._softmax" in loaded
  others = {name.split(".")[0] for name in loaded} - {"softmax_jax", "jax"}
  assert others <= set(sys.stdlib_module_names)
  public = {name for name in loaded if name.startswith("softmax_jax.") and "._" not in name}
  assert public == {"softmax_jax.derivatives"}


def test_its_public_modules_are_attributes_of_the_package():
  """In a new process, where no other test has imported them."""
  used = "softmax_jax.derivatives.softmax_jacobian; softmax_jax.verify.check_derivatives"
  assert "softmax_jax.verify" in loaded_by(f"import softmax_jax; {used}")
  with pytest.raises(AttributeError, match="module 'softmax_jax' has no attribute 'nothing'"):
    softmax_jax.nothing  # noqa: B018


def test_importing_the_other_parts_loads_nothing_of_the_extras():
  loaded = loaded_by("import softmax_jax.derivatives, softmax_jax.verify")
  assert "softmax_jax.verify" in loaded
  others = {name.split(".")[0] for name in loaded} - {"softmax_jax", "jax"}
  assert others <= set(sys.stdlib_module_names)


COMMANDS = tuple(
  f"softmax_jax.{name}" for name in ("_command_line", "benchmark", "train", "verify.command")
)


def test_every_module_but_the_commands_can_be_imported_without_the_extras():
  names = [path.relative_to(PACKAGE.parent).with_suffix("") for path in MODULES]
  modules = [".".join(name.parts).removesuffix(".__init__") for name in names]
  modules = [name for name in modules if not name.startswith(COMMANDS)]
  assert {"softmax_jax.__main__", "softmax_jax.verify", "softmax_jax.derivatives"} < set(modules)
  extras = "click", "matplotlib", "mpmath", "optax", "rich", "sklearn", "torch"
  loaded = loaded_by(
    f"import {', '.join(modules)}", f"import jax; sys.modules.update(dict.fromkeys({extras}))"
  )
  assert set(modules) <= loaded
