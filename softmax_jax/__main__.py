"""The command `softmax-jax`, also `python -m softmax_jax`.

Each command is one module with two functions: `add_arguments(parser)` declares its options, and
`run(args)` does the work and returns the exit code. Its docstring is the text of its `--help`. An
option that only the work itself can judge is refused there with `argparse.ArgumentError`.
"""

import argparse
import ast
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import jax

import softmax_jax
from softmax_jax import benchmark, train
from softmax_jax._command_line import out_of_memory
from softmax_jax.verify import command as verify

_COMMANDS = {"benchmark": benchmark, "train": train, "verify": verify}

# What the modules of the extra `cli` are called on import.
_CLI_EXTRA = {"matplotlib", "optax", "rich", "sklearn"}


class _Parser(argparse.ArgumentParser):
  """An argument parser whose errors take one line, without the usage in front."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    # As in Python 3.14: the word -1,3 is a value, no option that nobody knows.
    self._negative_number_matcher = re.compile(r"-\.?\d")

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message}\n")


def _text(module: ModuleType) -> str:
  """The docstring of a module; from its source where `python -OO` has dropped it."""
  return module.__doc__ or ast.get_docstring(ast.parse(inspect.getsource(module))) or ""


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
  parser = _Parser(
    prog="softmax-jax",
    description=_text(softmax_jax),
    epilog="softmax-jax COMMAND --help tells what a command does and takes.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=softmax_jax.__version__)
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  parsers: dict[str, _Parser] = {}
  for name, module in _COMMANDS.items():
    summary, _, details = _text(module).partition("\n\n")
    parsers[name] = commands.add_parser(
      name,
      help=summary,
      description=f"{summary}\n\n{details}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    module.add_arguments(parsers[name])
  return parser, parsers


def _run(argv: Sequence[str] | None) -> int:
  parser, parsers = _parsers()
  args = parser.parse_args(argv)
  try:
    # What the commands measure, train and check are compiled programs.
    with jax.disable_jit(False):
      return _COMMANDS[args.command].run(args)
  except argparse.ArgumentError as error:
    parsers[args.command].error(str(error))
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in _CLI_EXTRA:
      raise
    parsers[args.command].error(
      f"{error.name} is missing; install the extra that brings it: "
      'pip install "softmax-jax[cli]", or in a checkout pip install -e ".[cli]"'
    )
  except (MemoryError, RuntimeError) as error:  # JAX's own is a RuntimeError.
    if not out_of_memory(error):
      raise
    parsers[args.command].error("the options ask for more memory than there is")


def _flush() -> None:
  """Writes what is pending or, where that is impossible, forgets it.

  Python flushes stdout once more on its way out, which must not fail again.
  """
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line `argv` (default: the process's own) and returns its exit code.

  A bad command line exits through `SystemExit`, as argparse does: 2, and 0 for `--help`.
  """
  # What the shell has closed (>&-) is None, and print(file=None) would write to stdout.
  sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A name may have letters that the locale lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    try:
      return _run(argv)
    finally:
      print(end="", flush=True)  # So that a reader who has gone away shows here, not at exit.
  except KeyboardInterrupt:
    if argv is None:  # While threads and JAX come to their end, a second Ctrl-C ends all at once.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("\nsoftmax-jax: interrupted", file=sys.stderr)
    return 130  # What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
  except BrokenPipeError:
    _flush()
    return 1
  except OSError as error:  # Such as a full disk under stdout.
    _flush()
    print(f"softmax-jax: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
