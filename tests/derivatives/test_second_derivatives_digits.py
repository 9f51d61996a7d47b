"""The digits of second derivatives, and what else JAX forms of the rules.

Where one class holds nearly all of the probability the Hessian of a row is as small as what is left
for the others, and every product with it has to be right relative to that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import plain
import pytest
from leading_rows import FUNCTIONS, INTEGER, TOP, along, leading, products, wide_hessian
from oracle import random, relative_error

import softmax_jax
from softmax_jax import derivatives


@pytest.mark.parametrize("classes", [pytest.param(5, marks=pytest.mark.long), 19])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hessian_products_keep_their_digits_where_one_class_leads(function, classes):
  z, u = leading(classes), random(1, (4, classes))
  f, factor = FUNCTIONS[function]
  hessians = factor * wide_hessian(z)
  for nesting, actual in products(f, z, u).items():
    for row, hessian, v, hvp in zip(range(4), hessians, u, np.asarray(actual), strict=True):
      assert relative_error(hvp, hessian @ v.astype(np.longdouble)) < 1e-5, (nesting, row)


@pytest.mark.parametrize("classes", [pytest.param(5, marks=pytest.mark.long), 19])
@pytest.mark.parametrize("function", ["integer", "logsumexp"])
def test_hessian_products_are_those_of_the_closed_forms(function, classes):
  z, u = leading(classes), random(1, (4, classes))
  expected = derivatives.cross_entropy_hvp(z, u)
  for nesting, actual in products(FUNCTIONS[function][0], z, u).items():
    for row in range(4):
      assert relative_error(actual[row], expected[row]) < 1e-5, (nesting, row)


@pytest.mark.parametrize("function", ["integer", "spread", "logsumexp"])
def test_third_derivatives_keep_their_digits_where_one_class_leads(function):
  z, u, v = leading(5), random(1, (4, 5)), random(2, (4, 5))
  f, factor = FUNCTIONS[function]

  @jax.jit
  def third(z):
    gradient = jax.grad(lambda z: jnp.sum(f(z)))
    forward = along(along(gradient, u), v)(z)
    reverse = jax.grad(lambda z: jnp.vdot(jax.grad(lambda z: jnp.vdot(gradient(z), u))(z), v))(z)
    return {"forward": forward, "reverse": reverse}

  for mode, actual in third(z).items():
    for row in range(4):
      tensor = factor * oracle.hessian("softmax", z[row])
      expected = np.einsum("ijk,j,k->i", tensor, u[row], v[row])
      assert relative_error(actual[row], expected) < 1e-5, (mode, row)


def linear_hessians(x, weight, bias, label):
  """Of the linear loss of one token, by x, weight and bias, in extended precision."""
  x, weight, bias = (oracle.wide(a) for a in (x, weight, bias))
  z = x @ weight + bias
  num_features, classes = weight.shape
  by_weight = np.einsum("h,jk->hjk", x, np.eye(classes)).reshape(-1, classes)
  slopes = {"x": weight, "weight": by_weight, "bias": np.eye(classes)}
  inner = oracle.hessian("logsumexp", z)
  is_label = np.arange(classes) == label
  outer = oracle.jacobian("softmax_cross_entropy_with_integer_labels", z, label)
  hessians = {(i, j): slopes[i] @ inner @ slopes[j].T for i in slopes for j in slopes}
  assert is_label.any()
  mixed = np.einsum("hg,k->hgk", np.eye(num_features), outer).reshape(num_features, -1)
  hessians["x", "weight"] += mixed
  hessians["weight", "x"] += mixed.T
  return hessians


@pytest.mark.parametrize("reduction", ["none", pytest.param("sum", marks=pytest.mark.long), "mean"])
def test_the_linear_loss_keeps_the_digits_of_its_hessian_where_one_class_leads(reduction):
  """Logits that float32 holds exactly: their own rounding would be an error of exp(-40)."""
  rng = np.random.default_rng(0)
  weight = rng.integers(-3, 3, size=(2, 5)).astype(np.float32)
  bias = np.array([1, 0, 40, 2, -1], np.float32)
  rows = plain.Rows(*[None] * 5)
  for label in (TOP, 0):
    x = np.array([[1, -2]], np.float32)
    args = {"x": x, "weight": weight, "bias": bias}
    labels = rows._replace(labels=np.array([label]))
    run = linear_program(reduction)
    hvps = run(args, labels, plain.directions_for(args)).hvps
    expected = linear_hessians(x[0], weight, bias, label)
    parts = {name: np.flatnonzero(plain.flat(args, {name: True})) for name in sorted(args)}
    for nesting in plain.NESTINGS[:3]:
      hessian = np.asarray(hvps[nesting])[len(args) :]
      for i, j in expected:
        actual = hessian[np.ix_(parts[i], parts[j])]
        assert relative_error(actual, expected[i, j]) < 1e-5, (nesting, label, i, j)


@functools.cache
def linear_program(reduction):
  loss = plain.FUNCTIONS[f"linear, {reduction}"]
  number = lambda args, rows: jnp.sum(loss(args, rows))
  return jax.jit(plain.second_order(number, plain.NESTINGS[:3]))


# What JAX forms of the rules.


def test_the_vjp_of_the_integer_loss_can_be_transposed():
  z, u = random(0, (4, 5)), random(1, (4, 5))
  transposed = jax.linear_transpose(lambda bar: jax.vjp(INTEGER, z)[1](bar)[0], INTEGER(z))
  (actual,) = transposed(u)
  assert relative_error(actual, jax.jvp(INTEGER, (z,), (u,))[1]) < 1e-6


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("bad", [99, -1])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}])
def test_an_invalid_label_gives_nan_in_its_own_row_unless_a_select_discards_it(bad, options):
  labels, z = np.array([TOP, bad, 1, 4]), random(0, (4, 5))
  loss = functools.partial(
    softmax_jax.softmax_cross_entropy_with_integer_labels, labels=labels, **options
  )
  is_bad = np.array([False, True, False, False])
  gradient = jax.grad(lambda z: jnp.sum(loss(z)))(z)
  np.testing.assert_array_equal(np.isnan(loss(z)), is_bad)
  np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(is_bad[:, None], z.shape))
  discarded = jax.grad(lambda z: jnp.sum(jnp.where(is_bad, 0, loss(z))))(z)
  np.testing.assert_array_equal(discarded[1], 0)
  np.testing.assert_array_equal(discarded[~is_bad], gradient[~is_bad])


PENALIZED = {
  "integer": lambda z, labels: softmax_jax.softmax_cross_entropy_with_integer_labels(
    z, labels, ignore_index=-1, z_loss=0.1
  ),
  "soft": lambda z, labels: softmax_jax.softmax_cross_entropy(
    z, jax.nn.one_hot(labels, z.shape[1]), where=labels >= 0, z_loss=0.1
  ),
  "linear": lambda x, labels: softmax_jax.linear_softmax_cross_entropy(
    x, random(3, (5, 6)), labels, ignore_index=-1, z_loss=0.1, reduction="sum"
  ),
}


@pytest.mark.parametrize("name", PENALIZED)
def test_a_gradient_penalty_over_a_padded_batch_is_that_of_the_rest(name):
  z, labels = random(0, (4, 5)), np.array([TOP, -1, 1, -1])
  z[1], z[3] = np.nan, np.inf
  loss = lambda z, labels: jnp.sum(PENALIZED[name](z, labels))
  penalty = lambda z, labels: jnp.sum(jax.grad(loss)(z, labels) ** 2)
  value, gradient = jax.jit(jax.value_and_grad(penalty))(z, labels)
  rest = labels >= 0
  expected, expected_gradient = jax.jit(jax.value_and_grad(penalty))(z[rest], labels[rest])
  assert relative_error(value, expected) < 1e-6
  assert relative_error(gradient[rest], expected_gradient) < 1e-6
  np.testing.assert_array_equal(gradient[~rest], 0)


# One argument at a time, as hypergradients are taken: JAX then tells the rules that the others do
# not move.


@pytest.mark.few(1)
@pytest.mark.parametrize(
  ("name", "coefficient"),
  [
    ("integer", "label_smoothing"),
    ("soft", "z_loss"),
    ("linear", "z_loss"),
    pytest.param("integer", "z_loss", marks=pytest.mark.long),
    pytest.param("soft", "label_smoothing", marks=pytest.mark.long),
    pytest.param("linear", "label_smoothing", marks=pytest.mark.long),
  ],
)
def test_the_gradient_moves_with_a_coefficient_of_zero(name, coefficient):
  """The derivative by an array of 0, without jit, is what small steps show: it is affine."""
  z, labels = random(0, (4, 5)), np.array([TOP, 0, 1, 3])
  weight = random(3, (5, 6))
  losses = {
    "integer": lambda z, c: softmax_jax.softmax_cross_entropy_with_integer_labels(
      z, labels, **{coefficient: c}
    ),
    "soft": lambda z, c: softmax_jax.softmax_cross_entropy(
      z, jax.nn.one_hot(labels, 5), **{coefficient: c}
    ),
    "linear": lambda z, c: softmax_jax.linear_softmax_cross_entropy(
      z, weight, labels, reduction="none", **{coefficient: c}
    ),
  }
  gradient = jax.grad(lambda z, c: jnp.sum(losses[name](z, c)))
  by_coefficient = jax.grad(lambda c, z: jnp.sum(losses[name](z, c)))
  zero = jnp.zeros(())
  expected = gradient(z, jnp.ones(())) - gradient(z, zero)
  for jacobian in (jax.jacfwd, jax.jacrev):
    assert relative_error(jacobian(gradient, argnums=1)(z, zero), expected) < 1e-5
    assert relative_error(jacobian(by_coefficient, argnums=1)(zero, z), expected) < 1e-5
