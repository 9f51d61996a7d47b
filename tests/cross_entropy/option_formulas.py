"""The two losses with all their options, written out, and the arguments to try them with.

`formulas` is both oracles: with NumPy it gives values, and with jax.numpy, in float64, it gives
every derivative by JAX's own differentiation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import random

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

SOFT, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
LOSSES = {SOFT: softmax_cross_entropy, INTEGER: softmax_cross_entropy_with_integer_labels}
REDUCTIONS = ("none", "sum", "mean")
OUTPUTS = ("loss", "nll", "lse", "z_loss", "weight")
every_loss = pytest.mark.parametrize("name", LOSSES)


@oracle.default_promotion()
def formulas(
  xp,
  logits,
  labels,
  where=None,
  label_smoothing=0.0,
  z_loss=0.0,
  class_weights=None,
  sample_weights=None,
  ignore_index=None,
  reduction="none",
):
  """The loss and its aux for logits [B, K], with labels [B] or [B, K]; all of it finite."""
  soft = labels.ndim == 2
  z, w = logits, xp.ones(logits.shape[1]) if class_weights is None else class_weights
  mask = xp.ones(z.shape, bool) if where is None else where
  counts = xp.any(mask, axis=1)
  if ignore_index is not None:
    counts = counts & (labels != ignore_index)
  z = xp.where(counts[:, None], xp.where(mask, z, -1e300), 0.0)
  shift = xp.max(z, axis=1, keepdims=True)
  lse = shift + xp.log(xp.sum(xp.exp(z - shift), axis=1, keepdims=True))
  weighted_costs = xp.where(mask, w * (lse - z), 0)
  t = labels if soft else labels[:, None] == np.arange(z.shape[1])
  nll = xp.where(counts, xp.sum(t * weighted_costs, axis=1), 0)
  uniform = xp.sum(weighted_costs, axis=1) / xp.maximum(xp.sum(mask, axis=1), 1)
  lse = xp.where(counts, lse[:, 0], 0)
  s = xp.ones(len(z)) if sample_weights is None else sample_weights
  row_weights = s * xp.where(counts, 1.0 if soft else xp.sum(t * w, axis=1), 0)
  weight = xp.sum(row_weights)

  smoothed = s * ((1 - label_smoothing) * nll + label_smoothing * xp.where(counts, uniform, 0))
  nll, penalty = s * nll, s * z_loss * lse**2
  divisor = xp.where(weight == 0, 1, weight) if reduction == "mean" else 1
  loss, penalty = (
    x if reduction == "none" else xp.sum(x) / divisor for x in (smoothed + penalty, penalty)
  )
  return loss, nll, lse, penalty, weight


# Four rows of five classes. Row 3 is ignored, and the mask leaves row 1 without a class.
INTEGERS = np.array([0, 4, 2, 1])
MASK = np.array([[1, 0, 1, 1, 0], [0] * 5, [0, 1, 1, 0, 1], [1] * 5], bool)
VALUES = {
  "label_smoothing": np.float64(0.1),
  "z_loss": np.float64(0.03),
  "class_weights": np.array([0.5, 2.0, 1.25, 0.75, 1.5]),
  "sample_weights": np.array([1.5, -0.25, 0.0, 2.0]),
  "ignore_index": np.int32(1),
}
LABELS = {SOFT: np.abs(random(1, (4, 5), np.float64)), INTEGER: INTEGERS}


def arguments(name, options, masked=False, dtype=np.float64):
  """What is differentiated and what is not, as keyword arguments of the loss and of `formulas`."""
  smooth = {"logits": random(0, (4, 5), np.float64, scale=2)}
  fixed = {"where": MASK} if masked else {}
  (smooth if name == SOFT else fixed)["labels"] = LABELS[name]
  for option in options:
    (fixed if option == "ignore_index" else smooth)[option] = VALUES[option]
  return {key: jnp.asarray(value, dtype) for key, value in smooth.items()}, fixed


def flat(name, reduction="none"):
  """The loss called `name` with the differentiable aux as one tuple, like `formulas`."""

  def f(**arguments):
    loss, aux = LOSSES[name](**arguments, reduction=reduction, return_aux=True)
    return loss, *aux[:4]

  return f


def everything(name):
  """The options that the loss called `name` has."""
  return tuple(option for option in VALUES if name == INTEGER or option != "ignore_index")


def case(name, options, masked):
  return pytest.param(name, options, masked, id="+".join((name, *options, *["where"] * masked)))


# No option, each alone, pairs that share a term, and all; each with and without a mask.
PAIRS = [
  ("label_smoothing", "class_weights"),
  ("class_weights", "ignore_index"),
  ("class_weights", "sample_weights"),
]
every_case = pytest.mark.parametrize(
  ("name", "options", "masked"),
  [
    case(name, options, masked)
    for name in LOSSES
    for options in [(), *((option,) for option in VALUES), *PAIRS, everything(name)]
    if set(options) <= set(everything(name))
    for masked in (False, True)
  ],
)


def random_like(seed, tree):
  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten(
    [jnp.asarray(random(seed + i, x.shape, x.dtype)) for i, x in enumerate(leaves)]
  )
