"""What the site says is true: the code of its pages runs, its commands exist."""

import doctest
import re
import shlex
import tomllib

import pytest
from pages import DOCS, PAGES, README, ROOT, blocks, run, text_of

from softmax_jax import benchmark, train
from softmax_jax.verify import command as verify

name = lambda path: path.stem
COMMANDS = {"benchmark": benchmark.command, "train": train.command, "verify": verify.command}
CODE = [path for path in PAGES if blocks(path, "python") or blocks(path, "pycon")]


@pytest.mark.parametrize("path", CODE, ids=name)
def test_the_code_runs(path):
  for code in blocks(path, "python"):
    run(path, code)
  for number, session in enumerate(blocks(path, "pycon")):
    test = doctest.DocTestParser().get_doctest(session, {}, f"{path.name}[{number}]", path.name, 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted
    assert not result.failed


def test_every_page_of_a_how_to_shows_code():
  assert set(DOCS.glob("how_to/*.md")) <= set(CODE)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_no_code_is_in_another_language(path):
  """Which would not run here."""
  text = text_of(path)
  known = sum(len(blocks(path, kind)) for kind in ("python", "pycon", "sh", r"\{\w+\}.*?", "diff"))
  assert text.count("\n```\n") == known


def test_the_commands_take_their_options():
  found = set()
  for path in (README, *PAGES):
    prose = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`]+)`", prose) + "".join(blocks(path, "sh")).splitlines()
    for line in code:
      command, *words = shlex.split(line.partition("softmax-jax ")[2]) or [None]
      if command in COMMANDS:
        COMMANDS[command].make_context(command, words)
        found.add(command)
  assert found == set(COMMANDS)


def test_every_other_line_for_a_shell_installs_an_extra_that_exists():
  extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
  for path in PAGES:
    for line in "".join(blocks(path, "sh")).splitlines():
      assert line.startswith(
        ("python3 -m venv .venv && .venv/bin/pip install -e .", "softmax-jax ")
      )
  named = re.findall(r"\.\[(\w+)\]", text_of(DOCS / "install.md"))
  assert named
  assert set(named) <= set(extras)
