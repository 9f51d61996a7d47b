"""The accuracy suite: worst errors over class counts and scales, and where losses are hardest."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from softmax_jax._rows import Rows
from softmax_jax.benchmark import oracle, programs
from softmax_jax.benchmark.programs import (
  BY_TARGET,
  DIVERGENCE,
  ENTROPY,
  FORWARD,
  GRADIENT,
  INTEGER,
  LOSS,
  OURS,
  VJP,
)

CLASSES = (2, 10, 100, 1000, 32768, 128256)
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_CONFIDENT = (1e-6, 1e-10)
_NEAR = 1e-3
_MANY = 2**17  # So many classes that a float16 cannot sum their exponentials.


class _Inputs(NamedTuple):
  """Logits [B, K] with labels, target logits and cotangents, and the rows of each part."""

  logits: np.ndarray
  labels: np.ndarray
  targets: np.ndarray
  cotangents: np.ndarray
  rows: dict[str, slice]


def _inputs(classes: int, dtype: np.dtype, seed: int) -> _Inputs:
  """Rows of every scale, then rows whose label has probability 1 - 1e-6 and 1 - 1e-10.

  The targets are near every other row, and for those between the logits of the row before.
  """
  rng = np.random.default_rng((seed, classes))
  each = min(max(2**16 // classes, 2), 64)
  # A loss at the largest scale is beyond the largest float16.
  scales = SCALES[:-1] if dtype == np.float16 else SCALES
  random = np.concatenate([rng.normal(scale=scale, size=(each, classes)) for scale in scales])
  labels = rng.integers(0, classes, len(random))
  labels[::2] = random[::2].argmax(axis=-1)
  rows = {"all": slice(len(random)), "large": slice(SCALES.index(10.0) * each, len(random))}
  parts, label_parts = [random], [labels]
  start = len(random)
  for missing in _CONFIDENT:
    logits = rng.normal(size=(8, classes))
    label = rng.integers(0, classes, len(logits))
    others = np.exp(logits)
    others[np.arange(len(logits)), label] = 0
    logits[np.arange(len(logits)), label] = np.log(others.sum(axis=-1) * (1 - missing) / missing)
    parts.append(logits)
    label_parts.append(label)
    rows[f"confident {missing}"] = slice(start, start + len(logits))
    start += len(logits)
  cotangents = rng.normal(size=(start, classes))
  logits = np.concatenate(parts).astype(dtype)
  targets = np.roll(logits, 1, axis=0)
  targets[::2] = logits[::2].astype(np.float64) + rng.normal(scale=_NEAR, size=logits[::2].shape)
  rows |= {"near": slice(0, start, 2), "apart": slice(1, start, 2)}
  return _Inputs(
    logits,
    np.concatenate(label_parts).astype(np.int32),
    targets,
    cotangents.astype(dtype),
    rows,
  )


class _Row(NamedTuple):
  """A row of the table: `function` in `mode`, on the part `rows` of the inputs of every size."""

  title: str
  function: str
  mode: str
  rows: str
  at_label: bool = False  # Of a gradient only the entry at the label, by itself.
  short: bool | None = None  # Only short rows, or only others: on CPUs softmax tells them apart.


_ROWS = (
  _Row("loss, label at 1 - 1e-6", INTEGER, LOSS, "confident 1e-06"),
  _Row("loss, label at 1 - 1e-10", INTEGER, LOSS, "confident 1e-10"),
  _Row("gradient at that label", INTEGER, GRADIENT, "confident 1e-10", at_label=True),
  _Row("loss", INTEGER, LOSS, "all"),
  _Row("loss gradient, in norm", INTEGER, GRADIENT, "all"),
  _Row("softmax VJP, in norm, scale 10 up", "softmax", VJP, "large", short=False),
  _Row("softmax VJP, up to 16 classes", "softmax", VJP, "large", short=True),
  _Row("log_softmax", "log_softmax", FORWARD, "all"),
  _Row("softmax", "softmax", FORWARD, "all", short=False),
  _Row("softmax, up to 16 classes", "softmax", FORWARD, "all", short=True),
  _Row("logsumexp", "logsumexp", FORWARD, "all"),
  _Row("entropy", ENTROPY, LOSS, "all"),
  _Row("entropy, label at 1 - 1e-10", ENTROPY, LOSS, "confident 1e-10"),
  _Row("entropy gradient, in norm", ENTROPY, GRADIENT, "all"),
  _Row(f"KL divergence, logits {_NEAR:g} apart", DIVERGENCE, LOSS, "near"),
  _Row("KL divergence of other rows", DIVERGENCE, LOSS, "apart"),
  _Row(f"KL gradient, logits {_NEAR:g} apart, in norm", DIVERGENCE, GRADIENT, "near"),
  _Row("KL gradient of other rows, in norm", DIVERGENCE, GRADIENT, "apart"),
  _Row(f"KL gradient by the target, {_NEAR:g} apart, in norm", DIVERGENCE, BY_TARGET, "near"),
  _Row("KL gradient by the target of other rows, in norm", DIVERGENCE, BY_TARGET, "apart"),
)


def steps(dtype: np.dtype) -> list[tuple[str, int]]:
  """The steps of the suite, each a dtype and a number of classes; the last are in sixteen bits."""
  ordinary = [(np.dtype(dtype).name, classes) for classes in CLASSES]
  if np.dtype(dtype).itemsize == 2:
    return ordinary
  return [*ordinary, *(("bfloat16", classes) for classes in CLASSES), ("float16", _MANY)]


def _expected(row: _Row, inputs: _Inputs, dtype: np.dtype) -> oracle.Expected:
  part = inputs.rows[row.rows]
  z, labels = oracle.wide(inputs.logits[part], dtype), inputs.labels[part]
  second = [
    array[part] if array is inputs.labels else oracle.wide(array[part], dtype)
    for array in _second(row.function, row.mode, inputs)
  ]
  if row.mode == VJP:
    return oracle.gradients(row.function, z, *second)
  if row.mode == BY_TARGET:
    return oracle.gradients_by_target(z, *second, rows_of_mean=len(inputs.logits))
  if row.mode == GRADIENT:
    expected = oracle.gradients(row.function, z, *second, rows_of_mean=len(inputs.logits))
    if row.at_label:
      entries = expected.values[np.arange(len(labels)), labels]
      return oracle.Expected(entries, np.abs(entries), "ulp")
    return expected
  return oracle.values(row.function, z, *second)


def _second(function: str, mode: str, inputs: _Inputs) -> list[np.ndarray]:
  """What `function` takes in `mode` beside the logits."""
  if mode == VJP:
    return [inputs.cotangents]
  if function == DIVERGENCE:
    return [inputs.targets]
  return [] if mode == FORWARD or function == ENTROPY else [inputs.labels]


def _actual(row: _Row, inputs: _Inputs, output: np.ndarray) -> np.ndarray:
  part = inputs.rows[row.rows]
  output = output[part]
  if row.at_label:
    return output[np.arange(len(output)), inputs.labels[part]]
  return output


def _rows_at(step: np.dtype, dtype: np.dtype, classes: int) -> list[_Row]:
  """The rows that are measured at a step of the suite for `dtype`."""
  if step != dtype:
    return [_Row("loss, 2^17 classes" if classes == _MANY else "loss", INTEGER, LOSS, "all")]
  return [row for row in _ROWS if row.short in (None, Rows((0,)).are_short((classes,)))]


def _outputs(
  function: str, mode: str, inputs: _Inputs, peers: Sequence[str]
) -> dict[str, np.ndarray]:
  """What `function` returns in `mode`, by contender."""
  second = _second(function, mode, inputs)
  outputs: dict[str, np.ndarray] = {}
  for peer in (OURS, *(p for p in programs.peers_of(function) if p in peers)):
    program = programs.build(peer, function, mode, [inputs.logits, *second])
    outputs[peer] = program.fetch(program.call())[-1]
  return outputs


def measure(
  peers: Sequence[str],
  dtype: np.dtype,
  *,
  seed: int,
  only: Iterable[tuple[str, int]] | None = None,
  show: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
  """The rows of the accuracy table, ready for JSON; an infinite error stands for inf or NaN.

  Each row has by contender the worst error over all class counts, in ulp of single entries or in u
  of rows in norm, the error at each class count, and the worst relative error. Where `dtype` is
  wider than sixteen bits, there are rows for the loss of sixteen-bit logits too. `only` are the
  steps to take; None stands for all.
  """
  results: dict[tuple[str, str], dict[str, Any]] = {}
  for name, classes in steps(dtype) if only is None else only:
    show(f"{name}, {classes} classes")
    at = jnp.dtype(name)
    inputs = _inputs(classes, at, seed)
    rows = _rows_at(at, dtype, classes)
    for function, mode in dict.fromkeys((row.function, row.mode) for row in rows):
      outputs = _outputs(function, mode, inputs, peers)
      for row in rows:
        if (row.function, row.mode) == (function, mode):
          expected = _expected(row, inputs, at)
          empty = _without_errors(row, at, expected.unit)
          result = results.setdefault((row.title, at.name), empty)
          result["classes"].append(classes)
          for peer, output in outputs.items():
            _add(result, peer, *oracle.errors(_actual(row, inputs, output), expected, at))
  # Not every row occurs at the smallest class count, which comes first.
  order = [row.title for row in _ROWS]
  return sorted(
    results.values(),
    key=lambda result: (
      result["dtype"] != jnp.dtype(dtype).name,
      order.index(result["row"]) if result["row"] in order else len(order),
    ),
  )


def _without_errors(row: _Row, dtype: np.dtype, unit: str) -> dict[str, Any]:
  return {
    "row": row.title,
    "function": row.function,
    "mode": row.mode,
    "dtype": dtype.name,
    "unit": unit,
    "classes": [],
    "errors": {},
    "relative_errors": {},
    "errors_by_classes": {},
  }


def _add(result: dict[str, Any], peer: str, error: float, relative: float) -> None:
  """Adds the errors of a contender at one more class count."""
  for key, found in (("errors", error), ("relative_errors", relative)):
    result[key][peer] = max(result[key].get(peer, 0.0), found)
  result["errors_by_classes"].setdefault(peer, []).append(error)
