"""What the README says is true: its code runs, its tables name what exists."""

import re
from pathlib import Path

import pytest

import softmax_jax
from softmax_jax import derivatives

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""

pytestmark = pytest.mark.skipif(not TEXT, reason="the README is not beside the tests")


def _blocks(language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_python_code_runs_and_prints_what_its_comments_say(capsys):
  code, *others = _blocks("python")
  exec(compile(code, str(README), "exec"), {})
  losses, gradients, *_ = capsys.readouterr().out.split("\n")
  promised = re.search(r"# \[(\S+) (\S+)\]", code).groups()
  printed = losses.strip("[]").split()
  for word, number in zip(promised, printed, strict=True):
    assert float(word) == pytest.approx(float(number), rel=1e-4)
  assert gradients.startswith("[[")
  for code in others:
    names = {}
    exec(compile(code, str(README), "exec"), names)
    for test in [f for name, f in names.items() if name.startswith("test_")]:
      test()


def test_there_are_exactly_two_commands():
  train, test = _blocks("sh")
  assert train.strip().endswith(".venv/bin/softmax-jax train")
  assert test.strip().endswith(".venv/bin/python -m pytest")
  for command in (train, test):
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    assert command.count("\n") == 1


def test_the_tables_name_the_public_functions():
  section = TEXT.split("## The functions")[1].split("\n## ")[0]
  named = set(re.findall(r"`(\w+)\(", section))
  public = {name for name in softmax_jax.__all__ if not name[0].isupper()}
  assert public <= named
  assert set(derivatives.__all__) <= named
  assert named <= public | set(derivatives.__all__)


def test_the_relative_links_resolve():
  links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
  assert links
  for link in links:
    assert (README.parent / link).exists(), link
