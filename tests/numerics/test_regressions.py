"""Faults that a reviewer found after all other tests had passed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
LABELS = jnp.array([1, 0, 3], jnp.int32)
WEIGHTS = jnp.array([1.0, 2.0, 0.5, 0.1], jnp.float32)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_mixed_second_derivative_of_an_ignored_row_at_cotangent_zero(jacobian):
  def by_weights(row_weights, class_weights):
    def loss(class_weights):
      labels = LABELS.at[2].set(-100)
      return jnp.sum(
        row_weights
        * softmax_cross_entropy_with_integer_labels(
          LOGITS, labels, class_weights=class_weights, label_smoothing=0.1, ignore_index=-100
        )
      )

    return jax.grad(loss)(class_weights)

  mixed = jacobian(by_weights)(jnp.zeros(3), WEIGHTS)
  np.testing.assert_array_equal(mixed[:, 2], 0)
  assert np.all(mixed[:, 0] != 0)


@pytest.mark.without("debug_nans")
def test_both_modes_agree_on_the_normalizer_of_a_row_with_a_bad_label():
  def z_loss(logits):
    labels = jnp.array([1, 99, 3])
    return softmax_cross_entropy_with_integer_labels(logits, labels, z_loss=0.1, return_aux=True)[
      1
    ].z_loss.sum()

  expected = jax.grad(lambda z: 0.1 * jnp.sum(jax.nn.logsumexp(z, axis=-1) ** 2))(LOGITS)
  for derivative in (jax.grad, jax.jacfwd):
    assert relative_error(derivative(z_loss)(LOGITS), expected) < 1e-6


@pytest.mark.without("debug_nans")
def test_a_row_with_a_bad_label_that_a_select_discards_has_gradient_zero():
  labels = jnp.array([1, -1, 3])

  def loss(logits):
    losses = softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(jnp.where(labels >= 0, losses, 0))

  gradient = jax.grad(loss)(LOGITS)
  np.testing.assert_array_equal(gradient[1], 0)
  assert np.all(gradient[0] != 0)


@pytest.mark.without("enable_x64")
def test_strict_promotion_with_every_option():
  mask = (LOGITS > -1).at[jnp.arange(3), LABELS].set(True)
  shares = jnp.full(LOGITS.shape, 0.2)

  def loss(logits, weights):
    options = {"where": mask, "label_smoothing": 0.1, "class_weights": weights, "z_loss": 0.1}
    hard = softmax_cross_entropy_with_integer_labels(logits, LABELS, **options)
    return jnp.sum(hard) + jnp.sum(softmax_cross_entropy(logits, shares, **options))

  expected = jax.grad(loss, argnums=(0, 1))(LOGITS, WEIGHTS)
  with jax.numpy_dtype_promotion("strict"):
    actual = jax.grad(loss, argnums=(0, 1))(LOGITS, WEIGHTS)
  for x, y in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(x, y)


def test_logsumexp_respects_weak_types():
  a = LOGITS.astype(jnp.bfloat16)
  assert logsumexp(a, b=2.0).dtype == jax.nn.logsumexp(a, b=2.0).dtype == jnp.bfloat16


@pytest.mark.without("disable_jit")  # which makes an array of each constant, NaN too
def test_no_nan_is_made_on_the_way():
  with jax.debug_nans(True):
    logsumexp(LOGITS, b=jnp.abs(LOGITS))
    jax.grad(lambda z: logsumexp(z, b=jnp.abs(LOGITS)))(LOGITS)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("wide", [2**32 + 1, np.int64(2**32 + 1), np.uint64(2**63)])
def test_wide_integers_are_not_wrapped(wide):
  expected = softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
  ignoring = softmax_cross_entropy_with_integer_labels(LOGITS, LABELS, ignore_index=wide)
  np.testing.assert_array_equal(ignoring, expected)
  labels = np.array([1, 0, int(wide)], np.uint64)
  losses = softmax_cross_entropy_with_integer_labels(LOGITS, labels)
  np.testing.assert_array_equal(np.isnan(losses), [False, False, True])


@pytest.mark.without("enable_x64")
def test_dtypes_that_do_not_promote():
  message = (
    "logsumexp expected a and b of dtypes that promote to a common one, got bfloat16 and float32. "
    "Convert one with astype."
  )
  with jax.numpy_dtype_promotion("strict"), pytest.raises(TypeError) as raised:
    logsumexp(LOGITS.astype(jnp.bfloat16), b=WEIGHTS)
  assert str(raised.value) == message


def test_the_first_argument_broadcasts_too():
  """To a second one of more entries, with a gradient of its own shape."""
  a, b = LOGITS[:1], jnp.abs(LOGITS) + 1
  wide = jnp.broadcast_to(a, b.shape)
  for f in (lambda a: logsumexp(a, axis=-1, b=b), lambda a: softmax_cross_entropy(a, b)):
    total = lambda a, f=f: jnp.vdot(f(a), jnp.arange(1.0, 4))
    assert relative_error(f(a), f(wide)) < 1e-6
    expected = jax.grad(total)(wide).sum(axis=0, keepdims=True)
    assert relative_error(jax.grad(total)(a), expected) < 1e-6


# XLA may fuse the product that forms the logits into what follows. CPU and GPU then subtract from
# the unrounded product, and max(z) - z_max is not 0: losses were off by up to 9 %.

PRODUCTS = {
  "times": lambda y: y * 1.7,
  "softcap": lambda y: 20.1 * jnp.tanh(y / 20.1),
  "bias and temperature": lambda y: 1.3 * (y + 0.1 * jnp.arange(y.shape[-1], dtype=y.dtype)[None]),
}


def losses_of_product(product, y, t):
  z = PRODUCTS[product](y)
  one_hot = jax.nn.one_hot(t, y.shape[-1])
  return (
    softmax_cross_entropy_with_integer_labels(z, t),
    softmax_cross_entropy(z, one_hot),
    logsumexp(z, -1),
    -jnp.take_along_axis(log_softmax(z), t[:, None], 1)[:, 0],
  )


@pytest.mark.parametrize("num_classes", [4, 16, 40, 130])
@pytest.mark.parametrize("product", PRODUCTS)
def test_logits_that_are_fused_products_are_rounded_first(product, num_classes):
  rng = np.random.default_rng(num_classes)
  y = jnp.asarray(rng.normal(size=(24, num_classes)) * 3, jnp.float32)
  y = y.at[::2, 1].set(19)  # rows of which the loss is small
  t = jnp.where(jnp.arange(24) % 3, 1, jnp.asarray(rng.integers(0, num_classes, 24)))
  z = np.asarray(jax.jit(PRODUCTS[product])(y), np.float64)
  top = z.max(-1, keepdims=True)
  others = np.where(z == top, 0, np.exp(z - top)).sum(-1)
  lse = top[:, 0] + np.log1p(others)
  nll = (top[:, 0] - z[np.arange(24), t]) + np.log1p(others)
  by_compiler = jax.jit(lambda y, t: losses_of_product(product, y, t))(y, t)
  for loss, expected in zip(by_compiler, (nll, nll, lse, nll), strict=True):
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


# In short rows the loops that XLA fuses such logits into round them differently: the largest
# log-probability came out as 1.9e-6, or with few digits where it was negative.


@pytest.mark.without("enable_x64")
@pytest.mark.parametrize("num_classes", [2, 3, 5, 7, 9])
def test_confident_logits_that_are_fused_affine_functions(num_classes):
  rng = np.random.default_rng(num_classes)
  y = np.float32(rng.normal(size=(64, num_classes)))
  y[:, 0] += 9
  b = np.float32(rng.normal(size=(1, num_classes)))
  t = np.zeros(64, int)
  logits = lambda y: 2.3 * y + b
  z = np.asarray(jax.jit(logits)(y), np.float64)
  others = np.exp(z[:, 1:] - z[:, :1]).sum(1)
  loss, gradient = np.log1p(others), -others / (1 + others)  # the gradient at the label

  @jax.jit
  def by_compiler(y):
    one_hot = jax.nn.one_hot(t, num_classes)
    losses = {
      "integer": lambda z: softmax_cross_entropy_with_integer_labels(z, t),
      "soft": lambda z: softmax_cross_entropy(z, one_hot),
      "log_softmax": lambda z: -log_softmax(z)[:, 0],
    }
    return {
      name: (f(logits(y)), jax.vjp(f, logits(y))[1](jnp.ones(64))[0][:, 0])
      for name, f in losses.items()
    }

  for name, (value, slope) in by_compiler(y).items():
    np.testing.assert_allclose(value, loss, rtol=5e-6, err_msg=name)
    np.testing.assert_allclose(slope, gradient, rtol=5e-6, err_msg=name)


def test_a_difference_of_logits_that_overflows():
  """A limit: the term is infinite, however small its share, and the gradient is as ever."""
  largest = np.finfo(np.float32).max
  logits, shares = np.array([-largest, largest]), np.array([0.25, 0.25], np.float32)
  value, gradient = jax.value_and_grad(softmax_cross_entropy)(logits.astype(np.float32), shares)
  assert value == np.inf
  np.testing.assert_array_equal(gradient, [-0.25, 0.25])
  assert softmax_cross_entropy(logits.astype(np.float32), np.float32([0, 1])) == 0


# A 1 of the default dtype made the uniform label of masked classes one of float64 under x64, where
# forward mode then refused the loss.


def test_smoothing_over_unmasked_classes_keeps_float32_under_x64():
  z, mask = np.float32([[1, 2, 0], [0, 1, 3]]), np.array([[True, True, False], [True] * 3])
  options = {"where": mask, "label_smoothing": 0.1}
  losses = {
    "integer": lambda z: softmax_cross_entropy_with_integer_labels(z, np.array([1, 0]), **options),
    "soft": lambda z: softmax_cross_entropy(z, np.full((2, 3), 1 / 3, np.float32), **options),
  }
  with jax.enable_x64(True):
    for name, loss in losses.items():
      assert loss(z).dtype == np.float32, name
      assert jax.hessian(lambda z: loss(z).sum())(z).dtype == np.float32, name  # noqa: B023
