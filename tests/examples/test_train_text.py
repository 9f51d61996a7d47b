"""`examples/train_text.py`: what is read, learnt, measured and printed."""

import math
import re
import sysconfig
import zlib

import collectives
import jax
import numpy as np
import optax
import pytest
from train_text_script import SMALL, options, run, task


@pytest.fixture(scope="module", autouse=True)
def less_text():
  """Measures on fewer words, to save time; on all devices of the tests."""
  jax.devices()  # From here on their number is fixed.
  # The script compiles its step ahead of time.
  with pytest.MonkeyPatch.context() as patch, jax.disable_jit(False):
    patch.setattr(task, "MOST_TEST_WORDS", 1024)
    yield


@pytest.fixture(scope="module")
def text():
  return task.read_text(0, SMALL["vocabulary"], SMALL["words"])


@pytest.fixture(scope="module")
def trained(text):
  """A training, and the lines that tell how far it is."""
  lines = []
  return task.train(options(), text, task.devices_of(1), lines.append), lines


# --- a training ----------------------------------------------------------------------------------


def test_perplexity_falls_below_that_of_the_frequencies(trained, text):
  training, _ = trained
  vocabulary, unigram = SMALL["vocabulary"], task.unigram_perplexity(text, SMALL["vocabulary"])
  # A zero last layer calls every class equally likely.
  assert training.test_curve[0, 1] == pytest.approx(vocabulary, rel=1e-4)
  assert training.train_curve[0, 1] == pytest.approx(vocabulary, rel=1e-4)
  assert 1 < training.test_curve[-1, 1] < 0.8 * unigram
  assert 1 < training.train_curve[-6:, 1].mean() < 0.8 * unigram
  assert training.train_curve[:, 0].tolist() == list(range(1, SMALL["steps"] + 1))
  assert training.test_curve[:, 0].tolist() == [0, 1, *range(6, SMALL["steps"] + 1, 6)]


def test_tells_how_far_it_is(trained):
  training, lines = trained
  megabytes = re.fullmatch(r"memory of a step, .*: (\d) MB; with .* logits, (\d) MB", lines[0])
  assert int(megabytes[1]) < int(megabytes[2])
  assert lines[1] == "step 0: perplexity of held-out words 1,000.0"
  for line, (step, perplexity) in zip(lines[2:], training.test_curve[1:], strict=True):
    batch = training.train_curve[int(step) - 1, 1]
    assert line.startswith(
      f"step {step:.0f}: loss {math.log(batch):.6f}, perplexity {batch:,.1f}, "
      f"of held-out words {perplexity:,.1f}; "
    )
    assert re.search(r"; [\d,]+ words per second$", line)


def test_the_script(capsys, trained, text):
  code, out, err = run(capsys)
  assert (code, err) == (0, "")
  lines = out.splitlines()
  numbers = [len(text.train_words), text.train_files, 1024, text.test_files]
  assert [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", lines[0])] == numbers
  assert [line.partition(";")[0] for line in lines[2:-1]] == [
    line.partition(";")[0] for line in trained[1][1:]
  ]
  unigram = task.unigram_perplexity(text, SMALL["vocabulary"])
  assert lines[-1] == f"the word frequencies alone: perplexity {unigram:,.1f}"


# --- the text ------------------------------------------------------------------------------------


def test_default_vocabulary():
  assert task.options().parse_args([]).vocabulary == 32768


def test_reads_the_standard_library_alone(monkeypatch, tmp_path):
  library = tmp_path / "lib"
  (library / "site-packages").mkdir(parents=True)
  (library / "package").mkdir()
  for name in ("b.py", "package/a.py", "site-packages/c.py", "notes.txt"):
    (library / name).write_text("pass\n")
  (tmp_path / "outside.py").write_text("pass\n")
  (library / "link.py").symlink_to(tmp_path / "outside.py")
  assert task.files_of(library) == [library / "b.py", library / "package/a.py"]

  folders = []
  monkeypatch.setattr(task, "files_of", lambda folder: folders.append(folder) or [])
  with pytest.raises(SystemExit, match="2"):
    task.read_text(0, 100, 1000)
  assert [str(folder) for folder in folders] == [sysconfig.get_path("stdlib")]


def words_of(monkeypatch, tmp_path, files, enough=10**6):
  """What is read of files with these texts."""
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  monkeypatch.setattr(task, "LEAST_WORDS", 1)
  for i, contents in enumerate(files):
    (tmp_path / f"file{i}.py").write_bytes(contents)
  return task.read_text(3, 5000, enough)


def test_words_are_hashed(monkeypatch, tmp_path):
  source = b"if x1:\n  \xff = 'a b'\n"
  text = words_of(monkeypatch, tmp_path, [source, source])
  words = ["if", "x1", ":", "\n  ", "\ufffd", "=", "'", "a", "b", "'", "\n", ""]
  expected = [zlib.crc32(word.encode()) % 5000 for word in words]
  assert text.train_words.tolist() == text.test_words.tolist() == expected
  assert text.test_positions.tolist() == list(range(task.CONTEXT, len(words)))
  assert (text.train_files, text.test_files) == (1, 1)


def test_one_file_in_twenty_is_held_out(monkeypatch, tmp_path):
  files = [f"word{i} = {i}\n".encode() * 3 for i in range(41)]
  text = words_of(monkeypatch, tmp_path, files)
  assert (text.train_files, text.test_files) == (38, 3)
  names = {zlib.crc32(f"word{i}".encode()) % 5000: i for i in range(41)}
  held_out, learnt = (
    {names[word] for word in words.tolist() if word in names}
    for words in (text.test_words, text.train_words)
  )
  assert (len(held_out), len(learnt)) == (3, 38)
  assert not held_out & learnt
  # No more is read than is needed.
  text = words_of(monkeypatch, tmp_path, files, enough=50)
  assert 50 <= len(text.train_words) + len(text.test_words) < 50 + 13


def test_unigram_perplexity():
  train_words, test_words = np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1])
  text = task.Text(train_words, test_words, np.array([2, 3]), 1, 1)
  # Counts 3, 1, 0 and 0, each one more: of the two test words, 0 has 4 in 8 and 1 has 2 in 8.
  assert task.unigram_perplexity(text, 4) == pytest.approx(math.sqrt(2 * 4))


# --- the training --------------------------------------------------------------------------------


def test_seed_decides_everything(trained, text):
  again = task.train(options(), text, task.devices_of(1), lambda _: None)
  np.testing.assert_array_equal(again.train_curve, trained[0].train_curve)
  np.testing.assert_array_equal(again.test_curve, trained[0].test_curve)


def seeded_weights():
  weights = task.initial_weights(jax.random.key(1), 50)
  head = jax.random.normal(jax.random.key(2), weights.head.shape) / 100
  return weights._replace(head=head, bias=head[:, 0])


def test_a_prediction_sees_the_words_before_it_and_no_other():
  weights = seeded_weights()
  words = np.arange(20, dtype=np.int32)
  position = np.array([10], np.int32)
  features = task.features_of(weights, words, position)
  for place in range(20):
    changed = words.copy()
    changed[place] = 40
    same = np.array_equal(features, task.features_of(weights, changed, position))
    assert same == (place not in range(10 - task.CONTEXT, 10)), place


def test_loss_is_that_of_float64():
  weights = seeded_weights()
  words = np.random.default_rng(0).integers(0, 50, 200).astype(np.int32)
  positions = np.arange(4, 104, dtype=np.int32)
  features = np.float64(task.features_of(weights, words, positions))
  logits = features @ np.float64(weights.head).T + np.float64(weights.bias)
  expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(100), words[positions]])
  for cross_entropy in (task.linear(32, 50, task.devices_of(1)), task.dense(50)):
    loss = task.loss_of(cross_entropy, weights, words, positions)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.without("debug_nans")
def test_step_donates_and_its_memory_is_that_of_the_program(trained, text):
  """With all in bytes by hand: donated once, the words, the positions, and what XLA adds."""
  optimizer = optax.sgd(0.1)
  weights = task.initial_weights(jax.random.key(0), 1000)
  state = (weights, optimizer.init(weights))
  positions = np.arange(4, 260, dtype=np.int32)
  temporary = []
  for cross_entropy in (task.linear(64, 1000, task.devices_of(1)), task.dense(1000)):
    step = task.compiled_step(optimizer, cross_entropy, state, text.train_words, positions)
    total, beside = task.bytes_of(step)
    temporary.append(beside)
    assert beside == step.memory_analysis().temp_size_in_bytes > 0
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    arguments = state_bytes + text.train_words.nbytes + positions.nbytes
    assert 0 <= total - beside - arguments < 1024  # The loss, and pointers to all results.
  # The logits of all words, and all that has their size, against those of a chunk.
  assert temporary[1] - temporary[0] > 4 * 1000 * (256 - 64)

  step(state, text.train_words, positions)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


# --- several devices -----------------------------------------------------------------------------


@pytest.mark.devices(8)
@pytest.mark.long
def test_losses_on_several_devices_are_those_on_one(text):
  """Three devices do not divide 1000 classes."""
  curves = []
  for processes, count in ((1, 1), (1, 3), (1, 8), (2, 4)):
    mesh = task.devices_of(count, processes)
    assert dict(mesh.shape) == {"data": processes, "vocab": count}
    trained = task.train(options(steps=8), text, mesh, lambda _: None)
    curves.append(np.log(trained.train_curve[:, 1]))
    head = trained.weights.head
    assert head.addressable_shards[0].data.shape[0] == -(-1000 // count)
  for curve in curves[1:]:
    np.testing.assert_allclose(curve, curves[0], rtol=2e-6)


@pytest.mark.devices(8)
def test_a_step_on_a_mesh_sends_no_logits_and_nothing_of_the_size_of_the_classes(text):
  mesh, optimizer = task.devices_of(8), optax.adam(0.1)
  weights = jax.eval_shape(lambda: task.initial_weights(jax.random.key(0), 1000))
  state = weights, jax.eval_shape(optimizer.init, weights)
  spread = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(spread, state, task.shardings_of(state, mesh))
  linear = task.linear(256, 1000, mesh)
  step = task.compiled_step(
    optimizer, linear, state, text.train_words, np.arange(4, 260, dtype=np.int32)
  )
  # Sums over "data", which has one device, send nothing. JAX versions print them differently.
  alone = re.compile(r"replica_groups=(\{\{0\},\{1\}|[^{]* \{'data'\})")
  lines = [line for line in step.as_text().splitlines() if not alone.search(line)]
  program = collectives.found_in("\n".join(lines))
  assert {kind for kind, _ in program} == {"all-reduce"}
  sizes = {size for _, shapes in program for shape in shapes for size in shape}
  assert not sizes & {1000, 125}


def test_more_devices_than_there_are_is_bad_usage(capsys):
  code, out, err = run(capsys, devices=9)
  assert (code, out) == (2, "")
  assert err == "error: --devices: expected at most 8, the devices that JAX has, got 9\n"


# --- what is refused, and what fails -------------------------------------------------------------


def test_a_perplexity_above_that_of_the_frequencies_fails(capsys, monkeypatch, trained):
  keys, initial_weights = [], task.initial_weights

  def watched_weights(key, *sizes):
    keys.append(key)
    return initial_weights(key, *sizes)

  monkeypatch.setattr(task, "initial_weights", watched_weights)
  monkeypatch.setattr(task, "unigram_perplexity", lambda *_: 2.0)
  code, out, err = run(capsys, seed=1)
  reached = re.findall(r"words ([\d.,]+);", out)[-1]
  assert code == f"failed: the perplexity is {reached}, not below 2.0; try more --steps"
  assert err == ""
  # Another seed, another training.
  assert reached != f"{trained[0].test_curve[-1, 1]:.1f}"
  assert keys
  assert all(key == jax.random.key(1) for key in keys)


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_diverging_training_fails(perplexity):
  failure = task.failure_of(perplexity, 100.0)
  assert failure == "the training diverged; try a smaller --learning-rate"


def test_perplexity_of_a_huge_loss():
  assert task.perplexity_of(1e4) == math.inf
  assert math.isnan(task.perplexity_of(math.nan))
  assert task.perplexity_of(math.log(7)) == pytest.approx(7)


def test_too_little_text(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  (tmp_path / "only.py").write_text("x = 1\n")
  message = f"error: too little text: 5 words in 1 Python files of {tmp_path}\n"
  assert run(capsys) == (2, "", message)
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
  code, _, err = run(capsys)
  assert (code, err.count("\n")) == (2, 1)
  assert "too little text: 0 words in 0 Python files" in err


@pytest.mark.parametrize(
  "words, message",
  [
    ("--vocabulary=0", "argument --vocabulary: invalid positive value: '0'"),
    ("--chunk-size=0", "argument --chunk-size: invalid positive value: '0'"),
    ("--steps=1.5", "argument --steps: invalid positive value: '1.5'"),
    ("--batch-size=999999", "--batch-size: expected at most "),
  ],
)
def test_bad_values(capsys, monkeypatch, words, message):
  monkeypatch.setattr(task, "train", lambda *_: pytest.fail("trained before the check"))
  code, out, err = run(capsys, words)
  assert (code, out) == (2, "")
  assert f"error: {message}" in err
