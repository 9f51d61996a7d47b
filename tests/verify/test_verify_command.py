"""The command `softmax-jax verify`: its options, output, exit codes and picture."""

import itertools
import json
import struct
import subprocess
import sys
import textwrap

import commands
import matplotlib.figure
import numpy as np
import pytest

from softmax_jax.verify import library


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
  """The module `losses`, importable from the current directory under a new name in each test."""
  name = f"losses_{tmp_path.name}"
  (tmp_path / f"{name}.py").write_text(
    textwrap.dedent("""
      import jax, jax.numpy as jnp

      def focal(logits, labels, gamma=0.0):
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]
        return (-jnp.expm1(-nll)) ** gamma * nll

      @jax.custom_vjp
      def wrong(x):
        return jax.nn.softmax(x)

      wrong.defvjp(lambda x: (wrong(x),) * 2, lambda a, u: (a * u,))
      number = 3

      def chatty(x):
        print("called")
        return jnp.sin(x)

      def exits(x):
        raise SystemExit(3)

      def flagged(x, flag):
        return x if flag else -x

      def noisy(key, p):
        return p["w"] * jax.random.normal(key, p["w"].shape)

      def drop(key, x):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)

      example = (jax.random.key(0), {"w": jnp.arange(1.0, 4)})
      def make():
        return example
    """)
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", sys.path[:])
  return name


def run(capsys, *argv):
  """The exit code, stdout and stderr of `softmax-jax verify ARGV`."""
  return commands.run(capsys, "verify", *argv)


def test_a_function_that_is_right(capsys, module):
  code, out, err = run(
    capsys,
    *(f"{module}:focal", "--args", "4,8:float32", "4:int32", "--kwarg", "gamma=2.0"),
    *("--checks", "value", "vjp", "finite_differences"),
  )
  assert code == 0
  assert err == ""
  lines = out.splitlines()
  assert [line.split()[0] for line in lines[2:5]] == ["value", "vjp", "finite_differences"]
  assert lines[5].startswith("Not looked at: repeated, each_output, ")
  assert lines[-1].startswith("3 passed, 0 failed, 0 skipped in ")


def test_a_function_that_is_wrong_as_json_and_picture(capsys, module, monkeypatch):
  drawn = []
  imshow = matplotlib.axes.Axes.imshow
  monkeypatch.setattr(
    matplotlib.axes.Axes,
    "imshow",
    lambda self, x, **options: drawn.append(x) or imshow(self, x, **options),
  )
  code, out, err = run(
    capsys,
    *(f"{module}:wrong", "--reference", "jax.nn:softmax", "--shape", "3"),
    *("--json", "--plot", "p.png", "--skip", "second_order"),
  )
  assert (code, err) == (1, "")
  report = json.loads(out)
  assert report["passed"] is False
  checks = {row["check"]: row["status"] for row in report["rows"]}
  assert (checks["vjp"], checks["linearity"], checks["jvp"]) == ("failed", "passed", "skipped")
  assert "second_order" not in " ".join(checks)

  with open("p.png", "rb") as file:
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", file.read(16)[8:])
  assert width > 2 * height > 1000
  ours, right, difference = drawn
  a = np.diag(ours)
  np.testing.assert_allclose(ours, np.diag(a), atol=1e-7)
  np.testing.assert_allclose(right, np.diag(a) - np.outer(a, a), atol=1e-6)
  np.testing.assert_allclose(difference, np.outer(a, a), atol=1e-6)


def test_axis_and_float64(capsys):
  code, out, _ = run(
    capsys,
    *("softmax_jax:softmax", "--shape", "3,2", "--dtype", "float64", "--axis", "0"),
    *("--reference", "jax.nn:softmax", "--checks", "vjp", "--seed", "3", "--json"),
  )
  assert code == 0
  (row,) = json.loads(out)["rows"]
  assert (row["dtype"], row["shape"]) == ("float64", [3, 2])


@pytest.mark.parametrize(
  "words",
  ["{0}:noisy --arguments {0}:example", "{0}:noisy --arguments {0}:make", "{0}:drop --args :key 4"],
)
def test_pytrees_and_keys_of_random_numbers(capsys, module, words):
  code, out, _ = run(capsys, *words.format(module).split(), "--checks", "vjp")
  assert code == 0
  assert out.startswith(f"{module}:")
  assert "1 passed" in out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("losses", "'[MODULE:FUNCTION]': expected MODULE:FUNCTION, got 'losses'"),
    ("nowhere:f", "cannot import nowhere: ModuleNotFoundError"),
    ("raises:f", "cannot import raises: RuntimeError: at import"),
    ("{module}:nothing", "{module} has no nothing"),
    ("{module}:number", "is of type int, which cannot be called"),
    ("{module}:wrong --shape 4,x", "'--shape': expected sizes with commas between"),
    ("{module}:wrong --dtype f32", "'--dtype': 'f32' is not one of 'float16'"),
    ("{module}:wrong --args 4 --shape 4", "--shape is not allowed with --args"),
    ("{module}:wrong --arguments {module}:example --shape 4", "--shape is not allowed with"),
    ("{module}:wrong --arguments {module}:number", "{module}:number to be a tuple of arguments"),
    ("{module}:wrong --checks vpj", "'--checks': 'vpj' is not one of 'value'"),
    ("{module}:wrong --checks vjp --fast", "--fast is not allowed with --checks"),
    ("{module}:wrong --kwarg x", "'--kwarg': expected NAME=VALUE, got 'x'"),
    ("{module}:wrong --reference nowhere:f", "--reference: cannot import nowhere"),
    (
      "{module}:wrong --reference jax.numpy:sum",
      "expected the reference to return floating arrays of shapes [(4, 8)], as f does, got [()].",
    ),
    ("{module}:wrong --kwarg b=1 --kwarg b=2", "--kwarg: b is given twice"),
    ("{module}:wrong --axis 0 --kwarg axis=1", "--kwarg: axis is given twice"),
    ("{module}:wrong --shape 999 --plot p.png", "no Jacobian to draw: ValueError: it has 998,001"),
    ("{module}:focal", "cannot verify {module}:focal on (float32[4, 8]): TypeError: focal()"),
    ("--axis 1", "--axis needs MODULE:FUNCTION"),
    ("--plot p.png", "--plot needs MODULE:FUNCTION"),
  ],
)
def test_bad_usage_is_one_line(capsys, module, tmp_path, words, message):
  (tmp_path / "raises.py").write_text("raise RuntimeError('at import\\nand more')")
  code, out, err = run(capsys, *words.format(module=module).split())
  assert (code, out) == (2, "")
  assert err.startswith("softmax-jax verify: error: ")
  assert err.count("\n") == 1
  assert message.format(module=module) in err
  assert not (tmp_path / "p.png").exists()


def test_the_library(capsys, monkeypatch):
  few = list(itertools.islice(library.cases(), 2))
  few = [case._replace(checks=("value", "vjp")) for case in few]
  monkeypatch.setattr(library, "cases", lambda: iter(few))
  code, out, err = run(capsys)
  assert (code, err) == (0, "")
  assert "log_softmax" in out
  assert "4 passed, 0 failed, 0 skipped" in out

  wrong = few[1]._replace(reference=lambda x: 2 * few[1].reference(x))
  monkeypatch.setattr(library, "cases", lambda: iter([few[0], wrong]))
  code, out, _ = run(capsys)
  assert code == 1
  assert "2 passed, 2 failed, 0 skipped" in out
  assert out.endswith("\nExit code 1: 2 checks have failed.\n")
  assert "expected" in out.split("log_softmax:")[1]  # what is wrong, in a line for each row


def test_help_in_a_process_of_its_own():
  words = [sys.executable, "-m", "softmax_jax", "verify", "--help"]
  done = subprocess.run(words, capture_output=True, text=True, check=True)
  assert "MODULE:FUNCTION" in done.stdout
  assert done.stderr == ""


def test_json_is_alone_on_stdout_whatever_the_module_prints(capsys, module):
  code, out, err = commands.run(capsys, "verify", f"{module}:chatty", "--checks=vjp", "--json")
  assert code == 0
  assert json.loads(out)["passed"]
  assert "called" in err


@pytest.mark.parametrize(
  "options, message",
  [
    (["{}:exits"], "SystemExit: 3"),
    (["{}:flagged", "--args", "4", "():bool"], "pass it in kwargs="),
    (["{}:chatty", "--checks", "value", "--skip", "value"], "--skip leaves no check"),
    (["{}:chatty", "--shape=-1,3"], "'--shape': expected sizes"),
  ],
  ids=["exit", "flag", "no check", "negative size"],
)
def test_what_cannot_be_verified_is_bad_usage_in_one_line(capsys, module, options, message):
  code, _, err = commands.run(capsys, "verify", *(o.format(module) for o in options))
  assert code == 2
  assert message in err.splitlines()[-1]


def test_nothing_to_differentiate_is_not_passed(capsys, module):
  code, out, _ = commands.run(capsys, "verify", f"{module}:chatty", "--dtype=int32")
  assert code == 1
  assert "no argument has a floating dtype" in " ".join(out.split())


def test_an_empty_argument_is_not_passed(capsys, module):
  code, out, _ = commands.run(capsys, "verify", f"{module}:wrong", "--shape=0,3")
  assert code == 1
  assert "no argument with a floating dtype has an entry" in " ".join(out.split())
  assert " 0 failed" in out


def test_a_picture_without_a_jacobian_is_refused_in_plain_words(capsys, module):
  code, _, err = commands.run(capsys, "verify", f"{module}:chatty", "--dtype=int32", "--plot=a.png")
  assert code == 2
  assert "no Jacobian to draw: no argument" in err
