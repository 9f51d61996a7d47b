"""No option of the two losses costs an array of the size of the logits."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from option_formulas import INTEGER, LOSSES, SOFT, VALUES, everything, flat
from oracle import random

ROWS, CLASSES = 16, 128


every_memory_case = pytest.mark.parametrize(
  ("name", "options"),
  [
    pytest.param(name, options, id="+".join((name, *options)))
    for name in LOSSES
    for options in [*((option,) for option in everything(name)), everything(name)]
  ],
)


def options_of_shape(options, rows, classes):
  values = {option: jnp.asarray(VALUES[option]) for option in options}
  values = {key: x.astype("float32") if x.dtype.kind == "f" else x for key, x in values.items()}
  if "class_weights" in values:
    values["class_weights"] = jnp.linspace(0.5, 2, classes)
  if "sample_weights" in values:
    values["sample_weights"] = jnp.linspace(-1, 1, rows)
  return values


@pytest.mark.few(4)
@every_memory_case
def test_no_option_saves_an_array_of_the_logits_size(name, options):
  """What jax.vjp returns has the residuals as leaves; with bfloat16 a float32 copy would show."""
  logits = jnp.asarray(random(0, (ROWS, CLASSES)), "bfloat16")
  mask = jnp.asarray(random(1, (ROWS, CLASSES)) < 1.5)
  values = options_of_shape(options, ROWS, CLASSES)
  index = values.pop("ignore_index", None)
  fixed = {"where": mask} if index is None else {"where": mask, "ignore_index": index}
  known = [logits, mask]
  if name == SOFT:
    labels = jnp.abs(logits)
    values["labels"] = labels
    known.append(labels)
  else:
    fixed["labels"] = jnp.arange(ROWS) % 3
  f = jax.jit(lambda logits, values: flat(name, "mean")(logits=logits, **values, **fixed))
  pull = jax.vjp(f, logits, values)[1]
  saved = [x for x in jax.tree.leaves(pull) if isinstance(x, jax.Array) and x.size >= logits.size]
  buffers = {x.unsafe_buffer_pointer() for x in saved}
  assert buffers <= {x.unsafe_buffer_pointer() for x in known}
  assert logits.unsafe_buffer_pointer() in buffers  # the instrument sees what is saved


def temp_bytes(f, *args):
  return jax.jit(jax.grad(f)).lower(*args).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def temp_bytes_of_optax(shape):
  z = jax.ShapeDtypeStruct(shape, jnp.float32)
  return temp_bytes(lambda z, t: jnp.mean(optax.losses.softmax_cross_entropy(z, t)), z, z)


@pytest.mark.few(8)
@every_memory_case
@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_no_option_adds_an_array_to_the_compiled_gradient(name, options, traced):
  logits = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
  labels = logits if name == SOFT else jax.ShapeDtypeStruct((64,), jnp.int32)
  values = options_of_shape(options, *logits.shape)
  constants = {} if traced else {k: x if x.ndim else x.item() for k, x in values.items()}
  f = lambda z, t, values: LOSSES[name](z, t, reduction="mean", **values, **constants)
  limit = logits.size
  if name == SOFT:
    # Plus a few numbers per class and per row.
    limit = temp_bytes_of_optax(logits.shape) + 4 * 8 * sum(logits.shape)
  assert temp_bytes(f, logits, labels, values if traced else {}) <= limit


@pytest.mark.parametrize("shape", [(64, 4096), (4, 16, 4096)])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "vmap"])
def test_no_mode_of_the_integer_loss_takes_an_array(shape, mapped):
  """Value, gradient or both, of smoothed labels, for logits of any rank, also mapped over rows."""
  loss = functools.partial(LOSSES[INTEGER], label_smoothing=0.1, z_loss=0.03)
  if mapped:
    for _ in shape[1:]:
      loss = jax.vmap(loss)
  f = lambda z, t: jnp.mean(loss(z, t))
  logits = jax.ShapeDtypeStruct(shape, jnp.float32)
  labels = jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
  for program in (f, jax.grad(f), jax.value_and_grad(f)):
    compiled = jax.jit(program).lower(logits, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= logits.size


def test_in_shard_map_the_integer_loss_takes_no_array():
  mesh = jax.make_mesh((1,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
  loss = functools.partial(LOSSES[INTEGER], axis_name="v", reduction="mean")
  specs = (jax.P(None, "v"), jax.P())
  f = jax.value_and_grad(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=jax.P()))
  logits = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
  compiled = jax.jit(f).lower(logits, jax.ShapeDtypeStruct((64,), jnp.int32)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= logits.size
