"""The functions of `test_edge_values`, what is expected of them, and the comparison."""

import functools

import jax
import numpy as np
import oracle
import pytest
from oracle import relative_error

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)

INF, NAN = np.inf, np.nan
SOFT, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
ENTROPY, KL = "softmax_entropy", "softmax_kl_divergence"
WEIGHTS = np.float32([0.25, 1.5, 0, 0])  # the soft labels; 1 is the integer label


def labels_for(name, shape):
  """The labels that the functions below use, or None."""
  if name == SOFT:
    return WEIGHTS[: shape[-1]]
  if name == KL:
    return np.where(np.arange(shape[-1]) == min(1, shape[-1] - 1), np.float32(1.5), -np.inf)
  return np.full(shape[:-1], min(1, shape[-1] - 1), np.int32) if name == INTEGER else None


FUNCTIONS = {  # of x and a mask, over the last axis
  "softmax": lambda x, where=None: softmax(x, -1, where),
  "log_softmax": lambda x, where=None: log_softmax(x, -1, where),
  "logsumexp": lambda x, where=None: logsumexp(x, -1, where=where),
  SOFT: lambda x, where=None: softmax_cross_entropy(x, labels_for(SOFT, x.shape), -1, where),
  INTEGER: lambda x, where=None: softmax_cross_entropy_with_integer_labels(
    x, labels_for(INTEGER, x.shape), -1, where
  ),
  ENTROPY: lambda x, where=None: softmax_entropy(x, -1, where),
  KL: lambda x, where=None: softmax_kl_divergence(x, labels_for(KL, x.shape), -1, where),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_loss = pytest.mark.parametrize("name", [SOFT, INTEGER, ENTROPY, KL])


@functools.partial(jax.jit, static_argnums=0)
def both_modes(f, *args):
  """The value of f and its Jacobian by the first argument, in reverse and in forward mode."""
  return f(*args), jax.jacrev(f)(*args), jax.jacfwd(f)(*args)


@functools.partial(jax.jit, static_argnums=0)
def second_derivatives(f, *args):
  return jax.jacfwd(jax.jacrev(f))(*args), jax.jacrev(jax.jacfwd(f))(*args)


def by_oracle(name, x, where=None):
  """The value of FUNCTIONS[name] for one row x and its Jacobian."""
  x = np.asarray(x)
  y, jvp, _ = oracle.linearize(name, x, labels_for(name, x.shape), where=where)
  return y, np.stack([jvp(e) for e in np.eye(len(x))], axis=-1)


def assert_same(actual, expected, tolerance=1e-6):
  """Zeros, infinities and NaN exactly, the rest to `tolerance`."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert relative_error(actual, expected) <= tolerance, f"{actual} is not {expected}"
  np.testing.assert_array_equal(actual[expected == 0], 0)


def check(f, args, value, jacobian, tolerance=1e-6):
  y, *jacobians = both_modes(f, *args)
  assert_same(y, value, tolerance)
  for actual in jacobians:
    assert_same(actual, jacobian, tolerance)


def row(*entries, dtype=np.float32):
  return np.array(entries, dtype)
