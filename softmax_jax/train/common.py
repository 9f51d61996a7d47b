"""What the tasks of `softmax-jax train` share: batches, the progress bar, JSON and tables."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


def batches(seed: int, size: int, batch_size: int) -> Iterator[np.ndarray]:
  """Index batches without end: a fresh shuffle each epoch, its incomplete last batch left out."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(size).astype(np.int32)
    for start in range(0, size - batch_size + 1, batch_size):
      yield order[start : start + batch_size]


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[int, str], None]]:
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
  """Prints the report as one JSON object."""
  # JSON has no NaN, of which a training that diverged has plenty: it becomes null.
  plain = json.loads(json.dumps(report), parse_constant=lambda _: None)
  print(json.dumps(plain, indent=2))


def print_table(
  title: str,
  columns: Iterable[str],
  rows: Iterable[Iterable[str]],
  caption: str | None = None,
) -> None:
  """Prints a table: the first column to the left, the others to the right."""
  from rich.console import Console
  from rich.table import Table

  table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
  table.show_header = any(columns)
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left")
  for row in rows:
    table.add_row(*row)
  console = Console(highlight=False)
  console.print(table)
  console.print()


def print_line(text: str) -> None:
  """Prints one line, as it is, however long."""
  from rich.console import Console

  Console(highlight=False).print(text, markup=False, soft_wrap=True)
