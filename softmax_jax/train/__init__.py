"""The command `softmax-jax train`."""

import importlib
import sys
import time
from types import SimpleNamespace
from typing import Any

import click

from softmax_jax._command_line import Command, Number, plot_option, print_json, seed_option
from softmax_jax.train import digits

HELP = """\
Train a classifier of digits, and check the softmax inside it.

A small network learns the 1,797 handwritten digits of UCI that scikit-learn ships, in a
jit-compiled loop whose loss is softmax_cross_entropy_with_integer_labels. A quarter of the digits
is held out. Then the command prints:

  * the accuracy on the held-out digits, and the speed;
  * the norm of the loss gradient of each held-out digit, by vmap(grad): the digits with the
    largest are those whose label the network contradicts most;
  * the errors of four ways to compute the softmax Jacobian at the network's own logits, against
    float64: closed form, jacfwd and jacrev of softmax_jax.softmax, and JAX's autodiff of
    jax.nn.softmax.

Exit code: 0 if all checks hold (the accuracy is at least 0.95 and the Jacobians are right to within
float32 rounding of their terms), 1 if not, 2 for a bad option or a missing package.
"""
_COUNT = click.IntRange(1, 1_000_000)


def _gone(text: str) -> str:
  raise click.BadParameter(
    "digits are what this command learns; for text, run examples/train_text.py of the repository"
  )


@click.command("train", cls=Command, help=HELP)
@click.option("--task", type=_gone, hidden=True, expose_value=False)
@click.option("--steps", type=_COUNT, default=1000, metavar="N", help="Training steps.")
@click.option("--batch-size", type=_COUNT, default=128, metavar="N", help="Digits per step.")
@click.option(
  "--learning-rate",
  type=Number(0, 1000, min_open=True),
  default=3e-3,
  metavar="X",
  help="AdamW's learning rate at the start; a cosine takes it to 0.",
)
@seed_option("Decides what is held out, the initial weights and the batches.")
@click.option("--json", is_flag=True, help="Print one JSON object in place of the tables.")
@plot_option("Draw the training curves and what was checked")
def command(**options: Any) -> int:
  """Runs `softmax-jax train`."""
  return run(SimpleNamespace(**options))


def run(args: SimpleNamespace) -> int:
  """Trains, checks and reports; the exit code says whether every check held."""
  start = time.perf_counter()
  # Import every extra now: a missing one should show before the training, not after it.
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
