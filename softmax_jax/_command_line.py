"""What the commands of `softmax-jax` share: options, devices, the progress bar, pictures, JSON."""

import argparse
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Generator
from typing import Any, cast

import jax

_PICTURES = (".pdf", ".png", ".svg")


def whole_number(low: int, high: int) -> Callable[[str], int]:
  """The type of an option that takes a whole number from `low` to `high`."""

  def parse(text: str) -> int:
    with contextlib.suppress(ValueError):
      if low <= int(text) <= high:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")

  return parse


def picture(text: str) -> pathlib.Path:
  """The type of an option that takes the name of a picture to write."""
  path = pathlib.Path(text)
  if path.suffix.lower() not in _PICTURES:
    raise argparse.ArgumentTypeError(f"expected a name in .pdf, .png or .svg, got {text!r}")
  # Only opening the file tells for certain whether it can be written.
  existed = os.path.lexists(path)
  try:
    path.open("ab").close()
  except OSError as error:
    raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
  if not existed:
    path.unlink()
  return path


def save_picture(figure: Any, path: pathlib.Path, dpi: int) -> None:
  """Writes a figure of matplotlib to the file of the option --plot."""
  try:
    figure.savefig(path, dpi=dpi)
  except OSError as error:  # It could be written once, but a disk may be full now.
    raise argparse.ArgumentError(
      None, f"argument --plot: cannot write {str(path)!r}: {error.strerror or error}"
    ) from error


def devices() -> list[Any]:
  """JAX's devices; JAX starts here, and if it finds none that is a plain error."""
  try:
    return cast(list[Any], jax.devices())
  except Exception as error:  # What is raised, and whether it says a word, is up to the backend.
    why = (str(error).splitlines() or [type(error).__name__])[0]
    wanted = cast(Any, jax.config).jax_platforms
    where = f", with JAX_PLATFORMS={wanted}" if wanted else ""
    raise argparse.ArgumentError(None, f"JAX has no device to compute on{where}: {why}") from error


def out_of_memory(error: BaseException) -> bool:
  """Whether this is what Python or JAX raises where memory does not suffice."""
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def progress_bar(steps: int) -> Generator[Callable[[int, str], None]]:
  """A progress bar on stderr, or nothing where that is no terminal.

  Yields a function of the number of steps done and of a description.
  """
  from rich import progress
  from rich.console import Console

  console = Console(stderr=True)
  columns = (
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.description}"),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(*columns, console=console, disable=not console.file.isatty()) as bar:
    task = bar.add_task("compiling", total=steps)
    yield lambda step, description: bar.update(task, completed=step, description=description)


def print_json(report: dict[str, Any]) -> None:
  """Prints the report as one JSON object, with null for NaN and infinities, which JSON has not."""
  plain = json.loads(json.dumps(report), parse_constant=lambda _: None)
  print(json.dumps(plain, indent=2))
