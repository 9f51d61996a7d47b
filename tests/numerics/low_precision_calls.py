"""Every argument in which a narrow dtype is refused, by function."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np

import softmax_jax as sj
from softmax_jax import derivatives

NARROW = [name for name in dir(jnp) if name.startswith(("float8_", "float6_", "float4_"))]
ROW, MATRIX, FEATURES = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32), np.ones((2, 3))
INDEX = np.zeros(2, np.int32)
CALLS = {
  "softmax": (sj.softmax, {"x": ROW}),
  "log_softmax": (sj.log_softmax, {"x": ROW}),
  "logsumexp": (sj.logsumexp, {"a": ROW, "b": ROW}),
  "softmax_cross_entropy": (
    sj.softmax_cross_entropy,
    {
      "logits": ROW,
      "labels": ROW,
      "label_smoothing": ROW[0, 0],
      "z_loss": ROW[0, 0],
      "class_weights": ROW[0],
    },
  ),
  "softmax_cross_entropy_with_integer_labels": (
    functools.partial(sj.softmax_cross_entropy_with_integer_labels, labels=INDEX),
    {
      "logits": ROW,
      "label_smoothing": ROW[0, 0],
      "z_loss": ROW[0, 0],
      "class_weights": ROW[0],
    },
  ),
  "linear_softmax_cross_entropy": (
    functools.partial(sj.linear_softmax_cross_entropy, labels=INDEX),
    {
      "x": ROW,
      "weight": MATRIX,
      "bias": ROW[0],
      "label_smoothing": ROW[0, 0],
      "z_loss": ROW[0, 0],
      "class_weights": ROW[0],
      "softcap": ROW[0, 0],
    },
  ),
}
CALLS["softmax_entropy"] = sj.softmax_entropy, {"logits": ROW}
CALLS["softmax_kl_divergence"] = (
  sj.softmax_kl_divergence,
  {"logits": ROW, "target_logits": ROW, "temperature": ROW[0, 0]},
)
for name in derivatives.__all__:
  parameters = inspect.signature(getattr(derivatives, name)).parameters
  CALLS[name] = getattr(derivatives, name), dict.fromkeys(parameters, ROW)
