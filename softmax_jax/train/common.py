"""What the tasks of `softmax-jax train` share: batches and tables."""

from collections.abc import Iterable, Iterator

import numpy as np


def batches(seed: int, size: int, batch_size: int) -> Iterator[np.ndarray]:
  """Index batches without end: a fresh shuffle each epoch, its incomplete last batch left out."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(size).astype(np.int32)
    for start in range(0, size - batch_size + 1, batch_size):
      yield order[start : start + batch_size]


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
