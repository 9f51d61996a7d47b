"""Compare time, memory and accuracy with jax.nn, optax, torch and tokamax on this machine.

Suites, of which the first two run by default:

  softmax   softmax, log_softmax and logsumexp, forward and with the VJP, beside jax.nn and torch;
  losses    cross-entropy with integer and with soft labels, the loss of every row, and the mean
            loss with its gradient, beside optax and torch;
  linear    linear_softmax_cross_entropy, the loss, and the loss with both gradients, beside optax
            on x @ weight, torch, tokamax and the bare matrix products, which are the limit;
  accuracy  the worst errors against float64 over 2 to 128,256 classes and logit scales of 0.01 to
            10,000, and of the losses where the label has probability 1 - 1e-6 and 1 - 1e-10.

Every program is compiled and warmed up; then each round times every one of them once in a random
order, and a ratio is the median over the rounds of the ratio within a round. On a CPU every call is
waited for; an accelerator is given calls for 5 ms and is waited for once. Its bandwidth counts
inputs and outputs once, beside that of a program that copies the logits. The temp bytes are what
XLA allocates beside arguments and outputs. Errors are counted in ulp of single values, of gradients
in u, half the distance from 1 to the next number, of rows in norm; all of the dtype of the logits,
also where a loss of sixteen-bit logits is a float32 number.

On a CPU, normalizers of more than 16 classes take a second pass over the logits, to keep their
digits, where one class holds more than half of the probability of some row. Standard normal logits
of many classes have no such row; those late in a training do, as `--scale 10` shows.

A peer that is not installed is left out. Times of a busy machine are worth little.

Exit code: 0, or 2 for a bad option or a missing package.
"""

import argparse
import contextlib
import datetime
import importlib
import itertools
import math
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax._command_line import (
  devices,
  out_of_memory,
  print_json,
  progress_bar,
  whole_number,
)
from softmax_jax.benchmark import accuracy, programs, report, suites, timing

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_SUITES = (*suites.NAMES, "accuracy")
# What the timed suites take where the command line does not say.
_TIMED = {"shapes": None, "rounds": 50, "seconds": 5.0, "scale": 1.0}


# --- the command line ----------------------------------------------------------------------------


def _shape(text: str) -> tuple[int, ...]:
  with contextlib.suppress(ValueError):
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) in (2, 3) and min(shape) >= 1 and math.prod(shape) < 2**48:
      return shape
  raise argparse.ArgumentTypeError(
    f"expected ROWSxCLASSES or, for the linear suite, TOKENSxFEATURESxCLASSES, got {text!r}"
  )


def _not_negative(text: str) -> float:
  with contextlib.suppress(ValueError):
    if 0 <= float(text) <= 86400:
      return float(text)
  raise argparse.ArgumentTypeError(f"expected a number from 0 to 86400, got {text!r}")


def _text_file(text: str) -> pathlib.Path:
  path = pathlib.Path(text)
  try:
    path.open("r+b").close()
    if not path.is_file():
      raise argparse.ArgumentTypeError(f"cannot update {text!r}: Not a file")
    path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    why = error.strerror if isinstance(error, OSError) else "Not text in UTF-8"
    raise argparse.ArgumentTypeError(f"cannot update {text!r}: {why}") from None
  return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of `softmax-jax benchmark`."""
  add = parser.add_argument
  add(
    "--suite",
    nargs="+",
    choices=_SUITES,
    default=["softmax", "losses"],
    metavar="NAME",
    help=f"what to run, of {', '.join(_SUITES)} (default: softmax losses)",
  )
  add(
    "--shapes",
    nargs="+",
    type=_shape,
    metavar="BxK",
    help="rows and classes, as 512x32768; for linear TxHxV (default on a CPU: five up to "
    "64x131072, linear 4096x512x32768; elsewhere 16 times the rows, linear 8192x4096x131072)",
  )
  add("--dtype", choices=_DTYPES, default="float32", help="of the inputs (default: float32)")
  add(
    "--peers",
    nargs="*",
    choices=programs.PEERS,
    metavar="NAME",
    help=f"beside whom, of {', '.join(programs.PEERS)} (default: all that are installed but "
    "torch.compile)",
  )
  add(
    "--rounds",
    type=whole_number(1, 100_000),
    metavar="N",
    help=f"rounds of a line at most (default: {_TIMED['rounds']})",
  )
  add(
    "--seconds",
    type=_not_negative,
    metavar="X",
    help=f"for the rounds of a line, beyond the first three (default: {_TIMED['seconds']:g})",
  )
  add(
    "--scale",
    type=_not_negative,
    metavar="X",
    help="standard deviation of the logits; at 10, one class dominates many rows (default: "
    f"{_TIMED['scale']:g})",
  )
  add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="(default: 0)")
  shown = parser.add_mutually_exclusive_group()
  shown.add_argument("--json", action="store_true", help="print one JSON object, not tables")
  shown.add_argument("--markdown", action="store_true", help="print Markdown tables")
  add(
    "--update",
    type=_text_file,
    metavar="FILE.md",
    help="replace in this file what stands between <!-- benchmark: SUITE, PLATFORM --> and "
    "<!-- end -->, where PLATFORM is cpu, gpu or tpu",
  )


def run(args: argparse.Namespace) -> int:
  """Measures and reports."""
  importlib.import_module("rich")  # Better to hear of a missing one before the work than after it.
  for name, default in _TIMED.items():
    if getattr(args, name) is None:
      setattr(args, name, default)
    elif set(args.suite) == {"accuracy"}:
      raise argparse.ArgumentError(None, f"argument --{name}: the accuracy suite has its own")
  # JAX would take most of a GPU's memory for itself, where another library wants some.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  devices()
  with jax.enable_x64(args.dtype == "float64"):
    result = _measure(args, _peers(args.peers))

  if args.update:
    report.update(result, args.update)
  if args.json:
    print_json(result)
  elif args.markdown:
    print("\n\n".join(report.markdown(result, suite) for suite in result["suites"]))
  else:
    report.print_tables(result)
  return 0


def _peers(wanted: list[str] | None) -> list[str]:
  """The peers to compare with; those that were named must be there."""
  found = [
    peer
    for peer in (programs.PEERS if wanted is None else wanted)
    if programs.version(peer) is not None
    and (not peer.startswith("torch") or programs.torch_reaches_the_device())
  ]
  if wanted is None:
    return [peer for peer in found if peer != "torch.compile"]
  for peer in wanted:
    if peer not in found:
      raise argparse.ArgumentError(
        None, f"argument --peers: {peer} is not installed, or not for the device that JAX uses"
      )
  return [peer for peer in programs.PEERS if peer in found]


def _lines(args: argparse.Namespace) -> dict[str, list[suites.Line]]:
  lines: dict[str, list[suites.Line]] = {}
  for suite in dict.fromkeys(args.suite):
    if suite == "accuracy":
      continue
    lines[suite] = suites.lines(suite, args.shapes or suites.default_shapes(suite))
    if not lines[suite]:
      wanted = "TOKENSxFEATURESxCLASSES" if suite == "linear" else "ROWSxCLASSES"
      raise argparse.ArgumentError(None, f"argument --shapes: the {suite} suite needs one {wanted}")
  return lines


def _measure(args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
  lines = _lines(args)
  dtype = jnp.dtype(args.dtype)
  result = _about(args, peers)
  if args.update:
    text = args.update.read_text(encoding="utf-8")
    marker = report.missing_marker(result, dict.fromkeys(args.suite), text)
    if marker:
      raise argparse.ArgumentError(
        None, f"argument --update: {args.update} has no {marker} followed by <!-- end -->"
      )

  count = sum(map(len, lines.values()))
  count += len(accuracy.steps(dtype)) if "accuracy" in args.suite else 0
  begun = itertools.count()
  with progress_bar(count) as bar:
    show: Callable[[str], None] = lambda description: bar(next(begun), description)
    for suite in dict.fromkeys(args.suite):
      if suite == "accuracy":
        rows = accuracy.measure(peers, dtype, seed=args.seed, show=show)
        result["suites"][suite] = {"lines": rows}
        continue
      measured: list[dict[str, Any]] = []
      for line in lines[suite]:
        show(f"{line.function}, {line.mode}, {'x'.join(map(str, line.shape))}")
        limits = {name: getattr(args, name) for name in ("rounds", "seconds", "seed", "scale")}
        try:
          measured.append(suites.measure(line, peers, dtype, **limits))
        except (MemoryError, RuntimeError) as error:  # JAX's own is a RuntimeError.
          if out_of_memory(error):
            shape = "x".join(map(str, line.shape))
            raise argparse.ArgumentError(
              None, f"argument --shapes: {shape} does not fit into memory"
            ) from error
          raise
      result["suites"][suite] = {"lines": measured, "total": suites.total(measured)}
  return result


def _about(args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
  """When, where and with what; the suites come in later."""
  device = devices()[0]
  names = {peer.partition(".")[0] for peer in peers} - {"products"}
  versions = {"softmax_jax": programs.version(programs.OURS), "jax": jax.__version__}
  versions |= {name: programs.version(name) for name in sorted(names - {"jax"})}
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "platform": device.platform,
    "device": device.device_kind,
    "processor": _processor(),
    "cpus": programs.threads(),
    "python": platform.python_version(),
    "versions": versions,
    "peers": peers,
    "dtype": args.dtype,
    "rounds": args.rounds,
    "seconds": args.seconds,
    "seed": args.seed,
    "scale": args.scale,
    # Of the last minute, before any work is done here.
    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "call_seconds": _call_seconds(),
    "suites": {},
  }


def _call_seconds() -> float:
  """What a call costs that computes next to nothing; times near it say nothing about a function."""
  program = programs.copy_program(np.zeros(8, np.float32))
  run = program.repeated(queue=jax.default_backend() != "cpu")
  times = timing.interleave({"call": run}, rounds=5, seconds=0.1)
  return float(np.median(times["call"]))


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
      name, _, value = line.partition(":")
      if name.strip() == "model name":
        return value.strip()
  return platform.processor() or platform.machine()
