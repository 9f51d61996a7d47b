"""What our programs move through main memory on a GPU and a TPU that are not there, beside peers.

XLA compiles for them where jax-cuda13-plugin and jax-cuda13-pjrt, or libtpu, are installed. Reads
and writes are counted in arrays of the logits' size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import required
from row_forms import in_form

import softmax_jax as sj
from softmax_jax.benchmark import suites
from softmax_jax.benchmark.traffic import measure, traffic

pytestmark = pytest.mark.long

SHAPES = [(8192, 128), (2048, 1024), (2048, 32768), (4096, 131072)]
DTYPES = ["float32", "bfloat16"]
ON_CHIP = 16_384  # the most classes of which XLA:GPU makes one kernel
SUITES = ("softmax", "losses", "divergences")
LINES = [line for suite in SUITES for line in suites.lines(suite, SHAPES)]


@pytest.fixture(scope="module", params=["h100", "v6e"])
def target(request):
  return required(request.param)


def slack(shape, dtype):
  """What 32 numbers per row take in arrays of the logits, and the partial sums of long rows."""
  return 32 * 4 / (shape[1] * jnp.dtype(dtype).itemsize) + 0.1


def most(function, mode, target, classes, dtype):
  """The most arrays that a program may read and write."""
  gpu, plain = target == "h100", mode in (suites.FORWARD, suites.LOSS)
  kernel = gpu and classes <= ON_CHIP
  if function in ("softmax", "log_softmax"):
    if plain:
      return (1, 1) if kernel else (2, 1)
    if kernel:
      return 3, 2
    if function == "log_softmax":
      return 5, 2
    # A TPU, and sixteen bits, of which XLA would also write the float32 version, read y once more.
    return (5, 2) if dtype == "float32" else (6, 2)
  if function == suites.SOFT:
    return (2, 0) if plain else (4, 1)
  if function == suites.DIVERGENCE:
    return (4, 0) if plain else (6, 1)
  return (1, 0) if plain else (2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
  "line", LINES, ids=lambda line: "-".join(map(str, (*line[1:3], *line.shape)))
)
def test_no_more_is_moved_than_by_peers(line, dtype, target):
  found = measure(line, target, ["jax.nn", "optax"], np.dtype(jnp.dtype(dtype)))
  assert not found["unable"]
  logits = found["logits_bytes"]
  ours, peer = (
    [cost[name] / logits for name in ("reads", "writes", "temp_bytes")]
    for cost in found["costs"].values()
  )
  more = slack(line.shape, dtype) * (1 + (line.function == suites.DIVERGENCE))  # of two arrays
  # XLA:TPU copies arrays that fit on the chip there and may read them beside that, once more.
  once_more = target == "v6e" and line.function == suites.SOFT and logits <= 2**23
  # The normalizers of a divergence come before it, from a read of their own.
  first = 2 if line.function == suites.DIVERGENCE else 0
  assert ours[0] + ours[1] <= peer[0] + peer[1] + first + once_more + more
  assert ours[2] <= peer[2] + more
  reads, writes = most(line.function, line.mode, target, line.shape[1], dtype)
  assert ours[0] <= reads + more
  assert ours[1] <= writes + more


OPTIONS = {
  "smoothing": {"label_smoothing": 0.1},
  "z-loss": {"z_loss": 0.1},
  "class weights": {"class_weights": True},
  "weights and smoothing": {"class_weights": True, "label_smoothing": 0.1},
  "sample weights": {"sample_weights": True},
  "all weights and smoothing": {
    "sample_weights": True,
    "class_weights": True,
    "label_smoothing": 0.1,
  },
  "ignored rows": {"ignore_index": 0},
  "aux": {"return_aux": True},
  "mask": {"where": True},
  "mask and smoothing": {"where": True, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_no_option_reads_the_logits_once_more(soft, name, target):
  rows, classes = 2048, 1024
  options = dict(OPTIONS[name])
  if soft and "ignore_index" in options:
    pytest.skip("soft labels have no index")
  x = jax.ShapeDtypeStruct((rows, classes), jnp.bfloat16)
  label = x if soft else jax.ShapeDtypeStruct((rows,), jnp.int32)
  arrays = {
    "class_weights": jax.ShapeDtypeStruct((classes,), jnp.float32),
    "sample_weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    "where": jax.ShapeDtypeStruct((rows, classes), bool),
  }
  given = {name: arrays[name] for name in options if name in arrays}
  options = {name: value for name, value in options.items() if name not in arrays}
  f = sj.softmax_cross_entropy if soft else sj.softmax_cross_entropy_with_integer_labels

  def mean(x, label, given):
    losses = f(x, label, **given, **options)
    losses, aux = losses if "return_aux" in options else (losses, None)
    return losses.mean(), aux

  logits, more = rows * classes * 2, slack((rows, classes), jnp.bfloat16)
  mask = ("where" in given) / 2  # in arrays of the logits
  inputs = 1 + soft + mask
  # XLA:TPU copies a mask of this size onto the chip, and reads it beside that.
  again = mask if target == "v6e" else 0
  value = traffic(target, mean, x, label, given)
  gradient = traffic(target, jax.value_and_grad(mean, has_aux=True), x, label, given)
  assert value.reads <= (inputs + again + more) * logits
  assert value.writes <= more * logits
  assert gradient.reads <= (2 * inputs + again + more) * logits
  assert gradient.writes <= (1 + more) * logits


def test_a_pass_more_is_seen(target):
  """A planted fault: in passes, as on a CPU, the bound of the loss does not hold."""
  rows, classes = SHAPES[2]
  x = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
  with in_form("plain"):
    found = traffic(target, functools.partial(sj.logsumexp, axis=-1), x)
  assert found.reads > 1.9 * rows * classes * 4
