"""The primitive `by_platform`: values of one program, derivatives of another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from softmax_jax import enable_forward_mode, log_softmax, softmax
from softmax_jax._forward_mode import PLATFORMS, IfAny, by_platform

X = np.float32([[0.5, 1.0, 2.0], [3.0, -1.0, 0.25]])
V = np.float32([[1.0, 2.0, -1.0], [0.5, 0.25, 4.0]])


def program(x, scale):
  return {"square": scale * x * x, "sign": jnp.sign(x).astype(jnp.int32)}


def other(x, scale):
  """Tells itself apart by its values, and cannot be differentiated."""
  square = jax.pure_callback(lambda x: x * x + 100, x, x, vmap_method="expand_dims")
  return {"square": scale * square, "sign": jnp.full(x.shape, 7, jnp.int32)}


def f(x, scale=2.0):
  return by_platform(program, {"cpu": other}, x, jnp.float32(scale))


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the program on a CPU")


@on_cpu
def test_the_platform_computes_the_value():
  for value in (jax.jit(f)(X), jax.jit(jax.vmap(f))(X), jax.vmap(jax.jit(f), in_axes=1)(X)):
    swapped = value["square"].shape != X.shape
    square = value["square"].T if swapped else value["square"]
    np.testing.assert_array_equal(square, 2 * (X * X + 100))
    np.testing.assert_array_equal(value["sign"], np.full(value["sign"].shape, 7))


@on_cpu
def test_in_shard_map_the_platform_computes_the_value():
  mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

  def g(x):
    return jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)["square"]

  np.testing.assert_array_equal(jax.jit(g)(X), 2 * (X * X + 100))
  batched = jax.vmap(g, in_axes=1, out_axes=1)
  np.testing.assert_array_equal(jax.jit(batched)(X), 2 * (X * X + 100))


def derivatives(f):
  square = lambda x, scale: f(x, scale)["square"]
  total = lambda x, scale: square(x, scale).sum() + f(x, scale)["sign"].sum()
  scan = lambda x: jax.lax.scan(lambda c, _: (c + 0.1 * square(c, 1.0), None), x, None, 2)[0]
  return {
    "jvp": jax.jvp(square, (X, 2.0), (V, 1.0))[1],
    "jvp by one": jax.jvp(lambda x: f(x, 2.0), (X,), (V,))[1]["square"],
    "grad": jax.grad(total, (0, 1))(X, 2.0),
    "vmap grad": jax.vmap(jax.grad(total), (0, None))(X, 2.0),
    "hessian": jax.hessian(total)(X[0], 2.0),
    "grad of jvp": jax.grad(lambda x: jax.jvp(square, (x, 2.0), (V, 1.0))[1].sum())(X),
    "checkpoint": jax.grad(jax.checkpoint(total))(X, 2.0),
    "scan": jax.jit(jax.jacrev(jax.jacfwd(scan)))(X[0]),
  }


def test_the_derivatives_are_those_of_the_function():
  with jax.disable_jit():
    expected = derivatives(program)  # of which that of the scan is a second derivative
  plain = lambda x, scale=2.0: by_platform(program, {}, x, jnp.asarray(scale, jnp.float32))
  mixed = lambda x, scale=2.0: by_platform(
    program, dict.fromkeys(PLATFORMS, program), x, jnp.asarray(scale, jnp.float32)
  )
  for actual in (derivatives(plain), derivatives(mixed)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


@on_cpu
def test_a_value_that_cannot_be_differentiated_has_the_derivatives_of_the_function():
  scaled = lambda x, scale: by_platform(program, {"cpu": other}, x, jnp.asarray(scale, x.dtype))
  total = lambda x, scale: scaled(x, scale)["square"].sum()
  value, (x_bar, scale_bar) = jax.jit(jax.value_and_grad(total, (0, 1)))(X, 2.0)
  np.testing.assert_allclose(value, 2 * np.sum(X * X + 100), rtol=1e-6)
  np.testing.assert_allclose(x_bar, 4 * X, rtol=1e-6)
  np.testing.assert_allclose(scale_bar, np.sum(X * X), rtol=1e-6)


def test_a_linear_function_is_transposed():
  def linear(x, y):
    return by_platform(lambda x, y: {"product": 2 * x * y, "sum": y + 1 * y}, {}, x, y)

  x_bar = jax.linear_transpose(lambda y: linear(X, y)["product"], X)(V)[0]
  np.testing.assert_allclose(x_bar, 2 * X * V, rtol=1e-6)
  both = jax.jit(lambda bars: jax.linear_transpose(lambda y: linear(X, y), X)(bars)[0])
  np.testing.assert_allclose(both({"product": V, "sum": X}), 2 * X * V + 2 * X, rtol=1e-6)


@pytest.mark.parametrize(
  ("f", "plain"), [(softmax, jax.nn.softmax), (log_softmax, jax.nn.log_softmax)]
)
def test_the_vjp_of_a_softmax_is_transposed(f, plain):
  y, pull = jax.vjp(f, X)
  expected = jax.jvp(plain, (X,), (V,))[1]
  np.testing.assert_allclose(jax.linear_transpose(pull, y)((V,))[0], expected, atol=1e-6)

  @enable_forward_mode
  @jax.custom_vjp
  def of_user(x):
    return f(x)

  of_user.defvjp(lambda x: (f(x), x), lambda x, y_bar: (jax.vjp(f, x)[1](y_bar)[0],))
  np.testing.assert_allclose(jax.jvp(of_user, (X,), (V,))[1], expected, atol=1e-6)


def test_other_platforms_get_the_function():
  exported = export.export(jax.jit(softmax), platforms=["oneapi"])(X)
  assert exported.platforms == ("oneapi",)


@on_cpu
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_batch_has_one_condition(axis):
  """Along any axis, and with operands that are not batched."""
  careful = lambda x, y: jnp.sum(x, keepdims=True) * y
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  f = lambda needed, quick, x, y: by_platform(
    lambda needed, quick, x, y: careful(x, y), {"cpu": IfAny(careful)}, needed, quick, x, y
  )
  over_rows = jax.vmap(f, (0, None, 0, None))  # of one axis of x, then of another
  size, rows = x.shape[axis], np.delete(x.shape, axis)[0]
  needed, y = np.zeros((size, rows), bool), np.float32(3)
  g = jax.jit(jax.vmap(over_rows, (0, None, axis, None)))
  quick = np.full((1,), -1, np.float32)
  np.testing.assert_array_equal(g(needed, quick, x, y), np.full((size, rows, 1), -1))
  needed[0, 1] = True
  sums = np.moveaxis(x, axis, 0).sum(-1, keepdims=True)
  np.testing.assert_array_equal(g(needed, quick, x, y), 3 * sums)
  assert "select" not in g.lower(needed, quick, x, y).as_text()


def test_only_the_program_of_the_platform_is_traced():
  traced = []

  def named(name):
    def g(x):
      traced.append(name)
      return x * len(name)

    return g

  g = lambda x: by_platform(named("function"), {p: named(p) for p in PLATFORMS[1:]}, x)
  for platform in PLATFORMS:
    traced.clear()
    jax.clear_caches()
    export.export(jax.jit(g), platforms=[platform])(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert traced == ["function", *([] if platform == "cpu" else [platform])]


def test_one_program_is_exported_for_several_platforms():
  both = lambda x: by_platform(lambda x: x + 1, {"cuda": lambda x: x + 2}, x)
  exported = export.export(jax.jit(both), platforms=["cpu", "cuda"])(
    jax.ShapeDtypeStruct((), jnp.float32)
  )
  if jax.default_backend() in ("cpu", "gpu"):
    expected = 2 if jax.default_backend() == "cpu" else 3
    assert exported.call(jnp.float32(1)) == expected
