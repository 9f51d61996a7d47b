"""Cross-entropy of a head that is any function of parameters and features, chunk by chunk."""

from softmax_jax._chunked_cross_entropy.loss import chunked_softmax_cross_entropy

__all__ = ["chunked_softmax_cross_entropy"]
