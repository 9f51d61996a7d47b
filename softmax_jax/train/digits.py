"""`softmax-jax train`: handwritten digits, and the softmax Jacobian at the trained model."""

# optax and scikit-learn have no stubs.
# pyright: reportMissingTypeStubs=false

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import click
import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax import derivatives, softmax, softmax_cross_entropy_with_integer_labels
from softmax_jax._command_line import devices, progress_bar, save_picture

_REQUIRED_ACCURACY = 0.95
# A Jacobian that is further off than this, relative to itself, has lost half of float32's digits.
_LOST = 3e-4
_CLASSES = 10
_HIDDEN = 128


def run(args: SimpleNamespace) -> dict[str, Any]:
  """Trains and checks; the report, whose failures are the checks that did not hold."""
  device = devices()[0]
  digits = _load_digits(args.seed)
  if args.batch_size > len(digits.train_labels):
    raise click.BadParameter(
      f"expected at most {len(digits.train_labels)}, the size of the training set, got "
      f"{args.batch_size}",
      param_hint="--batch-size",
    )
  with progress_bar(args.steps) as show:
    show(None, "compiling the training step")
    training = _train(args, digits, show)
    logits = np.asarray(cast(Any, jax.jit(_logits)(training.weights, digits.test_images)))
    show(None, "the gradient of each test digit")
    gradient_norms = _gradient_norms(training.weights, digits, logits)
    show(None, "the softmax Jacobian in four ways")
    jacobians = _compare_jacobians(logits)
  correct = int(np.count_nonzero(logits.argmax(axis=-1) == digits.test_labels))

  report: dict[str, Any] = {
    "steps": args.steps,
    "batch_size": args.batch_size,
    "learning_rate": args.learning_rate,
    "seed": args.seed,
    "jax": jax.__version__,
    "device": device.device_kind,
    "train_digits": len(digits.train_labels),
    "test_digits": len(digits.test_labels),
    "test_correct": correct,
    "test_accuracy": correct / len(digits.test_labels),
    "required_accuracy": _REQUIRED_ACCURACY,
    **training.summary,
    "gradient_norms": gradient_norms,
    "jacobians": jacobians,
  }
  report["failures"] = _failures(report)
  if args.plot:
    _draw(args.plot, digits, training, logits)
    report["plot"] = str(args.plot)
  return report


def _failures(report: dict[str, Any]) -> list[str]:
  """One line for each check that did not hold; with a NaN none holds."""
  failures: list[str] = []
  if not report["test_accuracy"] >= _REQUIRED_ACCURACY:
    failures.append(
      f"the test accuracy is {report['test_accuracy']:.4f}, below the required {_REQUIRED_ACCURACY}"
    )
  if not math.isfinite(report["test_loss"]):
    return [*failures, "the training diverged; try a smaller --learning-rate"]
  jacobians = report["jacobians"]
  for row in jacobians["ways"]:
    if not row["over_terms"] <= jacobians["bound"]:
      failures.append(
        f"the Jacobian by {row['way']} is off by {row['over_terms']:.1e} of its terms; "
        f"float32 rounding explains {jacobians['bound']:.1e}"
      )
  return failures


# --- data ----------------------------------------------------------------------------------------


class _Digits(NamedTuple):
  """Images are [N, 64] float32, labels [N] int32, indices the test digits' places in the set."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  test_indices: np.ndarray


def _load_digits(seed: int) -> _Digits:
  from sklearn import datasets, model_selection

  images, labels = cast(tuple[np.ndarray, np.ndarray], datasets.load_digits(return_X_y=True))
  indices = np.arange(len(labels))
  train, test = cast(
    list[np.ndarray],
    model_selection.train_test_split(indices, test_size=0.25, stratify=labels, random_state=seed),
  )
  # The held-out digits take no part in the statistics either.
  images = (images - images[train].mean(axis=0)) / images[train].std()
  images, labels = images.astype(np.float32), labels.astype(np.int32)
  return _Digits(images[train], labels[train], images[test], labels[test], test)


# --- the network and its training ----------------------------------------------------------------

_Weights = list[tuple[jax.Array, jax.Array]]


def _initial_weights(key: jax.Array) -> _Weights:
  """One pair of matrix and bias per layer, by He's rule."""
  shapes = [(64, _HIDDEN), (_HIDDEN, _CLASSES)]
  return [
    (
      jax.random.normal(key, shape, jnp.float32) * math.sqrt(2 / shape[0]),
      jnp.zeros(shape[1:], jnp.float32),
    )
    for key, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
  ]


def _affine(x: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
  y = x @ matrix
  return y + jnp.broadcast_to(bias, y.shape)


def _logits(weights: _Weights, images: jax.Array) -> jax.Array:
  *hidden, (matrix, bias) = weights
  for hidden_matrix, hidden_bias in hidden:
    images = jax.nn.relu(_affine(images, hidden_matrix, hidden_bias))
  return _affine(images, matrix, bias)


def _loss(weights: _Weights, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean loss, and beside it the accuracy."""
  logits = _logits(weights, images)
  loss = softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return loss, jnp.mean(logits.argmax(axis=-1) == labels)


def _batches(seed: int, size: int, batch_size: int) -> Iterator[np.ndarray]:
  """Index batches without end: a fresh shuffle each epoch, its incomplete last batch left out."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(size).astype(np.int32)
    for start in range(0, size - batch_size + 1, batch_size):
      yield order[start : start + batch_size]


class _Training(NamedTuple):
  """The trained weights, the curves as rows of (step, loss, accuracy), and the summary."""

  weights: _Weights
  train_curve: np.ndarray
  test_curve: np.ndarray
  summary: dict[str, Any]


def _train(
  args: SimpleNamespace, digits: _Digits, show: Callable[[int | None, str], None]
) -> _Training:
  """Trains for `args.steps` steps, and tells `show` every few of them how far it is."""
  import optax

  schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
  optimizer = optax.adamw(schedule, weight_decay=1e-2)
  traces = 0

  @functools.partial(jax.jit, donate_argnums=0)  # The new state takes the memory of the old one.
  def step(state: Any, images: jax.Array, labels: jax.Array, batch: jax.Array) -> Any:
    nonlocal traces
    traces += 1  # Python runs this line only while JAX traces the step.
    weights, optimizer_state = state
    measured, weights_bar = jax.value_and_grad(_loss, has_aux=True)(
      weights, images[batch], labels[batch]
    )
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer counter.
      updates, optimizer_state = optimizer.update(weights_bar, optimizer_state, weights)
    return (optax.apply_updates(weights, updates), optimizer_state), measured

  measure = cast(Callable[..., tuple[jax.Array, jax.Array]], jax.jit(_loss))
  train = jax.device_put((digits.train_images, digits.train_labels))
  test = jax.device_put((digits.test_images, digits.test_labels))
  weights = _initial_weights(jax.random.key(args.seed))
  state = cast(Any, (weights, optimizer.init(weights)))
  batches = _batches(args.seed, len(digits.train_labels), args.batch_size)

  train_curve: list[tuple[float, ...]] = []
  test_curve: list[tuple[float, ...]] = []
  seconds: list[float] = []
  # The test digits are evaluated after step 1 (which compiles, so that the other steps show the
  # speed), then often while much changes, then evenly for the progress bar.
  even = range(0, args.steps, min(max(args.steps // 50, 1), 200))
  early = cast(list[int], np.geomspace(1, args.steps, 40).astype(int).tolist())
  for start, stop in itertools.pairwise(sorted({0, 1, *early, *even, args.steps})):
    clock = time.perf_counter()
    measured: list[Any] = []
    for batch in itertools.islice(batches, stop - start):
      state, loss_and_accuracy = cast(Any, step(state, *train, batch))
      measured.append(loss_and_accuracy)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - clock)
    for place, point in enumerate(jax.device_get(measured), start + 1):
      train_curve.append((place, *map(float, point)))
    test_curve.append((stop, *map(float, measure(state[0], *test))))
    _, loss, accuracy = test_curve[-1]
    show(stop, f"test loss {loss:.4f}, accuracy {accuracy:.4f}")

  train_loss, train_accuracy = map(float, measure(state[0], *train))
  # The time of a single step is that of the compiler.
  speed = (args.steps - 1) / sum(seconds[1:]) if args.steps > 1 else math.nan
  summary = {
    "train_accuracy": train_accuracy,
    "train_loss": train_loss,
    "test_loss": test_curve[-1][1],
    "step_traces": traces,
    "first_step_seconds": seconds[0],
    "training_seconds": sum(seconds),
    "steps_per_second": speed,
    "examples_per_second": speed * args.batch_size,
  }
  return _Training(state[0], np.array(train_curve), np.array(test_curve), summary)


# --- the checks after the training ---------------------------------------------------------------


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _gradient_norm(weights: _Weights, image: jax.Array, label: jax.Array) -> jax.Array:
  """The norm of one digit's gradient with respect to all weights."""
  weights_bar, _ = cast(Any, jax.grad(_loss, has_aux=True)(weights, image, label))
  return jnp.sqrt(sum(jnp.vdot(bar, bar) for bar in jax.tree.leaves(weights_bar)))


def _gradient_norms(weights: _Weights, digits: _Digits, logits: np.ndarray) -> dict[str, Any]:
  norms = np.asarray(cast(Any, _gradient_norm(weights, digits.test_images, digits.test_labels)))
  probabilities = np.asarray(softmax(logits))
  suspects = [
    {
      "index": int(digits.test_indices[i]),
      "label": int(digits.test_labels[i]),
      "prediction": int(probabilities[i].argmax()),
      "confidence": float(probabilities[i].max()),
      "gradient_norm": float(norms[i]),
    }
    for i in np.argsort(-norms)[:5]
  ]
  return {
    "min": float(norms.min()),
    "median": float(np.median(norms)),
    "max": float(norms.max()),
    "largest": suspects,
  }


def _compare_jacobians(logits: np.ndarray) -> dict[str, Any]:
  """Compares the softmax Jacobians at logits [N, K], computed four ways, with NumPy's in float64.

  Of the errors |J1 - J| / (|diag(a)| + |a a^T|) and |J1 - J| / |J|, in Frobenius norms, the largest
  over the N rows are reported. The first is at most `bound` if all is right.
  """
  jacfwd, jacrev = cast(Any, jax.jacfwd), cast(Any, jax.jacrev)
  ways: dict[str, Callable[..., Any]] = {
    "closed form": derivatives.softmax_jacobian,
    "jacfwd": jax.vmap(jacfwd(softmax)),
    "jacrev": jax.vmap(jacrev(softmax)),
    "jax.nn": jax.vmap(jacrev(jax.nn.softmax)),
  }
  jacobians = {
    name: np.asarray(cast(Any, jax.jit(way)(logits)), np.float64) for name, way in ways.items()
  }

  a = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
  a /= a.sum(axis=-1, keepdims=True)
  identity = np.eye(a.shape[-1])
  off_diagonal = -a[:, :, None] * a[:, None, :] * (1 - identity)
  # Rows of J sum to zero. a_i (1 - a_i) would lose even float64's digits where a_i is nearly 1.
  exact = off_diagonal - off_diagonal.sum(axis=-1)[:, :, None] * identity

  # With unit roundoff u: an exponential is good to 2 ulp = 4u and a sum of K of them to (K + 3)u,
  # so each a_i to (K + 8)u and the terms of J = diag(a) - a a^T to 2(K + 9)u of their own size.
  # Nothing is promised relative to J itself: where the network is sure, the terms cancel, and of
  # autodiff through jax.nn.softmax little but their errors remains.
  limits = np.finfo(np.float32)
  bound = 2 * (a.shape[-1] + 9) * float(limits.eps) / 2
  terms = np.linalg.norm(a, axis=-1) + np.sum(a * a, axis=-1)
  size = np.maximum(np.linalg.norm(exact, axis=(-2, -1)), limits.tiny)
  rows: list[dict[str, Any]] = []
  for way, jacobian in jacobians.items():
    error = np.linalg.norm(jacobian - exact, axis=(-2, -1))
    rows.append(
      {
        "way": way,
        "over_terms": float(np.max(error / terms)),
        "over_jacobian": float(np.max(error / size)),
      }
    )
  return {"bound": bound, "ways": rows}


# --- output --------------------------------------------------------------------------------------


def _print_table(
  title: str,
  columns: Iterable[str],
  rows: Iterable[Iterable[str]],
  caption: str | None = None,
) -> None:
  """Prints a table: the first column to the left, the others to the right."""
  from rich.console import Console
  from rich.table import Table

  table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
  table.show_header = any(columns)
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left")
  for row in rows:
    table.add_row(*row)
  console = Console(highlight=False)
  console.print(table)
  console.print()


def _print_line(text: str) -> None:
  """Prints one line, as it is, however long."""
  from rich.console import Console

  Console(highlight=False).print(text, markup=False, soft_wrap=True)


def print_tables(report: dict[str, Any]) -> None:
  """Prints the report."""
  digits, norms = report["test_digits"], report["gradient_norms"]
  _print_table(
    "Training",
    ("", ""),
    (
      ("test accuracy", f"{report['test_accuracy']:.4f} ({report['test_correct']} of {digits})"),
      ("test loss", f"{report['test_loss']:.4f}"),
      ("final training loss", f"{report['train_loss']:.4f}"),
      ("steps per second", f"{report['steps_per_second']:,.0f}"),
      ("examples per second", f"{report['examples_per_second']:,.0f}"),
      ("seconds for the first step, with its compilation", f"{report['first_step_seconds']:.2f}"),
      ("seconds for all steps", f"{report['training_seconds']:.2f}"),
      ("seconds for everything", f"{report['total_seconds']:.2f}"),
      ("times that JAX traced the step", str(report["step_traces"])),
    ),
  )
  _print_table(
    "Test digits with the largest gradients",
    ("digit", "label", "prediction", "confidence", "gradient norm"),
    (
      (
        *(str(row[name]) for name in ("index", "label", "prediction")),
        f"{row['confidence']:.4f}",
        f"{row['gradient_norm']:.2f}",
      )
      for row in norms["largest"]
    ),
    f"Gradient norms of the {digits} test digits: smallest {norms['min']:.1e}, median "
    f"{norms['median']:.1e}, largest {norms['max']:.1e}.",
  )
  ways = report["jacobians"]["ways"]
  lost = [row["way"] for row in ways if row["over_jacobian"] > _LOST]
  said = f" So {' and '.join(lost)} has lost the digits of J there." if lost else ""
  _print_table(
    "Softmax Jacobians at the test logits: largest error against float64",
    ("computed by", "over |diag(a)| + |a a^T|", "over |J|"),
    ((row["way"], f"{row['over_terms']:.1e}", f"{row['over_jacobian']:.1e}") for row in ways),
    f"Float32 rounding explains {report['jacobians']['bound']:.1e} relative to the terms of "
    "J = diag(a) - a a^T. They cancel where the network is sure, and J is small beside them."
    f"{said}",
  )
  if "plot" in report:
    _print_line(f"Picture: {report['plot']}")
  if not report["failures"]:
    _print_line(
      f"Passed: the accuracy is at least {_REQUIRED_ACCURACY}, and the Jacobians are right to "
      "within float32 rounding of their terms."
    )


def _draw(path: pathlib.Path, digits: _Digits, training: _Training, logits: np.ndarray) -> None:
  """Draws the curves, the confusion matrix and the Jacobian at the least certain test digit."""
  import matplotlib
  from matplotlib.colors import CenteredNorm
  from matplotlib.figure import Figure  # Without pyplot: the caller's backend stays as it is.

  with matplotlib.rc_context({"font.size": 9, "axes.titlelocation": "left"}):
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    (loss, accuracy), (counts, heat) = figure.subplots(2, 2)

    light, dark, gray = "#9ecae1", "#08519c", "#636363"
    for axes, column in ((loss, 1), (accuracy, 2)):
      axes.plot(*training.train_curve[:, [0, column]].T, color=light, lw=0.8, label="batches")
      axes.plot(*training.test_curve[:, [0, column]].T, color=dark, lw=1.8, label="test digits")
      axes.spines[["top", "right"]].set_visible(False)
      axes.set(xlabel="step", xscale="log")
      axes.xaxis.set_major_formatter("{x:g}")
      axes.margins(x=0.02)
    loss.set(ylabel="loss", yscale="log", title="(a) Loss")
    loss.legend(frameon=False)
    reached = training.test_curve[-1, 2]
    accuracy.axhline(_REQUIRED_ACCURACY, color=gray, lw=0.8, ls="--")
    place = (0.99, _REQUIRED_ACCURACY - 0.01)
    coordinates = accuracy.get_yaxis_transform()
    accuracy.text(*place, "required", transform=coordinates, color=gray, ha="right", va="top")
    title = f"(b) Accuracy: {reached:.1%} at the end"
    accuracy.set(ylabel="accuracy", ylim=(0, 1.02), title=title)

    confusion = np.zeros((_CLASSES, _CLASSES), int)
    np.add.at(confusion, (digits.test_labels, logits.argmax(axis=-1)), 1)
    shade = np.log1p(confusion)
    counts.imshow(shade, cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
      color = "white" if shade[row, column] > shade.max() / 2 else "black"
      counts.text(column, row, count or "", ha="center", va="center", color=color)
    correct = f"{np.trace(confusion)} of {confusion.sum()} correct"
    counts.set(xlabel="predicted", ylabel="label", title=f"(c) Test digits: {correct}")

    probabilities = np.asarray(softmax(logits))
    unsure = np.argmin(probabilities.max(axis=-1))
    jacobian = np.asarray(derivatives.softmax_jacobian(logits[unsure]))
    image = heat.imshow(jacobian, cmap="RdBu_r", norm=CenteredNorm(halfrange=0.25))
    for (row, column), entry in np.ndenumerate(jacobian):
      text = f"{entry:.2f}".replace("-", "\N{MINUS SIGN}") if abs(entry) >= 0.005 else ""
      color = "white" if abs(entry) > 0.17 else "black"
      heat.text(column, row, text, ha="center", va="center", color=color, fontsize=6.5)
    figure.colorbar(image, ax=heat, label=r"$\partial a_i \,/\, \partial z_j$")
    title = f"(d) Softmax Jacobian, least certain digit (label {digits.test_labels[unsure]})"
    heat.set(xlabel="logit $j$", ylabel="probability $i$", title=title)

    for axes in (counts, heat):
      axes.set(xticks=range(_CLASSES), yticks=range(_CLASSES))
    save_picture(figure, path, dpi=200)
