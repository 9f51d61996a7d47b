"""The options of the two losses, alone and together, against their formulas written out.

`formulas` is both oracles: with NumPy it gives values, and with jax.numpy, in float64, it gives
every derivative by JAX's own differentiation.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import random, relative_error

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from softmax_jax import softmax_cross_entropy_with_integer_labels as integer_loss

SOFT, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
LOSSES = {SOFT: softmax_cross_entropy, INTEGER: softmax_cross_entropy_with_integer_labels}
REDUCTIONS = ("none", "sum", "mean")
OUTPUTS = ("loss", "nll", "lse", "z_loss", "weight")
every_loss = pytest.mark.parametrize("name", LOSSES)


@oracle.default_promotion()
def formulas(
  xp,
  logits,
  labels,
  where=None,
  label_smoothing=0.0,
  z_loss=0.0,
  class_weights=None,
  ignore_index=None,
  reduction="none",
):
  """The loss and its aux for logits [B, K], with labels [B] or [B, K]; all of it finite."""
  soft = labels.ndim == 2
  z, w = logits, xp.ones(logits.shape[1]) if class_weights is None else class_weights
  mask = xp.ones(z.shape, bool) if where is None else where
  counts = xp.any(mask, axis=1)
  if ignore_index is not None:
    counts = counts & (labels != ignore_index)
  z = xp.where(counts[:, None], xp.where(mask, z, -1e300), 0.0)
  shift = xp.max(z, axis=1, keepdims=True)
  lse = shift + xp.log(xp.sum(xp.exp(z - shift), axis=1, keepdims=True))
  weighted_costs = xp.where(mask, w * (lse - z), 0)
  t = labels if soft else labels[:, None] == np.arange(z.shape[1])
  nll = xp.where(counts, xp.sum(t * weighted_costs, axis=1), 0)
  uniform = xp.sum(weighted_costs, axis=1) / xp.maximum(xp.sum(mask, axis=1), 1)
  lse = xp.where(counts, lse[:, 0], 0)
  row_weights = xp.where(counts, 1.0 if soft else xp.sum(t * w, axis=1), 0)
  weight = xp.sum(row_weights)

  smoothed = (1 - label_smoothing) * nll + label_smoothing * xp.where(counts, uniform, 0)
  penalty = z_loss * lse**2
  divisor = xp.where(weight == 0, 1, weight) if reduction == "mean" else 1
  loss, penalty = (
    x if reduction == "none" else xp.sum(x) / divisor for x in (smoothed + penalty, penalty)
  )
  return loss, nll, lse, penalty, weight


# Four rows of five classes. Of the rows, 3 is ignored and, with the mask, 1 has no class.
INTEGERS = np.array([0, 4, 2, 1])
MASK = np.array([[1, 0, 1, 1, 0], [0] * 5, [0, 1, 1, 0, 1], [1] * 5], bool)
VALUES = {
  "label_smoothing": np.float64(0.1),
  "z_loss": np.float64(0.03),
  "class_weights": np.array([0.5, 2.0, 1.25, 0.75, 1.5]),
  "ignore_index": np.int32(1),
}
LABELS = {SOFT: np.abs(random(1, (4, 5), np.float64)), INTEGER: INTEGERS}


def arguments(name, options, masked=False, dtype=np.float64):
  """What is differentiated and what is not, as keyword arguments of the loss and of `formulas`."""
  smooth = {"logits": random(0, (4, 5), np.float64, scale=2)}
  fixed = {"where": MASK} if masked else {}
  (smooth if name == SOFT else fixed)["labels"] = LABELS[name]
  for option in options:
    (fixed if option == "ignore_index" else smooth)[option] = VALUES[option]
  return {key: jnp.asarray(value, dtype) for key, value in smooth.items()}, fixed


def flat(name, reduction="none"):
  """The loss called `name` with its aux as one tuple, like `formulas`."""

  def f(**arguments):
    loss, aux = LOSSES[name](**arguments, reduction=reduction, return_aux=True)
    return loss, *aux

  return f


def everything(name):
  """The options that the loss called `name` has."""
  return tuple(option for option in VALUES if name == INTEGER or option != "ignore_index")


def case(name, options, masked):
  return pytest.param(name, options, masked, id="+".join((name, *options, *["where"] * masked)))


# No option, each alone, the pairs that meet in a formula, and all; each with and without a mask.
PAIRS = [("label_smoothing", "class_weights"), ("class_weights", "ignore_index")]
every_case = pytest.mark.parametrize(
  ("name", "options", "masked"),
  [
    case(name, options, masked)
    for name in LOSSES
    for options in [(), *((option,) for option in VALUES), *PAIRS, everything(name)]
    if set(options) <= set(everything(name))
    for masked in (False, True)
  ],
)


@every_case
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_values(name, options, masked, dtype):
  with jax.enable_x64(dtype == "float64"):
    smooth, fixed = arguments(name, options, masked, dtype)
    exact = {key: np.asarray(value, np.float64) for key, value in smooth.items()}
    for reduction in REDUCTIONS:
      actual = flat(name, reduction)(**smooth, **fixed)
      expected = formulas(np, **exact, **fixed, reduction=reduction)
      for output, x, y in zip(OUTPUTS, actual, expected, strict=True):
        assert x.dtype == dtype
        allowed = 1e-12 if dtype == "float64" else oracle.tolerance(dtype)
        assert relative_error(x, y) <= allowed, (output, reduction)


def random_like(seed, tree):
  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten(
    [jnp.asarray(random(seed + i, x.shape, x.dtype)) for i, x in enumerate(leaves)]
  )


@every_case
def test_derivatives(name, options, masked):
  """Every output has its own random cotangent; the tangents of all arguments are random too."""
  with jax.enable_x64(True):
    smooth, fixed = arguments(name, options, masked)
    functions = (
      lambda x: flat(name, "mean")(**x, **fixed),
      lambda x: formulas(jnp, **x, **fixed, reduction="mean"),
    )
    x_dot = random_like(20, smooth)
    (y, y_dot), (_, expected_dot) = (jax.jvp(f, (smooth,), (x_dot,)) for f in functions)
    pulls = [jax.vjp(f, smooth)[1] for f in functions]
    y_bar = random_like(30, y)
    for i, output in enumerate(OUTPUTS):
      assert relative_error(y_dot[i], expected_dot[i]) < 1e-12, output
      chosen = tuple(bar if i == j else jnp.zeros_like(bar) for j, bar in enumerate(y_bar))
      (x_bar,), (expected_bar,) = (pull(chosen) for pull in pulls)
      for key, bar in x_bar.items():
        assert relative_error(bar, expected_bar[key]) < 1e-12, (output, key)
      forward = np.sum(y_bar[i] * y_dot[i])
      reverse = sum(np.sum(bar * x_dot[key]) for key, bar in x_bar.items())
      np.testing.assert_allclose(forward, reverse, rtol=1e-11, atol=1e-14)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_of_the_other_reductions_with_everything(name, reduction):
  with jax.enable_x64(True):
    smooth, fixed = arguments(name, everything(name), masked=True)
    y, pull = jax.vjp(lambda x: flat(name, reduction)(**x, **fixed), smooth)
    expected_pull = jax.vjp(lambda x: formulas(jnp, **x, **fixed, reduction=reduction), smooth)[1]
    y_bar = random_like(30, y)
    (x_bar,), (expected,) = pull(y_bar), expected_pull(y_bar)
    for key, bar in x_bar.items():
      assert relative_error(bar, expected[key]) < 1e-12, key


@every_loss
def test_second_derivatives_with_everything(name):
  """Forward over reverse, by all pairs of arguments, of a random combination of all outputs."""
  with jax.enable_x64(True):
    smooth, fixed = arguments(name, everything(name), masked=True)
    y_bar = random_like(40, flat(name, "mean")(**smooth, **fixed))

    def combined(f):
      return lambda x: sum(jnp.sum(bar * y) for bar, y in zip(y_bar, f(**x, **fixed), strict=True))

    references = functools.partial(formulas, jnp, reduction="mean")
    actual, expected = jax.jit(
      lambda x: [jax.jacfwd(jax.grad(combined(f)))(x) for f in (flat(name, "mean"), references)]
    )(smooth)
    for row, column in itertools.product(smooth, smooth):
      assert relative_error(actual[row][column], expected[row][column]) < 1e-11, (row, column)


@pytest.mark.without("disable_jit")
@every_loss
def test_every_argument_may_be_traced(name):
  """One compilation serves all values, also coefficients at the ends of their range."""
  smooth, fixed = arguments(name, everything(name), masked=True, dtype=np.float32)
  traced = jax.jit(flat(name, "mean"))
  others = {"logits": -smooth["logits"], "class_weights": 2 * smooth["class_weights"]}
  if name == INTEGER:
    others |= {"labels": np.array([3, 0, 4, 1]), "ignore_index": -100}
  changes = [{}, {"label_smoothing": 0.0}, {"label_smoothing": 1.0}, {"z_loss": 0.0}]
  for change in [*changes, {"where": np.ones_like(MASK)}, others]:
    values = {key: np.asarray(value) for key, value in (smooth | fixed | change).items()}
    exact = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in values.items()}
    actual = traced(**{k: v.astype((smooth | fixed)[k].dtype) for k, v in values.items()})
    for output, x, y in zip(OUTPUTS, actual, formulas(np, **exact, reduction="mean"), strict=True):
      assert relative_error(x, y) <= oracle.tolerance("float32"), (output, change)
  assert traced._cache_size() == 1


@pytest.mark.without("disable_jit")
@every_loss
def test_smoothing_outside_its_range_is_extrapolated_where_traced(name):
  smooth, fixed = arguments(name, ["label_smoothing"], dtype=np.float32)
  smooth["label_smoothing"] = jnp.float32(1.5)
  actual = jax.jit(flat(name))(**smooth, **fixed)[0]
  exact = {key: np.asarray(value, np.float64) for key, value in smooth.items()}
  assert relative_error(actual, formulas(np, **exact, **fixed)[0]) < oracle.tolerance("float32")


@every_loss
def test_vmap_over_every_argument(name):
  """Over each argument on its own, and, with the gradients too, over all of them at once."""
  smooth, fixed = jax.tree.map(
    jnp.asarray, arguments(name, everything(name), masked=True, dtype=np.float32)
  )
  single = smooth | fixed
  batches = {key: jnp.stack([x, x[::-1] if x.ndim else 2 * x]) for key, x in single.items()}

  @jax.jit
  def value(arguments):
    return flat(name, "mean")(**arguments)

  @jax.jit
  def gradient(arguments):
    fixed_ = {key: arguments[key] for key in fixed}
    f = lambda x: sum(jnp.sum(jnp.sin(y)) for y in flat(name, "mean")(**x, **fixed_))
    return jax.grad(f)({key: arguments[key] for key in smooth})

  for f, chosen in [*((value, (key,)) for key in single), (gradient, tuple(single))]:
    batched = jax.vmap(f, ({key: 0 if key in chosen else None for key in single},))(
      single | {key: batches[key] for key in chosen}
    )
    for i in range(2):
      expected = f(single | {key: batches[key][i] for key in chosen})
      leaves = zip(jax.tree.leaves(batched), jax.tree.leaves(expected), strict=True)
      for x, y in leaves:
        assert relative_error(x[i], y) < 2e-6, chosen


@every_loss
def test_other_axes(name):
  """Several class axes, in an order of their own, with weights of their shape."""
  k = (2, 3)  # six classes
  logits = random(50, (4, *k))
  weights = np.linspace(0.5, 2, 6, dtype=np.float32).reshape(k)
  where = random(51, (4, *k)) < 0.8
  where[:, :, 2] = True
  options = {"label_smoothing": 0.1, "z_loss": 0.03}
  labels = np.abs(random(52, (4, *k))) if name == SOFT else np.array([2, 5, 2, 2])
  expected = LOSSES[name](
    logits.reshape(4, 6),
    labels.reshape(4, 6) if name == SOFT else labels,
    where=where.reshape(4, 6),
    class_weights=weights.ravel(),
    **options,
  )
  moved = (lambda x: np.moveaxis(x, 0, 1)) if name == SOFT else lambda x: x
  actual = LOSSES[name](
    np.moveaxis(logits, 0, 1),
    moved(labels),
    (0, 2),
    np.moveaxis(where, 0, 1),
    class_weights=weights,
    **options,
  )
  assert relative_error(actual, expected) < 1e-6
  # The same axes in the other order, which is that of the labels and of the weights too.
  if name == INTEGER:
    labels = labels % 3 * 2 + labels // 3
  actual = LOSSES[name](
    np.moveaxis(logits, 0, 1),
    moved(labels),
    (2, 0),
    np.moveaxis(where, 0, 1),
    class_weights=weights.T,
    **options,
  )
  assert relative_error(actual, expected) < 1e-6


# Memory.

ROWS, CLASSES = 16, 128


every_memory_case = pytest.mark.parametrize(
  ("name", "options"),
  [
    pytest.param(name, options, id="+".join((name, *options)))
    for name in LOSSES
    for options in [*((option,) for option in everything(name)), everything(name)]
  ],
)


def options_of_width(options, classes):
  values = {option: jnp.asarray(VALUES[option]) for option in options}
  values = {key: x.astype("float32") if x.dtype.kind == "f" else x for key, x in values.items()}
  if "class_weights" in values:
    values["class_weights"] = jnp.linspace(0.5, 2, classes)
  return values


@every_memory_case
def test_no_option_saves_an_array_of_the_logits_size(name, options):
  """The leaves of what jax.vjp returns are what was saved; bfloat16 tells copies in float32."""
  logits = jnp.asarray(random(0, (ROWS, CLASSES)), "bfloat16")
  mask = jnp.asarray(random(1, (ROWS, CLASSES)) < 1.5)
  values = options_of_width(options, CLASSES)
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


@every_memory_case
@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_no_option_adds_an_array_to_the_compiled_gradient(name, options, traced):
  logits = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
  labels = logits if name == SOFT else jax.ShapeDtypeStruct((64,), jnp.int32)
  values = options_of_width(options, 4096)
  constants = {} if traced else {k: x if x.ndim else x.item() for k, x in values.items()}
  f = lambda z, t, values: LOSSES[name](z, t, reduction="mean", **values, **constants)
  limit = logits.size
  if name == SOFT:
    # Beside a few numbers per class and per row.
    limit = temp_bytes_of_optax(logits.shape) + 4 * 8 * sum(logits.shape)
  assert temp_bytes(f, logits, labels, values if traced else {}) <= limit


# Labels.

ALL_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


WIDE_WEIGHTS = np.linspace(0.5, 2, 300)


@jax.jit
def wide_loss(z, labels):
  return integer_loss(
    z, labels, class_weights=WIDE_WEIGHTS.astype(np.float32), label_smoothing=0.1, ignore_index=5
  )


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ALL_INTEGERS)
def test_integer_labels_of_every_dtype(dtype):
  """300 classes, more than an int8 counts to. The last label is the least of the dtype."""
  z = random(2, (5, 300))
  least = np.iinfo(dtype).min
  with jax.enable_x64(dtype.endswith("64")):
    labels = np.array([0, 127, min(299, np.iinfo(dtype).max), 5, least], dtype)
    loss = np.asarray(wide_loss(z, labels))
  expected = formulas(
    np,
    z.astype(np.float64),
    labels.astype(np.int64),
    class_weights=WIDE_WEIGHTS,
    label_smoothing=0.1,
    ignore_index=5,
  )[0]
  if least < 0:
    expected[4] = np.nan
  assert relative_error(loss, expected) < oracle.tolerance("float32")


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_huge_unsigned_labels_are_out_of_range(dtype):
  with jax.enable_x64(dtype == "uint64"):
    huge = np.array([np.iinfo(dtype).max, 1, np.iinfo(dtype).max // 2 + 1], dtype)
    loss = integer_loss(random(3, (3, 5)), huge)
    np.testing.assert_array_equal(np.isnan(loss), [True, False, True])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_the_largest_unsigned_label_may_be_ignored(dtype):
  """As -1 was before a cast."""
  with jax.enable_x64(dtype == "uint64"):
    labels = np.array([2, np.iinfo(dtype).max], dtype)
    loss = integer_loss(random(3, (2, 5)), labels, ignore_index=labels[1])
    assert loss[0] > 0
    assert loss[1] == 0


@jax.jit
def ignoring(z, labels, ignore_index):
  f = lambda z: integer_loss(
    z, labels, ignore_index=ignore_index, reduction="mean", label_smoothing=0.1, z_loss=0.03
  )
  return f(z), jax.grad(f)(z)


@pytest.mark.parametrize("ignore_index", [1, -100, 7])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_ignored_rows_may_hold_anything(ignore_index, junk):
  labels = np.where(INTEGERS == 1, ignore_index, INTEGERS)
  z = random(4, (4, 5))
  clean_loss, clean_gradient = ignoring(z, labels, ignore_index)
  z[3] = junk
  loss, gradient = ignoring(z, labels, ignore_index)
  assert loss == clean_loss
  np.testing.assert_array_equal(gradient, clean_gradient)
  np.testing.assert_array_equal(gradient[3], 0)
  assert np.all(gradient[:3] != 0)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("how", ["ignored", "masked", "weightless", "empty"])
def test_the_mean_of_nothing_is_zero(how):
  """Also its gradients. The logits of rows that do not count are NaN."""
  z = np.full((0 if how == "empty" else 3, 5), np.nan, np.float32)
  options = {
    "ignored": {"ignore_index": 2},
    "masked": {"where": np.zeros((3, 5), bool)},
    "weightless": {"class_weights": np.zeros(5, np.float32)},
    "empty": {},
  }[how]
  if how == "weightless":
    z = random(5, z.shape)
  labels = np.full(len(z), 2)

  @jax.jit
  def f(z, alpha):
    return integer_loss(z, labels, label_smoothing=alpha, reduction="mean", **options)

  loss, gradients = jax.value_and_grad(f, argnums=(0, 1))(z, np.float32(0.1))
  assert loss == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


# Zero weights at infinite costs.


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_a_class_of_weight_zero_adds_nothing_at_minus_infinity(name, masked):
  """Though smoothing gives it a share, which would make the loss infinite; in both modes."""
  z, w, z_dot = np.float32([-np.inf, 0.5, 1]), np.float32([0, 1, 2]), np.float32([7, 1, 2])
  t = np.float32([0, 1, 0])
  labels = t if name == SOFT else np.int32(1)
  where = np.ones(3, bool) if masked else None

  @jax.jit
  def f(z, w):
    return LOSSES[name](z, labels, class_weights=w, label_smoothing=0.3, where=where)

  share = 0.7 * t[1:] + 0.1  # of the two other classes
  log_a = z[1:] - np.log(np.sum(np.exp(z[1:], dtype=np.float64)))
  p = w[1:] * share
  by_logits = np.exp(log_a) * np.sum(p) - p
  loss, bars = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(z, w)
  assert relative_error(loss, -np.sum(p * log_a)) < 1e-6
  assert relative_error(bars[0], [0, *by_logits]) < 1e-6
  assert relative_error(bars[1], [0, *(-share * log_a)]) < 1e-6
  tangent = jax.jvp(lambda z: f(z, w), (z,), (z_dot,))[1]
  assert relative_error(tangent, by_logits @ z_dot[1:]) < 1e-6


def test_a_label_without_weight_at_minus_infinity_smoothed_altogether():
  z, w = np.float32([-np.inf, 0, 1]), np.float32([0, 1, 1])
  f = lambda z: integer_loss(z, 0, class_weights=w, label_smoothing=1.0)
  loss, gradient = jax.jit(jax.value_and_grad(f))(z)
  a = np.exp([0.0, 1.0]) / (1 + np.e)
  assert relative_error(loss, -np.sum(np.log(a)) / 3) < 1e-6
  assert relative_error(gradient, [0, *(a * 2 / 3 - 1 / 3)]) < 1e-6


def test_a_label_without_weight_at_minus_infinity_adds_nothing():
  z, w = np.float32([-np.inf, 0, 1]), np.float32([0, 1, 1])
  assert integer_loss(z, 0, class_weights=w) == 0
  assert integer_loss(z, 0, label_smoothing=0.5) == np.inf


@pytest.mark.without("debug_nans", "enable_x64")
def test_a_label_out_of_range_is_nan_in_its_row_alone():
  z, w, labels = random(6, (3, 5)), np.float32([1, 2, 3, 4, 5]), np.array([1, 5, 3])

  @jax.jit
  def f(z, labels):
    loss, pull = jax.vjp(
      lambda z: integer_loss(z, labels, class_weights=w, label_smoothing=0.1, z_loss=0.03), z
    )
    return loss, *pull(jnp.ones(3))

  loss, gradient = f(z, labels)
  assert np.isnan(loss[1])
  assert np.all(np.isnan(gradient[1]))
  valid_loss, valid_gradient = f(z, labels % 5)
  np.testing.assert_array_equal(loss[::2], valid_loss[::2])
  np.testing.assert_array_equal(gradient[::2], valid_gradient[::2])


# Errors.

X, Y = jnp.zeros((3, 4), jnp.float32), jnp.zeros(3, jnp.int32)
T = jnp.full((3, 4), 0.25, jnp.float32)
ERRORS = {
  "smoothing below 0": (
    lambda: integer_loss(X, Y, label_smoothing=-0.1),
    ValueError,
    f"{INTEGER} expected label_smoothing in [0, 1], got -0.1.",
  ),
  "smoothing above 1": (
    lambda: softmax_cross_entropy(X, T, label_smoothing=jnp.float32(1.5)),
    ValueError,
    f"{SOFT} expected label_smoothing in [0, 1], got 1.5.",
  ),
  "smoothing NaN": (
    lambda: integer_loss(X, Y, label_smoothing=np.nan),
    ValueError,
    f"{INTEGER} expected label_smoothing in [0, 1], got nan.",
  ),
  "smoothing None": (
    lambda: integer_loss(X, Y, label_smoothing=None),
    TypeError,
    f"{INTEGER} expected label_smoothing to be an array, got NoneType.",
  ),
  "smoothing a bool": (
    lambda: integer_loss(X, Y, label_smoothing=True),
    TypeError,
    f"{INTEGER} expected label_smoothing of a real dtype, got dtype bool.",
  ),
  "smoothing per row": (
    lambda: integer_loss(X, Y, label_smoothing=jnp.zeros(3)),
    ValueError,
    f"{INTEGER} expected label_smoothing to be a scalar, got shape (3,).",
  ),
  "z_loss None": (
    lambda: softmax_cross_entropy(X, T, z_loss=None),
    TypeError,
    f"{SOFT} expected z_loss to be an array, got NoneType.",
  ),
  "z_loss complex": (
    lambda: integer_loss(X, Y, z_loss=1j),
    TypeError,
    f"{INTEGER} expected z_loss of a real dtype, got dtype complex64.",
  ),
  "z_loss per row": (
    lambda: softmax_cross_entropy(X, T, z_loss=jnp.zeros((3, 1))),
    ValueError,
    f"{SOFT} expected z_loss to be a scalar, got shape (3, 1).",
  ),
  "class weights too few": (
    lambda: integer_loss(X, Y, class_weights=jnp.ones(3)),
    ValueError,
    f"{INTEGER} expected one class weight per class, of shape (4,), got shape (3,).",
  ),
  "class weights of the logits' shape": (
    lambda: softmax_cross_entropy(X, T, class_weights=T),
    ValueError,
    f"{SOFT} expected one class weight per class, of shape (4,), got shape (3, 4).",
  ),
  "class weights of two axes in the wrong order": (
    lambda: integer_loss(X, 0, (1, 0), class_weights=T),
    ValueError,
    f"{INTEGER} expected one class weight per class, of shape (4, 3), got shape (3, 4).",
  ),
  "class weights a list": (
    lambda: integer_loss(X, Y, class_weights=[1.0] * 4),
    TypeError,
    f"{INTEGER} expected class_weights to be an array, got list. Pass jnp.asarray(class_weights).",
  ),
  "unknown reduction": (
    lambda: integer_loss(X, Y, reduction="average"),
    ValueError,
    f'{INTEGER} expected reduction to be "none", "sum" or "mean", got \'average\'.',
  ),
  "reduction None": (
    lambda: softmax_cross_entropy(X, T, reduction=None),
    ValueError,
    f'{SOFT} expected reduction to be "none", "sum" or "mean", got None.',
  ),
  "ignore_index a float": (
    lambda: integer_loss(X, Y, ignore_index=-100.0),
    TypeError,
    f"{INTEGER} expected ignore_index of an integer dtype, got dtype float32.",
  ),
  "ignore_index several": (
    lambda: integer_loss(X, Y, ignore_index=jnp.array([0, 1])),
    ValueError,
    f"{INTEGER} expected ignore_index to be a scalar, got shape (2,).",
  ),
}


@pytest.mark.without("enable_x64")
@pytest.mark.parametrize("case", ERRORS)
def test_the_whole_message(case):
  call, error, message = ERRORS[case]
  with pytest.raises(error) as raised:
    call()
  assert str(raised.value) == message
  assert type(raised.value) is error


def test_soft_labels_have_no_index_to_ignore():
  with pytest.raises(TypeError, match="unexpected keyword argument 'ignore_index'"):
    softmax_cross_entropy(X, T, ignore_index=0)


# What goes wrong elsewhere.


@pytest.mark.without("debug_nans")
def test_a_label_of_minus_one_is_not_the_last_class():
  """As it is in optax, by NumPy's indexing."""
  z = random(7, (2, 5))
  theirs = optax.losses.softmax_cross_entropy_with_integer_labels(z, np.array([-1, 4]))
  ours = integer_loss(z, np.array([-1, 4]))
  assert np.isfinite(theirs[0])
  assert np.isnan(ours[0])
  assert relative_error(ours[1], theirs[1]) < 1e-6


@every_loss
def test_the_returned_z_loss_has_a_gradient(name):
  """Which is zero in t5x: d(lambda lse^2)/dz = 2 lambda lse a."""
  z, labels = random(8, (4, 5)), np.float32(LABELS[SOFT]) if name == SOFT else INTEGERS
  f = lambda z: jnp.sum(LOSSES[name](z, labels, z_loss=0.03, return_aux=True)[1].z_loss)
  exact = z.astype(np.float64)
  lse = np.log(np.sum(np.exp(exact), axis=1, keepdims=True))
  assert relative_error(jax.jit(jax.grad(f))(z), 0.06 * lse * np.exp(exact - lse)) < 1e-6


def test_soft_labels_need_not_sum_to_one():
  """In t5x the gradient a_j - t_j takes that for granted: here it is 2 a_j - t_j."""
  z, t = random(9, (5,)), np.float32([0.5, 0, 1, 0.5, 0])
  a = np.exp(z.astype(np.float64)) / np.sum(np.exp(z.astype(np.float64)))
  assert relative_error(jax.jit(jax.grad(softmax_cross_entropy))(z, t), 2 * a - t) < 1e-6


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.03}])
def test_forward_mode_is_finite_where_a_label_of_zero_meets_minus_infinity(options):
  """NaN in optax's safe_softmax_cross_entropy."""
  z, t, z_dot = np.float32([-np.inf, 0, 0]), np.float32([0, 1, 0]), np.float32([5, 2, 3])
  theirs = jax.jvp(lambda z: optax.losses.safe_softmax_cross_entropy(z, t), (z,), (z_dot,))[1]
  assert np.isnan(theirs)
  f = jax.jit(lambda z: softmax_cross_entropy(z, t, **options))
  loss, tangent = jax.jvp(f, (z,), (z_dot,))
  penalty = options.get("z_loss", 0)
  assert relative_error(loss, np.log(2) + penalty * np.log(2) ** 2) < 1e-6
  assert relative_error(tangent, 0.5 + 2 * penalty * np.log(2) * 2.5) < 1e-6


@pytest.mark.without("debug_nans")
def test_a_soft_label_of_zero_at_minus_infinity_adds_nothing():
  """NaN in torch, and in optax without the word "safe"."""
  z, t = np.float32([-np.inf, 0, 0]), np.float32([0, 1, 0])
  assert np.isnan(optax.losses.softmax_cross_entropy(z, t))
  loss, gradients = jax.jit(jax.value_and_grad(softmax_cross_entropy, argnums=(0, 1)))(z, t)
  assert relative_error(loss, np.log(2)) < 1e-6
  assert relative_error(gradients[0], [0, -0.5, 0.5]) < 1e-6
  assert relative_error(gradients[1], [0, np.log(2), np.log(2)]) < 1e-6


def test_a_masked_label_is_not_rewarded():
  """In optax its logit counts though its class does not, so that the loss is negative."""
  z, where = np.float32([5, 0, 0]), np.array([False, True, True])
  theirs = optax.losses.softmax_cross_entropy_with_integer_labels(z, np.int32(0), where=where)
  assert theirs < 0
  assert integer_loss(z, np.int32(0), where=where) == np.inf


@every_loss
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_large_logits_leave_a_loss(name, options):
  """log 2 for two equal ones of any size, where lse - z_t loses it altogether, as in optax."""
  z = np.float32([1e8, 1e8])
  labels = np.float32([1, 0]) if name == SOFT else np.int32(0)
  if name == INTEGER and not options:
    assert relative_error(jax.nn.logsumexp(z) - z[0], np.log(2)) > 0.1
  assert relative_error(LOSSES[name](z, labels, **options), np.log(2)) < 1e-6


@every_loss
def test_axes_other_than_the_last(name):
  """Which the libraries that fix the class axis leave to a transpose."""
  smooth, fixed = arguments(name, everything(name), masked=True, dtype=np.float32)
  expected = LOSSES[name](**smooth, **fixed)
  moved = {
    key: x.T if key in ("logits", "where") or (key == "labels" and name == SOFT) else x
    for key, x in (smooth | fixed).items()
  }
  assert relative_error(LOSSES[name](**moved, axis=0), expected) < 1e-6
  np.testing.assert_array_equal(expected.shape, (4,))
