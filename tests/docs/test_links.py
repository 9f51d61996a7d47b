"""Files, headings and names of the library that the repository's texts name exist."""

import json
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARKDOWN = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.md"))]
NOTEBOOKS = list(ROOT.glob("notebooks/*.ipynb"))
SOURCES = [
  *ROOT.glob("softmax_jax/**/*.py"),
  *ROOT.glob("tests/**/*.py"),
  *ROOT.glob("examples/*.py"),
  *ROOT.glob("docs/*.*"),
]
if not NOTEBOOKS or not MARKDOWN:
  pytest.skip("the repository is not around the tests", allow_module_level=True)


def prose(path):
  text = path.read_text(encoding="utf-8")
  if path.suffix != ".ipynb":
    return text
  cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
  return "\n\n".join("".join(cell["source"]) for cell in cells)


def anchors(path):
  """The anchors of the headings, as GitHub names them."""
  headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path):
  """Links whose file or heading is missing."""
  text = re.sub(r"^```.*?^```", "", prose(path), flags=re.MULTILINE | re.DOTALL)
  for link in re.findall(r"\]\(([^)\s]+)\)", text):
    if "://" in link:
      continue
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    if not target.exists() or (anchor and anchor not in anchors(target)):
      yield link


def missing_files(path):
  """Paths of files of this repository in a text, from its root, that name nothing."""
  text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
  for name in re.findall(r"\b((?:softmax_jax|tests|notebooks|docs|examples)/[\w./*]+\w)", text):
    if not any(ROOT.glob(name)):
      yield name


def missing_names(path):
  """Dotted names between backticks, such as `softmax_jax.softmax`, that name nothing."""
  for name in re.findall(r"(?<!:)`(softmax_jax(?:\.\w+)+)", prose(path)):
    try:
      pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
      yield name


@pytest.mark.parametrize("path", MARKDOWN + NOTEBOOKS, ids=lambda path: path.name)
def test_links_resolve(path):
  assert not list(broken_links(path))


@pytest.mark.parametrize("path", MARKDOWN + NOTEBOOKS, ids=lambda path: path.name)
def test_named_files_exist(path):
  assert not list(missing_files(path))


def test_files_named_in_the_sources_exist():
  assert not {path.name: files for path in SOURCES if (files := list(missing_files(path)))}


@pytest.mark.parametrize("path", MARKDOWN + NOTEBOOKS + SOURCES, ids=lambda path: path.name)
def test_named_parts_of_the_library_exist(path):
  assert not list(missing_names(path))


def test_what_is_missing_is_found(tmp_path):
  missing = "tests/" + "test_nothing.py"
  page = tmp_path / "page.md"
  page.write_text(f"# A title\n[a](#a-title) [b](#b-title) [c](c.md) `{missing}`\n")
  assert list(broken_links(page)) == ["#b-title", "c.md"]
  assert list(missing_files(page)) == [missing]
  names = "softmax_jax.softmax", "softmax_jax.nothing", "softmax_jax._softmax.nothing"
  page.write_text(" ".join(f"`{name}`" for name in names))
  assert list(missing_names(page)) == list(names[1:])
