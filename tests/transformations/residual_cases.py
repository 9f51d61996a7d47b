"""Functions by what they keep for the backward pass, and how to see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)

B, K = 16, 128
LOGITS = np.random.default_rng(0).normal(size=(B, K))
MASK = LOGITS < 1.5
ROW = np.linspace(0.5, 1, K).astype(jnp.bfloat16)
SAMPLES = np.linspace(-1, 1, B)
INTEGERS = np.arange(B, dtype=np.int32)
ACROSS = np.arange(K, dtype=np.int32) % B

KEEPING_THE_OUTPUT = {  # functions of x and, where the name says so, of a mask
  "softmax": softmax,
  "softmax over all axes": lambda x: softmax(x, axis=None),
  "softmax, masked": lambda x, where: softmax(x, where=where),
  "log_softmax": log_softmax,
  "log_softmax, masked": lambda x, where: log_softmax(x, where=where),
}
KEEPING_THE_INPUT = {  # likewise, with weights or soft labels that are differentiated too
  "logsumexp": lambda x: logsumexp(x, axis=-1),
  "logsumexp over all axes, masked": lambda x, where: logsumexp(x, where=where),
  "logsumexp, weighted": lambda x, b: logsumexp(x, axis=-1, b=b),
  "logsumexp, one weight per column": lambda x: logsumexp(x, axis=-1, b=ROW),
  "soft labels": softmax_cross_entropy,
  "soft labels, the same in all rows": lambda x: softmax_cross_entropy(x, ROW),
  "soft labels, masked": lambda x, t, where: softmax_cross_entropy(x, t, where=where),
  "soft labels, weighted": lambda x: softmax_cross_entropy(x, ROW, sample_weights=SAMPLES),
  "integer labels": lambda x: softmax_cross_entropy_with_integer_labels(x, INTEGERS),
  "integer labels, weighted": lambda x: softmax_cross_entropy_with_integer_labels(
    x, INTEGERS, sample_weights=SAMPLES, return_aux=True
  )[0],
  "integer labels, axis 0": lambda x: softmax_cross_entropy_with_integer_labels(x, ACROSS, 0),
  "integer labels, masked": lambda x, where: softmax_cross_entropy_with_integer_labels(
    x, INTEGERS, where=where
  ),
  "entropy": softmax_entropy,
  "entropy, masked": lambda x, where: softmax_entropy(x, where=where),
  "divergence": softmax_kl_divergence,
  "divergence, masked": lambda x, w, where: softmax_kl_divergence(x, w, where=where),
}
either_way = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def arguments(name):
  """The arguments of the function called `name` that are differentiated, and its mask if any."""
  args = [jnp.asarray(LOGITS, "bfloat16")]
  if name in ("logsumexp, weighted", "soft labels", "soft labels, masked") or (
    "divergence" in name
  ):
    args.append(jnp.asarray(np.abs(LOGITS), "bfloat16"))
  return args, [jnp.asarray(MASK)] if "masked" in name else []


def saved(f, args, where):
  """The output of f and the arrays as large as the logits that its backward pass holds."""
  y, pull = jax.vjp(lambda *args: f(*args, *where), *args)
  leaves = [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]
  return y, [leaf for leaf in leaves if leaf.size >= B * K]


def not_among(arrays, known):
  """Those of `arrays` that are not kept in the buffer of one of `known`."""
  buffers = {array.unsafe_buffer_pointer() for array in known}
  return [array for array in arrays if array.unsafe_buffer_pointer() not in buffers]
