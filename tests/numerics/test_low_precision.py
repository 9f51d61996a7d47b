"""Numbers at the ends of a dtype: narrow dtypes, tiny and huge cotangents and class weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_precision_calls import CALLS, NARROW

import softmax_jax as sj

T, H, V = 7, 4, 20
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, V, T)
ONE_HOT = np.eye(V)[LABELS]


def drawn(*shape, dtype=np.float32, scale=0.25):
  return np.asarray(RNG.normal(scale=scale, size=shape), dtype)


def assert_close(actual, expected, units=4, terms=0):
  """In norm, or that of the ``terms`` which cancel, but for what the dtype of ``actual`` lacks.

  Such numbers are 0 or infinite.
  """
  limits = jnp.finfo(actual.dtype)
  eps, tiny, largest = (float(x) for x in (limits.eps, limits.tiny, limits.max))
  tiny = max(tiny, 2.0**-126)  # sums of products are float32
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert not np.any(np.isnan(actual))
  holds = np.abs(expected) < 0.99 * largest
  assert np.all(np.abs(actual[~holds]) > 0.98 * largest)
  actual, expected = actual[holds], expected[holds]
  size = max(np.max(np.abs(expected), initial=0), tiny)
  error = np.linalg.norm(actual / size - expected / size)
  # Terms of a sum that are not normal numbers are flushed to 0.
  bound = units * eps * (np.linalg.norm(expected / size) + terms / size)
  assert error <= bound + 2 * V * tiny / size


@pytest.mark.parametrize("name", CALLS)
def test_narrow_floats_are_refused(name):
  """In every argument, by its name, and with the same sentence in every mode."""
  f, arguments = CALLS[name]
  for argument, dtype in ((a, d) for a in arguments for d in NARROW):
    values = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arguments.items()}
    narrow = values.pop(argument)
    narrow = jax.ShapeDtypeStruct(narrow.shape, getattr(jnp, dtype))

    def call(x, values, argument=argument):
      return jnp.sum(f(**{argument: x}, **values))

    modes = (
      call,
      jax.grad(call),
      lambda x, values, call=call: jax.jvp(lambda x: call(x, values), (x,), (x,)),
    )
    for mode in modes:
      with pytest.raises(TypeError) as raised:
        jax.eval_shape(mode, narrow, values)
      assert str(raised.value) == (
        f"{name} expected {argument} of a dtype of at least 16 bits, got dtype {dtype}. Pass "
        f"{argument}.astype(jnp.bfloat16)."
      )


# --- cotangents of the linear loss ----------------------------------------------------------------


X, WEIGHT, BIAS = drawn(T, H), drawn(H, V), drawn(V)
DOTS = drawn(T, H, scale=4), drawn(H, V, scale=4)
MAGNITUDES = (1e-44, 1e-38, 1e-36, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e36, 1e38)
ALPHA, Z_LOSS = 0.25, 0.125


@functools.partial(jax.jit, static_argnums=5)
def linear_vjp(x, weight, bias, coefficients, bar, chunk_size=3):
  def losses(x, weight, bias):
    alpha, z_loss = coefficients
    return sj.linear_softmax_cross_entropy(
      x,
      weight,
      LABELS,
      bias=bias,
      label_smoothing=alpha,
      z_loss=z_loss,
      reduction="none",
      chunk_size=chunk_size,
    )

  return jax.vjp(losses, x, weight, bias)[1](bar)


class Oracle:
  """The linear loss in float64: the closed forms."""

  def __init__(self, x, weight, bias, alpha=0.0, z_loss=0.0):
    self.x, self.weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y = self.x @ self.weight + np.asarray(bias, np.float64)
    self.lse = np.log(np.sum(np.exp(y), axis=1, keepdims=True))
    self.a = np.exp(y - self.lse)
    self.y_bar = self.a - (1 - alpha) * ONE_HOT - alpha / V + 2 * z_loss * self.lse * self.a

  def gradients(self, bar):
    y_bar = np.asarray(bar, np.float64)[:, None] * self.y_bar
    return y_bar @ self.weight.T, self.x.T @ y_bar, np.sum(y_bar, axis=0)

  def tangent(self, x_dot, weight_dot):
    """Of the losses, without the options."""
    y_dot = x_dot @ self.weight + self.x @ weight_dot
    return np.sum(self.y_bar * y_dot, axis=1)

  def hvp(self, bar, x_dot, weight_dot):
    """That of the losses weighted by ``bar``, without the options."""
    y_dot = x_dot @ self.weight + self.x @ weight_dot
    bar = np.asarray(bar, np.float64)[:, None]
    y_bar = bar * self.y_bar
    y_bar_dot = bar * self.a * (y_dot - np.sum(self.a * y_dot, axis=1, keepdims=True))
    return (
      y_bar_dot @ self.weight.T + y_bar @ weight_dot.T,
      self.x.T @ y_bar_dot + x_dot.T @ y_bar,
    )


def bars_of(magnitude):
  """Cotangents: the same for all tokens, for one chunk among normal ones, and decaying."""
  ones = np.ones(T)
  mixed = np.where(np.arange(T) < 3, magnitude, 1)
  return [np.float32(b) for b in (magnitude * ones, mixed, magnitude * 0.9 ** np.arange(T))]


@by_dtype
def test_gradients_of_the_linear_loss_at_any_cotangent(dtype):
  x, weight = jnp.asarray(X, dtype), jnp.asarray(WEIGHT, dtype)
  for options in ((0.0, 0.0), (ALPHA, Z_LOSS)):
    oracle = Oracle(x, weight, BIAS, *options)
    for magnitude in MAGNITUDES:
      for bar in bars_of(magnitude):
        actual = linear_vjp(x, weight, BIAS, options, bar)
        for got, expected in zip(actual, oracle.gradients(bar), strict=True):
          assert_close(got, expected)


@pytest.mark.without("debug_nans")
@by_dtype
def test_a_cotangent_that_is_not_finite_stays_in_its_row(dtype):
  x, weight = jnp.asarray(X, dtype), jnp.asarray(WEIGHT, dtype)
  expected = Oracle(x, weight, BIAS).gradients(np.ones(T))[0]
  for bad in (np.nan, np.inf, -np.inf):
    bar = np.where(np.arange(T) == 1, bad, 1).astype(np.float32)
    x_bar, weight_bar, _ = linear_vjp(x, weight, BIAS, (0.0, 0.0), bar)
    assert not np.any(np.isfinite(x_bar[1])) and not np.any(np.isfinite(weight_bar))
    assert_close(np.delete(x_bar, 1, axis=0), np.delete(expected, 1, axis=0))


@jax.jit
def linear_second(x, weight, bar, bar_dot, dots):
  """The gradients differentiated by the cotangent and by the inputs; the latter in both modes."""

  def gradients(x, weight, bar):
    return linear_vjp(x, weight, np.zeros(V, np.float32), (0.0, 0.0), bar)[:2]

  def along_dots(x, weight, bar):
    pairs = zip(gradients(x, weight, bar), dots, strict=True)
    return sum(jnp.vdot(g.astype(jnp.float32), d.astype(jnp.float32)) for g, d in pairs)

  by_bar = jax.jvp(lambda bar: gradients(x, weight, bar), (bar,), (bar_dot,))[1]
  forward = jax.jvp(lambda x, weight: gradients(x, weight, bar), (x, weight), dots)[1]
  *reverse, back = jax.grad(along_dots, argnums=(0, 1, 2))(x, weight, bar)
  return by_bar, forward, tuple(reverse), back


@pytest.mark.few(1)
@by_dtype
def test_second_derivatives_of_the_linear_loss_at_any_cotangent(dtype):
  """Nothing bounds their tangents: that of the cotangent is 1 where it is 0, or next to it."""
  x, weight = jnp.asarray(X, dtype), jnp.asarray(WEIGHT, dtype)
  dots = tuple(jnp.asarray(d, dtype) for d in DOTS)
  oracle = Oracle(x, weight, np.zeros(V))
  wide = [np.asarray(d, np.float64) for d in dots]
  bar_dot = np.linspace(-1, 1, T, dtype=np.float32)
  small = 0, 1e-44, 1e-30, 1e-3, 1.0
  for magnitude in small if dtype == jnp.float16 else (*small, 1e12, 1e34):
    for bar in bars_of(magnitude):
      by_bar, forward, reverse, back = linear_second(x, weight, bar, bar_dot, dots)
      for got, expected in zip(by_bar, oracle.gradients(bar_dot), strict=False):
        assert_close(got, expected)
      for got in (forward, reverse):
        for got_one, expected in zip(got, oracle.hvp(bar, *wide), strict=True):
          assert_close(got_one, expected, units=8)
      # A float32 result of products in bfloat16, whose eps is 2**16 times as large.
      units = 4 * 2**16 if dtype == jnp.bfloat16 else 64
      assert_close(back, oracle.tangent(*wide), units=units)


# --- class weights --------------------------------------------------------------------------------


# Their sum and its inverse have to be normal numbers of float32.
WEIGHTS = {
  f"{kind} {size:g}": np.where(which, size, 1).astype(np.float32)
  for size in (1e-35, 1e-30, 1e-12, 1e12, 1e30, 1e34)
  for kind, which in {
    "all": np.full(V, True),
    "one": np.arange(V) == LABELS[0],
    "all but one": np.arange(V) != LABELS[0],
  }.items()
}


def weighted_mean(y, weights, counts, alpha):
  """The mean of the losses and its derivatives by logits and weights, in float64."""
  y, weights = np.asarray(y, np.float64), np.asarray(weights, np.float64)
  cost = np.log(np.sum(np.exp(y), axis=1, keepdims=True)) - y
  label, counts = (1 - alpha) * ONE_HOT + alpha / V, np.asarray(counts, np.float64)[:, None]
  total = np.sum(counts * ONE_HOT @ weights[:, None])
  shares = counts * label * weights / total
  mean = np.sum(shares * cost)
  y_bar = np.exp(-cost) * np.sum(shares, axis=1, keepdims=True) - shares
  return mean, y_bar, np.sum(counts * (label * cost - ONE_HOT * mean), axis=0) / total


@functools.partial(jax.jit, static_argnames="linear")
def mean_and_gradients(x, weight, weights, labels, alpha, linear):
  options = {"label_smoothing": alpha, "reduction": "mean", "ignore_index": -1}

  def loss(x, weight, weights):
    if linear:
      return sj.linear_softmax_cross_entropy(
        x, weight, labels, class_weights=weights, chunk_size=3, **options
      )
    logits = x if weight is None else x @ weight
    return sj.softmax_cross_entropy_with_integer_labels(
      logits, labels, class_weights=weights, **options
    )

  return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, weight, weights)


@pytest.mark.few(2)
@by_dtype
@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
def test_a_mean_by_class_weights_of_any_size(linear, dtype):
  x, weight = jnp.asarray(X, dtype), jnp.asarray(WEIGHT, dtype)
  wide_x, wide_weight = (np.asarray(a, np.float64) for a in (x, weight))
  if not linear:  # by the logits
    x, weight = jnp.asarray(wide_x @ wide_weight, dtype), None
    wide_x, wide_weight = np.asarray(x, np.float64), np.eye(V)
  for weights in WEIGHTS.values():
    for alpha in (0.0, ALPHA):
      for counts in (np.full(T, True), np.arange(T) == 0):  # one row alone too
        labels = np.where(counts, LABELS, -1)
        value, grads = mean_and_gradients(x, weight, weights, labels, alpha, linear)
        mean, y_bar, weights_bar = weighted_mean(wide_x @ wide_weight, weights, counts, alpha)
        assert_close(value, mean, units=8)
        inputs_bar = y_bar @ wide_weight.T, wide_x.T @ y_bar
        terms = abs(y_bar) @ abs(wide_weight.T), abs(wide_x.T) @ abs(y_bar)
        for got, expected, of in zip(grads[:2], inputs_bar, terms, strict=True):
          if got is not None:
            assert_close(got, expected, units=8, terms=np.linalg.norm(of))
        # The loss of a class minus the mean.
        terms = mean / np.sum(weights[LABELS[counts]], dtype=np.float64)
        assert_close(grads[2], weights_bar, units=8, terms=terms)


@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
def test_class_weights_that_are_no_normal_numbers_are_taken_for_0(linear):
  weights = np.full(V, 1e-41, np.float32)
  out = mean_and_gradients(jnp.asarray(X), jnp.asarray(WEIGHT), weights, LABELS, 0.0, linear)
  for x in jax.tree.leaves(out):
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
def test_a_gradient_is_differentiable_by_class_weights_of_any_size(linear):
  """With s_t = w_t / sum w, s_t' = (w_t' - s_t sum w') / sum w."""
  x, weight = jnp.asarray(X), jnp.asarray(WEIGHT)
  oracle = Oracle(X, WEIGHT, np.zeros(V))

  @jax.jit
  def mixed(weights, weights_dot):
    gradient = lambda w: mean_and_gradients(x, weight, w, LABELS, 0.0, linear)[1][:2]
    return jax.jvp(gradient, (weights,), (weights_dot,))[1]

  weights, weights_dot = np.linspace(1, 2, V), np.linspace(2, -1, V)
  total, total_dot = np.sum(weights[LABELS]), np.sum(weights_dot[LABELS])
  shares = weights[LABELS] / total
  shares_dot = (weights_dot[LABELS] - shares * total_dot) / total
  for size in (1e-36, 1e-30, 1e-12, 1e12, 1e30, 1e34):
    actual = mixed(np.float32(size * weights), np.float32(size * weights_dot))
    for got, expected in zip(actual, oracle.gradients(shares_dot)[:2], strict=True):
      assert_close(got, expected, units=16)


# --- the dense losses -----------------------------------------------------------------------------


@by_dtype
def test_gradients_of_the_dense_losses_at_any_cotangent(dtype):
  logits = jnp.asarray(drawn(T, V, scale=1), dtype)
  labels = jnp.asarray(np.abs(drawn(T, V)), dtype)
  cost = np.asarray(logits, np.float64)
  cost = np.log(np.sum(np.exp(cost), axis=1, keepdims=True)) - cost

  @jax.jit
  def gradients(bar, reduced_bar):
    integer = lambda z: sj.softmax_cross_entropy_with_integer_labels(z, LABELS)
    soft = lambda z, **options: sj.softmax_cross_entropy(z, labels, **options)
    return (
      jax.vjp(integer, logits)[1](bar)[0],
      jax.vjp(soft, logits)[1](bar)[0],
      jax.vjp(lambda z: soft(z, reduction="sum"), logits)[1](reduced_bar)[0],
      jax.vjp(lambda z: soft(z, reduction="mean"), logits)[1](reduced_bar)[0],
    )

  def expected(bar, label):
    label = np.asarray(label, np.float64)
    y_bar = np.exp(-cost) * np.sum(label, axis=1, keepdims=True) - label
    return np.asarray(bar, np.float64)[:, None] * y_bar

  for magnitude in MAGNITUDES:
    same = np.full(T, np.float32(magnitude))
    for bar in bars_of(magnitude):
      of_integer, of_soft, of_sum, of_mean = gradients(bar, same[0])
      assert_close(of_integer, expected(bar, ONE_HOT))
      assert_close(of_soft, expected(bar, labels))
      assert_close(of_sum, expected(same, labels))
      assert_close(of_mean, expected(same / np.float64(T), labels))


# --- the softcap ----------------------------------------------------------------------------------


def test_the_largest_softcap_is_none():
  """y / c would be no normal number, and all logits 0."""

  @jax.jit
  def value_and_grad(softcap):
    loss = lambda x, weight, c: sj.linear_softmax_cross_entropy(x, weight, LABELS, softcap=c)
    return jax.value_and_grad(loss, argnums=(0, 1, 2))(X, WEIGHT, softcap)

  plain = lambda x, weight: sj.linear_softmax_cross_entropy(x, weight, LABELS)
  expected, gradients = jax.value_and_grad(plain, argnums=(0, 1))(X, WEIGHT)
  for softcap in (1e20, 1e30, 1e36, np.finfo(np.float32).max):
    value, actual = value_and_grad(np.float32(softcap))
    assert_close(value, expected)
    for got, gradient in zip(actual[:2], gradients, strict=True):
      assert_close(got, gradient)
    assert actual[2] == 0
