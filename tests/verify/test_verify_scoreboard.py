"""The functions and wrong rules of `scoreboard.py`, which takes minutes, and one of each."""

import corpus_wrong
import jax
import jax.numpy as jnp
import optax
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


def test_a_wrong_derivative_in_a_library_is_found():
  """That of logsumexp by a coefficient of 0, which JAX takes for a constant, and what calls it."""
  a, b = jnp.array([0.3, 1.0]), jnp.array([1.0, 0.0])
  check = ["finite_differences"]
  of_coefficients = lambda b: jax.nn.logsumexp(a, b=b)
  assert check_derivatives(of_coefficients, b + 0.1, checks=check)
  (row,) = check_derivatives(of_coefficients, b, checks=check).failed
  assert (row.index, row.got) == ((1,), 0)
  assert check_derivatives(lambda b: jnp.log(jnp.sum(b * jnp.exp(a))), b, checks=check)
  logits, labels = jnp.array([0.5, -1.0]), jnp.zeros(2)
  (row,) = check_derivatives(optax.sigmoid_focal_loss, logits, labels, checks=check).failed
  assert row.of == "gradient of args[1]"
