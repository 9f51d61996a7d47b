"""`softmax-jax benchmark`: the arithmetic of its times, its oracle, its output and its errors.

No time is asserted: clocks are fakes, and of a real run only the shape of the report is looked at.
"""

import contextlib
import importlib.util
import io
import json
import math
import re
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from commands import strict_json

from softmax_jax import benchmark
from softmax_jax.__main__ import main
from softmax_jax.benchmark import accuracy, oracle, programs, report, suites, timing
from softmax_jax.benchmark.programs import (
  DIVERGENCE,
  ENTROPY,
  GRADIENT,
  INTEGER,
  LINEAR,
  OURS,
  PULL,
  SOFT,
  VJP,
)

SPEED = Path(__file__).parents[2] / "docs" / "speed.md"
JAX_PEERS = ("jax.nn", "optax", "products")


def run(capsys, *argv):
  """The exit code, stdout and stderr of `softmax-jax benchmark ARGV`."""
  return commands.run(capsys, "benchmark", *argv)


# --- times ---------------------------------------------------------------------------------------


class Machine:
  """A clock, and programs that take what `cost` says, all multiplied by a speed that drifts."""

  def __init__(self, drift=lambda now: 1.0):
    self.now, self.drift, self.calls = 0.0, drift, []

  def clock(self):
    return self.now

  def program(self, name, cost):
    def go(n):
      self.calls.append((name, n))
      self.now += n * cost * self.drift(self.now)

    return go


def test_times_per_call_and_repeats():
  machine = Machine()
  run = {"fast": machine.program("fast", 1e-5), "slow": machine.program("slow", 0.5)}
  times = timing.interleave(run, rounds=4, seconds=1e9, sample_seconds=1e-2, clock=machine.clock)
  assert times["fast"] == pytest.approx([1e-5] * 4)
  assert times["slow"] == pytest.approx([0.5] * 4)
  rounds = machine.calls[-12:]
  for i in range(0, 12, 3):  # Each round has every program once, for as long as a sample takes,
    repeats = dict(rounds[i : i + 3])
    assert set(repeats) == {"fast", "slow"}
    assert repeats["slow"] == 1
    assert 1000 <= repeats["fast"] <= 3000
    (warm_up,) = {n for _, n in rounds[i : i + 3]} - set(repeats.values())
    assert warm_up == repeats["fast"] // 4  # and before a short program some calls to warm it up.
  assert len({name for name, _ in rounds[::3]}) == 2  # The order is not always the same.


def test_the_budget_ends_the_rounds_but_not_before_the_third():
  for seconds, expected in ((0.0, 3), (7.5, 8)):
    machine = Machine()
    times = timing.interleave(
      {"a": machine.program("a", 1.0)}, rounds=100, seconds=seconds, clock=machine.clock
    )
    assert len(times["a"]) == expected
  machine = Machine()
  run = {"a": machine.program("a", 1.0)}
  assert len(timing.interleave(run, rounds=2, seconds=0.0, clock=machine.clock)["a"]) == 2


def test_ratios_survive_a_drifting_machine():
  machine = Machine(drift=lambda now: 1 + now / 10)
  run = {"a": machine.program("a", 0.01), "b": machine.program("b", 0.02)}
  times = timing.interleave(run, rounds=99, seconds=1e9, clock=machine.clock)
  assert times["a"].max() > 1.2 * times["a"].min()
  assert timing.median_ratio(times["a"], times["b"]) == pytest.approx(0.5, rel=0.02)
  # Not the ratio of the medians, which here is 1.
  assert timing.median_ratio(np.array([1.0, 2.0, 9.0]), np.array([2.0, 1.0, 18.0])) == 0.5


def test_ratios_bandwidth_and_means():
  line = suites.Line("softmax", "softmax", VJP, (4, 8))
  times = {OURS: [2.0, 4.0, 3.0], "jax.nn": [1.0, 8.0, 6.0], suites.COPY: [0.5, 0.5, 0.7]}
  times = {name: np.array(values) for name, values in times.items()}
  summary = suites.summarize(line, times, moved_bytes=600, logits_bytes=100)
  assert summary["seconds"] == {OURS: 3.0, "jax.nn": 6.0}
  assert summary["ratios"] == {"jax.nn": 0.5}
  assert summary["bytes_per_second"] == 200
  assert summary["copy_bytes_per_second"] == 400
  assert summary["of_copy"] == 0.5
  assert summary["shape"] == [4, 8]

  results = [summary | {"ratios": {"jax.nn": ratio}} for ratio in (0.5, 2.0, 8.0)]
  results[2] = results[2] | {"shape": [5, 5]}
  total = suites.total([*results, summary | {"ratios": {}}])
  assert set(total) == {"jax.nn"}
  assert total["jax.nn"]["geometric_mean"] == pytest.approx(2.0)
  assert total["jax.nn"]["worst_ratio"] == 8.0
  assert total["jax.nn"]["worst_line"]["shape"] == [5, 5]


@pytest.mark.parametrize("queue", [True, False])
def test_a_program_is_waited_for(queue):
  waited = []
  outputs = iter(range(10))
  program = programs.Program(lambda: next(outputs), waited.append, None, None)
  program.repeated(queue=queue)(4)
  assert waited == ([3] if queue else [0, 1, 2, 3])


def test_inputs_repeat_beyond_what_is_drawn(monkeypatch):
  monkeypatch.setattr(suites, "_RANDOM", 24)
  line = suites.Line("losses", SOFT, GRADIENT, (16, 6), scale=10.0)
  logits, labels = suites.arguments(line, np.dtype(np.float32), 0)
  np.testing.assert_array_equal(logits[:4], logits[4:8])
  assert len(np.unique(logits)) == 24
  np.testing.assert_allclose(labels.sum(axis=-1), 1, rtol=1e-6)
  assert 5 < np.std(logits) < 20


# --- the oracle ----------------------------------------------------------------------------------


def reference(function, z, second):
  """One row in 60 digits, from the definitions: the value, and the VJP or gradient by z."""
  with mpmath.workdps(60):
    z, size = [mpmath.mpf(float(v)) for v in z], len(z)
    total = mpmath.fsum(map(mpmath.exp, z))
    a = [mpmath.exp(v) / total for v in z]
    t = [int(i == second) for i in range(size)] if function == INTEGER else second
    if function == ENTROPY:
      entropy = -mpmath.fsum(p * mpmath.log(p) for p in a)
      return [float(entropy)], [float(-p * (mpmath.log(p) + entropy)) for p in a]
    if function == DIVERGENCE:
      w = [mpmath.exp(mpmath.mpf(float(v))) for v in second]
      p = [v / mpmath.fsum(w) for v in w]
      divergence = mpmath.fsum(v * mpmath.log(v / q) for v, q in zip(p, a, strict=True))
      return [float(divergence)], [float(q - v) for v, q in zip(p, a, strict=True)]
    if function in (INTEGER, SOFT):
      loss = -mpmath.fsum(float(p) * mpmath.log(q) for p, q in zip(t, a, strict=True))
      weight = mpmath.fsum(map(float, t))
      return [float(loss)], [float(q * weight - float(p)) for p, q in zip(t, a, strict=True)]
    if function == "logsumexp":
      return [float(mpmath.log(total))], [float(q * float(second)) for q in a]
    y = a if function == "softmax" else [mpmath.log(q) for q in a]
    c = [mpmath.mpf(float(v)) for v in second]
    if function == "softmax":
      mean = mpmath.fsum(p * q for p, q in zip(a, c, strict=True))
      bar = [p * (q - mean) for p, q in zip(a, c, strict=True)]
    else:
      bar = [q - p * mpmath.fsum(c) for p, q in zip(a, c, strict=True)]
    return [float(v) for v in y], [float(v) for v in bar]


@pytest.mark.parametrize(
  "function", ["softmax", "log_softmax", "logsumexp", INTEGER, SOFT, ENTROPY, DIVERGENCE]
)
def test_the_oracle_keeps_its_digits(function):
  rng = np.random.default_rng(1)
  z = rng.normal(size=(5, 6)) * np.array([0.01, 1.0, 10.0, 30.0, 1.0])[:, None]
  z[4, 2] += 25  # A row whose label is certain.
  second = {
    INTEGER: np.array([0, 1, 2, 3, 2], np.int32),
    SOFT: rng.dirichlet(np.ones(6), size=5),
    "logsumexp": rng.normal(size=5),
    DIVERGENCE: z + 0.1 * rng.normal(size=(5, 6)),
  }.get(function, rng.normal(size=(5, 6)))
  is_loss = function in (INTEGER, SOFT, DIVERGENCE)
  y = oracle.values(function, z, *([second] if is_loss else [])).values
  bar = oracle.gradients(function, z, second).values
  for i in range(len(z)):
    value, gradient = reference(function, z[i], second[i])
    np.testing.assert_allclose(np.ravel(y[i]), value, rtol=1e-13)
    np.testing.assert_allclose(bar[i], gradient, rtol=1e-12, atol=1e-14 * np.abs(gradient).max())


def test_errors_are_counted_in_ulps_and_in_u():
  float32 = np.dtype(np.float32)
  values = np.array([1.0, 1.5, 4.0, 1e-35])
  expected = oracle.Expected(values, np.abs(values), "ulp")
  actual = values + np.array([0.0, 3 * 2.0**-23, 2 * 2.0**-21, 1e-35])  # The last does not count.
  error, relative = oracle.errors(actual, expected, float32)
  assert error == pytest.approx(3.0)
  assert relative == pytest.approx(2.0**-22 / 1.0, rel=0.01)
  assert oracle.errors(np.array([1.0, np.nan, 4.0, 0.0]), expected, float32) == (np.inf, np.inf)

  tiny = oracle.Expected(values[3:], values[3:], "ulp")
  assert np.isnan(oracle.errors(np.zeros(1), tiny, float32)).all()

  rows = np.array([[3.0, 4.0], [1e-40, 0.0]])
  expected = oracle.Expected(rows, np.abs(rows), "u")
  actual = rows + np.array([[0.0, 5 * 2.0**-24], [0.0, 0.0]])
  error, relative = oracle.errors(actual, expected, float32)
  assert (error, relative) == pytest.approx((1.0, 2.0**-24))


@pytest.mark.without("disable_jit")
@pytest.mark.parametrize("peer", [OURS, "jax.nn", "optax", "distrax", "torch"])
def test_every_contender_computes_what_the_oracle_does(peer):
  if programs.version(peer) is None:
    pytest.skip(f"{peer} is not installed")
  float32 = np.dtype(np.float32)
  shapes = {"softmax": (8, 5), "losses": (2, 4, 5), "divergences": (2, 4, 5), "linear": (8, 4, 5)}
  found = 0
  for suite, shape in shapes.items():
    for line in suites.timed_lines(suite, [shape], [1.0]):
      if peer != OURS and peer not in programs.peers_of(line.function):
        continue
      inputs = suites.arguments(line, float32, 0)
      if suite != "linear":  # Of scales at which every library has digits.
        inputs[0] = np.clip(inputs[0], -2, 2)
      if line.function == DIVERGENCE:
        inputs[1] = -inputs[0]
      program = programs.build(peer, line.function, line.mode, inputs)
      error = suites.worst_errors(line, inputs, {peer: program}, float32)[peer]
      assert error < 100, (peer, line)
      found += 1
  assert found == {OURS: 19, "jax.nn": 11, "optax": 8, "distrax": 4, "torch": 19}[peer]


def test_lines_at_each_scale_and_rank():
  scales, shapes = [1.0, 10.0], [(8, 5), (2, 4, 5)]
  lines = suites.timed_lines("softmax", shapes, scales)
  assert len(lines) == len(set(lines)) == 9 * 2 * 2
  assert [(line.mode, line.shape, line.scale) for line in lines[8:12]] == [
    (PULL, shape, scale) for shape in shapes for scale in scales
  ]
  # Shapes of three numbers are those of the linear suite where that runs too.
  assert {line.shape for line in suites.timed_lines("losses", shapes, [1.0], linear=True)} == {
    (8, 5)
  }
  assert {line.shape for line in suites.timed_lines("linear", shapes, scales)} == {(2, 4, 5)}


@pytest.mark.without("disable_jit")
def test_a_wrong_program_is_seen():
  float32 = np.dtype(np.float32)
  line = suites.Line("losses", INTEGER, GRADIENT, (8, 5))
  inputs = suites.arguments(line, float32, 0)
  right = programs.build(OURS, INTEGER, GRADIENT, inputs)
  wrong = right._replace(fetch=lambda outputs: [1.001 * v for v in right.fetch(outputs)])
  worst = suites.worst_errors(line, inputs, {"right": right, "wrong": wrong}, float32)
  assert worst["right"] < 100
  assert worst["wrong"] == pytest.approx(0.001 * 2**24, rel=0.01)


@pytest.mark.without("disable_jit")
def test_the_accuracy_suite_tells_digits_from_none():
  rows = accuracy.measure(
    ["jax.nn", "optax"], jnp.dtype("float32"), seed=3, only=[("float32", 20), ("bfloat16", 10)]
  )
  by_name = {(row["row"], row["dtype"]): row for row in rows}
  assert len(by_name) == len(rows) == 19
  confident = by_name["loss, label at 1 - 1e-10", "float32"]
  assert confident["relative_errors"]["optax"] > 0.9
  assert confident["errors"][OURS] < 6
  vjp = by_name["softmax VJP, in norm, scale 10 up", "float32"]
  assert vjp["unit"] == "u"
  assert vjp["errors"]["jax.nn"] > 1e4 > 100 > vjp["errors"][OURS]
  assert by_name["loss", "bfloat16"]["errors"][OURS] < 1
  near = by_name["KL divergence, logits 0.001 apart", "float32"]
  assert near["relative_errors"]["optax"] > 10
  ours = [row["errors"][OURS] for row in rows if row["row"].startswith(("KL", "entropy"))]
  assert len(ours) == 9 and max(ours) < 16
  for row in rows:
    assert row["classes"] == [10 if row["dtype"] == "bfloat16" else 20]
    assert row["errors_by_classes"] == {name: [error] for name, error in row["errors"].items()}


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A run of the timed suites with everything it writes: the JSON report, a file."""
  folder = tmp_path_factory.mktemp("benchmark")
  text = "before\n"
  for suite in suites.NAMES:
    text += f"<!-- benchmark: {suite}, cpu -->\nold\n<!-- end -->\n"
  (folder / "notes.md").write_text(text + "after\n")
  out, err = io.StringIO(), io.StringIO()
  argv = ["benchmark", "--suite", *suites.NAMES, "--shapes", "16x5", "8x4x5"]
  argv += ["--rounds", "2", "--seconds", "0", "--peers", *JAX_PEERS, "--scale", "1", "3", "--json"]
  argv += ["--update", str(folder / "notes.md")]
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main(argv)
  assert (code, err.getvalue()) == (0, "")
  return strict_json(out.getvalue()), folder


def test_the_json_report(measured):
  result, _ = measured
  assert result["platform"] == jax.devices()[0].platform
  assert result["versions"]["jax"] == jax.__version__
  assert result["date"].endswith("+00:00")
  assert result["cpus"] >= 1 and result["call_seconds"] > 0
  assert list(result["suites"]) == list(suites.NAMES)
  peers = {"softmax": {"jax.nn"}, "losses": {"optax"}, "linear": {"optax", "products"}}
  peers["divergences"] = {"jax.nn", "optax"}
  counts = {"softmax": 2 * 9, "losses": 2 * 4, "divergences": 2 * 4, "linear": 2}
  assert result["scale"] == [1, 3]
  for suite, part in result["suites"].items():
    assert len(part["lines"]) == counts[suite]
    assert set(part["total"]) == peers[suite]
    for line in part["lines"]:
      own = peers[suite] & {*programs.peers_of(line["function"])}
      assert line["suite"] == suite
      assert line["rounds"] == 2
      assert set(line["seconds"]) == {OURS, *own}
      assert set(line["ratios"]) == own
      assert all(value > 0 for value in (*line["seconds"].values(), *line["ratios"].values()))
      assert set(line["temp_bytes"]) == {OURS, *own}
      assert set(line["errors"]) == {OURS, *own} - {"products"}
      assert line["error_unit"] == ("u" if "+" in line["mode"] or "vjp" in line["mode"] else "ulp")
      assert line["scale"] in ((1,) if suite == "linear" else (1, 3))
      assert line["unable"] == {}
      assert (line["of_copy"] is None) == (suite == "linear")


def test_counts_inputs_and_outputs_once(measured):
  moved = {
    (line["function"], line["mode"]): line["bytes_moved"]
    for part in measured[0]["suites"].values()
    for line in part["lines"]
  }
  array, row = 4 * 16 * 5, 4 * 16
  assert moved["softmax", "forward"] == 2 * array
  assert moved["softmax", VJP] == 4 * array
  assert moved["softmax", PULL] == 3 * array
  assert moved["logsumexp", VJP] == 2 * array + 2 * row
  assert moved[INTEGER, "loss"] == array + 2 * row
  assert moved[INTEGER, GRADIENT] == 2 * array + row + 4
  assert moved[SOFT, GRADIENT] == 3 * array + 4
  assert moved[LINEAR, GRADIENT] == 2 * 4 * (8 * 4 + 4 * 5) + 4 * 8 + 4


def test_updates_a_file_between_its_markers(measured):
  result, folder = measured
  text = (folder / "notes.md").read_text()
  assert text.startswith("before\n") and text.endswith("after\n")
  assert "old" not in text
  for suite in suites.NAMES:
    assert report.markdown(result, suite) in text
  assert f"jax {jax.__version__}" in text and result["date"][:10] in text
  # A second time it replaces what the first has written.
  report.update(result, folder / "notes.md")
  assert (folder / "notes.md").read_text() == text


def test_prints_tables_that_fit(measured, capsys, monkeypatch):
  result = json.loads(json.dumps(measured[0]))
  for part in result["suites"].values():  # Two shapes each, the second one larger.
    part["lines"] = [
      line | {"shape": shape}
      for line in part["lines"]
      for shape in (line["shape"], [8192, *line["shape"][1:-1], 131072])
    ]
  numbers = set()
  for width in (40, 80, 120):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # else rich takes 120 columns at least
    report.print_tables(result)
    out = re.sub("\x1b.*?m", "", capsys.readouterr().out)  # without italics
    numbers.add(tuple(re.findall(r"\d[\d.]*", out)))  # none is cut or broken
    assert "log_softmax + vjp" in out and "8192x131072" in out and "…" not in out
    assert "ours / jax.nn: geometric mean" in out
    table = [line.rstrip() for line in out.splitlines() if "─" in line or "x131072" in line]
    assert max(map(len, table)) <= 120
  assert len(numbers) == 1


def test_shows_what_is_wrong_or_unknown():
  assert report._error(12.34) == "12"
  assert report._error(1.7e7) == "1.7e7"
  assert report._error(1.7e7, relative=0.999) == "100 % wrong"
  assert report._error(math.inf, relative=math.inf) == "inf or nan"
  assert report._error(None) == "-"
  assert [report.digits(v) for v in (0.0123, 1.234, 56.78, 1234.5)] == [
    "0.0123",
    "1.23",
    "56.8",
    "1234",
  ]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype, capsys):
  before = jax.config.jax_enable_x64
  argv = (
    "--suite",
    "losses",
    "--shapes",
    "8x6",
    "--rounds",
    "1",
    "--peers",
    "none",
    "--dtype",
    dtype,
  )
  code, out, err = run(capsys, *argv, "--json")
  assert (code, err) == (0, "")
  assert jax.config.jax_enable_x64 == before
  for line in strict_json(out)["suites"]["losses"]["lines"]:
    assert line["ratios"] == {}
    assert line["errors"][OURS] < 64
    assert line["bytes_moved"] > 48 * jnp.dtype(dtype).itemsize


def test_programs_are_compiled_where_jit_is_disabled(capsys):
  with jax.disable_jit():
    code, _, err = run(
      capsys, "--suite", "softmax", "--shapes", "8x6", "--rounds", "1", "--peers", "none"
    )
  assert (code, err) == (0, "")


def test_a_peer_that_cannot_is_named(capsys, monkeypatch):
  build = programs.build

  def fail(peer, *rest):
    if peer == "optax":
      raise RuntimeError("out of memory\nand much more")
    return build(peer, *rest)

  monkeypatch.setattr(programs, "build", fail)
  argv = ("--suite", "losses", "--shapes", "8x6", "--rounds", "1", "--peers", "optax")
  code, out, _ = run(capsys, *argv)
  assert code == 0
  assert "optax cannot do integer 8x6: out of memory\n" in out


def test_runs_with_no_peer_installed(capsys, monkeypatch):
  find = importlib.util.find_spec
  missing = {"torch", "optax", "tokamax"}
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest)
  )
  code, out, err = run(capsys, "--suite", "losses", "--shapes", "8x6", "--rounds", "1", "--json")
  assert (code, err) == (0, "")
  assert strict_json(out)["peers"] == ["jax.nn", "products"]
  code, out, err = run(capsys, "--peers", "optax")
  assert (code, out) == (2, "")
  assert "--peers: optax is not installed" in err


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--shapes", "12"], "expected ROWSxCLASSES"),
    (["--shapes", "0x5"], "expected ROWSxCLASSES"),
    (["--suite", "softmax", "linear", "--shapes", "4x5x6"], "the softmax suite needs one ROWSx"),
    (["--shapes", "1x9999999999999999"], "expected ROWSxCLASSES"),
    (["--suite", "linear", "--shapes", "4x5"], "the linear suite needs one TOKENSxFEATURESx"),
    *(
      (["--suite", "accuracy", *option.split()], "the accuracy suite has its own")
      for option in ("--shapes 4x8", "--rounds 50", "--seconds 1", "--scale 1")
    ),
    (["--suite", "speed"], "'speed' is not one of"),
    (["--peers", "numpy"], "'numpy' is not one of"),
    (["--rounds", "0"], "0 is not in the range 1<=x"),
    (["--seconds", "-1"], "-1.0 is not in the range 0<=x"),
    (["--update", "no/such/file.md"], "File 'no/such/file.md' does not exist"),
    (["--json", "--markdown"], "--markdown is not allowed with --json"),
  ],
)
def test_errors_take_one_line(argv, message, capsys):
  commands.assert_error_of_one_line(run(capsys, *argv), "benchmark", message)


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (MemoryError(), "--shapes: 8x6 does not fit into memory"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "8x6 does not fit"),
    (jax.errors.JaxRuntimeError("INTERNAL: a bug"), None),
  ],
)
def test_too_large_a_shape_is_an_error(error, message, capsys, monkeypatch):
  def fail(*args, **options):
    raise error

  monkeypatch.setattr(suites, "measure", fail)
  argv = ("--suite", "losses", "--shapes", "8x6", "--peers", "none")
  if message is None:  # Nothing that the command line could mend.
    with pytest.raises(jax.errors.JaxRuntimeError):
      run(capsys, *argv)
  else:
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.skipif(not SPEED.exists(), reason="the site is not beside the tests")
def test_the_commands_of_the_site_find_their_places(monkeypatch):
  monkeypatch.chdir(SPEED.parents[1])
  text = SPEED.read_text(encoding="utf-8")
  commands = re.findall(r"`softmax-jax benchmark( --suite [^`]*)`", text)
  found = []
  for command in commands:
    options = benchmark.command.make_context("benchmark", command.split()).params
    assert options["update"].samefile(SPEED)
    assert report.missing_marker({"platform": "cpu"}, options["suite"], text) is None
    found += options["suite"]
  assert sorted(found) == sorted([*suites.NAMES, "accuracy"])


def test_a_missing_marker_is_an_error_before_the_work(capsys, tmp_path):
  notes = tmp_path / "notes.md"
  notes.write_text("<!-- benchmark: softmax, cpu -->\n<!-- end -->\n")
  code, out, err = run(capsys, "--update", str(notes))
  assert (code, out) == (2, "")
  assert "has no <!-- benchmark: losses, cpu --> followed by <!-- end -->" in err
