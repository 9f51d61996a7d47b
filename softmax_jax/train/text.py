"""`softmax-jax train --task text`: the next word of the Python standard library's own source.

A neural language model (Bengio et al., 2003): the embeddings of the words before, a matrix for each
of their places, one hidden layer, and a last layer over the whole vocabulary, which holds most of
the weights and takes most of the time. Its logits are never held: the loss is
`linear_softmax_cross_entropy`. On several devices each holds a slice of the classes of the last
layer; the rest of the network is on all of them.
"""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

import argparse
import contextlib
import functools
import math
import pathlib
import re
import sysconfig
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from softmax_jax import linear_softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from softmax_jax._command_line import devices, progress_bar, save_picture
from softmax_jax.train import common

VOCABULARY = 32768
DEFAULTS = {
  "steps": 200,
  "batch_size": 1024,
  "learning_rate": 3e-3,
  "vocabulary": VOCABULARY,
  "chunk_size": 256,
  "devices": 1,
}
EXTRAS = ("optax", "rich")

_CONTEXT = 4  # The words that a prediction sees.
_FEATURES = 128
_HIDDEN = 4 * _FEATURES
# Adam moves all weights by steps of about one size. The features are so large that such steps of
# the last layer, which starts from zero, bring the logits where they belong in time.
_FEATURE_SCALE = 8.0
_TEST_SHARE = 20  # One file in as many is held out.
_LEAST_WORDS, _MOST_WORDS = 10_000, 2_000_000
_MOST_TEST_WORDS = 8192
_MEASUREMENTS = 10


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Trains and measures; the report, whose failures are the checks that did not hold."""
  mesh = _mesh(args.devices)
  text = _read_text(args.seed, args.vocabulary)
  positions = len(text.train_words) - _CONTEXT
  if args.batch_size > positions:
    raise argparse.ArgumentError(
      None,
      f"argument --batch-size: expected at most {positions}, the words to learn from, got "
      f"{args.batch_size}",
    )
  with progress_bar(args.steps) as show:
    training = _train(args, text, mesh, show)

  report: dict[str, Any] = {
    "task": "text",
    "steps": args.steps,
    "batch_size": args.batch_size,
    "learning_rate": args.learning_rate,
    "vocabulary": args.vocabulary,
    "chunk_size": args.chunk_size,
    "seed": args.seed,
    "jax": jax.__version__,
    "device": devices()[0].device_kind,
    "devices": args.devices,
    "train_files": text.train_files,
    "test_files": text.test_files,
    "train_words": len(text.train_words),
    "test_words": len(text.test_positions),
    "different_words": text.different_words,
    "unigram_perplexity": _unigram_perplexity(text, args.vocabulary),
    **training.summary,
  }
  report["failures"] = _failures(report)
  if args.plot:
    _draw(args.plot, training, report)
    report["plot"] = str(args.plot)
  return report


def _mesh(count: int) -> jax.sharding.Mesh:
  """A mesh of so many devices, over which the classes are spread."""
  with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has.
    jax.config.update("jax_num_cpu_devices", count)
  found = devices()
  if count > len(found):
    raise argparse.ArgumentError(
      None,
      f"argument --devices: expected at most {len(found)}, the devices that JAX has, got {count}",
    )
  return jax.make_mesh((count,), ("vocab",), axis_types=(AxisType.Auto,), devices=found[:count])


def _failures(report: dict[str, Any]) -> list[str]:
  """One line for each check that did not hold; with a NaN none holds."""
  perplexity, unigram = report["test_perplexity"], report["unigram_perplexity"]
  if not math.isfinite(perplexity):
    return ["the training diverged; try a smaller --learning-rate"]
  if not perplexity < unigram:
    return [
      f"the test perplexity is {perplexity:.1f}, not below that of the word frequencies, "
      f"{unigram:.1f}; try more --steps"
    ]
  return []


# --- data ----------------------------------------------------------------------------------------


class _Text(NamedTuple):
  """Words are int32 [N], one file after the other; positions are those of the words to predict."""

  train_words: np.ndarray
  test_words: np.ndarray
  test_positions: np.ndarray
  train_files: int
  test_files: int
  different_words: int


# A line break with the indentation after it, a name or number, or any other sign.
_WORD = re.compile(r"\n[ \t]*|\w+|[^\w\s]")
_END_OF_FILE = ""


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The Python files of the standard library in this folder, which may hold other packages too."""
  others = {"site-packages", "dist-packages"}
  return sorted(
    path
    for path in folder.rglob("*.py")
    if path.is_file() and not path.is_symlink() and not others & {*path.relative_to(folder).parts}
  )


def _read_text(seed: int, vocabulary: int) -> _Text:
  """Reads files in the order that the seed decides, until there are words enough.

  A word's class is its hash: no vocabulary has to be learnt, and none of it from what is held out.
  """
  folder = pathlib.Path(sysconfig.get_path("stdlib"))
  files = _files(folder)
  rng = np.random.default_rng(seed)
  rng.shuffle(files)
  classes: dict[str, int] = {}
  texts: list[np.ndarray] = []
  count = 0
  for file in files:
    try:
      words = _WORD.findall(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # One that may not be read is no loss.
      continue
    words.append(_END_OF_FILE)
    for word in words:
      if word not in classes:
        classes[word] = zlib.crc32(word.encode()) % vocabulary
    texts.append(np.fromiter((classes[word] for word in words), np.int32, len(words)))
    count += len(words)
    if count >= _MOST_WORDS:
      break
  test, train = texts[::_TEST_SHARE], [t for i, t in enumerate(texts) if i % _TEST_SHARE]
  candidates = sum(map(len, test)) - _CONTEXT
  if count < _LEAST_WORDS or not train or candidates < 1:
    raise argparse.ArgumentError(
      None,
      f"too little text: {count} words in {len(texts)} Python files of {folder}, where the "
      f"standard library should be; at least {_LEAST_WORDS} in 2 are needed",
    )
  chosen = rng.choice(candidates, min(candidates, _MOST_TEST_WORDS), replace=False)
  return _Text(
    np.concatenate(train),
    np.concatenate(test),
    np.sort(chosen).astype(np.int32) + _CONTEXT,
    len(train),
    len(test),
    len(classes),
  )


def _unigram_perplexity(text: _Text, vocabulary: int) -> float:
  """The test perplexity of the frequencies of the words learnt from, each counted once more."""
  counts = np.bincount(text.train_words, minlength=vocabulary) + 1.0
  log_probabilities = np.log(counts / counts.sum())
  return float(np.exp(-log_probabilities[text.test_words[text.test_positions]].mean()))


# --- the network and its training ----------------------------------------------------------------


class _Weights(NamedTuple):
  """With V classes, N words of context, H features and K hidden units."""

  embedding: jax.Array  # [V, H]
  place: jax.Array  # [N, H, H]
  up: jax.Array  # [H, K]
  down: jax.Array  # [K, H]
  head: jax.Array  # [V, H]
  bias: jax.Array  # [V]


# What each device holds a slice of, also of the state of the optimizer.
_SPREAD = ("head", "bias")


def _shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
  """How the leaves of weights, or of an optimizer's state, are spread over the mesh."""

  def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
    names = {getattr(key, "name", None) for key in path}
    return NamedSharding(mesh, P("vocab") if names & {*_SPREAD} else P())

  return jax.tree_util.tree_map_with_path(sharding, state)


def _initial_weights(key: jax.Array, vocabulary: int, rows: int | None = None) -> _Weights:
  """The last layer is zero: at first every word is equally likely.

  It has so many rows, of which those after the vocabulary are padding.
  """
  rows = vocabulary if rows is None else rows
  shapes = [
    (vocabulary, _FEATURES),
    (_CONTEXT, _FEATURES, _FEATURES),
    (_FEATURES, _HIDDEN),
    (_HIDDEN, _FEATURES),
  ]
  scales = [1.0, 1 / math.sqrt(_CONTEXT * _FEATURES), math.sqrt(2 / _FEATURES), _HIDDEN**-0.5]
  keys = jax.random.split(key, len(shapes))
  return _Weights(
    *(
      scale * jax.random.normal(key, shape, jnp.float32)
      for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ),
    head=jnp.zeros((rows, _FEATURES), jnp.float32),
    bias=jnp.zeros(rows, jnp.float32),
  )


def _normalized(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _features(weights: _Weights, words: jax.Array, positions: jax.Array) -> jax.Array:
  """The features [T, H] of the words before each of the T positions."""
  before = words[positions[:, None] - jnp.arange(1, _CONTEXT + 1)[None]]
  x = jnp.einsum("tnh,nhk->tk", weights.embedding[before], weights.place)
  return _FEATURE_SCALE * _normalized(x + jax.nn.relu(_normalized(x) @ weights.up) @ weights.down)


# A mean loss of the features x [T, H], the head [V, H], the bias [V] and the labels [T].
_CrossEntropy = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _linear(chunk_size: int, vocabulary: int, mesh: jax.sharding.Mesh) -> _CrossEntropy:
  """The loss in chunks of so many words; the logits are never whole."""

  def on_device(x: jax.Array, head: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    return linear_softmax_cross_entropy(
      x,
      head,
      labels,
      bias=bias,
      vocab_axis=0,
      chunk_size=chunk_size,
      num_classes=vocabulary,
      axis_name="vocab",
    )

  specs = P(), P("vocab"), P("vocab"), P()
  return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P())


def _dense(vocabulary: int) -> _CrossEntropy:
  """The same loss of the logits [T, V]."""

  def cross_entropy(x: jax.Array, head: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    logits = x @ head.T + bias[None]
    where = None
    if logits.shape[1] > vocabulary:
      where = jnp.arange(logits.shape[1])[None] < vocabulary
    return softmax_cross_entropy_with_integer_labels(logits, labels, where=where, reduction="mean")

  return cross_entropy


def _loss(
  cross_entropy: _CrossEntropy, weights: _Weights, words: jax.Array, positions: jax.Array
) -> jax.Array:
  x = _features(weights, words, positions)
  return cross_entropy(x, weights.head, weights.bias, words[positions])


def _compiled_step(
  optimizer: Any, cross_entropy: _CrossEntropy, state: Any, words: Any, positions: Any
) -> jax.stages.Compiled:
  """The compiled training step `(state, words, positions) -> (state, loss)`.

  The state, which is donated, is the pair of the weights and the optimizer's own. The arguments
  here may be arrays or stand for them by shape, dtype and sharding.
  """
  import optax

  # The new state takes the memory of the old one, and its place.
  sharding: Callable[[Any], Any] = lambda x: x.sharding
  shardings = jax.tree.map(sharding, state), None

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def step(state: Any, words: jax.Array, positions: jax.Array) -> Any:
    weights, optimizer_state = state
    loss, weights_bar = jax.value_and_grad(functools.partial(_loss, cross_entropy))(
      weights, words, positions
    )
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer counter.
      updates, optimizer_state = optimizer.update(weights_bar, optimizer_state, weights)
    return (optax.apply_updates(weights, updates), optimizer_state), loss

  return step.lower(state, words, positions).compile()


def _bytes(step: jax.stages.Compiled) -> dict[str, int]:
  """The memory that a compiled step takes: its arguments, results and all between them."""
  sizes = cast(Any, step.memory_analysis())
  arguments, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
  # What is donated is argument and result at once.
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return {"total": arguments + results + temporary, "temporary": temporary}


class _Training(NamedTuple):
  """The trained weights, the curves as rows of (step, perplexity), and the summary."""

  weights: _Weights
  train_curve: np.ndarray
  test_curve: np.ndarray
  summary: dict[str, Any]


def _train(
  args: argparse.Namespace, text: _Text, mesh: jax.sharding.Mesh, show: Callable[[int, str], None]
) -> _Training:
  """Trains for `args.steps` steps, telling `show` how far it is after each."""
  import optax

  schedule = optax.warmup_cosine_decay_schedule(
    0.1 * args.learning_rate, args.learning_rate, args.steps // 10, args.steps
  )
  # With the usual eps, AdamW would move the logits of the many words that a batch does not have as
  # fast as those of the others, all down together, and far below where they belong.
  optimizer = optax.adamw(schedule, eps=1e-3, weight_decay=1e-4)

  key = jax.random.key(args.seed)

  rows = -(-args.vocabulary // mesh.size) * mesh.size

  def initial_state():
    weights = _initial_weights(key, args.vocabulary, rows)
    return weights, optimizer.init(weights)

  everywhere = NamedSharding(mesh, P())
  words, *test = jax.device_put(
    (text.train_words, text.test_words, text.test_positions), everywhere
  )
  state = jax.eval_shape(initial_state)
  shardings = _shardings(state, mesh)
  like: Callable[[Any, Any], Any] = lambda x, sharding: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding
  )
  shapes = (
    jax.tree.map(like, state, shardings),
    like(words, everywhere),
    jax.ShapeDtypeStruct((args.batch_size,), jnp.int32, sharding=everywhere),
  )
  clock = time.perf_counter()
  linear = _linear(args.chunk_size, args.vocabulary, mesh)
  step = _compiled_step(optimizer, linear, *shapes)
  compile_seconds = time.perf_counter() - clock
  memory = {
    "linear": _bytes(step),
    "dense": _bytes(_compiled_step(optimizer, _dense(args.vocabulary), *shapes)),
    "logits": 4 * args.batch_size * args.vocabulary,
  }

  measure = cast(Callable[..., jax.Array], jax.jit(functools.partial(_loss, linear)))
  state = cast(Any, jax.jit(initial_state, out_shardings=shardings)())
  weights_count = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
  batches = common.batches(args.seed, len(text.train_words) - _CONTEXT, args.batch_size)
  marks = {round(args.steps * i / _MEASUREMENTS) for i in range(1, _MEASUREMENTS + 1)}
  train_losses: list[float] = []
  test_curve = [(0, float(measure(state[0], *test)))]
  seconds = 0.0
  for done in range(1, args.steps + 1):
    clock = time.perf_counter()
    state, loss = step(state, words, next(batches) + _CONTEXT)
    train_losses.append(float(loss))
    seconds += time.perf_counter() - clock
    if done in marks:
      test_curve.append((done, float(measure(state[0], *test))))
    perplexities = (_perplexity(x) for x in (train_losses[-1], test_curve[-1][1]))
    show(done, "perplexity {:.0f}, test {:.0f}".format(*perplexities))

  last = train_losses[-max(args.steps // 10, 1) :]
  speed = args.steps / seconds
  summary = {
    "initial_train_perplexity": _perplexity(train_losses[0]),
    "train_perplexity": _perplexity(sum(last) / len(last)),
    "initial_test_perplexity": _perplexity(test_curve[0][1]),
    "test_perplexity": _perplexity(test_curve[-1][1]),
    "test_curve": [(done, _perplexity(loss)) for done, loss in test_curve],
    "weights": weights_count,
    "memory_bytes": memory,
    "compile_seconds": compile_seconds,
    "training_seconds": seconds,
    "steps_per_second": speed,
    "words_per_second": speed * args.batch_size,
  }
  train_curve = [(i, _perplexity(loss)) for i, loss in enumerate(train_losses, 1)]
  return _Training(state[0], np.array(train_curve), np.array(summary["test_curve"]), summary)


def _perplexity(loss: float) -> float:
  return math.exp(loss) if not loss > 700 else math.inf


# --- output --------------------------------------------------------------------------------------


def print_tables(report: dict[str, Any]) -> None:
  """Prints the report."""
  common.print_table(
    "Training",
    ("", ""),
    (
      ("classes of words", f"{report['vocabulary']:,}"),
      ("weights", f"{report['weights']:,}"),
      ("files to learn from, held out", f"{report['train_files']:,}, {report['test_files']:,}"),
      ("words to learn from", f"{report['train_words']:,}"),
      ("steps per second", f"{report['steps_per_second']:.2f}"),
      ("words per second", f"{report['words_per_second']:,.0f}"),
      ("seconds to compile the step", f"{report['compile_seconds']:.2f}"),
      ("seconds for all steps", f"{report['training_seconds']:.2f}"),
      ("seconds for everything", f"{report['total_seconds']:.2f}"),
    ),
  )
  unigram, batch_size = report["unigram_perplexity"], report["batch_size"]
  common.print_table(
    f"Perplexity of {report['test_words']:,} held-out words",
    ("after step", "perplexity", "ratio to word frequencies"),
    (
      (str(step), f"{perplexity:,.1f}", f"{perplexity / unigram:.2f}")
      for step, perplexity in report["test_curve"]
    ),
    f"The word frequencies alone: {unigram:,.1f}. Words learnt from: "
    f"{report['initial_train_perplexity']:,.1f} in the first step, "
    f"{report['train_perplexity']:,.1f} in the last tenth.",
  )
  memory = report["memory_bytes"]
  rows = {"linear_softmax_cross_entropy": "linear", "dense loss of x @ weight": "dense"}
  common.print_table(
    f"Memory of the compiled training step, {batch_size:,} words"
    + (f", on each of {report['devices']} devices" if report["devices"] > 1 else ""),
    ("", "in all, MB", "beside weights and data, MB"),
    (
      (name, f"{memory[key]['total'] / 1e6:,.1f}", f"{memory[key]['temporary'] / 1e6:,.1f}")
      for name, key in rows.items()
    ),
    f"The first holds the logits of {report['chunk_size']:,} words at a time. All logits are "
    f"{memory['logits'] / 1e6:,.1f} MB.",
  )
  if "plot" in report:
    common.print_line(f"Picture: {report['plot']}")
  if not report["failures"]:
    common.print_line("Passed: the test perplexity is below that of the word frequencies.")


def _draw(path: pathlib.Path, training: _Training, report: dict[str, Any]) -> None:
  """Draws the perplexities of the training and the memory of the step."""
  import matplotlib
  from matplotlib.figure import Figure  # Without pyplot: the caller's backend stays as it is.

  with matplotlib.rc_context({"font.size": 9, "axes.titlelocation": "left"}):
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    light, dark, gray = "#9ecae1", "#08519c", "#636363"
    for axes in (curves, bars):
      axes.spines[["top", "right"]].set_visible(False)

    curves.plot(*training.train_curve.T, color=light, lw=0.8, label="batches")
    curves.plot(*training.test_curve.T, "o-", color=dark, lw=1.8, ms=3, label="held-out words")
    unigram = report["unigram_perplexity"]
    curves.axhline(unigram, color=gray, lw=0.8, ls="--", label="word frequencies alone")
    curves.set(xlabel="step", ylabel="perplexity", yscale="log")
    curves.yaxis.set_major_formatter("{x:,.0f}")
    curves.margins(x=0.02)
    curves.legend(frameon=False)
    curves.set_title(f"(a) Perplexity: {report['test_perplexity']:,.1f} at the end")

    memory = report["memory_bytes"]
    temporary = np.array([memory[key]["temporary"] for key in ("linear", "dense")]) / 1e6
    total = np.array([memory[key]["total"] for key in ("linear", "dense")]) / 1e6
    names = ["linear_softmax_\ncross_entropy", "dense loss of\nx @ weight"]
    bars.bar(names, total - temporary, 0.6, color=light, label="weights, optimizer and data")
    drawn = bars.bar(
      names, temporary, 0.6, bottom=total - temporary, color=dark, label="all the rest"
    )
    bars.bar_label(drawn, [f"{x:,.0f}" for x in total])
    bars.margins(y=0.25)
    bars.legend(frameon=False)
    bars.set(ylabel="MB", title=f"(b) Memory of a step, {report['batch_size']:,} words")
    save_picture(figure, path, dpi=200)
