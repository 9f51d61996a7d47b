"""The accuracy that the README promises: every function against extended precision.

An ulp is the distance of neighboring numbers of the dtype at the true value, u half the distance of
1 and the next number. Rows are compared one by one, a derivative relative to the norm of its row.
The oracle works in NumPy's extended precision, and is itself checked against mpmath.
"""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from accuracy_truth import at, truth, wide
from row_forms import BY_PLATFORM, in_form

import softmax_jax as sj
from softmax_jax import _platform

# On a CPU, softmax of up to 16 entries does not correct its exponentials.
FEW = 16
SCALES = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
# Below this, XLA's exponential loses digits and flushes to zero.
TINY = {"float32": 1e-30, "float64": 1e-290, "bfloat16": 1e-30, "float16": 6.2e-5}

ELEMENTS = 6  # ulp, of log_softmax and the losses
SOFTMAX = 8  # ulp
SUMMATION = 6  # the more of everything where XLA adds dozens of equal numbers one by one
SOFTMAX_OF_FEW = 66  # ulp, up to 16 entries in float32; jax.nn has 67, there and elsewhere
NORMALIZER = 4  # ulp of the larger of the result and the largest input
GRADIENT, AT_LABEL = 8, 8  # u of the norm, ulp
SOFTMAX_DERIVATIVE, SOFTMAX_DERIVATIVE_OF_FEW = 16, 72  # u of the norm


FORMS = (BY_PLATFORM, "on_chip", "one_read")


@pytest.fixture(scope="module", autouse=True, params=FORMS)
def form(request):
  """The form of the sums along a row: that for this platform, and those for accelerators.

  A CPU adds up one number after the other, which is the worst order.
  """
  with in_form(request.param):
    yield request.param


def test_the_oracle_against_mpmath():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(12, 5)) * np.logspace(-2, 4, 12)[:, None]
  x[::2, 1] += 30
  c, label = rng.normal(size=x.shape), rng.integers(0, 5, 12)
  expected = truth(x, label, c)
  with mpmath.workdps(400):
    for i, row in enumerate(x):
      z = [mpmath.mpf(v) for v in row]
      top = max(z)
      log_sum = top + mpmath.log(sum(mpmath.exp(v - top) for v in z))
      log_a = [v - log_sum for v in z]
      a = [mpmath.exp(v) for v in log_a]
      mean = sum(p * mpmath.mpf(v) for p, v in zip(a, c[i], strict=True))
      exact = {
        "softmax": a,
        "log_softmax": log_a,
        "logsumexp": log_sum,
        "nll": -log_a[label[i]],
        "gradient": [p - (j == label[i]) for j, p in enumerate(a)],
        "softmax_bar": [p * (mpmath.mpf(v) - mean) for p, v in zip(a, c[i], strict=True)],
        "log_softmax_bar": [
          v - p * sum(map(mpmath.mpf, c[i])) for p, v in zip(a, c[i], strict=True)
        ],
        "log_softmax_dot": [mpmath.mpf(v) - mean for v in c[i]],
        "nll_dot": mean - mpmath.mpf(c[i, label[i]]),
      }
      for name, value in exact.items():
        value = [v if abs(v) > mpmath.mpf("1e-4000") else 0 for v in np.ravel(np.array(value))]
        value = np.array([np.longdouble(mpmath.nstr(v, 25)) for v in value])
        got = np.ravel(expected[name][i])
        kept = value != 0
        np.testing.assert_allclose(got[kept], value[kept], rtol=1e-16, atol=0, err_msg=name)


# --- units ----------------------------------------------------------------------------------------


def ulps(actual, expected, dtype, unit_of=None):
  """The worst error in units in the last place of ``expected`` (or of ``unit_of``)."""
  info = jnp.finfo(dtype)
  expected = wide(expected)
  size = np.abs(expected if unit_of is None else wide(unit_of))
  tiny = TINY[jnp.dtype(dtype).name]
  unit = np.exp2(np.floor(np.log2(np.maximum(size, tiny)))) * np.longdouble(info.eps)
  counts = size > tiny
  error = np.abs(np.asarray(actual).astype(np.longdouble) - expected)
  # Where the expected number is too small to count, the result must be small too.
  assert np.all(error[~counts] <= 2 * tiny)
  return float(np.max(np.where(counts, error / unit, 0), initial=0))


def norms(actual, expected, dtype, scale=None):
  """The worst error of a row in u, relative to the norm of the row (or to ``scale``)."""
  error = wide(np.asarray(actual)) - expected
  if error.ndim == 2:
    error = np.linalg.norm(error.astype(np.longdouble), axis=-1)
  if scale is None:
    scale = np.sqrt((expected**2).sum(-1))
  tiny = TINY[jnp.dtype(dtype).name]
  assert np.all(np.abs(error[scale <= tiny]) <= 2 * tiny)
  u = float(jnp.finfo(dtype).eps) / 2
  return float(np.max(np.abs(error[scale > tiny]) / scale[scale > tiny], initial=0)) / u


# --- the table ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="soft")
def everything(x, label, t, c, soft=True):
  """Every function and its derivatives by x, in one compilation."""
  values, softmax_vjp = jax.vjp(sj.softmax, x)
  log_values, log_vjp = jax.vjp(sj.log_softmax, x)
  nll, nll_vjp = jax.vjp(lambda x: sj.softmax_cross_entropy_with_integer_labels(x, label), x)
  lse, lse_vjp = jax.vjp(lambda x: sj.logsumexp(x, axis=-1), x)
  out = {
    "softmax": values,
    "log_softmax": log_values,
    "logsumexp": lse,
    "nll": nll,
    "gradient": nll_vjp(jnp.ones_like(nll))[0],
    "softmax_bar": softmax_vjp(c)[0],
    "softmax_dot": jax.jvp(sj.softmax, (x,), (c,))[1],
    "log_softmax_bar": log_vjp(c)[0],
    "log_softmax_dot": jax.jvp(sj.log_softmax, (x,), (c,))[1],
    "log_gradient": -log_vjp(t)[0],
    "nll_dot": jax.jvp(
      lambda x: sj.softmax_cross_entropy_with_integer_labels(x, label), (x,), (c,)
    )[1],
    "lse_bar": lse_vjp(jnp.ones_like(lse))[0],
    "lse_dot": jax.jvp(lambda x: sj.logsumexp(x, axis=-1), (x,), (c,))[1],
  }
  if soft:
    out["soft_nll"], soft_vjp = jax.vjp(lambda x: sj.softmax_cross_entropy(x, t), x)
    out["soft_gradient"] = soft_vjp(jnp.ones_like(nll))[0]
    out["soft_nll_dot"] = jax.jvp(lambda x: sj.softmax_cross_entropy(x, t), (x,), (c,))[1]
  return out


def within_bounds(x, label, c, more=0):
  """Asserts every bound for the rows x."""
  dtype = x.dtype
  on_cpu = jax.default_backend() == "cpu" and _platform.always is None
  few = x.shape[-1] <= FEW and dtype == np.float32 and on_cpu
  t = np.zeros(x.shape, dtype)
  np.put_along_axis(t, label[:, None], 1, -1)
  got = {k: np.asarray(v) for k, v in everything(x, label, t, c).items()}
  y = truth(x, label, c)

  softmax_derivative = SOFTMAX_DERIVATIVE_OF_FEW if few else SOFTMAX_DERIVATIVE
  assert ulps(got["softmax"], y["softmax"], dtype) <= more + (SOFTMAX_OF_FEW if few else SOFTMAX)
  assert ulps(got["log_softmax"], y["log_softmax"], dtype) <= ELEMENTS + more
  largest = np.maximum(np.abs(y["logsumexp"]), np.abs(wide(x)).max(-1))
  assert ulps(got["logsumexp"], y["logsumexp"], dtype, largest) <= NORMALIZER
  assert norms(got["softmax_bar"], y["softmax_bar"], dtype) <= softmax_derivative
  assert norms(got["softmax_dot"], y["softmax_bar"], dtype) <= softmax_derivative
  # a is computed from the saved, rounded log a, so its error is |log a| u.
  from_rounded = GRADIENT - math.log(TINY[dtype.name]) + more
  for name in ("log_softmax_bar", "log_softmax_dot"):
    assert norms(got[name], y[name], dtype, y[f"{name}_scale"]) <= from_rounded
  assert norms(got["log_gradient"], y["gradient"], dtype) <= from_rounded
  assert ulps(at(got["log_gradient"], label), at(y["gradient"], label), dtype) <= from_rounded
  log_dot = -at(got["log_softmax_dot"], label)[:, 0]
  assert norms(log_dot, y["nll_dot"], dtype, y["nll_dot_scale"]) <= from_rounded
  assert norms(got["lse_bar"], y["softmax"], dtype) <= GRADIENT + more
  assert norms(got["lse_dot"], y["lse_dot"], dtype, y["lse_dot_scale"]) <= GRADIENT + more
  for kind in ("", "soft_"):
    nll, gradient = got[f"{kind}nll"], got[f"{kind}gradient"]
    assert ulps(nll, y["nll"], dtype) <= ELEMENTS + more
    assert norms(gradient, y["gradient"], dtype) <= GRADIENT + more
    assert ulps(at(gradient, label), at(y["gradient"], label), dtype) <= AT_LABEL + more
    assert norms(got[f"{kind}nll_dot"], y["nll_dot"], dtype, y["nll_dot_scale"]) <= GRADIENT + more


def random_rows(rng, rows, classes, dtype):
  """Rows at every scale; in half of them one class has probability 1 - 10^-k, k from 0 to 13."""
  scale = np.resize(SCALES, rows)[:, None]
  x = (rng.normal(size=(rows, classes)) * scale).astype(dtype)
  label = np.where(rng.random(rows) < 0.5, x.argmax(-1), rng.integers(0, classes, rows))
  lifted = np.arange(rows) % 2 == 1
  top = wide(x).max(-1)
  log_sum = np.log(np.exp(wide(x) - top[:, None]).sum(-1)) + top
  x[lifted, label[lifted]] = (log_sum + rng.uniform(0, 30, rows))[lifted]
  return x, label.astype(np.int32), rng.normal(size=x.shape).astype(dtype)


def forms(*class_counts):
  """Every form with each count of classes; with many, those of accelerators in the long tests."""
  return pytest.mark.parametrize(
    ("form", "classes"),
    [
      pytest.param(
        form, classes, marks=[pytest.mark.long] * (form != FORMS[0] and classes > 10_000)
      )
      for form in FORMS
      for classes in class_counts
    ],
    indirect=["form"],
  )


@pytest.mark.few(9)
@forms(2, 3, 10, 17, 100, 1000, 4097, 50_257, 128_256)
def test_float32_at_every_scale_and_class_count(classes):
  rng = np.random.default_rng(classes)
  for _ in range(3 if classes < 10_000 else 1):
    within_bounds(*random_rows(rng, 18 * max(1, min(40, 20_000 // classes)), classes, np.float32))


@pytest.mark.parametrize("classes", [3, 1000])
def test_float64_at_every_scale(classes):
  with jax.enable_x64(True):
    within_bounds(*random_rows(np.random.default_rng(classes), 180, classes, np.float64))


def adversarial_rows(classes):
  """Rows that were chosen to be hard."""
  rng = np.random.default_rng(0)
  few = np.float32(rng.normal(size=classes))
  signs = np.resize([1.0, -1.0], classes)
  one, two = np.zeros(classes), np.zeros(classes)
  one[1] = 1
  two[:2] = 1
  step = np.arange(classes)
  return {
    "all equal": np.full(classes, 0.3),
    "all equal, large": np.full(classes, 1e8),
    "all equal, negative": np.full(classes, -1e8),
    "ties": np.resize([2.5, 2.5, 2.5, -7.25, 0.1], classes),
    "almost a tie": np.where(step < 2, np.float32(0.7) - step * 2.0**-24, -3.0),
    "one dominant": 17.123 * one + 0.1 * few,
    "one dominant, large": 1e4 * one + few,
    "one dominant below zero": few - 40 * (1 - one),
    "two dominant": 15.3 * two + few,
    "two dominant, unequal": 15.3 * two + 0.75 * one + few,
    "half of the sum": math.log(classes - 1) * one,
    "alternating": 1e4 * signs,
    "alternating, moderate": 31.7 * signs,
    "alternating, largest": 1.7e38 * signs,
    "subnormal differences": 1e-40 * step,
    "differences of one ulp": 1 + 2.0**-23 * (step % 7),
    "a ramp": -np.linspace(0, 60, classes),
    "a steep ramp": -np.linspace(0, 3e38, classes),
    "a cliff": np.where(step == 0, 8.7, -0.31 - 2.0**-20 * (step % 5)),
    "some of probability 0": np.where(step % 3 == 1, -np.inf, few),
    "only one of probability 1": np.where(step == 1, 0.5, -np.inf),
    "largest with probability 0": np.where(step % 3 == 1, -np.inf, np.finfo(np.float32).min),
  }


@pytest.mark.few(3)
@pytest.mark.parametrize("classes", [10, 40])
def test_adversarial_rows(classes):
  x = np.stack(list(adversarial_rows(classes).values())).astype(np.float32)
  c = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  finite = np.isfinite(x).all(-1)
  for label in (0, 1, classes - 1):
    labels = np.full(len(x), label, np.int32)
    within_bounds(np.where(finite[:, None], x, 0), labels, c, more=SUMMATION)
  # The oracle drops entries of -inf from the row.
  for row in x[~finite]:
    kept = np.isfinite(row)
    label = int(np.argmax(kept))
    y = truth(row[None, kept], np.array([np.sum(kept[:label])]), c[:1, kept])
    t = (np.arange(classes) == label).astype(np.float32)
    got = everything(row[None], np.array([label]), t[None], c[:1])
    assert ulps(np.asarray(got["nll"]), y["nll"], row.dtype) <= ELEMENTS
    for name in ("softmax", "gradient", "softmax_bar"):
      actual = np.asarray(got[name])
      np.testing.assert_array_equal(actual[:, ~kept], 0)
      assert norms(actual[:, kept], y[name], row.dtype) <= SOFTMAX_DERIVATIVE_OF_FEW, name


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@forms(10, 1000, 2**17)
def test_sixteen_bits(dtype, classes):
  rng = np.random.default_rng(classes)
  x, label, c = random_rows(rng, 18, classes, np.float32)
  scale = 1.0 if dtype == "bfloat16" else np.minimum(1, 3e4 / np.abs(x).max(-1, keepdims=True))
  x, c = (np.asarray(jnp.asarray(v, dtype)) for v in (x * scale, c))
  got = {k: np.asarray(v) for k, v in everything(x, label, c, c, soft=False).items()}
  y = truth(x.astype(np.float32), label, c.astype(np.float32))
  for name in ("softmax", "log_softmax"):
    assert got[name].dtype == x.dtype
    assert ulps(got[name].astype(np.float32), y[name], dtype) <= 1
  largest = np.maximum(np.abs(y["logsumexp"]), np.abs(wide(x.astype(np.float32))).max(-1))
  assert ulps(got["logsumexp"].astype(np.float32), y["logsumexp"], dtype, largest) <= 1
  # The losses stay in float32, and are as accurate as for float32 logits.
  assert got["nll"].dtype == np.float32
  assert ulps(got["nll"], y["nll"], np.float32) <= ELEMENTS
  at_label = at(got["gradient"].astype(np.float32), label)
  assert ulps(at_label, at(y["gradient"], label), dtype) <= 1


@pytest.mark.parametrize("alpha", [0.0, 0.125])
@pytest.mark.parametrize("confident", [False, True])
def test_losses_with_all_options(confident, alpha):
  """No term of a loss with options is negative, so none cancels: their digits are kept."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(200, 50)).astype(np.float32) * np.float32(3)
  label = rng.integers(0, 50, 200).astype(np.int32)
  if confident:
    x[np.arange(200), label] = 12 + rng.uniform(0, 20, 200)
  w = rng.uniform(0.5, 2, 50).astype(np.float32)
  penalty = np.float32(2.0**-10)
  y = truth(x, label, x)
  a, cost = y["softmax"], -y["log_softmax"]
  rest = 1 - a
  np.put_along_axis(rest, x.argmax(-1)[:, None], a.sum(-1, keepdims=True) - a.max(-1)[:, None], -1)
  lse = y["logsumexp"]
  t = np.zeros(x.shape)
  np.put_along_axis(t, label[:, None], 1, -1)
  p = wide(w) * ((1 - wide(alpha)) * t + wide(alpha) / 50)
  expected = (p * cost).sum(-1) + wide(penalty) * lse**2
  gradient = a * (p.sum(-1) + 2 * wide(penalty) * lse)[:, None] - p

  @jax.jit
  def both(x, label, t):
    options = {"label_smoothing": alpha, "z_loss": penalty, "class_weights": w}
    losses = (
      lambda x: sj.softmax_cross_entropy_with_integer_labels(x, label, **options),
      lambda x: sj.softmax_cross_entropy(x, t, **options),
    )
    return [(f(x), jax.vjp(f, x)[1](jnp.ones_like(x[:, 0]))[0]) for f in losses]

  for value, x_bar in both(x, label, t.astype(np.float32)):
    assert ulps(value, expected, np.float32) <= ELEMENTS
    assert norms(x_bar, gradient, np.float32) <= GRADIENT


def test_peers_fail_these_bounds():
  """Textbook formulas exceed the bounds; otherwise the bounds would prove nothing."""
  x, label, c = random_rows(np.random.default_rng(0), 180, 100, np.float32)
  y = truth(x, label, c)
  textbook = jax.nn.log_softmax(x)
  assert ulps(textbook, y["log_softmax"], np.float32) > 1e6
  assert ulps(jax.nn.softmax(x), y["softmax"], np.float32) > 5 * SOFTMAX
  bar = jax.jit(lambda x: jax.vjp(jax.nn.softmax, x)[1](c)[0])(x)
  assert norms(bar, y["softmax_bar"], np.float32) > 1e3 * SOFTMAX_DERIVATIVE
