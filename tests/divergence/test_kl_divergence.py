"""The divergence of two softmax distributions: values, derivatives, and their digits."""

import functools

import divergence_truth
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import check, random, relative_error
from row_forms import BY_PLATFORM, in_form

from softmax_jax import softmax_kl_divergence
from softmax_jax.benchmark import oracle as wide
from softmax_jax.derivatives import softmax_jacobian

KL = "softmax_kl_divergence"
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
U = 2.0**-24


def peer(z, w, axis=-1, where=None):
  p = jax.nn.softmax(w, axis, where=where)
  log_q = jax.nn.log_softmax(z, axis, where=where)
  return optax.kl_divergence(log_q, p, axis, True if where is None else where)


@pytest.mark.parametrize(
  ("shape", "axis"),
  [((5,), 0), ((3, 1), -1), ((0, 4), -1), ((4, 3), 0), ((2, 3, 4), 1), ((2, 3, 4), (0, -1))],
)
def test_shapes_and_axes(shape, axis):
  check(KL, softmax_kl_divergence, peer, random(0, shape), random(1, shape), axis=axis)


def test_all_axes():
  check(KL, softmax_kl_divergence, peer, random(0, (2, 3)), random(1, (2, 3)), axis=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
  with jax.enable_x64(dtype == "float64"):
    z, w = (jnp.asarray(random(i, (3, 5), np.float64), dtype) for i in range(2))
    check(KL, softmax_kl_divergence, peer, z, w)


def test_the_widest_dtype_of_both():
  with jax.enable_x64(True):
    z, w = jnp.asarray(random(0, (3, 5)), "bfloat16"), random(1, (3, 5), np.float64)
    y, pull = jax.vjp(softmax_kl_divergence, z, jnp.asarray(w))
    assert [x.dtype for x in (y, *pull(jnp.ones(3)))] == ["float64", "bfloat16", "float64"]
    assert relative_error(y, oracle.linearize(KL, z, w)[0]) < 1e-14


@pytest.mark.parametrize("where", [MASK, MASK[:1], MASK[:, 1]], ids=["all", "classes", "rows"])
def test_masks(where):
  check(KL, softmax_kl_divergence, None, random(0, (3, 5)), random(1, (3, 5)), where=where)


@pytest.mark.parametrize(("of_z", "of_w"), [((5,), (3, 5)), ((3, 5), (5,)), ((2, 1, 5), (3, 5))])
def test_both_broadcast(of_z, of_w):
  z, w = random(0, of_z), random(1, of_w)
  shape = np.broadcast_shapes(of_z, of_w)
  y, pull = jax.vjp(softmax_kl_divergence, z, w)
  expected, _, vjp = oracle.linearize(KL, np.broadcast_to(z, shape), w)
  y_bar = random(2, y.shape)
  assert relative_error(y, expected) < 1e-6
  bars = vjp(y_bar)
  assert relative_error(pull(y_bar)[0], oracle._sum_to_shape(bars[0], of_z)) < 1e-6
  assert relative_error(pull(y_bar)[1], bars[1]) < 1e-6


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(reduction):
  z, w = random(0, (3, 5)), random(1, (3, 5))
  where = np.array([True, False, True])
  loss = lambda z, w: softmax_kl_divergence(z, w, where=where, reduction=reduction)
  each = lambda z, w: softmax_kl_divergence(z, w)[where].sum() / (2 if reduction == "mean" else 1)
  for derivative in (lambda f, **_: f, jax.grad, jax.jacfwd):
    for argnums in (0, 1):
      actual, expected = (derivative(f, argnums=argnums)(z, w) for f in (loss, each))
      assert relative_error(actual, expected) < 1e-6


def test_no_row_counts():
  f = lambda z: softmax_kl_divergence(z, z, where=np.zeros(3, bool), reduction="mean")
  value, gradient = jax.value_and_grad(f)(jnp.full((3, 5), np.nan))
  np.testing.assert_array_equal(value, 0)
  np.testing.assert_array_equal(gradient, 0)


# Infinities.


def test_a_class_at_minus_infinity_in_both_takes_no_part():
  z, w = random(0, (2, 5)), random(1, (2, 5))
  kept = np.array([True, False, True, True, False])
  f = jax.value_and_grad(lambda z, w: softmax_kl_divergence(z, w).sum(), (0, 1))
  value, bars = f(np.where(kept, z, -np.inf), np.where(kept, w, -np.inf))
  expected, expected_bars = f(z[:, kept], w[:, kept])
  assert relative_error(value, expected) < 1e-6
  for bar, e in zip(bars, expected_bars, strict=True):
    assert relative_error(bar[:, kept], e) < 1e-6
    np.testing.assert_array_equal(bar[:, ~kept], 0)


def test_a_class_that_only_the_target_has_costs_infinity():
  z, w = np.float32([1, -np.inf, 0]), np.float32([1, 0, 0])
  value, gradient = jax.value_and_grad(softmax_kl_divergence)(z, w)
  assert value == np.inf
  e = np.exp(np.float64(z)) / np.sum(np.exp(np.float64(z)))
  p = np.exp(np.float64(w)) / np.sum(np.exp(np.float64(w)))
  assert relative_error(gradient, e - p) < 1e-6


def test_a_class_whose_probabilities_underflow_adds_nothing():
  """Though only the target has it: its probability is 0, as that of a label."""
  z, w = np.float32([1, -np.inf, 0]), np.float32([1, -300, 0.5])
  expected, _, vjp = oracle.linearize(KL, z[::2], w[::2])
  value, bars = jax.value_and_grad(softmax_kl_divergence, (0, 1))(z, w)
  assert relative_error(value, expected) < 1e-6
  for bar, e in zip(bars, vjp(1), strict=True):
    assert relative_error(bar[::2], e) < 1e-6
    assert bar[1] == 0


# The temperature.


def test_the_temperature_divides_both():
  z, w, tau = random(0, (3, 5)), random(1, (3, 5)), np.float32(1.7)
  f = lambda *args: softmax_kl_divergence(args[0], args[1], temperature=args[2])
  value, *bars = divergence_truth.kl_divergence(z, w, tau)
  y, pull = jax.vjp(f, z, w, tau)
  assert relative_error(y, value) < 1e-6
  y_bar = random(2, y.shape)
  by_z, by_w, by_tau = pull(y_bar)
  assert relative_error(by_z, y_bar[:, None] * bars[0]) < 1e-6
  assert relative_error(by_w, y_bar[:, None] * bars[1]) < 1e-6
  assert relative_error(by_tau, y_bar @ bars[2]) < 1e-6
  assert relative_error(jax.jacfwd(f, 2)(z, w, tau), bars[2]) < 1e-6


def test_a_temperature_of_1_that_is_traced_has_derivatives():
  z, w, one = random(0, (5,)), random(1, (5,)), jnp.float32(1)
  f = lambda tau: softmax_kl_divergence(z, w, temperature=tau)
  h = np.float32(1e-2)
  assert f(one) == softmax_kl_divergence(z, w)
  sure = np.float32([1249.4, 947.6, 809.1]), np.float32([62.77, -37.7, -4.02])
  actual, expected = (
    jax.value_and_grad(g, (0, 1))(*sure)
    for g in (functools.partial(softmax_kl_divergence, temperature=one), softmax_kl_divergence)
  )
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, e)
  assert relative_error(jax.grad(f)(one), (f(1 + h) - f(1 - h)) / (2 * h)) < 1e-3
  second = (f(1 + h) - 2 * f(one) + f(1 - h)) / h**2
  assert relative_error(jax.hessian(f)(one), second) < 1e-2


@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0, 30.0, 1e4])
def test_digits_at_any_temperature(tau):
  """Nearly equal logits, which a division by the temperature would round apart."""
  z = random(0, (8, 20), scale=tau)
  w = np.float32(z + tau * (3.3 + 1e-4 * random(1, z.shape)))
  f = lambda *args: softmax_kl_divergence(args[0], args[1], temperature=args[2]).sum()
  value, by_z, by_w, by_tau = divergence_truth.kl_divergence(z, w, np.float32(tau))
  actual = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(z, w, np.float32(tau))
  assert relative_error(actual[0], value.sum()) < 16 * U
  for bar, expected in zip(actual[1], (by_z, by_w, by_tau.sum()), strict=True):
    assert relative_error(bar, expected) < 32 * U


# Digits.


@pytest.fixture(scope="module", params=[BY_PLATFORM, "one_read"])
def form(request):
  """The form of the sums along a row: that for this platform, and that for accelerators."""
  with in_form(request.param):
    yield


def pairs(classes):
  """Pairs of rows by what makes them hard; divergences from 1e-14 to 1e4."""
  rng = np.random.default_rng(classes)
  noise = lambda scale=1.0: scale * rng.normal(size=(6, classes))
  z = noise(2)
  label = np.eye(classes)[rng.integers(0, classes, 6)]
  found = {f"{eps:g} apart": (z, z + noise(eps)) for eps in (1e-6, 1e-4, 1e-2, 1, 30)}
  found |= {f"{eps:g} apart, and 3.3": (z, z + 3.3 + noise(eps)) for eps in (1e-4, 1e-2, 1)}
  found |= {f"{eps:g} apart, in all": (noise(eps), noise(eps)) for eps in (1e-6, 1e-3)}
  for lead in (10, 30):
    sure = z + lead * label
    found |= {f"sure by {lead}, {eps:g} apart": (sure, sure + noise(eps)) for eps in (1e-2, 1)}
    found[f"target sure by {lead}"] = z, z + lead * label
    found[f"sure by {lead}"] = z + lead * label, z
  found["sure of different classes"] = z + 30 * label, z + 30 * np.roll(label, 1, -1)
  found["ties"] = np.round(z), np.round(z + noise())
  found["far apart"] = 1e3 * z, 1e3 * noise()
  found["far from zero"] = z + 1e4, z - 1e3
  two = label + np.roll(label, 1, -1)
  found["ratios of e^100 that nearly agree"] = z - 100 * two, z + 30 * two + noise(1e-2)
  return {name: [np.float32(x) for x in pair] for name, pair in found.items()}


@functools.partial(jax.jit, static_argnums=2)
def value_and_gradients(z, w, forward):
  y, pull = jax.vjp(softmax_kl_divergence, z, w)
  bars = pull(jnp.ones_like(y))
  if not forward:
    return y, *bars
  dots = jax.jvp(softmax_kl_divergence, (z, w), (bars[0], bars[1]))[1]
  return y, *bars, dots


@pytest.mark.few(3)
@pytest.mark.parametrize("classes", [2, 10, 17, 300])
def test_digits(classes, form):
  cases = pairs(classes)
  z, w = (np.concatenate([pair[i] for pair in cases.values()]) for i in range(2))
  value, *gradients = divergence_truth.kl_divergence(z, w)
  actual, *bars, dots = map(np.asarray, value_and_gradients(z, w, True))
  assert np.all(actual >= 0)
  counts = value > 1e-14
  assert counts.mean() > 0.8
  error = np.abs(actual - value) / np.where(counts, value, np.inf)
  assert np.max(error) <= 16 * U
  for bar, expected in zip(bars, gradients[:2], strict=True):
    size = np.sqrt(np.sum(expected**2, axis=1))
    error = np.sqrt(np.sum((bar - expected) ** 2, axis=1)) / np.where(size > 1e-28, size, np.inf)
    assert np.max(error) <= 16 * U, list(cases)[np.argmax(error) // 6]
  terms = np.sum(gradients[0] ** 2, axis=1) + np.sum(gradients[1] ** 2, axis=1)
  error = np.abs(dots - terms) / np.where(terms > 1e-28, terms, np.inf)
  assert np.max(error) <= 128 * U


def test_the_oracle_of_the_benchmark_has_digits_to_spare():
  z, w = (np.concatenate([pair[i] for pair in pairs(10).values()]) for i in range(2))
  z, w = np.float64(z), np.float64(w)
  truth = divergence_truth.kl_divergence(z, w)
  found = wide.values(KL, z, w), wide.gradients(KL, z, w), wide.gradients_by_target(z, w)
  for actual, expected in zip(found, truth[:3], strict=True):
    expected = expected.reshape(len(z), -1)
    size = np.sqrt(np.sum(expected**2, axis=1))
    error = np.sqrt(np.sum((actual.values.reshape(expected.shape) - expected) ** 2, axis=1))
    assert np.max(error[size > 1e-28] / size[size > 1e-28]) < 0.01 * U


def test_equal_logits_have_no_divergence():
  z = random(0, (4, 100), scale=10)
  for w in (z, z + np.float32(0)):
    value, *bars, _ = value_and_gradients(z, w, True)
    for x in (value, *bars):
      np.testing.assert_array_equal(x, 0)


def test_the_usual_formula_loses_what_is_kept_here():
  z = random(0, (1, 1000))
  w = np.float32(z + 1e-4 * random(1, z.shape))
  expected, *_ = divergence_truth.kl_divergence(z, w)
  assert relative_error(peer(z, w), expected) > 0.1
  assert relative_error(softmax_kl_divergence(z, w), expected) < 16 * U


def test_never_negative():
  rng = np.random.default_rng(0)
  z = np.float32(rng.normal(size=(2000, 7)) * 10 ** rng.uniform(-6, 4, (2000, 1)))
  w = np.float32(z * (1 + 10 ** rng.uniform(-9, 0, (2000, 1)) * rng.normal(size=z.shape)))
  assert np.all(np.asarray(softmax_kl_divergence(z, w)) >= 0)


@pytest.mark.long
def test_the_hessian_by_the_logits_is_the_fisher_information():
  z, w = random(0, 6), random(1, 6)
  hessian = jax.hessian(softmax_kl_divergence)(z, w)
  assert relative_error(hessian, softmax_jacobian(z)) < 1e-6
  # At equality, by both: it is the same by the target, and the opposite across.
  (zz, zw), (wz, ww) = jax.hessian(softmax_kl_divergence, (0, 1))(z, z)
  for block, sign in ((zz, 1), (zw, -1), (wz, -1), (ww, 1)):
    assert relative_error(sign * block, softmax_jacobian(z)) < 1e-6


def test_second_derivatives_keep_their_digits_in_sure_rows():
  z = np.float32([40, 0, 1, -2])
  w = np.float32([40.5, 0.25, -1, 0])
  hessian = jax.hessian(softmax_kl_divergence)(z, w)
  with jax.enable_x64(True):
    e = np.exp(np.float64(z) - 40)
  e = e / np.sum(e)
  expected = -np.outer(e, e)
  for i in range(4):
    expected[i, i] = e[i] * np.sum(np.delete(e, i))
  assert relative_error(hessian, expected) < 16 * U


@pytest.mark.long
def test_vmap_over_either_and_both():
  z, w, tau = random(0, (3, 5)), random(1, (3, 5)), np.float32([1, 2, 0.5])
  f = lambda z, w, tau: softmax_kl_divergence(z, w, temperature=tau)
  gradients = jax.grad(f, (0, 1, 2))
  for axes in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (0, None, 0)):
    args = [x if a == 0 else x[1] for x, a in zip((z, w, tau), axes, strict=True)]
    actual = jax.vmap(gradients, axes)(*args)
    for i in range(3):
      one = gradients(*(x[i] if a == 0 else x for x, a in zip(args, axes, strict=True)))
      for a, e in zip(actual, one, strict=True):
        assert relative_error(a[i], e) < 1e-6
