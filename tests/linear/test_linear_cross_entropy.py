"""linear_softmax_cross_entropy against the dense loss over x @ weight, and against float64.

`formulas` is the loss written out over whole logits; in float64 it gives every derivative by JAX's
own differentiation. `dense` is the dense loss of this library, to which float32 must agree.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from linear_formulas import (
  CASES,
  CHUNK,
  IGNORED,
  LABELS,
  REDUCTIONS,
  SMOOTH,
  H,
  T,
  V,
  arguments,
  assert_equal,
  compare_in_float64,
  dense,
  formulas,
  like,
)
from oracle import default_promotion, random, relative_error

from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax._linear_cross_entropy import chunks, projection


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(chunks, "ON_CPU", chunks.ON_CPU._replace(bytes_of_block=1024))


@pytest.mark.few(4)
@pytest.mark.parametrize(("options", "reduction"), CASES)
def test_value_gradients_and_tangent_in_float64(options, reduction):
  compare_in_float64(options, reduction, second=False)


@pytest.mark.few(1)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_in_float64(reduction):
  compare_in_float64(tuple(SMOOTH), reduction, second=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_combination_equals_the_dense_loss_in_float32(reduction):
  """One program with every option serves all combinations, as each has a value without effect."""
  labels, smooth = arguments(SMOOTH)
  y_bar = jnp.asarray(random(30, T if reduction == "none" else ()), jnp.float32)
  neutral = {
    "bias": np.zeros(V),
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "class_weights": np.ones(V),
    "sample_weights": np.ones(T),
    "logit_scale": 1.0,
    "softcap": 1e4,
  }

  def program(f, **fixed):
    @jax.jit
    def run(smooth, ignored):
      g = lambda smooth: f(
        **smooth, labels=labels, ignore_index=ignored, reduction=reduction, **fixed
      )
      y, pull = jax.vjp(g, smooth)
      return y, pull(y_bar)[0]

    return run

  ours, theirs = program(linear, chunk_size=CHUNK), program(dense)
  for chosen in itertools.product([False, True], repeat=len(SMOOTH) + 1):
    values = dict(smooth)
    for option, is_chosen in zip(SMOOTH, chosen, strict=False):
      if not is_chosen:
        values[option] = jnp.asarray(neutral[option], jnp.float32)
    ignored = IGNORED if chosen[-1] else -100
    actual, expected = ours(values, ignored), theirs(values, ignored)
    assert_equal(actual, expected, 2e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_argument_alone(reduction):
  """An argument that is not differentiated has no tangent or cotangent, rather than zeros."""
  with jax.enable_x64(True):
    labels, smooth = arguments(tuple(SMOOTH), np.float64)
    smooth_dot = like(20, smooth)

    def derivatives_by_each(f, **fixed):
      @jax.jit
      def program(smooth, smooth_dot):
        found = {}
        for key in smooth:
          of_one = lambda value, key=key: f(
            **{**smooth, key: value}, labels=labels, reduction=reduction, **fixed
          )
          found[key] = (
            jax.jvp(of_one, (smooth[key],), (smooth_dot[key],))[1],
            jax.grad(lambda value, of_one=of_one: jnp.sum(of_one(value)))(smooth[key]),
          )
        return found

      return program(smooth, smooth_dot)

    actual = derivatives_by_each(linear, chunk_size=CHUNK)
    assert_equal(actual, derivatives_by_each(formulas), 1e-11)


def test_the_derivative_by_a_distant_softcap_keeps_its_digits():
  labels, smooth = arguments(["softcap"])
  for softcap in (1e4, 50.0, 0.5):
    smooth["softcap"] = jnp.float32(softcap)
    actual = jax.jit(jax.grad(lambda smooth: linear(**smooth, labels=labels)))(smooth)
    with jax.enable_x64(True):
      exact = {key: jnp.asarray(value, np.float64) for key, value in smooth.items()}
      expected = jax.jit(jax.grad(lambda smooth: formulas(**smooth, labels=labels)))(exact)
      assert relative_error(actual["softcap"], expected["softcap"]) < 5e-6


def test_the_softcap_and_its_slopes_keep_their_digits_in_float64():
  v = np.array([1e-9, 1e-3, 0.1, 0.3, 0.45, 0.4999, 0.5001, 0.7, 2.0, 15.0, 300.0])
  y, softcap = np.concatenate([v, -v]) * 3, np.float64(3)
  with mpmath.workdps(60):
    exact = [(mpmath.tanh(a), mpmath.sech(a) ** 2, a) for a in (mpmath.mpf(x) / 3 for x in y)]
    z = [float(3 * tanh) for tanh, _, _ in exact]
    by_y = [float(slope) for _, slope, _ in exact]
    by_softcap = [float(tanh - a * slope) for tanh, slope, a in exact]
  with jax.enable_x64(True):
    np.testing.assert_allclose(projection.capped(y, softcap), z, rtol=1e-15)
    np.testing.assert_allclose(projection.cap_slope(y, softcap), by_y, rtol=1e-13)
    actual = projection.cap_slope_by_softcap(y, softcap)
  np.testing.assert_allclose(actual, by_softcap, rtol=4e-15)


@pytest.mark.few(2)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 6, 100])
def test_chunks_and_leading_axes(chunk_size):
  labels, smooth = arguments(["bias"], shape=(2, 3))
  f = lambda f, labels, **fixed: jax.jit(
    jax.value_and_grad(lambda smooth: jnp.sum(jnp.sin(f(**smooth, labels=labels, **fixed))))
  )
  for reduction in ("sum", "none"):
    actual = f(linear, labels, reduction=reduction, chunk_size=chunk_size)(smooth)
    expected = f(dense, labels, reduction=reduction)(smooth)
    assert_equal(actual, expected, 2e-6)
  losses = linear(**smooth, labels=labels, reduction="none", chunk_size=chunk_size)
  assert losses.shape == (2, 3)


def test_the_chunk_is_chosen_from_the_bytes_of_a_tile():
  size = lambda *shape: chunks.ON_CPU.chunk_size(*shape, 4)
  assert size(4096, 512, 32768) == 1024  # 128 MiB
  assert size(3000, 512, 32768) == 1000  # three equal chunks rather than two and a remainder
  assert size(3003, 512, 32768) == 1001  # of any size
  assert size(2053, 512, 32768) == 1024  # a prime: the remainder is a chunk of its own
  assert size(10, 512, 32768) == 10
  assert size(10**6, 8192, 10**6) == 2000  # more than the tile has room for: a quarter of H
  assert size(0, 0, 1) == 1


@pytest.mark.parametrize("num_classes", [1, 2049, 50257, 128256])
def test_nearly_uniform_logits_of_any_number_of_classes(num_classes):
  """If padding joined the sum, the loss would not be log V."""
  x, weight = random(0, (3, 2)), random(1, (2, num_classes), scale=1e-3)
  labels = np.array([0, num_classes - 1, num_classes // 2])
  run = lambda f, **fixed: jax.jit(
    jax.value_and_grad(lambda x, weight: f(x, weight, labels, **fixed), argnums=(0, 1))
  )(x, weight)
  actual, expected = run(linear, chunk_size=2), run(dense)
  assert_equal(actual, expected, 4e-6)
  np.testing.assert_allclose(actual[0], np.log(num_classes), rtol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_and_no_classes(reduction):
  for tokens, num_classes in [((0,), 4), ((3,), 0), ((0,), 0), ((2, 0), 4), ((2, 3), 0)]:
    x, weight = jnp.ones((*tokens, 2)), jnp.ones((2, num_classes))
    labels = jnp.zeros(tokens, jnp.int32)
    losses = linear(x, weight, labels, reduction=reduction)
    assert losses.shape == (tokens if reduction == "none" else ())
    f = lambda x, weight, labels=labels: jnp.sum(linear(x, weight, labels, reduction=reduction))
    value, gradients = jax.value_and_grad(f, argnums=(0, 1))(x, weight)
    assert value == 0
    assert all(not np.any(gradient) for gradient in gradients)
  x = jnp.zeros((2, 0))  # no features
  np.testing.assert_allclose(linear(x, jnp.zeros((0, 4)), jnp.array([1, 2])), np.log(4), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_chunk_without_a_token_that_counts_adds_nothing(dtype):
  _, smooth = arguments((), dtype)
  labels = np.where(np.arange(T) < CHUNK, LABELS, IGNORED)

  def gradients(tokens):
    f = lambda x, weight: linear(
      x, weight, labels[:tokens], ignore_index=IGNORED, reduction="none", chunk_size=CHUNK
    )
    y_bar = np.ones(tokens, np.float32)
    return jax.vjp(jax.jit(f), smooth["x"][:tokens], smooth["weight"])[1](y_bar)

  x_bar, weight_bar = gradients(T)
  expected_x_bar, expected_weight_bar = gradients(CHUNK)
  np.testing.assert_array_equal(x_bar[:CHUNK], expected_x_bar)
  np.testing.assert_array_equal(x_bar[CHUNK:], 0)
  np.testing.assert_array_equal(weight_bar, expected_weight_bar)


def test_the_gradients_by_many_classes_keep_the_digits_of_float16():
  """The cotangents of nearly uniform logits would be subnormal, if the rule did not scale them."""
  x, weight = random(0, (4, 8)), random(1, (8, 2**17), scale=0.1)
  labels = np.array([0, 3, 70_000, 2**17 - 1])
  half = [jnp.asarray(a, jnp.float16) for a in (x, weight)]
  # The factor is the user's own: without it the gradient would be subnormal.
  f = lambda f: jax.jit(jax.grad(lambda x, weight: 2**14 * f(x, weight, labels), argnums=(0, 1)))
  expected = f(dense)(*(a.astype(np.float32) for a in half))
  at_labels = np.zeros(2**17, bool)
  at_labels[labels] = True
  for gradient, exact in zip(f(linear)(*half), expected, strict=True):
    others = ~at_labels if gradient.shape[1] == 2**17 else slice(None)
    assert relative_error(gradient[:, others], exact[:, others]) < 6e-4


@pytest.mark.few(3)
@pytest.mark.parametrize("num_classes", [200, V])
@pytest.mark.parametrize("options", [(), ("bias", "z_loss"), ("label_smoothing",), tuple(SMOOTH)])
def test_columns_of_padding_take_no_part(options, num_classes):
  labels, smooth = arguments(options)
  labels = labels % num_classes
  cut = lambda a: a if np.shape(a)[-1:] != (V,) else jnp.asarray(a)[..., :num_classes]

  def padded(linear_smooth):
    return linear(**linear_smooth, labels=labels, num_classes=num_classes)

  def dense_of_the_classes(linear_smooth):
    return dense(**jax.tree.map(cut, linear_smooth), labels=labels)

  actual = jax.jit(jax.value_and_grad(padded))(smooth)
  expected = jax.jit(jax.value_and_grad(dense_of_the_classes))(smooth)
  assert_equal(actual, expected, 2e-6)


def test_confident_rows_keep_their_digits():
  """With the identity as x the logits are the weight, exactly, and so are their gradients."""
  z = np.float32([[30, 0, -5, 1], [0, 40, 0.5, 0], [-3, -4, 60, 2]])
  labels = np.array([0, 1, 2])
  f = lambda f, **fixed: jax.jit(
    jax.value_and_grad(lambda weight: f(np.eye(3, dtype=np.float32), weight, labels, **fixed))
  )(z)
  actual, expected = f(linear, chunk_size=2), f(dense)
  with jax.enable_x64(True):
    exact = jax.value_and_grad(lambda z: dense(np.eye(3), z, labels))(z.astype(np.float64))
  assert relative_error(actual[0], exact[0]) < 1e-6
  for row, dense_row, exact_row in zip(actual[1], expected[1], exact[1], strict=True):
    assert relative_error(row, exact_row) < 1e-6
    assert relative_error(row, dense_row) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_lose_no_more_than_the_dense_loss_in_float32(dtype, reduction):
  """The one extra rounding, of dlogits, adds less than a quarter to that of the result."""
  num_tokens, num_features, num_classes = 96, 16, 4096
  x = jnp.asarray(random(0, (num_tokens, num_features), scale=3), dtype)
  weight = jnp.asarray(random(1, (num_features, num_classes), scale=0.25), dtype)
  labels = np.random.default_rng(2).integers(0, num_classes, num_tokens)

  def run(f, *args, **fixed):
    f = lambda x, weight, f=f: jnp.mean(f(x, weight, labels, reduction=reduction, **fixed))
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*args)

  wide = lambda x, weight, *args, **fixed: dense(
    x.astype(np.float32), weight.astype(np.float32), *args, **fixed
  )
  ours, theirs = run(linear, x, weight, chunk_size=40), run(wide, x, weight)
  with jax.enable_x64(True):
    exact = run(dense, x.astype(np.float64), weight.astype(np.float64))
  assert [a.dtype for a in jax.tree.leaves(ours)] == ["float32", dtype, dtype]
  assert relative_error(ours[0], exact[0]) < 2e-7
  for actual, dense_gradient, exact_gradient in zip(ours[1], theirs[1], exact[1], strict=True):
    error = relative_error(actual, exact_gradient)
    assert error < 1.25 * relative_error(dense_gradient, exact_gradient)


@default_promotion()
def test_mixed_dtypes_are_promoted_and_gradients_come_back_as_their_arguments_were():
  labels, smooth = arguments(["bias"])
  smooth["x"] = smooth["x"].astype(jnp.bfloat16)
  smooth["bias"] = smooth["bias"].astype(jnp.float16)
  f = lambda f, **fixed: jax.jit(
    jax.value_and_grad(lambda smooth: f(**smooth, labels=labels, **fixed))
  )
  actual, expected = f(linear, chunk_size=CHUNK)(smooth), f(dense)(smooth)
  for key, gradient in actual[1].items():
    assert gradient.dtype == smooth[key].dtype
  assert_equal(actual, expected, 1e-3)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_bad_label_poisons_its_row_and_what_all_rows_share(reduction):
  labels, smooth = arguments(["bias"])
  labels = np.where(LABELS == 128, V, labels)
  bad = labels == V

  def f(smooth, discard):
    loss = linear(**smooth, labels=labels, reduction=reduction, chunk_size=CHUNK)
    return jnp.sum(jnp.where(discard, 0, loss)), loss

  gradient = jax.jit(jax.grad(f, has_aux=True))
  gradients, loss = gradient(smooth, False)
  np.testing.assert_array_equal(np.isnan(loss), bad if reduction == "none" else True)
  np.testing.assert_array_equal(np.isnan(gradients["x"]), np.repeat(bad[:, None], H, axis=1))
  assert np.all(np.isnan(gradients["weight"])) and np.all(np.isnan(gradients["bias"]))
  good = {**smooth, "x": smooth["x"][~bad]}
  expected = jax.grad(lambda x: dense(**(good | {"x": x}), labels=labels[~bad], reduction="sum"))
  assert relative_error(gradients["x"][~bad], expected(good["x"])) < 2e-6
  # A select that discards the loss discards the gradient.
  gradients, _ = gradient(smooth, bad if reduction == "none" else True)
  assert all(np.all(np.isfinite(g)) for g in gradients.values())
  assert np.all(gradients["x"][bad] == 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_hold_anything(reduction):
  labels, smooth = arguments(["bias"])
  y_bar = random(30, T if reduction == "none" else ())

  def run(x):
    f = lambda smooth: linear(
      **smooth, labels=labels, ignore_index=IGNORED, reduction=reduction, chunk_size=CHUNK
    )
    values = smooth | {"x": jnp.asarray(x)}
    dots = like(20, smooth) | {"x": jnp.asarray(x)}

    @jax.jit
    def program(values, dots):
      y, pull = jax.vjp(f, values)
      return y, pull(jnp.asarray(y_bar))[0], jax.jvp(f, (values,), (dots,))[1]

    return program(values, dots)

  ignored = LABELS[:, None] == IGNORED
  finite = np.where(ignored, 0, smooth["x"])
  expected = run(finite)
  assert not np.any(expected[1]["x"][ignored[:, 0]])
  for anything in (np.nan, np.inf):
    assert_equal(run(np.where(ignored, anything, finite)), expected, 1e-7)


def test_nothing_to_average():
  labels, smooth = arguments(["bias", "class_weights"])
  f = lambda smooth, **fixed: linear(**smooth, labels=labels * 0, chunk_size=CHUNK, **fixed)
  for value, gradients in (
    jax.value_and_grad(functools.partial(f, ignore_index=0))(smooth),
    jax.value_and_grad(f)(smooth | {"class_weights": jnp.zeros(V)}),
  ):
    assert value == 0
    assert all(np.all(gradients[key] == 0) for key in ("x", "weight", "bias"))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_classes_with_a_bias_of_minus_infinity(softcap):
  """Padding of the vocabulary: no probability and no gradient, unless a softcap lifts it."""
  labels, smooth = arguments(["bias", "logit_scale"])
  labels = labels % 200
  smooth["bias"] = smooth["bias"].at[200:].set(-np.inf)
  gradient = lambda f, **fixed: jax.value_and_grad(
    lambda smooth: f(**smooth, labels=labels, softcap=softcap, **fixed)
  )
  actual = gradient(linear, chunk_size=CHUNK)(smooth)
  if softcap is None:
    expected = gradient(dense)(
      smooth | {"weight": smooth["weight"][:, :200], "bias": smooth["bias"][:200]}
    )
    for key, pad in {"weight": ((0, 0), (0, 100)), "bias": ((0, 100),)}.items():
      expected[1][key] = jnp.pad(expected[1][key], pad)
    assert_equal(actual, expected, 2e-6)
  else:
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    by_softcap = jax.grad(lambda c: linear(**smooth, labels=labels, softcap=c, chunk_size=CHUNK))
    step = 1e-2
    f = lambda c: dense(**smooth, labels=labels, softcap=c)
    np.testing.assert_allclose(by_softcap(3.0), (f(3 + step) - f(3 - step)) / (2 * step), rtol=1e-3)


@pytest.mark.few(1)
@pytest.mark.without("disable_jit")
@pytest.mark.parametrize("of_neighbors", [True, False])
def test_the_chunks_of_an_accelerator(of_neighbors, monkeypatch):
  """All classes at once; of neighbors or, as on several TPUs, of every n-th token; and a rest."""
  tiling = chunks.ON_ACCELERATOR._replace(of_neighbors=of_neighbors)
  monkeypatch.setattr(chunks, "ON_CPU", tiling)
  jax.clear_caches()  # it is read while tracing
  labels, smooth = arguments(SMOOTH)
  tokens = np.arange(7) % T  # three chunks of two tokens, and one
  smooth["x"] = smooth["x"].reshape(-1, H)[tokens]
  smooth["sample_weights"] = smooth["sample_weights"][tokens]
  labels = labels.reshape(-1)[tokens]
  f = lambda f, reduction, **fixed: jax.jit(
    jax.value_and_grad(
      lambda smooth: jnp.sum(jnp.sin(f(**smooth, labels=labels, reduction=reduction, **fixed)))
    )
  )
  for reduction in ("sum", "none"):
    assert_equal(f(linear, reduction, chunk_size=2)(smooth), f(dense, reduction)(smooth), 2e-6)
  jax.clear_caches()
