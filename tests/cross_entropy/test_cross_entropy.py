"""The two losses: values and derivatives against the oracle and optax."""

import functools
import inspect

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import check, random, relative_error

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

SOFT, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
LOSSES = {SOFT: softmax_cross_entropy, INTEGER: softmax_cross_entropy_with_integer_labels}
PEERS = {
  SOFT: optax.softmax_cross_entropy,
  INTEGER: optax.softmax_cross_entropy_with_integer_labels,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
ROWS = np.array([True, False, True])


def some_labels(name, shape, axis, seed=5, where=True):
  """Labels for logits of `shape`: random classes that are not masked, or weights of any sign."""
  if name == SOFT:
    return random(seed, shape)
  axes = oracle._axes(axis, len(shape))
  batch = [n for i, n in enumerate(shape) if i not in axes]
  mask = oracle._to_rows(where, shape, axes)
  scores = np.random.default_rng(seed).random(mask.shape)
  return np.argmax(scores * mask, axis=1).reshape(batch).astype(np.int32)


@every_loss
def test_signature_starts_as_its_peer(name):
  ours, peer = (inspect.signature(f[name]).parameters for f in (LOSSES, PEERS))
  for p, q in zip(ours.values(), peer.values(), strict=False):
    assert (p.name, p.kind, p.default) == (q.name, q.kind, q.default)
  assert len(ours) >= len(peer)


@pytest.mark.few(6)
@every_loss
@pytest.mark.parametrize(
  ("shape", "axis"),
  [
    ((), ()),
    ((5,), 0),
    ((3, 1), -1),
    ((0, 4), -1),
    ((4, 3), 0),
    ((4, 3), ()),
    ((2, 3, 4), 1),
    ((2, 3, 4), (0, -1)),
    ((2, 3, 2, 4), (-1, 1)),
  ],
)
def test_shapes_and_axes(name, shape, axis):
  logits = random(0, shape, scale=2)
  labels = some_labels(name, shape, axis)
  check(name, LOSSES[name], PEERS[name], logits, labels, axis=axis)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_soft_labels_over_all_axes(shape):
  check(SOFT, LOSSES[SOFT], PEERS[SOFT], random(0, shape), random(1, shape), axis=None)


@every_loss
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    logits = jnp.asarray(random(1, (4, 6), scale=3), dtype)
    labels = some_labels(name, (4, 6), -1)
    labels = jnp.asarray(labels, dtype if name == SOFT else "int32")
    check(name, LOSSES[name], PEERS[name], logits, labels)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")])
def test_soft_labels_of_another_dtype(dtypes):
  logits, labels = (jnp.asarray(random(i, (3, 4)), dtype) for i, dtype in enumerate(dtypes))
  check(SOFT, LOSSES[SOFT], PEERS[SOFT], logits, labels)


def test_soft_labels_may_be_whole_numbers():
  logits, labels = random(0, (3, 4)), np.eye(4, dtype=np.int32)[[1, 3, 0]]
  check(SOFT, LOSSES[SOFT], PEERS[SOFT], logits, labels)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_integer_labels_of_any_dtype_and_300_classes(dtype):
  logits = random(2, (3, 300), scale=2)
  with jax.enable_x64(dtype == "int64"):
    labels = np.minimum([0, 299, 3], np.iinfo(dtype).max).astype(dtype)
    check(INTEGER, LOSSES[INTEGER], PEERS[INTEGER], logits, labels)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_soft_labels_broadcast(shape):
  check(SOFT, LOSSES[SOFT], PEERS[SOFT], random(3, (2, 3, 4)), random(4, shape))


def test_soft_labels_broadcast_along_another_axis():
  check(SOFT, LOSSES[SOFT], PEERS[SOFT], random(3, (3, 2, 4)), random(4, (3, 1, 1)), axis=(0, 2))


@pytest.mark.few(6)
@every_loss
@pytest.mark.parametrize(
  ("axis", "where"),
  [
    (-1, MASK),
    (0, MASK),
    ((), MASK),
    ((1, 0), MASK),
    (-1, MASK[:, 3:4]),
    (-1, ROWS),
    (0, np.array([True, False, True, True, False])),
    ((0, 1), np.array(True)),
  ],
  ids=[
    "rows",
    "axis 0",
    "elementwise",
    "all",
    "column",
    "each row",
    "each row of axis 0",
    "scalar",
  ],
)
def test_masks(name, axis, where):
  """A mask of the logits' shape, one that broadcasts to it, or one value per row."""
  logits = random(6, MASK.shape, scale=2)
  expanded = where if where.ndim == 2 else np.expand_dims(where, axis)
  labels = some_labels(name, MASK.shape, axis, where=expanded)
  if name == SOFT:
    labels = np.where(expanded, labels, 0).astype(labels.dtype)
  # optax has NaN derivatives in rows that are masked altogether, and NaN for masked soft labels.
  full = np.all(np.any(np.broadcast_to(expanded, MASK.shape), axis=axis))
  peer = PEERS[name] if full and name == INTEGER else None
  check(name, LOSSES[name], peer, logits, labels, axis=axis, where=where)


CLASSES, TWO = np.array([True, True, False]), np.array([False, True])
FIVE_BY_THREE = np.random.default_rng(0).random((5, 3)) < 0.7
FOUR_BY_FIVE = np.random.default_rng(1).random((4, 5)) < 0.7


@pytest.mark.few(4)
@pytest.mark.parametrize(
  ("name", "shape", "labels_shape", "axis", "where", "of_all"),
  [
    (SOFT, (3,), (2, 3), -1, CLASSES, CLASSES),
    (SOFT, (3,), (3, 3), -1, CLASSES, CLASSES),
    (SOFT, (3,), (2, 3), -1, TWO, TWO[:, None]),
    (SOFT, (1, 3), (2, 3), -1, TWO, TWO[:, None]),
    (SOFT, (1, 3), (2, 3), -1, CLASSES[None], CLASSES),
    (SOFT, (5, 3), (4, 5, 3), -1, FIVE_BY_THREE, FIVE_BY_THREE),
    (SOFT, (5, 3), (4, 5, 3), -1, FOUR_BY_FIVE, FOUR_BY_FIVE[..., None]),
    (INTEGER, (1, 3), (2,), -1, TWO, TWO[:, None]),
    (INTEGER, (1, 3), (2,), -1, CLASSES[None], CLASSES),
    (INTEGER, (1, 3), (2,), -1, np.outer(TWO, CLASSES), np.outer(TWO, CLASSES)),
    (INTEGER, (3, 1), (2,), 0, TWO, TWO[None]),
    (INTEGER, (1, 1, 3), (2,), (1, 2), TWO, TWO[:, None, None]),
  ],
)
def test_masks_where_logits_broadcast_against_the_labels(
  name, shape, labels_shape, axis, where, of_all
):
  """As with logits and mask written out."""
  logits, labels = random(0, shape), random(1, labels_shape)
  full = labels if name == SOFT else np.expand_dims(labels, axis)
  full = np.broadcast_shapes(shape, full.shape)
  if name == INTEGER:
    labels = np.zeros(labels_shape, np.int32)

  def value_and_gradient(written_out):
    def f(z):
      mask = np.broadcast_to(of_all, full) if written_out else where
      z = jnp.broadcast_to(z, full) if written_out else z
      losses = LOSSES[name](z, labels, axis, mask)
      return losses.sum(), losses

    gradient, losses = jax.grad(f, has_aux=True)(logits)
    return losses, gradient

  chex.assert_trees_all_close(value_and_gradient(False), value_and_gradient(True), rtol=1e-6)


@every_loss
def test_rows_masked_in_a_batch_of_rank_four(name):
  logits, axis = random(7, (2, 3, 2, 2)), (1, -1)
  where = np.array([[True, False], [True, True]])
  labels = some_labels(name, logits.shape, axis)
  check(name, LOSSES[name], None, logits, labels, axis=axis, where=where)


def test_masked_soft_labels_are_left_out():
  logits, labels = random(8, MASK.shape), random(9, MASK.shape)
  check(SOFT, LOSSES[SOFT], None, logits, labels, where=MASK)
  # optax leaves them out too, but its derivative by the labels is NaN.
  ours, theirs = jax.jit(
    lambda z: [
      jax.value_and_grad(lambda z, f=f: jnp.sum(f[SOFT](z, labels, where=MASK)))(z)
      for f in (LOSSES, PEERS)
    ]
  )(logits)
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)


@every_loss
def test_jacobian_both_ways_and_second_derivatives(name):
  z = random(10, (5,), scale=2)
  t = random(11, (5,)) if name == SOFT else np.int32(2)
  f = lambda z: LOSSES[name](z, t)
  peer = lambda z: PEERS[name](z, t)
  forward, reverse, hessian, *peers = jax.jit(
    lambda z: [
      *(jax.jacfwd(f)(z), jax.jacrev(f)(z), jax.hessian(f)(z)),
      *(jax.grad(peer)(z), jax.hessian(peer)(z)),
    ]
  )(z)
  expected = oracle.jacobian(name, z, t)
  assert relative_error(forward, expected) < 1e-6
  assert relative_error(reverse, expected) < 1e-6
  assert relative_error(hessian, oracle.hessian(name, z, t)) < 1e-6
  assert relative_error(reverse, peers[0]) < 1e-5
  assert relative_error(hessian, peers[1]) < 1e-5


def test_mixed_second_derivatives_of_the_soft_loss():
  f, z, t = softmax_cross_entropy, random(12, (4,)), random(13, (4,))
  by_z_and_t, by_t_and_z, by_t_twice = jax.jit(
    lambda z, t: (
      jax.jacfwd(jax.grad(f), argnums=1)(z, t),
      jax.jacrev(jax.grad(f, argnums=1))(z, t),
      jax.jacfwd(jax.grad(f, argnums=1), argnums=1)(z, t),
    )
  )(z, t)
  # dL/dt = -log a, so by z it is minus the Jacobian of log_softmax.
  expected = -oracle.jacobian("log_softmax", z)
  assert relative_error(by_t_and_z, expected) < 1e-6
  assert relative_error(by_z_and_t, expected.T) < 1e-6
  np.testing.assert_array_equal(by_t_twice, 0)


# Digits.


@every_loss
@pytest.mark.parametrize("gap", [13.75, 23])
@pytest.mark.parametrize("label", [1, 0])
def test_confident_row_keeps_its_digits(name, gap, label):
  """The probability of class 1 is 1 - 1e-6 or 1 - 1e-10. Each entry of the gradient counts."""
  logits = np.float32([17 - gap, 17, 8.5 - gap, -20])  # no difference of two of them is rounded
  labels = np.eye(4, dtype=np.float32)[label] if name == SOFT else np.int32(label)
  loss, reverse, forward = derivatives_of(name, logits, labels)
  assert relative_error(loss, oracle.linearize(name, logits, labels)[0]) < 1e-6
  for i, expected in enumerate(oracle.jacobian(name, logits, labels)):
    assert relative_error(reverse[i], expected) < 1e-6
    assert relative_error(forward[i], expected) < 1e-6


@functools.partial(jax.jit, static_argnums=0)
def derivatives_of(name, logits, labels):
  f = lambda z: LOSSES[name](z, labels)
  return f(logits), jax.grad(f)(logits), jax.jacfwd(f)(logits)


@every_loss
@pytest.mark.parametrize("shift", [-1e8, 1e8, 3e38])
def test_equal_logits_of_any_size_cost_log_2(name, shift):
  labels = np.float32([0, 1]) if name == SOFT else np.int32(1)
  loss = LOSSES[name](np.float32([shift, shift]), labels)
  assert relative_error(loss, np.log(2)) < 1e-7


@every_loss
@pytest.mark.parametrize("scale", [0.01, 1, 100, 10000])
@pytest.mark.parametrize("classes", [2, 1000])
def test_every_row_keeps_its_digits(name, scale, classes):
  logits = random(14, (50, classes), scale=scale)
  labels = np.concatenate([np.argmax(logits[:25], axis=1), np.arange(25) % classes])
  z = logits.astype(np.longdouble) - logits.max(axis=1, keepdims=True)
  log_sum = np.log1p(np.sum(np.exp(np.sort(z)[:, :-1]), axis=1))
  expected = log_sum - z[np.arange(50), labels]
  labels = np.eye(classes, dtype=np.float32)[labels] if name == SOFT else labels
  actual = np.asarray(LOSSES[name](logits, labels), np.longdouble)
  counts = expected > 1e-35  # smaller terms may flush to zero
  error = np.max(np.abs(actual - expected)[counts] / expected[counts])
  assert error < (1e-6 if scale <= 1 else 1e-5)  # z - max is rounded, and exp magnifies it


# Properties.


@functools.partial(jax.jit, static_argnums=3)
def both_losses(logits, integers, one_hot, axis):
  """Losses and gradients by both functions."""

  def of(name, labels):
    loss, pull = jax.vjp(lambda z: LOSSES[name](z, labels, axis), logits)
    return loss, pull(jnp.ones_like(loss))[0]

  return of(INTEGER, integers), of(SOFT, one_hot)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.integers(0, 1000), st.sampled_from([1, 30]), st.sampled_from([0, 1]))
def test_integer_labels_are_one_hot_soft_labels(seed, scale, axis):
  logits = np.round(random(seed, (3, 4), scale=scale) * 4) / 4
  integers = some_labels(INTEGER, (3, 4), axis, seed)
  one_hot = np.moveaxis(np.eye(logits.shape[axis], dtype=np.float32)[integers], -1, axis)
  integer, soft = both_losses(logits, integers, one_hot, axis)
  assert np.all(integer[0] >= 0)
  chex.assert_trees_all_close(integer, soft, rtol=2e-6, atol=1e-37)
  np.testing.assert_allclose(np.sum(integer[1], axis), 0, atol=3e-7)  # a - t
  moved = both_losses(logits + 8, integers, one_hot, axis)  # exact: multiples of 1/4
  chex.assert_trees_all_equal(moved, (integer, soft))
