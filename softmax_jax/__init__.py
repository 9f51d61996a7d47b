"""Softmax and the losses built on it, with gradients derived by hand."""

import importlib
from typing import TYPE_CHECKING, Any

from softmax_jax import derivatives as derivatives
from softmax_jax._chunked_cross_entropy import chunked_softmax_cross_entropy
from softmax_jax._cross_entropy import (
  CrossEntropyAux,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)
from softmax_jax._entropy import softmax_entropy
from softmax_jax._forward_mode import enable_forward_mode
from softmax_jax._kl_divergence import softmax_kl_divergence
from softmax_jax._linear_cross_entropy import linear_softmax_cross_entropy
from softmax_jax._softmax import log_softmax, logsumexp, softmax

if TYPE_CHECKING:
  from softmax_jax import reference as reference
  from softmax_jax import verify as verify
else:

  def __getattr__(name: str) -> Any:
    """Imports these modules when they are first used, which keeps other imports cheap."""
    if name in ("reference", "verify"):
      return importlib.import_module(f"softmax_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
  "CrossEntropyAux",
  "chunked_softmax_cross_entropy",
  "enable_forward_mode",
  "linear_softmax_cross_entropy",
  "log_softmax",
  "logsumexp",
  "softmax",
  "softmax_cross_entropy",
  "softmax_cross_entropy_with_integer_labels",
  "softmax_entropy",
  "softmax_kl_divergence",
]
