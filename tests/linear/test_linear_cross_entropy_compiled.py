"""What linear_softmax_cross_entropy compiles to, and how it composes.

Time cannot be asserted, but what takes it can: the matrix products, counted from the operations of
the compiled program, and the bytes it holds beside its arguments and results.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_errors import ERRORS
from linear_programs import (
  CHUNK,
  LABELS,
  PRODUCTS,
  WEIGHT,
  H,
  V,
  X,
  compiled,
  dense,
  gradient,
  hessian_product,
  shapes,
  tangent,
)
from oracle import random, relative_error

from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax._linear_cross_entropy import chunks

pytestmark = pytest.mark.without("disable_jit")


@pytest.mark.few(7)
@pytest.mark.parametrize("name", PRODUCTS)
def test_number_of_products(name, monkeypatch):
  # XLA counts the body of a loop once: here one of the two chunks, which is one block.
  monkeypatch.setattr(chunks, "ON_CPU", chunks.ON_CPU._replace(bytes_of_block=None))
  f, expected = PRODUCTS[name]
  h, v = 2048, 512
  flops = compiled(f, *shapes(2 * CHUNK, h, v)).cost_analysis()["flops"]
  assert expected <= flops / (2 * CHUNK * h * v) < expected + 0.1
  # The jaxpr has no other product that XLA would have removed, but for the sum of the gradients
  # where the backward pass forms others.
  if "gradient" in name and "dense" not in name and "z-loss" not in name:
    assert str(jax.make_jaxpr(f)(*shapes(2 * CHUNK, h, v))).count("dot_general[") == expected


@pytest.mark.few(1)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_axis", [-1, 0])
def test_memory_is_a_tile_and_does_not_grow_with_the_tokens(vocab_axis, reduction):
  def temp(num_tokens, **options):
    f = gradient((0, 1), lambda *args: jnp.sum(linear(*args, **options)))
    args = shapes(num_tokens, h, v, vocab_axis)
    return compiled(f, *args).memory_analysis().temp_size_in_bytes

  chunk, h, v = 128, 64, 16384
  options = dict(chunk_size=chunk, vocab_axis=vocab_axis, reduction=reduction)
  tile, weight = 4 * chunk * v, 4 * h * v
  at_once = temp(8 * chunk, **options)
  assert at_once < 1.1 * (2 * tile + weight)
  assert at_once < tile + chunks.ON_CPU.bytes_of_block  # as it is today
  per_row = 64 * 24 * chunk  # a few numbers per row are kept, but no features
  assert temp(32 * chunk, **options) <= at_once + per_row
  assert temp(8 * chunk + 5, **options) <= at_once + per_row + 4 * 5 * v
  options["softcap"] = 30.0
  assert temp(8 * chunk, **options) < 2 * tile + chunks.ON_CPU.bytes_of_block


@pytest.mark.parametrize("axis_name", ["classes", None])
def test_in_shard_map_over_one_device_memory_is_the_same(axis_name):
  mesh = jax.make_mesh((1, 1), ("tokens", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  t, v = (jax.P("tokens"), jax.P(None, "classes")) if axis_name else (jax.P("tokens"), jax.P())
  args = shapes(512, 64, 16384)[:3]

  def temp(**options):
    f = lambda *args: jax.lax.pmean(linear(*args, chunk_size=128, **options), "tokens")
    if not options:
      f = functools.partial(linear, chunk_size=128)
    else:
      f = jax.shard_map(f, mesh=mesh, in_specs=(t, v, t), out_specs=jax.P())
    return compiled(jax.value_and_grad(f, (0, 1)), *args).memory_analysis().temp_size_in_bytes

  assert temp(axis_name=axis_name) < 1.02 * temp()


def test_a_small_chunk_takes_little_beside_the_gradients():
  args = shapes(4096, 512, 32768)
  f = gradient((0, 1), chunk_size=128)
  assert compiled(f, *args).memory_analysis().temp_size_in_bytes < 28 * 2**20


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["tangent", "tangent of losses", "Hessian-vector product"])
def test_memory_of_forward_mode_does_not_grow_with_the_logits(name, monkeypatch):
  monkeypatch.setattr(chunks, "ON_CPU", chunks.ON_CPU._replace(least_bytes=2**21, bytes_of_chunk=0))
  jax.clear_caches()  # the default is read while tracing
  h, v = 8, 4096
  f = {
    "tangent": tangent((0, 1)),
    "tangent of losses": tangent((0, 1), reduction="none"),
    "Hessian-vector product": hessian_product,
  }[name]
  small, large = (
    compiled(f, *shapes(t, h, v)).memory_analysis().temp_size_in_bytes for t in (512, 2048)
  )
  assert small < 10 * 2**21
  assert large - small < 0.1 * 4 * (2048 - 512) * v


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_axis", [-1, 0])
def test_no_copy_of_the_weight(vocab_axis, reduction):
  h, v = 64, 4096
  f = lambda *args: jnp.sum(
    linear(*args, vocab_axis=vocab_axis, chunk_size=16, reduction=reduction)
  )
  program = compiled(gradient((0, 1), f), *shapes(64, h, v, vocab_axis)).as_text()
  pattern = rf"f32\[({h},{v}|{v},{h})\]\S* (copy|transpose)\("
  assert not re.search(pattern, program)
  careless = compiled(lambda x, weight, labels, bias: 2 * weight.T, *shapes(64, h, v)).as_text()
  assert re.search(pattern, careless)


reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def loss(x, weight, labels=LABELS, **options):
  return jnp.sum(jnp.sin(linear(x, weight, labels, chunk_size=4, **options)))


@pytest.mark.few(1)
@reductions
def test_vmap_over_every_argument(reduction):
  bias = random(2, V)
  arguments = {"x": X, "weight": WEIGHT, "labels": LABELS, "bias": bias, "softcap": np.float32(3)}
  f = jax.jit(
    jax.value_and_grad(lambda smooth, labels: loss(**smooth, labels=labels, reduction=reduction))
  )

  def g(arguments):
    arguments = dict(arguments)
    return f({k: v for k, v in arguments.items() if k != "labels"}, arguments["labels"])

  for chosen in [*((key,) for key in arguments if reduction == "mean"), tuple(arguments)]:
    axes = {key: 0 if key in chosen else None for key in arguments}
    twice = {
      k: np.stack([v, v[::-1] if v.ndim else 2 * v]) if k in chosen else v
      for k, v in arguments.items()
    }
    batched = jax.vmap(g, (axes,))(twice)
    for i in range(2):
      single = g({k: v[i] if k in chosen else v for k, v in twice.items()})
      for x, y in zip(jax.tree.leaves(batched), jax.tree.leaves(single), strict=True):
        assert relative_error(x[i], y) < 3e-6, chosen


@pytest.mark.few(1)
@reductions
def test_jacobians_linearize_and_checkpoint_agree(reduction):
  f = lambda x, weight: linear(x, weight, LABELS, chunk_size=4, reduction=reduction)

  @jax.jit
  def program(x, weight):
    _, push = jax.linearize(f, x, weight)
    remat = jax.checkpoint(lambda x, weight: jnp.sin(f(x, weight)))
    return {
      "jacfwd": jax.jacfwd(f)(x, weight),
      "jacrev": jax.jacrev(f)(x, weight),
      "linearize": push(x, weight),
      "jvp": jax.jvp(f, (x, weight), (x, weight))[1],
      "checkpoint": jax.grad(lambda *args: jnp.sum(remat(*args)), (0, 1))(x, weight),
      "grad": jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1))(x, weight),
      "hessian": jax.hessian(lambda x: jnp.sum(f(x, weight)))(x),
      "reverse over reverse": jax.jacrev(jax.grad(lambda x: jnp.sum(f(x, weight))))(x),
      "dense hessian": jax.hessian(
        lambda x: jnp.sum(dense(x, weight, LABELS, reduction=reduction))
      )(x),
    }

  out = program(X, WEIGHT)
  pairs = [("jacfwd", "jacrev"), ("linearize", "jvp"), ("checkpoint", "grad")]
  pairs += [("hessian", "dense hessian"), ("reverse over reverse", "dense hessian")]
  for a, b in pairs:
    for x, y in zip(jax.tree.leaves(out[a]), jax.tree.leaves(out[b]), strict=True):
      assert relative_error(x, y) < 1e-5, (a, b)


@pytest.mark.without("debug_nans")
def test_gradients_accumulated_over_micro_batches_of_donated_arguments():
  """A training step: the gradients of a scan add up to those of the whole batch."""

  def step(weight, x, labels):
    def body(total, batch):
      gradient = jax.grad(lambda w: linear(batch[0], w, batch[1], chunk_size=2))(weight)
      return total + gradient / 2, None

    total, _ = jax.lax.scan(
      body, jnp.zeros_like(weight), (x.reshape(2, 3, H), labels.reshape(2, 3))
    )
    return weight - 0.1 * total

  donating = jax.jit(step, donate_argnums=0)
  weight = jnp.asarray(WEIGHT)
  updated = donating(weight, X, LABELS)
  assert weight.is_deleted()
  expected = WEIGHT - 0.1 * jax.grad(dense, 1)(X, WEIGHT, LABELS)
  assert relative_error(updated, expected) < 1e-6


@pytest.mark.devices(4)
@reductions
def test_data_parallel_in_shard_map(reduction):
  """Tokens over four devices, the weight on each: the gradients are those of one device."""
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  x, labels, bias = random(3, (8, H)), np.arange(8), random(4, V)
  options = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, reduction=reduction)

  def local(x, weight, bias, labels):
    losses = linear(x, weight, labels, bias=bias, ignore_index=-1, chunk_size=1, **options)
    return jax.lax.pmean(jnp.mean(losses), "d")

  specs = (jax.P("d"), jax.P(), jax.P(), jax.P("d"))
  parallel = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P())
  single = lambda x, weight, bias, labels: jnp.mean(linear(x, weight, labels, bias=bias, **options))
  args = tuple(map(jnp.asarray, (x, WEIGHT, bias)))
  for differentiate in (
    lambda f: jax.value_and_grad(f, (0, 1, 2))(*args, labels),
    lambda f: jax.jvp(lambda *args: f(*args, labels), args, args),
  ):
    actual, expected = (jax.jit(lambda f=f: differentiate(f))() for f in (parallel, single))  # noqa: B023
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      assert relative_error(a, b) < 2e-6


def test_coefficients_may_be_traced_and_the_loss_may_be_scaled():
  """One compilation serves all values; a scaled loss has a scaled gradient."""

  @jax.jit
  def f(scale, **coefficients):
    return jax.grad(lambda x: scale * linear(x, WEIGHT, LABELS, **coefficients))(X)

  for values in ({"label_smoothing": 0.1, "z_loss": 0.2, "softcap": 2.0},) * 2:
    base = f(1.0, **values)
    assert relative_error(f(-2.5, **values), -2.5 * base) < 1e-6
    values["softcap"] = 4.0
    static = jax.grad(lambda x, values=values: linear(x, WEIGHT, LABELS, **values))(X)
    assert relative_error(f(1.0, **values), static) < 1e-6
  assert f._cache_size() == 1


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
  call, error, message = ERRORS[name]
  with pytest.raises(error) as caught:
    call()
  assert str(caught.value) == message
