"""One loss of a linear layer, computed in every way that this library has."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import softmax_jax
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 4)).astype(np.float32)
WEIGHT = RNG.standard_normal((4, 5)).astype(np.float32)
BIAS = RNG.standard_normal(5).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0])
LOGITS = X @ WEIGHT + BIAS


def plain_loss(weight, bias):
  """The mean loss of a linear layer in `jax.nn`, for values and gradients away from saturation."""
  log_a = jax.nn.log_softmax(X @ weight + bias[None])
  return -jnp.take_along_axis(log_a, LABELS[:, None], axis=1).mean()


def assert_near(ours, theirs):
  chex.assert_trees_all_close(ours, theirs, rtol=3e-6, atol=1e-7)


EXPECTED = jax.grad(plain_loss, argnums=(0, 1))(WEIGHT, BIAS)


LINEAR_LOSS = functools.partial(softmax_jax.linear_softmax_cross_entropy, chunk_size=2)
ONE_HOT = jax.nn.one_hot(LABELS, 5)
LOSSES = {  # of the weight and the bias, all the same
  "integer labels": lambda w, b: cross_entropy(X @ w + b[None], LABELS, reduction="mean"),
  "soft labels": lambda w, b: softmax_jax.softmax_cross_entropy(
    X @ w + b[None], ONE_HOT, reduction="mean"
  ),
  "linear": lambda w, b: LINEAR_LOSS(X, w, LABELS, bias=b),
}


def trained(loss):
  """The losses of several steps, all of which fall."""
  optimizer = optax.sgd(0.5)
  params = jnp.asarray(WEIGHT), jnp.asarray(BIAS)

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(lambda params: loss(*params))(params)
    updates, state = optimizer.update(gradient, state)
    return value, optax.apply_updates(params, updates), state

  return several_steps(step, params, optimizer.init(params))


def several_steps(step, *state):
  losses = []
  for _ in range(6):
    value, *state = step(*state)
    losses.append(float(value))
  assert np.all(np.diff(losses) < 0)
  return losses
