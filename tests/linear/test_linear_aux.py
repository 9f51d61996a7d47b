"""The aux of the linear loss: that of the dense loss, as differentiable as there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_formulas import CHUNK, IGNORED, REDUCTIONS, SMOOTH, T, arguments, dense, like
from oracle import random, relative_error

from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax._linear_cross_entropy import chunks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(chunks, "ON_CPU", chunks.ON_CPU._replace(bytes_of_block=1024))


def outputs(f, labels, reduction, **fixed):
  """The loss and the differentiable aux, as a function of what is differentiated."""

  def g(smooth):
    loss, aux = f(
      **smooth,
      labels=labels,
      reduction=reduction,
      ignore_index=IGNORED,
      return_aux=True,
      **fixed,
    )
    return loss, *aux[:4]

  return g


@pytest.mark.few(2)
@pytest.mark.parametrize("options", [(), tuple(SMOOTH)], ids=["no option", "all options"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_derivatives_in_float64(options, reduction):
  """Every output has its own random cotangent; the tangents of all arguments are random too."""
  with jax.enable_x64(True):
    labels, smooth = arguments(options, np.float64)
    smooth_dot = like(20, smooth)

    @jax.jit
    def derivatives():
      found = []
      for f, fixed in ((linear, {"chunk_size": CHUNK}), (dense, {})):
        g = outputs(f, labels, reduction, **fixed)
        y, y_dot = jax.jvp(g, (smooth,), (smooth_dot,))
        bars = [jnp.asarray(random(30 + i, x.shape, np.float64)) for i, x in enumerate(y)]
        _, pull = jax.vjp(g, smooth)
        alone = [
          pull(tuple(bar if i == j else 0 * bar for j, bar in enumerate(bars)))[0]
          for i in range(len(bars))
        ]

        def mixed(smooth, g=g, bars=bars):
          return sum(jnp.sum(bar * jnp.sin(x)) for bar, x in zip(bars, g(smooth), strict=True))

        second = jax.jvp(jax.grad(mixed), (smooth,), (smooth_dot,))[1]
        found.append((y, y_dot, alone, jax.grad(mixed)(smooth), second))
      return found

    actual, expected = derivatives()
    paths = jax.tree_util.tree_leaves_with_path(actual)
    for (path, x), y in zip(paths, jax.tree.leaves(expected), strict=True):
      assert relative_error(x, y) < 1e-11, jax.tree_util.keystr(path)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_number_of_right_predictions(reduction):
  labels, smooth = arguments(("bias", "sample_weights"))
  z = smooth["x"] @ smooth["weight"] + smooth["bias"]
  labels = np.array(np.argmax(z, axis=-1))
  labels[0] = IGNORED
  labels[1] += 1
  counted = np.arange(T) > 1
  f = lambda **options: (
    linear(
      **{**smooth, **options},
      labels=labels,
      ignore_index=IGNORED,
      reduction=reduction,
      chunk_size=CHUNK,
      return_aux=True,
    )[1].correct
  )
  assert f() == np.sum(counted & (smooth["sample_weights"] != 0)) and f().dtype == np.int32
  assert f(sample_weights=None) == np.sum(counted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_tokens_or_classes(reduction, tokens):
  x, weight = jnp.ones((tokens, 2)), jnp.ones((2, 4 if tokens == 0 else 0))
  labels = jnp.zeros(tokens, jnp.int32)
  loss, aux = linear(x, weight, labels, reduction=reduction, return_aux=True)
  assert aux.nll.shape == aux.lse.shape == (tokens,)
  assert aux.z_loss.shape == loss.shape == ((tokens,) if reduction == "none" else ())
  assert all(np.all(x == 0) and x.dtype == loss.dtype for x in aux[:4])
  assert aux.correct.dtype == np.int32 and aux.correct == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_logit_scale_in_sixteen_bits(dtype):
  """Features of unit length and a large scale: cotangents beyond float16 before they are scaled."""
  labels, smooth = arguments((), np.float32)
  x, weight = (
    jnp.asarray(smooth[key] / np.linalg.norm(smooth[key], axis=axis, keepdims=True), dtype)
    for key, axis in (("x", -1), ("weight", 0))
  )

  def run(f, *args, **fixed):
    g = lambda x, weight, k: f(x, weight, labels, logit_scale=k, **fixed)
    return jax.jit(jax.value_and_grad(g, (0, 1, 2)))(*args, jnp.float32(1e5))

  actual = run(linear, x, weight, chunk_size=CHUNK)
  expected = run(dense, x.astype(np.float32), weight.astype(np.float32))
  assert relative_error(actual[0], expected[0]) < 1e-6
  for mine, theirs in zip(actual[1], expected[1], strict=True):
    theirs = theirs.astype(mine.dtype)
    assert relative_error(mine, theirs) < (1e-2 if dtype == "bfloat16" else 1e-3)
