"""The command `softmax-jax verify`."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import math
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import softmax_jax
from softmax_jax import _command_line as command_line
from softmax_jax.verify import CHECKS, Report, chosen_checks, library, run_checks, verifier
from softmax_jax.verify.checks.jacobians import jacobian_pair
from softmax_jax.verify.errors import first_line
from softmax_jax.verify.report import Skip
from softmax_jax.verify.verifier import Verifier

HELP = """\
Verify derivatives: of this library, or of any function of yours.

Without an argument, every function of softmax_jax is verified over dtypes and shapes, each against
its textbook formula in float64. With MODULE:FUNCTION, that function is verified on random
arguments. MODULE may be in the current directory:

  softmax-jax verify mypackage.losses:focal_loss --args 4,8:float32 4:int32 --kwarg gamma=2.0
  softmax-jax verify jax.nn:softmax --shape 8,4 --axis 0 --plot jacobian.png

Without --reference, derivatives are compared with finite differences in float64. Arguments are
drawn from a normal distribution; integers are below the size of the class axis (--axis) of the
first argument; the dtype key stands for keys of random numbers (:key for one). Arguments of any
other kind, such as the parameters of a model, come from an object of yours:

  softmax-jax verify mymodel:loss --arguments mymodel:example

Exit code: 0 if no check failed, 1 if one did or not every derivative was confirmed (the last line
says why), 2 for a bad option, a function that cannot be imported or does not accept the
arguments, or a missing package.
"""
_DTYPES = (
  *("float16", "bfloat16", "float32", "float64", "bool"),
  *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_DTYPE, _CHECK = click.Choice(_DTYPES), click.Choice(CHECKS)
_DTYPE_OR_KEY = click.Choice((*_DTYPES, "key"))
_MAX_SIZES, _MAX_SIZE = 32, 5_000_000

_Spec = tuple[tuple[int, ...], str]  # the shape of an argument, and its dtype


# --- the command line -----------------------------------------------------------------------------


def _shape(text: str) -> tuple[int, ...]:
  plain = text.strip().removeprefix("(").removesuffix(")").removesuffix(",")
  if re.fullmatch(r"(\d+(,\s*\d+)*)?", plain):
    with contextlib.suppress(ValueError):  # Python refuses numbers of thousands of digits.
      shape = tuple(int(n) for n in plain.split(",") if n)
      if len(shape) <= _MAX_SIZES and math.prod(shape) <= _MAX_SIZE:
        return shape
  raise click.BadParameter(
    f"expected sizes with commas between, such as 4,8, at most {_MAX_SIZES} and of at most "
    f"{_MAX_SIZE:,} entries, got {text!r}"
  )


def _argument(text: str) -> tuple[tuple[int, ...], str | None]:
  shape, colon, dtype = text.partition(":")
  return _shape(shape), _DTYPE_OR_KEY.convert(dtype, None, None) if colon else None


def _keyword(text: str) -> tuple[str, Any]:
  name, equals, value = text.partition("=")
  if not equals or not name.isidentifier():
    raise click.BadParameter(f"expected NAME=VALUE, got {text!r}")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # A word.
    return name, value


def _function_name(text: str) -> str:
  if not re.fullmatch(r"[\w.]+:[\w.]+", text):
    raise click.BadParameter(f"expected MODULE:FUNCTION, got {text!r}")
  return text


@click.command("verify", cls=command_line.Command, help=HELP)
@click.argument("function", type=_function_name, required=False, metavar="[MODULE:FUNCTION]")
@click.option("--shape", type=_shape, metavar="N,N", help="Shape of its argument (default: 4,8).")
@click.option(
  "--dtype", type=_DTYPE, metavar="DTYPE", help="Dtype of its argument (default: float32)."
)
@click.option(
  "--args",
  type=_argument,
  multiple=True,
  metavar="N,N:DTYPE...",
  help="Shapes and dtypes of several arguments.",
)
@click.option(
  "--arguments",
  type=_function_name,
  metavar="MODULE:OBJECT",
  help="A tuple of arguments, pytrees too, or a function that returns one.",
)
@click.option(
  "--reference",
  type=_function_name,
  metavar="MODULE:FUNCTION",
  help="A function with the same arguments that is known to be right.",
)
@click.option("--axis", type=int, metavar="N", help="The keyword argument axis.")
@click.option(
  "--kwarg",
  type=_keyword,
  multiple=True,
  metavar="NAME=VALUE...",
  help="Other keyword arguments, each a Python literal or a word.",
)
@click.option("--checks", type=_CHECK, multiple=True, metavar="CHECK...", help="Only these checks.")
@click.option("--skip", type=_CHECK, multiple=True, metavar="CHECK...", help="Not these checks.")
@click.option("--fast", is_flag=True, help="Only the checks that compile little.")
@command_line.seed_option("Decides the arguments, cotangents and tangents.")
@click.option("--json", is_flag=True, help="Print one JSON object in place of the table.")
@command_line.plot_option("Draw the Jacobian, that of the reference, and their difference")
def command(**options: Any) -> int:
  """Runs `softmax-jax verify`."""
  return run(SimpleNamespace(**options))


def run(args: SimpleNamespace) -> int:
  """Verifies and reports; the exit code says whether every check held."""
  start = time.perf_counter()
  # Import every extra now: a missing one should show before the work, not after it.
  for extra in ("rich", *(["matplotlib"] if args.plot else [])):
    importlib.import_module(extra)
  # What f and its module print must not mix with the report.
  with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
    report = _library(args) if args.function is None else _function(args)
  seconds = time.perf_counter() - start
  if args.json:
    about = {"jax": jax.__version__, "seed": args.seed, "seconds": seconds}
    command_line.print_json(about | report.to_dict())
  else:
    print(f"{report.summary()} in {seconds:.0f} s")
    if not report:
      print(f"Exit code 1: {_why(report)}.")
    if args.plot:
      print(f"Picture: {args.plot}")
  return 0 if report else 1


def _why(report: Report) -> str:
  """Why a report is false."""
  if number := len(report.failed):
    return f"{number} check{' has' if number == 1 else 's have'} failed"
  return "not every derivative was confirmed"


# --- the library ----------------------------------------------------------------------------------


def _library(args: SimpleNamespace) -> Report:
  for name in vars(args).keys() - {"function", "seed", "json"}:
    if command_line.given(name):
      raise click.UsageError(f"--{name} needs MODULE:FUNCTION")
  command_line.devices()
  cases = list(library.cases())
  with command_line.progress_bar(len(cases)) as show:
    done = itertools.count(1)

    def verified(case: library.Case) -> Report:
      report = case.run(args.seed)
      show(next(done), f"{case.name}, {case.dtype}"[:60])
      return report

    # Most of the time goes into compiling, during which Python is free for another thread.
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
      reports = list(pool.map(verified, cases))
  if not args.json:
    _print_library(cases, reports)
  return sum(reports, Report(()))


def _print_library(cases: list[library.Case], reports: list[Report]) -> None:
  from rich.console import Console
  from rich.table import Table

  console = Console(highlight=False)
  table = Table(
    title="Derivatives of softmax_jax against those of the textbook formulas in float64",
    title_justify="left",
    caption="The error is that of the check that came closest to its bound, relative and in norm. "
    "--json lists every check, also those that were skipped and why.",
    caption_justify="left",
    box=None,
    padding=(0, 1, 0, 0),
  )
  table.add_column("function", overflow="fold")
  table.add_column("argument", no_wrap=True)
  for name in ("passed", "failed", "error", "bound"):
    table.add_column(name, justify="right", no_wrap=True)
  for case, report in zip(cases, reports, strict=True):
    passed = sum(row.status == "passed" for row in report.rows)
    measured = [row for row in report.rows if row.shape is not None and row.bound > 0]
    worst = max(measured, key=lambda row: row.error / row.bound, default=None)
    shape = ",".join(map(str, case.args[0].shape))
    table.add_row(
      case.name,
      f"{case.dtype}[{shape}]".replace("[", r"\["),
      str(passed),
      str(len(report.failed)),
      *(("", "") if worst is None else (f"{worst.error:.1e}", f"{worst.bound:.1e}")),
      style="red" if report.failed else None,
    )
  console.print(table)
  failed = [row for report in reports for row in report.failed]
  if failed:
    print(Report(tuple(failed)).failures())


# --- a function -----------------------------------------------------------------------------------


def _function(args: SimpleNamespace) -> Report:
  for name in ("shape", "dtype"):
    if args.args and command_line.given(name):
      raise click.UsageError(f"--{name} is not allowed with --args")
  for name in ("shape", "dtype", "args"):
    if args.arguments and command_line.given(name):
      raise click.UsageError(f"--{name} is not allowed with --arguments")
  kwargs: dict[str, Any] = {} if args.axis is None else {"axis": args.axis}
  for name, value in args.kwarg:
    if name in kwargs:
      raise click.BadParameter(f"{name} is given twice", param_hint="--kwarg")
    kwargs[name] = value
  if args.fast and args.checks:
    raise click.UsageError("--fast is not allowed with --checks")
  chosen = chosen_checks(args.checks or None, args.skip, args.fast)
  if not chosen:
    raise click.UsageError("--skip leaves no check of --checks to run")
  f = _imported("MODULE:FUNCTION", args.function)
  reference = None
  if args.reference is not None:
    reference = _imported("--reference", args.reference)
  given = args.args or [((4, 8) if args.shape is None else args.shape, args.dtype)]
  specs: list[_Spec] = [(shape, dtype or "float32") for shape, dtype in given]
  given_arguments = _given_arguments(args.arguments) if args.arguments else ()
  command_line.devices()  # After the imports: a module may configure JAX.
  if args.arguments:
    dtypes = [str(getattr(x, "dtype", "")) for x in jax.tree.leaves(given_arguments)]
    wide, shown = "float64" in dtypes, args.arguments
  else:
    wide = any(dtype.endswith("64") for _, dtype in specs)
    shown = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in specs)
  with jax.enable_x64(wide or jax.config.jax_enable_x64):  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    arguments = given_arguments or _random_arguments(args, specs)
    try:
      v = verifier(
        f, *arguments, reference=reference, kwargs=kwargs, name=args.function, seed=args.seed
      )
    except KeyboardInterrupt:
      raise
    except BaseException as error:  # A function may raise anything, also to exit.
      raise click.UsageError(
        f"cannot verify {args.function} on ({shown}): {_said(error)}"
      ) from error
    pair = _pair_to_draw(v) if args.plot else None
    with command_line.progress_bar(len(chosen)) as show:
      report = run_checks(v, chosen, lambda done, _, name: show(done, name))
    if pair is not None:
      _draw(args.plot, args, v, *pair)
  if not args.json:
    print(report.table())
  return report


def _given_arguments(name: str) -> tuple[Any, ...]:
  """What the object of this name holds, or returns if it is a function."""
  found = _object("--arguments", name)
  try:
    found = found() if callable(found) else found
  except Exception as error:
    raise click.BadParameter(f"{name}: {_said(error)}", param_hint="--arguments") from error
  if not isinstance(found, tuple) or not found:
    raise click.BadParameter(
      f"expected {name} to be a tuple of arguments, or to return one, got {type(found).__name__}",
      param_hint="--arguments",
    )
  return found  # pyright: ignore[reportUnknownVariableType]  # the user's


def _imported(option: str, name: str) -> Callable[..., Any]:
  found = _object(option, name)
  if not callable(found):
    raise click.BadParameter(
      f"{name} is of type {type(found).__name__}, which cannot be called", param_hint=option
    )
  return functools.partial(_checked, found, name)


def _object(option: str, name: str) -> Any:
  module, _, path = name.partition(":")
  if (here := os.getcwd()) not in sys.path:
    sys.path.insert(0, here)
  try:
    found: Any = importlib.import_module(module)
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # A module may raise anything on import.
    raise click.BadParameter(
      f"cannot import {module}: {_said(error)}", param_hint=option
    ) from error
  for part in path.split("."):
    try:
      found = getattr(found, part)
    except AttributeError:
      raise click.BadParameter(f"{module} has no {path}", param_hint=option) from None
  return found


def _checked(f: Callable[..., Any], name: str, /, *args: Any, **kwargs: Any) -> Any:
  """What f returns, if that is arrays."""
  out = f(*args, **kwargs)
  for leaf in jax.tree.leaves(out):
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))):
      raise TypeError(f"expected arrays, got {type(leaf).__name__} from {name}")
  return out


# The folders of code that an error may pass through but that is not the user's.
_NOT_THE_USERS = tuple(module.__path__[0] + os.sep for module in (softmax_jax, jax, importlib))


def _said(error: BaseException) -> str:
  """The first line of an error, and the place in the user's files that it comes from."""
  line = first_line(error, 300)
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if not frame.filename.startswith(("<", *_NOT_THE_USERS)):
      return f"{line} ({os.path.basename(frame.filename)}, line {frame.lineno})"
  return line


def _random_arguments(args: SimpleNamespace, specs: list[_Spec]) -> list[jax.Array]:
  rng = np.random.default_rng(args.seed)
  shape, _ = specs[0]
  axis = -1 if args.axis is None else args.axis
  high = shape[axis] if -len(shape) <= axis < len(shape) else 2
  arrays: list[jax.Array] = []
  for shape, dtype in specs:
    if dtype == "key":
      key = jax.random.key(args.seed)
      arrays.append(jax.random.split(key, shape) if shape else key)
    elif dtype == "bool":
      arrays.append(jnp.asarray(rng.integers(0, 2, shape), dtype))
    elif "int" in dtype:
      arrays.append(jnp.asarray(rng.integers(0, min(max(high, 1), 127), shape), dtype))
    else:
      arrays.append(jnp.asarray(rng.standard_normal(shape), dtype))
  return arrays


def _pair_to_draw(v: Verifier) -> tuple[np.ndarray, np.ndarray]:
  try:
    return jacobian_pair(v)
  except (Exception, SystemExit) as error:
    why = str(error) if isinstance(error, Skip) else first_line(error)
    raise click.BadParameter(f"no Jacobian to draw: {why}", param_hint="--plot") from error


def _size(x: np.ndarray) -> float:
  return float(np.max(np.abs(x), initial=0, where=np.isfinite(x)))


def _draw(
  path: pathlib.Path, args: SimpleNamespace, v: Verifier, ours: np.ndarray, right: np.ndarray
) -> None:
  """Draws the Jacobian, the reference's and their difference."""
  import matplotlib
  from matplotlib.colors import CenteredNorm
  from matplotlib.figure import Figure  # Without pyplot: the caller's backend stays as it is.

  difference = np.where(np.isfinite(right), ours - right, 0)
  error = np.linalg.norm(difference) / (np.linalg.norm(right[np.isfinite(right)]) or 1)
  named = f"of {args.reference}" if args.reference else "by finite differences, float64"
  titles = (f"(a) {args.function}", f"(b) {named}", f"(c) Difference: {error:.1e} in norm")
  with matplotlib.rc_context({"font.size": 9, "axes.titlelocation": "left"}):
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, matrix, title in zip(
      figure.subplots(1, 3), (ours, right, difference), titles, strict=True
    ):
      scale = _size(difference if matrix is difference else right) or 1.0
      image = axes.imshow(
        matrix, cmap="RdBu_r", norm=CenteredNorm(halfrange=scale), aspect="auto",
        interpolation="nearest",
      )  # fmt: skip
      axes.set_title(title, fontsize=9)
      axes.set(xlabel=f"entry of {v.problem.names[0]}", ylabel=f"entry of {v.problem.out_names[0]}")
      axes.locator_params(integer=True, nbins=8)
      figure.colorbar(image, ax=axes)
    command_line.save_picture(figure, path, dpi=200)
