"""The command line, and `softmax-jax train`: its training, checks, output and picture."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, strict_json

import softmax_jax
from softmax_jax import train
from softmax_jax.__main__ import main
from softmax_jax._command_line import picture as picture_option
from softmax_jax._command_line import progress_bar
from softmax_jax.train import digits as task

TRAIN_SIZE, TEST_SIZE = 1347, 450


def train_few_steps(digits, *argv):
  options = train.command.make_context("train", list(argv)).params
  return task._train(types.SimpleNamespace(**options), digits, lambda *_: None)


@pytest.fixture(scope="module")
def digits():
  return task._load_digits(0)


@pytest.fixture(scope="module")
def training(digits):
  return train_few_steps(digits, "--steps", "130")


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
  """A run that passes: its exit code, stdout, stderr and picture."""
  picture = tmp_path_factory.mktemp("train") / "picture.png"
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main(["train", "--steps", "300", "--json", "--plot", str(picture)])
  return code, out.getvalue(), err.getvalue(), picture


# --- a run that passes ---------------------------------------------------------------------------


def test_passes(passed):
  code, out, err, picture = passed
  report = strict_json(out)  # One object, and nothing else on stdout.
  assert err == ""  # Not even a progress bar, as this stderr is no terminal.
  assert code == 0
  assert report["failures"] == []
  assert report["test_accuracy"] == report["test_correct"] / TEST_SIZE >= 0.95
  assert (report["train_digits"], report["test_digits"]) == (TRAIN_SIZE, TEST_SIZE)
  assert (report["steps"], report["batch_size"]) == (300, 128)
  assert (report["learning_rate"], report["seed"]) == (3e-3, 0)
  assert 0 < report["train_loss"] < report["test_loss"] < 0.3
  assert report["step_traces"] == 1
  assert report["examples_per_second"] == pytest.approx(128 * report["steps_per_second"])
  assert 0 < report["first_step_seconds"] < report["training_seconds"] < report["total_seconds"]
  assert report["plot"] == str(picture)
  assert report["jax"] == jax.__version__


def test_reports_the_largest_gradients(passed, digits):
  norms = strict_json(passed[1])["gradient_norms"]
  largest = norms["largest"]
  assert 0 < norms["min"] < norms["median"] < norms["max"] == largest[0]["gradient_norm"]
  assert len(largest) == 5
  assert largest == sorted(largest, key=lambda row: -row["gradient_norm"])
  labels = dict(zip(digits.test_indices.tolist(), digits.test_labels.tolist(), strict=True))
  for row in largest:
    assert row["label"] == labels[row["index"]] != row["prediction"]
    assert 0.1 < row["confidence"] <= 1


def test_reports_the_jacobians(passed):
  jacobians = strict_json(passed[1])["jacobians"]
  errors = {row["way"]: row for row in jacobians["ways"]}
  assert list(errors) == ["closed form", "jacfwd", "jacrev", "jax.nn"]
  assert jacobians["bound"] == 38 * 2.0**-24
  # No way is the reference by another name.
  assert all(0 < row["over_terms"] <= jacobians["bound"] for row in errors.values())
  # Ours keep their digits relative to the Jacobian too.
  ours = [row["over_jacobian"] for way, row in errors.items() if way != "jax.nn"]
  assert max(ours) < 1e-4 < errors["jax.nn"]["over_jacobian"]


def test_draws_a_picture(passed):
  from matplotlib.image import imread

  data = passed[3].read_bytes()
  assert data.startswith(b"\x89PNG\r\n\x1a\n")
  assert struct.unpack(">II", data[16:24]) == (1800, 1520)
  # Each of the four panels holds something dark and something colored.
  for half in np.split(imread(passed[3])[..., :3], 2):
    for panel in np.split(half, 2, axis=1):
      assert panel.min() < 0.3
      assert np.ptp(panel, axis=-1).max() > 0.3


def test_prints_tables(passed, capsys):
  code, out, err = run(capsys, "train", "--steps", "300")
  report = strict_json(passed[1])
  assert (code, err) == (0, "")
  accuracy, correct = report["test_accuracy"], report["test_correct"]
  for text in (
    f"{accuracy:.4f} ({correct} of 450)",
    f"{report['train_loss']:.4f}",
    "steps per second",
    "examples per second",
    "median " + f"{report['gradient_norms']['median']:.1e}",
    *(f"{row['gradient_norm']:.2f}" for row in report["gradient_norms"]["largest"]),
    *(row["way"] for row in report["jacobians"]["ways"]),
    *(f"{row['over_terms']:.1e}" for row in report["jacobians"]["ways"]),
    "So jax.nn has lost the digits of J there.",
  ):
    assert text in " ".join(out.split())  # Captions are wrapped.
  assert out.splitlines()[-1] == (
    "Passed: the accuracy is at least 0.95, and the Jacobians are right to within float32 rounding "
    "of their terms."
  )
  assert max(len(line) for line in out.splitlines()[:-1]) <= 80


# --- a run that fails ----------------------------------------------------------------------------


def test_too_little_training_fails(capsys):
  code, out, err = run(capsys, "train", "--steps", "1", "--json")
  report = strict_json(out)
  line = f"the test accuracy is {report['test_accuracy']:.4f}, below the required 0.95"
  assert code == 1
  assert report["failures"] == [line]
  assert err == f"softmax-jax train: failed: {line}\n"
  assert report["steps_per_second"] is None  # A single step shows how fast the compiler is.


@pytest.mark.without("debug_nans")  # which would stop the training
def test_diverging_training_fails(capsys, tmp_path):
  picture = tmp_path / "picture.svg"
  options = ("--steps", "50", "--learning-rate", "1000", "--plot", str(picture))
  code, out, err = run(capsys, "train", "--json", *options)
  assert code == 1
  assert strict_json(out)["test_loss"] is None
  assert err == (
    "softmax-jax train: failed: the test accuracy is 0.1000, below the required 0.95\n"
    "softmax-jax train: failed: the training diverged; try a smaller --learning-rate\n"
  )
  assert picture.read_bytes().startswith(b"<?xml")


def test_wrong_jacobian_fails(capsys, monkeypatch, training):
  without_outer_product = lambda x: jax.nn.softmax(x)[..., None] * jnp.eye(10)[None]
  monkeypatch.setattr(task.derivatives, "softmax_jacobian", without_outer_product)
  monkeypatch.setattr(task, "_train", lambda *_: training)
  code, out, err = run(capsys, "train")
  assert code == 1
  assert "Passed" not in out
  assert re.fullmatch(
    r"softmax-jax train: failed: the Jacobian by closed form is off by [1-9]\.[0-9]e-01 of its "
    r"terms; float32 rounding explains 2\.3e-06\n",
    err,
  )


# --- the parts -----------------------------------------------------------------------------------


def test_split_is_honest(digits):
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  test = digits.test_indices
  held_in = np.setdiff1d(np.arange(len(labels)), test)
  assert len(np.unique(test)) == TEST_SIZE
  assert len(held_in) == len(digits.train_labels) == TRAIN_SIZE
  # The rest, and nothing else, is trained on, and alone decides the statistics.
  mean, deviation = images[held_in].mean(axis=0), images[held_in].std()
  rows = lambda x: x[np.lexsort(x.T)]
  standard = ((images - mean) / deviation).astype(np.float32)
  np.testing.assert_allclose(digits.test_images, standard[test], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(
    rows(digits.train_images.round(4)), rows(standard[held_in].round(4)), atol=2e-4
  )
  np.testing.assert_array_equal(digits.test_labels, labels[test])
  # Stratified: each class gives a quarter of its digits.
  shares = np.bincount(digits.test_labels) / np.bincount(labels)
  np.testing.assert_allclose(shares, 0.25, atol=0.005)


def test_seed_decides_everything(digits, training):
  again = train_few_steps(digits, "--steps", "130")
  np.testing.assert_array_equal(training.train_curve, again.train_curve)
  np.testing.assert_array_equal(training.test_curve, again.test_curve)
  chex.assert_trees_all_equal(training.weights, again.weights)

  other = train_few_steps(digits, "--steps", "10", "--seed", "1")
  assert np.all(training.train_curve[:10, 1] != other.train_curve[:, 1])
  assert np.any(task._load_digits(1).test_indices != digits.test_indices)


def test_curves_cover_all_steps(training):
  np.testing.assert_array_equal(training.train_curve[:, 0], np.arange(1, 131))
  steps = training.test_curve[:, 0]
  assert (steps[0], steps[-1]) == (1, 130)
  assert set(np.diff(steps)) == {1, 2}
  assert training.test_curve[-1, 1] == training.summary["test_loss"]


@pytest.mark.without("debug_nans", "disable_jit")
def test_step_is_traced_once_and_donates(digits, monkeypatch):
  shapes, first_weights = [], []
  loss, initial_weights = task.softmax_cross_entropy_with_integer_labels, task._initial_weights

  def watched_loss(logits, labels):
    shapes.append(logits.shape)
    return loss(logits, labels)

  def watched_weights(key):
    first_weights.extend(initial_weights(key))
    return list(first_weights)

  monkeypatch.setattr(task, "softmax_cross_entropy_with_integer_labels", watched_loss)
  monkeypatch.setattr(task, "_initial_weights", watched_weights)
  # Two batches of 500 fit in an epoch. The 347 digits left over must not become a third.
  options = ("--steps", "5", "--batch-size", "500", "--seed", "7", "--learning-rate", "1e-30")
  training = train_few_steps(digits, *options)
  # The rest are the two sets that the loss is measured on, if no earlier run did so.
  assert shapes.count((500, 10)) == 1
  assert set(shapes) <= {(500, 10), (TEST_SIZE, 10), (TRAIN_SIZE, 10)}
  assert training.summary["step_traces"] == 1
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first_weights))
  # At such a learning rate nothing moves: these are the weights that the seed alone decides.
  seeded = initial_weights(jax.random.key(7))
  chex.assert_trees_all_close(training.weights, seeded, rtol=0, atol=1e-28)


def test_batches_visit_every_digit_once_an_epoch():
  batches = task._batches(seed=0, size=10, batch_size=5)
  first, second, third, fourth = (next(batches) for _ in range(4))
  np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(10))
  np.testing.assert_array_equal(np.sort(np.concatenate([third, fourth])), np.arange(10))
  assert np.any(first != third)


def test_gradient_norms_are_those_of_backpropagation_by_hand(digits):
  """The last step of the derivation, a - t, and the chain rule from there, in float64."""
  weights = task._initial_weights(jax.random.key(1))
  logits = np.asarray(task._logits(weights, digits.test_images))
  report = task._gradient_norms(weights, digits, logits)

  (matrix1, bias1), (matrix2, bias2) = jax.tree.map(np.float64, weights)
  x = np.float64(digits.test_images)
  hidden = np.maximum(x @ matrix1 + bias1, 0)
  a = np.exp(hidden @ matrix2 + bias2)
  a /= a.sum(axis=-1, keepdims=True)
  logits_bar = a - np.eye(10)[digits.test_labels]
  hidden_bar = (logits_bar @ matrix2.T) * (hidden > 0)
  squares = lambda x: np.sum(x * x, axis=-1)
  norms = np.sqrt(
    squares(logits_bar) * (1 + squares(hidden)) + squares(hidden_bar) * (1 + squares(x))
  )
  expected = [norms.min(), np.median(norms), norms.max()]
  np.testing.assert_allclose([report[n] for n in ("min", "median", "max")], expected, rtol=1e-5)
  worst = np.argsort(-norms)[:5]
  assert [row["index"] for row in report["largest"]] == digits.test_indices[worst].tolist()
  confidence = [row["confidence"] for row in report["largest"]]
  np.testing.assert_allclose(confidence, a[worst].max(axis=-1), rtol=1e-5)


def logits_for_jacobians():
  """From nearly uniform rows to rows where one probability rounds to 1."""
  rng = np.random.default_rng(0)
  scales = np.repeat([0.01, 1.0, 10.0, 100.0], 8)
  return (scales[:, None] * rng.standard_normal((32, 10))).astype(np.float32)


def test_jacobians_agree_at_every_scale():
  jacobians = task._compare_jacobians(logits_for_jacobians())
  for row in jacobians["ways"]:
    assert row["over_terms"] <= jacobians["bound"], row
    assert row["over_jacobian"] >= row["over_terms"], row


def with_derivative_of(wrong):
  """The value of softmax, and the derivative of another function."""

  def function(x):
    return jax.lax.stop_gradient(jax.nn.softmax(x) - wrong(x)) + wrong(x)

  return function


@pytest.mark.parametrize(
  "name, fault, found",
  [
    ("softmax_jacobian", lambda x: 1.0001 * jax.vmap(jax.jacrev(jax.nn.softmax))(x), "closed form"),
    ("softmax", with_derivative_of(lambda x: 1.0001 * jax.nn.softmax(x)), "jacfwd jacrev"),
    ("softmax", with_derivative_of(lambda x: jax.nn.softmax(x[::-1])), "jacfwd jacrev"),
  ],
  ids=["closed form scaled", "rule scaled", "rule reversed"],
)
def test_a_wrong_jacobian_is_found(monkeypatch, name, fault, found):
  monkeypatch.setattr(task.derivatives if name == "softmax_jacobian" else task, name, fault)
  jacobians = task._compare_jacobians(logits_for_jacobians())
  for row in jacobians["ways"]:
    assert (row["over_terms"] > jacobians["bound"]) == (row["way"] in found), row


def test_nan_never_agrees():
  row = {"way": "jacrev", "over_terms": float("nan")}
  jacobians = {"bound": 1e-6, "ways": [row]}
  report = {"test_accuracy": float("nan"), "test_loss": 0.1, "jacobians": jacobians}
  assert task._failures(report) == [
    "the test accuracy is nan, below the required 0.95",
    "the Jacobian by jacrev is off by nan of its terms; float32 rounding explains 1.0e-06",
  ]


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("NO_COLOR", "1")  # What of a bar is not done is blank then.
  with progress_bar(20) as show:
    show(10, "test loss 0.5000")
    show(20, "test loss 0.1250")
    show(None, "the softmax Jacobian")
  shown = re.sub(r"\x1b\[[?;\d]*[A-Za-z]", "", sys.stderr.getvalue())
  assert " compiling" in shown
  assert "/20 compiling" not in shown  # a phase without steps
  assert re.search("/20 +the softmax", shown) is None
  last = shown.splitlines()[-1]
  assert last.split(" 0:")[0].endswith(" the softmax Jacobian")
  assert "━" in last  # moves back and forth; of 0 steps nothing is drawn
  assert capsys.readouterr().out == ""


def test_picture_shows_the_numbers(digits, training, tmp_path, monkeypatch):
  import matplotlib
  from matplotlib.figure import Figure

  figures, save = [], Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
  logits = np.array(task._logits(training.weights, digits.test_images))
  logits[17] = np.linspace(0, 1, 10)  # Less certain than any digit.
  with matplotlib.rc_context({"font.size": 5}):
    before = dict.copy(matplotlib.rcParams)
    task._draw(tmp_path / "picture.pdf", digits, training, logits)
    assert dict.copy(matplotlib.rcParams) == before  # The backend is one of these.

  loss, accuracy, counts, heat, _ = figures[0].axes
  for axes, column in ((loss, 1), (accuracy, 2)):
    train_line, test_line, *_ = (line.get_xydata() for line in axes.lines)
    np.testing.assert_array_equal(train_line, training.train_curve[:, [0, column]])
    np.testing.assert_array_equal(test_line, training.test_curve[:, [0, column]])
  shown = {text.get_position(): text.get_text() for text in counts.texts}
  for label in range(10):
    for predicted in range(10):
      count = np.sum((digits.test_labels == label) & (logits.argmax(axis=-1) == predicted))
      assert shown[predicted, label] == (str(count) if count else "")
  a = np.exp(logits[17]) / np.exp(logits[17]).sum()
  jacobian = np.diag(a) - np.outer(a, a)
  (image,) = heat.images
  np.testing.assert_allclose(image.get_array(), jacobian, rtol=1e-5)
  assert (image.norm.vmin, image.norm.vmax) == (-0.25, 0.25)
  shown = {text.get_position(): text.get_text() for text in heat.texts}
  assert shown[9, 9] == f"{jacobian[9, 9]:.2f}"
  assert shown[9, 8] == f"\N{MINUS SIGN}{-jacobian[8, 9]:.2f}"
  assert heat.get_title(loc="left").endswith(f"(label {digits.test_labels[17]})")

  save(figures[0], tmp_path / "picture.pdf")
  assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF-")


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "options, message",
  [
    ("--steps 0", "'--steps': 0 is not in the range 1<=x<=1000000."),
    ("--steps 1.5", "'--steps': '1.5' is not a valid integer range."),
    ("--steps 1000001", "'--steps': 1000001 is not in the range 1<=x<=1000000."),
    ("--batch-size -1", "'--batch-size': -1 is not in the range 1<=x<=1000000."),
    (
      "--batch-size 1348",
      "--batch-size: expected at most 1347, the size of the training set, got 1348",
    ),
    ("--learning-rate nan", "'--learning-rate': 'nan' is not a number."),
    ("--learning-rate 0", "'--learning-rate': 0.0 is not in the range 0<x<=1000."),
    ("--learning-rate -0.1", "'--learning-rate': -0.1 is not in the range 0<x<=1000."),
    ("--learning-rate inf", "'--learning-rate': inf is not in the range 0<x<=1000."),
    ("--learning-rate fast", "'--learning-rate': 'fast' is not a valid float range."),
    ("--seed -1", "'--seed': -1 is not in the range 0<=x<=4294967295."),
    ("--seed 4294967296", "'--seed': 4294967296 is not in the range 0<=x<=4294967295."),
    (
      "--task text",
      "'--task': digits are what this command learns; for text, run examples/train_text.py "
      "of the repository",
    ),
    ("--plot a.gif", "'--plot': expected a name in .pdf, .png or .svg, got 'a.gif'"),
    ("--plot a", "'--plot': expected a name in .pdf, .png or .svg, got 'a'"),
    ("--plot no/a.png", "'--plot': cannot write 'no/a.png': No such file or directory"),
    ("--plot folder.png", "'--plot': cannot write 'folder.png': Is a directory"),
  ],
)
def test_bad_values(capsys, monkeypatch, tmp_path, options, message):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(task, "_train", lambda *_: pytest.fail("trained before the check"))
  (tmp_path / "folder.png").mkdir()
  result = run(capsys, "train", *options.split())
  assert result == (2, "", f"softmax-jax train: error: Invalid value for {message}\n")


@pytest.mark.parametrize(
  "words, message",
  [
    ("", ": error: Missing command."),
    ("train --steps", ": error: Option '--steps' requires an argument."),
    ("train --step 3", " train: error: No such option '--step'."),
    ("train more", " train: error: Got unexpected extra argument (more)"),
    ("--fast train", ": error: No such option '--fast'."),
    ("rain", ": error: No such command 'rain'."),
  ],
)
def test_bad_words(capsys, words, message):
  code, out, err = run(capsys, *words.split())
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith(f"softmax-jax{message}")


def test_checking_the_picture_leaves_no_file(tmp_path):
  new, old = tmp_path / "new.png", tmp_path / "old.png"
  old.write_bytes(b"old")
  assert (picture_option(str(new)), picture_option(str(old))) == (new, old)
  assert not new.exists()
  assert old.read_bytes() == b"old"


@pytest.mark.parametrize("extra", ["matplotlib", "optax", "rich", "sklearn"])
def test_missing_extra(capsys, monkeypatch, tmp_path, extra):
  monkeypatch.setitem(sys.modules, extra, None)  # This makes the import fail.
  monkeypatch.setattr(task, "_load_digits", lambda *_: pytest.fail("started before the check"))
  result = run(capsys, "train", "--plot", str(tmp_path / "a.png"))
  assert result == (
    2,
    "",
    f"softmax-jax: error: {extra} is missing; install the extra that brings it: "
    'pip install "softmax-jax[cli]", or in a checkout pip install -e ".[cli]"\n',
  )


def test_other_missing_modules_are_not_blamed_on_the_extra(monkeypatch):
  def broken(args):
    import softmax_jax_has_no_such_module  # noqa: F401

  monkeypatch.setattr(train, "run", broken)
  with pytest.raises(ModuleNotFoundError, match="softmax_jax_has_no_such_module"):
    main(["train"])


def test_interrupt(capsys, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(task, "_train", interrupted)
  assert run(capsys, "train") == (130, "", "\nsoftmax-jax: interrupted\n")


def test_version(capsys):
  assert run(capsys, "--version") == (0, softmax_jax.__version__ + "\n", "")


def test_help_in_a_process_of_its_own():
  command = [sys.executable, "-m", "softmax_jax", "train", "--help"]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.startswith("Usage: softmax-jax train ")
  for text in ("--steps", "--batch-size", "--learning-rate", "--seed", "--json", "--plot"):
    assert f"\n  {text}" in result.stdout
  assert train.HELP in result.stdout


def test_reader_that_has_gone_away():
  command = [sys.executable, "-m", "softmax_jax", "--help"]
  # Buffered, so that the failure comes with the last flush and not with a write.
  buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=buffered) as process:
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_help_without_the_extras():
  """It says what is missing, and that is no failure."""
  program = (
    "import sys; sys.modules['click'] = None\n"
    "from softmax_jax.__main__ import main; sys.exit(main())"
  )
  for words, code in (["--help"], 0), (["train"], 2):
    command = [sys.executable, "-c", program, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr == (
      "softmax-jax: error: click is missing; install the extra that brings it: "
      'pip install "softmax-jax[cli]", or in a checkout pip install -e ".[cli]"\n'
    )


def test_import_needs_no_extra():
  program = (
    "import sys, softmax_jax.__main__\n"
    "print({'click', 'matplotlib', 'optax', 'rich', 'sklearn'} & set(sys.modules))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
  )
  assert (result.stdout, result.stderr) == ("set()\n", "")
