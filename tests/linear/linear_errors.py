"""Bad arguments of the linear loss: the call, the type of the error and its whole message."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linear_programs import LABELS, WEIGHT, X

from softmax_jax import linear_softmax_cross_entropy as linear


def sharding(*parts):
  return NamedSharding(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), P(*parts))


NAME = "linear_softmax_cross_entropy"
ERRORS = {
  "integer x": (
    lambda: linear(X.astype(np.int32), WEIGHT, LABELS),
    TypeError,
    f"{NAME} expected x of a floating dtype, got dtype int32. Pass x.astype(jnp.float32).",
  ),
  "float labels": (
    lambda: linear(X, WEIGHT, LABELS.astype(np.float32)),
    TypeError,
    f"{NAME} expected labels of an integer dtype, got dtype float32. For one probability per "
    "class use softmax_cross_entropy.",
  ),
  "shape of the weight": (
    lambda: linear(X, WEIGHT.T, LABELS),
    ValueError,
    f"{NAME} expected x of shape [..., 20] for weight of shape (20, 4) with vocab_axis=1, got "
    "shape (6, 4). For a weight [V, H] pass vocab_axis=0.",
  ),
  "three axes": (
    lambda: linear(X, WEIGHT[None], LABELS),
    ValueError,
    f"{NAME} expected weight [H, V] with vocab_axis=-1, or [V, H] with vocab_axis=0, got shape "
    "(1, 4, 20) with vocab_axis=-1.",
  ),
  "vocab_axis": (
    lambda: linear(X, WEIGHT, LABELS, vocab_axis=2),
    ValueError,
    f"{NAME} expected weight [H, V] with vocab_axis=-1, or [V, H] with vocab_axis=0, got shape "
    "(4, 20) with vocab_axis=2.",
  ),
  "vocab_axis None": (
    lambda: linear(X, WEIGHT, LABELS, vocab_axis=None),
    TypeError,
    f"{NAME} expected vocab_axis to be a static int, got NoneType.",
  ),
  "number of labels": (
    lambda: linear(X, WEIGHT, LABELS[1:]),
    ValueError,
    f"{NAME} expected one label per token, of shape (6,) for x of shape (6, 4), got shape (5,).",
  ),
  "sample weights too few": (
    lambda: linear(X, WEIGHT, LABELS, sample_weights=jnp.ones(5)),
    ValueError,
    f"{NAME} expected one sample weight per row, of shape (6,), got shape (5,).",
  ),
  "logit_scale 0": (
    lambda: linear(X, WEIGHT, LABELS, logit_scale=0),
    ValueError,
    f"{NAME} expected logit_scale to be positive and finite in float32, got 0. Pass None for no "
    "scale.",
  ),
  "logit_scale several": (
    lambda: linear(X, WEIGHT, LABELS, logit_scale=jnp.ones(6)),
    ValueError,
    f"{NAME} expected logit_scale to be a scalar, got shape (6,).",
  ),
  "ignore_invalid a number": (
    lambda: linear(X, WEIGHT, LABELS, ignore_invalid=-100),
    ValueError,
    f"{NAME} expected ignore_invalid to be True or False, static, got -100.",
  ),
  "return_aux a string": (
    lambda: linear(X, WEIGHT, LABELS, return_aux="yes"),
    TypeError,
    f"{NAME} expected return_aux to be True or False, static, got str.",
  ),
  "shape of the bias": (
    lambda: linear(X, WEIGHT, LABELS, bias=jnp.ones(4)),
    ValueError,
    f"{NAME} expected one bias per class, of shape (20,), got shape (4,).",
  ),
  "integer bias": (
    lambda: linear(X, WEIGHT, LABELS, bias=np.ones(20, np.int32)),
    TypeError,
    f"{NAME} expected bias of a floating dtype, got dtype int32. Pass bias.astype(jnp.float32).",
  ),
  "softcap 0": (
    lambda: linear(X, WEIGHT, LABELS, softcap=0),
    ValueError,
    f"{NAME} expected softcap to be positive and finite in float32, got 0. Pass None for no "
    "softcap.",
  ),
  "softcap per row": (
    lambda: linear(X, WEIGHT, LABELS, softcap=jnp.ones(6)),
    ValueError,
    f"{NAME} expected softcap to be a scalar, got shape (6,).",
  ),
  "chunk_size 0": (
    lambda: linear(X, WEIGHT, LABELS, chunk_size=0),
    ValueError,
    f"{NAME} expected chunk_size to be at least 1, got 0.",
  ),
  "traced chunk_size": (
    lambda: jax.jit(lambda n: linear(X, WEIGHT, LABELS, chunk_size=n))(2),
    TypeError,
    f"{NAME} expected chunk_size to be a static int or None, got a traced value.",
  ),
  "chunk_size 2.0": (
    lambda: linear(X, WEIGHT, LABELS, chunk_size=2.0),
    TypeError,
    f"{NAME} expected chunk_size to be a static int or None, got float.",
  ),
  "logits_sharding": (
    lambda: linear(X, WEIGHT, LABELS, logits_sharding="d"),
    TypeError,
    f"{NAME} expected logits_sharding to be a jax.sharding.PartitionSpec, a NamedSharding or "
    "None, got str.",
  ),
  "logits_sharding without a mesh": (
    lambda: linear(X, WEIGHT, LABELS, logits_sharding=P("d")),
    ValueError,
    f"{NAME} expected a mesh for logits_sharding={P('d')}. Call jax.set_mesh(mesh), or pass "
    "jax.sharding.NamedSharding(mesh, spec).",
  ),
  "parts of logits_sharding": (
    lambda: linear(X, WEIGHT, LABELS, logits_sharding=sharding(None, None, "d")),
    ValueError,
    f"{NAME} expected logits_sharding with at most 2 parts, for the 1 axes of labels and one of "
    f"classes, got {P(None, None, 'd')}.",
  ),
  "class weights": (
    lambda: linear(X, WEIGHT, LABELS, class_weights=jnp.ones(6)),
    ValueError,
    f"{NAME} expected one class weight per class, of shape (20,), got shape (6,).",
  ),
  "reduction": (
    lambda: linear(X, WEIGHT, LABELS, reduction="average"),
    ValueError,
    f'{NAME} expected reduction to be "none", "sum" or "mean", got \'average\'.',
  ),
  "label_smoothing": (
    lambda: linear(X, WEIGHT, LABELS, label_smoothing=2),
    ValueError,
    f"{NAME} expected label_smoothing in [0, 1], got 2.",
  ),
}
