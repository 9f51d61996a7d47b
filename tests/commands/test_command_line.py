"""The command `softmax-jax` in bad hands: values, modules, devices, streams, signals, locales."""

import errno
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import click
import commands
import jax
import pytest

import softmax_jax
from softmax_jax import _command_line as command_line
from softmax_jax import benchmark, train
from softmax_jax.__main__ import main
from softmax_jax.train import digits
from softmax_jax.verify import command as verify

FULL = pathlib.Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


def refused(capsys, *argv):
  """What the command says on stderr, which must be one line, with nothing on stdout and code 2."""
  code, out, err = commands.run(capsys, *argv)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith(f"softmax-jax {argv[0]}: error: ")
  return err


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "words, message",
  [
    ("verify m:f --shape -1,3", "'--shape': expected sizes with commas between"),
    ("verify m:f --args 4 -1:float32", "'--args': expected sizes with commas between"),
    (f"verify m:f --shape {'9' * 5000}", "'--shape': expected sizes with commas between"),
    (
      f"verify m:f --shape {','.join('1' * 100)}",
      "such as 4,8, at most 32 and of at most 5,000,000",
    ),
    ("benchmark --shapes -2x3", "'--shapes': expected ROWSxCLASSES"),
    ("train --learning-rate -1e5", "'--learning-rate': -100000.0 is not"),
  ],
  ids=["shape", "args", "digits", "dimensions", "shapes", "rate"],
)
def test_numbers_that_are_negative_or_without_end(capsys, words, message):
  assert message in refused(capsys, *words.split())


@pytest.mark.parametrize("value", ["-" * 5000 + "1", "{[]}", "(" * 300, "\0"])
def test_a_keyword_that_is_no_literal_is_a_word(value):
  assert verify._keyword(f"x={value}") == ("x", value)


@pytest.mark.parametrize("content", [b"\xff", None], ids=["bytes", "device"])
def test_what_cannot_be_updated(capsys, tmp_path, content):
  file = tmp_path / "notes.md" if content else pathlib.Path(os.devnull)
  if content:
    file.write_bytes(content)
  message = f"--update: {file} has no <!-- benchmark: softmax, cpu -->"
  assert message in refused(capsys, "benchmark", "--update", str(file))


def test_a_picture_that_fills_the_disk(tmp_path):
  class Figure:
    def savefig(self, path, dpi):
      raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(click.BadParameter, match=r"cannot write '.*p.png': No space left"):
    command_line.save_picture(Figure(), tmp_path / "p.png", 100)


# --- modules --------------------------------------------------------------------------------------

MODULE = """
import jax.numpy as jnp

class Stop(BaseException):
  pass

class Silent(Exception):
  def __str__(self): raise ValueError("no words")

def string(x): return "words"
def inside(x): return {"a": x, "b": [x, object()]}
def words(x): return {"a", "b"}
def stops(x): raise Stop("here")
def recursive(x): return recursive(x)
def named(x, f, name): return x * f

def raises(x):
  raise ValueError("first\\nsecond")

def silent(x): raise Silent
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  """Writes a module that can be imported, under a new name in each test, and returns the name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", sys.path[:])

  def write(source):
    name = re.sub(r"\W", "_", f"hostile_{tmp_path.name}")
    (tmp_path / f"{name}.py").write_text(source)
    return name

  return write


@pytest.mark.parametrize(
  "source, message",
  [
    ("class Stop(BaseException): pass\nraise Stop('here')", "Stop: here ({}.py, line 2)"),
    ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded ({}.py, line 1)"),
    ("import nowhere_at_all", "No module named 'nowhere_at_all' ({}.py, line 1)"),
    ("\n\nraise SystemExit(0)", "SystemExit: 0 ({}.py, line 3)"),
    ("def (", "SyntaxError: invalid syntax ({}.py, line 1)\n"),
    ("x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
  ],
  ids=["exception", "recursion", "missing", "exit", "syntax", "null"],
)
def test_a_module_that_cannot_be_imported(capsys, module, source, message):
  name = module(source)
  err = refused(capsys, "verify", f"{name}:f")
  assert f"MODULE:FUNCTION: cannot import {name}: " in err
  assert message.format(name) in err


@pytest.mark.parametrize(
  "function, message",
  [
    ("string", "TypeError: expected arrays, got str from {0}:string"),
    ("inside", "TypeError: expected arrays, got object from {0}:inside"),
    ("words", "TypeError: expected arrays, got set from {0}:words"),
    ("stops", "Stop: here ({0}.py, line 13)"),
    ("recursive", "RecursionError: maximum recursion depth exceeded ({0}.py, line 14)"),
    ("raises", "ValueError: first ({0}.py, line 18)"),
    ("silent", "Silent ({0}.py, line 20)"),
  ],
)
def test_a_function_that_cannot_be_verified(capsys, module, function, message):
  name = module(MODULE)
  err = refused(capsys, "verify", f"{name}:{function}", "--shape", "3")
  assert f"cannot verify {name}:{function} on (float32[3]): {message.format(name)}" in err


def test_a_reference_that_returns_no_array_is_named(capsys, module):
  name = module(MODULE)
  err = refused(capsys, "verify", "jax.nn:softmax", "--reference", f"{name}:string")
  assert f"TypeError: expected arrays, got str from {name}:string" in err


def test_keywords_may_have_any_name(capsys, module):
  name = module(MODULE)
  for words in ("--kwarg f=2.0 --kwarg name=a", "--kwarg f=2.0 name=a"):
    words = (*words.split(), "--checks", "value", "--shape", "3")
    code, out, err = commands.run(capsys, "verify", f"{name}:named", *words)
    assert (code, err) == (0, "")
    assert "1 passed" in out


# --- devices and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("Unable to\nand more"), AssertionError()])
@pytest.mark.parametrize("words", ["verify", "verify jax.nn:softmax", "benchmark", "train"])
def test_no_device(capsys, monkeypatch, words, error):
  def fail():
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  why = str(error).partition("\n")[0] or "AssertionError"
  err = refused(capsys, *words.split())
  assert re.search(rf"error: JAX has no device to compute on.*: {why}\n", err)


def test_the_platform_is_named(monkeypatch):
  def fail():
    raise AssertionError

  monkeypatch.setattr(jax, "devices", fail)
  platforms = jax.config.jax_platforms
  jax.config.update("jax_platforms", "abacus")
  try:
    with pytest.raises(click.UsageError, match="with JAX_PLATFORMS=abacus: AssertionError"):
      command_line.devices()
  finally:
    jax.config.update("jax_platforms", platforms)


def test_a_module_is_imported_before_jax_starts_and_may_configure_it(capsys, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: pytest.fail("started JAX"))
  assert "cannot import nowhere_at_all" in refused(
    capsys, "verify", "jax.nn:softmax", "--reference", "nowhere_at_all:f"
  )


@pytest.mark.parametrize(
  "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_much_memory_is_bad_usage(capsys, monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(digits, "_train", fail)
  assert "the options ask for more memory than there is" in refused(capsys, "train")


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  monkeypatch.setattr(digits, "_train", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    main(["train"])


# --- streams --------------------------------------------------------------------------------------


@needs_full
def test_a_full_disk_under_stdout(capsys, monkeypatch):
  with FULL.open("w") as full:
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["--version"]) == 2
    print("more", file=full)  # As Python does at its exit: this must not fail again.
    full.flush()
  assert capsys.readouterr().err == "softmax-jax: error: [Errno 28] No space left on device\n"


def test_nothing_goes_to_stdout_in_place_of_a_closed_stderr(capsys, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(digits, "_train", interrupted)
  monkeypatch.setattr(sys, "stderr", None)
  assert main(["train"]) == 130
  sys.stderr.close()
  monkeypatch.undo()
  assert capsys.readouterr() == ("", "")


def test_a_closed_stdout(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  assert main(["--version"]) == 0
  sys.stdout.close()


def test_a_name_that_the_locale_cannot_write(monkeypatch):
  stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", stdout)
  monkeypatch.setattr(benchmark, "run", lambda args: print("Picture: b\xe4r\udcff.png") or 0)
  assert main(["benchmark"]) == 0
  assert stdout.buffer.getvalue() == b"Picture: b\\xe4r\\udcff.png\n"


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [train, verify, benchmark])
def test_help_without_room(capsys, monkeypatch, command):
  monkeypatch.setenv("COLUMNS", "1")
  code, out, err = commands.run(capsys, command.command.name, "--help")
  assert (code, err) == (0, "")
  assert command.HELP in out
  assert "--seed N" in out


# --- processes ------------------------------------------------------------------------------------


def test_a_second_interrupt_ends_at_once(tmp_path):
  (tmp_path / "slow.py").write_text(
    "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(600,)).start()\n"  # Python waits for it at exit.
    "print('ready', flush=True)\n"
    "time.sleep(600)\n"
  )
  # A process that a script starts in the background ignores SIGINT, and so do those that it starts.
  program = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from softmax_jax.__main__ import main; sys.exit(main())"
  )
  command = [sys.executable, "-c", program, "verify", "slow:f"]
  root = str(pathlib.Path(softmax_jax.__file__).parent.parent)
  pipe = subprocess.PIPE
  with subprocess.Popen(
    command,
    stdout=pipe,
    stderr=pipe,
    text=True,
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": root},
  ) as process:
    watch = threading.Timer(60, process.kill)
    watch.start()
    try:
      assert process.stdout.readline() == "ready\n"
      process.send_signal(signal.SIGINT)
      assert [process.stderr.readline() for _ in range(2)] == ["\n", "softmax-jax: interrupted\n"]
      process.send_signal(signal.SIGINT)
      assert process.wait(60) == -signal.SIGINT
      assert process.stderr.read() == ""
    finally:
      watch.cancel()
      process.kill()


@pytest.mark.long
def test_help_of_an_optimizing_interpreter():
  command = [sys.executable, "-OO", "-m", "softmax_jax", "train", "--help"]
  result = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert (result.returncode, result.stderr) == (0, "")
  assert train.HELP in result.stdout


@pytest.mark.long
@needs_full
def test_everything_hostile_at_once(tmp_path):
  (tmp_path / "own.py").write_text(
    "import jax.numpy as jnp\ndef s\xfcn(x): return jnp.sin(x)\n", "utf-8"
  )
  environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TERM")}
  environment |= {
    "PYTHONPATH": str(pathlib.Path(softmax_jax.__file__).parent.parent),
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
    "JAX_ENABLE_X64": "1",
    "COLUMNS": "1",
    "MPLCONFIGDIR": str(FULL / "matplotlib"),
  }
  words = ("verify", "own:s\xfcn", "--shape", "3", "--checks", "value", "--plot", "b\xe4r.png")
  result = subprocess.run(
    [sys.executable, "-m", "softmax_jax", *words],
    stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment,
    timeout=300,
  )  # fmt: skip
  assert "Traceback" not in result.stderr
  assert result.returncode == 0
  assert "1 passed" in result.stdout
  assert "Picture: b\\xe4r.png" in result.stdout
  assert (tmp_path / "b\xe4r.png").stat().st_size > 1000
