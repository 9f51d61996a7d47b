"""What the commands of `softmax-jax` share: options, devices, the progress bar, pictures, JSON."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Generator
from typing import Any, cast

import click
import jax
from click.core import ParameterSource

_PICTURES = (".pdf", ".png", ".svg")


class Command(click.Command):
  """A command whose help is shown as it is written, and whose options may take several values."""

  def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Writes the text without wrapping its lists and examples."""
    formatter.write(f"\n{self.help}")

  def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
    """Reads `--suite a b` as `--suite a --suite b`, where --suite may be given more than once."""
    many = {name for option in self.params if option.multiple for name in option.opts}
    words: list[str] = []
    current = None
    for word in args:
      if word.startswith("--"):
        current = word if word in many else None
      elif current and words[-1] != current:
        words.append(current)
      words.append(word)
    return super().parse_args(ctx, words)

  def invoke(self, ctx: click.Context) -> Any:
    """Runs the command; running out of memory is an error of usage."""
    try:
      # What the commands measure, train and check are compiled programs.
      with jax.disable_jit(False):
        return super().invoke(ctx)
    except (MemoryError, RuntimeError) as error:  # JAX's own is a RuntimeError.
      if not out_of_memory(error):
        raise
      raise click.UsageError("the options ask for more memory than there is", ctx) from error


class Number(click.FloatRange):
  """A number within a range; NaN is none."""

  def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
    """The number."""
    number = super().convert(value, param, ctx)
    if math.isnan(number):
      self.fail(f"{value!r} is not a number.", param, ctx)
    return number


def seed_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """The option --seed."""
  return click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, metavar="N", help=help
  )


def plot_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """The option --plot, the name of a picture that can be written."""
  return click.option("--plot", type=picture, metavar="FILE.png", help=f"{help} (also .pdf, .svg).")


def picture(text: str) -> pathlib.Path:
  """The name of a picture that can be written."""
  path = pathlib.Path(text)
  if path.suffix.lower() not in _PICTURES:
    raise click.BadParameter(f"expected a name in .pdf, .png or .svg, got {text!r}")
  # Only opening the file tells for certain whether it can be written.
  existed = os.path.lexists(path)
  try:
    path.open("ab").close()
  except OSError as error:
    raise click.BadParameter(f"cannot write {text!r}: {error.strerror}") from None
  if not existed:
    path.unlink()
  return path


def save_picture(figure: Any, path: pathlib.Path, dpi: int) -> None:
  """Writes a figure of matplotlib to the file of the option --plot."""
  try:
    figure.savefig(path, dpi=dpi)
  except OSError as error:  # The file was writable before, but the disk may be full now.
    why = error.strerror or str(error)
    raise click.BadParameter(f"cannot write {str(path)!r}: {why}", param_hint="--plot") from error


def given(name: str) -> bool:
  """Whether the command line has this option."""
  return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def devices() -> list[Any]:
  """JAX's devices; JAX starts here, and if it finds none that is a plain error."""
  try:
    return cast(list[Any], jax.devices())
  except Exception as error:  # Each backend raises its own, some without a message.
    why = (str(error).splitlines() or [type(error).__name__])[0]
    wanted = cast(Any, jax.config).jax_platforms
    where = f", with JAX_PLATFORMS={wanted}" if wanted else ""
    raise click.UsageError(f"JAX has no device to compute on{where}: {why}") from error


def out_of_memory(error: BaseException) -> bool:
  """Whether this is what Python or JAX raises when memory runs out."""
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def progress_bar(steps: int) -> Generator[Callable[[int | None, str], None]]:
  """A progress bar on stderr, or nothing where that is no terminal.

  Yields a function of the number of steps done, None in a phase without steps, and of a
  description.
  """
  from rich import progress
  from rich.console import Console

  console = Console(stderr=True)
  columns = (
    progress.BarColumn(bar_width=max(5, min(40, console.width - 60))),
    progress.TextColumn("{task.fields[count]}{task.description}"),
    progress.TimeElapsedColumn(),
  )
  with progress.Progress(*columns, console=console, disable=not console.file.isatty()) as bar:
    task = bar.add_task("compiling", total=None, count="")

    def show(step: int | None, description: str) -> None:
      if step is None:  # It moves back and forth, for which `reset` would keep the total.
        bar.reset(task, count="", description=description)
        bar.tasks[0].total = None
      else:
        count = f"{step}/{steps} "
        bar.update(task, total=steps, completed=step, count=count, description=description)

    yield show


def print_json(report: dict[str, Any]) -> None:
  """Prints the report as one JSON object, with null for NaN and infinities, which JSON lacks."""
  plain = json.loads(json.dumps(report), parse_constant=lambda _: None)
  print(json.dumps(plain, indent=2))
