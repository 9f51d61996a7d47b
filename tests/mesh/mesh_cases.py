"""Every function with its classes spread over a mesh axis, and the arguments to try it with."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
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

integer, soft, linear = (
  softmax_cross_entropy_with_integer_labels,
  softmax_cross_entropy,
  linear_softmax_cross_entropy,
)
T, H, V = 6, 5, 160  # 20 classes on each of eight devices
SPREAD, SAME = P(None, "v"), P()


def mesh(*sizes):
  names = ("v",) if len(sizes) == 1 else ("d", "v")
  devices = jax.devices()[: math.prod(sizes)]
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spread(f, in_specs, out_specs, over=None, check_vma=True):
  """``f`` with the axis name, on eight devices."""
  local = lambda *args: f("v", *args)
  return jax.shard_map(
    local, mesh=over or mesh(8), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
  )


LOGITS = random(0, (T, V), scale=3)
COEFFICIENTS = np.abs(random(1, (T, V)))
PROBABILITIES = COEFFICIENTS / COEFFICIENTS.sum(1, keepdims=True)
TARGETS = random(9, (T, V), scale=3)
LABELS = np.random.default_rng(2).integers(0, V, T)
LABELS[:4] = 3, V - 1, V // 8 - 1, V // 8  # and the last and first of neighbours
MASK = np.random.default_rng(3).random((T, V)) < 0.7
MASK[np.arange(T), LABELS] = True
MASK[2] = False  # altogether
MASK[3, : V // 8] = False  # on one device
MASK[3, LABELS[3]] = True
CLASS_WEIGHTS = np.abs(random(4, V))
SAMPLE_WEIGHTS = np.float32([1.5, -0.5, 1, 0, 2, 0.25])
BIAS = random(5, V)
X, WEIGHT = random(6, (T, H)), random(7, (H, V))
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2}

# Each case: the function of the axis name and the arguments; the arguments; their specs; the spec
# of the result; how many arguments it is differentiated by; how many collectives the value takes,
# and how many the value and gradient.
CASES = {
  "softmax": (lambda n, x: softmax(x, axis_name=n), [LOGITS], [SPREAD], SPREAD, 1, 2, 4),
  "masked softmax": (
    lambda n, x, mask: softmax(x, where=mask, axis_name=n),
    [LOGITS, MASK],
    [SPREAD, SPREAD],
    SPREAD,
    1,
    2,
    4,
  ),
  "log_softmax": (lambda n, x: log_softmax(x, axis_name=n), [LOGITS], [SPREAD], SPREAD, 1, 2, 3),
  "logsumexp": (lambda n, a: logsumexp(a, -1, axis_name=n), [LOGITS], [SPREAD], SAME, 1, 2, 2),
  "masked logsumexp": (
    lambda n, a, mask: logsumexp(a, -1, where=mask, axis_name=n, keepdims=True),
    [LOGITS, MASK],
    [SPREAD, SPREAD],
    SAME,
    1,
    2,
    2,
  ),
  "logsumexp with coefficients": (
    lambda n, a, b: logsumexp(a, -1, b=b, axis_name=n),
    [LOGITS, COEFFICIENTS],
    [SPREAD, SPREAD],
    SAME,
    2,
    2,
    2,
  ),
  "integer labels": (
    lambda n, z, t: integer(z, t, axis_name=n),
    [LOGITS, LABELS],
    [SPREAD, SAME],
    SAME,
    1,
    2,
    2,
  ),
  "integer labels, smoothed": (
    lambda n, z, t: integer(z, t, label_smoothing=0.1, axis_name=n),
    [LOGITS, LABELS],
    [SPREAD, SAME],
    SAME,
    1,
    2,
    2,
  ),
  "integer labels, every option": (
    lambda n, z, w, s, t, mask: integer(
      z,
      t,
      class_weights=w,
      sample_weights=s,
      where=mask,
      ignore_index=3,
      reduction="mean",
      axis_name=n,
      **OPTIONS,
    ),
    [LOGITS, CLASS_WEIGHTS, SAMPLE_WEIGHTS, LABELS, MASK],
    [SPREAD, P("v"), SAME, SAME, SPREAD],
    SAME,
    3,
    2,
    2,
  ),
  "soft labels": (
    lambda n, z, t: soft(z, t, axis_name=n),
    [LOGITS, PROBABILITIES],
    [SPREAD, SPREAD],
    SAME,
    2,
    2,
    2,
  ),
  "soft labels, smoothed": (
    lambda n, z, t: soft(z, t, label_smoothing=0.1, axis_name=n),
    [LOGITS, PROBABILITIES],
    [SPREAD, SPREAD],
    SAME,
    2,
    2,
    2,
  ),
  "soft labels, every option": (
    lambda n, z, t, w, s, mask: soft(
      z,
      t,
      class_weights=w,
      sample_weights=s,
      where=mask,
      reduction="sum",
      axis_name=n,
      **OPTIONS,
    ),
    [LOGITS, COEFFICIENTS, CLASS_WEIGHTS, SAMPLE_WEIGHTS, MASK],
    [SPREAD, SPREAD, P("v"), SAME, SPREAD],
    SAME,
    4,
    2,
    2,
  ),
  "entropy": (lambda n, z: softmax_entropy(z, axis_name=n), [LOGITS], [SPREAD], SAME, 1, 2, 2),
  "masked entropy": (
    lambda n, z, mask: softmax_entropy(z, where=mask, axis_name=n),
    [LOGITS, MASK],
    [SPREAD, SPREAD],
    SAME,
    1,
    2,
    2,
  ),
  "divergence": (
    lambda n, z, w: softmax_kl_divergence(z, w, axis_name=n),
    [LOGITS, TARGETS],
    [SPREAD, SPREAD],
    SAME,
    2,
    5,
    7,
  ),
  "divergence, every option": (
    lambda n, z, w, tau, mask: softmax_kl_divergence(
      z, w, where=mask, temperature=tau, reduction="mean", axis_name=n
    ),
    [LOGITS, TARGETS, np.float32(1.5), MASK],
    [SPREAD, SPREAD, SAME, SPREAD],
    SAME,
    3,
    5,
    8,
  ),
  "linear": (
    lambda n, x, weight, t: linear(x, weight, t, axis_name=n),
    [X, WEIGHT, LABELS],
    [SAME, SPREAD, SAME],
    SAME,
    2,
    2,
    3,
  ),
  "linear, one loss per token": (
    lambda n, x, weight, t: linear(x, weight, t, reduction="none", axis_name=n),
    [X, WEIGHT, LABELS],
    [SAME, SPREAD, SAME],
    SAME,
    2,
    2,
    3,
  ),
  "linear, every option": (  # in two chunks, of 4 tokens and of 2
    lambda n, x, weight, bias, w, s, k, t: linear(
      x,
      weight,
      t,
      bias=bias,
      class_weights=w,
      sample_weights=s,
      logit_scale=k,
      softcap=20.0,
      ignore_index=3,
      vocab_axis=0,
      chunk_size=4,
      axis_name=n,
      **OPTIONS,
    ),
    [X, WEIGHT.T, BIAS, CLASS_WEIGHTS, SAMPLE_WEIGHTS, np.float32(1.5), LABELS],
    [SAME, P("v"), P("v"), P("v"), SAME, SAME, SAME],
    SAME,
    6,
    5,  # one more for the weights of the labels
    6,
  ),
}
every_case = pytest.mark.parametrize("case", CASES)


def value_and_vjp(f, count):
  """A function of the cotangent and the arguments."""

  def g(y_bar, *args):
    y, pull = jax.vjp(lambda *moving: f(*moving, *args[count:]), *args[:count])
    return y, pull(y_bar)

  return g


def derivatives(f, count):
  """Value, both first derivatives, and forward over reverse."""

  def g(y_bar, dots, *args):
    by = lambda f: lambda *moving: f(*moving, *args[count:])
    y, y_dot = jax.jvp(by(f), args[:count], dots)
    pull = lambda *args: value_and_vjp(f, count)(y_bar, *args)[1]
    bars, bars_dot = jax.jvp(by(pull), args[:count], dots)
    return {"value": y, "vjp": bars, "jvp": y_dot, "second order": bars_dot}

  return jax.jit(g)


def on_one_device(f):
  return lambda *args: f(None, *args)


def cotangent(f, args):
  y = jax.eval_shape(on_one_device(f), *args)
  return random(8, y.shape)
