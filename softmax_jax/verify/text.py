"""A report as text that fits 80 columns: failures first, a line for each, then the other rows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from softmax_jax.verify.report import Row

_WIDTH = 80
# How many checks are named that say the same.
_NAMED = 4


def said(row: Row) -> str:
  """What a row says of its array: what is wrong where, or its status."""
  place = f"{row.of} at {list(row.index)}" if row.index else row.of
  numbers = ""
  if row.status == "failed" and not math.isnan(row.error):
    numbers = f"got {row.got:.6g}, expected {row.expected:.6g}"
    if row.index is None:  # a count
      numbers = f"got {row.error:g}, expected at most {row.bound:g}"
  text = ", ".join(text for text in (numbers, row.reason) if text) or row.status
  return f"{place}: {text}" if place else text


def number(x: float) -> str:
  """A number of few digits, or nothing for NaN."""
  if math.isnan(x):
    return ""
  return f"{x:g}" if float(x).is_integer() else f"{x:.1e}"


def failures(rows: Iterable[Row]) -> list[str]:
  """The rows that failed, under the name of each function; those that say the same in one line."""
  return _by_function([row for row in rows if row.status == "failed"], _merged)


def lines(rows: Iterable[Row]) -> list[str]:
  """All rows, under the name of each function: those that failed, passed and were skipped."""
  return _by_function(list(rows), _by_status)


def wrapped(text: str, indent: str = "") -> list[str]:
  """The text in lines, of which those after the first are indented further."""
  return textwrap.wrap(
    text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
    break_long_words=False, break_on_hyphens=False,
  )  # fmt: skip


def _by_function(rows: list[Row], text_of: Callable[[list[Row]], list[str]]) -> list[str]:
  found: list[str] = []
  for function in dict.fromkeys(row.function for row in rows):
    found.append(f"{function}:")
    found += text_of([row for row in rows if row.function == function])
  return found


def _by_status(rows: list[Row]) -> list[str]:
  found: list[str] = []
  for status in ("failed", "passed", "skipped"):
    if some := [row for row in rows if row.status == status]:
      found += _table(some) if status == "passed" else [f" {status}", *_merged(some)]
  return found


def _merged(rows: list[Row]) -> list[str]:
  checks: dict[str, list[str]] = {}
  for row in rows:
    # Why a comparison was skipped holds for its check, whatever its worst entry.
    alone = row.status == "skipped" and row.index is not None
    checks.setdefault(row.reason if alone else said(row), []).append(row.check)
  found: list[str] = []
  for text, several in checks.items():
    names = list(dict.fromkeys(several))
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    found += wrapped(f"{text} ({', '.join([*names[:_NAMED], *more])})", "  ")
  return found


def _table(rows: Sequence[Row]) -> list[str]:
  table = [(" passed", "error", "bound", "worst array")]
  table += [(f"  {r.check}", number(r.error), number(r.bound), r.of) for r in rows]
  first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
  found: list[str] = []
  for check, error, bound, of in table:
    line = f"{check:<{first}}  {error:>{widths[0]}}  {bound:>{widths[1]}}  {of}".rstrip()
    found.append(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}...")
  return found
