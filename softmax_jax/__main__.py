"""The command `softmax-jax`, also `python -m softmax_jax`.

Nothing but the command itself imports click, which is of the extra `cli`.
"""

import io
import os
import signal
import sys
from collections.abc import Sequence

# The names by which the packages of the extra `cli` are imported.
_CLI_EXTRA = {"click", "matplotlib", "optax", "rich", "sklearn"}


def _run(argv: Sequence[str] | None) -> int:
  import click

  import softmax_jax
  from softmax_jax import benchmark, train
  from softmax_jax.verify import command as verify

  group = click.Group(
    commands=[benchmark.command, train.command, verify.command],
    help="Softmax and the losses built on it, with gradients derived by hand.",
    epilog="softmax-jax COMMAND --help tells what a command does and takes.",
    context_settings={"show_default": True},
    no_args_is_help=False,
  )
  click.version_option(softmax_jax.__version__, message="%(version)s")(group)
  try:
    return group.main(argv, "softmax-jax", standalone_mode=False)
  except click.Abort:  # By Ctrl-C.
    raise KeyboardInterrupt from None
  except click.ClickException as error:
    context = error.ctx if isinstance(error, click.UsageError) else None
    name = context.command_path if context else "softmax-jax"
    print(f"{name}: error: {error.format_message()}", file=sys.stderr)
    return error.exit_code


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line `argv` (default: the process's own) and returns its exit code."""
  # A stream that the shell has closed (>&-) is None, and print(file=None) would write to stdout.
  sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A name may have letters that the locale lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    try:
      return _run(argv)
    finally:
      print(end="", flush=True)  # So that a closed pipe shows here, not at exit.
  except KeyboardInterrupt:
    if argv is None:  # While threads and JAX shut down, a second Ctrl-C ends all at once.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("softmax-jax: interrupted", file=sys.stderr)
    return 130  # What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in _CLI_EXTRA:
      raise
    print(
      f"softmax-jax: error: {error.name} is missing; install the extra that brings it: "
      'pip install "softmax-jax[cli]", or in a checkout pip install -e ".[cli]"',
      file=sys.stderr,
    )
    return 0 if error.name == "click" and "--help" in (argv or sys.argv) else 2
  except OSError as error:  # Such as a full disk under stdout, or a closed pipe.
    try:
      sys.stdout.flush()
    except OSError:  # Python flushes once more on its way out, which must not fail again.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
      return 1
    print(f"softmax-jax: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
