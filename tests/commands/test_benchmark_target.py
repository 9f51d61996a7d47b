"""`softmax-jax benchmark --target`: what programs cost on devices that are not there.

Most tests put the CPU's devices in the place of a target, and so need nothing that compiles for
one. Those of the marker `long` compile for every target that the installed packages know.
"""

import importlib.util
import json
import re
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import required
from commands import strict_json

from softmax_jax import benchmark
from softmax_jax.benchmark import programs, report, suites, targets, traffic, traffic_report
from softmax_jax.benchmark.programs import (
  FORWARD,
  GRADIENT,
  INTEGER,
  LINEAR,
  LOSS,
  OURS,
  SOFT,
  VJP,
)
from softmax_jax.benchmark.traffic import PLAIN_JIT

SPEED = Path(__file__).parents[2] / "docs" / "speed.md"
LOGITS = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
BYTES = 4 * 512 * 1024


def run(capsys, *argv):
  """The exit code, stdout and stderr of `softmax-jax benchmark ARGV`."""
  return commands.run(capsys, "benchmark", *argv)


@pytest.fixture
def cpu_as_target(monkeypatch):
  """Programs for a target are compiled for the CPU."""
  monkeypatch.setattr(targets, "require", lambda target: None)
  monkeypatch.setattr(targets, "devices", lambda target: tuple(jax.devices("cpu")))
  monkeypatch.setattr(targets, "compiler", lambda target: {"compiler": "1.0"})


def line(suite="softmax", function="softmax", mode=VJP, shape=(2048, 1024)):
  return suites.Line(suite, function, mode, shape)


# --- the least possible --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("function", "mode", "rows_that_fit", "long_rows"),
  [
    ("softmax", FORWARD, (1, 1), (2, 1)),
    ("softmax", VJP, (2, 2), (4, 2)),
    ("log_softmax", FORWARD, (1, 1), (2, 1)),
    ("log_softmax", VJP, (2, 2), (4, 2)),
    ("logsumexp", FORWARD, (1, 0), (1, 0)),
    ("logsumexp", VJP, (1, 1), (2, 1)),
    (INTEGER, LOSS, (1, 0), (1, 0)),
    (INTEGER, GRADIENT, (1, 1), (2, 1)),
    (SOFT, LOSS, (2, 0), (2, 0)),
    (SOFT, GRADIENT, (2, 1), (4, 1)),
  ],
)
def test_the_least_possible(function, mode, rows_that_fit, long_rows):
  least = lambda classes, target: traffic.least(
    line("any", function, mode, (2048, classes)), target
  )
  assert least(16384, "h100") == least(131072, "v6e") == rows_that_fit
  assert least(32768, "h100") == least(131073, "v6e") == long_rows


def test_of_the_linear_loss_nothing_is_known():
  assert traffic.least(line("linear", LINEAR, LOSS, (8, 4, 5)), "h100") is None


# --- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_are_those_of_the_arguments(dtype):
  for suite in suites.NAMES:
    shape = (8, 4, 5) if suite == "linear" else (8, 5)
    for each in suites.lines(suite, [shape]):
      arguments = suites.arguments(each, jnp.dtype(dtype), 0)
      shapes = suites.shapes_of_arguments(each, jnp.dtype(dtype))
      assert [(x.shape, x.dtype) for x in arguments] == [(x.shape, x.dtype) for x in shapes]


@pytest.mark.without("disable_jit")
def test_traffic_of_a_program(cpu_as_target):
  found = traffic.traffic("h100", lambda x, y: (x + y, y), LOGITS, LOGITS)
  assert found.largest_argument == BYTES
  assert found.reads >= 2 * BYTES and found.writes >= BYTES
  assert found.kernels >= 1 and found.temp_bytes >= 0
  assert found.cycles is None and not found.hidden
  assert (found.collectives, found.exchanges, found.exchanged_bytes) == ((), 0, 0)
  assert traffic.traffic("v6e", jnp.negative, LOGITS).cycles == 0


@pytest.mark.without("disable_jit")
@pytest.mark.parametrize("suite", suites.NAMES)
def test_classes_are_spread_out_over_devices(suite, cpu_as_target):
  shape = (16, 8, 64) if suite == "linear" else (16, 64)
  for each in suites.lines(suite, [shape]):
    if each.mode in (FORWARD, LOSS):
      continue
    found = traffic.measure(each, "h100", ["jax.nn", "optax"], jnp.dtype("float32"), devices=8)
    assert found["unable"] == {}
    assert set(found["costs"]) == {OURS, PLAIN_JIT, programs.peers_of(each.function)[0]}
    if suite != "linear":
      assert found["logits_bytes"] == 4 * 16 * 64 // 8
    collectives = found["costs"][OURS]["collectives"]
    # Of the largest logit and of a few numbers per row; a VJP adds its sums.
    assert 2 <= len(collectives) <= 6
    assert all(c["kind"] == "all-reduce" and c["runs"] == 1 for c in collectives)
    assert all(c["bytes"] <= 4 * 16 * 8 for c in collectives)


def test_what_does_not_compile_is_told(cpu_as_target, capsys, monkeypatch):
  compiled = targets.compiled

  def fail(target, f, *shapes):
    if shapes[0].shape == (8, 6):
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")
    return compiled(target, f, *shapes)

  monkeypatch.setattr(targets, "compiled", fail)
  argv = ("--target", "h100", "--suite", "losses", "--shapes", "8x6", "--peers", "optax")
  code, out, err = run(capsys, *argv, "--dtype", "bfloat16")
  assert (code, err) == (0, "")
  for name in ("ours", "optax"):
    assert f"{name} cannot do integer 8x6 bfloat16: RESOURCE_EXHAUSTED: out of memory\n" in out
  assert run(capsys, *argv, "--markdown")[0] == 0


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_the_report_in_every_form(devices, cpu_as_target, capsys, tmp_path, monkeypatch):
  def without_compiling(target, f, *shapes):
    unit = max(shape.size * shape.dtype.itemsize for shape in shapes)
    exchanged = (traffic.Collective("all-reduce", 2, 4096),) * (devices > 1)
    return traffic.Traffic(3 * unit, unit, 4, 0, 123456, exchanged, False, unit)

  monkeypatch.setattr(traffic, "traffic", without_compiling)
  notes = tmp_path / "notes.md"
  marker = "<!-- benchmark: {}, v6e -->\nold\n<!-- end -->\n"
  notes.write_text("before\n" + "".join(map(marker.format, suites.NAMES)) + "after\n")
  argv = ["--target", "v6e", "--shapes", "16x64", "8x4x64", "--suite", *suites.NAMES]
  argv += ["--peers", "jax.nn", "optax", "--devices", str(devices)]
  code, out, err = run(capsys, *argv, "--json", "--update", str(notes))
  assert (code, err) == (0, "")
  result = strict_json(out)
  assert (result["platform"], result["devices"]) == ("v6e", devices)
  assert result["dtypes"] == ["float32", "bfloat16"]
  assert result["versions"]["compiler"] == "1.0"
  counts = {suite: len(part["lines"]) for suite, part in result["suites"].items()}
  assert counts == {"softmax": 12, "losses": 8, "divergences": 8, "linear": 4}
  for suite, part in result["suites"].items():
    for each in part["lines"]:
      assert each["dtype"] in result["dtypes"] and each["unable"] == {}
      assert (each["least"] is None) == (suite == "linear" or devices > 1)
      for cost in each["costs"].values():
        assert len(cost["collectives"]) == (devices > 1)

  text = notes.read_text()
  assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
  for suite in suites.NAMES:
    assert traffic_report.markdown(result, suite) in text
  traffic_report.print_tables(result)
  out = capsys.readouterr().out
  assert "…" not in out and max(map(len, out.splitlines()[1:])) <= 120
  assert ("collectives" in out) == ("plain jit" in out) == ("least" not in out) == (devices > 1)
  for word in ("log_softmax + vjp", "integer + grad", "linear + grad", "Mcycles"):
    assert word in out


def test_only_what_was_asked_for(cpu_as_target, capsys):
  argv = ("--target", "h100", "--suite", "softmax", "--shapes", "16x64", "--dtype", "bfloat16")
  code, out, err = run(capsys, *argv, "--peers", "none", "--json")
  assert (code, err) == (0, "")
  result = strict_json(out)
  assert (result["dtypes"], result["peers"], list(result["suites"])) == (
    ["bfloat16"],
    [],
    ["softmax"],
  )
  lines = result["suites"]["softmax"]["lines"]
  assert len(lines) == 6
  assert all(set(each["costs"]) == {OURS} for each in lines)
  assert {each["logits_bytes"] for each in lines} == {2 * 16 * 64}


def made_up(dtypes, **costs):
  """A report of softmax in both modes on two shapes; costs are in arrays of the logits' size."""
  lines = []
  for mode in (FORWARD, VJP):
    for shape in ((8192, 128), (4096, 131072)):
      for dtype in dtypes:
        unit = shape[0] * shape[1] * jnp.dtype(dtype).itemsize
        each = line(mode=mode, shape=shape)
        found = {
          name: {
            "reads": cost[0] * unit,
            "writes": cost[1] * unit,
            "kernels": 3,
            "temp_bytes": (cost[2] if dtype == "bfloat16" else 0) * unit,
            "cycles": None,
            "collectives": [{"kind": "all-reduce", "runs": 2, "bytes": 20480}],
            "hidden": False,
          }
          for name, cost in costs.items()
        }
        lines.append(
          each._asdict()
          | {"shape": list(shape), "dtype": dtype, "logits_bytes": unit, "costs": found}
          | {"least": traffic.least(each, "h100"), "unable": {}}
        )
  return {
    "date": "2026-11-27T00:00:00+00:00",
    "platform": "h100",
    "device": "NVIDIA H100",
    "devices": 1,
    "versions": {"jax": "1.2.3"},
    "suites": {"softmax": {"lines": lines}},
  }


def test_markdown_has_a_row_for_the_dtypes_that_agree():
  costs = {OURS: (10, 2.4, 0), "jax.nn": (3.14, 1, 0.04)}
  text = traffic_report.markdown(made_up(["float32", "bfloat16"], **costs), "softmax")
  assert text == (
    "Arrays of the logits' size read/written (+temporaries): ours; jax.nn; least possible. "
    "2026-11-27, compiled for one device of NVIDIA H100; jax 1.2.3.\n\n"
    "| | 8192x128 | 4096x131072 |\n| --- | --- | --- |\n"
    "| softmax | 10/2.5; 3/1; 1/1 | 10/2.5; 3/1; 2/1 |\n"
    "| softmax + vjp | 10/2.5; 3/1; 2/2 | 10/2.5; 3/1; 4/2 |"
  )
  costs["jax.nn"] = (3, 1, 2)
  text = traffic_report.markdown(made_up(["float32", "bfloat16"], **costs), "softmax")
  assert "| softmax, float32 | 10/2.5; 3/1; 1/1 |" in text
  assert "| softmax, bfloat16 | 10/2.5; 3/1 (+2); 1/1 |" in text
  assert "| softmax + vjp, float32 |" in text


def test_collectives_in_bytes():
  result = made_up(["float32"], **{OURS: (3, 1, 0)})
  result["devices"] = 8
  assert "| softmax | 2: 41.0 kB | 2: 41.0 kB |" in traffic_report.markdown(result, "softmax")
  each = result["suites"]["softmax"]["lines"][0]
  for runs, size, shown in (
    (136, 10**8, "136: 13.6 GB"),
    (1, 2 * 10**6, "1: 2.00 MB"),
    (0, 0, "0: 0 kB"),
  ):
    each["costs"][OURS]["collectives"] = [{"kind": "all-gather", "runs": runs, "bytes": size}]
    assert traffic_report._exchanges(OURS, each) == shown


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--target", "h300"], "'h300' is not one of"),
    (["--devices", "8"], "--devices is for --target"),
    (["--target", "v6e", "--devices", "9"], "9 is not in the range 1<=x<=8"),
    *(
      (["--target", "h100", *option.split()], "with --target nothing is run")
      for option in ("--rounds 9", "--seconds 1", "--scale 2", "--seed 1", "--suite accuracy")
    ),
    (["--target", "h100", "--peers", "torch"], "--peers: with --target these are jax.nn, optax"),
    (
      ["--target", "h100", "--suite", "softmax", "linear", "--shapes", "4x5x6"],
      "the softmax suite needs one ROWSxCLASSES",
    ),
  ],
)
def test_errors_take_one_line(argv, message, capsys):
  commands.assert_error_of_one_line(run(capsys, *argv), "benchmark", message)


@pytest.mark.parametrize(
  ("target", "missing", "command"),
  [
    ("v6e", "libtpu", 'pip install "jax[tpu]"'),
    ("h100", "jax_plugins", f"pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=="),
  ],
)
def test_says_what_to_install(target, missing, command, capsys, monkeypatch):
  find = importlib.util.find_spec
  hide = lambda name, *rest: None if name.startswith(missing) else find(name, *rest)
  monkeypatch.setattr(importlib.util, "find_spec", hide)
  targets.devices.cache_clear()
  code, out, err = run(capsys, "--target", target)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert "Invalid value for --target: " in err and command in err


def test_a_missing_marker_is_an_error_before_the_work(cpu_as_target, capsys, tmp_path):
  notes = tmp_path / "notes.md"
  notes.write_text("<!-- benchmark: softmax, cpu -->\n<!-- end -->\n")
  code, out, err = run(capsys, "--target", "a100", "--update", str(notes))
  assert (code, out) == (2, "")
  assert "has no <!-- benchmark: softmax, a100 --> followed by <!-- end -->" in err


def test_descriptions_are_cut_out_of_the_plugin(monkeypatch, tmp_path):
  library = tmp_path / "xla_cuda13" / "xla_cuda_plugin.so"
  library.parent.mkdir()
  text = 'gpu_device_info {{\n  core_count: {}\n}}\nplatform_name: "CUDA"\n'
  text += 'device_description_str: "{}"\n'
  parts = [text.format(n, name).encode() for n, name in ((132, "H (SXM)"), (78, "H (SXM) MIG"))]
  library.write_bytes(b"\x7fELF\0".join([b"\0", *parts, b"\0"]))
  monkeypatch.setattr(targets, "_cuda_plugin", lambda: library)
  assert targets._description("H (SXM)") == parts[0].decode()
  assert targets._description("H (SXM) MIG") == parts[1].decode()
  with pytest.raises(targets.MissingError, match="does not describe the H"):
    targets._description("H")
  assert targets.compiler("h100") == {
    "jax-cuda13-pjrt": targets.compiler("h100")["jax-cuda13-pjrt"]
  }


@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_a_plugin_of_another_version_is_an_error(target, capsys, monkeypatch):
  def fail(*args, **options):
    raise RuntimeError("INTERNAL: another version\nand much more")

  monkeypatch.setattr(targets, "require", lambda target: None)
  monkeypatch.setattr(targets, "compiler", lambda target: {"plugin": "1.0"})
  monkeypatch.setattr(targets, "_description", lambda name: "")
  monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)
  targets.devices.cache_clear()
  code, out, err = run(capsys, "--target", target)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert f"plugin 1.0 does not do for jax {jax.__version__}: INTERNAL: another version" in err


def test_no_setting_of_jax_is_left_behind():
  settings = lambda: (jax.config.jax_platforms, jax.config.jax_enable_compilation_cache)
  before = settings()
  with pytest.raises(KeyError), targets.on_no_device(), targets.without_cache():
    assert settings() == ("cpu", False)
    raise KeyError
  assert settings() == before


@pytest.mark.skipif(not SPEED.exists(), reason="the site is not beside the tests")
def test_the_commands_of_the_site_find_their_places(monkeypatch):
  monkeypatch.chdir(SPEED.parents[1])
  text = SPEED.read_text(encoding="utf-8")
  found = re.findall(r"`softmax-jax benchmark( --target [^`]*--update [^`]*)`", text)
  assert found
  for command in found:
    options = benchmark.command.make_context("benchmark", command.split()).params
    assert options["update"].samefile(SPEED)
    for target in ("h100", "v6e"):
      assert report.missing_marker({"platform": target}, options["suite"], text) is None


# --- compiled for a target -----------------------------------------------------------------------


@pytest.fixture(params=targets.NAMES)
def target(request):
  return required(request.param)


@pytest.mark.long
@pytest.mark.without("disable_jit")
def test_traffic_on_every_target(target):
  assert len(targets.devices(target)) == 8
  shape = jax.ShapeDtypeStruct((4096, 32768), jnp.float32)  # Larger than what fits on a chip.
  unit = 4 * 4096 * 32768
  one = traffic.traffic(target, jnp.negative, shape)
  assert (one.reads, one.writes, one.kernels, one.temp_bytes) == (unit, unit, 1, 0)
  rows = traffic.traffic(target, lambda x: jnp.sum(x, axis=-1), shape)
  assert rows.reads == pytest.approx(unit, rel=1e-2)
  assert rows.writes < unit / 100
  assert (one.cycles is None) == (target in targets.GPUS)

  def many(x):  # Each round reads and writes all of it.
    barrier = jax.lax.optimization_barrier
    return jax.lax.fori_loop(0, 5, lambda _, y: barrier(jnp.sin(y)), x)

  looped = traffic.traffic(target, many, shape)
  assert 5 * unit <= looped.reads <= 7 * unit
  assert 5 * unit <= looped.writes <= 7 * unit


@pytest.mark.long
@pytest.mark.without("disable_jit")
@pytest.mark.parametrize("target", ["h100", "v6e"], indirect=True)
def test_every_program_of_the_command(target, capsys):
  argv = ("--target", target, "--shapes", "512x1024", "512x256x1024", "--suite", *suites.NAMES)
  code, out, _ = run(capsys, *argv, "--dtype", "bfloat16", "--json")
  assert code == 0
  for part in json.loads(out)["suites"].values():
    for each in part["lines"]:
      assert OURS in each["costs"] and set(each["unable"]) <= {"tokamax"}
      if each["suite"] != "linear":
        cost = each["costs"][OURS]
        # A few passes, and the outputs at least.
        assert cost["reads"] < 16 * each["logits_bytes"]
        assert cost["writes"] > 0.9 * each["least"][1] * each["logits_bytes"] - 2**14


@pytest.mark.long
@pytest.mark.without("disable_jit")
def test_devices_exchange_numbers_per_row(target):
  each = line(function="logsumexp", mode=FORWARD, shape=(512, 8192))
  found = traffic.measure(each, target, ["jax.nn"], jnp.dtype("float32"), devices=8)
  assert set(found["costs"]) == {OURS, "plain jit", "jax.nn"}
  for name, cost in found["costs"].items():
    kinds = [one["kind"] for one in cost["collectives"]]
    if name == "plain jit":  # gathers what each device knows of a row: three numbers
      assert set(kinds) == {"all-gather"}
      most = 8 * 3 * 4 * 512
    else:
      assert kinds == ["all-reduce"] * 2
      most = 4 * 4 * 512
    assert 0 < sum(one["bytes"] for one in cost["collectives"]) <= most
  assert np.isclose(found["logits_bytes"], 4 * 512 * 8192 / 8)
