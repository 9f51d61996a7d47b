"""Train a classifier of digits, and check the softmax inside it.

A small network learns the 1,797 handwritten digits of UCI that scikit-learn ships, in a
jit-compiled loop whose loss is softmax_cross_entropy_with_integer_labels. A quarter of the digits
is held out. Then the command prints:

  * the accuracy on the held-out digits, and the speed;
  * the norm of the loss gradient of each held-out digit, by vmap(grad): the digits with the
    largest are those whose label the network contradicts most;
  * how far apart the softmax Jacobian at the network's own logits is, computed four ways: closed
    form, jacfwd and jacrev of softmax_jax.softmax, and JAX's autodiff of jax.nn.softmax.

Exit code: 0 if all checks hold (the accuracy is at least 0.95 and the Jacobians agree to within
float32 rounding), 1 if not, 2 for a bad option or a missing package.
"""

import argparse
import contextlib
import importlib
import sys
import time

from softmax_jax._command_line import picture, print_json, whole_number
from softmax_jax.train import digits


def _learning_rate(text: str) -> float:
  with contextlib.suppress(ValueError):
    if 0 < float(text) <= 1000:
      return float(text)
  raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1000, got {text!r}")


def _gone(text: str) -> str:
  raise argparse.ArgumentTypeError(
    "digits are what this command learns; for text, run examples/train_text.py of the repository"
  )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of `softmax-jax train`."""
  count = whole_number(1, 1_000_000)
  add = parser.add_argument
  add("--task", type=_gone, help=argparse.SUPPRESS)
  add("--steps", type=count, default=1000, metavar="N", help="training steps (default: 1000)")
  add("--batch-size", type=count, default=128, metavar="N", help="digits per step (default: 128)")
  add(
    "--learning-rate",
    type=_learning_rate,
    default=3e-3,
    metavar="X",
    help="AdamW's learning rate at the start; a cosine takes it to 0 (default: 0.003)",
  )
  add(
    "--seed",
    type=whole_number(0, 2**32 - 1),
    default=0,
    metavar="N",
    help="decides what is held out, the initial weights and the batches (default: 0)",
  )
  add("--json", action="store_true", help="print one JSON object in place of the tables")
  add(
    "--plot",
    type=picture,
    metavar="FILE.png",
    help="draw the training curves and what was checked (also .pdf, .svg)",
  )


def run(args: argparse.Namespace) -> int:
  """Trains, checks and reports; the exit code says whether every check held."""
  start = time.perf_counter()
  # Every extra now: better to hear of a missing one before the training than after it.
  for extra in ("optax", "rich", "sklearn", *(["matplotlib"] if args.plot else [])):
    importlib.import_module(extra)

  report = digits.run(args)
  report["total_seconds"] = time.perf_counter() - start
  if args.json:
    print_json(report)
  else:
    digits.print_tables(report)
  for failure in report["failures"]:
    print(f"softmax-jax train: failed: {failure}", file=sys.stderr)
  return 1 if report["failures"] else 0
