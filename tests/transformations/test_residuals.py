"""What is saved for the backward pass is a contract.

softmax and log_softmax save one array of the size of their input. logsumexp and the losses save no
array of that size but their own arguments, which are alive anyway. The function that `jax.vjp`
returns is a pytree whose leaves are what was saved, so that sizes and buffers can be looked at.
The dtype is bfloat16, so that a copy in float32, in which the work is done, is noticed too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from residual_cases import (
  KEEPING_THE_INPUT,
  KEEPING_THE_OUTPUT,
  MASK,
  arguments,
  either_way,
  not_among,
  saved,
)

from softmax_jax import (
  logsumexp,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)


@either_way
@pytest.mark.parametrize("name", KEEPING_THE_OUTPUT)
def test_softmaxes_save_one_array(name, wrap):
  args, where = arguments(name)
  y, arrays = saved(wrap(KEEPING_THE_OUTPUT[name]), args, where)
  (kept,) = not_among(arrays, where)
  assert kept.dtype == y.dtype
  shown = MASK if where else slice(None)
  np.testing.assert_array_equal(kept[shown], y[shown])
  if not where:  # then it is the output itself, which costs nothing while that is alive
    assert not not_among([kept], [y])


@pytest.mark.few(10)
@either_way
@pytest.mark.parametrize("name", KEEPING_THE_INPUT)
def test_reductions_save_nothing_beside_their_arguments(name, wrap):
  args, where = arguments(name)
  _, arrays = saved(wrap(KEEPING_THE_INPUT[name]), args, where)
  assert not not_among(arrays, args + where)
  assert not not_among(args[:1], arrays)  # the logits are among them: the instrument sees them


@pytest.mark.parametrize("careless", ["upcast", "one-hot", "copy"])
def test_a_rule_that_saves_too_much_is_noticed(careless):
  extra = {"upcast": lambda x: x.astype("float32"), "one-hot": lambda x: x > 1, "copy": jnp.copy}

  @jax.custom_vjp
  def f(x):
    return jnp.sum(x)

  f.defvjp(
    lambda x: (jnp.sum(x), (x, extra[careless](x))),
    lambda residuals, y_bar: (jnp.full_like(residuals[0], y_bar),),
  )
  args, _ = arguments("")
  _, arrays = saved(f, args, [])
  assert len(arrays) == 2
  assert len(not_among(arrays, args)) == 1


@pytest.mark.parametrize("name", ["logsumexp", "integer labels"])
def test_compiled_gradient_holds_no_second_array(name):
  """Not one byte per logit besides the gradient itself: no probabilities, no one-hot."""
  logits = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
  functions = {
    "logsumexp": lambda logits, _: jnp.mean(logsumexp(logits, axis=-1)),
    "integer labels": lambda logits, labels: jnp.mean(
      softmax_cross_entropy_with_integer_labels(logits, labels)
    ),
  }
  labels = jax.ShapeDtypeStruct((64,), jnp.int32)
  memory = _memory(jax.grad(functions[name]), logits, labels)
  assert memory.output_size_in_bytes == 4 * logits.size
  assert memory.temp_size_in_bytes < logits.size


def test_compiled_gradient_with_soft_labels_holds_no_more_than_its_peer():
  logits = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
  ours, theirs = (
    _memory(jax.grad(lambda z, t, f=f: jnp.mean(f(z, t))), logits, logits).temp_size_in_bytes
    for f in (softmax_cross_entropy, optax.losses.softmax_cross_entropy)
  )
  assert ours <= theirs + 0.01 * 4 * logits.size


def _memory(f, *args):
  return jax.jit(f).lower(*args).compile().memory_analysis()
