"""Classes spread over the devices of a mesh axis, inside shard_map: the same numbers as on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import PartitionSpec as P
from mesh_cases import (
  BIAS,
  CASES,
  CLASS_WEIGHTS,
  LABELS,
  LOGITS,
  MASK,
  OPTIONS,
  PROBABILITIES,
  SAME,
  SPREAD,
  WEIGHT,
  H,
  T,
  V,
  X,
  cotangent,
  derivatives,
  every_case,
  integer,
  linear,
  mesh,
  on_one_device,
  soft,
  spread,
  value_and_vjp,
)
from oracle import random, relative_error

from softmax_jax import (
  log_softmax,
  logsumexp,
  softmax,
)

pytestmark = pytest.mark.devices(8)


@pytest.mark.few(6)
@every_case
def test_numbers_are_those_of_one_device(case):
  f, args, specs, out_specs, count, *_ = CASES[case]
  args = tuple(map(jnp.asarray, args))
  y_bar = cotangent(f, args)
  dots = tuple(jnp.asarray(random(9 + i, a.shape)) for i, a in enumerate(args[:count]))
  actual = derivatives(spread(f, tuple(specs), out_specs), count)(y_bar, dots, *args)
  expected = derivatives(on_one_device(f), count)(y_bar, dots, *args)
  for what, bound in {"value": 5e-7, "vjp": 5e-7, "jvp": 2e-6, "second order": 2e-6}.items():
    pairs = zip(jax.tree.leaves(actual[what]), jax.tree.leaves(expected[what]), strict=True)
    for a, e in pairs:
      assert relative_error(a, e) < bound, what


@pytest.mark.few(6)
@every_case
def test_collectives_are_few_and_of_numbers_per_row(case):
  f, args, specs, out_specs, count, forward, both = CASES[case]
  on_mesh = spread(f, tuple(specs), out_specs)
  for program, most in (
    (collectives(on_mesh, *args), forward),
    (collectives(value_and_vjp(on_mesh, count), cotangent(f, args), *args), both),
  ):
    assert 1 < len(program) <= most
    assert {kind for kind, _ in program} == {"all-reduce"}
    sizes = {size for _, shapes in program for shape in shapes for size in shape}
    assert not sizes & {V, V // 8}


# Rows with special values on one device, on several, or across their border.

EDGES = {
  "the label close to 1": lambda z: z.at[:, 3].add(40),
  "another class close to 1": lambda z: z.at[:, 50].add(40),
  "ties between devices": lambda z: jnp.full_like(z, 1e8),
  "two ties between devices": lambda z: z.at[:, jnp.array([3, 150])].set(60.0),
  "two ties on one device": lambda z: z.at[:, jnp.array([3, 4])].set(60.0),
  "far from zero": lambda z: z - 1e4,
  "-inf on one device": lambda z: z.at[:, 20:40].set(-jnp.inf),
  "-inf at the labels": lambda z: z.at[jnp.arange(T), LABELS].set(-jnp.inf),
  "-inf alone": lambda z: z.at[1].set(-jnp.inf),
  "+inf": lambda z: z.at[1, 50].set(jnp.inf),
  "+inf on two devices": lambda z: z.at[1, jnp.array([50, 90])].set(jnp.inf),
  "NaN": lambda z: z.at[1, 50].set(jnp.nan),
  "NaN and +inf": lambda z: z.at[1, 50].set(jnp.nan).at[1, 90].set(jnp.inf),
}


def every_function(n, z, t, p):
  return (
    softmax(z, axis_name=n),
    log_softmax(z, axis_name=n),
    logsumexp(z, -1, axis_name=n),
    integer(z, t, label_smoothing=0.1, z_loss=0.1, axis_name=n),
    integer(z, t, axis_name=n),
    soft(z, p, axis_name=n),
  )


EVERY_OUT = (SPREAD, SPREAD, SAME, SAME, SAME, SAME)
on_eight = jax.jit(
  lambda y_bar, *args: value_and_vjp(spread(every_function, (SPREAD, SAME, SPREAD), EVERY_OUT), 1)(
    y_bar, *args
  )
)
on_one = jax.jit(value_and_vjp(on_one_device(every_function), 1))


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("edge", EDGES)
def test_special_rows_are_those_of_one_device(edge):
  one_hot = jax.nn.one_hot(LABELS, V, dtype=LOGITS.dtype)
  args = EDGES[edge](jnp.asarray(LOGITS)), LABELS, one_hot
  shapes = jax.eval_shape(on_one_device(every_function), *args)
  y_bar = tuple(random(20 + i, y.shape) for i, y in enumerate(shapes))
  results = on_eight(y_bar, *args), on_one(y_bar, *args)
  for a, e in zip(*map(jax.tree.leaves, results), strict=True):
    a, e = np.asarray(a), np.asarray(e)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
    np.testing.assert_array_equal(np.where(np.isinf(e), a, 0), np.where(np.isinf(e), e, 0))
    rows = zip(a, e, strict=True)
    assert all(
      relative_error(r[np.isfinite(s)], s[np.isfinite(s)]) < 2e-6 for r, s in rows if s.size
    )


def test_a_loss_of_a_confident_row_keeps_its_digits_across_devices():
  z = jnp.zeros((1, V)).at[0, 3].set(30.0)  # the largest on device 0
  loss = jax.jit(spread(lambda n, z, t: integer(z, t, axis_name=n), (SPREAD, SAME), SAME))
  z64 = np.asarray(z[0], np.float64)
  rest = np.sum(np.exp(np.delete(z64, 3) - 30))
  for label in 3, 50:
    t = jnp.array([label])
    exact = np.log1p(rest) + (0 if label == 3 else 30)
    np.testing.assert_allclose(loss(z, t), [exact], rtol=5e-7)
    at_label = jax.grad(lambda z, t: loss(z, t).sum())(z, t)[0, label]
    exact = -rest / (1 + rest) if label == 3 else np.exp(-30) / (1 + rest) - 1
    np.testing.assert_allclose(at_label, exact, rtol=5e-7)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("label", [-1, V, 2**31 - 1, -100])
def test_a_label_that_is_no_class_is_ignored_or_nan_on_every_device(label):
  t = np.where(np.arange(T) == 1, label, LABELS)
  f = lambda n, z, t: integer(z, t, ignore_index=-100, axis_name=n)
  loss = jax.jit(spread(f, (SPREAD, SAME), SAME))
  g = jax.jit(jax.grad(lambda z: loss(z, t).sum()))(LOGITS)
  others = np.arange(T) != 1
  expected = integer(LOGITS, LABELS)
  np.testing.assert_allclose(loss(LOGITS, t)[others], expected[others], rtol=1e-6)
  if label == -100:
    assert loss(LOGITS, t)[1] == 0
    assert not np.any(g[1])
  else:
    assert np.isnan(loss(LOGITS, t)[1])
    assert np.all(np.isnan(g[1]))
  assert np.all(np.isfinite(g[others]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_those_of_one_device(dtype):
  z = jnp.asarray(LOGITS, dtype)
  f = lambda n, z, t: (softmax(z, axis_name=n), integer(z, t, axis_name=n))
  y_bar = jnp.asarray(random(1, (T, V)), dtype), random(2, T)
  args = z, LABELS
  on_mesh = spread(f, (SPREAD, SAME), (SPREAD, SAME))
  actual = jax.jit(value_and_vjp(on_mesh, 1))(y_bar, *args)
  expected = jax.jit(value_and_vjp(on_one_device(f), 1))(y_bar, *args)
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert a.dtype == e.dtype
    assert relative_error(a, e) < jnp.finfo(a.dtype).eps


# A number of classes that the number of devices does not divide.


@pytest.mark.without("debug_nans")
def test_padding_left_out_by_a_mask_takes_no_part():
  classes = V - 3
  mask = np.arange(V) < classes
  padded = jnp.asarray(LOGITS).at[:, classes:].set(jnp.nan)
  t = np.minimum(LABELS, classes - 1)
  options = {"reduction": "mean", **OPTIONS}
  f = lambda n, z, mask, t: integer(z, t, where=mask, axis_name=n, **options)
  loss = jax.jit(jax.value_and_grad(spread(f, (SPREAD, SPREAD, SAME), SAME)))
  value, g = loss(padded, mask[None], t)
  unpadded = jax.jit(jax.value_and_grad(functools.partial(integer, **options)))
  expected, expected_g = unpadded(padded[:, :classes], t)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert relative_error(g[:, :classes], expected_g) < 1e-6
  assert not np.any(g[:, classes:])


@pytest.mark.parametrize(
  "loss, labels, spec", [(integer, LABELS, SAME), (soft, PROBABILITIES, SPREAD)]
)
def test_rows_left_out_by_a_mask_are_the_same_on_all_devices(loss, labels, spec):
  """Losses, and gradients that are taken inside by coefficients: no device varies from another."""
  counts = np.arange(T) != 1

  def f(n, z, t, w, alpha, c):
    of_row = lambda alpha, c: loss(
      z, t, where=counts, label_smoothing=alpha, z_loss=c, class_weights=w, axis_name=n
    )
    total = lambda alpha, c: jnp.sum(jnp.sin(of_row(alpha, c)))
    return of_row(alpha, c), jax.grad(total, (0, 1))(alpha, c)

  args = LOGITS, labels, CLASS_WEIGHTS, np.float32(0.1), np.float32(0.2)
  actual = jax.jit(spread(f, (SPREAD, spec, P("v"), SAME, SAME), SAME))(*args)
  expected = jax.jit(functools.partial(f, None))(*args)
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padding_of_the_linear_loss_takes_no_part(reduction):
  classes = V - 23  # all of the last device, and some of the one before
  t = np.minimum(LABELS, classes - 1)
  weight, bias, w = (jnp.asarray(a) for a in (WEIGHT, BIAS, CLASS_WEIGHTS))

  def f(n, x, weight, bias, w, t, num_classes=classes):
    options = {"bias": bias, "class_weights": w, "softcap": 20.0, **OPTIONS}
    loss = linear(
      x, weight, t, reduction=reduction, num_classes=num_classes, axis_name=n, **options
    )
    return jnp.sum(jnp.sqrt(1 + loss))  # the sine would cancel

  specs = (SAME, SPREAD, P("v"), P("v"), SAME)
  args = X, weight, bias, w, t
  value, grads = jax.jit(jax.value_and_grad(spread(f, specs, SAME), (0, 1, 2, 3)))(*args)
  args = X, weight[:, :classes], bias[:classes], w[:classes], t
  unpadded = lambda *args: f(None, *args, num_classes=None)
  expected, expected_grads = jax.jit(jax.value_and_grad(unpadded, (0, 1, 2, 3)))(*args)
  np.testing.assert_allclose(value, expected, rtol=2e-6)
  for g, e in zip(grads, expected_grads, strict=True):
    assert relative_error(g[..., : e.shape[-1]], e) < 2e-6
    assert not np.any(g[..., e.shape[-1] :])


@pytest.mark.without("debug_nans")
def test_a_label_in_the_padding_is_no_class():
  f = lambda n, x, weight, t: linear(x, weight, t, reduction="none", num_classes=9, axis_name=n)
  t = np.array([8, 9, 0, 1, 2, 3])
  loss = jax.jit(spread(f, (SAME, SPREAD, SAME), SAME))(X, WEIGHT, t)
  np.testing.assert_array_equal(np.isnan(loss), t == 9)


# Tokens spread over the other axis of the mesh.

DATA = P("d", "v")


@pytest.mark.parametrize("inside", [False, True], ids=["gradient outside", "gradient inside"])
def test_tokens_and_classes_are_spread_over_a_2_by_4_mesh(inside):
  names = "d", "v"

  def f(n, z, x, weight, t):
    axis = None if n is None else names[1]
    return integer(z, t, reduction="sum", axis_name=axis, **OPTIONS) + linear(
      x, weight, t, reduction="sum", chunk_size=2, axis_name=axis, **OPTIONS
    )

  def on_mesh(z, x, weight, t):
    return jax.lax.psum(f("v", z, x, weight, t), "d")

  specs = DATA, P("d"), P(None, "v"), P("d")
  mapped = {"mesh": mesh(2, 4), "in_specs": specs}
  by = 0, 1, 2
  if inside:
    out_specs = (P(), specs[:3])
    g = jax.shard_map(jax.value_and_grad(on_mesh, by), out_specs=out_specs, **mapped)
  else:
    g = jax.value_and_grad(jax.shard_map(on_mesh, out_specs=P(), **mapped), by)
  args = LOGITS, X, WEIGHT, LABELS
  value, grads = jax.jit(g)(*args)
  expected, expected_grads = jax.jit(jax.value_and_grad(on_one_device(f), by))(*args)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for a, e in zip(grads, expected_grads, strict=True):
    assert relative_error(a, e) < 2e-6


def test_classes_are_spread_over_two_axes():
  f = lambda z, t: integer(z, t, axis_name=("d", "v"), reduction="mean")
  specs = P(None, ("d", "v")), P()
  loss = jax.shard_map(f, mesh=mesh(2, 4), in_specs=specs, out_specs=P())
  value, g = jax.jit(jax.value_and_grad(loss))(LOGITS, LABELS)
  expected, expected_g = jax.value_and_grad(integer)(LOGITS, LABELS, reduction="mean")
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert relative_error(g, expected_g) < 1e-6


# Composition.


def test_inside_vmap_scan_and_checkpoint():
  def f(n, z, t):
    one = jax.checkpoint(lambda z, t: integer(z, t, axis_name=n))
    step = lambda total, row: (total + one(*row), None)
    total, _ = jax.lax.scan(step, jnp.zeros(()), (z, t))
    return total + jnp.sum(jax.vmap(one)(z, t) ** 2)

  value, g = jax.jit(jax.value_and_grad(spread(f, (SPREAD, SAME), SAME)))(LOGITS, LABELS)
  expected, expected_g = jax.jit(jax.value_and_grad(on_one_device(f)))(LOGITS, LABELS)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert relative_error(g, expected_g) < 1e-6


@pytest.mark.parametrize("case", ["softmax", "integer labels", "soft labels", "linear"])
def test_an_eager_shard_map_computes_the_same(case):
  f, args, specs, out_specs, *_ = CASES[case]
  actual = spread(f, tuple(specs), out_specs)(*args)
  assert relative_error(actual, f(None, *args)) < 5e-7


def test_memory_of_the_linear_loss_falls_with_the_number_of_devices():
  types = (
    jax.ShapeDtypeStruct((256, 128), jnp.float32),
    jax.ShapeDtypeStruct((128, 2**14), jnp.float32),
    jax.ShapeDtypeStruct((256,), jnp.int32),
  )
  specs = P(), SPREAD, P()

  def temp_bytes(count):
    over = mesh(count)
    f = spread(lambda n, *args: linear(*args, axis_name=n, chunk_size=256), specs, P(), over)
    shardings = tuple(jax.NamedSharding(over, spec) for spec in specs)
    program = jax.jit(jax.value_and_grad(f, (0, 1)), in_shardings=shardings)
    return program.lower(*types).compile().memory_analysis().temp_size_in_bytes

  one, two, eight = map(temp_bytes, (1, 2, 8))
  assert two < 0.6 * one
  assert eight < 0.3 * two


# Errors.


@pytest.mark.few(8)
@every_case
def test_check_vma_false_is_refused(case):
  f, args, specs, out_specs, *_ = CASES[case]
  with pytest.raises(ValueError, match=r"Pass check_vma=True\."):
    spread(f, tuple(specs), out_specs, check_vma=False)(*args)


def test_an_axis_of_vmap_is_refused():
  slices = LOGITS.reshape(T, 8, V // 8).swapaxes(0, 1)
  with pytest.raises(ValueError, match="check_vma=True"):
    jax.vmap(lambda z: softmax(z, axis_name="v"), axis_name="v")(slices)


def test_an_unknown_axis_is_refused():
  with pytest.raises(ValueError, match=r"'q' to name an axis of a surrounding jax\.shard_map"):
    softmax(LOGITS, axis_name="q")


@pytest.mark.parametrize("axis_name", [0, (), ("v", 1), ["v"]])
def test_what_is_no_name_is_refused(axis_name):
  with pytest.raises(TypeError, match="the name of a mesh axis or a tuple of distinct names"):
    softmax(LOGITS, axis_name=axis_name)


def test_classes_that_are_not_spread_are_refused():
  f = lambda n, z, t: integer(z, t, axis_name=n)
  with pytest.raises(ValueError, match="expected logits to be spread over the mesh axis 'v'"):
    spread(f, (SAME, SAME), SAME)(LOGITS, LABELS)


def test_labels_that_are_spread_are_refused():
  f = lambda n, z, t: integer(z, t, axis_name=n)
  logits, labels = np.zeros((8, V), np.float32), np.zeros(8, int)
  with pytest.raises(ValueError, match="expected the same labels on all devices"):
    spread(f, (SPREAD, P("v")), P("v"))(logits, labels)


def test_rows_left_out_on_some_devices_only_are_refused():
  f = lambda n, z, t, mask: integer(z, t, where=mask[:, 0], axis_name=n)
  with pytest.raises(ValueError, match="expected the same where on all devices"):
    spread(f, (SPREAD, SAME, SPREAD), SAME)(LOGITS, LABELS, MASK)


def test_features_that_are_spread_are_refused():
  f = lambda n, x, weight, t: linear(x[:, 0], weight, t, axis_name=n)
  x = np.zeros((T, 8, H), np.float32)
  with pytest.raises(ValueError, match="expected the same x on all devices"):
    spread(f, (SPREAD, SPREAD, SAME), SAME)(x, WEIGHT, LABELS)


def test_labels_that_count_several_class_axes_are_refused():
  f = lambda n, z, t: integer(z, t, axis=(0, 1), axis_name=n)
  with pytest.raises(ValueError, match=re.escape("got axis=(0, 1)")):
    spread(f, (SPREAD, SAME), SAME)(LOGITS, 0)


@pytest.mark.parametrize("num_classes", [-1, V + 1])
def test_a_number_of_classes_that_there_are_not_is_refused(num_classes):
  with pytest.raises(ValueError, match=f"num_classes in .0, {V}., the number of columns"):
    linear(X, WEIGHT, LABELS, num_classes=num_classes)
