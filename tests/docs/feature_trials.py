"""The table of features of the site, and the trials of what it says."""

import inspect

import jax
import numpy as np
import optax
from pages import DOCS, table, text_of

import softmax_jax

LOGITS = np.array([[25.0, 0, 0, 0], [1, 2, 3, 4]], np.float32)
LABELS = np.array([0, 1])
OURS = softmax_jax.softmax_cross_entropy_with_integer_labels
OPTAX = optax.losses.softmax_cross_entropy_with_integer_labels


def column(title):
  """What the table says of a library: True or False by feature."""
  header, *rows = table(text_of(DOCS / "comparison.md"))
  place = header.index(title)
  return {row[0]: row[place] == "yes" for row in rows if row[place] in ("yes", "no")}


def only(said, tried):
  return {feature: said[feature] for feature in tried}


def accepts(f, *names):
  return set(names) <= set(inspect.signature(f).parameters)


def works(f, *args):
  try:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(f(*args)))
  except Exception:
    return False


def keeps_digits(value, gradient):
  r = 3 * np.exp(-25.0)
  right = np.array([np.log1p(r), -r / (1 + r)])
  return bool(np.allclose([value, gradient], right, rtol=1e-6, atol=0))


def features_in_jax(ce, soft):
  """The features that a loss in JAX can have, ours or that of optax: True or False by feature."""
  gradient = jax.grad(lambda z: ce(z, LABELS).sum())
  options = lambda *names: accepts(ce, *names)
  return {
    "digits of loss and gradient in confident rows": keeps_digits(
      ce(LOGITS, LABELS)[0], gradient(LOGITS)[0, 0]
    ),
    "forward mode: `jvp`, `jacfwd`": works(jax.jacfwd(lambda z: ce(z, LABELS)), LOGITS),
    "second derivatives": works(jax.hessian(lambda z: ce(z, LABELS).sum()), LOGITS),
    "classes masked with `where`": options("where"),
    "soft labels, with a gradient of their own": works(
      jax.grad(lambda t: soft(LOGITS, t).sum()), np.full((2, 4), 0.25, np.float32)
    ),
    "an ignored label": options("ignore_index"),
    "class weights": options("class_weights"),
    "weights of rows": options("sample_weights"),
    "the number of right predictions, beside the loss": works(
      lambda z: ce(z, LABELS, return_aux=True)[1].correct, LOGITS
    ),
    "z-loss": options("z_loss"),
  }
