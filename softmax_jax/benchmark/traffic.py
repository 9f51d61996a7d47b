"""What programs cost on a device that is not there: bytes moved, kernels, memory, collectives.

These functions do little arithmetic, so that on a GPU or TPU their time is that of the bytes which
they move. The compiled program tells these exactly, and the same each time.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from softmax_jax._platform import ON_CHIP
from softmax_jax.benchmark import hlo, programs, suites, targets
from softmax_jax.benchmark.programs import (
  ENTROPY,
  GRADIENT,
  INTEGER,
  LINEAR,
  OF_TWO_ARRAYS,
  OURS,
  VJP,
)

SHAPES = ((8192, 128), (2048, 1024), (2048, 32768), (4096, 131072))
LINEAR_SHAPES = ((16384, 2048, 128256),)
PEERS = ("jax.nn", "optax", "tokamax")
# With several devices ours is mapped over the axis of the classes; this is ours without that.
PLAIN_JIT = "plain jit"

_AXIS = "classes"
# A kernel touches the logits if it moves this part of them; numbers per row are far less.
_TOUCHES = 1 / 8
# The most classes of which one kernel can keep whole rows on the chip: on a GPU where XLA makes one
# kernel of a softmax, on a TPU where eight rows of float32 take a quarter of 16 MiB of VMEM.
_ROW_ON_CHIP = {"gpu": ON_CHIP, "tpu": 2**17}


class Collective(NamedTuple):
  """An exchange among devices: its kind, how often it runs, and the bytes of one device."""

  kind: str
  runs: int
  bytes: int


class Traffic(NamedTuple):
  """What a program costs on one device.

  reads, writes: the bytes that its kernels read from main memory and write to it. kernels: how many
  of them touch an array as large as the largest argument. temp_bytes: what it allocates beside
  arguments and outputs. hidden: whether some kernels are not XLA's own; what these read more than
  once is not counted. cycles: what the compiler for TPUs expects, except of such a kernel.
  largest_argument: in bytes, on one device.
  """

  reads: int
  writes: int
  kernels: int
  temp_bytes: int
  cycles: int | None
  collectives: tuple[Collective, ...]
  hidden: bool
  largest_argument: int

  @property
  def exchanges(self) -> int:
    """How many collectives run."""
    return sum(each.runs for each in self.collectives)

  @property
  def exchanged_bytes(self) -> int:
    """The bytes of all collectives that run."""
    return sum(each.runs * each.bytes for each in self.collectives)


def traffic(target: str, f: Callable[..., Any], *shapes: Any) -> Traffic:
  """What `jit(f)` costs for arguments of these shapes, on a device that need not be there.

  Args:
    target: one of `targets.NAMES`.
    f: a function of arrays.
    *shapes: pytrees of `jax.ShapeDtypeStruct`; for several devices, with shardings over the
      `targets.mesh` of them.

  Raises:
    targets.MissingError: where what compiles for the target is not installed.
  """
  compiled = targets.compiled(target, f, *shapes)
  program = hlo.parse(cast(str, compiled.as_text()))
  kernels = hlo.kernels(program)
  largest = max(hlo.argument_bytes(program))
  hidden = any(kernel.hidden for kernel in kernels)
  estimated = target in targets.TPUS and not hidden
  return Traffic(
    reads=sum(kernel.runs * kernel.reads for kernel in kernels),
    writes=sum(kernel.runs * kernel.writes for kernel in kernels),
    kernels=sum(k.runs for k in kernels if k.reads + k.writes >= _TOUCHES * largest),
    temp_bytes=cast(Any, compiled.memory_analysis()).temp_size_in_bytes,
    cycles=sum(kernel.runs * kernel.cycles for kernel in kernels) if estimated else None,
    collectives=tuple(
      Collective(kind, kernel.runs, size) for kernel in kernels for kind, size in kernel.exchanged
    ),
    hidden=hidden,
    largest_argument=largest,
  )


def least(line: suites.Line, target: str) -> tuple[int, int] | None:
  """How many arrays of the logits' size any program must read and write; None if not known.

  Each input is read once and each output written once. A row's sums are needed before the first
  entry of an output of its size, so that rows which do not fit on the chip are read twice.
  """
  if line.suite == "linear":
    return None
  full_cotangent = line.mode == VJP and line.function != "logsumexp"
  inputs = 2 if full_cotangent or line.function in OF_TWO_ARRAYS else 1
  outputs = (line.function in ("softmax", "log_softmax")) + (line.mode in (VJP, GRADIENT))
  fits = line.shape[1] <= _ROW_ON_CHIP[targets.platform(target)]
  return inputs if fits or not outputs else 2 * inputs, outputs


# --- the programs of a line ----------------------------------------------------------------------


def _specs(line: suites.Line) -> tuple[list[PartitionSpec], PartitionSpec]:
  """How the arguments and the value of a line's function lie where the classes are spread out."""
  spread, same = PartitionSpec(None, _AXIS), PartitionSpec()
  if line.function == LINEAR:
    return [same, spread, same], same
  if line.function == INTEGER:
    return [spread, same], same
  if line.function in OF_TWO_ARRAYS:
    return [spread, spread], same
  return [spread], same if line.function in ("logsumexp", ENTROPY) else spread


def _spread_out(line: suites.Line, target: str, dtype: np.dtype, devices: int) -> list[Any]:
  """The shapes of the arguments with the classes spread out over devices."""
  specs, value = _specs(line)
  if line.mode == VJP:
    specs = [*specs, value]
  mesh = targets.mesh(target, devices, _AXIS)
  return [
    jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))
    for shape, spec in zip(suites.shapes_of_arguments(line, dtype), specs, strict=True)
  ]


def _mapped(f: Callable[..., Any], line: suites.Line, target: str, devices: int) -> Any:
  """A function of ours on the classes of each device."""
  specs, value = _specs(line)
  mesh = targets.mesh(target, devices, _AXIS)
  on_each: Callable[..., Any] = lambda *arguments: f(*arguments, axis_name=_AXIS)
  return jax.shard_map(on_each, mesh=mesh, in_specs=tuple(specs), out_specs=value)


@contextlib.contextmanager
def _quietly(peer: str, target: str) -> Generator[None]:
  """Without the warnings of a peer; tokamax makes its kernels for the target."""
  level = logging.getLogger("absl").level
  with contextlib.ExitStack() as stack:
    stack.enter_context(warnings.catch_warnings(action="ignore"))
    logging.getLogger("absl").setLevel(logging.ERROR)
    stack.callback(logging.getLogger("absl").setLevel, level)
    if peer == "tokamax" and target in targets.TPUS:
      stack.enter_context(importlib.import_module("tokamax").config.cross_compile(True))
      stack.enter_context(targets.tracing(target))
    yield


def contenders(line: suites.Line, peers: Sequence[str], devices: int) -> list[str]:
  """Ours and the peers of a line."""
  found = [peer for peer in programs.peers_of(line.function) if peer in peers]
  return [OURS, *([PLAIN_JIT] if devices > 1 else []), *found]


def measure(
  line: suites.Line, target: str, peers: Sequence[str], dtype: np.dtype, devices: int = 1
) -> dict[str, Any]:
  """One line of the report, ready for JSON: by contender what its program costs."""
  found: dict[str, Any] = {}
  unable: dict[str, str] = {}
  unit = 0
  for name in contenders(line, peers, devices):
    peer = OURS if name == PLAIN_JIT else name
    try:
      with _quietly(peer, target):
        f = programs.jax_functions(peer, targets.platform(target))[line.function]
        if name == OURS and devices > 1:
          f = _mapped(f, line, target, devices)
        shapes = suites.shapes_of_arguments(line, dtype)
        if devices > 1:
          shapes = _spread_out(line, target, dtype, devices)
        cost = traffic(target, programs.in_mode(f, line.function, line.mode), *shapes)
    except targets.MissingError:
      raise
    except Exception as error:  # What does not compile is part of the comparison.
      unable[name] = (str(error) or type(error).__name__).splitlines()[0]
      continue
    unit = cost.largest_argument
    found[name] = cost._asdict() | {"collectives": [each._asdict() for each in cost.collectives]}
  return {
    **line._asdict(),
    "shape": list(line.shape),
    "dtype": dtype.name,
    "logits_bytes": unit if line.suite != "linear" else None,
    "least": least(line, target) if devices == 1 else None,
    "costs": found,
    "unable": unable,
  }
