"""What the linear loss moves and holds on a GPU and a TPU that are not there."""

import jax
import jax.numpy as jnp
import optax
import pytest
from absent_devices import required

from softmax_jax import linear_softmax_cross_entropy
from softmax_jax.benchmark.traffic import traffic

pytestmark = pytest.mark.long

H = 2048


def dense(x, weight, labels):
  logits = jax.lax.dot(x, weight, preferred_element_type=jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def measured(target, f, num_tokens, num_classes):
  shapes = (
    jax.ShapeDtypeStruct((num_tokens, H), jnp.bfloat16),
    jax.ShapeDtypeStruct((H, num_classes), jnp.bfloat16),
    jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
  )
  found = traffic(required(target), jax.value_and_grad(f, (0, 1)), *shapes)
  return found.reads + found.writes, found.temp_bytes, found.cycles


def chunk(num_tokens, num_classes):
  """As the documentation of ``chunk_size`` has it."""
  tokens_of = lambda mebibytes: mebibytes * 2**20 // (4 * num_classes)
  return max(tokens_of(128), min(max(tokens_of(512), H), num_tokens // 4))


@pytest.mark.parametrize("num_tokens, num_classes", [(16384, 128256), (4096, 32768)])
@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_bytes_and_memory(target, num_tokens, num_classes):
  moved, temp, cycles = measured(target, linear_softmax_cross_entropy, num_tokens, num_classes)
  dense_moved, dense_temp, dense_cycles = measured(target, dense, num_tokens, num_classes)
  large = num_tokens == 16384
  if target == "h100":
    assert moved < (1.2 if large else 2) * dense_moved
    assert temp < (0.15 if large else 0.4) * dense_temp
  else:
    assert moved < (2 if large else 2.3) * dense_moved
    assert temp < (0.5 if large else 1) * dense_temp
    assert cycles < (1.35 if large else 1.5) * dense_cycles
  # The documented bytes: those of the logits of a chunk, and of the sums of the gradients.
  tiles = 1 if target == "h100" else 2.5
  sums = 4 * H * (num_tokens + num_classes)
  assert temp == pytest.approx(4 * tiles * chunk(num_tokens, num_classes) * num_classes + sums, 0.2)


def test_small_chunks_are_seen():
  """A planted fault: chunks as on a CPU move the gradient of the weight too often."""
  small = lambda *args: linear_softmax_cross_entropy(*args, chunk_size=256)
  assert measured("h100", small, 4096, 32768)[0] > 3 * measured("h100", dense, 4096, 32768)[0]
