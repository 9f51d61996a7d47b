"""Executes the notebooks in clean kernels and writes them back with their outputs.

    python notebooks/build.py                 # all of them
    python notebooks/build.py 01 05           # those whose names begin so
    python notebooks/build.py --translate 05  # only the translation, from the stored outputs

It needs the extra ``notebooks``: ``pip install -e '.[notebooks]'``. A notebook is edited in place,
in Jupyter or as text; this command puts its outputs, cell numbers and metadata in order.

Where there is a ``NAME.zh.md``, the notebook ``NAME.zh.ipynb`` is made from it: code and outputs
are those of ``NAME.ipynb``, and each Markdown cell is replaced with the next section of the
Markdown file, whose sections are separated by lines ``<!-- next cell -->``.

The first picture of a notebook in `PICTURES` is also written to a file, which docs/digits.md shows.
"""

import base64
import copy
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any

FOLDER = pathlib.Path(__file__).parent
SEPARATOR = "<!-- next cell -->"
TRANSLATE = "--translate"
PICTURES = {"05_numbers": "errors.png", "08_grokking": "grokking.png"}

Notebook = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Executes the notebooks whose names begin with one of the arguments, or all."""
  prefixes = [argument for argument in arguments if argument != TRANSLATE]
  os.environ.update(JAX_PLATFORMS="cpu", JAX_PPRINT_USE_COLOR="0")
  paths = [path for path in sources() if path.name.startswith(tuple(prefixes) or "")]
  if not paths:
    raise SystemExit(f"no notebook begins with {' or '.join(prefixes)}")
  for path in paths:
    start = time.perf_counter()
    notebook = read(path) if TRANSLATE in arguments else executed(read(path))
    write(path, notebook)
    if prose(path).exists():
      write(translation(path), translated(notebook, prose(path).read_text(encoding="utf-8")))
    if path.stem in PICTURES:
      (FOLDER / PICTURES[path.stem]).write_bytes(first_picture(notebook))
    print(f"{path.name}: {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1000:.0f} kB")


def sources() -> list[pathlib.Path]:
  """The notebooks that are not made from another one."""
  return sorted(path for path in FOLDER.glob("*.ipynb") if "." not in path.stem)


def prose(path: pathlib.Path) -> pathlib.Path:
  """Where the Chinese prose of a notebook is, if there is any."""
  return path.with_suffix(".zh.md")


def translation(path: pathlib.Path) -> pathlib.Path:
  """Where the Chinese notebook is."""
  return path.with_suffix(".zh.ipynb")


def executed(notebook: Notebook) -> Notebook:
  """The notebook with new outputs, which are the same on every run but for rounding."""
  import nbclient
  import nbformat

  node = nbformat.reads(written(notebook), as_version=4)
  nbclient.NotebookClient(
    node,
    timeout=120,
    kernel_name="python3",
    record_timing=False,
    coalesce_streams=True,
    resources={"metadata": {"path": FOLDER}},
  ).execute()
  cells = []
  for number, cell in enumerate(json.loads(nbformat.writes(node))["cells"]):
    for output in cell.get("outputs", []):
      if output.get("name") == "stderr":
        raise RuntimeError(f"cell {number} wrote to stderr: {''.join(output['text'])}")
    cells.append({**cell, "id": f"cell-{number}", "metadata": {}})
  return {
    "cells": cells,
    "metadata": {
      # What the outputs are of: the tests notice when the code has changed since.
      "executed_code": fingerprint(notebook),
      "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
      "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
    },
    "nbformat": 4,
    "nbformat_minor": 5,
  }


def first_picture(notebook: Notebook) -> bytes:
  """The first picture that the notebook shows, as a PNG."""
  outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
  pictures = (output.get("data", {}).get("image/png") for output in outputs)
  return base64.b64decode(next(filter(None, pictures)))


def fingerprint(notebook: Notebook) -> str:
  """A hash of the code."""
  code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
  return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def translated(notebook: Notebook, markdown: str) -> Notebook:
  """The notebook with the sections of ``markdown`` in place of its Markdown cells."""
  sections = [section.strip("\n") for section in markdown.split(SEPARATOR)]
  notebook = copy.deepcopy(notebook)
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
  if len(cells) != len(sections):
    raise ValueError(f"{len(cells)} Markdown cells, but {len(sections)} sections to replace them")
  for cell, section in zip(cells, sections, strict=True):
    cell["source"] = section.splitlines(keepends=True)
  return notebook


def read(path: pathlib.Path) -> Notebook:
  """A notebook as plain data."""
  return json.loads(path.read_text(encoding="utf-8"))


def written(notebook: Notebook) -> str:
  """The text of a notebook file, as Jupyter writes it."""
  return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(path: pathlib.Path, notebook: Notebook) -> None:
  """Writes a notebook file."""
  path.write_text(written(notebook), encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
