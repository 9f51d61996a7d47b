"""What the README says is true: its code, the names in its tables, its numbers."""

import json
import re
import statistics

import pytest
from pages import DOCS, README, blocks, run, table, text_of

import softmax_jax
from softmax_jax import derivatives

TEXT = text_of(README)


def test_it_is_short():
  assert TEXT.count("\n") <= 120


def test_the_python_code_runs_and_prints_what_its_comments_say(capsys):
  (code,) = blocks(README, "python")
  run(README, code)
  losses, gradients, *_ = capsys.readouterr().out.split("\n")
  promised = re.search(r"# \[(\S+) (\S+)\]", code).groups()
  printed = losses.strip("[]").split()
  for word, number in zip(promised, printed, strict=True):
    assert float(word) == pytest.approx(float(number), rel=1e-4)
  assert gradients.startswith("[[")


def test_there_are_exactly_two_commands():
  train, test = blocks(README, "sh")
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


def test_its_numbers_are_those_of_the_tables():
  prose = " ".join(TEXT.split("## Three numbers")[1].split("\n## ")[0].split())
  speed = text_of(DOCS / "speed.md")
  suite = lambda name: speed.split(f"<!-- benchmark: {name}, cpu -->")[1].split("<!-- end -->")[0]

  header, *rows = table(suite("accuracy"))
  row = dict(
    zip(header, next(row for row in rows if row[0] == "loss gradient, in norm"), strict=True)
  )
  assert row["jax.nn / optax"] == row["torch"]
  assert f"off by {row['softmax_jax']} rounding errors" in prose
  assert f"torch by {row['torch']} " in prose

  times = re.search(
    r"optax (\S+) \((\S+) at scale 1, .*?, at most ([\d.]+);", suite("losses")
  ).groups()
  assert "{} times the time of optax in the geometric mean: {} where".format(*times) in prose
  assert f"up to {times[2]} where" in prose

  memory = text_of(DOCS / "how_to" / "vocabularies.md")
  ours, dense = re.search(
    r"they take (\d+) MB.*?the dense loss takes (\d+) MB", memory, re.DOTALL
  ).groups()
  assert f"takes {ours} MB beside its gradients where the dense loss takes {dense} MB" in prose
  time = re.search(r"([\d.]+) of the time of the dense loss", memory).group(1)
  assert f"and {time} of its time" in prose
  linear = {row[0]: row[1] for row in table(suite("linear"))}
  assert f"; {time} / " in linear["linear + grad"]


def test_what_the_digits_decide_is_what_is_stored():
  lines = text_of(README.parent / "notebooks" / "modular_addition.jsonl").splitlines()
  runs = [run for run in map(json.loads, lines) if run["eps"] == 1e-20]
  runs = [run for run in runs if run["learning_rate"] == 2e-3]
  ends = {
    name: [run["curves"]["accuracy"][-1] for run in runs if run["loss"] == name]
    for name in ("softmax_jax", "optax", "optax, float64")
  }
  assert all(len(seeds) == 3 for seeds in ends.values())
  ours, peer, wide = (f"{statistics.mean(seeds):.1%}".replace("%", " %") for seeds in ends.values())
  said = (
    f"{ours} of the held-out pairs right with this loss, with {peer} with that of optax, and with"
  )
  bests = [
    statistics.mean(max(run["curves"]["accuracy"]) for run in runs if run["loss"] == name)
    for name in ("optax", "optax, float64")
  ]
  best = " and ".join(f"{share:.1%}".replace("%", " %") for share in bests)
  text = " ".join(TEXT.split())
  assert f"{said} {wide} with that in float64. At their best steps these had {best} " in text
