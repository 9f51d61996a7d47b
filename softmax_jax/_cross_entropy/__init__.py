r"""Softmax cross-entropy with integer and with soft labels.

Notation, for the logits z_k of one row: shift, e_k, S and the softmax a_k = e_k / S are those of
`softmax_jax._normalizer`; ``rest`` is S - 1 to its own last digits, and t is the label.

Each kind of label has one rule, whose outputs are a few scalars per row: the negative
log-likelihood, the log-normalizer and, where labels are smoothed, the loss against the uniform
distribution. The cotangent of each is honored, so that every option and every coefficient is plain
JAX on these scalars (`options`), differentiable without a rule of its own.

Near a_t = 1, where training ends, the textbook terms ``lse - z_t`` and ``a_t - 1`` lose all their
digits. Here they are sums of terms of one sign,

    nll = (shift - z_t) + log1p(rest),      1 - a_t = ((1 - e_t) + rest) / S,

where the second numerator is ``rest`` itself if t is the largest class (e_t = 1), and at least 1
otherwise.
"""

from softmax_jax._cross_entropy.integer import softmax_cross_entropy_with_integer_labels
from softmax_jax._cross_entropy.options import CrossEntropyAux
from softmax_jax._cross_entropy.soft import softmax_cross_entropy

__all__ = [
  "CrossEntropyAux",
  "softmax_cross_entropy",
  "softmax_cross_entropy_with_integer_labels",
]
