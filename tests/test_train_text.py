"""`softmax-jax train --task text`: what is read, learnt, measured, printed and drawn."""

import contextlib
import io
import json
import math
import struct
import sys
import sysconfig
import types
import zlib

import collectives
import commands
import jax
import numpy as np
import optax
import pytest

from softmax_jax import train
from softmax_jax.__main__ import main
from softmax_jax.train import text as task

SMALL = {
  "steps": 60,
  "batch_size": 256,
  "vocabulary": 1000,
  "chunk_size": 64,
  "learning_rate": 3e-3,
  "seed": 0,
}


def options(**other):
  return types.SimpleNamespace(**{**SMALL, **other})


def run(capsys, *argv):
  """The exit code, stdout and stderr of `softmax-jax train --task text ARGV`."""
  return commands.run(capsys, "train", "--task", "text", *argv)


def command(**other):
  names = {**SMALL, **other}
  return [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]


@pytest.fixture(scope="module", autouse=True)
def less_text():
  """The first words that the seed finds, for the sake of time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, "_MOST_WORDS", 150_000)
    patch.setattr(task, "_MOST_TEST_WORDS", 1024)
    yield


@pytest.fixture(scope="module")
def text():
  return task._read_text(0, SMALL["vocabulary"])


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
  """A run that passes: its exit code, report, stderr and picture."""
  picture = tmp_path_factory.mktemp("train") / "picture.png"
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main(["train", "--task", "text", *command(), "--json", "--plot", str(picture)])
  return code, json.loads(out.getvalue()), err.getvalue(), picture


# --- a run that passes ---------------------------------------------------------------------------


def test_passes(passed, text):
  code, report, err, picture = passed
  assert (code, err, report["failures"]) == (0, "", [])
  assert {name: report[name] for name in SMALL} == SMALL
  assert report["train_words"] == len(text.train_words)
  assert report["test_words"] == 1024
  assert report["plot"] == str(picture)
  assert report["words_per_second"] == pytest.approx(256 * report["steps_per_second"])
  assert report["training_seconds"] < report["total_seconds"]


def test_perplexity_falls_below_that_of_the_frequencies(passed):
  _, report, _, _ = passed
  vocabulary = SMALL["vocabulary"]
  # A zero last layer calls every class equally likely.
  assert report["initial_test_perplexity"] == pytest.approx(vocabulary, rel=1e-4)
  assert report["initial_train_perplexity"] == pytest.approx(vocabulary, rel=1e-4)
  assert 1 < report["test_perplexity"] < 0.8 * report["unigram_perplexity"]
  assert 1 < report["train_perplexity"] < 0.8 * report["unigram_perplexity"]
  steps, perplexities = zip(*report["test_curve"], strict=True)
  assert (steps[0], steps[-1]) == (0, SMALL["steps"])
  assert list(steps) == sorted(set(steps))
  assert perplexities[0] == report["initial_test_perplexity"]
  assert perplexities[-1] == report["test_perplexity"]


def test_draws_a_picture(passed):
  from matplotlib.image import imread

  picture = passed[3]
  assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1800, 760)
  for panel in np.split(imread(picture)[..., :3], 2, axis=1):
    assert panel.min() < 0.3
    assert np.ptp(panel, axis=-1).max() > 0.3


def test_picture_shows_the_numbers(passed, tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  figures = []
  monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
  curves = np.array([[1, 9.0], [2, 8.0]]), np.array([[0, 10.0], [2, 7.0]])
  task._draw(tmp_path / "a.png", task._Training(None, *curves, {}), passed[1])
  perplexity, bars = figures[0].axes
  batches, test, unigram = (line.get_ydata() for line in perplexity.lines)
  assert (list(batches), list(test)) == ([9, 8], [10, 7])
  assert set(unigram) == {passed[1]["unigram_perplexity"]}
  for place, name in enumerate(("linear", "dense")):
    memory = passed[1]["memory_bytes"][name]
    lower, upper = bars.patches[place], bars.patches[2 + place]
    assert lower.get_height() == upper.get_y()
    assert upper.get_height() == pytest.approx(memory["temporary"] / 1e6)
    assert upper.get_y() + upper.get_height() == pytest.approx(memory["total"] / 1e6)


def test_prints_tables(passed, capsys):
  task.print_tables(passed[1])
  out = " ".join(capsys.readouterr().out.split())
  memory = passed[1]["memory_bytes"]
  for shown in (
    f"{passed[1]['test_perplexity']:,.1f}",
    f"The word frequencies alone: {passed[1]['unigram_perplexity']:,.1f}.",
    f"{passed[1]['train_perplexity']:,.1f} in the last tenth",
    f"{memory['linear']['total'] / 1e6:,.1f}",
    f"{memory['dense']['total'] / 1e6:,.1f}",
    f"{memory['dense']['temporary'] / 1e6:,.1f}",
    "words per second",
    "Picture: ",
    "Passed: ",
  ):
    assert shown in out


# --- the text ------------------------------------------------------------------------------------


def test_default_vocabulary():
  assert train.text.DEFAULTS["vocabulary"] == task.VOCABULARY >= 32768


def test_reads_the_standard_library_alone(monkeypatch, tmp_path):
  library = tmp_path / "lib"
  (library / "site-packages").mkdir(parents=True)
  (library / "package").mkdir()
  for name in ("b.py", "package/a.py", "site-packages/c.py", "notes.txt"):
    (library / name).write_text("pass\n")
  (tmp_path / "outside.py").write_text("pass\n")
  (library / "link.py").symlink_to(tmp_path / "outside.py")
  assert task._files(library) == [library / "b.py", library / "package/a.py"]

  folders = []
  monkeypatch.setattr(task, "_files", lambda folder: folders.append(folder) or [])
  with pytest.raises(Exception, match="too little text"):
    task._read_text(0, 100)
  assert [str(folder) for folder in folders] == [sysconfig.get_path("stdlib")]


def words_of(monkeypatch, tmp_path, files, **limits):
  """What is read of files with these texts."""
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  for name, value in limits.items():
    monkeypatch.setattr(task, name, value)
  for i, contents in enumerate(files):
    (tmp_path / f"file{i}.py").write_bytes(contents)
  return task._read_text(3, 5000)


def test_words_are_hashed(monkeypatch, tmp_path):
  source = b"if x1:\n  \xff = 'a b'\n"
  text = words_of(monkeypatch, tmp_path, [source, source], _LEAST_WORDS=1)
  words = ["if", "x1", ":", "\n  ", "\ufffd", "=", "'", "a", "b", "'", "\n", ""]
  expected = [zlib.crc32(word.encode()) % 5000 for word in words]
  assert text.train_words.tolist() == text.test_words.tolist() == expected
  assert text.test_positions.tolist() == list(range(task._CONTEXT, len(words)))
  assert (text.train_files, text.test_files) == (1, 1)
  assert text.different_words == len(set(words))


def test_one_file_in_twenty_is_held_out(monkeypatch, tmp_path):
  files = [f"word{i} = {i}\n".encode() * 3 for i in range(41)]
  text = words_of(monkeypatch, tmp_path, files, _LEAST_WORDS=1)
  assert (text.train_files, text.test_files) == (38, 3)
  names = {zlib.crc32(f"word{i}".encode()) % 5000: i for i in range(41)}
  held_out, learnt = (
    {names[word] for word in words.tolist() if word in names}
    for words in (text.test_words, text.train_words)
  )
  assert (len(held_out), len(learnt)) == (3, 38)
  assert not held_out & learnt
  # No more is read than is needed.
  text = words_of(monkeypatch, tmp_path, files, _LEAST_WORDS=1, _MOST_WORDS=50)
  assert 50 <= len(text.train_words) + len(text.test_words) < 50 + 13


def test_unigram_perplexity():
  train_words, test_words = np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1])
  text = task._Text(train_words, test_words, np.array([2, 3]), 1, 1, 3)
  # Counts 3, 1, 0 and 0, each one more: of the two test words, 0 has 4 in 8 and 1 has 2 in 8.
  assert task._unigram_perplexity(text, 4) == pytest.approx(math.sqrt(2 * 4))


# --- the training --------------------------------------------------------------------------------


def test_seed_decides_everything(passed, text):
  shown = []
  again = task._train(options(), text, task._mesh(1), lambda *words: shown.append(words))
  for name in ("test_curve", "train_perplexity"):
    assert json.loads(json.dumps(again.summary[name])) == passed[1][name]
  assert [done for done, _ in shown] == list(range(1, SMALL["steps"] + 1))
  assert shown[0][1].startswith("perplexity 1000, test 1000")
  last = again.train_curve[-1, 1], again.test_curve[-1, 1]
  assert shown[-1][1] == "perplexity {:.0f}, test {:.0f}".format(*last)


def seeded_weights():
  weights = task._initial_weights(jax.random.key(1), 50)
  head = jax.random.normal(jax.random.key(2), weights.head.shape) / 100
  return weights._replace(head=head, bias=head[:, 0])


def test_a_prediction_sees_the_words_before_it_and_no_other():
  weights = seeded_weights()
  words = np.arange(20, dtype=np.int32)
  position = np.array([10], np.int32)
  features = task._features(weights, words, position)
  for place in range(20):
    changed = words.copy()
    changed[place] = 40
    same = np.array_equal(features, task._features(weights, changed, position))
    assert same == (place not in range(10 - task._CONTEXT, 10)), place


def test_loss_is_that_of_float64():
  weights = seeded_weights()
  words = np.random.default_rng(0).integers(0, 50, 200).astype(np.int32)
  positions = np.arange(4, 104, dtype=np.int32)
  features = np.float64(task._features(weights, words, positions))
  logits = features @ np.float64(weights.head).T + np.float64(weights.bias)
  expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(100), words[positions]])
  for cross_entropy in (task._linear(32, 50, task._mesh(1)), task._dense(50)):
    loss = task._loss(cross_entropy, weights, words, positions)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.without("debug_nans")
def test_step_donates_and_its_memory_is_that_of_the_program(passed, text):
  """With all in bytes by hand: donated once, the words, the positions, and what XLA adds."""
  optimizer = optax.sgd(0.1)
  weights = task._initial_weights(jax.random.key(0), 1000)
  state = (weights, optimizer.init(weights))
  positions = np.arange(4, 260, dtype=np.int32)
  memory = {}
  losses = {"linear": task._linear(64, 1000, task._mesh(1)), "dense": task._dense(1000)}
  for name, cross_entropy in losses.items():
    step = task._compiled_step(optimizer, cross_entropy, state, text.train_words, positions)
    memory[name] = task._bytes(step)
    sizes = step.memory_analysis()
    assert memory[name]["temporary"] == sizes.temp_size_in_bytes > 0
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    arguments = state_bytes + text.train_words.nbytes + positions.nbytes
    around = memory[name]["total"] - memory[name]["temporary"] - arguments
    assert 0 <= around < 1024  # The loss, and pointers to all results.
  # The logits of all words, and all that has their size, against those of a chunk.
  saved = memory["dense"]["temporary"] - memory["linear"]["temporary"]
  assert saved > 4 * 1000 * (256 - 64)
  assert passed[1]["memory_bytes"]["logits"] == 4 * 1000 * 256
  reported = passed[1]["memory_bytes"]
  assert reported["linear"]["temporary"] < reported["dense"]["temporary"]

  step(state, text.train_words, positions)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


# --- several devices -----------------------------------------------------------------------------


@pytest.mark.long
def test_losses_on_several_devices_are_those_on_one(text):
  """Three devices do not divide 1000 classes."""
  curves, memory = [], []
  for count in (1, 3, 8):
    trained = task._train(options(steps=8, devices=count), text, task._mesh(count), lambda *_: None)
    curves.append(np.log(trained.train_curve[:, 1]))
    memory.append(trained.summary["memory_bytes"]["linear"]["total"])
    head = trained.weights.head
    assert head.addressable_shards[0].data.shape[0] == -(-1000 // count)
  for curve in curves[1:]:
    np.testing.assert_allclose(curve, curves[0], rtol=2e-6)
  assert memory[0] > memory[1] > memory[2]


def test_a_step_on_a_mesh_sends_no_logits_and_nothing_of_the_size_of_the_classes(text):
  mesh, optimizer = task._mesh(8), optax.adam(0.1)
  weights = jax.eval_shape(lambda: task._initial_weights(jax.random.key(0), 1000))
  state = weights, jax.eval_shape(optimizer.init, weights)
  spread = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(spread, state, task._shardings(state, mesh))
  linear = task._linear(256, 1000, mesh)
  step = task._compiled_step(
    optimizer, linear, state, text.train_words, np.arange(4, 260, dtype=np.int32)
  )
  program = collectives.found_in(step.as_text())
  assert {kind for kind, _ in program} == {"all-reduce"}
  sizes = {size for _, shapes in program for shape in shapes for size in shape}
  assert not sizes & {1000, 125}


def test_more_devices_than_there_are_is_bad_usage(capsys):
  code, out, err = run(capsys, *command(devices=9))
  assert (code, out) == (2, "")
  assert "argument --devices: expected at most 8, the devices that JAX has, got 9" in err
  code, _, err = commands.run(capsys, "train", "--devices=2")
  assert code == 2
  assert "argument --devices: only with --task text" in err


# --- what is refused, and what fails -------------------------------------------------------------


def test_a_perplexity_above_that_of_the_frequencies_fails(capsys, monkeypatch, passed):
  keys, initial_weights = [], task._initial_weights

  def watched_weights(key, *sizes):
    keys.append(key)
    return initial_weights(key, *sizes)

  monkeypatch.setattr(task, "_initial_weights", watched_weights)
  monkeypatch.setattr(task, "_unigram_perplexity", lambda *_: 2.0)
  code, out, err = run(capsys, *command(seed=1), "--json")
  report = json.loads(out)
  assert code == 1
  failure = (
    f"the test perplexity is {report['test_perplexity']:.1f}, not below that of the word "
    "frequencies, 2.0; try more --steps"
  )
  assert report["failures"] == [failure]
  assert err == f"softmax-jax train: failed: {failure}\n"
  # Another seed, another training.
  for name in ("train_words", "train_perplexity", "test_perplexity"):
    assert report[name] != passed[1][name]
  assert keys
  assert all(key == jax.random.key(1) for key in keys)


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_diverging_training_fails(perplexity):
  report = {"test_perplexity": perplexity, "unigram_perplexity": 100.0}
  assert task._failures(report) == ["the training diverged; try a smaller --learning-rate"]


def test_perplexity_of_a_huge_loss():
  assert task._perplexity(1e4) == math.inf
  assert math.isnan(task._perplexity(math.nan))
  assert task._perplexity(math.log(7)) == pytest.approx(7)


def test_too_little_text(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  (tmp_path / "only.py").write_text("x = 1\n")
  assert run(capsys) == (
    2,
    "",
    f"softmax-jax train: error: too little text: 5 words in 1 Python files of {tmp_path}, where "
    "the standard library should be; at least 10000 in 2 are needed\n",
  )
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
  code, _, err = run(capsys)
  assert (code, err.count("\n")) == (2, 1)
  assert "too little text: 0 words in 0 Python files" in err


@pytest.mark.parametrize(
  "words, message",
  [
    ("--vocabulary=1", "argument --vocabulary: expected a whole number from 2 to 1000000, got '1'"),
    ("--chunk-size=0", "argument --chunk-size: expected a whole number from 1 to 1000000, got '0'"),
    ("--batch-size=999999", "argument --batch-size: expected at most "),
    ("--task=digits --vocabulary=9", "argument --vocabulary: only with --task text"),
    ("--task=digits --chunk-size=9", "argument --chunk-size: only with --task text"),
    ("--task=poems", "argument --task: invalid choice: "),
  ],
)
def test_bad_values(capsys, monkeypatch, words, message):
  monkeypatch.setattr(task, "_train", lambda *_: pytest.fail("trained before the check"))
  code, out, err = run(capsys, *words.split())
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith(f"softmax-jax train: error: {message}")


@pytest.mark.parametrize("extra", ["optax", "rich", "matplotlib"])
def test_missing_extra(capsys, monkeypatch, tmp_path, extra):
  monkeypatch.setitem(sys.modules, extra, None)  # This makes the import fail.
  monkeypatch.setattr(task, "_read_text", lambda *_: pytest.fail("started before the check"))
  code, _, err = run(capsys, "--plot", str(tmp_path / "a.png"))
  assert code == 2
  assert err.startswith(f"softmax-jax train: error: {extra} is missing; install the extra ")


def test_needs_no_scikit_learn(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  monkeypatch.setattr(task, "_train", lambda *_: pytest.fail("far enough", pytrace=False))
  with pytest.raises(pytest.fail.Exception, match="far enough"):
    main(["train", "--task", "text"])


def test_interrupt(capsys, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(task, "_train", interrupted)
  assert run(capsys) == (130, "", "\nsoftmax-jax: interrupted\n")
