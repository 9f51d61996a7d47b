"""What holds of softmax and its losses for any logits, as hypothesis draws them.

A case is a row of kinds of numbers (ordinary, tied, huge, tiny, far apart, infinite, NaN) of one
shape and dtype; programs are compiled once per shape and dtype. `pytest -m long` draws thousands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from hypothesis import given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import softmax_jax
from softmax_jax import derivatives
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy

SHAPES = [(3, 2), (2, 5), (1, 17)]
SCALES = (1e-30, 1e-3, 1.0, 10.0, 1e4)
U = 2.0**-24  # one rounding error in float32
TINY = 2.0**-126  # what is smaller underflows


@st.composite
def logits(draw):
  """Rows of float32, with ties and far outliers."""
  shape = draw(st.sampled_from(SHAPES))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  z = rng.standard_normal(shape) * draw(st.sampled_from(SCALES))
  if draw(st.booleans()):
    z[:, 0] = z.max(axis=1)  # a tie with the largest
  if draw(st.booleans()):
    z[:, -1] = z.max(axis=1) + draw(st.sampled_from([1.0, 20.0, 80.0]))  # one class leads
  return z.astype(np.float32)


EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=1000, deadline=None, database=None)
PROPERTIES = {}


def property_of(*strategies, many=None):
  """A test of fifty cases, the same in every run; `test_many_cases` draws others, of ``many``."""

  def as_test(f):
    PROPERTIES[f.__name__.removeprefix("test_")] = f, many or strategies
    return EXAMPLES(given(*strategies)(f))

  return as_test


@functools.cache
def compiled(f):
  return jax.jit(f)


def labels_of(z):
  return np.arange(len(z)) % z.shape[1]


def loss(z, labels):
  return cross_entropy(z, labels)


def gradient(z, labels):
  return jax.grad(lambda z: cross_entropy(z, labels).sum())(z)


def lse(z):
  return softmax_jax.logsumexp(z, axis=-1)


jacobians = jax.vmap(jax.jacrev(softmax_jax.softmax))
by_row = jax.vmap(jax.value_and_grad(cross_entropy))


def softmax_where(z, where):
  return softmax_jax.softmax(z, where=where)


def in_both_modes(f):
  tangent = lambda z, v: jax.jvp(f, (z,), (v,))[1]
  cotangent = lambda z, u: jax.vjp(f, z)[1](u)[0]
  return jax.jit(tangent), jax.jit(cotangent)


DUAL = [
  in_both_modes(f)
  for f in (
    softmax_jax.softmax,
    softmax_jax.log_softmax,
    lse,
    lambda z: cross_entropy(z, jnp.zeros(len(z), int), label_smoothing=0.1, z_loss=0.1),
    lambda z: softmax_jax.softmax_cross_entropy(
      z, jax.nn.one_hot(jnp.zeros(len(z), int), z.shape[1], dtype=z.dtype)
    ),
    lambda z: softmax_jax.linear_softmax_cross_entropy(
      z, z, jnp.zeros(len(z), int), vocab_axis=0, chunk_size=2
    ),
  )
]


def error(computed, expected):
  """In norm, relative to the expected rows, but for what underflows."""
  computed, expected = np.asarray(computed, float), np.asarray(expected, float)
  size = np.linalg.norm(expected)
  difference = max(0.0, np.linalg.norm(computed - expected) - expected.size * TINY)
  return difference / size if size else difference


# Shifts that cost no rounding: whole numbers, where the logits are multiples of 2**-10 below 2**10.
@property_of(logits(), st.integers(-1000, 1000))
def test_a_shift_changes_nothing(z, shift):
  z = np.clip(np.round(z * 1024) / 1024, -1000, 1000).astype(np.float32)
  moved, labels = z + np.float32(shift), labels_of(z)
  assert error(compiled(softmax_jax.softmax)(moved), compiled(softmax_jax.softmax)(z)) <= 4 * U
  assert error(compiled(loss)(moved, labels), compiled(loss)(z, labels)) <= 8 * U
  assert error(compiled(gradient)(moved, labels), compiled(gradient)(z, labels)) <= 8 * U


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_permuted_classes_give_permuted_results(z, seed):
  order = np.random.default_rng(seed).permutation(z.shape[1])
  labels, place = labels_of(z), np.argsort(order)
  softmax = compiled(softmax_jax.softmax)
  # Sums in another order: up to one rounding error per class.
  bound = (8 + z.shape[1]) * U
  assert error(softmax(z[:, order]), np.asarray(softmax(z))[:, order]) <= bound
  permuted = compiled(gradient)(z[:, order], place[labels])
  assert error(permuted, np.asarray(compiled(gradient)(z, labels))[:, order]) <= bound


@property_of(logits())
def test_probabilities_sum_to_one_and_gradients_to_zero(z):
  a = np.asarray(compiled(softmax_jax.softmax)(z), np.float64)
  assert np.all(a >= 0)
  np.testing.assert_allclose(a.sum(axis=1), 1, rtol=z.shape[1] * 4 * U, atol=0)
  g = np.asarray(compiled(gradient)(z, labels_of(z)), np.float64)
  assert np.all(np.abs(g.sum(axis=1)) <= 8 * U * np.abs(g).sum(axis=1))


@property_of(logits())
def test_losses_are_not_negative_and_at_least_the_gap_to_the_largest(z):
  labels = labels_of(z)
  value = np.asarray(compiled(loss)(z, labels), np.float64)
  gap = z.max(axis=1).astype(float) - z[np.arange(len(z)), labels]
  assert np.all(value >= 0)
  assert np.all(value >= gap * (1 - 2 * U))
  assert np.all(value <= (gap + np.log(z.shape[1])) * (1 + 4 * U))


@property_of(logits(), st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
def test_logsumexp_is_convex(z, seed, part):
  other = (z + np.random.default_rng(seed).standard_normal(z.shape)).astype(np.float32)
  part = np.float32(part)
  between = compiled(lse)(part * z + (1 - part) * other)
  above = part * compiled(lse)(z) + (1 - part) * compiled(lse)(other)
  # The point between is itself rounded, by u of its largest logit, and so are the sides.
  slack = 8 * U * (1 + np.abs(z).max() + np.abs(other).max())
  assert np.all(np.asarray(between) <= np.asarray(above) + slack)


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_the_jacobian_is_symmetric_and_positive_semidefinite(z, seed):
  J = np.asarray(compiled(jacobians)(z), np.float64)
  assert error(J, J.swapaxes(1, 2)) <= 16 * U
  assert error(J, compiled(derivatives.softmax_jacobian)(z)) <= 64 * U
  v = np.random.default_rng(seed).standard_normal(z.shape).astype(np.float32)
  size = np.linalg.norm(J, axis=(1, 2)) * np.square(v).sum(axis=1)
  assert np.all(np.einsum("bi,bij,bj->b", v, J, v) >= -64 * U * size)
  product = np.asarray(compiled(derivatives.cross_entropy_hvp)(z, v), np.float64)
  assert np.all((v * product).sum(axis=1) >= -64 * U * size)


@property_of(logits(), st.integers(0, 2**32 - 1))
def test_forward_and_reverse_mode_are_transposed(z, seed):
  """<u, J v> = <J^T u, v>, relative to what the products could be."""
  rng = np.random.default_rng(seed)
  v = rng.standard_normal(z.shape).astype(np.float32)
  for tangent, cotangent in DUAL:
    y_dot = np.asarray(tangent(z, v), np.float64)
    u = rng.standard_normal(y_dot.shape).astype(np.float32)
    z_bar = np.asarray(cotangent(z, u), np.float64)
    size = np.linalg.norm(u) * np.linalg.norm(y_dot) + np.linalg.norm(z_bar) * np.linalg.norm(v)
    difference = abs((u * y_dot).sum() - (z_bar * v).sum())
    assert difference <= 64 * U * size + 16 * z.size * TINY


@property_of(logits())
def test_a_batch_is_its_rows(z):
  labels = labels_of(z)
  rows = compiled(by_row)(z, labels)
  assert error(rows[0], compiled(loss)(z, labels)) <= 4 * U
  assert error(rows[1], compiled(gradient)(z, labels)) <= 4 * U


# --- any values, masks and dtypes -----------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 20.0, -90.0, -INF, "max", "-max", "subnormal", "normal", INF, NAN)
EXTREME = [((2, 5), "float32"), ((1, 17), "float32"), ((2, 5), "bfloat16"), ((2, 5), "float16")]
MORE_EXTREME = [
  (shape, dtype)
  for shape in ((2, 5), (1, 17), (3, 1))
  for dtype in ("float32", "bfloat16", "float16", "float64")
]


def special(name, dtype):
  limits = jnp.finfo(dtype)
  return {
    "max": float(limits.max),
    "-max": float(limits.min),
    "subnormal": float(limits.smallest_subnormal),
    "normal": float(limits.tiny),
  }.get(name, name)


@st.composite
def extreme(draw, kinds):
  """Logits of any values, a mask, one class and one share for each class; and the dtype's name."""
  shape, dtype = draw(st.sampled_from(kinds))
  # The values that spoil a row stand last, so that most rows are without.
  values = SPECIAL[: draw(st.sampled_from([6, 7, 11, 13]))]
  entry = st.one_of(st.sampled_from(values), st.integers(-1000, 1000).map(lambda n: n / 50))
  size = shape[0] * shape[1]
  z = draw(st.lists(entry, min_size=size, max_size=size))
  z = np.array([special(x, dtype) for x in z]).reshape(shape)
  if draw(st.booleans()):
    z[0] = special(draw(st.sampled_from(values)), dtype)  # the same everywhere
  mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
  mask = np.array(mask).reshape(shape) | draw(st.booleans())
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  labels = rng.integers(0, shape[1], shape[0])
  shares = rng.integers(0, 3, shape) / 4
  return np.asarray(jnp.asarray(z, dtype)) if dtype != "float64" else z, mask, labels, shares, dtype


def functions_and_gradients(z, mask, labels, shares):
  """Each function of the masked logits, and the gradient of those with one number per row."""
  per_row = {
    "logsumexp": lambda z: softmax_jax.logsumexp(z, axis=-1, where=mask),
    "integer": lambda z: cross_entropy(z, labels, where=mask),
    "soft": lambda z: softmax_jax.softmax_cross_entropy(z, shares, where=mask),
  }
  softmax, log_softmax = softmax_jax.softmax, softmax_jax.log_softmax
  values = {"softmax": softmax(z, where=mask), "log_softmax": log_softmax(z, where=mask)}
  values |= {name: f(z) for name, f in per_row.items()}
  gradients = {name: jax.grad(lambda z, f=f: f(z).sum())(z) for name, f in per_row.items()}
  return values, gradients


def of_one_row(z, label, shares, wide):
  """The same of the entries of one row that are left by its mask, in more digits.

  ``label`` is None where it is masked, and a result where that is left open.
  """
  size = len(z)
  z, t = z.astype(np.longdouble), shares.astype(np.longdouble)
  one_hot = np.arange(size) == (-1 if label is None else label)
  if size == 0:
    empty = np.zeros(0)
    values = {"softmax": empty, "log_softmax": empty, "logsumexp": -INF, "integer": 0, "soft": 0}
    return values, {"logsumexp": empty, "integer": empty, "soft": empty}
  top = z.max()
  if not np.isfinite(top):
    bad = np.full(size, NAN)
    integer = INF if top == INF and label is not None and z[label] != INF else NAN
    values = {"softmax": bad, "log_softmax": bad, "logsumexp": top, "integer": integer, "soft": NAN}
    if label is None:
      values["integer"] = None
    if not t.any():
      values["soft"] = None
    zero = np.zeros(size) if top == -INF else None
    return values, {"logsumexp": zero, "integer": None, "soft": None}
  k = np.argmax(z)
  others = np.exp(z - top)
  others[k] = 0
  rest = others.sum()
  e = others + (np.arange(size) == k)
  a, log_sum = e / (1 + rest), np.log1p(rest)
  minus_log_a = (top - z) + log_sum
  # Where one class has nearly all, a_k - 1 as minus the sum of the others.
  complement = np.where(np.arange(size) == k, rest, 1 + rest - e) / (1 + rest)
  values = {
    "softmax": a,
    "log_softmax": -minus_log_a,
    "logsumexp": top + log_sum,
    "integer": INF if label is None else minus_log_a[label],
    # Each term overflows where its difference of logits does.
    "soft": sum(p * as_dtype(c, wide) for p, c in zip(t, minus_log_a, strict=True) if p),
  }
  gradients = {
    "logsumexp": a,
    "integer": None if label is None else np.where(one_hot, -complement, a),
    "soft": a * (t.sum() - t) - complement * t,
  }
  return values, gradients


def as_dtype(x, dtype):
  """``x`` rounded to a dtype, as an array of wider numbers."""
  with np.errstate(over="ignore", under="ignore"):
    return np.asarray(x).astype(jnp.finfo(dtype).dtype).astype(np.longdouble)


def assert_entries(actual, expected, dtype, bound, terms=0):
  """To so many units of rounding, and to what underflows; the same infinities and NaN.

  A unit is one of the result or of the ``terms`` that it is a sum of.
  """
  limits = jnp.finfo(dtype)
  actual, expected = as_dtype(actual, dtype), as_dtype(expected, dtype)
  finite = np.isfinite(expected)
  # What rounds to infinity may be the largest number, and the other way round.
  near_largest = np.abs(np.where(finite, expected, limits.max)) >= 0.99 * float(limits.max)
  special = ~finite & ~(near_largest & np.isinf(expected) & (np.abs(actual) >= limits.max))
  np.testing.assert_array_equal(actual[special], expected[special])
  x, y = actual[finite & ~near_largest], expected[finite & ~near_largest]
  units = np.maximum(np.abs(y), terms) * (float(limits.eps) / 2) + 4 * float(limits.tiny)
  assert np.all(np.abs(x - y) <= bound * units), (x, y)


# Rows of up to 16 entries of float32 have errors of up to 66 units, as `softmax` says.
BOUNDS = {"softmax": 140, "log_softmax": 16, "logsumexp": 16, "integer": 16, "soft": 24}


@property_of(extreme(EXTREME), many=(extreme(MORE_EXTREME),))
def test_masked_functions_are_those_of_what_is_left(case):
  """Of any values, next to masked entries of any values: against formulas for one row alone."""
  *arrays, dtype = case
  z, mask, labels, shares = arrays
  with jax.enable_x64(dtype == "float64"):
    arrays = [z, mask, labels, shares.astype(z.dtype)]
    values, gradients = jax.tree.map(np.asarray, compiled(functions_and_gradients)(*arrays))
  wide = "float64" if dtype == "float64" else "float32"
  for i, (row, left) in enumerate(zip(z, mask, strict=True)):
    label = int(left[: labels[i]].sum()) if left[labels[i]] else None
    expected = of_one_row(row[left].astype(float), label, shares[i][left], wide)
    for name, value in expected[0].items():
      actual = values[name][i]
      if actual.ndim:
        np.testing.assert_array_equal(actual[~left], -INF if name == "log_softmax" else 0)
        actual = actual[left]
      kind = wide if name in ("integer", "soft") else dtype
      if value is not None:
        # The largest logit and the logarithm of the sum may cancel.
        top = np.abs(row[left].astype(float).max(initial=-INF))
        terms = top if name == "logsumexp" and np.isfinite(top) else 0
        assert_entries(actual, value, kind, BOUNDS[name], terms)
    for name, gradient in expected[1].items():
      np.testing.assert_array_equal(gradients[name][i][~left], 0)
      if gradient is not None:
        # Shares of several classes may be those predicted, and their difference is what cancels.
        several = name == "soft" and np.count_nonzero(shares[i][left]) > 1
        terms = np.linalg.norm(shares[i][left]) if several else 0
        assert_gradient(gradients[name][i][left], gradient, terms, dtype)


def assert_gradient(actual, expected, terms, dtype):
  """In norm, relative to that of the gradient or of the terms that it is a difference of."""
  assert np.all(np.isfinite(actual.astype(float)))
  limits = jnp.finfo(dtype)
  size = max(np.linalg.norm(expected.astype(float)), terms)
  floor = 4 * len(expected) * float(limits.smallest_normal)
  difference = np.linalg.norm((actual.astype(np.longdouble) - expected).astype(float))
  assert difference <= 64 * float(limits.eps) * size + floor, (actual, expected)


@property_of(logits())
def test_masking_is_slicing(z):
  """Whatever the masked class holds."""
  for rubbish in (np.nan, np.inf, 1e30):
    wide = np.insert(z, 1, rubbish, axis=1).astype(np.float32)
    where = np.ones(wide.shape, bool)
    where[:, 1] = False
    masked = np.asarray(compiled(softmax_where)(wide, where))
    assert np.all(masked[:, 1] == 0)
    sliced = compiled(softmax_jax.softmax)(z)
    # The sum may take its terms in another order.
    assert error(np.delete(masked, 1, axis=1), sliced) <= (4 + z.shape[1]) * U


@property_of(extreme(EXTREME), many=(extreme(MORE_EXTREME),))
def test_a_batch_of_any_values_is_its_rows(case):
  *arrays, dtype = case
  with jax.enable_x64(dtype == "float64"):
    arrays[3] = arrays[3].astype(arrays[0].dtype)
    whole = jax.tree.map(np.asarray, compiled(functions_and_gradients)(*arrays))
    rows = jax.tree.map(np.asarray, compiled(rows_of_functions_and_gradients)(*arrays))
    for name in whole[0]:
      kind = rows[0][name].dtype
      assert_entries(rows[0][name], whole[0][name], kind, BOUNDS[name], terms=1)
    for name, gradient in whole[1].items():
      gradient, row = gradient.astype(np.longdouble), rows[1][name].astype(np.longdouble)
      np.testing.assert_array_equal(np.isnan(row), np.isnan(gradient))
      limits = jnp.finfo(dtype)
      atol = 8 * float(limits.eps) * arrays[3].max(initial=1) + 16 * float(limits.tiny)
      np.testing.assert_allclose(row, gradient, rtol=0, atol=atol)


rows_of_functions_and_gradients = jax.vmap(functions_and_gradients)


# --- options, the linear loss, axes ---------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
SHARE = st.floats(0, 1, width=32)


@st.composite
def options(draw):
  """Smoothing, z-loss and class weights, some of which are 0."""
  rng = np.random.default_rng(draw(SEEDS))
  zero = draw(st.booleans())
  weights = lambda classes: (rng.uniform(size=classes) * rng.integers(zero, 2, classes)).astype(
    np.float32
  )
  return np.float32(draw(SHARE)), np.float32(draw(SHARE)), weights


def with_options(z, labels, shares, alpha, z_loss, weights):
  options = {"label_smoothing": alpha, "z_loss": z_loss, "class_weights": weights}
  mean = {"reduction": "mean", **options}
  return (
    cross_entropy(z, labels, ignore_index=1, **options),
    cross_entropy(z, labels, ignore_index=1, **mean),
    softmax_jax.softmax_cross_entropy(z, shares, **options),
    softmax_jax.softmax_cross_entropy(z, shares, **mean),
  )


def by_hand(z, labels, shares, alpha, z_loss, weights):
  """The same of three public functions that have no options."""
  cost = -softmax_jax.log_softmax(z)
  uniform = alpha * jnp.mean(weights[None] * cost, axis=-1)
  extra = z_loss * softmax_jax.logsumexp(z, axis=-1) ** 2
  counts = labels != 1
  hard = (1 - alpha) * weights[labels] * cross_entropy(z, labels) + uniform + extra
  hard = jnp.where(counts, hard, 0)
  total = jnp.sum(jnp.where(counts, weights[labels], 0))
  soft = (1 - alpha) * jnp.sum(weights[None] * shares * cost, axis=-1) + uniform + extra
  mean = jnp.where(total == 0, 0, hard.sum() / jnp.where(total == 0, 1, total))
  return hard, mean, soft, soft.mean()


def summed_with_gradients(f):
  """Its outputs, and the gradients of their weighted sum by the floating arguments."""

  def total(*args):
    out = f(*args)
    return sum(jnp.sum(jnp.cos(i + jnp.arange(y.size)) * y.ravel()) for i, y in enumerate(out)), out

  return jax.value_and_grad(total, argnums=(0, 2, 3, 4, 5), has_aux=True)


OPTIONS = [summed_with_gradients(f) for f in (with_options, by_hand)]


@property_of(logits(), options(), SEEDS)
def test_options_are_what_they_are_composed_of(z, chosen, seed):
  alpha, z_loss, weights = chosen
  rng = np.random.default_rng(seed)
  z = np.clip(z, -50, 50)
  labels, shares = rng.integers(0, z.shape[1], len(z)), rng.uniform(size=z.shape)
  args = z, labels, shares.astype(np.float32), alpha, z_loss, weights(z.shape[1])
  ours, composed = (compiled(f)(*args) for f in OPTIONS)
  # The terms, of a loss or of its gradient, are of this size.
  size = 1 + np.abs(z).max() + 2 * z_loss * (4 + np.abs(z).max()) ** 2
  divisor = max(1e-30, min(1.0, float(args[5][labels[labels != 1]].sum() or 1)))
  for x, y in zip(jax.tree.leaves(ours[0][1]), jax.tree.leaves(composed[0][1]), strict=True):
    np.testing.assert_allclose(x, y, rtol=32 * U, atol=16 * U * size / divisor)
  for x, y in zip(ours[1], composed[1], strict=True):
    bound = 64 * U * size * len(z) * (1 + z.shape[1]) / divisor**2
    np.testing.assert_allclose(x, y, rtol=64 * U, atol=bound)


OFTEN_ZERO = st.one_of(st.sampled_from([0.0, 0.0, 1.0]), SHARE)


@property_of(
  st.sampled_from(["integer", "soft"]),
  SEEDS,
  OFTEN_ZERO,
  OFTEN_ZERO,
  st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_second_derivatives_are_those_of_a_plain_formula(function, seed, alpha, z_loss, zeros):
  """By all arguments at once, in every nesting of two modes, whatever of them is 0 or masked."""
  rng = np.random.default_rng(seed)
  weights = np.where(zeros, 0, rng.uniform(size=5))
  program = function, 5, np.float32, False
  args, rows = plain.case(*program, alpha=alpha, z_loss=z_loss, weights=weights)
  args["logits"][:] = rng.standard_normal((3, 5))
  masked = rng.uniform(size=(3, 5)) < 0.2
  masked[np.arange(3), rows.labels] = False
  masked[rng.uniform(size=3) < 0.3] = True
  args["logits"][masked] = rng.choice([0, 1, np.nan, np.inf, -np.inf])
  rows.where[masked], rows.share[masked] = False, 0
  rows.classes[:] = np.maximum(np.sum(~masked, axis=1), 1)
  plain.assert_right(program, [(args, rows)], floor=1 / 4)


def linear(x, weight, labels, bias, alpha, z_loss, class_weights):
  """With one column of padding, rows that do not count, and chunks of two rows."""
  options = {"label_smoothing": alpha, "z_loss": z_loss}
  common = {"bias": bias, "ignore_index": -1, "num_classes": weight.shape[1] - 1, **options}
  f = functools.partial(softmax_jax.linear_softmax_cross_entropy, x, weight, labels, **common)
  return (
    f(chunk_size=2, class_weights=class_weights),
    f(chunk_size=2, reduction="none", class_weights=class_weights),
    f(chunk_size=1, softcap=3.0, reduction="sum"),
  )


def dense(x, weight, labels, bias, alpha, z_loss, class_weights):
  options = {"label_smoothing": alpha, "z_loss": z_loss, "ignore_index": -1}
  y = (x @ weight + bias[None])[:, :-1]
  weights = class_weights[:-1]
  capped = 3.0 * jnp.tanh(y / 3.0)
  return (
    cross_entropy(y, labels, class_weights=weights, reduction="mean", **options),
    cross_entropy(y, labels, class_weights=weights, **options),
    cross_entropy(capped, labels, reduction="sum", **options),
  )


def with_gradients(f):
  def total(*args):
    out = f(*args)
    return sum(jnp.sum(jnp.cos(i + jnp.arange(y.size)) * y.ravel()) for i, y in enumerate(out)), out

  return jax.value_and_grad(total, argnums=(0, 1, 3, 4, 5, 6), has_aux=True)


LINEAR = [with_gradients(f) for f in (linear, dense)]


@property_of(SEEDS, options(), st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_the_linear_loss_is_the_dense_loss_of_the_product(seed, chosen, scale):
  rng = np.random.default_rng(seed)
  alpha, z_loss, weights = chosen
  x, weight, bias = (
    (scale * rng.standard_normal(shape)).astype(np.float32) for shape in ((5, 3), (3, 6), (6,))
  )
  labels = rng.integers(-1, 5, 5)
  # Away from 0, by which a mean would multiply the rounding errors.
  args = x, weight, labels, bias, alpha, z_loss, weights(6) + np.float32(0.125)
  ours, composed = (compiled(f)(*args) for f in LINEAR)
  largest = 1 + 3 * np.abs(x).max() * np.abs(weight).max() + np.abs(bias).max()
  size = largest * (1 + z_loss * largest)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(composed), strict=True):
    bound = 64 * U * size * (1 + np.abs(x).max()) * (1 + np.abs(weight).max())
    np.testing.assert_allclose(a, b, rtol=64 * U, atol=8 * bound)
  # A row that does not count may hold anything.
  x = np.where(labels[:, None] == -1, np.nan, x).astype(np.float32)
  spoiled = compiled(LINEAR[0])(x, *args[1:])
  for a, b in zip(jax.tree.leaves(spoiled), jax.tree.leaves(ours), strict=True):
    np.testing.assert_array_equal(a, b)


AXES = [-1, 0, (0, 2), None]
MORE_AXES = [*AXES, 1, -2, -3, (1,), (0, 1), (2, 1), (-1, 0), (0, 1, 2), ()]


def along(axis):
  def f(x, mask):
    functions = softmax_jax.softmax, softmax_jax.log_softmax
    g = lambda x: jnp.sum(jnp.cos(softmax_jax.logsumexp(x, axis, where=mask)))
    lse = softmax_jax.logsumexp(x, axis, keepdims=True, where=mask)
    return [f(x, axis, where=mask) for f in functions], lse, jax.grad(g)(x)

  return jax.jit(f)


ALONG = {axis: along(axis) for axis in MORE_AXES}
LAST = along(-1)


@property_of(st.sampled_from(AXES), SEEDS, many=(st.sampled_from(MORE_AXES), SEEDS))
def test_any_axes_are_the_last_one_of_a_transposed_array(axis, seed):
  rng = np.random.default_rng(seed)
  x = (rng.standard_normal((2, 3, 4)) * 10).astype(np.float32)
  mask = rng.uniform(size=x.shape) < 0.7
  axes = range(3) if axis is None else axis if isinstance(axis, tuple) else (axis,)
  axes = sorted(a % 3 for a in axes)
  order = [a for a in range(3) if a not in axes] + axes
  rows = lambda a: a.transpose(order).reshape(-1, int(np.prod([x.shape[a] for a in axes])))
  ours = ALONG[axis](x, mask)
  expected = LAST(rows(x), rows(mask))
  same = functools.partial(np.testing.assert_allclose, rtol=32 * U, atol=64 * U)
  for a, b in zip(jax.tree.leaves([ours[0], ours[2]]), [*expected[0], expected[2]], strict=True):
    same(rows(np.asarray(a)), b)
  same(np.asarray(ours[1]).ravel(), np.asarray(expected[1]).ravel())


# --- many cases -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROPERTIES)
def test_many_cases(name, seed):
  f, strategies = PROPERTIES[name]
  seeded(seed)(MANY(given(*strategies)(f)))()
