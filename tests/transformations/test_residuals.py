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

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)

B, K = 16, 128
LOGITS = np.random.default_rng(0).normal(size=(B, K))
MASK = LOGITS < 1.5
ROW = np.linspace(0.5, 1, K).astype(jnp.bfloat16)
INTEGERS = np.arange(B, dtype=np.int32)
ACROSS = np.arange(K, dtype=np.int32) % B

KEEPING_THE_OUTPUT = {  # functions of x and, where the name says so, of a mask
  "softmax": softmax,
  "softmax over all axes": lambda x: softmax(x, axis=None),
  "softmax, masked": lambda x, where: softmax(x, where=where),
  "log_softmax": log_softmax,
  "log_softmax, masked": lambda x, where: log_softmax(x, where=where),
}
KEEPING_THE_INPUT = {  # likewise, with weights or soft labels that are differentiated too
  "logsumexp": lambda x: logsumexp(x, axis=-1),
  "logsumexp over all axes, masked": lambda x, where: logsumexp(x, where=where),
  "logsumexp, weighted": lambda x, b: logsumexp(x, axis=-1, b=b),
  "logsumexp, one weight per column": lambda x: logsumexp(x, axis=-1, b=ROW),
  "soft labels": softmax_cross_entropy,
  "soft labels, the same in all rows": lambda x: softmax_cross_entropy(x, ROW),
  "soft labels, masked": lambda x, t, where: softmax_cross_entropy(x, t, where=where),
  "integer labels": lambda x: softmax_cross_entropy_with_integer_labels(x, INTEGERS),
  "integer labels, axis 0": lambda x: softmax_cross_entropy_with_integer_labels(x, ACROSS, 0),
  "integer labels, masked": lambda x, where: softmax_cross_entropy_with_integer_labels(
    x, INTEGERS, where=where
  ),
}
either_way = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def arguments(name):
  """The arguments of the function called `name` that are differentiated, and its mask if any."""
  args = [jnp.asarray(LOGITS, "bfloat16")]
  if name in ("logsumexp, weighted", "soft labels", "soft labels, masked"):
    args.append(jnp.asarray(np.abs(LOGITS), "bfloat16"))
  return args, [jnp.asarray(MASK)] if "masked" in name else []


def saved(f, args, where):
  """The output of f and the arrays as large as the logits that its backward pass holds."""
  y, pull = jax.vjp(lambda *args: f(*args, *where), *args)
  leaves = [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]
  return y, [leaf for leaf in leaves if leaf.size >= B * K]


def not_among(arrays, known):
  """Those of `arrays` that are not kept in the buffer of one of `known`."""
  buffers = {array.unsafe_buffer_pointer() for array in known}
  return [array for array in arrays if array.unsafe_buffer_pointer() not in buffers]


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
  """Beside the gradient itself not one byte per logit: no probabilities, no one-hot."""
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
