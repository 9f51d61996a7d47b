"""Functions of a row, and transformations with what they must give in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import random

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)

ENTROPY, KL = "softmax_entropy", "softmax_kl_divergence"
SOFT, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
SECOND = {  # what the functions below take beside one row of four logits
  "weighted logsumexp": np.float32([1, 0.5, 2, 0.25]),
  SOFT: np.float32([0.5, -0.25, 1, 0.5]),
  INTEGER: np.int32(2),
  KL: np.float32([0.5, -0.25, 1, 0.5]),
}
FUNCTIONS = {  # of one row
  "softmax": softmax,
  "log_softmax": log_softmax,
  "logsumexp": logsumexp,
  "weighted logsumexp": lambda x: logsumexp(x, b=SECOND["weighted logsumexp"]),
  SOFT: lambda x: softmax_cross_entropy(x, SECOND[SOFT]),
  INTEGER: lambda x: softmax_cross_entropy_with_integer_labels(x, SECOND[INTEGER]),
  ENTROPY: softmax_entropy,
  KL: lambda x: softmax_kl_divergence(x, SECOND[KL]),
}
PEERS = {
  "softmax": jax.nn.softmax,
  "log_softmax": jax.nn.log_softmax,
  "logsumexp": jax.nn.logsumexp,
  "weighted logsumexp": lambda x: jax.nn.logsumexp(x, b=SECOND["weighted logsumexp"]),
  SOFT: lambda x: optax.softmax_cross_entropy(x, SECOND[SOFT]),
  INTEGER: lambda x: optax.softmax_cross_entropy_with_integer_labels(x, SECOND[INTEGER]),
  ENTROPY: lambda x: -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x)),
  KL: lambda x: optax.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(SECOND[KL])),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
ROWS = random(0, (2, 4), scale=1.5)


def oracle_of(derivative, name, x):
  args = name.removeprefix("weighted "), x, SECOND.get(name)
  if derivative == 0:
    return oracle.linearize(*args)[0]
  return oracle.jacobian(*args) if derivative == 1 else oracle.hessian(*args)


def of_row(derivative):
  return lambda name: oracle_of(derivative, name, ROWS[0])


def of_rows(derivative):
  return lambda name: np.stack([oracle_of(derivative, name, x) for x in ROWS])


def of_batch(name):
  """The Jacobian of a batch: that of each row by itself, and zero for the other rows."""
  blocks = of_rows(1)(name)
  jacobian = np.zeros((2, *blocks.shape[1:-1], 2, 4))
  for i in range(2):
    jacobian[i, ..., i, :] = blocks[i]
  return jacobian


def of_loop(derivative):
  """Of f(x) + f(2x), by x."""
  return lambda name: (
    oracle_of(derivative, name, ROWS[0])
    + 2.0**derivative * oracle_of(derivative, name, 2 * ROWS[0])
  )


VALUE, JACOBIAN, HESSIAN = of_row(0), of_row(1), of_row(2)


def zero(f, x):
  return jnp.zeros_like(jax.eval_shape(f, x))


def scan(f):
  scales = np.float32([1, 2])
  return lambda x: jax.lax.scan(lambda y, s: (y + f(s * x), None), zero(f, x), scales)[0]


def fori_loop(f):
  return lambda x: jax.lax.fori_loop(1, 3, lambda i, y: y + f(i * x), zero(f, x))


def while_loop(f):
  return lambda x: jax.lax.while_loop(
    lambda state: state[0] < 3,
    lambda state: (state[0] + 1, state[1] + f(state[0] * x)),
    (1, zero(f, x)),
  )[1]


def cond(f):
  return lambda x: f(x) + jax.lax.cond(x[0] < 99, lambda x: f(2 * x), lambda x: zero(f, x), x)


def with_loop(loop):
  return {
    "jacfwd": (of_loop(1), lambda f, x: jax.jacfwd(loop(f))(x[0])),
    "jacrev": (of_loop(1), lambda f, x: jax.jacrev(loop(f))(x[0])),
  }


def basis(x):
  return jnp.eye(x.size, dtype=x.dtype)


def output_basis(f, x):
  like = jax.eval_shape(f, x)
  return jnp.eye(like.size, dtype=like.dtype).reshape(like.size, *like.shape)


TRANSFORMATIONS = {
  "first order": {
    "jvp": (
      JACOBIAN,
      lambda f, x: jnp.stack([jax.jvp(f, (x[0],), (e,))[1] for e in basis(x[0])], axis=-1),
    ),
    "linearize": (
      JACOBIAN,
      lambda f, x: jax.vmap(jax.linearize(f, x[0])[1], out_axes=-1)(basis(x[0])),
    ),
    "transpose of linearize": (
      lambda name: JACOBIAN(name).reshape(-1, 4),
      lambda f, x: jax.vmap(
        lambda y_bar: jax.linear_transpose(jax.linearize(f, x[0])[1], x[0])(y_bar)[0]
      )(output_basis(f, x[0])),
    ),
    "jvp of vjp by the cotangent": (
      lambda name: JACOBIAN(name).T,
      lambda f, x: jax.jacfwd(lambda y_bar: jax.vjp(f, x[0])[1](y_bar)[0])(zero(f, x[0])),
    ),
    "jacfwd": (JACOBIAN, lambda f, x: jax.jacfwd(f)(x[0])),
    "jacrev": (JACOBIAN, lambda f, x: jax.jacrev(f)(x[0])),
  },
  "second order": {
    "hessian": (HESSIAN, lambda f, x: jax.hessian(f)(x[0])),
    "jacrev of jacfwd": (HESSIAN, lambda f, x: jax.jacrev(jax.jacfwd(f))(x[0])),
    "jvp of linearize": (
      HESSIAN,
      lambda f, x: jax.jacfwd(lambda x: jax.vmap(jax.linearize(f, x)[1], 0, -1)(basis(x)))(x[0]),
    ),
  },
  "vmap": {
    "value": (of_rows(0), lambda f, x: jax.vmap(f)(x)),
    "of jacfwd": (of_rows(1), lambda f, x: jax.vmap(jax.jacfwd(f))(x)),
    "of jacrev": (of_rows(1), lambda f, x: jax.vmap(jax.jacrev(f))(x)),
    "of hessian": (of_rows(2), lambda f, x: jax.vmap(jax.hessian(f))(x)),
    "under jacfwd": (of_batch, lambda f, x: jax.jacfwd(jax.vmap(f))(x)),
    "under jacrev": (of_batch, lambda f, x: jax.jacrev(jax.vmap(f))(x)),
    "under jacrev, by map": (of_batch, lambda f, x: jax.jacrev(lambda x: jax.lax.map(f, x))(x)),
  },
  "checkpoint": {
    "jacfwd": (JACOBIAN, lambda f, x: jax.jacfwd(jax.checkpoint(f))(x[0])),
    "jacrev": (JACOBIAN, lambda f, x: jax.jacrev(jax.checkpoint(f))(x[0])),
    "hessian": (HESSIAN, lambda f, x: jax.hessian(jax.checkpoint(f))(x[0])),
    "scan": (of_loop(1), lambda f, x: jax.jacrev(scan(jax.checkpoint(f, prevent_cse=False)))(x[0])),
  },
  "scan": {
    **with_loop(scan),
    "hessian": (of_loop(2), lambda f, x: jax.hessian(scan(f))(x[0])),
    "over rows": (of_rows(0), lambda f, x: jax.lax.scan(lambda _, z: (_, f(z)), 0, x)[1]),
  },
  "fori_loop": with_loop(fori_loop),
  "while_loop": {
    "jacfwd": (of_loop(1), lambda f, x: jax.jacfwd(while_loop(f))(x[0])),
    "jacfwd of jacfwd": (of_loop(2), lambda f, x: jax.jacfwd(jax.jacfwd(while_loop(f)))(x[0])),
    "of jacrev": (of_loop(1), lambda f, x: while_loop_of_jacrev(f)(x[0])),
  },
  "cond": {**with_loop(cond), "vmap": (of_loop(0), lambda f, x: jax.vmap(cond(f))(x)[0])},
}


def while_loop_of_jacrev(f):
  """Reverse mode inside the body, as in an optimizer: J(x) + 2 J(2x)."""
  return lambda x: while_loop(lambda y: jax.jacrev(f)(y) * (y[0] / x[0]))(x)
