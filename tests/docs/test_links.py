"""The files, headings and parts of the library that the repository's texts refer to exist."""

import pytest
from references import ROOT, broken_links, missing_files, missing_names

MARKDOWN = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.md"))]
NOTEBOOKS = list(ROOT.glob("notebooks/*.ipynb"))
SOURCES = [
  *ROOT.glob("softmax_jax/**/*.py"),
  *ROOT.glob("tests/**/*.py"),
  *ROOT.glob("examples/*.py"),
  *ROOT.glob("docs/*.*"),
  *ROOT.glob("docs/how_to/*.md"),
  *ROOT.glob("docs/reference/*.rst"),
]
if not NOTEBOOKS or not MARKDOWN:
  pytest.skip("the repository is not around the tests", allow_module_level=True)


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
