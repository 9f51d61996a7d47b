"""Rows in which one class leads, and their Hessian products in every nesting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from oracle import random

import softmax_jax

TOP = 2  # the class that leads
LABELS = np.array([TOP, TOP, 1, 4], np.int32)


def leading(classes):
  """Rows in which one class leads by 25 to 70."""
  z = random(0, (4, classes))
  z[:, TOP] = [25, 40, 25, 70]
  return z


def soft(classes, spread):
  labels = np.eye(classes, dtype=np.float32)[LABELS]
  return 0.75 * labels + np.float32(0.5 / classes) if spread else labels


INTEGER = lambda z: softmax_jax.softmax_cross_entropy_with_integer_labels(z, LABELS)
# Of logits, one number per row; and how many times the Hessian of the logsumexp theirs is.
FUNCTIONS = {
  "integer": (INTEGER, 1),
  "one-hot": (lambda z: softmax_jax.softmax_cross_entropy(z, soft(z.shape[1], False)), 1),
  "spread": (lambda z: softmax_jax.softmax_cross_entropy(z, soft(z.shape[1], True)), 1.25),
  "logsumexp": (lambda z: softmax_jax.logsumexp(z, axis=-1), 1),
  "smoothed": (
    lambda z: softmax_jax.softmax_cross_entropy_with_integer_labels(
      z, LABELS, label_smoothing=0.1, class_weights=jnp.ones(z.shape[1], z.dtype)
    ),
    1,
  ),
}


def wide_hessian(z):
  """Of the logsumexp of each row, in extended precision."""
  return np.stack([oracle.hessian("logsumexp", row) for row in z])


def along(f, u):
  return lambda x: jax.jvp(f, (x,), (u,))[1]


@functools.partial(jax.jit, static_argnums=0)
def products(f, z, u):
  """Of the Hessian of each row with u, in every nesting."""
  total = lambda z: jnp.sum(f(z))
  gradient = jax.grad(total)
  unit = lambda j: jnp.zeros_like(z).at[:, j].set(1)
  return {
    "reverse over reverse": jax.grad(lambda z: jnp.vdot(gradient(z), u))(z),
    "forward over reverse": along(gradient, u)(z),
    "reverse over forward": jax.grad(along(total, u))(z),
    "forward over forward": jax.vmap(lambda j: along(along(f, u), unit(j))(z), out_axes=1)(
      jnp.arange(z.shape[1])
    ),
  }
