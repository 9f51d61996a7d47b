"""The losses inside what people build with them: optimizers, models, exports, threads, pickles."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name

import softmax_jax
from softmax_jax import enable_forward_mode
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy
from softmax_jax.verify import check_derivatives

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 4)).astype(np.float32)
WEIGHT = RNG.standard_normal((4, 5)).astype(np.float32)
BIAS = RNG.standard_normal(5).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0])
LOGITS = X @ WEIGHT + BIAS


def plain_loss(weight, bias):
  """The mean loss of a linear layer in `jax.nn`, for values and gradients away from saturation."""
  log_a = jax.nn.log_softmax(X @ weight + bias[None])
  return -jnp.take_along_axis(log_a, LABELS[:, None], axis=1).mean()


def assert_near(ours, theirs):
  chex.assert_trees_all_close(ours, theirs, rtol=3e-6, atol=1e-7)


EXPECTED = jax.grad(plain_loss, argnums=(0, 1))(WEIGHT, BIAS)


# --- training -------------------------------------------------------------------------------------


def test_optax_step():
  def loss(params):
    return cross_entropy(X @ params["w"] + params["b"][None], LABELS, reduction="mean")

  optimizer = optax.sgd(0.5)
  params = {"w": jnp.asarray(WEIGHT), "b": jnp.asarray(BIAS)}

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  params, _ = step(params, optimizer.init(params))
  assert_near((params["w"], params["b"]), (WEIGHT - 0.5 * EXPECTED[0], BIAS - 0.5 * EXPECTED[1]))


@pytest.mark.long
def test_flax_nnx_step():
  nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
  model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
  model.kernel.set_value(jnp.asarray(WEIGHT))
  model.bias.set_value(jnp.asarray(BIAS))
  loss = lambda model: cross_entropy(model(X), LABELS, reduction="mean")
  gradients = nnx.jit(nnx.grad(loss))(model)
  assert_near((gradients.kernel.get_value(), gradients.bias.get_value()), EXPECTED)


@pytest.mark.long
def test_equinox_step():
  eqx = pytest.importorskip("equinox", reason="equinox is not installed")
  model = eqx.nn.Linear(4, 5, key=jax.random.key(0))
  where = lambda model: (model.weight, model.bias)
  model = eqx.tree_at(where, model, (jnp.asarray(WEIGHT.T), jnp.asarray(BIAS)))
  loss = lambda model: cross_entropy(jax.vmap(model)(X), LABELS, reduction="mean")
  gradients = eqx.filter_jit(eqx.filter_grad(loss))(model)
  assert_near((gradients.weight.T, gradients.bias), EXPECTED)


# --- transformations around and inside ------------------------------------------------------------


@pytest.mark.parametrize(
  "policy", ["everything_saveable", "nothing_saveable", "dots_saveable", "named"]
)
def test_checkpoint_policies(policy):
  policies = jax.checkpoint_policies
  chosen = (
    policies.save_only_these_names("logits") if policy == "named" else getattr(policies, policy)
  )

  @functools.partial(jax.checkpoint, policy=chosen)
  def loss(weight, bias):
    logits = checkpoint_name(X @ weight + bias[None], "logits")
    return cross_entropy(logits, LABELS, reduction="mean")

  assert_near(jax.jit(jax.grad(loss, argnums=(0, 1)))(WEIGHT, BIAS), EXPECTED)


@pytest.mark.long
def test_inside_and_outside_rules_of_a_user():
  one_hot = jax.nn.one_hot(LABELS, 5)
  loss = lambda z: softmax_jax.softmax_cross_entropy(z, one_hot).sum()

  @jax.custom_vjp
  def halved(z):  # the loss with half of its gradient
    return loss(z)

  fwd = lambda z: jax.vjp(loss, z)
  halved.defvjp(fwd, lambda pull, bar: (pull(bar)[0] / 2,))
  outer = enable_forward_mode(halved)

  @jax.custom_jvp
  def clipped(z):
    return jnp.clip(z, -1, 1)

  clipped.defjvp(lambda z, z_dot: (clipped(*z), *z_dot))  # straight through
  gradient = jax.grad(lambda z: cross_entropy(clipped(z), LABELS).sum())(LOGITS)
  a = jax.nn.softmax(jnp.clip(LOGITS, -1, 1))
  assert_near(gradient, a - one_hot)
  whole = jax.grad(loss)(LOGITS)
  assert_near(jax.grad(outer)(LOGITS), whole / 2)
  assert_near(jax.jvp(outer, (LOGITS,), (LOGITS,))[1], jnp.vdot(whole, LOGITS) / 2)


def test_control_flow():
  per_row = cross_entropy(LOGITS, LABELS)
  row = lambda pair: cross_entropy(*pair)
  assert_near(lax.map(row, (LOGITS, LABELS)), per_row)
  total = lax.scan(lambda s, pair: (s + row(pair), None), 0.0, (LOGITS, LABELS))[0]
  assert_near(total, per_row.sum())

  def loop(scale):  # a while loop has forward mode only
    body = lambda state: (state[0] + 1, state[1] + row((scale * LOGITS[0], 1)))
    return lax.while_loop(lambda state: state[0] < 3, body, (0, 0.0))[1]

  expected = 3 * jax.grad(lambda scale: row((scale * LOGITS[0], 1)))(1.0)
  assert_near(jax.jvp(loop, (1.0,), (1.0,))[1], expected)
  branch = lambda flag, z: lax.cond(flag, lambda z: cross_entropy(z, 1), lambda z: z.sum(), z)
  assert_near(jax.grad(branch, argnums=1)(False, LOGITS[0]), np.ones(5))
  assert_near(jax.grad(branch, argnums=1)(True, LOGITS[0]), jax.grad(cross_entropy)(LOGITS[0], 1))


def test_known_while_tracing():
  @jax.jit
  def f(x):
    with jax.ensure_compile_time_eval():
      table = softmax_jax.softmax(jnp.asarray(LOGITS))
      assert float(table[0].sum()) == pytest.approx(1)
    return x * table

  assert_near(f(2.0), 2 * jax.nn.softmax(LOGITS))


# --- programs that travel -------------------------------------------------------------------------

LINEAR = lambda x: softmax_jax.linear_softmax_cross_entropy(x, WEIGHT, jnp.arange(x.shape[0]) % 5)
EXPORTED = {
  "softmax": softmax_jax.softmax,
  "log_softmax": softmax_jax.log_softmax,
  "logsumexp": functools.partial(softmax_jax.logsumexp, axis=-1),
  "integer labels": lambda z: cross_entropy(z, jnp.arange(z.shape[0]) % 4, z_loss=0.1),
  "soft labels": lambda z: softmax_jax.softmax_cross_entropy(z, jnp.full_like(z, 0.25)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_a_symbolic_batch_size(name):
  """Value and gradient, written to bytes and read again."""
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  f = EXPORTED[name]
  both = lambda x: (f(x), jax.grad(lambda x: (f(x) * jnp.cos(f(x))).sum())(x))
  (batch,) = export.symbolic_shape("batch")
  exported = export.export(jax.jit(both))(jax.ShapeDtypeStruct((batch, 4), np.float32))
  loaded = export.deserialize(exported.serialize())
  for rows in (6, 2):
    assert_near(loaded.call(X[:rows]), both(X[:rows]))


@pytest.mark.long
def test_export_of_the_linear_loss():
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  exported = export.export(jax.jit(jax.value_and_grad(LINEAR)))(X)
  assert_near(export.deserialize(exported.serialize()).call(X), jax.value_and_grad(LINEAR)(X))


def test_lowering_for_gpus_needs_none():
  f = jax.jit(jax.value_and_grad(LINEAR))
  exported = export.export(f, platforms=("cpu", "cuda"))(X)
  assert exported.platforms == ("cpu", "cuda")
  assert_near(exported.call(X), f(X))


PUBLIC = [getattr(softmax_jax, name) for name in softmax_jax.__all__]


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
@pytest.mark.parametrize(
  "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_public_functions_are_copied_and_pickled_by_name(value, copied):
  assert copied(value) is value


def test_results_are_copied_and_pickled():
  report = check_derivatives(jnp.sin, np.ones(2, np.float32), checks=["vjp"])
  for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
    assert copied == report
    assert str(copied) == str(report)
  _, aux = cross_entropy(LOGITS, LABELS, return_aux=True)
  chex.assert_trees_all_equal(pickle.loads(pickle.dumps(aux)), aux)


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.long)])
def test_threads_that_call_one_function(compiled):
  """Among them the first calls, which all compile."""
  f = jax.value_and_grad(lambda z, c: cross_entropy(z, LABELS % z.shape[1], z_loss=c).sum())
  g = jax.jit(f) if compiled else f
  widths = [4, 5] * 8
  with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda width: g(LOGITS[:, :width], 0.1), widths))
  for width, result in zip(widths, results, strict=True):
    assert_near(result, f(LOGITS[:, :width], 0.1))
