"""`examples/train_text.py` as a module, and small options for it."""

import argparse

import example_programs
import pytest

task = example_programs.module("train_text")

SMALL = {
  "steps": 60,
  "batch_size": 256,
  "vocabulary": 1000,
  "words": 150_000,
  "chunk_size": 64,
  "learning_rate": 3e-3,
  "seed": 0,
}


def options(**other):
  return argparse.Namespace(**{**SMALL, "devices": 1, **other})


def run(capsys, *argv, **other):
  """The exit code, stdout and stderr of the script with the small options, these, and ARGV."""
  names = {**SMALL, "devices": 1, **other}
  words = [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]
  with pytest.raises(SystemExit) as stop:
    task.main([*words, *argv])
  return stop.value.code, *capsys.readouterr()
