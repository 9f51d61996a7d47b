"""Bad options of the two losses: the call, the type of the error and its whole message."""

import jax.numpy as jnp
import numpy as np
from option_formulas import INTEGER, SOFT

from softmax_jax import softmax_cross_entropy
from softmax_jax import softmax_cross_entropy_with_integer_labels as integer_loss

X, Y = jnp.zeros((3, 4), jnp.float32), jnp.zeros(3, jnp.int32)
T = jnp.full((3, 4), 0.25, jnp.float32)
ERRORS = {
  "smoothing below 0": (
    lambda: integer_loss(X, Y, label_smoothing=-0.1),
    ValueError,
    f"{INTEGER} expected label_smoothing in [0, 1], got -0.1.",
  ),
  "smoothing above 1": (
    lambda: softmax_cross_entropy(X, T, label_smoothing=jnp.float32(1.5)),
    ValueError,
    f"{SOFT} expected label_smoothing in [0, 1], got 1.5.",
  ),
  "smoothing NaN": (
    lambda: integer_loss(X, Y, label_smoothing=np.nan),
    ValueError,
    f"{INTEGER} expected label_smoothing in [0, 1], got nan.",
  ),
  "smoothing None": (
    lambda: integer_loss(X, Y, label_smoothing=None),
    TypeError,
    f"{INTEGER} expected label_smoothing to be an array, got NoneType.",
  ),
  "smoothing a bool": (
    lambda: integer_loss(X, Y, label_smoothing=True),
    TypeError,
    f"{INTEGER} expected label_smoothing of a real dtype, got dtype bool.",
  ),
  "smoothing per row": (
    lambda: integer_loss(X, Y, label_smoothing=jnp.zeros(3)),
    ValueError,
    f"{INTEGER} expected label_smoothing to be a scalar, got shape (3,).",
  ),
  "z_loss None": (
    lambda: softmax_cross_entropy(X, T, z_loss=None),
    TypeError,
    f"{SOFT} expected z_loss to be an array, got NoneType.",
  ),
  "z_loss complex": (
    lambda: integer_loss(X, Y, z_loss=1j),
    TypeError,
    f"{INTEGER} expected z_loss of a real dtype, got dtype complex64.",
  ),
  "z_loss per row": (
    lambda: softmax_cross_entropy(X, T, z_loss=jnp.zeros((3, 1))),
    ValueError,
    f"{SOFT} expected z_loss to be a scalar, got shape (3, 1).",
  ),
  "class weights too few": (
    lambda: integer_loss(X, Y, class_weights=jnp.ones(3)),
    ValueError,
    f"{INTEGER} expected one class weight per class, of shape (4,), got shape (3,).",
  ),
  "class weights of the logits' shape": (
    lambda: softmax_cross_entropy(X, T, class_weights=T),
    ValueError,
    f"{SOFT} expected one class weight per class, of shape (4,), got shape (3, 4).",
  ),
  "class weights of two axes in the wrong order": (
    lambda: integer_loss(X, 0, (1, 0), class_weights=T),
    ValueError,
    f"{INTEGER} expected one class weight per class, of shape (4, 3), got shape (3, 4).",
  ),
  "class weights a list": (
    lambda: integer_loss(X, Y, class_weights=[1.0] * 4),
    TypeError,
    f"{INTEGER} expected class_weights to be an array, got list. Pass jnp.asarray(class_weights).",
  ),
  "sample weights too few": (
    lambda: integer_loss(X, Y, sample_weights=jnp.ones(2)),
    ValueError,
    f"{INTEGER} expected one sample weight per row, of shape (3,), got shape (2,).",
  ),
  "sample weights of the logits' shape": (
    lambda: softmax_cross_entropy(X, T, sample_weights=T),
    ValueError,
    f"{SOFT} expected one sample weight per row, of shape (3,), got shape (3, 4).",
  ),
  "sample weights that are booleans": (
    lambda: integer_loss(X, Y, sample_weights=Y == 0),
    TypeError,
    f"{INTEGER} expected sample_weights of a real dtype, got dtype bool. "
    "Pass 1.0 * sample_weights.",
  ),
  "ignore_invalid None": (
    lambda: integer_loss(X, Y, ignore_invalid=None),
    TypeError,
    f"{INTEGER} expected ignore_invalid to be True or False, static, got NoneType.",
  ),
  "unknown reduction": (
    lambda: integer_loss(X, Y, reduction="average"),
    ValueError,
    f'{INTEGER} expected reduction to be "none", "sum" or "mean", got \'average\'.',
  ),
  "reduction None": (
    lambda: softmax_cross_entropy(X, T, reduction=None),
    ValueError,
    f'{SOFT} expected reduction to be "none", "sum" or "mean", got None.',
  ),
  "ignore_index a float": (
    lambda: integer_loss(X, Y, ignore_index=-100.0),
    TypeError,
    f"{INTEGER} expected ignore_index of an integer dtype, got dtype float32.",
  ),
  "ignore_index several": (
    lambda: integer_loss(X, Y, ignore_index=jnp.array([0, 1])),
    ValueError,
    f"{INTEGER} expected ignore_index to be a scalar, got shape (2,).",
  ),
}
