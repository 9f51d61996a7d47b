"""Loops over chunks of tokens, and how large a chunk is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")

# The bytes of a tile, the logits of one chunk, where the caller does not say how large a chunk is.
TILE_BYTES = 128 * 2**20


def default_chunk_size(num_tokens: int, num_classes: int, item_bytes: int) -> int:
  """The number of tokens whose logits fit into `TILE_BYTES`, less where that evens out the chunks.

  If it can be had by no more than halving the chunk, the chunks are all of the same size.
  """
  most = max(1, TILE_BYTES // (item_bytes * max(1, num_classes)))
  if num_tokens <= most:
    return max(1, num_tokens)
  for size in range(most, most // 2, -1):
    if num_tokens % size == 0:
      return size
  return most


def over_chunks(
  body: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, rows: Any, chunk_size: int
) -> tuple[Carry, Any]:
  """`jax.lax.scan` over chunks of the leading axis, the last of which may be smaller.

  Args:
    body: ``body(carry, rows_of_chunk) -> carry, outputs_of_chunk``, for a chunk of any size.
    carry: what the first chunk starts from.
    rows: a pytree of arrays ``[T, ...]``, with T > 0.
    chunk_size: the number of rows of each chunk but the last.

  Returns:
    The last carry, and the outputs of all rows ``[T, ...]``.
  """
  # Differentiated in reverse mode, a chunk is computed again: nothing of the size of its logits is
  # kept.
  body = jax.checkpoint(body, prevent_cse=False)
  num_rows = jax.tree.leaves(rows)[0].shape[0]
  whole = num_rows // chunk_size
  split = whole * chunk_size if whole > 1 else 0
  parts = []
  if split:

    def to_chunks(x):
      return x[:split].reshape(whole, chunk_size, *x.shape[1:])

    carry, out = lax.scan(body, carry, jax.tree.map(to_chunks, rows))
    parts.append(jax.tree.map(lambda x: x.reshape(split, *x.shape[2:]), out))
  for start in range(split, num_rows, chunk_size):
    chunk = jax.tree.map(lambda x, start=start: x[start : start + chunk_size], rows)
    carry, out = body(carry, chunk)
    parts.append(out)
  if len(parts) == 1:
    return carry, parts[0]
  return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
