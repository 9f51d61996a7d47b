"""What the repository's texts refer to: headings, files, and parts of the library."""

import json
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
  """Paths in a text, from the root of this repository, at which there is no file."""
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
