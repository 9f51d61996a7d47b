"""The table of features of the site: its columns for optax, torch and this library are tried."""

import jax
import numpy as np
import optax
import pytest
from feature_trials import (
  LABELS,
  LOGITS,
  OPTAX,
  OURS,
  accepts,
  column,
  features_in_jax,
  keeps_digits,
  only,
  works,
)

import softmax_jax
from softmax_jax import verify


def test_optax():
  tried = features_in_jax(OPTAX, optax.losses.softmax_cross_entropy)
  assert tried == only(column("jax.nn, optax"), tried)


def test_this_library():
  tried = features_in_jax(OURS, softmax_jax.softmax_cross_entropy)
  coefficients = {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": np.ones(4, np.float32)}
  by_coefficients = jax.grad(lambda options: OURS(LOGITS, LABELS, **options).sum())(coefficients)
  linear = softmax_jax.linear_softmax_cross_entropy
  weight, labels = np.eye(3, 32, dtype=np.float32), np.zeros(64, np.int32)
  chunked = jax.make_jaxpr(jax.grad(lambda x: linear(x, weight, labels, chunk_size=16)))
  shapes = str(chunked(np.ones((64, 3), np.float32)))
  few = lambda x: linear(x, weight, LABELS)
  tried |= {
    "label smoothing": accepts(OURS, "label_smoothing"),
    "gradient by every coefficient": all(map(np.any, jax.tree.leaves(by_coefficients))),
    "loss of a linear layer without its logits": "[16,32]" in shapes and "[64,32]" not in shapes,
    "... in forward mode and second derivatives": works(jax.hessian(few), np.ones((2, 3))),
    "... with a bias": accepts(linear, "bias"),
    "... with a softcap": accepts(linear, "softcap"),
    "classes on a named axis of devices": accepts(linear, "axis_name"),
    "a checker of your own derivatives": callable(verify.check_derivatives),
  }
  said = column("softmax_jax")
  assert tried == only(said, tried)
  assert set(said) - set(tried) == {"kernels written for a GPU or TPU"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torch():
  torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
  F, forward = torch.nn.functional, torch.autograd.forward_ad
  labels = torch.tensor(LABELS)
  z = torch.tensor(LOGITS, requires_grad=True)
  losses = F.cross_entropy(z, labels, reduction="none")
  (gradient,) = torch.autograd.grad(losses.sum(), z)
  with forward.dual_level():
    dual = forward.make_dual(z, torch.ones_like(z))
    tangent = forward.unpack_dual(F.cross_entropy(dual, labels)).tangent
  soft = torch.full((2, 4), 0.25, requires_grad=True)
  (by_soft,) = torch.autograd.grad(F.cross_entropy(z, soft), soft)
  weights = torch.ones(4, requires_grad=True)
  hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, labels), z)

  def by_weights():
    loss = F.cross_entropy(z, labels, weight=weights, reduction="sum")
    return torch.autograd.grad(loss, weights)

  def chunked_forward_mode():
    options = torch.nn.LinearCrossEntropyOptions()
    with forward.dual_level():
      x = forward.make_dual(torch.ones(2, 3), torch.ones(2, 3))
      loss = F.linear_cross_entropy(x, torch.ones(4, 3), labels, options=options)
      return forward.unpack_dual(loss).tangent.detach().numpy()

  takes = F.cross_entropy.__doc__ or ""
  tried = {
    "digits of loss and gradient in confident rows": keeps_digits(losses[0].item(), gradient[0, 0]),
    "forward mode: `jvp`, `jacfwd`": tangent is not None,
    "second derivatives": bool(hessian.isfinite().all()),
    "classes masked with `where`": accepts(F.cross_entropy, "where"),
    "soft labels, with a gradient of their own": bool(by_soft.any()),
    "label smoothing": accepts(F.cross_entropy, "label_smoothing"),
    "an ignored label": accepts(F.cross_entropy, "ignore_index"),
    "class weights": accepts(F.cross_entropy, "weight"),
    "z-loss": "lse" in takes or "z_loss" in takes,
    "gradient by every coefficient": works(by_weights),
    "loss of a linear layer without its logits": hasattr(F, "linear_cross_entropy"),
    "... in forward mode and second derivatives": works(chunked_forward_mode),
    "a checker of your own derivatives": callable(torch.autograd.gradcheck),
  }
  assert tried == only(column("torch"), tried)
