"""The site: it builds without a warning, shows every public name, and needs no network."""

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
if not DOCS.exists():
  pytest.skip("the site is not beside the tests", allow_module_level=True)
pytestmark = pytest.mark.skipif(sys.flags.optimize == 2, reason="python -OO drops docstrings")
MODULES = ("softmax_jax", "softmax_jax.derivatives", "softmax_jax.verify")


def build(source, out):
  for package in ("furo", "myst_nb", "sphinx", "sphinx-mathjax-offline", "sphinx_copybutton"):
    pytest.importorskip(package, reason="the extra `docs` is not installed")
  command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", source, out]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  out = tmp_path_factory.mktemp("site")
  done = build(DOCS, out)
  assert done.returncode == 0, done.stderr
  paths = [path for path in out.rglob("*.html") if "_" not in path.relative_to(out).parts[0][0]]
  return {path.relative_to(out).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described(pages, module):
  text = "".join(pages.values())
  for name in importlib.import_module(module).__all__:
    assert f'id="{module}.{name}"' in text, name


def test_no_markup_is_left_in_the_text(pages):
  """A directive that Sphinx does not know, or a broken link into this library."""
  for name, page in pages.items():
    page = re.sub(r"<pre>.*?</pre>|<script.*?</script>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert ".. math" not in text, name
    assert "`" not in text, name
    assert "jaxlib." not in text, name  # where private names of types come from
  formulas = [page.count('class="math notranslate nohighlight"') for page in pages.values()]
  assert sum(formulas) > 100


def test_no_page_needs_a_network(pages):
  for name, page in pages.items():
    fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"([^\"]*)\"", page)
    assert fetched
    assert not [link for link in fetched if re.match(r"(?:https?:)?//", link)], name


def test_every_notebook_is_a_page_with_its_pictures(pages):
  notebooks = list(DOCS.parent.glob("notebooks/*.ipynb"))
  assert notebooks
  for path in notebooks:
    assert "<img" in pages[f"notebooks/{path.stem}.html"]


def test_a_link_to_nothing_is_an_error(tmp_path):
  source = tmp_path / "docs"
  source.mkdir()
  (source / "conf.py").write_text((DOCS / "conf.py").read_text())
  (source / "index.rst").write_text("Title\n=====\n\n:func:`softmax_jax.nothing`\n")
  done = build(source, tmp_path / "out")
  assert done.returncode != 0
  assert "softmax_jax.nothing" in done.stderr
