"""What holds of softmax and its losses for any logits, as hypothesis draws them.

A case is a row of kinds of numbers (ordinary, tied, huge, tiny, far apart) of one shape and dtype;
programs are compiled once per shape and dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import softmax_jax
from softmax_jax import derivatives
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy

SHAPES = [(3, 2), (2, 5), (1, 17)]
SCALES = (1e-30, 1e-3, 1.0, 10.0, 1e4)
U = 2.0**-24  # one rounding error in float32


@st.composite
def logits(draw):
  """Rows of float32, with ties and far outliers."""
  shape = draw(st.sampled_from(SHAPES))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  z = rng.standard_normal(shape) * draw(st.sampled_from(SCALES))
  if draw(st.booleans()):
    z[:, 0] = z.max(axis=1)  # a tie with the largest
  if draw(st.booleans()):
    z[:, -1] = z.max(axis=1) + draw(st.sampled_from([1.0, 20.0, 80.0]))  # one class leads
  return z.astype(np.float32)


EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def property_of(*strategies):
  """A test of a hundred cases, the same in every run."""
  return lambda f: EXAMPLES(given(*strategies)(f))


@functools.cache
def compiled(f):
  return jax.jit(f)


def labels_of(z):
  return np.arange(len(z)) % z.shape[1]


def loss(z, labels):
  return cross_entropy(z, labels)


def gradient(z, labels):
  return jax.grad(lambda z: cross_entropy(z, labels).sum())(z)


def lse(z):
  return softmax_jax.logsumexp(z, axis=-1)


jacobians = jax.vmap(jax.jacrev(softmax_jax.softmax))
by_row = jax.vmap(jax.value_and_grad(cross_entropy))


def softmax_where(z, where):
  return softmax_jax.softmax(z, where=where)


def in_both_modes(f):
  tangent = lambda z, v: jax.jvp(f, (z,), (v,))[1]
  cotangent = lambda z, u: jax.vjp(f, z)[1](u)[0]
  return jax.jit(tangent), jax.jit(cotangent)


DUAL = [
  in_both_modes(f)
  for f in (
    softmax_jax.softmax,
    softmax_jax.log_softmax,
    lse,
    lambda z: cross_entropy(z, jnp.zeros(len(z), int), label_smoothing=0.1, z_loss=0.1),
    lambda z: softmax_jax.softmax_cross_entropy(
      z, jax.nn.one_hot(jnp.zeros(len(z), int), z.shape[1])
    ),
  )
]


def error(computed, expected):
  """In norm, relative to the expected rows."""
  computed, expected = np.asarray(computed, float), np.asarray(expected, float)
  size = np.linalg.norm(expected)
  return np.linalg.norm(computed - expected) / size if size else np.linalg.norm(computed)


# Shifts that cost no rounding: whole numbers, where the logits are multiples of 2**-10 below 2**10.
@property_of(logits(), st.integers(-1000, 1000))
def test_a_shift_changes_nothing(z, shift):
  z = np.clip(np.round(z * 1024) / 1024, -1000, 1000).astype(np.float32)
  moved, labels = z + np.float32(shift), labels_of(z)
  assert error(compiled(softmax_jax.softmax)(moved), compiled(softmax_jax.softmax)(z)) <= 4 * U
  assert error(compiled(loss)(moved, labels), compiled(loss)(z, labels)) <= 8 * U
  assert error(compiled(gradient)(moved, labels), compiled(gradient)(z, labels)) <= 8 * U


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_permuted_classes_give_permuted_results(z, seed):
  order = np.random.default_rng(seed).permutation(z.shape[1])
  labels, place = labels_of(z), np.argsort(order)
  softmax = compiled(softmax_jax.softmax)
  # Sums in another order: up to one rounding error per class.
  bound = (8 + z.shape[1]) * U
  assert error(softmax(z[:, order]), np.asarray(softmax(z))[:, order]) <= bound
  permuted = compiled(gradient)(z[:, order], place[labels])
  assert error(permuted, np.asarray(compiled(gradient)(z, labels))[:, order]) <= bound


@property_of(logits())
def test_probabilities_sum_to_one_and_gradients_to_zero(z):
  a = np.asarray(compiled(softmax_jax.softmax)(z), np.float64)
  assert np.all(a >= 0)
  np.testing.assert_allclose(a.sum(axis=1), 1, rtol=z.shape[1] * 4 * U, atol=0)
  g = np.asarray(compiled(gradient)(z, labels_of(z)), np.float64)
  assert np.all(np.abs(g.sum(axis=1)) <= 8 * U * np.abs(g).sum(axis=1))


@property_of(logits())
def test_losses_are_not_negative_and_at_least_the_gap_to_the_largest(z):
  labels = labels_of(z)
  value = np.asarray(compiled(loss)(z, labels), np.float64)
  gap = z.max(axis=1).astype(float) - z[np.arange(len(z)), labels]
  assert np.all(value >= 0)
  assert np.all(value >= gap * (1 - 2 * U))
  assert np.all(value <= (gap + np.log(z.shape[1])) * (1 + 4 * U))


@property_of(logits(), st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
def test_logsumexp_is_convex(z, seed, part):
  other = (z + np.random.default_rng(seed).standard_normal(z.shape)).astype(np.float32)
  part = np.float32(part)
  between = compiled(lse)(part * z + (1 - part) * other)
  above = part * compiled(lse)(z) + (1 - part) * compiled(lse)(other)
  # The point between is itself rounded, by u of its largest logit, and so are the sides.
  slack = 8 * U * (1 + np.abs(z).max() + np.abs(other).max())
  assert np.all(np.asarray(between) <= np.asarray(above) + slack)


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_the_jacobian_is_symmetric_and_positive_semidefinite(z, seed):
  J = np.asarray(compiled(jacobians)(z), np.float64)
  assert error(J, J.swapaxes(1, 2)) <= 16 * U
  assert error(J, compiled(derivatives.softmax_jacobian)(z)) <= 64 * U
  v = np.random.default_rng(seed).standard_normal(z.shape).astype(np.float32)
  size = np.linalg.norm(J, axis=(1, 2)) * np.square(v).sum(axis=1)
  assert np.all(np.einsum("bi,bij,bj->b", v, J, v) >= -64 * U * size)
  product = np.asarray(compiled(derivatives.cross_entropy_hvp)(z, v), np.float64)
  assert np.all((v * product).sum(axis=1) >= -64 * U * size)


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_forward_and_reverse_mode_are_transposed(z, seed):
  """<u, J v> = <J^T u, v>, relative to what the products could be."""
  rng = np.random.default_rng(seed)
  v = rng.standard_normal(z.shape).astype(np.float32)
  for tangent, cotangent in DUAL:
    y_dot = np.asarray(tangent(z, v), np.float64)
    u = rng.standard_normal(y_dot.shape).astype(np.float32)
    z_bar = np.asarray(cotangent(z, u), np.float64)
    size = np.linalg.norm(u) * np.linalg.norm(y_dot) + np.linalg.norm(z_bar) * np.linalg.norm(v)
    assert abs((u * y_dot).sum() - (z_bar * v).sum()) <= 64 * U * size


@property_of(logits())
def test_a_batch_is_its_rows(z):
  labels = labels_of(z)
  rows = compiled(by_row)(z, labels)
  assert error(rows[0], compiled(loss)(z, labels)) <= 4 * U
  assert error(rows[1], compiled(gradient)(z, labels)) <= 4 * U


@property_of(logits())
def test_masking_is_slicing(z):
  """Whatever the masked class holds."""
  for rubbish in (np.nan, np.inf, 1e30):
    wide = np.insert(z, 1, rubbish, axis=1).astype(np.float32)
    where = np.ones(wide.shape, bool)
    where[:, 1] = False
    masked = np.asarray(compiled(softmax_where)(wide, where))
    assert np.all(masked[:, 1] == 0)
    sliced = compiled(softmax_jax.softmax)(z)
    # The sum may take its terms in another order.
    assert error(np.delete(masked, 1, axis=1), sliced) <= (4 + z.shape[1]) * U
