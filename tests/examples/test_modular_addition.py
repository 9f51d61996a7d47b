"""`examples/modular_addition.py`: what its runs measure, and that only the loss differs."""

import json

import example_programs
import jax
import numpy as np
import pytest

task = example_programs.module("modular_addition")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """By loss, a run that is long enough for float32 to lose the gradient at the label."""
  file = tmp_path_factory.mktemp("results") / "runs.jsonl"
  losses = ["optax", "softmax_jax", "optax, float64"]
  promotion = jax.numpy_dtype_promotion("standard")  # optax multiplies by its integer counter.
  with pytest.MonkeyPatch.context() as patch, jax.disable_jit(False), promotion:
    patch.setattr(task, "MODULUS", 7)
    patch.setattr(task, "HIDDEN", 64)
    options = ["--seeds", "0", "--steps", "1200", "--learning-rate", "0.02"]
    task.main([str(file), *options, "--losses", *losses])
  lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
  assert [line["loss"] for line in lines] == losses
  return {line["loss"]: line["curves"] for line in lines}


def test_the_runs_begin_alike(runs):
  for name in ("gradient_norm", "loss"):
    first = [curves[name][0] for curves in runs.values()]
    np.testing.assert_allclose(first, first[0], rtol=1e-2)
  assert all(curves["train_accuracy"][-1] == 1 for curves in runs.values())
  assert all(len(values) == 6 for curves in runs.values() for values in curves.values())


def test_only_optax_in_float32_loses_the_gradient_at_the_label(runs):
  assert runs["optax"]["zero_labels"][-1] > 0.1
  assert runs["optax"]["error"][-1] > 1e-2
  for name in ("softmax_jax", "optax, float64"):
    assert not any(runs[name]["zero_labels"])
    assert max(runs[name]["error"]) < 1e-6


@pytest.mark.parametrize("steps", ["0", "100", "300", "many"])
def test_steps_end_with_a_measurement(steps, tmp_path, capsys):
  with pytest.raises(SystemExit):
    task.main([str(tmp_path / "runs.jsonl"), "--steps", steps])
  assert "argument --steps" in capsys.readouterr().err


def test_every_pair_is_learnt_or_held_out():
  learnt, held_out = task.split_pairs(seed=0)
  pairs = np.concatenate([learnt.numbers, held_out.numbers])
  assert len(np.unique(pairs, axis=0)) == len(pairs) == task.MODULUS**2
  sums = np.concatenate([learnt.sums, held_out.sums])
  np.testing.assert_array_equal(pairs.sum(axis=1) % task.MODULUS, sums)
