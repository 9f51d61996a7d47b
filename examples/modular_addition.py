"""Train a small network on modular addition to the very end, with one loss or another.

  python examples/modular_addition.py --help

It needs optax: pip install -e '.[cli]'. A network of one hidden layer learns a + b modulo 47 from
four fifths of all pairs, in full batches and without weight decay, until the gradients of
softmax_jax's loss leave the range of float32. The runs differ only in the loss, and in the dtype
that its logits are cast to; the network and the optimizer are float32 in all of them. A run takes
half a minute or more and adds a line of JSON to the file: its options, and what was measured along
the way, on the pairs learnt from unless said otherwise:

  accuracy        share of the held-out pairs that are right
  train_accuracy  the same of the pairs learnt from
  loss            the mean loss, exact
  zero_rows       share of the rows whose gradient by the logits is 0 at every class
  zero_labels     share of the rows whose gradient by the logits is 0 at the label
  error           relative error of the gradient by the logits, in norm
  gradient_norm   norm of the gradient of the mean loss by the weights
  mean_logit      the mean of all logits

notebooks/08_grokking.ipynb shows notebooks/modular_addition.jsonl, which this program wrote.
"""

# The setting is that of Prieto, Barsbey, Mediano and Birdal, "Grokking at the edge of numerical
# stability", 2025, made small.

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softmax_jax import softmax_cross_entropy_with_integer_labels as ours

peer = optax.losses.softmax_cross_entropy_with_integer_labels
LOSSES = {
  "optax": (peer, "float32"),
  "softmax_jax": (ours, "float32"),
  "optax, float64": (peer, "float64"),
  "optax, bfloat16": (peer, "bfloat16"),
  "softmax_jax, bfloat16": (ours, "bfloat16"),
}
MODULUS = 47
HIDDEN = 256
LEARNT_SHARE = 0.8
STEPS_BETWEEN_MEASUREMENTS = 200


def options() -> argparse.ArgumentParser:
  """The options; the defaults of Adam's eps and of the scale use the whole range of float32."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", type=Path, help="where the results are added")
  parser.add_argument(
    "--losses",
    nargs="+",
    choices=LOSSES,
    default=[*LOSSES],
    metavar="LOSS",
    help=f"of {', '.join(map(repr, LOSSES))}; without the option all",
  )
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
  parser.add_argument(
    "--steps",
    type=steps,
    default=7000,
    metavar="N",
    help=f"a multiple of {STEPS_BETWEEN_MEASUREMENTS}",
  )
  parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="X")
  parser.add_argument("--eps", type=float, default=1e-20, metavar="X", help="Adam's")
  # Adam's steps do not change with it, but the squares of the gradients stay in float32's range.
  parser.add_argument("--log2-scale", type=int, default=60, metavar="N", help="of the loss")
  return parser


def steps(text: str) -> int:
  """A number of steps after which there is a measurement."""
  number = int(text)
  if number < 1 or number % STEPS_BETWEEN_MEASUREMENTS:
    raise argparse.ArgumentTypeError(
      f"expected a multiple of {STEPS_BETWEEN_MEASUREMENTS}, got {text}"
    )
  return number


def main(argv: list[str] | None = None) -> None:
  """Trains with each loss from each seed."""
  args = options().parse_args(argv)
  settings = {name: getattr(args, name) for name in ("steps", "learning_rate", "eps", "log2_scale")}
  with args.file.open("a", encoding="utf-8") as file:
    for seed, name in itertools.product(args.seeds, args.losses):
      with jax.enable_x64(True):  # For the loss in float64, and to measure.
        curves = train(args, name, seed)
      run = {"loss": name, "seed": seed, **settings, "curves": curves}
      print(json.dumps(run), file=file, flush=True)
      right = f"{curves['accuracy'][-1]:.1%} of the held-out pairs are right"
      print(f"{name}, seed {seed}: {right}", flush=True)


class Pairs(NamedTuple):
  """N pairs of numbers, int32 [N, 2], and their sums, int32 [N]."""

  numbers: np.ndarray
  sums: np.ndarray


def split_pairs(seed: int) -> tuple[Pairs, Pairs]:
  """The pairs to learn from, and those that are held out."""
  pairs = np.indices((MODULUS, MODULUS)).reshape(2, -1).T.astype(np.int32)
  pairs = np.random.default_rng(seed).permutation(pairs)
  sums = pairs.sum(axis=1, dtype=np.int32) % MODULUS
  count = int(LEARNT_SHARE * len(pairs))
  return Pairs(pairs[:count], sums[:count]), Pairs(pairs[count:], sums[count:])


def initial_weights(seed: int) -> dict[str, jax.Array]:
  """Uniform, within 1 / sqrt(inputs); a layer without bias of two one-hot inputs is two tables."""
  shapes = {"first": (MODULUS, HIDDEN), "second": (MODULUS, HIDDEN), "out": (HIDDEN, MODULUS)}
  inputs = {"first": 2 * MODULUS, "second": 2 * MODULUS, "out": HIDDEN}
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return {
    name: jax.random.uniform(key, shapes[name], jnp.float32, -1, 1) * inputs[name] ** -0.5
    for name, key in zip(shapes, keys, strict=True)
  }


def logits_of(weights: dict[str, jax.Array], numbers: jax.Array) -> jax.Array:
  """The network, in float32."""
  hidden = weights["first"][numbers[:, 0]] + weights["second"][numbers[:, 1]]
  return jax.nn.relu(hidden) @ weights["out"]


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, list[float]]:
  """The curves of one run, by what was measured."""
  function, dtype = LOSSES[name]
  losses = lambda logits, labels: function(logits.astype(dtype), labels).astype(jnp.float32)
  learnt, held_out = split_pairs(seed)
  optimizer = optax.adam(args.learning_rate, b2=0.98, eps=args.eps)
  scale = np.float32(2.0**args.log2_scale)

  def scaled_loss(weights: dict[str, jax.Array]) -> jax.Array:
    return scale * losses(logits_of(weights, learnt.numbers), learnt.sums).mean()

  def step(carry: Any, _: None) -> tuple[Any, None]:
    weights, state = carry
    updates, state = optimizer.update(jax.grad(scaled_loss)(weights), state)
    return (optax.apply_updates(weights, updates), state), None

  @jax.jit
  def stretch(carry: Any) -> tuple[Any, dict[str, jax.Array]]:
    carry, _ = jax.lax.scan(step, carry, None, length=STEPS_BETWEEN_MEASUREMENTS)
    weights, _ = carry
    norm = optax.tree.norm(jax.grad(scaled_loss)(weights)) / scale
    return carry, {**measured(losses, weights, learnt, held_out), "gradient_norm": norm}

  weights = initial_weights(seed)
  carry = weights, optimizer.init(weights)
  rows = []
  for _ in range(args.steps // STEPS_BETWEEN_MEASUREMENTS):
    carry, row = stretch(carry)
    rows.append(row)
  return {key: [float(f"{row[key]:.4g}") for row in rows] for key in rows[0]}


def measured(
  losses: Callable[[jax.Array, jax.Array], jax.Array],
  weights: dict[str, jax.Array],
  learnt: Pairs,
  held_out: Pairs,
) -> dict[str, jax.Array]:
  """What the top of this file lists, but for the norm of the gradient by the weights."""
  logits, labels = logits_of(weights, learnt.numbers), jnp.asarray(learnt.sums)
  gradient = jax.grad(lambda z: losses(z, labels).sum())(logits)
  at_label = jax.nn.one_hot(labels, MODULUS, dtype=bool)
  # In float64, and without a subtraction from 1: what the label lacks is what the others have.
  others = jnp.where(at_label, 0, jax.nn.softmax(logits.astype(jnp.float64)))
  missing = others.sum(axis=1)
  exact = jnp.where(at_label, -missing[:, None], others)
  right = lambda pairs: (logits_of(weights, pairs.numbers).argmax(axis=1) == pairs.sums).mean()
  return {
    "accuracy": right(held_out),
    "train_accuracy": right(learnt),
    "loss": -jnp.log1p(-missing).mean(),
    "zero_rows": (gradient == 0).all(axis=1).mean(),
    "zero_labels": ((gradient == 0) & at_label).any(axis=1).mean(),
    "error": jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact),
    "mean_logit": logits.mean(),
  }


if __name__ == "__main__":
  main()
