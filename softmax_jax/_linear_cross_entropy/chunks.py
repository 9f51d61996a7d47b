"""Loops over chunks of tokens and over blocks of classes, and how large they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

Carry = TypeVar("Carry")
Tokens = TypeVar("Tokens")
Out = TypeVar("Out")
Put = Callable[[jax.Array, jax.Array], jax.Array]


class Tiling(NamedTuple):
  """How large the parts are that are computed at a time.

  A chunk has the logits of `bytes_of_chunk`, or `tokens_per_feature` of the weight if that is more:
  each chunk reads and writes the gradient of the weight, and small chunks would do so too often.
  But only one of `least_bytes` may have more than a quarter of the tokens. The gradients of a chunk
  are formed for blocks of classes, of `bytes_of_block`, at most `MOST_BLOCKS` of them, or for all
  classes at once where that is None.

  A chunk is made of neighbors or, where XLA spreads the tokens over devices, of every n-th token:
  each device then cuts its part from its own, where neighbors would be gathered from one device.
  """

  least_bytes: int
  bytes_of_chunk: int
  tokens_per_feature: float
  bytes_of_block: int | None
  of_neighbors: bool = True

  def on_devices(self, count: int) -> Tiling:
    """The same for chunks whose logits are spread over ``count`` devices."""
    return self._replace(
      least_bytes=count * self.least_bytes,
      bytes_of_chunk=count * self.bytes_of_chunk,
      tokens_per_feature=count * self.tokens_per_feature,
      of_neighbors=False,
    )

  def chunk_size(
    self, num_tokens: int, num_features: int, num_classes: int, item_bytes: int
  ) -> int:
    """The number of tokens in a chunk.

    It is reduced, by less than half, to one that divides the tokens, if there is such a number.
    """
    bytes_per_token = item_bytes * max(1, num_classes)
    large = max(self.bytes_of_chunk // bytes_per_token, int(num_features * self.tokens_per_feature))
    most = max(1, self.least_bytes // bytes_per_token, min(large, num_tokens // 4))
    if num_tokens <= most:
      return max(1, num_tokens)
    for size in range(most, most // 2, -1):
      if num_tokens % size == 0:
        return size
    return most

  def block_size(
    self, num_tokens: int, num_features: int, num_classes: Any, item_bytes: int
  ) -> Any:
    """The number of classes in a block, for a chunk of ``num_tokens`` tokens."""
    # With an unknown number of classes it is not known either how many blocks they make.
    if self.bytes_of_block is None or is_symbolic_dim(num_classes):
      return num_classes
    # y_bar of the chunk, and for each class its weights and their gradient.
    bytes_per_class = item_bytes * max(1, num_tokens + 2 * num_features)
    count = min(MOST_BLOCKS, -(-num_classes * bytes_per_class // self.bytes_of_block))
    size = -(-num_classes // max(1, count))
    return min(num_classes, -(-size // 128) * 128)


MOST_BLOCKS = 16

# A CPU multiplies small matrices as fast as large ones, and keeps a block in its caches. On a GPU
# or a TPU, c tokens of a chunk take 6 c operations for each entry of the weight, which is read
# while its gradient is read and written, 12 bytes: products are the limit from a thousand tokens.
ON_CPU = Tiling(128 * 2**20, 128 * 2**20, 1 / 4, 12 * 2**20)
ON_ACCELERATOR = Tiling(128 * 2**20, 512 * 2**20, 1, None)


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
  body: Callable[[Carry, Tokens, Put], tuple[Carry, Out]],
  carry: Carry,
  tokens: Tokens,
  chunk_size: int,
  of_neighbors: bool,
) -> tuple[Carry, Out]:
  """`jax.lax.scan` over chunks of the leading axis, the last of which may be smaller.

  Args:
    body: ``body(carry, tokens_of_chunk, put) -> carry, outputs_of_chunk``, for a chunk of any size,
      where ``put(x, x_of_chunk)`` is an array ``x`` of all tokens with those of the chunk replaced.
    carry: what the first chunk starts from.
    tokens: a pytree of arrays ``[T, ...]``, with T > 0.
    chunk_size: the number of tokens of each chunk but the last.
    of_neighbors: whether a chunk is made of neighbors.

  Returns:
    The last carry, and the outputs of all tokens ``[T, ...]``.
  """
  # Reverse mode recomputes a chunk: nothing of the size of its logits is saved.
  body = jax.checkpoint(body, prevent_cse=False, static_argnums=2)
  num_tokens = jax.tree.leaves(tokens)[0].shape[0]
  whole = num_tokens // chunk_size
  split = whole * chunk_size

  def slice_of(first: int, last: int, carry: Carry) -> tuple[Carry, Out]:
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, 0)
    return body(carry, jax.tree.map(lambda x: x[first:last], tokens), put)

  parts: list[Out] = []
  if split < num_tokens:  # first, as in over_blocks
    carry, out = slice_of(split, num_tokens, carry)
    parts.append(out)
  if whole == 1:
    carry, out = slice_of(0, split, carry)
    parts.insert(0, out)
  elif whole:
    shape, axis = ((whole, chunk_size), 0) if of_neighbors else ((chunk_size, whole), 1)
    as_chunks = lambda x: x[:split].reshape(*shape, *x.shape[1:])

    # Cut out here: to split the rows beforehand would copy them.
    def chunk(carry: Carry, i: jax.Array) -> tuple[Carry, Out]:
      def put(x: jax.Array, part: jax.Array) -> jax.Array:
        if of_neighbors:
          return lax.dynamic_update_slice_in_dim(x, part, i * chunk_size, 0)
        new = lax.dynamic_update_index_in_dim(as_chunks(x), part, i, axis)
        return jnp.concatenate([new.reshape(split, *x.shape[1:]), x[split:]])

      cut = lambda x: lax.dynamic_index_in_dim(as_chunks(x), i, axis, keepdims=False)
      return body(carry, jax.tree.map(cut, tokens), put)

    carry, out = lax.scan(chunk, carry, jnp.arange(whole))
    merged = lambda x: jnp.moveaxis(x, 0, axis).reshape(split, *x.shape[2:])
    parts.insert(0, jax.tree.map(merged, out))
  if len(parts) == 1:
    return carry, parts[0]

  def concatenated(*xs: jax.Array) -> jax.Array:
    return jnp.concatenate(xs)

  return carry, jax.tree.map(concatenated, *parts)
