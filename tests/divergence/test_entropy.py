"""The entropy of a softmax: values, derivatives, and their digits."""

import functools

import divergence_truth
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import check, random, relative_error
from row_forms import BY_PLATFORM, in_form

from softmax_jax import softmax_entropy
from softmax_jax.derivatives import softmax_jvp

ENTROPY = "softmax_entropy"
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
U = 2.0**-24


def peer(z, axis=-1):
  return -jnp.sum(jax.nn.softmax(z, axis) * jax.nn.log_softmax(z, axis), axis)


@pytest.mark.parametrize(
  ("shape", "axis"),
  [((5,), 0), ((3, 1), -1), ((0, 4), -1), ((4, 3), 0), ((2, 3, 4), 1), ((2, 3, 4), (0, -1))],
)
def test_shapes_and_axes(shape, axis):
  check(ENTROPY, softmax_entropy, peer, random(0, shape), axis=axis)


def test_all_axes():
  check(ENTROPY, softmax_entropy, peer, random(0, (2, 3)), axis=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
  with jax.enable_x64(dtype == "float64"):
    check(ENTROPY, softmax_entropy, peer, jnp.asarray(random(0, (3, 5), np.float64), dtype))


@pytest.mark.parametrize("where", [MASK, MASK[:1], MASK[:, 1]], ids=["all", "classes", "rows"])
def test_masks(where):
  check(ENTROPY, softmax_entropy, None, random(0, (3, 5)), where=where)


@pytest.fixture(scope="module", params=[BY_PLATFORM, "one_read"])
def form(request):
  """The form of the sums along a row: that for this platform, and that for accelerators."""
  with in_form(request.param):
    yield


def rows(classes):
  """Uniform, ordinary and sure rows, and ties."""
  rng = np.random.default_rng(classes)
  noise = lambda scale=1.0: scale * rng.normal(size=(6, classes))
  label = np.eye(classes)[rng.integers(0, classes, 6)]
  found = {f"scale {scale:g}": noise(scale) for scale in (1e-6, 1e-3, 0.1, 1, 10, 100, 1e4)}
  found |= {f"sure by {lead}": noise() + lead * label for lead in (5, 10, 30, 60)}
  found["two of them"] = noise() + 30 * (label + np.roll(label, 1, -1))
  found["uniform"] = np.full((6, classes), 1e4)
  found["ties"] = np.round(noise(2))
  return {name: np.float32(x) for name, x in found.items()}


@functools.partial(jax.jit)
def value_and_gradient(z):
  y, pull = jax.vjp(softmax_entropy, z)
  (bar,) = pull(jnp.ones_like(y))
  return y, bar, jax.jvp(softmax_entropy, (z,), (bar,))[1]


@pytest.mark.few(3)
@pytest.mark.parametrize("classes", [2, 10, 17, 300])
def test_digits(classes, form):
  cases = rows(classes)
  z = np.concatenate(list(cases.values()))
  value, gradient = divergence_truth.entropy(z)
  actual, bar, dot = map(np.asarray, value_and_gradient(z))
  assert np.all(actual >= 0)
  error = np.abs(actual - value) / np.where(value > 1e-30, value, np.inf)
  assert np.max(error) <= 8 * U, list(cases)[np.argmax(error) // 6]
  size = np.sqrt(np.sum(gradient**2, axis=1))
  counts = size > 1e-14
  error = np.sqrt(np.sum((bar - gradient) ** 2, axis=1)) / np.where(size > 1e-28, size, np.inf)
  assert np.max(error) <= 16 * U, list(cases)[np.argmax(error) // 6]
  error = np.abs(dot - size**2) / np.where(counts, size**2, np.inf)
  assert np.max(error) <= 32 * U, list(cases)[np.argmax(error) // 6]


def test_the_usual_formula_loses_what_is_kept_here():
  z = np.float32([30, 0, 1])
  expected, gradient = divergence_truth.entropy(z[None])
  assert relative_error(peer(z), expected[0]) > 1e-3
  assert relative_error(softmax_entropy(z), expected[0]) < 4 * U
  assert relative_error(jax.grad(softmax_entropy)(z), gradient[0]) < 8 * U


def test_the_gradient_is_minus_the_jacobian_times_the_logits():
  z = random(0, (3, 6))
  gradient = jax.grad(lambda z: softmax_entropy(z).sum())(z)
  assert relative_error(gradient, -softmax_jvp(z, z)) < 1e-6


def test_second_derivatives_keep_their_digits_in_sure_rows():
  """d/dz_k of -a_j (log a_j + H), each with the sums of the others."""
  z = np.float32([40, 0, 1, -2])
  hessian = jax.hessian(softmax_entropy)(z)
  with jax.enable_x64(True):
    expected = jax.hessian(lambda z: softmax_entropy(z))(np.float64(z))
  assert relative_error(hessian, expected) < 32 * U
  # To the first order in e_k = exp(z_k - 40), H is sum_k e_k (1 + 40 - z_k).
  e = np.exp(np.float64(z) - 40)[1:]
  diagonal = e * (40 - np.float64(z)[1:] - 1)
  assert relative_error(np.diag(np.asarray(hessian)[1:, 1:]), diagonal) < 1e-6
