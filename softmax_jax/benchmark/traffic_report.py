"""How the report of a benchmark for a target is shown: tables for a terminal, Markdown."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from softmax_jax.benchmark import targets
from softmax_jax.benchmark.programs import OURS, PEERS
from softmax_jax.benchmark.report import (
  digits,
  label_of,
  markdown_table,
  sections_of,
  shape_text,
  show_table,
  terminal,
)
from softmax_jax.benchmark.traffic import PLAIN_JIT

_LEAST = "least"

_Line = dict[str, Any]


def machine(report: dict[str, Any]) -> str:
  """One line that says for what and with what the programs were compiled."""
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  count = report["devices"]
  devices = f"{count} devices with the classes spread out" if count > 1 else "one device"
  return f"{report['date'][:10]}, compiled for {devices} of {report['device']}; {versions}"


def _names(lines: Sequence[_Line]) -> list[str]:
  """The contenders that some line has."""
  names = (OURS, PLAIN_JIT, *PEERS)
  return [name for name in names if any(name in line["costs"] for line in lines)]


def _shown(name: str) -> str:
  return "ours" if name == OURS else name


# --- cells ---------------------------------------------------------------------------------------


def _plain(value: float) -> str:
  return f"{value:.1f}".removesuffix(".0")


def _arrays(name: str, line: _Line, step: float = 0.1) -> str:
  """Arrays of the logits' size that are read and written, to the next multiple of `step`."""
  if name == _LEAST:
    return "/".join(map(str, line["least"]))
  if name not in line["costs"]:
    return "-"
  moved = (line["costs"][name][key] / line["logits_bytes"] for key in ("reads", "writes"))
  return "/".join(_plain(step * round(value / step)) for value in moved)


def _halves(name: str, line: _Line) -> str:
  """The same in halves, which leaves out numbers per row, with the temporaries."""
  temp = line["costs"][name]["temp_bytes"] / line["logits_bytes"] if name in line["costs"] else 0
  halves = round(2 * temp) / 2
  return _arrays(name, line, step=0.5) + (f" (+{_plain(halves)})" if halves else "")


def _gigabytes(name: str, line: _Line) -> str:
  if name not in line["costs"]:
    return "-"
  cost = line["costs"][name]
  return ("≥" if cost["hidden"] else "") + digits((cost["reads"] + cost["writes"]) / 1e9)


def _number(key: str, unit: int, name: str, line: _Line) -> str:
  value = line["costs"].get(name, {}).get(key)
  return "-" if value is None else digits(value / unit) if unit > 1 else str(value)


def _bytes(size: int) -> str:
  for scale, unit in ((10**9, "GB"), (10**6, "MB")):
    if size >= scale:
      return f"{digits(size / scale)} {unit}"
  return f"{digits(size / 1000)} kB"


def _exchanges(name: str, line: _Line) -> str:
  """The number of collectives and their bytes."""
  if name not in line["costs"]:
    return "-"
  found = line["costs"][name]["collectives"]
  size = sum(each["runs"] * each["bytes"] for each in found)
  return f"{sum(each['runs'] for each in found)}: {_bytes(size)}"


_Measure = Callable[[str, _Line], str]
_ARRAYS: dict[str, _Measure] = {
  "arrays": _arrays,
  "kernels": functools.partial(_number, "kernels", 1),
}
_BYTES: dict[str, _Measure] = {"GB": _gigabytes}
_MEMORY: dict[str, _Measure] = {"temp MB": functools.partial(_number, "temp_bytes", 10**6)}
_CYCLES: dict[str, _Measure] = {"Mcycles": functools.partial(_number, "cycles", 10**6)}
_COLLECTIVES: dict[str, _Measure] = {"collectives": _exchanges}


def _tables(report: dict[str, Any], suite: str) -> dict[str, dict[str, _Measure]]:
  """By title the measures that make up a table."""
  rest = _MEMORY | (_CYCLES if report["platform"] in targets.TPUS else {})
  if suite == "linear":
    tables = {"what the compiled programs move and allocate": _BYTES | rest}
  else:
    tables = {
      "arrays read/written, by the logits' size, and kernels that touch them": _ARRAYS,
      " and ".join(rest): rest,
    }
  if report["devices"] > 1:
    tables["collectives and their bytes on one device"] = _COLLECTIVES
  return tables


# --- a terminal ----------------------------------------------------------------------------------


def print_tables(report: dict[str, Any]) -> None:
  """Prints every suite: what each contender moves, its kernels, memory, cycles and collectives."""
  console = terminal()
  say: Callable[[str], None] = lambda text: console.print(text, markup=False, soft_wrap=True)
  say(machine(report))
  for suite, result in report["suites"].items():
    lines = result["lines"]
    names = _names(lines)
    for about, measures in _tables(report, suite).items():
      columns, cells = ["", "shape", "dtype"], []
      for title, measure in measures.items():
        known = title == "arrays" and lines[0]["least"]
        for name in (*names, _LEAST) if known else names:
          columns.append(f"{title}\n{_shown(name)}")
          cells.append(functools.partial(measure, name))
      rows = (
        (
          label_of(line),
          shape_text(line["shape"]),
          line["dtype"],
          *(cell(line) for cell in cells),
        )
        for line in lines
      )
      console.print()
      show_table(console, f"{suite}: {about}", columns, rows, sections_of(lines), names=3)
    for line in lines:
      for name, reason in line["unable"].items():
        about = f"{label_of(line)} {shape_text(line['shape'])} {line['dtype']}"
        say(f"{_shown(name)} cannot do {about}: {reason}")


# --- Markdown ------------------------------------------------------------------------------------


def _cell(report: dict[str, Any], suite: str, names: Sequence[str], line: _Line) -> str:
  if report["devices"] > 1:
    return "; ".join(_exchanges(name, line) for name in names)
  if suite != "linear":
    return "; ".join(_halves(name, line) for name in (*names, _LEAST))
  measures = [measure for table in _tables(report, suite).values() for measure in table.values()]
  return "; ".join(" / ".join(measure(name, line) for measure in measures) for name in names)


def markdown(report: dict[str, Any], suite: str) -> str:
  """The table of one suite, a column per shape; dtypes share a row where their cells agree."""
  lines = report["suites"][suite]["lines"]
  names = _names(lines)
  shapes = list(dict.fromkeys(shape_text(line["shape"]) for line in lines))
  rows: dict[str, dict[str, list[str]]] = {}
  for line in lines:
    row = rows.setdefault(label_of(line), {}).setdefault(line["dtype"], ["-"] * len(shapes))
    row[shapes.index(shape_text(line["shape"]))] = _cell(report, suite, names, line)
  table: list[tuple[str, ...]] = []
  for label, by_dtype in rows.items():
    first, *others = by_dtype.values()
    if others and all(row == first for row in others):
      table.append((label, *first))
    else:
      table += [(f"{label}, {dtype}" if others else label, *row) for dtype, row in by_dtype.items()]
  whose = "; ".join(_shown(name) for name in names)
  if report["devices"] > 1:
    about = f"Collectives and their bytes: {whose}"
  elif suite == "linear":
    titles = (title for table in _tables(report, suite).values() for title in table)
    about = f"{' / '.join(titles)}: {whose}"
  else:
    about = f"Arrays of the logits' size read/written (+temporaries): {whose}; least possible"
  return f"{about}. {machine(report)}.\n\n{markdown_table(('', *shapes), table)}"
