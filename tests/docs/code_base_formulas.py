"""What the `-` lines of docs/code_bases.md call: the formulas of nine code bases, in plain JAX.

Written from what each of them documents.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax, logsumexp, one_hot

B, T, H, K = 2, 5, 3, 7
LABELS = np.arange(B * T).reshape(B, T) * 3 % K
MASK = np.arange(B * T).reshape(B, T) % 4 != 1
E, C, CAP, TEMPERATURE = 0.2, 0.01, 3.0, 2.5

RANDOM = np.random.default_rng(0)
TEACHER, ADVANTAGES = RANDOM.standard_normal((B, T, K)), RANDOM.standard_normal((B, T))
WEIGHTS = MASK * RANDOM.uniform(0.5, 2, (B, T))
# By these both sides of a diff are differentiated.
ARRAYS = {
  "logits": 2 * RANDOM.standard_normal((B, T, K)),
  "hidden": RANDOM.standard_normal((B, T, H)),
  "x": RANDOM.standard_normal((B, T, H)),
  "w": RANDOM.standard_normal((H, K)),
  "params": {"kernel": RANDOM.standard_normal((H, K))},
}


def soft_loss(logits, labels):
  return -jnp.sum(labels * log_softmax(logits), axis=-1)


def integer_loss(logits, labels):
  return soft_loss(logits, one_hot(labels, logits.shape[-1]))


def kl_divergence(log_predictions, targets):
  return jnp.sum(targets * (jnp.log(targets) - log_predictions), axis=-1)


def with_z_loss(logits, targets, z_loss):
  """The loss with the z-loss, and the z-loss."""
  z_losses = z_loss * logsumexp(logits, axis=-1) ** 2
  return soft_loss(logits, targets) + z_losses, z_losses


def t5x_loss(logits, targets, weights, label_smoothing=0.0, z_loss=0.0):
  """The sums of losses, less the entropy of a label, of z-losses and of weights."""
  others = label_smoothing / (K - 1)
  labels = jnp.where(one_hot(targets, K) == 1, 1 - label_smoothing, others)
  losses, z_losses = with_z_loss(logits, labels, z_loss)
  losses += jnp.sum(labels * jnp.log(labels), axis=-1)
  return jnp.sum(losses * weights), jnp.sum(z_losses * weights), jnp.sum(weights)


def tiled_loss(hidden, data, config, model, params, is_train):
  """MaxText's: the sums over tokens of segments other than 0."""
  logits = model.apply(params, hidden, method="logits_from_hidden_states_for_vocab_tiling")
  counts = data["targets_segmentation"] != 0
  losses, z_losses = with_z_loss(logits, one_hot(data["targets"], K), config.z_loss_multiplier)
  return jnp.sum(losses * counts), jnp.sum(z_losses * counts)


def axlearn_loss(logits, labels, live_targets=None, z_loss_scale=0.0, label_smoothing=0.0):
  """The mean over live targets, and what is logged; its z-loss is without its coefficient."""
  if live_targets is None:
    live_targets = (labels >= 0) & (labels < K)
  mean = lambda x: jnp.sum(x * live_targets) / jnp.maximum(jnp.sum(live_targets), 1)
  targets = (1 - label_smoothing) * one_hot(labels, K) + label_smoothing / K
  loss = mean(with_z_loss(logits, targets, z_loss_scale)[0])
  accuracy = mean(jnp.argmax(logits, axis=-1) == labels)
  return loss, {"accuracy": accuracy, "z_loss": mean(logsumexp(logits, axis=-1) ** 2)}


def levanter_loss(x, labels, w, weight, logsumexp_weight, logit_soft_cap):
  logits = logit_soft_cap * jnp.tanh(x @ w / logit_soft_cap)
  losses, _ = with_z_loss(logits, one_hot(labels, K), logsumexp_weight)
  return jnp.sum(losses * weight) / jnp.sum(weight)


def next_token_loss(Pos, Vocab, logits, true_ids, loss_mask, logsumexp_weight):
  """The mean over all positions but the last, each of which predicts the next token."""
  losses, _ = with_z_loss(logits[:, :-1], one_hot(true_ids[:, 1:], K), logsumexp_weight)
  return jnp.mean(losses, where=loss_mask[:, :-1])


def easydel_loss(logits, labels, config):
  """The means over labels that are not -100, smoothed as in t5x."""
  counts = labels != -100
  loss, z_loss, count = t5x_loss(
    logits, jnp.where(counts, labels, 0), counts, config.label_smoothing, config.z_loss
  )
  accuracy = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * counts) / count
  return SimpleNamespace(
    loss=loss / count, z_loss=z_loss / count, weight_sum=count, accuracy=accuracy
  )


def easydel_head_loss(hidden, labels, lm_head_fn, vocab_size, config):
  """The mean of the next token's loss, without smoothing."""
  losses, _ = with_z_loss(lm_head_fn(hidden[:, :-1]), one_hot(labels[:, 1:], K), config.z_loss)
  return SimpleNamespace(loss=jnp.mean(losses, where=labels[:, 1:] != -100))


class Categorical:
  """distrax's: log p of the logits, and sums of p log p."""

  def __init__(self, logits):
    self.log_p = log_softmax(logits)

  def log_prob(self, actions):
    return jnp.sum(self.log_p * one_hot(actions, K), axis=-1)

  def entropy(self):
    return -jnp.sum(jnp.exp(self.log_p) * self.log_p, axis=-1)

  def kl_divergence(self, other):
    return jnp.sum(jnp.exp(self.log_p) * (self.log_p - other.log_p), axis=-1)


def lm_head(params, x):
  """A norm, then a matrix: a head that is not linear."""
  return (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3)) @ params["kernel"]


def names(arrays):
  """All names in the lines of the page, beside those that it imports."""
  return {
    **{"e": E, "c": C, "cap": CAP, "T": TEMPERATURE, "K": K, "is_train": True},
    **dict.fromkeys(("labels", "targets", "target_tokens", "true_ids"), LABELS),
    **dict.fromkeys(("actions", "input_ids"), LABELS),
    **dict.fromkeys(("mask", "loss_mask", "live_targets", "segmentation", "target_mask"), MASK),
    "target_labels": np.where(MASK, LABELS, -1),
    "padded_labels": np.where(MASK, LABELS, -100),
    **{"weights": WEIGHTS, "advantages": ADVANTAGES, "teacher": TEACHER, "old": TEACHER},
    "probabilities": jax.nn.softmax(TEACHER),
    "data": {"targets": LABELS, "targets_segmentation": MASK},
    **{"Pos": None, "Vocab": None, "LossConfig": SimpleNamespace},
    "config": SimpleNamespace(z_loss=C, z_loss_multiplier=C),
    "model": SimpleNamespace(apply=lambda params, x, method: x @ params["kernel"]),
    "optax": SimpleNamespace(
      softmax_cross_entropy_with_integer_labels=integer_loss,
      softmax_cross_entropy=soft_loss,
      smooth_labels=lambda labels, e: (1 - e) * labels + e / K,
      kl_divergence=kl_divergence,
    ),
    "losses": SimpleNamespace(
      compute_weighted_cross_entropy=t5x_loss, cross_entropy_with_logits=with_z_loss
    ),
    "max_utils": SimpleNamespace(cross_entropy_with_logits=with_z_loss),
    "vocab_tiling_linen_loss": tiled_loss,
    "axlearn_cross_entropy": axlearn_loss,
    "fused_cross_entropy_loss_and_logsumexp_penalty": levanter_loss,
    "next_token_loss": next_token_loss,
    "common": SimpleNamespace(selective_log_softmax=lambda z, y: -integer_loss(z, y)),
    "fixed_cross_entropy": easydel_loss,
    "causal_lm_loss_chunked_lm_head": easydel_head_loss,
    **{"lm_head": lm_head, "lm_head_fn": lambda x: lm_head(arrays["params"], x)},
    "compute_weighted_cross_entropy": lambda *args: t5x_loss(*args)[::2],
    "distrax": SimpleNamespace(Categorical=Categorical),
    **arrays,
  }
