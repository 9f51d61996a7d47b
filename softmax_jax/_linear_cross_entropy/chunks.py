"""Loops over chunks of tokens and over blocks of classes, and how large they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from softmax_jax._typed import checkpoint, fori_loop, tree_map

Carry = TypeVar("Carry")
Rows = TypeVar("Rows")
Out = TypeVar("Out")

# The least bytes that a tile may take, the logits of one chunk, where the caller does not say how
# large a chunk is.
TILE_BYTES = 128 * 2**20

# What is formed of the gradients of a chunk at a time is a block of classes: all where that takes
# no more bytes than this, and never less than one part in `MOST_BLOCKS`.
BLOCK_BYTES = 12 * 2**20
MOST_BLOCKS = 16


def default_chunk_size(
  num_tokens: int, num_features: int, num_classes: int, item_bytes: int
) -> int:
  """The number of tokens in a chunk.

  A tile takes at most `TILE_BYTES` or, if that is more, a quarter of the bytes of the weight's
  gradient: each chunk reads and writes that gradient, which small chunks would do too often. If it
  can be had by no more than halving the chunk, the chunks are all of the same size.
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
  # The smaller block comes first: what follows an update of the carry is then a loop. XLA fuses
  # other operations with an update, which does not happen in place then.
  whole = num_classes // size
  if num_classes % size:
    carry = body(carry, whole * size, num_classes % size)
  if whole == 1:
    return body(carry, 0, size)
  return fori_loop(0, whole, lambda i, carry: body(carry, i * size, size), carry)


def over_chunks(
  body: Callable[[Carry, Rows, Any], tuple[Carry, Out]], carry: Carry, rows: Rows, chunk_size: int
) -> tuple[Carry, Out]:
  """`jax.lax.scan` over chunks of the leading axis, the last of which may be smaller.

  Args:
    body: ``body(carry, rows_of_chunk, first_row) -> carry, outputs_of_chunk``, for a chunk of any
      size.
    carry: what the first chunk starts from.
    rows: a pytree of arrays ``[T, ...]``, with T > 0.
    chunk_size: the number of rows of each chunk but the last.

  Returns:
    The last carry, and the outputs of all rows ``[T, ...]``.
  """
  # Differentiated in reverse mode, a chunk is computed again: nothing of the size of its logits is
  # kept.
  body = checkpoint(body, prevent_cse=False)
  num_rows = jax.tree.leaves(rows)[0].shape[0]
  whole = num_rows // chunk_size
  split = whole * chunk_size
  parts: list[Out] = []
  if split < num_rows:  # first, as in over_blocks
    carry, out = body(carry, tree_map(lambda x: x[split:], rows), split)
    parts.append(out)
  if whole == 1:
    carry, out = body(carry, tree_map(lambda x: x[:split], rows), 0)
    parts.insert(0, out)
  elif whole:
    # Cut out here: to split the rows beforehand would copy them.
    def chunk(carry: Carry, first: jax.Array) -> tuple[Carry, Out]:
      cut = tree_map(lambda x: lax.dynamic_slice_in_dim(x, first, chunk_size), rows)
      return body(carry, cut, first)

    carry, out = lax.scan(chunk, carry, jnp.arange(0, split, chunk_size))
    parts.insert(0, tree_map(lambda x: x.reshape(split, *x.shape[2:]), out))
  if len(parts) == 1:
    return carry, parts[0]

  def concatenated(*xs: jax.Array) -> jax.Array:
    return jnp.concatenate(xs)

  return carry, jax.tree.map(concatenated, *parts)
