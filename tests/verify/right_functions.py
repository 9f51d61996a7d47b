"""Functions of all kinds whose derivatives are right, and arguments for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def layer_norm(x, gain, bias):
  centered = x - x.mean(axis=-1, keepdims=True)
  return (
    centered * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5) * gain[None] + bias[None]
  )


def recurrent(x, weight):
  def step(h, x):
    h = jnp.tanh(h @ weight + x)
    return h, h

  return jax.lax.scan(step, jnp.zeros_like(x[0]), x)  # two outputs


def attention(q, k, v):
  return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5) @ v


NORMAL, POSITIVE, LABELS = "normal", "positive", "labels"
FUNCTIONS = {  # and the arguments of each, as a shape and what to draw
  "softmax": (jax.nn.softmax, [((4, 8), NORMAL)]),
  "log_softmax": (jax.nn.log_softmax, [((4, 8), NORMAL)]),
  "logsumexp": (jax.nn.logsumexp, [((4, 8), NORMAL)]),
  "gelu": (jax.nn.gelu, [((4, 8), NORMAL)]),
  "relu": (jax.nn.relu, [((4, 8), NORMAL)]),
  "soft labels": (optax.softmax_cross_entropy, [((4, 8), NORMAL), ((4, 8), POSITIVE)]),
  "integer labels": (
    optax.softmax_cross_entropy_with_integer_labels,
    [((4, 8), NORMAL), ((4,), LABELS)],
  ),
  "sigmoid": (optax.sigmoid_binary_cross_entropy, [((4, 8), NORMAL), ((4, 8), POSITIVE)]),
  "huber": (optax.huber_loss, [((4, 8), NORMAL)]),
  "matmul": (jnp.matmul, [((4, 8), NORMAL), ((8, 4), NORMAL)]),
  "layer norm": (layer_norm, [((4, 8), NORMAL), ((8,), NORMAL), ((8,), NORMAL)]),
  "scan": (recurrent, [((4, 3), NORMAL), ((3, 3), NORMAL)]),
  "attention": (attention, [((4, 3), NORMAL)] * 3),
  "norm": (jnp.linalg.norm, [((4, 8), NORMAL)]),
}
FEWER_SEEDS = ("sigmoid", "huber", "attention", "norm")
# Without the checks that take long to compile; those run for one seed.
OFTEN = ("value", "vjp", "finite_differences", "jvp", "dot_product", "linearity")


def draw(specs, seed, dtype="float32", scale=1):
  rng = np.random.default_rng([seed, 17])
  draws = {
    NORMAL: lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
    POSITIVE: lambda shape: jnp.asarray(rng.uniform(0.1, 1, shape), dtype),
    LABELS: lambda shape: jnp.asarray(rng.integers(0, 8, shape), "int32"),
  }
  return [draws[kind](tuple(n * scale for n in shape)) for shape, kind in specs]
