"""chunked_softmax_cross_entropy against the dense loss of all logits of the same head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random, relative_error

from softmax_jax import chunked_softmax_cross_entropy as chunked
from softmax_jax import linear_softmax_cross_entropy as linear
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy

B, S, H, V = 2, 5, 3, 7
IGNORED = -1
LABELS = np.random.default_rng(0).integers(0, V, (B, S))
LABELS[0, 2] = IGNORED
SCALE = np.arange(B * S, dtype=np.int32).reshape(B, S) % 3 + 1


def head(params, x):
  """A norm, a scale per token of an integer dtype, a tied embedding and a softcap."""
  features, scale = x
  norm = jax.lax.rsqrt(jnp.mean(features**2, axis=-1, keepdims=True) + 1e-6)
  y = (params["scale"] * features * norm * scale[..., None]) @ params["embedding"].T
  return 3 * jnp.tanh(y / 3)


def dense(head, params, x, labels, reduction="mean", **options):
  return cross_entropy(head(params, x), labels, reduction=reduction, **options)


def arguments(dtype=np.float64):
  """What is differentiated: parameters, features and all options."""
  tree = {
    "params": {"scale": 1 + 0.1 * random(0, H), "embedding": random(1, (V, H))},
    "x": random(2, (B, S, H)),
    "class_weights": np.linspace(0.5, 2, V),
    "sample_weights": np.where(LABELS == 3, 0, random(3, (B, S))),
    "label_smoothing": 0.1,
    "z_loss": 0.03,
  }
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def outputs(f, reduction, **fixed):
  """The loss and the differentiable part of the aux."""

  def g(tree):
    options = {k: v for k, v in tree.items() if k not in ("params", "x")}
    options |= dict(ignore_index=IGNORED, reduction=reduction, return_aux=True)
    loss, aux = f(head, tree["params"], (tree["x"], SCALE), LABELS, **options, **fixed)
    return loss, *aux[:4]

  return g


# Chunks of 5 tokens make a loop; with 4 there is a smaller one too.
@pytest.mark.few(1)
@pytest.mark.parametrize(("reduction", "chunk_size"), [("mean", 4), ("none", 5)])
def test_every_derivative_in_float64(reduction, chunk_size):
  """Of the loss alone and with cotangents of the aux, by all arguments along random tangents."""
  with jax.enable_x64(True):
    tree = arguments()
    leaves, structure = jax.tree.flatten(tree)
    dots = [jnp.asarray(random(10 + i, x.shape, np.float64)) for i, x in enumerate(leaves)]
    tree_dot = structure.unflatten(dots)

    def along(f):
      return jax.jvp(f, (tree,), (tree_dot,))

    @jax.jit
    def derivatives():
      found = []
      for f, fixed in ((chunked, {"chunk_size": chunk_size}), (dense, {})):
        g = outputs(f, reduction, **fixed)
        alone = jax.grad(lambda tree, g=g: jnp.sum(jnp.sin(g(tree)[0])))
        mixed = jax.grad(lambda tree, g=g: sum(jnp.sum(jnp.sin(y)) for y in g(tree)))
        sines = lambda tree, f=alone: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(tree)))
        found.append((along(g), along(alone), mixed(tree), jax.grad(sines)(tree)))
      return found

    actual, expected = derivatives()
    paths = jax.tree_util.tree_leaves_with_path(actual)
    for (path, x), y in zip(paths, jax.tree.leaves(expected), strict=True):
      assert relative_error(x, y) < 1e-11, jax.tree_util.keystr(path)


def test_the_number_of_right_predictions():
  tree = arguments(np.float32)
  call = lambda f, **fixed: (
    f(
      head,
      tree["params"],
      (tree["x"], SCALE),
      np.argmax(head(tree["params"], (tree["x"], SCALE)), axis=-1),
      sample_weights=tree["sample_weights"],
      return_aux=True,
      **fixed,
    )[1].correct
  )
  assert call(chunked, chunk_size=5) == call(dense) == np.sum(LABELS != 3)


def of_matrix(weight, x):
  return x @ weight


def test_a_matrix_is_the_linear_loss_and_sixteen_bits_are_summed_in_float32():
  """Every chunk adds the same gradient, which bfloat16 would round away."""
  n = 1024
  x, weight = jnp.ones((n, H), jnp.bfloat16), jnp.asarray(random(1, (H, V)), jnp.bfloat16)
  labels = jnp.zeros(n, jnp.int32)
  gradients = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(weight, x)
  loss, mine = gradients(
    lambda w, x: chunked(of_matrix, w, x, labels, reduction="sum", chunk_size=1)
  )
  same, theirs = gradients(lambda w, x: linear(x, w, labels, reduction="sum", chunk_size=32))
  assert relative_error(loss, same) < 2e-2  # the logits of the head have sixteen bits
  for a, b in zip(mine, theirs, strict=True):
    assert a.dtype == b.dtype == jnp.bfloat16
    assert relative_error(a, b) < 2e-2


def num_products(f, *args):
  return str(jax.make_jaxpr(f)(*args)).count("dot_general")


def test_the_head_runs_once_and_what_is_frozen_takes_no_product():
  labels, x, weight = jnp.zeros(4, jnp.int32), jnp.ones((4, H)), jnp.ones((H, V))
  f = functools.partial(chunked, of_matrix, chunk_size=2)
  loss = lambda w, x, **options: jnp.sum(f(w, x, labels, **options))
  assert num_products(loss, weight, x) == 1
  assert num_products(jax.grad(loss, (0, 1)), weight, x) == 3
  assert num_products(jax.grad(loss), weight, x) == 2
  of_losses = functools.partial(loss, reduction="none")
  assert num_products(jax.grad(of_losses, (0, 1)), weight, x) == 4


def test_no_array_is_as_large_as_all_logits():
  n, large = 64, 512
  weight, x = (jnp.ones(shape, jnp.float32) for shape in ((H, large), (n, H)))
  args = weight, x, jnp.zeros(n, jnp.int32)
  loss = lambda w, x, labels: chunked(of_matrix, w, x, labels, chunk_size=8)
  tangent = lambda *args: jax.jvp(
    jax.grad(lambda w: loss(w, *args[1:])), args[:1], (jnp.ones_like(args[0]),)
  )
  for f in (jax.grad(loss, (0, 1)), tangent):
    memory = jax.jit(f).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * large * 4


def test_dropout_with_a_key_for_each_token():
  def dropped(weight, x):
    features, keys = x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (H,)))(keys)
    return jnp.where(kept, 2 * features, 0) @ weight

  keys, features = jax.random.split(jax.random.key(0), 6), jnp.asarray(random(0, (6, H)))
  args = jnp.asarray(random(1, (H, V))), (features, keys), jnp.arange(6)
  gradients = [
    jax.jit(jax.grad(functools.partial(f, dropped)))(*args)
    for f in (functools.partial(chunked, chunk_size=2), dense)
  ]
  assert relative_error(*gradients) < 1e-6


def test_integer_parameters_and_a_closure_over_known_arrays():
  shift = jnp.linspace(0, 1, V)
  shifted = lambda p, x: x @ p["weight"] + jnp.where(p["mask"], shift, -jnp.inf)
  params = {"weight": jnp.asarray(random(1, (H, V))), "mask": jnp.arange(V) != 3}
  args = params, jnp.asarray(random(0, (4, H))), jnp.zeros(4, jnp.int32)
  gradient = lambda f: jax.jit(jax.grad(functools.partial(f, shifted), allow_int=True))(*args)
  in_chunks = gradient(functools.partial(chunked, chunk_size=2))
  assert relative_error(in_chunks["weight"], gradient(dense)["weight"]) < 1e-6


@pytest.mark.devices(2)
@pytest.mark.parametrize("kind", ["manual", "explicit", "automatic"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_spread_over_devices(kind, reduction):
  axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
  mesh = jax.make_mesh((2,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:2])
  weight, x = jnp.asarray(random(1, (H, V))), jnp.asarray(random(0, (8, H)))
  labels = jnp.arange(8) % V

  def loss(weight, x, labels):
    f = functools.partial(chunked, of_matrix, reduction=reduction, chunk_size=2)
    if kind != "manual":
      return jnp.sum(f(weight, x, labels))
    summed = lambda *args: jax.lax.psum(jnp.sum(f(*args)), "d")
    in_specs = P(), P("d"), P("d")
    return jax.shard_map(summed, mesh=mesh, in_specs=in_specs, out_specs=P())(weight, x, labels)

  expected = jax.grad(lambda *args: dense(of_matrix, *args, "sum"), (0, 1))(weight, x, labels)
  specs = P(), P("d"), P("d")
  args = [
    jax.device_put(a, NamedSharding(mesh, spec))
    for a, spec in zip((weight, x, labels), specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.grad(loss, (0, 1)))(*args)
  for a, b in zip(actual, expected, strict=True):
    assert relative_error(a, b) < 1e-6


def test_what_cannot_be_hashed_is_a_head_too():
  class Model:
    __hash__ = None

    def head(self, weight, x):
      return x @ weight

  args = jnp.ones((H, V)), jnp.ones((4, H)), jnp.zeros(4, jnp.int32)
  assert chunked(Model().head, *args) == chunked(of_matrix, *args)


@pytest.mark.parametrize("shape", [(0,), ()])
def test_without_tokens_and_with_a_single_one(shape):
  x, labels = jnp.ones((*shape, H)), jnp.zeros(shape, jnp.int32)
  loss, gradient = jax.value_and_grad(lambda x: chunked(of_matrix, jnp.ones((H, V)), x, labels))(x)
  assert relative_error(loss, np.log(V) * labels.size) < 1e-6 if labels.size else loss == 0
  assert gradient.shape == x.shape


NAME = "chunked_softmax_cross_entropy"
X, WEIGHT = (jnp.ones(shape, jnp.float32) for shape in ((4, H), (H, V)))
INDEX = jnp.zeros(4, jnp.int32)
ERRORS = {
  "no function": (
    lambda: chunked(WEIGHT, WEIGHT, X, INDEX),
    TypeError,
    f"{NAME} expected head to be a function of params and x, got ArrayImpl.",
  ),
  "number of tokens": (
    lambda: chunked(of_matrix, WEIGHT, X[1:], INDEX),
    ValueError,
    f"{NAME} expected features for labels of shape (4,), so that x (or each array in it) has the "
    "shape (4, Ellipsis), got shape (3, 3).",
  ),
  "no features": (
    lambda: chunked(of_matrix, WEIGHT, (), INDEX),
    ValueError,
    f"{NAME} expected x to hold at least one array of features.",
  ),
  "a closure over a tracer": (
    lambda: jax.jit(lambda m: chunked(lambda w, x: x @ w + m, WEIGHT, X, INDEX))(jnp.ones(V)),
    ValueError,
    f"{NAME} expected head to close over no array that JAX is tracing, such as one of shape (7,) "
    "here. Pass it in params.",
  ),
  "two outputs": (
    lambda: chunked(lambda w, x: (x @ w, x), WEIGHT, X, INDEX),
    TypeError,
    f"{NAME} expected head(params, x) to return one array of logits, got PyTreeDef((*, *)).",
  ),
  "integer logits": (
    lambda: chunked(lambda w, x: x.astype(int), WEIGHT, X, INDEX),
    TypeError,
    f"{NAME} expected head(params, x) to return logits of a floating dtype of at least 16 bits, "
    "got int32.",
  ),
  "one row for all tokens": (
    lambda: chunked(lambda w, x: (x @ w)[:1], WEIGHT, X, INDEX),
    ValueError,
    f"{NAME} expected head(params, x) to return one row of logits per token, [2, V] for two "
    "tokens of labels of shape (4,), got shape (1, 7).",
  ),
  "one number per token": (
    lambda: chunked(lambda w, x: x[:, 0], WEIGHT, X, INDEX),
    ValueError,
    f"{NAME} expected head(params, x) to return one row of logits per token, [2, V] for two "
    "tokens of labels of shape (4,), got shape (2,).",
  ),
}


@pytest.mark.without("enable_x64", "disable_jit")
@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
  with pytest.raises(error) as found:
    call()
  assert str(found.value) == message
