"""Train a language model on the Python standard library without ever holding its logits.

  python examples/train_text.py --help

It needs optax: pip install -e '.[cli]'. A small network learns to predict the next word of the
source of the standard library of the interpreter that runs it. The words are hashed to 32,768
classes, and one file in twenty is held out. The loss is linear_softmax_cross_entropy, which forms
the logits of a chunk of words at a time; the compiled training step is compared in memory with the
same step with the loss of the logits themselves.

On several devices each holds a slice of the classes of the last layer, and the losses are the same.
examples/train_on_several_machines.py does so on several machines.

Exit code: 0 if the perplexity on held-out words ends below that of the word frequencies, 1 if not,
2 for a bad option or too little text.
"""

# The network is that of Bengio et al., 2003: the embeddings of the words before, a matrix for each
# of their places, one hidden layer, and a last layer over the whole vocabulary, which holds most of
# the weights and takes most of the time.

import argparse
import contextlib
import functools
import math
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from softmax_jax import linear_softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

CONTEXT = 4  # The words that a prediction sees.
FEATURES = 128
HIDDEN = 4 * FEATURES
# Adam moves all weights by steps of about one size. The features are so large that such steps of
# the last layer, which starts from zero, bring the logits where they belong in time.
FEATURE_SCALE = 8.0
TEST_SHARE = 20  # One file in as many is held out.
LEAST_WORDS, MOST_TEST_WORDS = 10_000, 8192
MEASUREMENTS = 10


def options() -> argparse.ArgumentParser:
  """The options, which those of examples/train_on_several_machines.py extend."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = functools.partial(parser.add_argument, metavar="N", type=positive)
  add("--steps", default=200, help="training steps (default: 200)")
  add("--batch-size", default=1024, help="words to predict in a step (default: 1024)")
  add("--vocabulary", default=32768, help="classes that words are hashed to (default: 32768)")
  add("--chunk-size", default=256, help="words whose logits are held at a time (default: 256)")
  add("--words", default=2_000_000, help="words to read, about (default: 2000000)")
  add("--seed", default=0, type=int, help="of the text, weights and batches (default: 0)")
  add("--devices", help="devices of a machine; a CPU has as many as asked for (default: all)")
  rate = "AdamW's, after a tenth of the steps; a cosine takes it to 0 (default: 0.003)"
  add("--learning-rate", default=3e-3, metavar="X", type=float, help=rate)
  return parser


def positive(word: str) -> int:
  """A whole number above 0."""
  number = int(word)
  if number < 1:
    raise ValueError
  return number


def main(argv: list[str] | None = None) -> None:
  """Trains on one machine."""
  args = options().parse_args(argv)
  failure = run(args, devices_of(args.devices))
  sys.exit(f"failed: {failure}" if failure else 0)


def devices_of(count: int | None, processes: int = 1) -> jax.sharding.Mesh:
  """A mesh of ``count`` devices per process: devices share the classes, processes the words."""
  if count is not None:
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has.
      jax.config.update("jax_num_cpu_devices", count)
  found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  each = len(found) // processes
  if count is not None and count > each:
    refuse(f"--devices: expected at most {each}, the devices that JAX has, got {count}")
  chosen = np.array(found).reshape(processes, each)[:, :count]
  return jax.sharding.Mesh(chosen, ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)


def refuse(message: str) -> None:
  """Ends the program as argparse does."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def run(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> str | None:
  """Trains and prints; what went wrong, or None."""
  text = read_text(args.seed, args.vocabulary, args.words)
  size = len(text.train_words) - CONTEXT
  if args.batch_size > size:
    refuse(f"--batch-size: expected at most {size}, the words to learn from, got {args.batch_size}")
  if args.batch_size % mesh.shape["data"]:
    refuse(f"--batch-size: expected a multiple of the {mesh.shape['data']} machines")
  print(
    f"{len(text.train_words):,} words of {text.train_files:,} files to learn from, "
    f"{len(text.test_positions):,} words of {text.test_files:,} others to predict"
  )
  trained = train(args, text, mesh, functools.partial(print, flush=True))
  unigram = unigram_perplexity(text, args.vocabulary)
  print(f"the word frequencies alone: perplexity {unigram:,.1f}")
  return failure_of(trained.test_curve[-1, 1], unigram)


def failure_of(perplexity: float, unigram: float) -> str | None:
  """What is wrong with a perplexity on held-out words, if anything; a NaN is wrong too."""
  if not math.isfinite(perplexity):
    return "the training diverged; try a smaller --learning-rate"
  if not perplexity < unigram:
    return f"the perplexity is {perplexity:.1f}, not below {unigram:.1f}; try more --steps"
  return None


# --- data ----------------------------------------------------------------------------------------


class Text(NamedTuple):
  """Words are int32 [N], one file after the other; positions are those of the words to predict."""

  train_words: np.ndarray
  test_words: np.ndarray
  test_positions: np.ndarray
  train_files: int
  test_files: int


# A line break with the indentation after it, a name or number, or any other sign.
WORD = re.compile(r"\n[ \t]*|\w+|[^\w\s]")
END_OF_FILE = ""


def files_of(folder: Path) -> list[Path]:
  """The Python files of the standard library in this folder, which may hold other packages too."""
  others = {"site-packages", "dist-packages"}
  return sorted(
    path
    for path in folder.rglob("*.py")
    if path.is_file() and not path.is_symlink() and not others & {*path.relative_to(folder).parts}
  )


def read_text(seed: int, vocabulary: int, enough: int) -> Text:
  """Reads files in an order that the seed decides, until they hold ``enough`` words.

  A word's class is its hash: no vocabulary has to be learnt, and so none from what is held out.
  """
  folder = Path(sysconfig.get_path("stdlib"))
  files = files_of(folder)
  rng = np.random.default_rng(seed)
  rng.shuffle(files)
  class_of = functools.cache(lambda word: zlib.crc32(word.encode()) % vocabulary)
  texts, count = [], 0
  for file in files:
    try:
      words = WORD.findall(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # A file that cannot be read is no loss.
      continue
    texts.append(np.array([class_of(word) for word in (*words, END_OF_FILE)], np.int32))
    count += len(texts[-1])
    if count >= enough:
      break
  test, train = texts[::TEST_SHARE], [t for i, t in enumerate(texts) if i % TEST_SHARE]
  candidates = sum(map(len, test)) - CONTEXT
  if count < LEAST_WORDS or not train or candidates < 1:
    refuse(f"too little text: {count} words in {len(texts)} Python files of {folder}")
  chosen = rng.choice(candidates, min(candidates, MOST_TEST_WORDS), replace=False)
  positions = np.sort(chosen).astype(np.int32) + CONTEXT
  return Text(np.concatenate(train), np.concatenate(test), positions, len(train), len(test))


def unigram_perplexity(text: Text, vocabulary: int) -> float:
  """The test perplexity of the frequencies of the words learnt from, each counted once more."""
  counts = np.bincount(text.train_words, minlength=vocabulary) + 1.0
  log_probabilities = np.log(counts / counts.sum())
  return float(np.exp(-log_probabilities[text.test_words[text.test_positions]].mean()))


def batches(seed: int, size: int, batch_size: int) -> Iterator[np.ndarray]:
  """Index batches without end: a fresh shuffle each epoch, its incomplete last batch left out."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(size).astype(np.int32)
    for start in range(0, size - batch_size + 1, batch_size):
      yield order[start : start + batch_size]


# --- the network ---------------------------------------------------------------------------------


class Weights(NamedTuple):
  """With V classes, N words of context, H features and K hidden units."""

  embedding: jax.Array  # [V, H]
  place: jax.Array  # [N, H, H]
  up: jax.Array  # [H, K]
  down: jax.Array  # [K, H]
  head: jax.Array  # [V, H]
  bias: jax.Array  # [V]


def initial_weights(key: jax.Array, vocabulary: int, rows: int | None = None) -> Weights:
  """The last layer is zero: at first every word is equally likely.

  That layer has ``rows`` rows, of which those after the vocabulary are padding.
  """
  rows = vocabulary if rows is None else rows
  shapes = [(vocabulary, FEATURES), (CONTEXT, FEATURES, FEATURES), (FEATURES, HIDDEN)]
  shapes.append((HIDDEN, FEATURES))
  scales = [1.0, 1 / math.sqrt(CONTEXT * FEATURES), math.sqrt(2 / FEATURES), HIDDEN**-0.5]
  drawn = (
    scale * jax.random.normal(key, shape, jnp.float32)
    for key, shape, scale in zip(jax.random.split(key, len(shapes)), shapes, scales, strict=True)
  )
  return Weights(*drawn, jnp.zeros((rows, FEATURES), jnp.float32), jnp.zeros(rows, jnp.float32))


def normalized(x: jax.Array) -> jax.Array:
  """The rows of x, each divided by its root mean square."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def features_of(weights: Weights, words: jax.Array, positions: jax.Array) -> jax.Array:
  """The features ``[T, H]`` of the words before each of the T positions."""
  before = words[positions[:, None] - jnp.arange(1, CONTEXT + 1)[None]]
  x = jnp.einsum("tnh,nhk->tk", weights.embedding[before], weights.place)
  return FEATURE_SCALE * normalized(x + jax.nn.relu(normalized(x) @ weights.up) @ weights.down)


# A mean loss of the features x [T, H], the head [V, H], the bias [V] and the labels [T].
CrossEntropy = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def linear(chunk_size: int, vocabulary: int, mesh: jax.sharding.Mesh) -> CrossEntropy:
  """The loss in chunks of ``chunk_size`` words; the logits of all never exist at once."""

  def on_device(x: jax.Array, head: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    loss = linear_softmax_cross_entropy(
      x,
      head,
      labels,
      bias=bias,
      vocab_axis=0,
      chunk_size=chunk_size,
      num_classes=vocabulary,
      axis_name="vocab",
    )
    return jax.lax.pmean(loss, "data")

  specs = P("data"), P("vocab"), P("vocab"), P("data")
  return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P())


def dense(vocabulary: int) -> CrossEntropy:
  """The same loss of the logits ``[T, V]``."""

  def cross_entropy(x: jax.Array, head: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    logits = x @ head.T + bias[None]
    where = None
    if logits.shape[1] > vocabulary:
      where = jnp.arange(logits.shape[1])[None] < vocabulary
    return softmax_cross_entropy_with_integer_labels(logits, labels, where=where, reduction="mean")

  return cross_entropy


def loss_of(
  cross_entropy: CrossEntropy, weights: Weights, words: jax.Array, positions: jax.Array
) -> jax.Array:
  """The mean loss of predicting the words at these positions."""
  x = features_of(weights, words, positions)
  return cross_entropy(x, weights.head, weights.bias, words[positions])


# --- its training --------------------------------------------------------------------------------


def shardings_of(state: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of weights or an optimizer's state: head and bias are spread over "vocab", the rest is not."""

  def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
    names = {getattr(key, "name", None) for key in path}
    return NamedSharding(mesh, P("vocab") if names & {"head", "bias"} else P())

  return jax.tree_util.tree_map_with_path(sharding, state)


def compiled_step(
  optimizer: Any, cross_entropy: CrossEntropy, state: Any, words: Any, positions: Any
) -> jax.stages.Compiled:
  """The compiled training step `(state, words, positions) -> (state, loss)`.

  The state, which is donated, is the pair of the weights and the optimizer's own. The arguments
  here may be arrays or stand for them by shape, dtype and sharding.
  """
  # The new state takes the memory of the old one, and its place.
  shardings = jax.tree.map(lambda x: x.sharding, state), None

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def step(state: Any, words: jax.Array, positions: jax.Array) -> Any:
    weights, optimizer_state = state
    loss, weights_bar = jax.value_and_grad(functools.partial(loss_of, cross_entropy))(
      weights, words, positions
    )
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer counter.
      updates, optimizer_state = optimizer.update(weights_bar, optimizer_state, weights)
    return (optax.apply_updates(weights, updates), optimizer_state), loss

  return step.lower(state, words, positions).compile()


def bytes_of(step: jax.stages.Compiled) -> tuple[int, int]:
  """The memory that a compiled step takes in total, and beside its arguments and results."""
  sizes = step.memory_analysis()
  # What is donated is argument and result at once.
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  temporary = sizes.temp_size_in_bytes
  return sizes.argument_size_in_bytes + results + temporary, temporary


class Training(NamedTuple):
  """The trained weights, and the curves as rows of (step, perplexity)."""

  weights: Weights
  train_curve: np.ndarray
  test_curve: np.ndarray


def train(
  args: argparse.Namespace, text: Text, mesh: jax.sharding.Mesh, tell: Callable[[str], None]
) -> Training:
  """Trains for `args.steps` steps, and tells how far it is."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.1 * args.learning_rate, args.learning_rate, args.steps // 10, args.steps
  )
  # With the usual eps, AdamW would move the logits of the many words that a batch lacks as fast as
  # those of the others, all down together, and far below where they belong.
  optimizer = optax.adamw(schedule, eps=1e-3, weight_decay=1e-4)
  key = jax.random.key(args.seed)
  rows = -(-args.vocabulary // mesh.shape["vocab"]) * mesh.shape["vocab"]

  def initial_state() -> Any:
    weights = initial_weights(key, args.vocabulary, rows)
    return weights, optimizer.init(weights)

  everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  place = lambda array, sharding: jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )
  like = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.eval_shape(initial_state)
  shardings = shardings_of(state, mesh)
  words = place(text.train_words, everywhere)
  even = len(text.test_positions) // mesh.shape["data"] * mesh.shape["data"]
  test = place(text.test_words, everywhere), place(text.test_positions[:even], split)

  shapes = jax.tree.map(like, state, shardings), words
  shapes += (jax.ShapeDtypeStruct((args.batch_size,), jnp.int32, sharding=split),)
  cross_entropy = linear(args.chunk_size, args.vocabulary, mesh)
  step = compiled_step(optimizer, cross_entropy, *shapes)
  all_logits = compiled_step(optimizer, dense(args.vocabulary), *shapes)
  tell(
    "memory of a step, beside weights, optimizer and data: "
    f"{bytes_of(step)[1] / 1e6:,.0f} MB; with the loss of all logits, "
    f"{bytes_of(all_logits)[1] / 1e6:,.0f} MB"
  )

  measure = jax.jit(functools.partial(loss_of, cross_entropy))
  state = jax.jit(initial_state, out_shardings=shardings)()
  test_curve = [(0, perplexity_of(measure(state[0], *test)))]
  tell(f"step 0: perplexity of held-out words {test_curve[0][1]:,.1f}")
  marks = {1, *(round(args.steps * i / MEASUREMENTS) for i in range(1, MEASUREMENTS + 1))}
  train_curve, seconds = [], 0.0
  index_batches = batches(args.seed, len(text.train_words) - CONTEXT, args.batch_size)
  for done, batch in zip(range(1, args.steps + 1), index_batches, strict=False):
    start = time.perf_counter()
    state, loss = step(state, words, place(batch + CONTEXT, split))
    loss = float(loss)
    seconds += time.perf_counter() - start
    train_curve.append((done, perplexity_of(loss)))
    if done in marks:
      test_curve.append((done, perplexity_of(measure(state[0], *test))))
      shown = f"perplexity {train_curve[-1][1]:,.1f}, of held-out words {test_curve[-1][1]:,.1f}"
      speed = done * args.batch_size / seconds
      tell(f"step {done}: loss {loss:.6f}, {shown}; {speed:,.0f} words per second")
  return Training(state[0], np.array(train_curve), np.array(test_curve))


def perplexity_of(loss: Any) -> float:
  """The exponential of a mean loss."""
  return math.exp(loss) if not float(loss) > 700 else math.inf


if __name__ == "__main__":
  main()
