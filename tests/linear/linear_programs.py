"""Programs of the linear loss, and how many matrix products each computes."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import random

from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy


def shapes(num_tokens, num_features, num_classes, vocab_axis=-1):
  """Types of x, weight, labels and bias."""
  weight = (num_features, num_classes)
  return (
    jax.ShapeDtypeStruct((num_tokens, num_features), jnp.float32),
    jax.ShapeDtypeStruct(weight if vocab_axis == -1 else weight[::-1], jnp.float32),
    jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
    jax.ShapeDtypeStruct((num_classes,), jnp.float32),
  )


def compiled(f, *args):
  return jax.jit(f).lower(*args).compile()


def dense(x, weight, labels, reduction="mean"):
  return cross_entropy(x @ weight, labels, reduction=reduction)


CHUNK = 32


def gradient(argnums, f=linear, **options):
  return lambda x, weight, labels, bias: jax.value_and_grad(f, argnums)(
    x, weight, labels, **options
  )


def gradient_of_losses(argnums):
  f = lambda *args: jnp.sum(jnp.sin(linear(*args, reduction="none", chunk_size=CHUNK)))
  return lambda x, weight, labels, bias: jax.grad(f, argnums)(x, weight, labels)


def tangent(argnums, **options):
  def f(x, weight, labels, bias):
    args = x, weight
    loss = lambda *moving: linear(
      *(moving[argnums.index(i)] if i in argnums else args[i] for i in range(2)), labels, **options
    )
    moving = tuple(args[i] for i in argnums)
    return jax.jvp(loss, moving, tuple(map(jnp.cos, moving)))

  return f


def hessian_product(x, weight, labels, bias):
  f = lambda x, weight: linear(x, weight, labels)
  return jax.jvp(jax.grad(f, (0, 1)), (x, weight), (jnp.cos(x), jnp.cos(weight)))


def gradient_by(option):
  def f(x, weight, labels, bias):
    value = {"bias": bias, "z_loss": 0.1}[option]
    return jax.grad(lambda v: linear(x, weight, labels, chunk_size=CHUNK, **{option: v}))(value)

  return f


def gradient_with_frozen_weight(x, weight, labels, bias):
  f = lambda p: linear(p[0], jax.lax.stop_gradient(p[1]), labels, chunk_size=CHUNK)
  return jax.grad(f)((x, weight))[0]


def value(**options):
  return lambda x, weight, labels, bias: linear(x, weight, labels, chunk_size=CHUNK, **options)


def gradient_with_aux(use):
  """The gradients of the loss and ``use`` of its aux, which is returned too."""

  def loss(x, weight, labels):
    loss, aux = linear(x, weight, labels, z_loss=0.1, chunk_size=CHUNK, return_aux=True)
    return loss + use(aux), aux

  return lambda x, weight, labels, bias: jax.value_and_grad(loss, (0, 1), has_aux=True)(
    x, weight, labels
  )


# A program, and how many matrix products of a chunk it computes.
PRODUCTS = {
  "the loss": (value(), 1),
  "the losses": (value(reduction="none"), 1),
  "the gradient by x": (gradient(0, chunk_size=CHUNK), 2),
  "the gradient by weight": (gradient(1, chunk_size=CHUNK), 2),
  "both gradients": (gradient((0, 1), chunk_size=CHUNK), 3),
  "the gradient by bias": (gradient_by("bias"), 1),
  "the gradient by z_loss": (gradient_by("z_loss"), 1),
  "the gradient by x with a frozen weight": (gradient_with_frozen_weight, 2),
  "both gradients, with the aux beside": (gradient_with_aux(lambda aux: 0), 3),
  "both gradients, with the weight of the aux": (gradient_with_aux(lambda aux: aux.weight), 3),
  "both gradients, with the z-loss of the aux": (gradient_with_aux(lambda aux: aux.z_loss), 4),
  "the losses, the gradient by x": (gradient_of_losses(0), 3),
  "the losses, the gradient by weight": (gradient_of_losses(1), 3),
  "the losses, both gradients": (gradient_of_losses((0, 1)), 4),
  "the tangent by x": (tangent((0,), chunk_size=CHUNK), 2),
  "both tangents": (tangent((0, 1), chunk_size=CHUNK), 3),
  "the losses, the tangent by x": (tangent((0,), reduction="none", chunk_size=CHUNK), 3),
  "the losses, both tangents": (tangent((0, 1), reduction="none", chunk_size=CHUNK), 4),
  "the dense loss of both chunks, both gradients": (gradient((0, 1), dense), 2 * 3),
}


T, H, V = 6, 4, 20
X, WEIGHT, LABELS = random(0, (T, H)), random(1, (H, V)), np.array([0, 3, 19, 7, 7, 2])
