"""What a verification found: rows, and the report that holds them."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable
from typing import Any, Literal

from softmax_jax.verify.text import failures, lines, number, said, wrapped

Status = Literal["passed", "failed", "skipped"]

_COLUMNS = ("function", "check", "of", "dtype", "shape", "error", "bound", "worst at", "verdict")


class DerivativeError(AssertionError):
  """Raised by `Report.raise_if_failed`; its text says what is wrong where."""


class Skip(Exception):
  """A check does not apply; its text is the reason."""


# The check of rows about an argument or output that no derivative confirmed.
UNCONFIRMED = "confirmed"
# How much of a report its `repr` tells.
_SHORT = 200
# What no check looks at.
_NEVER = (
  "third derivatives", "values that f closes over", "arguments and dtypes that were not given"
)  # fmt: skip
# Checks that say nothing about derivatives, and those that compare f's own with each other.
_NO_DERIVATIVES = ("value", "structure", "residuals", "traces")
_OWN_DERIVATIVES = ("dot_product", "linearity", "repeated")


def tells(check: str) -> bool:
  """Whether a check compares a derivative with something other than f's own rules."""
  return check not in (*_NO_DERIVATIVES, *_OWN_DERIVATIVES)


@dataclasses.dataclass(frozen=True)
class Row:
  """What one check found; immutable.

  Attributes:
    function: the name of the function.
    check: the name of the check, and of the transformation where one check tries several.
    status: "passed", "failed" or "skipped".
    of: the array with the worst error, for instance "cotangent of args[0]".
    dtype: its dtype.
    shape: its shape.
    error: its error relative to its norm, in the group of entries that is worst (or a count).
    bound: what the error may be.
    index: the entry with the largest error in that group, or None where there is none.
    reason: why a check was skipped, or what went wrong beyond numbers.
    got: that entry.
    expected: what it should be.
  """

  function: str
  check: str
  status: Status
  of: str = ""
  dtype: str = ""
  shape: tuple[int, ...] | None = None
  error: float = math.nan
  bound: float = math.nan
  index: tuple[int, ...] | None = None
  reason: str = ""
  got: float = math.nan
  expected: float = math.nan

  def __str__(self) -> str:
    """What is wrong where, in one line; for a row that did not fail, its status."""
    return f"{said(self)} ({self.check})"


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """The rows of a verification. It is true if none failed and enough passed.

  Enough means, for each function, that every floating argument and output took part in a
  derivative that agreed with something other than the function's own rules; what did not is a row
  of the check "confirmed", and in the last line. Where no such check was asked for, any row that
  passed is enough.

  ``left_out`` are the checks that were not run.

  `str` gives it in 80 columns, failures first, `to_dict` as plain data; in a notebook it renders as
  a table.

  Example:
    >>> import jax.numpy as jnp
    >>> from softmax_jax.verify import check_derivatives
    >>> report = check_derivatives(jnp.sin, jnp.ones(3, jnp.float32), checks=["vjp", "jvp"])
    >>> print(report.raise_if_failed().summary())
    2 passed, 0 failed, 0 skipped
  """

  rows: tuple[Row, ...]
  left_out: tuple[str, ...] = ()

  def __post_init__(self):
    """Refuses anything but a tuple of rows."""
    if type(self.rows) is not tuple or {type(row) for row in self.rows} - {Row}:
      raise TypeError(f"Report expected a tuple of Row, got {type(self.rows).__name__}.")

  @property
  def failed(self) -> tuple[Row, ...]:
    """The rows that failed."""
    return tuple(row for row in self.rows if row.status == "failed")

  def __bool__(self) -> bool:
    """Whether no check failed and enough passed."""
    functions = dict.fromkeys(row.function for row in self.rows)
    return bool(functions) and not self.failed and all(map(self._enough, functions))

  def _enough(self, function: str) -> bool:
    rows = [row for row in self.rows if row.function == function]
    if any(row.check == UNCONFIRMED for row in rows):
      return False
    # At an edge point the name of the check comes last: "edge_points: 0: value".
    telling = [row for row in rows if tells(row.check.split(": ")[-1])]
    return any(row.status == "passed" for row in telling or rows)

  def __add__(self, other: object) -> Report:
    """The rows of both."""
    if not isinstance(other, Report):
      return NotImplemented
    left_out = tuple(dict.fromkeys(self.left_out + other.left_out))
    return Report(self.rows + other.rows, left_out)

  def raise_if_failed(self) -> Report:
    """Returns the report itself if it is true.

    Raises:
      DerivativeError: an `AssertionError` that says what is wrong where, a line for each failure;
        or all rows, if none failed but not every derivative was confirmed.
    """
    if self:
      return self
    if self.failed:
      raise DerivativeError(f"{self.failures()}\n{self.summary()}")
    raise DerivativeError(f"not every derivative was confirmed\n{self}")

  def failures(self) -> str:
    """What is wrong where, a line for each failure; checks that say the same share one."""
    return "\n".join(failures(self.rows))

  def __repr__(self) -> str:
    """The number of rows by status, and what is wrong where, as far as 200 characters tell it.

    Pytest shows as much of an expression that is asserted.
    """
    wrong = "; ".join(dict.fromkeys(said(row) for row in self.failed))
    text = f"{self.summary()}: {wrong}" if wrong else self.summary()
    return f"<Report: {text}>" if len(text) <= _SHORT else f"<Report: {text[: _SHORT - 3]}...>"

  def summary(self) -> str:
    """How many checks passed, failed and were skipped, and what was not confirmed, in one line."""
    count = {
      status: sum(row.status == status for row in self.rows if row.check != UNCONFIRMED)
      for status in ("passed", "failed", "skipped")
    }
    text = ", ".join(f"{number} {status}" for status, number in count.items())
    names = dict.fromkeys(row.of for row in self.rows if row.check == UNCONFIRMED)
    return f"{text}; not confirmed: {', '.join(names)}" if names else text

  def __str__(self) -> str:
    """The rows in 80 columns, failures first, then what was not looked at and the summary."""
    return "\n".join([self.table(), self.summary()])

  def table(self) -> str:
    """The rows in 80 columns, failures first, and what no check looked at."""
    left_out = ", ".join((*self.left_out, *_NEVER))
    return "\n".join([*lines(self.rows), *wrapped(f"Not looked at: {left_out}.")])

  def to_dict(self) -> dict[str, Any]:
    """The report as dicts, lists, strings and numbers; what does not exist is None."""
    rows: list[dict[str, Any]] = []
    for row in self.rows:
      plain = dataclasses.asdict(row)
      for name in ("shape", "index"):
        plain[name] = None if plain[name] is None else list(plain[name])
      for name in ("error", "bound", "got", "expected"):
        plain[name] = None if math.isnan(plain[name]) else plain[name]
      rows.append(plain)
    return {"passed": bool(self), "left_out": list(self.left_out), "rows": rows}

  def _repr_html_(self) -> str:
    color = {"passed": "inherit", "failed": "#c00", "skipped": "gray"}
    body = "".join(
      f'<tr style="color: {color[row.status]}">{_html("td", _cells(row))}</tr>'
      for row in sorted(self.rows, key=lambda row: row.status != "failed")
    )
    return (
      f"<table><thead><tr>{_html('th', _COLUMNS)}</tr></thead><tbody>{body}</tbody></table>"
      f"<p>{self.summary()}</p>"
    )


def _cells(row: Row) -> tuple[str, ...]:
  return (
    row.function,
    row.check,
    row.of,
    row.dtype,
    "" if row.shape is None else str(list(row.shape)),
    number(row.error),
    number(row.bound),
    "" if not row.index else str(list(row.index)),
    row.status if not row.reason else f"{row.status}: {row.reason}",
  )


def _html(tag: str, cells: Iterable[str]) -> str:
  return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
