"""What holds of softmax and its losses for any logits, as hypothesis draws them.

A case is a row of kinds of numbers (ordinary, tied, huge, tiny, far apart, infinite, NaN) of one
shape and dtype; programs are compiled once per shape and dtype. `pytest -m long` draws thousands.
"""

import functools

import jax
import numpy as np
import plain
import pytest
from drawn_cases import (
  PROPERTIES,
  SEEDS,
  SHARE,
  TINY,
  U,
  compiled,
  draw_many,
  labels_of,
  logits,
  options,
  property_of,
)
from hypothesis import strategies as st
from property_programs import (
  DUAL,
  LINEAR,
  OPTIONS,
  along,
  by_row,
  error,
  gradient,
  jacobians,
  loss,
  lse,
  softmax_where,
)

import softmax_jax
from softmax_jax import derivatives


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
    difference = abs((u * y_dot).sum() - (z_bar * v).sum())
    assert difference <= 64 * U * size + 16 * z.size * TINY


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


@property_of(logits(), options(), SEEDS)
def test_options_are_what_they_are_composed_of(z, chosen, seed):
  alpha, z_loss, weights = chosen
  rng = np.random.default_rng(seed)
  z = np.clip(z, -50, 50)
  labels, shares = rng.integers(0, z.shape[1], len(z)), rng.uniform(size=z.shape)
  args = z, labels, shares.astype(np.float32), alpha, z_loss, weights(z.shape[1])
  ours, composed = (compiled(f)(*args) for f in OPTIONS)
  # The terms, of a loss or of its gradient, are of this size.
  size = 1 + np.abs(z).max() + 2 * z_loss * (4 + np.abs(z).max()) ** 2
  divisor = max(1e-30, min(1.0, float(args[5][labels[labels != 1]].sum() or 1)))
  for x, y in zip(jax.tree.leaves(ours[0][1]), jax.tree.leaves(composed[0][1]), strict=True):
    np.testing.assert_allclose(x, y, rtol=32 * U, atol=16 * U * size / divisor)
  for x, y in zip(ours[1], composed[1], strict=True):
    bound = 64 * U * size * len(z) * (1 + z.shape[1]) / divisor**2
    np.testing.assert_allclose(x, y, rtol=64 * U, atol=bound)


OFTEN_ZERO = st.one_of(st.sampled_from([0.0, 0.0, 1.0]), SHARE)


@property_of(
  st.sampled_from(["integer", "soft"]),
  SEEDS,
  OFTEN_ZERO,
  OFTEN_ZERO,
  st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_second_derivatives_are_those_of_a_plain_formula(function, seed, alpha, z_loss, zeros):
  """By all arguments at once, in every nesting of two modes, whatever of them is 0 or masked."""
  rng = np.random.default_rng(seed)
  weights = np.where(zeros, 0, rng.uniform(size=5))
  program = function, 5, np.float32, False
  args, rows = plain.case(*program, alpha=alpha, z_loss=z_loss, weights=weights)
  args["logits"][:] = rng.standard_normal((3, 5))
  masked = rng.uniform(size=(3, 5)) < 0.2
  masked[np.arange(3), rows.labels] = False
  masked[rng.uniform(size=3) < 0.3] = True
  args["logits"][masked] = rng.choice([0, 1, np.nan, np.inf, -np.inf])
  rows.where[masked], rows.share[masked] = False, 0
  rows.classes[:] = np.maximum(np.sum(~masked, axis=1), 1)
  plain.assert_right(program, [(args, rows)], floor=1 / 4)


@property_of(SEEDS, options(), st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_the_linear_loss_is_the_dense_loss_of_the_product(seed, chosen, scale):
  rng = np.random.default_rng(seed)
  alpha, z_loss, weights = chosen
  x, weight, bias = (
    (scale * rng.standard_normal(shape)).astype(np.float32) for shape in ((5, 3), (3, 6), (6,))
  )
  labels = rng.integers(-1, 5, 5)
  # Away from 0, by which a mean would multiply the rounding errors.
  args = x, weight, labels, bias, alpha, z_loss, weights(6) + np.float32(0.125)
  ours, composed = (compiled(f)(*args) for f in LINEAR)
  largest = 1 + 3 * np.abs(x).max() * np.abs(weight).max() + np.abs(bias).max()
  size = largest * (1 + z_loss * largest)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(composed), strict=True):
    bound = 64 * U * size * (1 + np.abs(x).max()) * (1 + np.abs(weight).max())
    np.testing.assert_allclose(a, b, rtol=64 * U, atol=8 * bound)
  # A row that does not count may hold anything.
  x = np.where(labels[:, None] == -1, np.nan, x).astype(np.float32)
  spoiled = compiled(LINEAR[0])(x, *args[1:])
  for a, b in zip(jax.tree.leaves(spoiled), jax.tree.leaves(ours), strict=True):
    np.testing.assert_array_equal(a, b)


AXES = [-1, 0, (0, 2), None]
MORE_AXES = [*AXES, 1, -2, -3, (1,), (0, 1), (2, 1), (-1, 0), (0, 1, 2), ()]


ALONG = {axis: along(axis) for axis in MORE_AXES}
LAST = along(-1)


@property_of(st.sampled_from(AXES), SEEDS, many=(st.sampled_from(MORE_AXES), SEEDS))
def test_any_axes_are_the_last_one_of_a_transposed_array(axis, seed):
  rng = np.random.default_rng(seed)
  x = (rng.standard_normal((2, 3, 4)) * 10).astype(np.float32)
  mask = rng.uniform(size=x.shape) < 0.7
  axes = range(3) if axis is None else axis if isinstance(axis, tuple) else (axis,)
  axes = sorted(a % 3 for a in axes)
  order = [a for a in range(3) if a not in axes] + axes
  rows = lambda a: a.transpose(order).reshape(-1, int(np.prod([x.shape[a] for a in axes])))
  ours = ALONG[axis](x, mask)
  expected = LAST(rows(x), rows(mask))
  same = functools.partial(np.testing.assert_allclose, rtol=32 * U, atol=64 * U)
  for a, b in zip(jax.tree.leaves([ours[0], ours[2]]), [*expected[0], expected[2]], strict=True):
    same(rows(np.asarray(a)), b)
  same(np.asarray(ours[1]).ravel(), np.asarray(expected[1]).ravel())


# --- many cases -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROPERTIES[__name__])
def test_many_cases(name, seed):
  draw_many(__name__, name, seed)
