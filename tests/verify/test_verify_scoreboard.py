"""The functions and wrong rules of `scoreboard.py`, which takes minutes, and one of each."""

import corpus_wrong
import pytest

from softmax_jax.verify import check_derivatives


def test_wrong_rules_and_a_twin():
  rules = {name: (wrong, twin, args) for name, _, wrong, twin, args in corpus_wrong.rules()}
  assert len(rules) >= 150
  wrong, twin, args = rules["mean square: one row off by 5 %"]
  checks = ["finite_differences"]
  assert check_derivatives(twin, *args, checks=checks)
  assert check_derivatives(wrong, *args, checks=checks).failed


def test_right_functions():
  pytest.importorskip("equinox")
  corpus_right = pytest.importorskip("corpus_right")
  names = [name for name, _, _ in corpus_right.functions()]
  assert len(names) == len(set(names)) >= 200
