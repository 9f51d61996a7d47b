"""Derivatives of second order on meshes, and `jax.vmap` whose batch is spread over a mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batched_cases import (
  BATCHED,
  B,
  assert_close,
  batched,
  every_derivative,
  in_axes_of,
  on_mesh,
  wide,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import (
  LABELS,
  LOGITS,
  PROBABILITIES,
  SAME,
  SPREAD,
  WEIGHT,
  X,
  integer,
  linear,
  mesh,
  soft,
)
from oracle import random, relative_error

from softmax_jax import log_softmax, logsumexp, softmax

pytestmark = pytest.mark.devices(8)


@pytest.fixture(autouse=True)
def in_float64():
  """All in float64, in which what differs is no rounding error."""
  with jax.enable_x64(True):
    yield


@pytest.mark.few(2)
@pytest.mark.parametrize("case", BATCHED)
def test_a_batch_over_a_mesh_axis_gives_the_numbers_of_one_device(case):
  g, local, args, count = on_mesh(case)
  args = tuple(map(batched, args))
  by_mesh = jax.vmap(lambda *args: every_derivative(g, args, count), spmd_axis_name="d")
  expected = jax.vmap(lambda *args: every_derivative(local, args, count))
  assert_close(jax.jit(by_mesh)(*args), jax.jit(expected)(*args))


# Each combination of batched arguments is a program to trace.
@pytest.mark.few(2)
@pytest.mark.parametrize("case", BATCHED)
def test_any_of_the_arguments_may_be_batched_over_a_mesh_axis(case):
  g, _, args, count = on_mesh(case)
  for in_axes in in_axes_of(len(args)):
    pairs = zip(args, in_axes, strict=True)
    some = [wide(a) if axis is None else batched(a) for a, axis in pairs]
    f = jax.vmap(lambda *args: every_derivative(g, args, count), in_axes, spmd_axis_name="d")
    jax.eval_shape(f, *some)  # where JAX looks at what varies over which axes


@pytest.mark.few(3)
@pytest.mark.parametrize("case", BATCHED)
def test_a_batch_over_a_mesh_axis_may_be_of_float32(case):  # which takes a way of its own
  g, _, args, count = on_mesh(case)
  args = [np.stack([a] * B) for a in map(np.asarray, args)]
  f = jax.vmap(lambda *args: every_derivative(g, args, count), spmd_axis_name="d")
  assert jax.eval_shape(f, *args)["gradient"][0].dtype == np.float32


SHARED = "masked softmax", "soft labels, every option", "linear"


@pytest.mark.few(1)
@pytest.mark.parametrize("case", SHARED)
def test_gradients_of_what_the_batch_shares_are_added_up_over_its_axis(case):
  if getattr(jax.config, "jax_custom_jvp3", False):
    pytest.skip("JAX does not add them up for its own custom_jvp functions")
  g, local, args, count = on_mesh(case)
  args = batched(args[0]), *map(wide, args[1:])
  in_axes = (0,) + (None,) * (len(args) - 1)

  def derivatives(f, **axis):
    return jax.jit(lambda *args: every_derivative(jax.vmap(f, in_axes, **axis), args, count))

  assert_close(derivatives(g, spmd_axis_name="d")(*args), derivatives(local)(*args))


# Rows of a few classes on explicit axes, which `jax.make_mesh` makes by default.

ROWS = 8


def of_short_rows(z, p, w, x, weight, mask, labels):
  """What is differentiated, in one array of a number per row."""
  options = {"label_smoothing": 0.1, "z_loss": 0.2}
  return (
    jnp.sum(softmax(z) * p + jnp.where(mask, log_softmax(z, where=mask), 0), -1)
    + logsumexp(z, -1)
    + logsumexp(z, -1, b=p, where=mask)
    + integer(z, labels)
    + integer(z, labels, class_weights=w, where=mask, **options)
    + soft(z, p)
    + soft(z, p, class_weights=w, where=mask, **options)
    + linear(x, weight, labels, class_weights=w, reduction="none", **options)
    + linear(x, weight, labels)
  )


def derivatives_of_short_rows(z, p, w, mask, labels):
  """Two of second order, by all that is differentiable."""

  def total(z, p, w):
    options = {"class_weights": w, "where": mask, "label_smoothing": 0.1}
    losses = integer(z, labels, **options) + soft(z, p, **options) + logsumexp(z, -1, b=p)
    return jnp.sum(jnp.sin(losses)) + jnp.sum(jnp.sin(log_softmax(z)) * p)

  gradient = jax.grad(total, (0, 1, 2))
  moving, dots = (z, p, w), tuple(jnp.cos(3 * x) for x in (z, p, w))
  return {
    "forward over reverse": jax.jvp(gradient, moving, dots)[1],
    "reverse over reverse": jax.vjp(gradient, *moving)[1](dots),
  }


def short_rows(classes):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, classes, ROWS)
  mask = rng.random((ROWS, classes)) < 0.8
  mask[np.arange(ROWS), labels] = True
  z, p = random(0, (ROWS, classes)), np.abs(random(1, (ROWS, classes)))
  w, x, weight = np.abs(random(2, classes)), random(3, (ROWS, 3)), random(4, (3, classes))
  return *map(wide, (z, p, w, x, weight)), mask, labels


def on_explicit_axes(args, rows, vocab):
  """The mesh, and the arguments with rows and classes spread over its axes."""
  of_rows = P(rows, vocab)
  specs = of_rows, of_rows, P(vocab), P(rows, None), P(None, vocab), of_rows, P(rows)
  over = jax.make_mesh((4, 2), ("d", "v"), axis_types=(AxisType.Explicit,) * 2)
  return over, [
    jax.device_put(a, NamedSharding(over, spec)) for a, spec in zip(args, specs, strict=True)
  ]


SPREADS = [
  *((10, "d", "v"), (10, "d", None), (10, None, "v")),
  *((16, "d", "v"), (16, "d", None), (16, None, "v"), (17, "d", None)),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("classes, rows, vocab", SPREADS)
def test_short_rows_on_explicit_axes_have_every_second_derivative(classes, rows, vocab):
  over, args = on_explicit_axes(short_rows(classes), rows, vocab)
  z = args[0]

  def total(*args):
    return jnp.sum(jnp.sin(of_short_rows(*args)))

  def along(z, *others):
    return jax.jvp(lambda z: total(z, *others), (z,), (jnp.cos(z),))[1]

  with jax.set_mesh(over):
    results = jax.eval_shape(lambda *args: every_derivative(of_short_rows, args, 5), *args)
    hessian = jax.eval_shape(jax.hessian(total), *args)
    of_tangent = jax.eval_shape(jax.grad(along), *args)
  for what in "gradient", "forward over reverse", "reverse over reverse":
    assert [*map(jax.typeof, results[what])] == [*map(jax.typeof, args[:5])], what
  assert hessian.shape == z.shape * 2
  assert jax.typeof(of_tangent) == jax.typeof(z)


@pytest.mark.long
@pytest.mark.parametrize("classes, rows, vocab", [SPREADS[0], *SPREADS[4:6]])
def test_second_derivatives_of_short_rows_on_explicit_axes(classes, rows, vocab):
  args = short_rows(classes)
  f = jax.jit(lambda *args: derivatives_of_short_rows(*args[:3], *args[5:]))
  expected = f(*args)
  over, placed = on_explicit_axes(args, rows, vocab)
  with jax.set_mesh(over):
    actual = f(*placed)
  assert_close(actual, expected)


# Classes spread over two axes of the mesh. Labels count them in the order of the spec, which no
# function can see: only `axis_name` says it.

ORDERS = pytest.mark.parametrize("names", [("d", "v"), ("v", "d")], ids="-".join)
NUMBER = 150  # the others are padding


def labelled(names, z, x, weight, labels):
  losses = integer(z, labels, label_smoothing=0.1, axis_name=names)
  return losses + linear(
    x, weight, labels, reduction="none", num_classes=None if names is None else NUMBER,
    axis_name=names,
  )  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize(
  "names",
  [("v", "d"), ("d", "v")],
  ids="-".join,
)
def test_labels_count_the_classes_in_the_order_of_the_names(names):
  labels = np.minimum(LABELS, NUMBER - 1)
  of_classes = P(None, names)
  f = jax.shard_map(
    lambda *args: labelled(names, *args),
    mesh=mesh(2, 4),
    in_specs=(of_classes, SAME, of_classes, SAME),
    out_specs=SAME,
  )
  args = *map(wide, (LOGITS, X, WEIGHT)), labels
  actual = jax.jit(lambda *args: every_derivative(f, args, 3))(*args)

  def on_one(z, x, weight, labels):
    return integer(z, labels, label_smoothing=0.1) + linear(
      x, weight[:, :NUMBER], labels, reduction="none"
    )

  expected = jax.jit(lambda *args: every_derivative(on_one, args, 3))(*args)
  assert_close(actual, expected)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_ignored_rows_may_hold_anything_in_reverse_over_forward_mode(junk):
  z, labels = wide(LOGITS).copy(), LABELS.copy()
  labels[1], z[1, 0] = -1, junk

  v = jnp.cos(wide(LOGITS))

  def gradient(f):
    return jax.jit(jax.grad(lambda z: jax.jvp(lambda z: jnp.sum(f(z)), (z,), (v,))[1]))

  f = lambda z, n=None: integer(z, labels, ignore_index=-1, label_smoothing=0.1, axis_name=n)
  g = jax.shard_map(lambda z: f(z, "v"), mesh=mesh(2, 4), in_specs=SPREAD, out_specs=SAME)
  actual = gradient(g)(z)
  np.testing.assert_array_equal(actual[1], 0)
  assert relative_error(actual, gradient(f)(z)) < 1e-11


@ORDERS
def test_the_order_of_the_names_does_not_matter_without_labels_that_count(names):
  def f(names, z, p):
    return softmax(z, axis_name=names) + log_softmax(z, axis_name=names), (
      logsumexp(z, -1, axis_name=names),
      logsumexp(z, -1, b=p, axis_name=names),
      soft(z, p, label_smoothing=0.1, axis_name=names),
    )

  spec = P(None, ("d", "v"))
  g = jax.shard_map(
    lambda *args: f(names, *args), mesh=mesh(2, 4), in_specs=spec, out_specs=(spec, SAME)
  )
  actual = jax.jit(g)(LOGITS, PROBABILITIES)
  for a, e in zip(*map(jax.tree.leaves, (actual, f(None, LOGITS, PROBABILITIES))), strict=True):
    assert relative_error(a, e) < 1e-6


@ORDERS
def test_the_linear_loss_of_explicit_axes_counts_in_their_order(names):
  over = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(over):
    weight = jax.device_put(WEIGHT, NamedSharding(over, P(None, names)))
    value, gradient = jax.jit(jax.value_and_grad(linear, 1))(X, weight, LABELS)
  expected, expected_gradient = jax.value_and_grad(linear, 1)(X, WEIGHT, LABELS)
  assert relative_error(value, expected) < 1e-6
  assert relative_error(gradient, expected_gradient) < 2e-6
