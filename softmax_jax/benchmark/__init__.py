"""The command `softmax-jax benchmark`."""

import contextlib
import datetime
import importlib
import itertools
import math
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax._command_line import (
  Command,
  Number,
  devices,
  given,
  out_of_memory,
  print_json,
  progress_bar,
  seed_option,
)
from softmax_jax.benchmark import (
  accuracy,
  programs,
  report,
  suites,
  targets,
  timing,
  traffic,
  traffic_report,
)

HELP = """\
Compare time, memory and accuracy with jax.nn, optax, distrax, torch and tokamax on this machine.

Suites, of which the first two run by default:

  softmax   softmax, log_softmax and logsumexp, forward, with the VJP and the VJP alone, beside
            jax.nn and torch (which save the softmax for log_softmax's VJP, we the output alone);
  losses    cross-entropy with integer and with soft labels, the loss of every row, and the mean
            loss with its gradient, beside optax and torch;
  divergences
            softmax_entropy and softmax_kl_divergence of every row, and the mean with its gradient
            by the logits, beside jax.nn, optax, distrax and torch; half of the rows are near the
            target;
  linear    linear_softmax_cross_entropy, the loss, and the loss with both gradients, beside optax
            on x @ weight, torch, tokamax and the bare matrix products, which are the limit;
  accuracy  the worst errors against float64 over 2 to 128,256 classes and logit scales of 0.01 to
            10,000, of the losses where the label has probability 1 - 1e-6 and 1 - 1e-10, and of
            divergences where both logits are 1e-3 apart.

Every program is compiled and warmed up; then each round times every one of them once in a random
order, and a ratio is the median over the rounds of the ratio within a round. On a CPU every call is
waited for; an accelerator is given calls for 5 ms and is waited for once. The bandwidth counts
inputs and outputs once, and is compared with that of a program that copies the logits. The temp
bytes are what XLA allocates beside arguments and outputs. Errors of values are counted in ulp, each
by itself; those of gradients in u, half the distance from 1 to the next number, row by row in norm.
Both units are those of the dtype of the logits, even where the loss is a float32 number.

On a CPU, normalizers of more than 16 classes take a second pass over the logits, to keep their
digits, where one class holds more than half of the probability of some row. Standard normal logits
of many classes have no such row; those late in a training do, as `--scale 1 3 10` shows.

A peer that is not installed is left out. Times of a busy machine are worth little.

With `--target NAME` nothing is run. The programs are compiled for a GPU or TPU that need not be
there, and the tables tell what they cost on it, exactly and the same each time: arrays read from
main memory and written to it, in units of the logits (caches of a GPU are left out); the kernels
that touch arrays of that size; temp bytes; on TPUs, the cycles that the compiler expects. The least
possible reads every input once, or twice where a row does not fit on the chip and an output has
its size, and writes every output once. `--devices 8` spreads the classes out over devices, and
tells what these exchange; "plain jit" is ours without `shard_map` and `axis_name`. Of kernels that
are not XLA's, as tokamax has them, "≥" shows what is read at least. GPUs need the packages
jax-cuda13-plugin and jax-cuda13-pjrt, TPUs jax[tpu].

Exit code: 0, or 2 for a bad option or a missing package.
"""
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_SUITES = (*suites.NAMES, "accuracy")
_NO_PEER = "none"
_AT_LEAST_0 = Number(0, 86400)


def _shape(text: str) -> tuple[int, ...]:
  with contextlib.suppress(ValueError):
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) in (2, 3) and min(shape) >= 1 and math.prod(shape) < 2**48:
      return shape
  raise click.BadParameter(
    "expected ROWSxCLASSES, SEQUENCESxROWSxCLASSES or, for the linear suite, "
    f"TOKENSxFEATURESxCLASSES, got {text!r}"
  )


@click.command("benchmark", cls=Command, help=HELP)
@click.option(
  "--suite",
  type=click.Choice(_SUITES),
  multiple=True,
  default=["softmax", "losses"],
  metavar="NAME...",
  help=f"Suites to run: {', '.join(_SUITES)}.",
)
@click.option(
  "--shapes",
  type=_shape,
  multiple=True,
  metavar="BxK...",
  help="Rows and classes, as 512x32768 or 4x128x32768; of three numbers, that of the linear suite "
  "TxHxV where it runs (default on a CPU: five up to 64x131072, losses also 4x128x32768, "
  "linear 4096x512x32768; elsewhere 16 times the rows, linear 8192x4096x131072; with --target "
  f"{', '.join(map(report.shape_text, traffic.SHAPES))}, linear "
  f"{', '.join(map(report.shape_text, traffic.LINEAR_SHAPES))}).",
)
@click.option(
  "--dtype",
  type=click.Choice(_DTYPES),
  help="Dtype of the inputs (default: float32; with --target, also bfloat16).",
)
@click.option(
  "--peers",
  type=click.Choice((*programs.PEERS, _NO_PEER)),
  multiple=True,
  metavar="NAME...",
  help=f"Peers: {', '.join(programs.PEERS)}, or none (default: all that are installed but "
  "torch.compile).",
)
@click.option(
  "--target",
  type=click.Choice(targets.NAMES),
  metavar="NAME",
  help=f"Compile for a device that is not there: {', '.join(targets.NAMES)}.",
)
@click.option(
  "--devices",
  type=click.IntRange(1, targets.DEVICES),
  default=1,
  metavar="N",
  help="With --target: spread the classes out over so many devices.",
)
@click.option(
  "--rounds",
  type=click.IntRange(1, 100_000),
  default=50,
  metavar="N",
  help="The most rounds of a line.",
)
@click.option(
  "--seconds",
  type=_AT_LEAST_0,
  default=5.0,
  metavar="X",
  help="Time for the rounds of a line, beyond the first three.",
)
@click.option(
  "--scale",
  type=_AT_LEAST_0,
  multiple=True,
  default=[1.0],
  metavar="X...",
  help="Standard deviations of the logits; at 10, one class dominates many rows.",
)
@seed_option("Decides the inputs, and the order in a round.")
@click.option("--json", is_flag=True, help="Print one JSON object, not tables.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@click.option(
  "--update",
  type=click.Path(exists=True, dir_okay=False, writable=True, path_type=pathlib.Path),
  metavar="FILE.md",
  help="Replace in this file what stands between <!-- benchmark: SUITE, PLATFORM --> and "
  "<!-- end -->, where PLATFORM is cpu, gpu, tpu or the target.",
)
def command(**options: Any) -> int:
  """Runs `softmax-jax benchmark`."""
  return run(SimpleNamespace(**options))


def run(args: SimpleNamespace) -> int:
  """Measures and reports."""
  importlib.import_module("rich")  # A missing one should show before the work, not after it.
  if args.json and args.markdown:
    raise click.UsageError("--markdown is not allowed with --json")
  if args.target:
    result, tables = _measure_traffic(args), traffic_report
  else:
    result, tables = _measure_times(args), report

  if args.update:
    report.update(result, args.update, tables.markdown)
  if args.json:
    print_json(result)
  elif args.markdown:
    print("\n\n".join(tables.markdown(result, suite) for suite in result["suites"]))
  else:
    tables.print_tables(result)
  return 0


def _measure_times(args: SimpleNamespace) -> dict[str, Any]:
  for name in ("shapes", "rounds", "seconds", "scale"):
    if set(args.suite) == {"accuracy"} and given(name):
      raise click.UsageError(f"--{name}: the accuracy suite has its own")
  if given("devices"):
    raise click.UsageError("--devices is for --target")
  args.dtype = args.dtype or "float32"
  # JAX would take most of a GPU's memory for itself, but other libraries need some.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  devices()
  with jax.enable_x64(args.dtype == "float64"):
    return _measure(args, _peers(args.peers))


def _measure_traffic(args: SimpleNamespace) -> dict[str, Any]:
  """What the programs cost on a target, of which none is needed."""
  for name in ("rounds", "seconds", "scale", "seed"):
    if given(name):
      raise click.UsageError(f"--{name}: with --target nothing is run")
  if "accuracy" in args.suite:
    raise click.UsageError("--suite accuracy: with --target nothing is run")
  default = lambda suite: traffic.LINEAR_SHAPES if suite == "linear" else traffic.SHAPES
  lines = _lines(args, default)
  peers = _target_peers(args.peers, lines)
  dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
  with targets.on_no_device(), jax.enable_x64(args.dtype == "float64"):
    try:
      result = _about_target(args, peers, dtypes)
    except targets.MissingError as error:
      raise click.BadParameter(str(error), param_hint="--target") from error
    _check_markers(args, result)
    begun = itertools.count()
    with progress_bar(len(dtypes) * sum(map(len, lines.values()))) as bar:
      for suite in lines:
        measured: list[dict[str, Any]] = []
        for line, dtype in itertools.product(lines[suite], dtypes):
          shape = report.shape_text(line.shape)
          bar(next(begun), f"{line.function}, {line.mode}, {shape}, {dtype}")
          found = traffic.measure(line, args.target, peers, jnp.dtype(dtype), args.devices)
          measured.append(found)
        result["suites"][suite] = {"lines": measured}
  return result


def _target_peers(wanted: Sequence[str], lines: dict[str, list[suites.Line]]) -> list[str]:
  """The peers that are compiled for a target and have a function of these lines."""
  for peer in wanted:
    if peer not in (*traffic.PEERS, _NO_PEER):
      only = ", ".join(traffic.PEERS)
      raise click.BadParameter(f"with --target these are {only}", param_hint="--peers")
    if peer != _NO_PEER and programs.version(peer) is None:
      raise click.BadParameter(f"{peer} is not installed", param_hint="--peers")
  used = {
    peer for each in lines.values() for line in each for peer in programs.peers_of(line.function)
  }
  among = used.intersection(wanted or traffic.PEERS)
  return [peer for peer in traffic.PEERS if peer in among and programs.version(peer) is not None]


def _about_target(
  args: SimpleNamespace, peers: Sequence[str], dtypes: Sequence[str]
) -> dict[str, Any]:
  """For what and with what the programs are compiled; the suites are added later."""
  versions = {"softmax_jax": programs.version(programs.OURS), "jax": jax.__version__}
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "platform": args.target,
    "device": targets.devices(args.target)[0].device_kind,
    "devices": args.devices,
    "python": platform.python_version(),
    "versions": versions
    | {peer: programs.version(peer) for peer in peers if peer != "jax.nn"}
    | targets.compiler(args.target),
    "peers": list(peers),
    "dtypes": list(dtypes),
    "suites": {},
  }


def _peers(wanted: Sequence[str]) -> list[str]:
  """The peers to compare with; those that were named must be installed."""
  found = [
    peer
    for peer in wanted or programs.PEERS
    if programs.version(peer) is not None
    and (not peer.startswith("torch") or programs.torch_reaches_the_device())
  ]
  if not wanted:
    return [peer for peer in found if peer != "torch.compile"]
  for peer in wanted:
    if peer not in (*found, _NO_PEER):
      raise click.BadParameter(
        f"{peer} is not installed, or not for the device that JAX uses", param_hint="--peers"
      )
  return [peer for peer in programs.PEERS if peer in found]


def _lines(
  args: SimpleNamespace, default: Callable[[str], Sequence[tuple[int, ...]]]
) -> dict[str, list[suites.Line]]:
  lines: dict[str, list[suites.Line]] = {}
  for suite in dict.fromkeys(args.suite):
    if suite == "accuracy":
      continue
    shapes = args.shapes or default(suite)
    linear = bool(args.shapes) and "linear" in args.suite
    if args.target:
      lines[suite] = suites.lines(suite, shapes, linear=linear)
    else:
      lines[suite] = suites.timed_lines(suite, shapes, args.scale, linear=linear)
    if not lines[suite]:
      wanted = "TOKENSxFEATURESxCLASSES" if suite == "linear" else "ROWSxCLASSES"
      raise click.BadParameter(f"the {suite} suite needs one {wanted}", param_hint="--shapes")
  return lines


def _measure(args: SimpleNamespace, peers: list[str]) -> dict[str, Any]:
  lines = _lines(args, suites.default_shapes)
  dtype = jnp.dtype(args.dtype)
  result = about(args, peers)
  _check_markers(args, result)
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
        shape = "x".join(map(str, line.shape))
        show(f"{line.function}, {line.mode}, {shape}")
        limits = {name: getattr(args, name) for name in ("rounds", "seconds", "seed")}
        try:
          measured.append(suites.measure(line, peers, dtype, **limits))
        except (MemoryError, RuntimeError) as error:  # JAX's own is a RuntimeError.
          if out_of_memory(error):
            raise click.UsageError(f"--shapes: {shape} does not fit into memory") from error
          raise
      result["suites"][suite] = {"lines": measured, "total": suites.total(measured)}
  return result


def _check_markers(args: SimpleNamespace, result: dict[str, Any]) -> None:
  """Whether the file to update has places for the tables should show before the work."""
  if args.update:
    text = args.update.read_text(encoding="utf-8", errors="replace")
    marker = report.missing_marker(result, dict.fromkeys(args.suite), text)
    if marker:
      raise click.BadParameter(
        f"{args.update} has no {marker} followed by <!-- end -->", param_hint="--update"
      )


def about(args: SimpleNamespace, peers: list[str]) -> dict[str, Any]:
  """When, where and with what the numbers were taken; the suites are added later."""
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
    "scale": list(args.scale),
    # The load of the last minute, before any work is done here.
    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "call_seconds": _call_seconds(),
    "suites": {},
  }


def _call_seconds() -> float:
  """The time of a call that computes next to nothing; times near it say little of a function."""
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
