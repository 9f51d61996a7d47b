"""The options of the two losses, alone and together, against their formulas written out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from option_formulas import (
  INTEGER,
  LOSSES,
  MASK,
  OUTPUTS,
  REDUCTIONS,
  SOFT,
  arguments,
  every_case,
  every_loss,
  everything,
  flat,
  formulas,
  random_like,
)
from oracle import random, relative_error


@pytest.mark.few(20)
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


@pytest.mark.few(10)
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


@pytest.mark.few(1)
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
  """One compilation serves all values, including coefficients at the ends of their range."""
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


@pytest.mark.few(1)
@every_loss
def test_vmap_over_every_argument(name):
  """Over each argument on its own; with the gradients, over all of them at once."""
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
  """Several class axes in any order, with class weights of the same shape."""
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
  # The same axes in the other order, which labels and weights follow.
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
