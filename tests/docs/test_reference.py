"""The API reference: it builds without a warning and shows every public name, and its code runs."""

import doctest
import html
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
if not DOCS.exists():
  pytest.skip("the sources of the reference are not beside the tests", allow_module_level=True)
pytestmark = pytest.mark.skipif(sys.flags.optimize == 2, reason="python -OO drops docstrings")
MODULES = ("softmax_jax", "softmax_jax.derivatives", "softmax_jax.verify")


def build(source, out):
  pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
  command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", source, out]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  out = tmp_path_factory.mktemp("reference")
  done = build(DOCS, out)
  assert done.returncode == 0, done.stderr
  return {path.stem: path.read_text(encoding="utf-8") for path in out.glob("*.html")}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described(pages, module):
  text = "".join(pages.values())
  for name in importlib.import_module(module).__all__:
    assert f'id="{module}.{name}"' in text, name


def test_no_markup_is_left_in_the_text(pages):
  """A directive that Sphinx does not know, or a broken link into this library."""
  for name, page in pages.items():
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert ".. math" not in text, name
    assert "`" not in text, name
    assert "jaxlib" not in text, name  # where private names of types come from
  assert pages["derivatives"].count('class="math notranslate nohighlight"') == 9


def test_a_link_to_nothing_is_an_error(tmp_path):
  source = tmp_path / "docs"
  source.mkdir()
  (source / "conf.py").write_text((DOCS / "conf.py").read_text())
  (source / "index.rst").write_text("Title\n=====\n\n:func:`softmax_jax.nothing`\n")
  done = build(source, tmp_path / "out")
  assert done.returncode != 0
  assert "softmax_jax.nothing" in done.stderr


def test_code_of_the_front_page_runs():
  failed, tried = doctest.testfile(str(DOCS / "index.rst"), module_relative=False)
  assert tried
  assert not failed
