"""`softmax_jax.reference`: its formulas beside the oracle, and their options beside the library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import linearize, random, relative_error
from plain import QUICKLY

import softmax_jax
from softmax_jax import reference

TOLERANCE = 1e-13
X = random(0, (3, 5, 4), np.float64, scale=3)
MASK = random(1, X.shape) > -0.5
LABELS = np.array([[0, 1, 3, 2], [4, 4, 0, 1], [2, 3, 1, 0]], np.int32)  # along axis 1
SHARES = np.abs(random(2, X.shape, np.float64))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True), oracle.default_promotion():
    yield


def check(name, second=None, **options):
  """Value, tangent and cotangents of a formula beside those of the oracle."""
  y, jvp, vjp = linearize(name, X, second, **options)
  f = functools.partial(getattr(reference, name), **options)
  args = (X,)
  if second is not None and np.issubdtype(second.dtype, np.floating):
    args = (X, second)
    if name == "logsumexp":
      f = lambda a, b: reference.logsumexp(a, b=b, **options)
  elif second is not None:
    f = lambda x: getattr(reference, name)(x, second, **options)
  dots = tuple(random(i, a.shape, np.float64) for i, a in enumerate(args, 7))
  y_bar = random(9, y.shape, np.float64)

  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def derivatives(args, dots, y_bar):
    y, pull = jax.vjp(f, *args)
    return y, jax.jvp(f, args, dots)[1], pull(y_bar)

  actual, dot, bars = derivatives(args, dots, y_bar)
  assert relative_error(actual, y) < TOLERANCE
  assert relative_error(dot, jvp(*dots)) < TOLERANCE
  for bar, expected in zip(bars, vjp(y_bar), strict=False):
    assert relative_error(bar, expected) < TOLERANCE


@pytest.mark.parametrize("axis, where", [(-1, None), (1, MASK), ((2, 0), MASK), (None, None)])
def test_softmax_and_its_relatives(axis, where):
  for name in ("softmax", "log_softmax", "logsumexp"):
    check(name, axis=axis, where=where)
  check("logsumexp", SHARES, axis=axis, where=where, keepdims=True)
  check("softmax_cross_entropy", SHARES, axis=axis, where=where)
  check("softmax_entropy", axis=axis, where=where)
  check("softmax_kl_divergence", SHARES, axis=axis, where=where)


@pytest.mark.parametrize("where", [None, MASK[:, 0]], ids=["all", "masked"])
def test_integer_labels(where):
  if where is not None:
    where = where[:, None] | (np.arange(5) % 2 == 1)[None, :, None]
    labels = np.where(where[:, 0], LABELS, 1).astype(np.int32)
  else:
    labels = LABELS
  check("softmax_cross_entropy_with_integer_labels", labels, axis=1, where=where)


@pytest.mark.without("debug_nans")
def test_a_negative_sum():
  b = random(3, X.shape, np.float64)
  log_size, sign = reference.logsumexp(X, axis=-1, b=b, return_sign=True)
  s = np.sum(b * np.exp(X), axis=-1)
  assert (s < 0).any() and (s > 0).any()
  np.testing.assert_array_equal(sign, np.sign(s))
  np.testing.assert_allclose(log_size, np.log(np.abs(s)), rtol=TOLERANCE)
  assert np.isnan(reference.logsumexp(X, axis=-1, b=b)[s < 0]).all()


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_a_row_that_is_masked_altogether(name):
  where = np.array([[True, True], [False, False]])
  x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
  f, g = (
    functools.partial(getattr(m, name), axis=-1, where=where) for m in (reference, softmax_jax)
  )
  np.testing.assert_allclose(jax.jit(f)(x), jax.jit(g)(x), rtol=TOLERANCE)
  finite = lambda x: jnp.sum(jnp.where(jnp.isfinite(y := f(x)), y, 0))
  np.testing.assert_array_equal(jax.jit(jax.grad(finite))(x)[1], 0)


# --- the options of the losses -------------------------------------------------------------------

WEIGHTS = np.linspace(0.5, 2, 5)
OPTIONS = {"label_smoothing": 0.3, "z_loss": 0.7, "class_weights": WEIGHTS}
SAMPLES = np.linspace(-0.5, 2, 12).reshape(3, 4)  # one for each row of X
SAMPLES[0, 1] = 0


def test_options_are_the_terms_of_the_formula():
  t, alpha = SHARES, OPTIONS["label_smoothing"]
  uniform = MASK / MASK.sum(axis=1, keepdims=True)
  p = WEIGHTS[None, :, None] * ((1 - alpha) * t + alpha * uniform)
  losses, _, _ = linearize("softmax_cross_entropy", X, p, axis=1, where=MASK)
  lse, _, _ = linearize("logsumexp", X, axis=1, where=MASK)
  losses += OPTIONS["z_loss"] * lse**2
  for reduction, expected in (("none", losses), ("sum", losses.sum()), ("mean", losses.mean())):
    actual = reference.softmax_cross_entropy(X, t, 1, MASK, reduction=reduction, **OPTIONS)
    assert relative_error(actual, expected) < TOLERANCE


def compare(name, args, **options):
  """Value and gradients beside the library's, of logits or features and of the coefficients."""
  arrays = {k: v for k, v in options.items() if isinstance(v, (float, np.ndarray)) and k != "where"}
  static = {k: v for k, v in options.items() if k not in arrays}
  inputs, rest = args

  def run(module, inputs, arrays):
    def f(inputs, arrays):
      y = getattr(module, name)(*inputs, *rest, **arrays, **static)
      parts = jax.tree.leaves(y)
      return sum(jnp.vdot(random(i, y.shape, np.float64), y) for i, y in enumerate(parts)), y

    return jax.value_and_grad(f, (0, 1), has_aux=True)(inputs, arrays)

  both = jax.jit(
    lambda *args: (run(reference, *args), run(softmax_jax, *args)), compiler_options=QUICKLY
  )
  actual, expected = map(jax.tree.leaves, both(inputs, arrays))
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    assert relative_error(a, b) < TOLERANCE


ROWS = np.array([[True] * 4, [False] * 4, [True] * 4])


@pytest.mark.parametrize("reduction, where", [("none", None), ("sum", MASK), ("mean", ROWS)])
def test_soft_labels_with_all_options(reduction, where):
  options = dict(OPTIONS, sample_weights=SAMPLES, reduction=reduction, return_aux=True)
  compare("softmax_cross_entropy", ([X, SHARES], []), axis=1, where=where, **options)


@pytest.mark.parametrize(
  "labels, options",
  [
    (LABELS, {"axis": 1, "where": ROWS, "sample_weights": SAMPLES}),
    (np.where(ROWS, LABELS, 9), {"axis": 1, "ignore_invalid": True, "sample_weights": SAMPLES}),
    (np.where(ROWS, LABELS, 9), {"axis": 1, "ignore_index": 9, "reduction": "mean"}),
    (np.arange(5), {"axis": (2, 0), "class_weights": np.linspace(0.5, 2, 12).reshape(4, 3)}),
  ],
  ids=["rows", "invalid", "ignored", "two axes"],
)
def test_integer_labels_with_all_options(labels, options):
  name = "softmax_cross_entropy_with_integer_labels"
  compare(name, ([X], [labels.astype(np.int32)]), **(OPTIONS | {"return_aux": True} | options))


@pytest.mark.parametrize("reduction, vocab_axis", [("none", 0), ("sum", 1), ("mean", 1)])
def test_the_linear_loss_with_all_options(reduction, vocab_axis):
  x, weight = random(4, (2, 3, 4), np.float64), random(5, (4, 7), np.float64)
  labels = np.array([[0, 4, -1], [2, -1, 3]], np.int32)
  options = dict(OPTIONS, class_weights=np.linspace(0.5, 2, 7), bias=random(6, 7, np.float64))
  options |= {"logit_scale": 0.7, "sample_weights": np.array([[1, 0.5, -2], [0, 3, 1]])}
  weight = weight if vocab_axis else weight.T
  compare(
    "linear_softmax_cross_entropy",
    ([x, weight], [labels]),
    vocab_axis=vocab_axis,
    softcap=3.0,
    ignore_index=-1,
    num_classes=5,
    reduction=reduction,
    return_aux=True,
    **options,
  )
