"""The timed suites: their lines, the inputs of a line, and what is measured of it."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from softmax_jax.benchmark import oracle, programs, timing
from softmax_jax.benchmark.programs import (
  DIVERGENCE,
  ENTROPY,
  FORWARD,
  GRADIENT,
  INTEGER,
  LINEAR,
  LOSS,
  OF_TWO_ARRAYS,
  OURS,
  PULL,
  SOFT,
  VJP,
)

COPY = "copy"

_LINES = {
  "softmax": [
    (f, mode) for f in ("softmax", "log_softmax", "logsumexp") for mode in (FORWARD, VJP)
  ],
  "losses": [(f, mode) for f in (INTEGER, SOFT) for mode in (LOSS, GRADIENT)],
  "divergences": [(f, mode) for f in (ENTROPY, DIVERGENCE) for mode in (LOSS, GRADIENT)],
  "linear": [(LINEAR, LOSS), (LINEAR, GRADIENT)],
}
NAMES = tuple(_LINES)

# So many random numbers are drawn, and then repeated: drawing gigabytes takes minutes.
_RANDOM = 2**22
# Errors are taken on as many rows as have this many logits: the oracle is slow.
_ORACLE_LOGITS = 2**20
_ORACLE_TOKENS = 32


class Line(NamedTuple):
  """A function in a mode, on logits [*B, K] or, linear, of shape (T, H, V).

  scale: the standard deviation of the logits; of linear it is 1.
  """

  suite: str
  function: str
  mode: str
  shape: tuple[int, ...]
  scale: float = 1.0


def default_shapes(suite: str) -> list[tuple[int, ...]]:
  """The shapes of a suite for the device at hand.

  On a GPU the shapes of a CPU take less time than the start of a program.
  """
  on_cpu = jax.default_backend() == "cpu"
  if suite == "linear":
    return [(4096, 512, 32768) if on_cpu else (8192, 4096, 131072)]
  shapes: list[tuple[int, ...]] = [
    (65536, 10),
    (8192, 128),
    (2048, 1024),
    (512, 32768),
    (64, 131072),
  ]
  if suite == "losses":
    shapes.append((4, 128, 32768))  # sequences, as language models have them
  return shapes if on_cpu else [(16 * shape[0], *shape[1:]) for shape in shapes]


def lines(suite: str, shapes: Sequence[tuple[int, ...]], *, linear: bool = False) -> list[Line]:
  """The lines of a suite, function by function; shapes that are not its own are left out.

  With ``linear``, shapes of three numbers are those of the linear suite alone.
  """
  own = _own(suite, shapes, linear)
  return [Line(suite, function, mode, shape) for function, mode in _LINES[suite] for shape in own]


def timed_lines(
  suite: str, shapes: Sequence[tuple[int, ...]], scales: Sequence[float], *, linear: bool = False
) -> list[Line]:
  """The lines that are timed: also the VJP alone, and all at each of the scales."""
  if suite == "linear":
    return lines(suite, shapes)
  own = _own(suite, shapes, linear)
  return [
    Line(suite, function, timed, shape, scale)
    for function, mode in _LINES[suite]
    for timed in ((VJP, PULL) if mode == VJP else (mode,))
    for shape in own
    for scale in scales
  ]


def _own(suite: str, shapes: Sequence[tuple[int, ...]], linear: bool) -> Sequence[tuple[int, ...]]:
  """The shapes of a suite among those of all."""
  if suite == "linear":
    return [shape for shape in shapes if len(shape) == 3]
  return [shape for shape in shapes if len(shape) == 2] if linear else shapes


def arguments(line: Line, dtype: np.dtype, seed: int) -> list[np.ndarray]:
  """Random inputs."""
  rng = np.random.default_rng(seed)
  if line.suite == "linear":
    tokens, features, classes = line.shape
    x = rng.standard_normal((tokens, features), np.float32)
    weight = rng.standard_normal((features, classes), np.float32) * np.float32(features**-0.5)
    return [x.astype(dtype), weight.astype(dtype), rng.integers(0, classes, tokens, np.int32)]

  def draw(generate: Callable[..., np.ndarray], *shape: int) -> np.ndarray:
    return np.resize(generate(min(math.prod(shape), _RANDOM), np.float32), shape)

  *rows, classes = line.shape
  logits = (draw(rng.standard_normal, *line.shape) * np.float32(line.scale)).astype(dtype)
  if line.function == INTEGER:
    labels = rng.integers(0, classes, rows, np.int32)
    # Half of the labels are the class of the largest logit, as late in a training.
    likely = (np.arange(math.prod(rows)) // 4 % 2 == 0).reshape(rows)
    return [logits, np.where(likely, logits.argmax(axis=-1), labels).astype(np.int32)]
  if line.function == SOFT:
    labels = draw(rng.random, *line.shape)
    labels /= labels.sum(axis=-1, keepdims=True)
    return [logits, labels.astype(dtype)]
  if line.function == DIVERGENCE:  # half of the rows are close to the target
    close = logits + 0.01 * draw(rng.standard_normal, *line.shape)
    other = draw(rng.standard_normal, *line.shape)[::-1] * line.scale
    is_close = np.arange(math.prod(rows)).reshape(*rows, 1) % 2 == 0
    return [logits, np.where(is_close, close, other).astype(dtype)]
  if line.mode in (VJP, PULL):
    shape = rows if line.function == "logsumexp" else line.shape
    return [logits, draw(rng.standard_normal, *shape).astype(dtype)]
  return [logits]


def shapes_of_arguments(line: Line, dtype: np.dtype) -> list[jax.ShapeDtypeStruct]:
  """The shapes and dtypes of `arguments`, of which nothing is drawn."""
  if line.suite == "linear":
    tokens, features, classes = line.shape
    shapes = [(tokens, features), (features, classes)]
  elif line.function in OF_TWO_ARRAYS or (line.mode == VJP and line.function != "logsumexp"):
    shapes = [line.shape, line.shape]
  elif line.mode == VJP:
    shapes = [line.shape, line.shape[:-1]]
  else:
    shapes = [line.shape]
  of_labels = line.shape[:1] if line.suite == "linear" else line.shape[:-1]
  labels = [jax.ShapeDtypeStruct(of_labels, np.int32)]
  takes_labels = line.function in (INTEGER, LINEAR)
  return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes] + labels * takes_labels


def worst_errors(
  line: Line,
  inputs: Sequence[np.ndarray],
  contenders: dict[str, programs.Program],
  dtype: np.dtype,
) -> dict[str, float]:
  """By contender the worst error on some rows: in ulp of values, in u of gradients in norm."""
  if line.suite == "linear":
    return _linear_errors(line, inputs, contenders, dtype)
  rank = len(line.shape)
  # Rows along one axis; labels, and cotangents of what reduces, have one number for each.
  flat = [a.reshape(-1, *a.shape[rank - 1 :]) for a in inputs]
  rows = max(1, min(len(flat[0]), _ORACLE_LOGITS // line.shape[-1]))
  some = [array[:rows] for array in flat]
  some = [array if array.dtype == np.int32 else oracle.wide(array, dtype) for array in some]
  if line.mode in (VJP, PULL, GRADIENT):
    averaged = len(flat[0]) if line.mode == GRADIENT else 1
    expected = oracle.gradients(line.function, *some, rows_of_mean=averaged)
  else:
    expected = oracle.values(line.function, *some)
  worst: dict[str, float] = {}
  for name, program in contenders.items():
    # Only some rows leave the device: the others are gigabytes.
    output = jax.tree.leaves(program.call())[-1]
    (actual,) = program.fetch([output.reshape(-1, *output.shape[rank - 1 :])[:rows]])
    worst[name], _ = oracle.errors(actual, expected, dtype)
  return worst


def _linear_errors(
  line: Line,
  inputs: Sequence[np.ndarray],
  contenders: dict[str, programs.Program],
  dtype: np.dtype,
) -> dict[str, float]:
  """Of a few tokens, by programs of their own: the oracle would take long for all."""
  x, weight, labels = inputs
  some = [x[:_ORACLE_TOKENS], weight, labels[:_ORACLE_TOKENS]]
  expected = oracle.linear(oracle.wide(some[0], dtype), oracle.wide(some[1], dtype), some[2])
  expected = expected[1:] if line.mode == GRADIENT else expected[:1]
  worst: dict[str, float] = {}
  for name in contenders:
    if name == "products":
      continue
    program = programs.build(name, line.function, line.mode, some)
    actual = program.fetch(program.call())[-len(expected) :]
    found = [oracle.errors(*pair, dtype)[0] for pair in zip(actual, expected, strict=True)]
    worst[name] = max(found)
  return worst


def measure(
  line: Line,
  peers: Sequence[str],
  dtype: np.dtype,
  *,
  rounds: int,
  seconds: float,
  seed: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
  """One line of the report: times, ratios, bandwidth, temp bytes and errors, ready for JSON."""
  inputs = arguments(line, dtype, seed)
  contenders = {OURS: programs.build(OURS, line.function, line.mode, inputs)}
  unable: dict[str, str] = {}
  for peer in programs.peers_of(line.function):
    if peer in peers:
      try:
        program = programs.build(peer, line.function, line.mode, inputs)
        program.wait(program.call())
      except Exception as error:  # What a peer cannot do is part of the comparison.
        unable[peer] = (str(error) or type(error).__name__).splitlines()[0]
      else:
        contenders[peer] = program
  worst = worst_errors(line, inputs, contenders, dtype)

  timed = dict(contenders)
  if line.suite != "linear":  # which is bound by arithmetic
    timed[COPY] = programs.copy_program(inputs[0])
  queue = jax.default_backend() != "cpu"
  runs = {name: program.repeated(queue=queue) for name, program in timed.items()}
  times = timing.interleave(runs, rounds=rounds, seconds=seconds, seed=seed, clock=clock)

  outputs = jax.tree.leaves(contenders[OURS].call())
  moved = sum(array.nbytes for array in (*inputs, *outputs))
  return summarize(line, times, moved, inputs[0].nbytes) | {
    "temp_bytes": {name: program.temp_bytes for name, program in contenders.items()},
    "error_unit": "u" if line.mode in (VJP, PULL, GRADIENT) else "ulp",
    "errors": worst,
    "unable": unable,
  }


def summarize(
  line: Line, times: dict[str, np.ndarray], moved_bytes: int, logits_bytes: int
) -> dict[str, Any]:
  """What follows from the times per call of every contender, and of the copy where there is one.

  The bandwidth counts inputs and outputs once each, however often a program reads them.
  """
  medians = {name: float(np.median(values)) for name, values in times.items()}
  copy = medians.pop(COPY, None)
  result = {
    **line._asdict(),
    "shape": list(line.shape),
    "rounds": len(times[OURS]),
    "seconds": medians,
    "ratios": {
      name: timing.median_ratio(times[OURS], times[name]) for name in medians if name != OURS
    },
    "bytes_moved": moved_bytes,
    "bytes_per_second": None,
    "copy_bytes_per_second": None,
    "of_copy": None,
  }
  if copy is not None:
    rates = moved_bytes / medians[OURS], 2 * logits_bytes / copy
    result["bytes_per_second"], result["copy_bytes_per_second"] = rates
    result["of_copy"] = rates[0] / rates[1]
  return result


def total(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """By peer, over the lines of a suite: geometric means of the ratios and the worst of them."""
  summary: dict[str, Any] = {}
  for peer in programs.PEERS:
    ratios = {i: line["ratios"][peer] for i, line in enumerate(results) if peer in line["ratios"]}
    if ratios:
      worst = max(ratios, key=ratios.__getitem__)
      keys = ("function", "mode", "shape", "scale")
      by_scale: dict[float, list[float]] = {}
      for i, ratio in ratios.items():
        by_scale.setdefault(results[i]["scale"], []).append(ratio)
      summary[peer] = {
        "geometric_mean": statistics.geometric_mean(ratios.values()),
        "geometric_means": {
          f"{scale:g}": statistics.geometric_mean(some) for scale, some in by_scale.items()
        },
        "worst_ratio": ratios[worst],
        "worst_line": {key: results[worst][key] for key in keys},
      }
  return summary
