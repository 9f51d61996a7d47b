"""The programs that the properties are about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from drawn_cases import TINY

import softmax_jax
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy


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
      z, jax.nn.one_hot(jnp.zeros(len(z), int), z.shape[1], dtype=z.dtype)
    ),
    lambda z: softmax_jax.linear_softmax_cross_entropy(
      z, z, jnp.zeros(len(z), int), vocab_axis=0, chunk_size=2
    ),
  )
]


def error(computed, expected):
  """The error in norm, relative to the expected rows, beyond what underflows."""
  computed, expected = np.asarray(computed, float), np.asarray(expected, float)
  size = np.linalg.norm(expected)
  difference = max(0.0, np.linalg.norm(computed - expected) - expected.size * TINY)
  return difference / size if size else difference


def with_options(z, labels, shares, alpha, z_loss, weights):
  options = {"label_smoothing": alpha, "z_loss": z_loss, "class_weights": weights}
  mean = {"reduction": "mean", **options}
  return (
    cross_entropy(z, labels, ignore_index=1, **options),
    cross_entropy(z, labels, ignore_index=1, **mean),
    softmax_jax.softmax_cross_entropy(z, shares, **options),
    softmax_jax.softmax_cross_entropy(z, shares, **mean),
  )


def by_hand(z, labels, shares, alpha, z_loss, weights):
  """The same, composed of three public functions without options."""
  cost = -softmax_jax.log_softmax(z)
  uniform = alpha * jnp.mean(weights[None] * cost, axis=-1)
  extra = z_loss * softmax_jax.logsumexp(z, axis=-1) ** 2
  counts = labels != 1
  hard = (1 - alpha) * weights[labels] * cross_entropy(z, labels) + uniform + extra
  hard = jnp.where(counts, hard, 0)
  total = jnp.sum(jnp.where(counts, weights[labels], 0))
  soft = (1 - alpha) * jnp.sum(weights[None] * shares * cost, axis=-1) + uniform + extra
  mean = jnp.where(total == 0, 0, hard.sum() / jnp.where(total == 0, 1, total))
  return hard, mean, soft, soft.mean()


def summed_with_gradients(f):
  """Its outputs, and the gradients of their weighted sum by the floating arguments."""

  def total(*args):
    out = f(*args)
    return sum(jnp.sum(jnp.cos(i + jnp.arange(y.size)) * y.ravel()) for i, y in enumerate(out)), out

  return jax.value_and_grad(total, argnums=(0, 2, 3, 4, 5), has_aux=True)


OPTIONS = [summed_with_gradients(f) for f in (with_options, by_hand)]


def linear(x, weight, labels, bias, alpha, z_loss, class_weights):
  """With one column of padding, rows that do not count, and chunks of two rows."""
  options = {"label_smoothing": alpha, "z_loss": z_loss}
  common = {"bias": bias, "ignore_index": -1, "num_classes": weight.shape[1] - 1, **options}
  f = functools.partial(softmax_jax.linear_softmax_cross_entropy, x, weight, labels, **common)
  return (
    f(chunk_size=2, class_weights=class_weights),
    f(chunk_size=2, reduction="none", class_weights=class_weights),
    f(chunk_size=1, softcap=3.0, reduction="sum"),
  )


def dense(x, weight, labels, bias, alpha, z_loss, class_weights):
  options = {"label_smoothing": alpha, "z_loss": z_loss, "ignore_index": -1}
  y = (x @ weight + bias[None])[:, :-1]
  weights = class_weights[:-1]
  capped = 3.0 * jnp.tanh(y / 3.0)
  return (
    cross_entropy(y, labels, class_weights=weights, reduction="mean", **options),
    cross_entropy(y, labels, class_weights=weights, **options),
    cross_entropy(capped, labels, reduction="sum", **options),
  )


def with_gradients(f):
  def total(*args):
    out = f(*args)
    return sum(jnp.sum(jnp.cos(i + jnp.arange(y.size)) * y.ravel()) for i, y in enumerate(out)), out

  return jax.value_and_grad(total, argnums=(0, 1, 3, 4, 5, 6), has_aux=True)


LINEAR = [with_gradients(f) for f in (linear, dense)]


def along(axis):
  def f(x, mask):
    functions = softmax_jax.softmax, softmax_jax.log_softmax
    g = lambda x: jnp.sum(jnp.cos(softmax_jax.logsumexp(x, axis, where=mask)))
    lse = softmax_jax.logsumexp(x, axis, keepdims=True, where=mask)
    return [f(x, axis, where=mask) for f in functions], lse, jax.grad(g)(x)

  return jax.jit(f)
