"""The code of every notebook runs, and with it the assertions that its claims are.

The outputs that are committed are those of that code.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
if not FOLDER.exists():
  pytest.skip("the notebooks are not beside the tests", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

SOURCES = build.sources()
TRANSLATED = [path for path in SOURCES if build.prose(path).exists()]
EVERY = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = {  # what a notebook needs beyond the extra `cli`
  "03_training": ("flax.nnx", "equinox"),
  "05_numbers": ("mpmath",),
}
LARGEST = 1_000_000  # bytes

name = lambda path: path.stem


def code_cells(path):
  return [cell for cell in build.read(path)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.long
@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_code_runs_and_displays_what_is_committed(path, monkeypatch):
  monkeypatch.setenv("MPLBACKEND", "agg")
  monkeypatch.chdir(FOLDER)
  monkeypatch.syspath_prepend(FOLDER)  # for the modules beside the notebooks
  for package in ("matplotlib", "optax", "sklearn", *PACKAGES.get(path.stem, ())):
    pytest.importorskip(package)
  pyplot = pytest.importorskip("matplotlib.pyplot")
  pyplot.switch_backend("agg")
  shown = []

  def show():
    shown.extend(pyplot.get_fignums())
    pyplot.close("all")

  monkeypatch.setattr(pyplot, "show", show)
  jax.clear_caches()  # A notebook that counts what is compiled is alone in its process.
  namespace = {}
  with pyplot.rc_context():
    for number, cell in enumerate(code_cells(path), start=1):
      shown.clear()
      where = f"{path.name}, code cell {number}"
      printed, value = run("".join(cell["source"]), where, namespace)
      expected = ["stream"] * bool(printed) + ["display_data"] * len(shown)
      expected += ["execute_result"] * (value is not None)
      assert sorted(output["output_type"] for output in cell["outputs"]) == sorted(expected), where


def run(source, where, namespace):
  """What the cell prints, and the value of its last line if that is an expression."""
  tree = ast.parse(source)
  last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(compile(tree, where, "exec"), namespace)
    value = (
      None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), namespace)
    )
  return printed.getvalue(), value


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_outputs_are_those_of_the_code_in_one_run_without_errors(path):
  """Run `python notebooks/build.py` if this fails."""
  notebook = build.read(path)
  assert notebook["metadata"]["executed_code"] == build.fingerprint(notebook)
  cells = code_cells(path)
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert all(output["output_type"] != "error" for output in outputs)
  assert all(output.get("name", "stdout") == "stdout" for output in outputs)


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_file_is_small_and_names_no_machine(path):
  text = path.read_text(encoding="utf-8")
  assert len(text.encode()) < LARGEST
  assert text == build.written(json.loads(text))
  texts = "".join(
    "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
    for cell in code_cells(path)
    for output in cell["outputs"]
  )
  for trace in (
    "/tmp",
    "/home",
    "/root",
    "/usr",
    "site-packages",
    "ipykernel",
    "Traceback",
    " at 0x",
  ):
    assert trace not in texts.replace("at 0xXXXXXXXXXXXX", ""), trace


@pytest.mark.parametrize("path", TRANSLATED, ids=name)
def test_translation_is_the_same_notebook_with_other_prose(path):
  """Run `python notebooks/build.py` if this fails."""
  markdown = build.prose(path).read_text(encoding="utf-8")
  assert build.read(build.translation(path)) == build.translated(build.read(path), markdown)


@pytest.mark.parametrize("path", TRANSLATED, ids=name)
def test_every_prose_cell_is_translated(path):
  """With the same code, as many formulas, and headings and links at the same places."""
  cells, translations = (
    [cell for cell in build.read(file)["cells"] if cell["cell_type"] == "markdown"]
    for file in (path, build.translation(path))
  )
  for cell, translation in zip(cells, translations, strict=True):
    prose, chinese = ("".join(part["source"]) for part in (cell, translation))
    assert re.search("[\u4e00-\u9fff]", chinese), chinese
    assert skeleton(prose) == skeleton(chinese), chinese


def skeleton(prose):
  """What a translation does not change."""
  headings = re.findall(r"^#+ ", prose, re.MULTILINE)
  links = {link.replace(".zh", "") for link in re.findall(r"\]\(([^)]+)\)", prose)}
  return set(re.findall(r"`[^`]+`", prose)), prose.count("$$"), headings, links


@pytest.mark.parametrize("stem", build.PICTURES)
def test_picture_of_the_site_is_that_of_the_notebook(stem):
  """Run `python notebooks/build.py` if this fails."""
  file = build.PICTURES[stem]
  assert (FOLDER / file).read_bytes() == build.first_picture(build.read(FOLDER / f"{stem}.ipynb"))
  page = FOLDER.parent / "docs" / "digits.md"
  assert f"](../notebooks/{file})" in page.read_text(encoding="utf-8")


def test_every_notebook_is_a_source_or_made_from_one():
  assert {*SOURCES, *map(build.translation, TRANSLATED)} == set(EVERY)
  assert TRANSLATED
