"""The code of every notebook runs, and with it the assertions that its claims are."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.skipif(not NOTEBOOKS, reason="the notebooks are not beside the tests")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
  monkeypatch.setenv("MPLBACKEND", "agg")
  pyplot = pytest.importorskip("matplotlib.pyplot")
  pyplot.switch_backend("agg")
  monkeypatch.setattr(pyplot, "show", lambda: None)
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  assert code
  namespace = {}
  for number, source in enumerate(code, start=1):
    exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
  pyplot.close("all")
