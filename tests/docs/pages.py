"""The README and the pages of the site: where they are, and the code in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
if not README.exists() or not DOCS.exists():
  pytest.skip("the README and the site are not beside the tests", allow_module_level=True)

PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("how_to/*.md")])


def text_of(path):
  return path.read_text(encoding="utf-8")


def blocks(path, language):
  """The blocks of code in one language."""
  return re.findall(rf"^```{language}\n(.*?)^```$", text_of(path), flags=re.MULTILINE | re.DOTALL)


def run(path, code):
  """Runs a block on its own, and the tests that it defines. Returns its names."""
  names = {"__name__": "page"}
  exec(compile(code, str(path), "exec"), names)
  for test in [f for name, f in names.items() if name.startswith("test_")]:
    test()
  return names


def table(text):
  """The rows of the first table in a text, each a list of cells; the header first."""
  lines = iter(text.splitlines())
  rows = []
  for line in lines:
    if line.startswith("|"):
      rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
    elif rows:
      break
  header, _, *others = rows
  return [header, *others]
