"""Functions of arguments that are spread over a 2 x 4 mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random

from softmax_jax import (
  linear_softmax_cross_entropy,
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)

T, H, V = 8, 12, 160  # on a 2 x 4 mesh 4 tokens and 40 classes on each device
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2}
VALUES = {
  "logits": random(0, (T, V)),
  "y_bar": random(1, (T, V)),
  "probabilities": np.abs(random(2, (T, V))),
  "targets": random(9, (T, V)),
  "mask": np.random.default_rng(3).random((T, V)) < 0.9,
  "labels": np.random.default_rng(4).integers(0, V, T),
  "class_weights": np.abs(random(5, V)),
  "sample_weights": np.abs(random(10, T)),
  "x": random(6, (T, H)),
  "weight": random(7, (H, V)),
  "bias": random(8, V),
}
SPECS = {
  "labels": P("d"),
  "class_weights": P("v"),
  "sample_weights": P("d"),
  "x": P("d", None),
  "weight": P(None, "v"),
  "bias": P("v"),
}


def integer(logits, labels):
  return softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def integer_with_options(logits, class_weights, mask, labels):
  return softmax_cross_entropy_with_integer_labels(
    logits, labels, class_weights=class_weights, where=mask, reduction="sum", **OPTIONS
  )


def soft(logits, probabilities):
  return softmax_cross_entropy(logits, probabilities).sum()


def soft_with_options(logits, probabilities, class_weights, mask):
  return softmax_cross_entropy(
    logits, probabilities, class_weights=class_weights, where=mask, reduction="mean", **OPTIONS
  )


def divergence_with_options(logits, targets, mask):
  return softmax_kl_divergence(logits, targets, where=mask, temperature=1.5, reduction="mean")


def linear(x, weight, labels):
  return linear_softmax_cross_entropy(x, weight, labels)


def linear_with_options(x, weight, bias, class_weights, labels):
  return linear_softmax_cross_entropy(
    x, weight, labels, bias=bias, class_weights=class_weights, softcap=20.0, **OPTIONS
  )


def linear_losses(x, weight, labels):
  losses = linear_softmax_cross_entropy(x, weight, labels, reduction="none")
  return jnp.sum(jnp.sin(losses))


def integer_by_sample(logits, sample_weights, labels):
  loss, aux = softmax_cross_entropy_with_integer_labels(
    logits, labels, sample_weights=sample_weights, reduction="mean", return_aux=True, **OPTIONS
  )
  return of_all_outputs(loss, aux)


def soft_by_sample(logits, probabilities, sample_weights):
  return softmax_cross_entropy(
    logits, probabilities, sample_weights=sample_weights, reduction="sum", **OPTIONS
  )


def linear_by_sample(x, weight, sample_weights, labels):
  loss, aux = linear_softmax_cross_entropy(
    x,
    weight,
    labels,
    sample_weights=sample_weights,
    logit_scale=1.5,
    chunk_size=2,
    return_aux=True,
    **OPTIONS,
  )
  return of_all_outputs(loss, aux)


def of_all_outputs(loss, aux):
  """One number, in whose gradient each differentiable output has a cotangent of its own."""
  return loss + jnp.sum(jnp.sin(aux.nll)) + jnp.sum(aux.lse) + 3 * aux.z_loss + aux.weight**2


FUNCTIONS = {  # each with the arguments it is differentiated by, and the others
  "softmax": (lambda z, c: jnp.sum(softmax(z) * c), ["logits"], ["y_bar"]),
  "masked softmax": (
    lambda z, c, m: jnp.sum(softmax(z, where=m) * c),
    ["logits"],
    ["y_bar", "mask"],
  ),
  "log_softmax": (lambda z, c: jnp.sum(log_softmax(z) * c), ["logits"], ["y_bar"]),
  "logsumexp": (lambda z: logsumexp(z, -1).sum(), ["logits"], []),
  "logsumexp with coefficients": (
    lambda a, b: logsumexp(a, -1, b=b).sum(),
    ["logits", "probabilities"],
    [],
  ),
  "integer labels": (integer, ["logits"], ["labels"]),
  "integer labels, options": (
    integer_with_options,
    ["logits", "class_weights"],
    ["mask", "labels"],
  ),
  "integer labels, sample weights": (
    integer_by_sample,
    ["logits", "sample_weights"],
    ["labels"],
  ),
  "soft labels": (soft, ["logits", "probabilities"], []),
  "soft labels, options": (
    soft_with_options,
    ["logits", "probabilities", "class_weights"],
    ["mask"],
  ),
  "soft labels, sample weights": (
    soft_by_sample,
    ["logits", "probabilities", "sample_weights"],
    [],
  ),
  "entropy": (lambda z: softmax_entropy(z).sum(), ["logits"], []),
  "masked entropy": (lambda z, m: softmax_entropy(z, where=m).sum(), ["logits"], ["mask"]),
  "divergence": (lambda z, w: softmax_kl_divergence(z, w).sum(), ["logits", "targets"], []),
  "divergence, options": (divergence_with_options, ["logits", "targets"], ["mask"]),
  "linear": (linear, ["x", "weight"], ["labels"]),
  "linear, options": (linear_with_options, ["x", "weight", "bias", "class_weights"], ["labels"]),
  "linear, sample weights and aux": (
    linear_by_sample,
    ["x", "weight", "sample_weights"],
    ["labels"],
  ),
  "linear, one loss per token": (linear_losses, ["x", "weight"], ["labels"]),
}
AXIS_TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(axis_type):
  return jax.make_mesh((2, 4), ("d", "v"), axis_types=(axis_type,) * 2)


def fitting(names):
  return [SPECS.get(name, P("d", "v")) for name in names]


def placed(mesh, names, specs=None):
  """The arguments of these names, with these specs or, by default, those that fit together."""
  put = lambda name, spec: jax.device_put(VALUES[name], NamedSharding(mesh, spec))
  return tuple(map(put, names, fitting(names) if specs is None else specs))
