"""Every function under every transformation of JAX and their compositions.

Each transformation is written once, as a function of f and a batch of rows. What it must give is
known in closed form, the oracle's value, Jacobian or Hessian, up to the third derivatives, which
are compared with JAX's own.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec
from oracle import random, relative_error
from transformation_table import (
  FUNCTIONS,
  INTEGER,
  JACOBIAN,
  PEERS,
  ROWS,
  SECOND,
  SOFT,
  TRANSFORMATIONS,
  VALUE,
  every_function,
  of_batch,
  of_rows,
)

from softmax_jax import (
  linear_softmax_cross_entropy,
  log_softmax,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
  softmax_entropy,
  softmax_kl_divergence,
)


@pytest.mark.few(20)
@every_function
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformation(name, transformation):
  table = TRANSFORMATIONS[transformation]
  run = lambda x: {part: apply(FUNCTIONS[name], x) for part, (_, apply) in table.items()}
  for part, actual in jax.jit(run)(ROWS).items():
    assert relative_error(actual, table[part][0](name)) < 3e-6, part


@pytest.mark.few(2)
@every_function
def test_three_deep(name):
  """All eight nestings of the two modes, against JAX's own derivatives in float64."""
  weights, *directions = random(10, (4, 4))
  by = {
    "forward": lambda g, v: lambda x: jax.jvp(g, (x,), (v,))[1],
    "reverse": lambda g, v: lambda x: jnp.vdot(v, jax.grad(g)(x)),
  }

  def third(f, x, nesting):  # of a weighted sum of the outputs, along three directions
    g = lambda x: jnp.sum(f(x) * weights) / 4
    for mode, direction in zip(nesting, directions, strict=True):
      g = by[mode](g, direction.astype(x.dtype))
    return g(x)

  with jax.enable_x64(True), oracle.default_promotion():
    expected = third(PEERS[name], jnp.asarray(ROWS[0], "float64"), ["forward"] * 3)
  nestings = list(itertools.product(by, repeat=3))
  actual = jax.jit(lambda x: [third(FUNCTIONS[name], x, nesting) for nesting in nestings])(ROWS[0])
  for nesting, derivative in zip(nestings, actual, strict=True):
    assert relative_error(derivative, expected) < 1e-5, nesting


@pytest.mark.few(2)
@every_function
def test_steps_in_a_scan(name):
  """Of gradient steps: differentiated twice, JAX before 0.12 drops custom_jvp rules there."""
  weights, direction = random(11, (2, 4))

  def second(f, x):
    gradient = jax.grad(lambda x: jnp.sum(f(x) * weights) / 4)
    steps = lambda x: jax.lax.scan(lambda y, _: (y - gradient(y), None), x, length=2)[0]
    end = lambda x: jnp.sum(jnp.sin(steps(x)))
    return jax.grad(lambda x: jnp.vdot(direction.astype(x.dtype), jax.grad(end)(x)))(x)

  with jax.enable_x64(True), oracle.default_promotion():
    expected = second(PEERS[name], jnp.asarray(ROWS[0], "float64"))
  actual = jax.jit(lambda x: second(FUNCTIONS[name], x))(ROWS[0])
  assert relative_error(actual, expected) < 1e-5


@pytest.mark.few(3)
@every_function
def test_without_jit(name):
  """Without an outer jit other parts of JAX trace the functions."""
  f, x = FUNCTIONS[name], jnp.asarray(ROWS[0])
  assert relative_error(f(x), VALUE(name)) < 1e-6
  y, push = jax.linearize(f, x)
  jacobian = JACOBIAN(name)
  assert relative_error(y, VALUE(name)) < 1e-6
  assert relative_error(push(x), jacobian @ ROWS[0]) < 2e-6
  assert relative_error(jax.jvp(f, (x,), (x,))[1], jacobian @ ROWS[0]) < 2e-6
  y_bar = random(2, y.shape)
  for g in (f, jax.checkpoint(f)):
    assert (
      relative_error(jax.vjp(g, x)[1](y_bar)[0], np.tensordot(y_bar, jacobian, y_bar.ndim)) < 2e-6
    )


@every_function
def test_shapes_are_known_without_running(name):
  x = jax.ShapeDtypeStruct((4,), jnp.float32)
  y = jax.eval_shape(FUNCTIONS[name], x)
  assert (y.shape, y.dtype) == (VALUE(name).shape, jnp.float32)
  assert jax.eval_shape(jax.jacfwd(FUNCTIONS[name]), x).shape == (*y.shape, 4)
  assert jax.eval_shape(jax.jacrev(FUNCTIONS[name]), x).shape == (*y.shape, 4)


class VariantsTest(chex.TestCase):
  """Compiled or not, on a device or on the host: chex runs each test once for each."""

  @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
  def test_value_and_gradient(self):
    for name in (SOFT, INTEGER, "logsumexp"):
      value, gradient = self.variant(jax.value_and_grad(FUNCTIONS[name]))(ROWS[0])
      assert relative_error(value, VALUE(name)) < 1e-6
      assert relative_error(gradient, JACOBIAN(name)) < 1e-6


# vmap over every argument.

ALL_ARGUMENTS = {  # f of all its arrays, and one example of each for each of two rows
  "softmax": lambda x, where: softmax(x, where=where),
  "log_softmax": lambda x, where: log_softmax(x, where=where),
  "logsumexp": lambda x, b, where: logsumexp(x, b=b, where=where),
  SOFT: lambda x, t, where: softmax_cross_entropy(x, t, where=where),
  INTEGER: lambda x, t, where: softmax_cross_entropy_with_integer_labels(x, t, where=where),
}
MASKS = np.array([[True, True, False, True], [True, True, True, False]])
SECONDS = {
  "logsumexp": np.stack([SECOND["weighted logsumexp"], SECOND["weighted logsumexp"][::-1]]),
  SOFT: np.where(MASKS, random(3, (2, 4)), 0).astype(np.float32),
  INTEGER: np.int32([0, 1]),
}


def arguments(name):
  return [ROWS, *([SECONDS[name]] if name in SECONDS else []), MASKS]


def mappings():
  """Every argument mapped alone along its first axis, and all or most of them along the last."""
  for name in ALL_ARGUMENTS:
    n = len(arguments(name))
    alone = [tuple(0 if i == j else None for i in range(n)) for j in range(n)]
    yield from ((name, axes) for axes in (*alone, (-1,) * n, (-1, None, -1)[-n:]))


@pytest.mark.parametrize(("name", "in_axes"), list(mappings()))
def test_vmap_over_every_argument(name, in_axes):
  # An argument that is not mapped is that of the first row. Labels have only one axis.
  args = [
    v[0] if axis is None else v.T if axis == -1 else v
    for v, axis in zip(arguments(name), in_axes, strict=True)
  ]
  x_dots, y_bars = random(4, (2, 4)), random(5, (2, 4) if name.endswith("softmax") else (2,))

  def derivatives(x_dot, y_bar, x, *rest):
    f = lambda x: ALL_ARGUMENTS[name](x, *rest)
    y, y_dot = jax.jvp(f, (x,), (x_dot,))
    return y, y_dot, jax.vjp(f, x)[1](y_bar)[0]

  actual = jax.jit(jax.vmap(derivatives, (0, 0, *in_axes)))(x_dots, y_bars, *args)
  for i in range(2):
    x, *second, where = [
      v[0 if axis is None else i] for v, axis in zip(arguments(name), in_axes, strict=True)
    ]
    y, jvp, vjp = oracle.linearize(name, x, *second, where=where)
    for a, e in zip(actual, (y, jvp(x_dots[i]), vjp(y_bars[i])[0]), strict=True):
      assert relative_error(a[i], e) < 2e-6


LABELS, TARGETS = np.array([0, 3, 1]), np.abs(random(6, (3, 5)))
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2}
SHARED = {  # functions of rows and of what a batch of them shares
  "integer": lambda x, w, s, t: softmax_cross_entropy_with_integer_labels(
    x, LABELS, class_weights=w, sample_weights=s, **OPTIONS
  ),
  "soft": lambda x, w, s, t: softmax_cross_entropy(
    x, t, class_weights=w, sample_weights=s, **OPTIONS
  ),
  "linear": lambda x, w, s, t: linear_softmax_cross_entropy(
    x, t, LABELS, class_weights=w, sample_weights=s, reduction="none", **OPTIONS
  ),
  "entropy": lambda x, w, s, t: s * softmax_entropy(x * w),
  "divergence": lambda x, w, s, t: s * softmax_kl_divergence(x * w, t, temperature=w[0]),
}


@pytest.mark.parametrize("name", SHARED)
def test_second_derivatives_by_what_a_batch_shares(name):
  # The rows of the linear loss are of 3 features, and t is its weight.
  features = 3 if name == "linear" else 5
  f, x = SHARED[name], random(7, (2, 3, features))
  shared = np.abs(random(8, 5)) + 0.5, np.array([1, 0, -2], np.float32), TARGETS
  args = x, *shared
  dots = tuple(map(np.cos, args))
  total = lambda y: jnp.sum(jnp.sin(y))
  mapped = lambda x, *shared: total(jax.vmap(f, (0, None, None, None))(x, *shared))
  one_by_one = lambda x, *shared: sum(total(f(row, *shared)) for row in x)

  def derivatives(g):
    gradient = jax.grad(g, (0, 1, 2, 3))
    return jax.jvp(gradient, args, dots)[1], jax.vjp(gradient, *args)[1](dots)

  actual, expected = jax.jit(lambda: (derivatives(mapped), derivatives(one_by_one)))()
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert relative_error(a, e) < 2e-5


def test_vmap_of_the_gradient_by_weights_and_soft_labels():
  for name in ("logsumexp", SOFT):
    f = lambda t, x, name=name: ALL_ARGUMENTS[name](x, t, True)
    actual = jax.jit(jax.vmap(jax.grad(f)))(SECONDS[name], ROWS)
    for i in range(2):
      _, _, vjp = oracle.linearize(name, ROWS[i], SECONDS[name][i])
      assert relative_error(actual[i], vjp(1)[1]) < 1e-6


# shard_map.


@pytest.mark.devices(2)
@every_function
def test_shard_map(name):
  """Derivatives taken inside and outside of shard_map, with check_vma."""
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
  sharded = functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=PartitionSpec("rows"),
    out_specs=PartitionSpec("rows"),
    check_vma=True,
  )
  f = jax.vmap(FUNCTIONS[name])
  jacobian = {"forward": jax.jacfwd, "reverse": jax.jacrev}

  def run(x):
    outside = {mode: of(sharded(f))(x) for mode, of in jacobian.items()}
    inside = {mode: sharded(jax.vmap(of(FUNCTIONS[name])))(x) for mode, of in jacobian.items()}
    return sharded(f)(x), outside, inside

  y, outside, inside = jax.jit(run)(ROWS)
  assert relative_error(y, of_rows(0)(name)) < 1e-6
  for mode in jacobian:
    assert relative_error(outside[mode], of_batch(name)) < 2e-6, mode
    assert relative_error(inside[mode], of_rows(1)(name)) < 2e-6, mode


@pytest.mark.devices(2)
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
def test_shard_map_of_a_mean_loss_by_parameters_on_every_device(mode):
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
  features, labels = random(6, (6, 3)), np.arange(6, dtype=np.int32) % 4
  weight = random(7, (3, 4))

  def mean_loss(weight, features, labels):
    loss = softmax_cross_entropy_with_integer_labels(features @ weight, labels)
    return jax.lax.pmean(jnp.mean(loss), "rows")

  specs = PartitionSpec(), PartitionSpec("rows"), PartitionSpec("rows")
  mapped = {"mesh": mesh, "in_specs": specs, "out_specs": PartitionSpec(), "check_vma": True}
  derivative = getattr(jax, mode)
  outside = derivative(jax.shard_map(mean_loss, **mapped))
  inside = jax.shard_map(derivative(mean_loss), **mapped)
  _, _, vjp = oracle.linearize(INTEGER, features @ weight, labels)
  expected = features.T.astype(float) @ vjp(np.full(6, 1 / 6))[0]
  for gradient in jax.jit(lambda *args: [outside(*args), inside(*args)])(weight, features, labels):
    assert relative_error(gradient, expected) < 2e-6


@pytest.mark.devices(2)
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ["logsumexp", SOFT, INTEGER])
def test_shard_map_of_arguments_of_which_only_one_varies(name, mode):
  """The same logits everywhere with labels or weights for each device, and the other way round."""
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
  here, everywhere = PartitionSpec("rows"), PartitionSpec()
  f = {
    "logsumexp": lambda x, b: logsumexp(x, axis=-1, b=b),
    SOFT: softmax_cross_entropy,
    INTEGER: lambda x, t: softmax_cross_entropy_with_integer_labels(
      jnp.broadcast_to(x, (*t.shape, 4)), t
    ),
  }[name]
  derivative = getattr(jax, mode)

  def run(x, second, specs):
    total = lambda x, second: jax.lax.psum(jnp.sum(f(x, second)), "rows")
    return derivative(
      jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=True)
    )(x, second)

  second = SECONDS[name]
  cases = [(ROWS[:1], second, (everywhere, here))]
  if name != INTEGER:
    cases.append((ROWS, second[:1], (here, everywhere)))
  for x, second, specs in cases:
    actual = jax.jit(run, static_argnums=2)(x, second, specs)
    _, _, vjp = oracle.linearize(name, np.broadcast_to(x, (2, 4)), second)
    expected = vjp(np.ones(2))[0]
    expected = expected if len(x) == 2 else np.sum(expected, axis=0, keepdims=True)
    assert relative_error(actual, expected) < 2e-6


# A training loop.


@pytest.mark.without("disable_jit")
def test_train_step_is_traced_once_and_learns():
  features = random(8, (32, 5))
  labels = np.argmax(features @ random(9, (5, 3)), axis=1)

  def mean_loss(weight, features, labels):
    return jnp.mean(softmax_cross_entropy_with_integer_labels(features @ weight, labels))

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(weight, features, labels):
    loss, gradient = jax.value_and_grad(mean_loss)(weight, features, labels)
    return weight - 0.5 * gradient, loss

  chex.clear_trace_counter()
  weight = jnp.zeros((5, 3))
  losses = []
  for _ in range(40):
    weight, loss = step(weight, features, labels)
    losses.append(float(loss))
  assert losses[0] == pytest.approx(np.log(3), rel=1e-6)
  assert losses[-1] < 0.4 * losses[0]
  assert all(after < before for before, after in itertools.pairwise(losses))
