"""Train a classifier of digits or a language model, and check the softmax or the loss inside it.

With --task digits, the default, a small network learns the 1,797 handwritten digits of UCI that
scikit-learn ships, in a jit-compiled loop whose loss is softmax_cross_entropy_with_integer_labels.
A quarter of the digits is held out. Then the command prints:

  * the accuracy on the held-out digits, and the speed;
  * the norm of the loss gradient of each held-out digit, by vmap(grad): the digits with the
    largest are those whose label the network contradicts most;
  * how far apart the softmax Jacobian at the network's own logits is, computed four ways: closed
    form, jacfwd and jacrev of softmax_jax.softmax, and JAX's autodiff of jax.nn.softmax.

With --task text, a small network learns to predict the next word of Python: of the source of the
standard library of the interpreter that runs it. The words are hashed to 32,768 classes, and the
loss is linear_softmax_cross_entropy, which never holds the logits. One file in twenty is held out.
Then the command prints:

  * the perplexity on held-out words, before, during and after the training, beside the perplexity
    of a model that knows nothing but how often each word occurs;
  * the memory that the compiled training step takes, beside the same step with the loss of the
    logits themselves.

Exit code: 0 if all checks hold (digits: the accuracy is at least 0.95 and the Jacobians agree to
within float32 rounding; text: the perplexity ends below that of the word frequencies), 1 if not,
2 for a bad option, a missing package, or too little text to learn from.
"""

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable

from softmax_jax._command_line import picture, print_json, whole_number
from softmax_jax.train import digits, text

# Each has DEFAULTS, EXTRAS, `run(args)`, which returns the report, and `print_tables(report)`.
_TASKS = {"digits": digits, "text": text}


def _learning_rate(text: str) -> float:
  with contextlib.suppress(ValueError):
    if 0 < float(text) <= 1000:
      return float(text)
  raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1000, got {text!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of `softmax-jax train`."""
  count = whole_number(1, 1_000_000)
  default: Callable[[str], str] = lambda name: (
    f"(default: {digits.DEFAULTS[name]}, text {text.DEFAULTS[name]})"
  )
  add = parser.add_argument
  add(
    "--task",
    choices=_TASKS,
    default="digits",
    metavar="NAME",
    help="what to learn, digits or text (default: digits)",
  )
  add("--steps", type=count, metavar="N", help=f"training steps {default('steps')}")
  add(
    "--batch-size",
    type=count,
    metavar="N",
    help=f"digits per step, or words to predict {default('batch_size')}",
  )
  add(
    "--learning-rate",
    type=_learning_rate,
    metavar="X",
    help="AdamW's learning rate at the start, for text after a tenth of the steps; a cosine "
    f"takes it to 0 {default('learning_rate')}",
  )
  add(
    "--vocabulary",
    type=whole_number(2, 1_000_000),
    metavar="N",
    help=f"classes that words are hashed to, with --task text (default: {text.VOCABULARY})",
  )
  add(
    "--chunk-size",
    type=count,
    metavar="N",
    help="words whose logits are held at a time, with --task text (default: "
    f"{text.DEFAULTS['chunk_size']})",
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
    "--devices",
    type=whole_number(1, 4096),
    metavar="N",
    help="devices that the classes are spread over, with --task text; on a CPU as many as asked "
    f"for, the losses are the same (default: {text.DEFAULTS['devices']})",
  )
  add(
    "--plot",
    type=picture,
    metavar="FILE.png",
    help="draw the training curves and what was checked (also .pdf, .svg)",
  )


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
  """The options, with those of the task where none was given."""
  defaults = _TASKS[args.task].DEFAULTS
  for name in text.DEFAULTS.keys() - defaults:
    if getattr(args, name) is not None:
      option = "--" + name.replace("_", "-")
      raise argparse.ArgumentError(None, f"argument {option}: only with --task text")
  given = {name: value for name, value in vars(args).items() if value is not None}
  return argparse.Namespace(**{**vars(args), **defaults, **given})


def run(args: argparse.Namespace) -> int:
  """Trains, checks and reports; the exit code says whether every check held."""
  start = time.perf_counter()
  args = _with_defaults(args)
  task = _TASKS[args.task]
  # Every extra now: better to hear of a missing one before the training than after it.
  for extra in (*task.EXTRAS, *(["matplotlib"] if args.plot else [])):
    importlib.import_module(extra)

  report = task.run(args)
  report["total_seconds"] = time.perf_counter() - start
  if args.json:
    print_json(report)
  else:
    task.print_tables(report)
  for failure in report["failures"]:
    print(f"softmax-jax train: failed: {failure}", file=sys.stderr)
  return 1 if report["failures"] else 0
