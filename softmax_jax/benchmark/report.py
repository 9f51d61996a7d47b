"""How the report of a benchmark is shown: tables for a terminal, Markdown."""

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from softmax_jax.benchmark.programs import (
  DIVERGENCE,
  ENTROPY,
  GRADIENT,
  INTEGER,
  LINEAR,
  OURS,
  PEERS,
  PULL,
  SOFT,
  VJP,
)

if TYPE_CHECKING:
  from rich.console import Console

_SHORT = {
  INTEGER: "integer",
  SOFT: "soft",
  LINEAR: "linear",
  ENTROPY: "entropy",
  DIVERGENCE: "KL divergence",
}
_MODES = {VJP: " + vjp", PULL: ", vjp alone", GRADIENT: " + grad"}
# Where values are this far off, a number of ulp says less than the share that is wrong.
_WRONG = 0.05


def label_of(line: dict[str, Any]) -> str:
  """The short name of the function and mode of a line."""
  function: str = line["function"]
  return _SHORT.get(function, function) + _MODES.get(line["mode"], "")


def shape_text(shape: Iterable[int]) -> str:
  """A shape as the option --shapes has it."""
  return "x".join(map(str, shape))


def digits(value: float | None) -> str:
  """Three digits and no exponent; "-" for what is not known."""
  if value is None:
    return "-"
  if not math.isfinite(value):
    return "inf"
  if value == 0:
    return "0"
  places = max(0, 2 - math.floor(math.log10(abs(value))))
  return f"{value:.{min(places, 5)}f}"


def _error(value: float | None, relative: float | None = None) -> str:
  if value is None or math.isnan(value):
    return "-"
  if value == math.inf:
    return "inf or nan"
  if relative is not None and relative > 10:
    return "> 1000 % wrong"
  if relative is not None and relative >= _WRONG:
    return f"{100 * relative:.0f} % wrong"
  return f"{value:.1e}".replace("e+0", "e").replace("e+", "e") if value >= 1000 else f"{value:.2g}"


def _megabytes(value: int | None) -> str:
  return "-" if value is None else f"{value / 1e6:.{0 if value >= 1e8 else 2}f}"


def _peers(lines: Sequence[dict[str, Any]]) -> list[str]:
  return [peer for peer in PEERS if any(peer in line["seconds"] for line in lines)]


def machine(report: dict[str, Any]) -> str:
  """One line that says when, where and with what the numbers were taken."""
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  device = report["processor"] if report["platform"] == "cpu" else report["device"]
  cpus = f", {report['cpus']} CPUs" if report["platform"] == "cpu" else ""
  return f"{report['date'][:10]}, {device}{cpus}, {report['dtype']}; {versions}"


# --- a terminal ----------------------------------------------------------------------------------


_ANY_WIDTH = 10_000  # of any table


def terminal() -> "Console":
  """A console that is wide enough for tables."""
  from rich.console import Console

  console = Console(highlight=False)
  if not console.is_terminal:
    console.width = max(console.width, 120)  # In a pipe nothing says how much fits.
  return console


def show_table(
  console: "Console",
  title: str,
  columns: Iterable[str],
  rows: Iterable[Iterable[str]],
  sections: Sequence[int] = (),
  names: int = 2,
) -> None:
  """Prints a table with a line after the rows `sections`; the first columns are names."""
  from rich import box
  from rich.measure import Measurement
  from rich.table import Table

  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.show_edge = table.pad_edge = False
  texts = [*map(tuple, rows)]
  for i, column in enumerate(columns):
    name = i < names  # The other columns are numbers under words that may take two lines.
    words = " ".join((column, *(row[i] for row in texts))).split()
    longest = max(map(len, words), default=0)
    table.add_column(column, justify="left" if name else "right", no_wrap=name, min_width=longest)
  for i, row in enumerate(texts):
    table.add_row(*row, end_section=i in sections)
  # In a terminal too narrow for words and numbers lines run over: nothing is cut or broken.
  needed = Measurement.get(console, console.options.update_width(_ANY_WIDTH), table).minimum
  console.width = max(console.width, needed)
  console.print(table, crop=False)
  console.print()


def sections_of(lines: Sequence[dict[str, Any]]) -> list[int]:
  """The last rows of functions in a mode, unless each has one row only."""
  pairs = enumerate(itertools.pairwise(map(label_of, lines)))
  ends = [i for i, (label, after) in pairs if label != after]
  return ends if len(ends) < len(lines) - 1 else []


def print_tables(report: dict[str, Any]) -> None:
  """Prints every suite: its times and ratios, then bandwidth, memory and errors."""
  console = terminal()
  say: Callable[[str], None] = lambda text: console.print(text, markup=False, soft_wrap=True)

  say(machine(report))
  say(f"a call that computes nothing takes {_milliseconds(report['call_seconds'])} ms")
  load = report["load"]
  if load is not None and load > report["cpus"] / 2:
    say(f"this machine was busy, with a load of {load:.1f}: its times are worth little")
  for suite, result in report["suites"].items():
    console.print()
    if suite == "accuracy":
      show_table(
        console,
        "accuracy: worst error over class counts and scales, in the unit of the row",
        *_accuracy(result["lines"]),
      )
      continue
    lines = result["lines"]
    peers = _peers(lines)
    ends = sections_of(lines)
    scaled = len({line["scale"] for line in lines}) > 1
    place = "shape x scale" if scaled else "shape"
    columns = ("", place, "ours", *peers, *(f"ours /\n{peer}" for peer in peers))
    rows = (
      (
        label_of(line),
        _place(line, scaled),
        *(_milliseconds(line["seconds"].get(name)) for name in (OURS, *peers)),
        *(_ratio(line["ratios"].get(peer)) for peer in peers),
      )
      for line in lines
    )
    title = f"{suite}: milliseconds, median of interleaved rounds, and ratios"
    show_table(console, title, columns, rows, ends)
    for peer, summary in result["total"].items():
      worst = summary["worst_line"]
      say(
        f"ours / {peer}: geometric mean {_means(summary)}, at most "
        f"{summary['worst_ratio']:.2f} ({label_of(worst)}, {_place(worst, scaled)})"
      )
    console.print()
    measured = [peer for peer in peers if any(peer in line["errors"] for line in lines)]
    compiled = [p for p in peers if any(line["temp_bytes"].get(p) is not None for line in lines)]
    columns = ("", place, "GB/s", "of copy")
    columns += tuple(f"temp\n{name}" for name in ("ours", *compiled))
    columns += tuple(f"error\n{name}" for name in ("ours", *measured))
    rows = (
      (
        label_of(line),
        _place(line, scaled),
        digits(_scaled(line["bytes_per_second"], 1e-9)),
        "-" if line["of_copy"] is None else f"{line['of_copy']:.0%}",
        *(_megabytes(line["temp_bytes"].get(name)) for name in (OURS, *compiled)),
        *(_error(line["errors"].get(name)) for name in (OURS, *measured)),
      )
      for line in lines
    )
    title = "bandwidth of ours; compiled temp MB; worst error, ulp, of gradients u per row in norm"
    show_table(console, f"{suite}: {title}", columns, rows, ends)
    for line in lines:
      for peer, reason in line["unable"].items():
        say(f"{peer} cannot do {label_of(line)} {shape_text(line['shape'])}: {reason}")


def _place(line: dict[str, Any], scaled: bool) -> str:
  return shape_text(line["shape"]) + (f" x {line['scale']:g}" if scaled else "")


def _means(summary: dict[str, Any]) -> str:
  """The geometric mean of the ratios, and of those at each scale where there are several."""
  by_scale: dict[str, float] = summary["geometric_means"]
  each = ", ".join(f"{mean:.2f} at scale {scale}" for scale, mean in by_scale.items())
  return f"{summary['geometric_mean']:.2f}" + (f" ({each})" if len(by_scale) > 1 else "")


def _scaled(value: float | None, factor: float) -> float | None:
  return None if value is None else value * factor


def _milliseconds(seconds: float | None) -> str:
  return digits(_scaled(seconds, 1e3))


def _accuracy(
  rows: Sequence[dict[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Columns and cells of the accuracy table; jax.nn and optax, which never meet, share a column."""
  groups = [("jax.nn", "optax"), ("distrax",), ("torch",), ("torch.compile",), (OURS,)]
  groups = [g for g in groups if any(name in row["errors"] for row in rows for name in g)]

  def cell(row: dict[str, Any], group: tuple[str, ...]) -> str:
    for name in group:
      if name in row["errors"]:
        relative = row["relative_errors"][name] if row["unit"] == "ulp" else None
        return _error(row["errors"][name], relative)
    return "-"

  keys = ("dtype", "unit")
  columns = ("", *keys, *(" / ".join(group) for group in groups))
  return columns, [
    (row["row"], *(row[key] for key in keys), *(cell(row, group) for group in groups))
    for row in rows
  ]


# --- Markdown ------------------------------------------------------------------------------------


def markdown(report: dict[str, Any], suite: str) -> str:
  """The table of one suite with a line above it that says where and when it was taken.

  Timed suites have a row per function and mode, a column per shape, and in a cell the milliseconds
  of ours and the ratio to each peer, at each scale of the logits.
  """
  result = report["suites"][suite]
  lines = result["lines"]
  if suite == "accuracy":
    columns, rows = _accuracy(lines)
    about = "Worst error over 2 to 128,256 classes and scales 0.01 to 10,000"
  else:
    peers = _peers(lines)
    shapes = list(dict.fromkeys(shape_text(line["shape"]) for line in lines))
    scales = list(dict.fromkeys(line["scale"] for line in lines))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
      cells.setdefault((label_of(line), shape_text(line["shape"])), []).append(line)

    def cell(label: str, shape: str) -> str:
      of_scales = cells.get((label, shape))
      if of_scales is None:
        return "-"
      ratio = lambda peer: ", ".join(_ratio(line["ratios"].get(peer)) for line in of_scales)
      ratios = " / ".join(map(ratio, peers))
      times = ", ".join(_milliseconds(line["seconds"][OURS]) for line in of_scales)
      return f"{times} ms" + (f"; {ratios}" if ratios else "")

    columns = ("", *shapes)
    rows = [
      (label, *(cell(label, shape) for shape in shapes))
      for label in dict.fromkeys(label_of(line) for line in lines)
    ]
    means = "; ".join(
      f"{peer} {_means(summary)}, at most {summary['worst_ratio']:.2f}"
      for peer, summary in result["total"].items()
    )
    about = "Milliseconds of ours" + (f"; ratios of ours to {' / '.join(peers)}" if peers else "")
    if len(scales) > 1:
      about += f", each at the scales {', '.join(f'{scale:g}' for scale in scales)}"
    about += f". Geometric means of the ratios: {means}" if means else ""
  return f"{about}. {machine(report)}.\n\n{markdown_table(columns, rows)}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table whose first column has no name."""
  table = [columns, tuple("---" for _ in columns), *rows]
  return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in table)


def _ratio(value: float | None) -> str:
  return "-" if value is None else f"{value:.2f}"


def _marked(report: dict[str, Any], suite: str) -> tuple[str, re.Pattern[str]]:
  begin = f"<!-- benchmark: {suite}, {report['platform']} -->"
  return begin, re.compile(f"{re.escape(begin)}.*?<!-- end -->", re.DOTALL)


def missing_marker(report: dict[str, Any], suites: Iterable[str], text: str) -> str | None:
  """The first marker that `text` should have for one of the suites and does not have."""
  for suite in suites:
    begin, pattern = _marked(report, suite)
    if not pattern.search(text):
      return begin
  return None


def update(
  report: dict[str, Any],
  path: pathlib.Path,
  markdown: Callable[[dict[str, Any], str], str] = markdown,
) -> None:
  """Replaces in a Markdown file what stands between the markers of each suite of the report."""
  text = path.read_text(encoding="utf-8")
  for suite in report["suites"]:
    begin, pattern = _marked(report, suite)
    new = f"{begin}\n{markdown(report, suite)}\n<!-- end -->"
    text = pattern.sub(lambda _, new=new: new, text)
  path.write_text(text, encoding="utf-8")
