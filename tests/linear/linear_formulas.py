"""The linear loss over whole logits: written out, and by the dense loss of this library."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import default_promotion, random, relative_error

from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax import softmax_cross_entropy_with_integer_labels

T, H, V = 6, 5, 300  # two chunks of 3 tokens, and blocks of 128, 128 and 44 classes
CHUNK = 3
IGNORED = 5
LABELS = np.array([0, 299, IGNORED, 127, 128, 256])
SMOOTH = {  # what is differentiated beside x and weight
  "bias": random(2, V),
  "label_smoothing": np.float64(0.1),
  "z_loss": np.float64(0.03),
  "class_weights": np.linspace(0.5, 2, V),
  "sample_weights": np.array([1.5, -0.5, 2.0, 0.0, 0.25, 1.0]),
  "logit_scale": np.float64(0.7),
  "softcap": np.float64(3.0),
}
REDUCTIONS = ("mean", "sum", "none")


@default_promotion()
def logits(x, weight, bias=None, logit_scale=None, softcap=None, vocab_axis=-1):
  z = x @ (weight if vocab_axis == -1 else weight.T)
  z = z if bias is None else z + bias
  z = z if logit_scale is None else logit_scale * z
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def dense(x, weight, labels, *, reduction="mean", **options):
  names = "bias", "logit_scale", "softcap", "vocab_axis"
  z = logits(x, weight, **{name: options.pop(name) for name in names if name in options})
  return softmax_cross_entropy_with_integer_labels(z, labels, reduction=reduction, **options)


@default_promotion()
def formulas(
  x,
  weight,
  labels,
  *,
  bias=None,
  logit_scale=None,
  softcap=None,
  vocab_axis=-1,
  label_smoothing=0.0,
  z_loss=0.0,
  class_weights=None,
  sample_weights=None,
  ignore_index=None,
  reduction="mean",
):
  z = logits(x, weight, bias, logit_scale, softcap, vocab_axis)
  w = jnp.ones(z.shape[-1]) if class_weights is None else class_weights
  counts = jnp.ones(labels.shape) if ignore_index is None else labels != ignore_index
  counts = counts if sample_weights is None else counts * sample_weights
  lse = jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))
  costs = w * (lse - z)
  nll = jnp.sum(costs * jax.nn.one_hot(labels, z.shape[-1]), axis=-1)
  loss = (1 - label_smoothing) * nll + label_smoothing * jnp.mean(costs, axis=-1)
  loss = (loss + z_loss * lse[..., 0] ** 2) * counts
  if reduction == "none":
    return loss
  return jnp.sum(loss) / (jnp.sum(w[labels] * counts) if reduction == "mean" else 1)


def arguments(options=(), dtype=np.float32, vocab_axis=-1, shape=(T,)):
  """The labels, and what is differentiated."""
  weight = random(1, (H, V))
  smooth = {"x": random(0, (T, H)), "weight": weight if vocab_axis == -1 else weight.T}
  smooth |= {option: SMOOTH[option] for option in options}
  smooth = {key: jnp.asarray(value, dtype) for key, value in smooth.items()}
  smooth["x"] = smooth["x"].reshape(*shape, H)
  if "sample_weights" in smooth:
    smooth["sample_weights"] = smooth["sample_weights"].reshape(shape)
  return LABELS.reshape(shape), smooth


def like(seed, tree):
  leaves, structure = jax.tree.flatten(tree)
  random_leaves = [random(seed + i, x.shape, np.float64) for i, x in enumerate(leaves)]
  return structure.unflatten(
    [jnp.asarray(r, x.dtype) for r, x in zip(random_leaves, leaves, strict=True)]
  )


def derivatives(f, labels, smooth, y_bar, second, **fixed):
  """Value, gradients and tangent of f, or else the tangent of its gradients, in one program."""
  smooth_dot = like(20, smooth)

  @jax.jit
  def program(smooth, smooth_dot, y_bar):
    g = lambda smooth: f(**smooth, labels=labels, **fixed)
    gradients = lambda smooth: jax.vjp(g, smooth)[1](y_bar)[0]
    if second:
      return jax.jvp(gradients, (smooth,), (smooth_dot,))[1]
    y, y_dot = jax.jvp(g, (smooth,), (smooth_dot,))
    return {"value": y, "gradients": gradients(smooth), "tangent": y_dot}

  return program(smooth, smooth_dot, jnp.asarray(y_bar, smooth["x"].dtype))


def assert_equal(actual, expected, tolerance):
  paths = jax.tree_util.tree_leaves_with_path(actual)
  for (path, x), y in zip(paths, jax.tree.leaves(expected), strict=True):
    # A scalar is a sum of terms that may cancel.
    error = relative_error(x, y) if x.ndim else abs(x - y) / max(10, abs(y))
    assert error < tolerance, jax.tree_util.keystr(path)


# Each option alone and all of them, each with one of the reductions, both layouts of the weight,
# and with and without rows that do not count.
CASES = [
  ((), "none"),
  *zip([(option,) for option in SMOOTH], itertools.cycle(REDUCTIONS), strict=False),
  *[(tuple(SMOOTH), reduction) for reduction in REDUCTIONS],
]


def compare_in_float64(options, reduction, second):
  case = CASES.index((options, reduction))
  fixed = dict(vocab_axis=-(case % 2), reduction=reduction)
  if case % 3 != 1:
    fixed["ignore_index"] = IGNORED
  with jax.enable_x64(True):
    labels, smooth = arguments(options, np.float64, fixed["vocab_axis"])
    y_bar = random(30, T if reduction == "none" else (), np.float64)
    actual = derivatives(linear, labels, smooth, y_bar, second, chunk_size=CHUNK, **fixed)
    expected = derivatives(formulas, labels, smooth, y_bar, second, **fixed)
    assert_equal(actual, expected, 1e-11 if second else 1e-12)
