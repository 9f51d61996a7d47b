"""Logits spread over a mesh without shard_map: JAX partitions the program, and gathers no logits.

With automatic axes of the mesh the compiler decides how; with explicit ones the types say it.
"""

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, found_in
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import relative_error
from partitioning_cases import (
  AXIS_TYPES,
  FUNCTIONS,
  VALUES,
  H,
  T,
  V,
  fitting,
  integer,
  integer_with_options,
  linear_with_options,
  mesh_of,
  placed,
  soft_with_options,
)

from softmax_jax import (
  derivatives,
  linear_softmax_cross_entropy,
  logsumexp,
  softmax,
  softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels,
)

pytestmark = pytest.mark.devices(8)


@pytest.mark.few(7)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_logits_are_gathered_and_the_numbers_are_those_of_one_device(name, axis_type):
  f, by, others = FUNCTIONS[name]
  mesh = mesh_of(AXIS_TYPES[axis_type])
  g = jax.jit(jax.value_and_grad(f, tuple(range(len(by)))))
  names = by + others
  with jax.set_mesh(mesh):
    args = placed(mesh, names)
    both = g.lower(*args).compile()
    value, grads = both(*args)
    programs = collectives(f, *args), found_in(both.as_text())
  expected, expected_grads = g(*(jnp.asarray(VALUES[name]) for name in names))
  assert relative_error(value, expected) < 1e-6
  for a, e, arg in zip(grads, expected_grads, args, strict=False):
    assert relative_error(a, e) < 2e-6
    assert a.sharding.is_equivalent_to(arg.sharding, a.ndim)
  for program in programs:
    assert program
    kinds = {kind for kind, _ in program}
    assert kinds == {"all-reduce"}
    for _, shapes in program:
      # The gradient by what all tokens share is a sum over the devices that hold tokens.
      assert not any({V, V // 4} & {*shape} and {T, T // 2} & {*shape} for shape in shapes)


REPLICATED, OTHER_WAY = P(), {1: P("v"), 2: P("v", "d")}


def mixes(names, other_ways=True):
  """Specs in which one argument differs from the others, which are sharded or replicated."""
  alike = fitting(names)
  for i, name in enumerate(names):
    replaced = lambda specs, spec, i=i: [*specs[:i], spec, *specs[i + 1 :]]
    yield replaced(alike, REPLICATED)
    yield replaced([REPLICATED] * len(names), alike[i])
    if other_ways:
      spec = P("d") if name in ("class_weights", "bias") else OTHER_WAY[VALUES[name].ndim]
      yield replaced(alike, spec)


def types_of_gradients(name, args):
  """The types of the differentiated arguments, and of their gradients."""
  f, by, _ = FUNCTIONS[name]
  grads = jax.eval_shape(jax.grad(f, tuple(range(len(by)))), *args)
  return [[*map(jax.typeof, xs)] for xs in (args[: len(by)], grads)]


@pytest.mark.few(8)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_spread_as_arguments_that_are_not_spread_alike(name):
  _, by, others = FUNCTIONS[name]
  names = by + others
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    for specs in mixes(names, "y_bar" not in names):  # by which it multiplies itself
      expected, actual = types_of_gradients(name, placed(mesh, names, specs))
      assert actual == expected, specs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_on_no_mesh_go_with_those_that_are_spread(name):
  """To `jax.jit` NumPy arrays are on no mesh, even under `jax.set_mesh`."""
  _, by, others = FUNCTIONS[name]
  names = by + others
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    spread = placed(mesh, names)
    for i in range(-1, len(names)):
      args = [a if j == i else VALUES[names[j]] for j, a in enumerate(spread)]
      expected, actual = types_of_gradients(name, args)
      assert [t.sharding.spec for t in actual] == [t.sharding.spec for t in expected]


def test_numbers_of_arguments_that_are_not_spread_alike():
  mesh = mesh_of(AxisType.Explicit)
  of_logits = "logits", "probabilities", "class_weights", "mask", "labels"
  of_linear = "x", "weight", "bias", "class_weights", "labels"

  def total(logits, probabilities, linear_args):
    (z, _, w, m, t), p = logits, probabilities
    return (
      integer_with_options(z, w, m, t)
      + soft_with_options(z, p, w, m)
      + logsumexp(z, -1, b=p).sum()
      + jnp.sum(softmax(z, where=m) * p)
      + linear_with_options(*linear_args)
    )

  def both(*args):
    of_logits, of_linear = args[:5], args[5:]
    by = lambda z, p, w, x, weight, bias: total(
      (z, p, w, *of_logits[3:]), p, (x, weight, bias, w, of_linear[-1])
    )
    moving = *of_logits[:3], *of_linear[:3]
    return jax.value_and_grad(by, tuple(range(6)))(*moving)

  f = jax.jit(both)
  expected = f(*(jnp.asarray(VALUES[name]) for name in (*of_logits, *of_linear)))
  specs = P("d"), P(None, "v"), P(), P("d", "v"), P()
  with jax.set_mesh(mesh):
    args = placed(mesh, of_logits, specs)
    args += placed(mesh, of_linear, [P(), P(), P("v"), P("v"), P("d")])
    actual = f(*args)
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert relative_error(a, e) < 2e-6


def closed_forms(z, y_bar, p, labels):
  return (
    derivatives.softmax_jacobian(z),
    derivatives.log_softmax_jacobian(z),
    derivatives.logsumexp_hessian(z),
    derivatives.cross_entropy_hessian(z),
    derivatives.softmax_jvp(z, y_bar),
    derivatives.softmax_vjp(z, y_bar),
    derivatives.softmax_hvp(z, y_bar, p),
    derivatives.cross_entropy_hvp(z, y_bar),
    derivatives.cross_entropy_gradient(z, p),
    derivatives.cross_entropy_gradient(z, labels),
  )


CLOSED_FORMS = ["logits", "y_bar", "probabilities", "labels"]


def test_closed_forms_of_classes_that_are_spread():
  mesh = mesh_of(AxisType.Explicit)
  f = jax.jit(closed_forms)
  expected = f(*(jnp.asarray(VALUES[name]) for name in CLOSED_FORMS))
  with jax.set_mesh(mesh):
    actual = f(*placed(mesh, CLOSED_FORMS, [P("d", "v"), P("d"), P("v"), P()]))
  for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
    assert relative_error(a, e) < 2e-6
    # Of a matrix the rows are.
    assert jax.typeof(a).sharding.spec == (P("d", "v", None) if i < 4 else P("d", "v"))


def test_closed_forms_of_arguments_that_are_not_spread_alike():
  mesh = mesh_of(AxisType.Explicit)
  total = lambda *args: sum(jnp.sum(y**2) for y in closed_forms(*args))
  with jax.set_mesh(mesh):
    for specs in mixes(CLOSED_FORMS):
      args = placed(mesh, CLOSED_FORMS, specs)
      grads = jax.eval_shape(jax.grad(total, (0, 1, 2)), *args)
      assert [*map(jax.typeof, grads)] == [*map(jax.typeof, args[:3])], specs


def test_several_class_axes_are_merged_or_refused():
  loss = lambda z, w, m, t: softmax_cross_entropy_with_integer_labels(
    z, t, axis=(1, 2), where=m, class_weights=w
  ).sum()
  z, m = (VALUES[name].reshape(T, 4, -1) for name in ("logits", "mask"))
  w, t = VALUES["class_weights"].reshape(4, -1), VALUES["labels"]
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    others = put(w, P(None, "v")), put(m, P(None, "d", "v")), put(t, P())
    args = put(z, P("d", "v")), *others
    grads = jax.eval_shape(jax.grad(loss, (0, 1)), *args)
    assert [*map(jax.typeof, grads)] == [*map(jax.typeof, args[:2])]
    with pytest.raises(ValueError) as raised:
      jax.eval_shape(loss, put(z, P("d", None, "v")), *others)
  assert str(raised.value) == (
    "softmax_cross_entropy_with_integer_labels expected logits to be spread along the first of "
    "several class axes, axis=(1, 2), got these spread over the mesh axes None, 'v'. Pass "
    "jax.sharding.reshard(logits, ...)."
  )


def test_rows_may_be_spread_alone():
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    logits = jax.device_put(VALUES["logits"], NamedSharding(mesh, P(("d", "v"), None)))
    labels = jax.device_put(VALUES["labels"], NamedSharding(mesh, P(("d", "v"))))
    g = jax.value_and_grad(integer)
    program = jax.jit(g).lower(logits, labels).compile()
    value, grad = program(logits, labels)
  assert not any(len(s) > 1 for _, shapes in found_in(program.as_text()) for s in shapes)
  expected, expected_grad = jax.jit(g)(VALUES["logits"], VALUES["labels"])
  assert relative_error(value, expected) < 1e-6
  assert relative_error(grad, expected_grad) < 1e-6


def test_forward_mode_and_second_order_with_explicit_axes():
  mesh = mesh_of(AxisType.Explicit)

  def derivatives(z, p, labels, z_dot):
    losses = lambda z: (
      softmax_cross_entropy(z, p),
      softmax_cross_entropy_with_integer_labels(z, labels),
    )
    total = lambda z: sum(jnp.sum(loss**2) for loss in losses(z))
    return jax.jvp(losses, (z,), (z_dot,))[1], jax.jvp(jax.grad(total), (z,), (z_dot,))[1]

  names = "logits", "probabilities", "labels", "y_bar"
  with jax.set_mesh(mesh):
    actual = jax.jit(derivatives)(*placed(mesh, names))
  expected = jax.jit(derivatives)(*(VALUES[name] for name in names))
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("axis", [0, -1])
def test_the_linear_loss_takes_chunks_of_the_tokens_of_each_device(axis):
  mesh = mesh_of(AxisType.Explicit)
  weight = VALUES["weight"] if axis else VALUES["weight"].T
  spec = P(None, "v") if axis else P("v", None)

  def loss(x, weight, labels):
    return linear_softmax_cross_entropy(x, weight, labels, vocab_axis=axis, chunk_size=3)

  shape = (2, T // 2, H)  # two axes of tokens, of which the second is spread
  x, labels = VALUES["x"].reshape(shape), VALUES["labels"].reshape(shape[:2])
  with jax.set_mesh(mesh):
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = put(x, P(None, "d", None)), put(weight, spec), put(labels, P(None, None))
    g = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, grads = g(*args)
  expected, expected_grads = g(x, weight, labels)
  assert relative_error(value, expected) < 1e-6
  for a, e in zip(grads, expected_grads, strict=True):
    assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize(
  "x_spec, weight_spec",
  [
    (P(None, "d"), P(None, "v")),  # features of x
    (P("d", None), P("d", "v")),  # those of the weight, over the axis of the tokens
    (P(("d", "v"), None), P(None, "v")),  # classes over that axis
  ],
)
def test_the_linear_loss_gathers_what_is_spread_in_a_way_that_does_not_fit(x_spec, weight_spec):
  mesh = mesh_of(AxisType.Explicit)
  f = jax.jit(jax.value_and_grad(linear_with_options, (0, 1)))
  names = ["x", "weight", "bias", "class_weights", "labels"]
  with jax.set_mesh(mesh):
    args = placed(mesh, names, [x_spec, weight_spec, P("v"), P("v"), P("d")])
    value, grads = f(*args)
    assert [jax.typeof(g).sharding.spec for g in grads] == [x_spec, weight_spec]
  expected, expected_grads = f(*(jnp.asarray(VALUES[name]) for name in names))
  assert relative_error(value, expected) < 1e-6
  for a, e in zip(grads, expected_grads, strict=True):
    assert relative_error(a, e) < 2e-6
