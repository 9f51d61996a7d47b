"""Loops over chunks of tokens and over blocks of classes, and how large they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

Carry = TypeVar("Carry")
Tokens = TypeVar("Tokens")
Out = TypeVar("Out")

# Default byte budget for a tile, the logits of one chunk.
TILE_BYTES = 128 * 2**20

# Byte budget for the gradients of a block of classes, of which a chunk has at most `MOST_BLOCKS`.
BLOCK_BYTES = 12 * 2**20
MOST_BLOCKS = 16


def default_chunk_size(
  num_tokens: int, num_features: int, num_classes: int, item_bytes: int
) -> int:
  """The number of tokens in a chunk.

  A tile takes at most `TILE_BYTES` or, if that is more, a quarter of the bytes of the weight's
  gradient: each chunk reads and writes that gradient, and small chunks would do so too often. The
  size is reduced, by less than half, to one that divides the tokens, if there is such a size.
  """
  most = max(1, TILE_BYTES // (item_bytes * max(1, num_classes)), num_features // 4)
  if num_tokens <= most:
    return max(1, num_tokens)
  for size in range(most, most // 2, -1):
    if num_tokens % size == 0:
      return size
  return most


def block_size(num_tokens: int, num_features: int, num_classes: Any, item_bytes: int) -> Any:
  """The number of classes in a block, for a chunk of ``num_tokens`` tokens."""
  if is_symbolic_dim(num_classes):  # all, as it is not known how many parts they make
    return num_classes
  # y_bar of the chunk, and for each class its weights and their gradient.
  bytes_per_class = item_bytes * max(1, num_tokens + 2 * num_features)
  count = min(MOST_BLOCKS, -(-num_classes * bytes_per_class // BLOCK_BYTES))
  size = -(-num_classes // max(1, count))
  return min(num_classes, -(-size // 128) * 128)


def over_blocks(
  body: Callable[[Carry, Any, int], Carry], carry: Carry, num_classes: int, size: int
) -> Carry:
  """The last carry of ``body(carry, first_class, number_of_classes)`` over blocks of classes.

  The last block may be smaller.
  """
  # The smaller block comes first, so that a loop follows the update of the carry. XLA would fuse
  # other operations with that update, and then not do it in place.
  whole = num_classes // size
  if num_classes % size:
    carry = body(carry, whole * size, num_classes % size)
  if whole == 1:
    return body(carry, 0, size)
  return lax.fori_loop(0, whole, lambda i, carry: body(carry, i * size, size), carry)


def over_chunks(
  body: Callable[[Carry, Tokens, Any], tuple[Carry, Out]],
  carry: Carry,
  tokens: Tokens,
  chunk_size: int,
) -> tuple[Carry, Out]:
  """`jax.lax.scan` over chunks of the leading axis, the last of which may be smaller.

  Args:
    body: ``body(carry, tokens_of_chunk, first) -> carry, outputs_of_chunk``, for a chunk of any
      size.
    carry: what the first chunk starts from.
    tokens: a pytree of arrays ``[T, ...]``, with T > 0.
    chunk_size: the number of tokens of each chunk but the last.

  Returns:
    The last carry, and the outputs of all tokens ``[T, ...]``.
  """
  # Reverse mode recomputes a chunk: nothing of the size of its logits is saved.
  body = jax.checkpoint(body, prevent_cse=False)
  num_tokens = jax.tree.leaves(tokens)[0].shape[0]
  whole = num_tokens // chunk_size
  split = whole * chunk_size
  parts: list[Out] = []
  if split < num_tokens:  # first, as in over_blocks
    carry, out = body(carry, jax.tree.map(lambda x: x[split:], tokens), split)
    parts.append(out)
  if whole == 1:
    carry, out = body(carry, jax.tree.map(lambda x: x[:split], tokens), 0)
    parts.insert(0, out)
  elif whole:
    # Cut out here: to split the rows beforehand would copy them.
    def chunk(carry: Carry, first: jax.Array) -> tuple[Carry, Out]:
      cut = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, chunk_size), tokens)
      return body(carry, cut, first)

    carry, out = lax.scan(chunk, carry, jnp.arange(0, split, chunk_size))
    parts.insert(0, jax.tree.map(lambda x: x.reshape(split, *x.shape[2:]), out))
  if len(parts) == 1:
    return carry, parts[0]

  def concatenated(*xs: jax.Array) -> jax.Array:
    return jnp.concatenate(xs)

  return carry, jax.tree.map(concatenated, *parts)
