"""The command `softmax-jax`, also `python -m softmax_jax`.

Each command is one module with two functions: `add_arguments(parser)` declares its options, and
`run(args)` does the work and returns the exit code. Its docstring is the text of its `--help`. An
option that only the work itself can judge is refused there with `argparse.ArgumentError`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import softmax_jax
from softmax_jax import benchmark, train
from softmax_jax.verify import command as verify

_COMMANDS = {"benchmark": benchmark, "train": train, "verify": verify}

# What the modules of the extra `cli` are called on import.
_CLI_EXTRA = {"matplotlib", "optax", "rich", "sklearn"}


class _Parser(argparse.ArgumentParser):
  """An argument parser whose errors take one line, without the usage in front."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message}\n")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
  parser = _Parser(
    prog="softmax-jax",
    description=softmax_jax.__doc__,
    epilog="softmax-jax COMMAND --help tells what a command does and takes.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=softmax_jax.__version__)
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  parsers: dict[str, _Parser] = {}
  for name, module in _COMMANDS.items():
    summary, _, details = (module.__doc__ or "").partition("\n\n")
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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line `argv` (default: the process's own) and returns its exit code.

  A bad command line exits through `SystemExit`, as argparse does: 2, and 0 for `--help`.
  """
  try:
    try:
      return _run(argv)
    finally:
      print(end="", flush=True)  # So that a reader who has gone away shows here, not at exit.
  except KeyboardInterrupt:
    print("\nsoftmax-jax: interrupted", file=sys.stderr)
    return 130  # What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
  except BrokenPipeError:
    # Python flushes stdout once more on its way out, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
  sys.exit(main())
