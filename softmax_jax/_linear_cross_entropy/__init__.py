r"""Projection onto a large vocabulary and cross-entropy, without ever holding the logits.

The logits ``[T, V]`` of a language model are the largest array of its training step. Here they are
formed for a chunk of tokens at a time (`chunks`), and so is everything of their size.

Notation: x ``[T, H]`` are the features, W the weight, h = x W + b, y = k h with the logit scale k,
z = c tanh(y / c) the logits of a chunk (y itself without a softcap, and h without a logit scale).
What follows from z is the rule for integer labels of `softmax_jax._cross_entropy`, called here per
chunk, so that loss and gradient keep the same digits.
"""

from softmax_jax._linear_cross_entropy.loss import linear_softmax_cross_entropy

__all__ = ["linear_softmax_cross_entropy"]
