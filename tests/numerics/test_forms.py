"""The forms for accelerators, run on the CPU, in rows of special values: what ``plain`` gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_forms import in_form

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)

VALUES = [0.0, 1.5, 40.0, 3e37, -3e37, np.inf, -np.inf, np.nan]
ROWS = np.float32(list(itertools.product(VALUES, repeat=4)))  # every row of four of them
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weights": np.float32([1, 0.5, 2, 0])}
INVALID = np.isposinf(ROWS).any(1)
LABELS = np.arange(len(ROWS)) % 4
SOFT = np.float32([[1, 0, 0, 0], [0.5, 0.25, 0.25, 0], [0, 0, 0, 0], [2, 0, 0, 1]])[LABELS]
FUNCTIONS = {
  "softmax": softmax,
  "log_softmax": log_softmax,
  "logsumexp": lambda x: logsumexp(x, -1),
  "integer labels": lambda x: softmax_cross_entropy_with_integer_labels(x, LABELS),
  "integer labels, options": lambda x: softmax_cross_entropy_with_integer_labels(
    x, LABELS, **OPTIONS
  ),
  "soft labels": lambda x: softmax_cross_entropy(x, SOFT),
  "entropy": softmax_entropy,
  "divergence": lambda x: softmax_kl_divergence(x, np.float32([0, 1.5, 40, -np.inf])),
  "divergence from": lambda x: softmax_kl_divergence(np.float32([0, 1, 40, 3]), x),
  "soft labels, options": lambda x: softmax_cross_entropy(x, SOFT, **OPTIONS),
}


def computed(form, f, *args):
  with in_form(form):
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def value_and_vjp(f, x):
  y, vjp = jax.vjp(f, x)
  return y, vjp(jnp.asarray(np.random.default_rng(0).normal(size=y.shape), y.dtype))[0]


@pytest.mark.few(1)
@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("form", ["one_read", "on_chip"])
def test_rows_of_special_values(form):
  def f(x):
    return {name: value_and_vjp(function, x) for name, function in FUNCTIONS.items()}

  expected, actual = computed("plain", f, ROWS), computed(form, f, ROWS)
  for name in FUNCTIONS:
    for what, e, a in zip(("value", "vjp"), expected[name], actual[name], strict=True):
      e, a = (x.reshape(len(ROWS), -1) for x in (e, a))
      # It is open whether a result is NaN or +inf there.
      assert not np.isfinite(a[INVALID]).all(1).any(), (name, what)
      for special in (np.isnan, np.isposinf, np.isneginf):
        differ = np.flatnonzero((special(a) != special(e)).any(1) & ~INVALID)[:5]
        assert not len(differ), (name, what, ROWS[differ], e[differ], a[differ])
      valid = np.isfinite(e) & ~INVALID[:, None]
      e, a = (np.where(valid, x, 0).astype(np.float64) for x in (e, a))
      error, size = np.linalg.norm(a - e, axis=1), np.linalg.norm(e, axis=1)
      assert np.all(error <= 1e-5 * size), (name, what)
