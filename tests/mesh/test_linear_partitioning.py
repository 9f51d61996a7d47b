"""The linear loss of arguments that automatic axes of a mesh spread, and with `logits_sharding`.

Each device computes its share, and exchanges x, the weight and their gradients once at most. In the
loop over chunks devices exchange nothing but numbers per token.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import found_in
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random, relative_error

from softmax_jax import linear_softmax_cross_entropy as linear

pytestmark = pytest.mark.devices(8)

B, S, H, V = 8, 16, 24, 160  # on all eight devices together a chunk of 2 tokens has 4 each
X, WEIGHT, BIAS = random(0, (B, S, H)), random(1, (H, V), scale=0.3), random(2, V)
LABELS = np.random.default_rng(3).integers(0, V, (B, S))
COUNTS = np.where(np.arange(S) % 3, LABELS, -1)
CLASS_WEIGHTS = np.abs(random(4, V))
BOTH = "d", "v"
LAYOUTS = {  # how x, the weight, and the labels are spread
  "tokens": (P(BOTH), P(), P(BOTH)),
  "tokens of a sequence": (P("d", "v"), P(), P("d", "v")),
  "classes": (P(), P(None, BOTH), P()),
  "tokens and classes": (P("d"), P(None, "v"), P("d")),
  "features of the weight": (P(BOTH), P(BOTH), P(BOTH)),
  "features of the weight, and classes": (P("d"), P("d", "v"), P("d")),
  "classes over the axis of the tokens": (P(BOTH), P(None, "d"), P(BOTH)),
  "labels whole": (P(None, "d"), P(None, "v"), P()),
}


# That of the logits, which may be said too.
NAMED = {
  "tokens": P(BOTH),
  "tokens of a sequence": P("d", "v"),
  "classes": P(None, None, BOTH),
  "tokens and classes": P("d", None, "v"),
  "features of the weight": P(BOTH),
}


def losses(x, weight, bias, class_weights, labels, **options):
  out = linear(
    x,
    weight,
    labels,
    bias=bias,
    class_weights=class_weights,
    ignore_index=-1,
    label_smoothing=0.1,
    z_loss=0.01,
    **options,
  )
  return jnp.sum(out**2)


def mesh_of(axis_type=AxisType.Auto):
  return jax.make_mesh((2, 4), BOTH, axis_types=(axis_type,) * 2)


def placed(layout):
  mesh = mesh_of()
  x, weight, labels = LAYOUTS[layout]
  of_classes = P(*weight[1:])
  arrays = X, WEIGHT, BIAS, CLASS_WEIGHTS, COUNTS
  specs = x, weight, of_classes, of_classes, labels
  return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]


def assert_close(actual, expected, tolerance=3e-6):
  for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert relative_error(a, e) < tolerance


def gradients(**options):
  f = lambda *args: losses(*args, **options)
  return jax.value_and_grad(f, (0, 1, 2, 3))


def compiled(args, **options):
  """The program whose gradients are spread like the arguments, as in a training step."""
  spread = tuple(arg.sharding for arg in args[:4])
  return jax.jit(gradients(**options), out_shardings=(None, spread)).lower(*args).compile()


OF_LOSSES = "tokens of a sequence", "features of the weight, and classes"


@pytest.mark.few(3)
@pytest.mark.parametrize(
  "layout, reduction",
  [*((layout, "mean") for layout in LAYOUTS), *((layout, "none") for layout in OF_LOSSES)],
)
def test_numbers_are_those_of_one_device_and_little_is_exchanged(layout, reduction):
  args, options = placed(layout), {"reduction": reduction, "chunk_size": 2}
  check_against_one_device(compiled(args, **options), args, options)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", NAMED)
def test_the_same_where_the_sharding_of_the_logits_is_said(layout):
  args, options = placed(layout), {"chunk_size": 2}
  named = NamedSharding(args[0].sharding.mesh, NAMED[layout])
  check_against_one_device(compiled(args, logits_sharding=named, **options), args, options)


def check_against_one_device(program, args, options):
  actual = program(*args)
  expected = jax.jit(gradients(**options))(X, WEIGHT, BIAS, CLASS_WEIGHTS, COUNTS)
  assert_close(actual, expected)

  text = program.as_text()
  loops = "\n".join(line for line in text.splitlines() if "while/body" in line)
  size = lambda shape: math.prod(shape)
  for _, shapes in found_in(loops):
    assert sum(map(size, shapes)) <= 8 * 2  # of a chunk
  large = [s for _, shapes in found_in(text) for s in shapes if size(s) > 8 * B * S]
  of_weight = [s for s in large if {*s} & {V, V // 2, V // 4, V // 8}]
  assert len(of_weight) <= 2  # the weight and its gradient
  assert len(large) - len(of_weight) <= 2  # x and its gradient


@pytest.mark.few(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_computes_its_share(layout):
  if layout == "classes over the axis of the tokens":
    pytest.skip("the weight is gathered")
  flops = lambda args: compiled(args, chunk_size=B * S).cost_analysis()["flops"]
  whole = jax.jit(gradients(chunk_size=B * S)).lower(X, WEIGHT, BIAS, CLASS_WEIGHTS, COUNTS)
  share = flops(placed(layout)) / whole.compile().cost_analysis()["flops"]
  assert share < 1.1 / 8


def test_classes_that_do_not_divide_are_padded_and_a_mesh_may_be_set():
  options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
  f = jax.jit(
    lambda x, weight, bias, **more: jax.vjp(
      lambda *args: linear(args[0], args[1], LABELS % 50, bias=args[2], **options, **more),
      x,
      weight,
      bias,
    )[1](jnp.cos(LABELS)),
    static_argnames="logits_sharding",
  )
  args = X, WEIGHT[:, :50], BIAS[:50]
  expected = f(*args)
  for axis_type in (AxisType.Auto, AxisType.Explicit):
    with jax.set_mesh(mesh_of(axis_type)):
      actual = f(*args, logits_sharding=P("d", None, "v"))
    assert_close(actual, expected)


def test_a_sharding_of_the_logits_that_cannot_be():
  mesh = mesh_of()
  by_sequence = NamedSharding(mesh, P(None, "v"))
  with pytest.raises(ValueError) as raised:
    linear(X[:, :3], WEIGHT, LABELS[:, :3], logits_sharding=by_sequence)
  assert str(raised.value) == (
    "linear_softmax_cross_entropy expected labels of shape (8, 3) to be cut into equal parts over "
    f"the mesh axis 'v' of size 4, as logits_sharding={P(None, 'v')} says. Pad them, and pass "
    "ignore_index."
  )
  f = lambda x: linear(x, WEIGHT, LABELS[:1], logits_sharding=by_sequence)
  with pytest.raises(ValueError) as raised:
    jax.shard_map(f, mesh=mesh, in_specs=P(BOTH), out_specs=P(BOTH))(X)
  assert str(raised.value) == (
    "linear_softmax_cross_entropy expected no logits_sharding inside jax.shard_map. Pass "
    "axis_name, if the classes are spread there."
  )


def model(parameters, tokens, labels, **options):
  return linear(jnp.tanh(parameters["embedding"][tokens]), parameters["head"], labels, **options)


def trained(parameters, tokens, **options):
  """The losses of some steps of gradient descent, by the next token."""
  step = jax.jit(jax.value_and_grad(lambda p, *data: model(p, *data, chunk_size=2, **options)))
  losses = []
  for _ in range(4):
    loss, gradient = step(parameters, tokens[:, :-1], tokens[:, 1:])
    parameters = jax.tree.map(lambda p, g: p - 5 * g, parameters, gradient)
    losses.append(loss)
  return np.array(losses)


@pytest.mark.few(3)
@pytest.mark.parametrize("named", [False, True], ids=["automatic", "named"])
@pytest.mark.parametrize(
  "head, logits",
  [
    (P(), P(BOTH)),  # data
    (P(None, BOTH), P(None, None, BOTH)),  # tensor
    (P(None, "v"), P("d", None, "v")),  # data and tensor
    (P(BOTH), P(BOTH)),  # FSDP
  ],
  ids=["data", "tensor", "data and tensor", "FSDP"],
)
def test_a_model_is_trained_as_on_one_device(head, logits, named):
  mesh = mesh_of()
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  parameters = {"embedding": random(5, (V, H)), "head": 0.1 * WEIGHT}
  tokens = np.random.default_rng(6).integers(0, V, (B, 9))
  expected = trained(parameters, tokens)
  assert expected[-1] < 0.9 * expected[0]
  spread = {"embedding": put(parameters["embedding"], P()), "head": put(parameters["head"], head)}
  options = {"logits_sharding": NamedSharding(mesh, logits)} if named else {}
  actual = trained(spread, put(tokens, P(*logits[:1])), **options)
  assert relative_error(actual, expected) < 1e-5


def test_a_batch_of_losses():
  """`jax.vmap` does without custom partitioning."""
  args = placed("tokens")
  batch = lambda f: jax.jit(jax.vmap(f, (None, 0, None, None, None)))
  weights = jnp.stack([WEIGHT, -WEIGHT])
  actual = batch(gradients(chunk_size=2))(args[0], weights, *args[2:])
  alone = jax.jit(gradients(chunk_size=2))
  expected = [alone(X, w, BIAS, CLASS_WEIGHTS, COUNTS) for w in weights]
  for i, each in enumerate(expected):
    assert_close(jax.tree.map(lambda a, i=i: a[i], actual), each)


@pytest.mark.long
def test_derivatives_of_both_modes_and_of_second_order():
  def derivatives(x, weight, bias, class_weights, labels):
    f = lambda x, weight: losses(x, weight, bias, class_weights, labels, chunk_size=2)
    dots = jnp.cos(x), jnp.cos(weight)
    tangent = jax.jvp(f, (x, weight), dots)[1]
    return tangent, jax.jvp(jax.grad(f, (0, 1)), (x, weight), dots)[1]

  actual = jax.jit(derivatives)(*placed("tokens and classes"))
  expected = jax.jit(derivatives)(X, WEIGHT, BIAS, CLASS_WEIGHTS, COUNTS)
  assert_close(actual, expected, 1e-5)


def test_tokens_that_do_not_divide_are_whole_on_each_device():
  mesh = mesh_of()
  spread = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("d"))) * 1)
  f = jax.jit(jax.value_and_grad(lambda x, w: linear(spread(x), w, LABELS[0, :3]), (0, 1)))
  actual, expected = (
    f(X[0, :3], WEIGHT),
    jax.jit(jax.value_and_grad(linear, (0, 1)))(X[0, :3], WEIGHT, LABELS[0, :3]),
  )
  assert_close(actual, expected)


def test_a_program_for_several_devices_can_be_exported():
  args = placed("tokens and classes")
  exported = jax.export.export(jax.jit(gradients(chunk_size=2)))(*args)
  assert not re.search("CustomSPMDPartitioning", exported.mlir_module())
  actual = jax.export.deserialize(exported.serialize()).call(*args)
  expected = jax.jit(gradients(chunk_size=2))(X, WEIGHT, BIAS, CLASS_WEIGHTS, COUNTS)
  assert_close(actual, expected)
