"""The rule: the losses of all tokens and their sum, chunk by chunk.

In a chunk the head is JAX's to differentiate, and the loss of its logits has the rule of the dense
one. The gradients of a sum are known, up to its cotangent, as soon as a chunk's logits are: they
are formed in the forward pass, and the head runs once. For cotangents of its own for each token it
runs again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax import _devices as devices
from softmax_jax._arrays import instantiated, is_zero
from softmax_jax._cross_entropy import options
from softmax_jax._cross_entropy.integer_rule import Static as DenseStatic
from softmax_jax._cross_entropy.integer_rule import integer_cross_entropy
from softmax_jax._forward_mode import enable_forward_mode, rule_with_loops
from softmax_jax._linear_cross_entropy.chunks import Put, over_chunks
from softmax_jax._products import scale_or_zero

Head = Callable[[Any, Any], jax.Array]
Leaves = Sequence[Any]


class Shared(NamedTuple):
  """What all tokens share.

  Attributes:
    params: of the head, a pytree.
    class_weights: ``[1, V]`` or None.
    label_smoothing, z_loss: scalars or None.
  """

  params: Any
  class_weights: Any
  label_smoothing: Any
  z_loss: Any


class Tokens(NamedTuple):
  """What each token has.

  Attributes:
    x: features, a pytree of arrays ``[T, ...]``.
    index: that of the label, `INVALID` or `IGNORED`, ``[T]``.
    sample_weights: ``[T]`` or None.
  """

  x: Any
  index: Any
  sample_weights: Any


class OfTokens(NamedTuple):
  """What the rule returns for each token, ``[T]``: the loss, and what makes the aux."""

  loss: Any
  nll: Any
  lse: Any
  z_loss: Any
  right: Any


Outputs = tuple[jax.Array, OfTokens]  # the sum of the losses comes first


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
  """Which leaves are differentiated."""

  leaves: tuple[bool, ...]

  def of(self, leaves: Leaves) -> list[Any]:
    """Those that are."""
    return [x for x, wanted in zip(leaves, self.leaves, strict=True) if wanted]

  def replaced(self, leaves: Leaves, new: Leaves) -> list[Any]:
    """All leaves, with ``new`` in place of those that are."""
    values = iter(new)
    return [next(values) if wanted else x for x, wanted in zip(leaves, self.leaves, strict=True)]


class Static(NamedTuple):
  """What is known while tracing.

  Attributes:
    head: ``head(params, x)``, the logits ``[C, V]`` of a chunk of features.
    tree: the structure of (`Shared`, `Tokens`), whose leaves the rule takes.
    num_shared: how many of the leaves are those of `Shared`.
    chunk_size: the number of tokens of a chunk.
    dense: what the rule of the dense loss knows.
    dtype: of the losses.
    is_sum: whether the sum of the losses is wanted, so that its gradients are formed with it.
  """

  head: Head
  tree: Any
  num_shared: int
  chunk_size: int
  dense: DenseStatic
  dtype: np.dtype
  is_sum: bool


def _of_chunk(static: Static, leaves: Leaves) -> Outputs:
  shared, tokens = jax.tree.unflatten(static.tree, leaves)
  z = static.head(shared.params, tokens.x)
  samples = tokens.sample_weights
  weightless = None if samples is None else samples[:, None] == 0
  index, weights = tokens.index[:, None], shared.class_weights
  per_row = integer_cross_entropy(z, index, None, weights, weightless, static.dense)
  if weights is not None:
    per_row = per_row._replace(nll=scale_or_zero(per_row.weight, per_row.nll))
  per_row = jax.tree.map(lambda x: x[:, 0], per_row)
  chosen = options.Options(shared.label_smoothing, shared.z_loss, "none")
  loss, aux = options.combine(chosen, per_row, samples)
  return jnp.sum(loss), OfTokens(loss, aux.nll, aux.lse, aux.z_loss, per_row.right)


# Compiled: outside of `jax.jit` a loop would be compiled in every call.
_with_loops = functools.partial(rule_with_loops, static_argnums=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rule(leaves: Leaves, static: Static) -> Outputs:
  return _forward(static, leaves)


@_with_loops
def _forward(static: Static, leaves: Leaves) -> Outputs:
  shared, tokens = leaves[: static.num_shared], leaves[static.num_shared :]

  def body(total: jax.Array, tokens: Leaves, put: Put) -> tuple[jax.Array, OfTokens]:
    part, of_tokens = _of_chunk(static, [*shared, *tokens])
    return total + part, of_tokens

  return _over_chunks(static, body, _zero(static), tokens)


def _fwd(leaves: list[Any], static: Static) -> tuple[Outputs, Any]:
  # Integers have no derivative.
  wanted = _Wanted(tuple(x.perturbed and _is_inexact(x.value) for x in leaves))
  leaves = [x.value for x in leaves]
  if not static.is_sum:
    return _forward(static, leaves), (wanted, leaves, None)
  outputs, gradients = _gradients(static, leaves, wanted, jnp.ones((), static.dtype), None)
  return outputs, (wanted, leaves, gradients)


# Of a sum all gradients are those of `_fwd`, times its cotangent; unless the outputs for each token
# have cotangents too. Then nothing needs what `_fwd` formed.
def _bwd(static: Static, residuals: Any, bars: Any) -> tuple[list[Any]]:
  wanted, leaves, gradients = residuals
  _, of_tokens = bars
  bar, of_tokens_bar = instantiated(bars)
  if gradients is None or not all(map(is_zero, of_tokens)):
    _, gradients = _gradients(static, leaves, wanted, bar, of_tokens_bar)
  else:
    gradients = [bar * gradient for gradient in gradients]
  found = iter(gradients)
  pairs = zip(leaves, wanted.leaves, strict=True)
  return ([next(found).astype(x.dtype) if is_wanted else None for x, is_wanted in pairs],)


@_with_loops
def _gradients(
  static: Static, leaves: Leaves, wanted: _Wanted, bar: jax.Array, bars: OfTokens | None
) -> tuple[Outputs, list[jax.Array]]:
  """The outputs, and the gradients of the leaves that are wanted for these cotangents."""
  shared, tokens = leaves[: static.num_shared], leaves[static.num_shared :]
  # What all chunks add to is summed in the dtype of the losses.
  sums = [
    jnp.zeros_like(x, jnp.promote_types(x.dtype, bar.dtype) if i < static.num_shared else None)
    for i, x in enumerate(leaves)
    if wanted.leaves[i]
  ]
  num_sums = sum(wanted.leaves[: static.num_shared])

  def body(carry: Any, tokens: Any, put: Put) -> tuple[Any, OfTokens]:
    total, sums = carry
    tokens, of_tokens_bar = tokens
    chunk = [*shared, *tokens]

    def of_wanted(moving: Leaves) -> Outputs:
      return _of_chunk(static, wanted.replaced(chunk, moving))

    (part, of_tokens), pull = jax.vjp(of_wanted, wanted.of(chunk))
    if of_tokens_bar is None:
      of_tokens_bar = jax.tree.map(jnp.zeros_like, of_tokens)
    # With the types of the outputs, which may be spread over a mesh.
    (gradients,) = pull(
      jax.tree.map(
        lambda y, y_bar: jnp.zeros_like(y) + y_bar, (part, of_tokens), (bar, of_tokens_bar)
      )
    )
    added = [
      s + g.astype(s.dtype) for s, g in zip(sums[:num_sums], gradients[:num_sums], strict=True)
    ]
    parts = zip(sums[num_sums:], gradients[num_sums:], strict=True)
    return (total + part, [*added, *(put(s, g) for s, g in parts)]), of_tokens

  (total, gradients), of_tokens = _over_chunks(static, body, (_zero(static), sums), (tokens, bars))
  return (total, of_tokens), gradients


@_with_loops
def _tangent(static: Static, residuals: Any, args_dot: tuple[Any, ...]) -> Outputs:
  _, leaves, _ = residuals
  (dots,) = args_dot
  moving = _Wanted(tuple(dot is not None for dot in dots))
  shared, tokens = leaves[: static.num_shared], leaves[static.num_shared :]

  def body(total_dot: jax.Array, tokens: Any, put: Put) -> tuple[jax.Array, OfTokens]:
    tokens, tokens_dot = tokens
    chunk, chunk_dot = [*shared, *tokens], [*dots[: static.num_shared], *tokens_dot]

    def of_moving(leaves: Leaves) -> Outputs:
      return _of_chunk(static, moving.replaced(chunk, leaves))

    part, of_tokens = jax.jvp(of_moving, (moving.of(chunk),), (moving.of(chunk_dot),))[1]
    return total_dot + part, of_tokens

  return _over_chunks(static, body, _zero(static), (tokens, dots[static.num_shared :]))


def _over_chunks(static: Static, body: Any, carry: Any, tokens: Any) -> Any:
  # A loop keeps the types of what it carries, which vary over the axes of a `jax.shard_map`.
  sums, tree = jax.tree.flatten(carry)
  varying = devices.varying_alike(*sums, *jax.tree.leaves(tokens))
  carry = jax.tree.unflatten(tree, varying[: len(sums)])
  # Of every n-th token, so that with automatic sharding each device cuts its own.
  return over_chunks(body, carry, tokens, static.chunk_size, of_neighbors=False)


def _zero(static: Static) -> jax.Array:
  return jnp.zeros((), static.dtype)


def _is_inexact(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


_rule.defvjp(_fwd, _bwd, symbolic_zeros=True)
losses_in_chunks = enable_forward_mode(_rule, tangent=_tangent)
