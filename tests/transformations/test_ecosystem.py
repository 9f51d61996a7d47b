"""The losses inside what people build with them: optimizers, models, exports, threads, pickles."""

import asyncio
import copy
import functools
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ecosystem_losses import (
  BIAS,
  EXPECTED,
  LABELS,
  LINEAR_LOSS,
  LOGITS,
  LOSSES,
  ONE_HOT,
  WEIGHT,
  X,
  assert_near,
  plain_loss,
  several_steps,
  trained,
)
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name
from oracle import relative_error

import softmax_jax
from softmax_jax import derivatives, enable_forward_mode
from softmax_jax import softmax_cross_entropy_with_integer_labels as cross_entropy
from softmax_jax.verify import check_derivatives


@pytest.mark.parametrize("name", LOSSES)
def test_optax_steps(name):
  assert_near(trained(LOSSES[name]), trained(plain_loss))


@pytest.mark.long
def test_flax_nnx_steps():
  nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

  def steps(loss):
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(WEIGHT))
    model.bias.set_value(jnp.asarray(BIAS))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
      of_model = lambda model: loss(model.kernel.get_value(), model.bias.get_value())
      value, gradients = nnx.value_and_grad(of_model)(model)
      optimizer.update(model, gradients)
      return value

    return several_steps(lambda *state: (step(*state), *state), model, optimizer)

  expected = trained(plain_loss)
  for loss in LOSSES.values():
    assert_near(steps(loss), expected)


@pytest.mark.long
def test_equinox_steps():
  eqx = pytest.importorskip("equinox", reason="equinox is not installed")
  optimizer = optax.sgd(0.5)

  def steps(loss):
    model = eqx.nn.Linear(4, 5, key=jax.random.key(0))
    where = lambda model: (model.weight, model.bias)
    model = eqx.tree_at(where, model, (jnp.asarray(WEIGHT.T), jnp.asarray(BIAS)))

    @eqx.filter_jit
    def step(model, state):
      of_model = lambda model: loss(model.weight.T, model.bias)
      value, gradients = eqx.filter_value_and_grad(of_model)(model)
      updates, state = optimizer.update(gradients, state)
      return value, eqx.apply_updates(model, updates), state

    return several_steps(step, model, optimizer.init(eqx.filter(model, eqx.is_array)))

  expected = trained(plain_loss)
  for loss in LOSSES.values():
    assert_near(steps(loss), expected)


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

  @functools.partial(jax.checkpoint, policy=chosen)
  def linear(weight, bias):
    features = checkpoint_name(jnp.asarray(X), "logits")
    return LINEAR_LOSS(features, weight, LABELS, bias=bias)

  gradients = lambda *args: [jax.grad(f, argnums=(0, 1))(*args) for f in (loss, linear)]
  assert_near(jax.jit(gradients)(WEIGHT, BIAS), [EXPECTED, EXPECTED])


@pytest.mark.long
def test_inside_and_outside_rules_of_a_user():
  loss = lambda z: softmax_jax.softmax_cross_entropy(z, ONE_HOT).sum()

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
  assert_near(gradient, a - ONE_HOT)
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


@pytest.mark.long
def test_more_control_flow():
  z = jnp.asarray(LOGITS)
  reduced = lambda z: lax.associative_scan(
    lambda a, b: softmax_jax.logsumexp(jnp.stack([a, b]), axis=0), z
  )
  assert_near(reduced(z), lax.cumlogsumexp(z))
  assert_near(jax.grad(lambda z: reduced(z)[-1].sum())(z), jax.nn.softmax(z, axis=0))
  branches = [lambda z, f=f: f(z).sum() for f in (softmax_jax.softmax, softmax_jax.log_softmax)]
  branches.append(lambda z: cross_entropy(z, 1))
  choose = lambda i, z: jax.grad(lambda z: lax.switch(i, branches, z))(z)
  chosen = jax.vmap(choose)(jnp.arange(3), z[:3])
  assert_near(chosen, jnp.stack([jax.grad(f)(row) for f, row in zip(branches, z, strict=False)]))
  body = lambda _, w: w - jax.grad(LOSSES["linear"])(w, BIAS)
  plain = lambda _, w: w - jax.grad(plain_loss)(w, BIAS)
  assert_near(*(lax.fori_loop(0, 3, step, WEIGHT) for step in (body, plain)))


def test_hessian_of_a_vmap():
  total = lambda z: jax.vmap(cross_entropy)(z, LABELS[:2]).sum()
  hessian = jax.hessian(total)(LOGITS[:2])
  blocks = derivatives.softmax_jacobian(LOGITS[:2])
  assert_near(hessian, jnp.einsum("iab,ij->iajb", blocks, jnp.eye(2)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linearized_linear_loss_is_transposed(reduction):
  f = lambda x: softmax_jax.linear_softmax_cross_entropy(
    x, WEIGHT, LABELS, chunk_size=2, reduction=reduction
  )
  dense = lambda x: cross_entropy(x @ WEIGHT, LABELS, reduction=reduction)
  y, push = jax.linearize(f, X)
  assert_near(push(X), jax.jvp(dense, (X,), (X,))[1])
  y_bar = jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))
  (transposed,) = jax.linear_transpose(push, X)(y_bar)
  a = jax.nn.softmax(X @ WEIGHT)
  rows = y_bar[:, None] if reduction == "none" else y_bar / len(X)
  assert_near(transposed, (a - ONE_HOT) * rows @ WEIGHT.T)


@pytest.mark.parametrize("name", ["integer labels", "soft labels"])
def test_transposed_vjp(name):
  f = {
    "integer labels": lambda z: cross_entropy(z, LABELS),
    "soft labels": lambda z: softmax_jax.softmax_cross_entropy(z, ONE_HOT, z_loss=0.1),
  }[name]
  vjp = lambda y_bar: jax.vjp(f, LOGITS)[1](y_bar)[0]
  y_bar = jnp.ones_like(jax.eval_shape(f, LOGITS))
  (tangent,) = jax.linear_transpose(vjp, y_bar)(LOGITS)
  assert_near(tangent, jax.jvp(f, (LOGITS,), (LOGITS,))[1])
  # The same map in forward mode, which both have.
  tangent = jax.jvp(vjp, (y_bar,), (jnp.cos(y_bar),))[1]
  assert_near(tangent, vjp(jnp.cos(y_bar)))


@pytest.mark.without("debug_nans", "disable_jit")  # under which JAX donates nothing
@pytest.mark.parametrize("name", ["integer labels", "soft labels"])
def test_donated_logits(name):
  f = {
    "integer labels": lambda z: cross_entropy(z, LABELS).sum(),
    "soft labels": lambda z: softmax_jax.softmax_cross_entropy(z, ONE_HOT).sum(),
  }[name]
  logits = jnp.array(LOGITS)
  value, gradient = jax.jit(jax.value_and_grad(f), donate_argnums=0)(logits)
  assert logits.is_deleted()
  assert_near((value, gradient), jax.value_and_grad(f)(LOGITS))


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
def test_export_with_a_symbolic_number_of_classes():
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  (classes,) = export.symbolic_shape("classes", constraints=["classes >= 2"])
  f = lambda z: (
    [softmax_jax.softmax(z), softmax_jax.log_softmax(z), softmax_jax.logsumexp(z, axis=-1)],
    jax.grad(lambda z: cross_entropy(z, LABELS, label_smoothing=0.1).sum())(z),
  )
  exported = export.export(jax.jit(f))(jax.ShapeDtypeStruct((6, classes), np.float32))
  for wide in (LOGITS, np.tile(LOGITS, 5)):
    assert_near(exported.call(wide), f(wide))


def test_export_of_the_options_of_the_losses_with_symbolic_sizes():
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  rows, classes = export.symbolic_shape("rows, classes")  # without constraints

  def loss(z, t, counts):
    smoothed = {"label_smoothing": 0.1, "reduction": "mean"}
    return (
      cross_entropy(z, t, where=counts, **smoothed)
      + cross_entropy(z, t[0], axis=None, **smoothed)
      + softmax_jax.softmax_cross_entropy(z, z, **smoothed)
    )

  shapes = [((rows, classes), np.float32), ((rows,), np.int32), ((rows,), bool)]
  f = jax.jit(jax.value_and_grad(loss))
  exported = export.export(f)(*(jax.ShapeDtypeStruct(*s) for s in shapes))
  labels, counts = LABELS.astype(np.int32), LABELS != 1
  for sizes in ((6, 5), (1, 1)):
    args = LOGITS[: sizes[0], : sizes[1]], labels[: sizes[0]], counts[: sizes[0]]
    assert_near(exported.call(*args), f(*args))


@pytest.mark.long
@pytest.mark.parametrize("tokens, reduction", [("6", "mean"), ("2*n", "none")])
def test_export_of_the_linear_loss_with_a_symbolic_number_of_classes(tokens, reduction):
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
  tokens, classes = export.symbolic_shape(f"{tokens}, classes", constraints=["classes >= 3"])

  @jax.jit
  def both(x, weight, bias, labels):
    def loss(x, weight, bias):
      all_columns, first_columns = (
        LINEAR_LOSS(
          x,
          weight,
          labels,
          bias=bias,
          class_weights=bias**2,
          label_smoothing=0.1,
          softcap=9.0,
          reduction=reduction,
          num_classes=num_classes,
        )
        for num_classes in (None, 3)
      )
      return jnp.sum(all_columns**2 + jnp.sin(first_columns))

    return jax.value_and_grad(loss, (0, 1, 2))(x, weight, bias)

  shapes = ((tokens, 4), np.float32), ((4, classes), np.float32), ((classes,), np.float32)
  shapes = *shapes, ((tokens,), np.int32)
  exported = export.export(both)(*(jax.ShapeDtypeStruct(*s) for s in shapes))
  for repeats in (1, 30):
    wide = np.tile(WEIGHT, repeats), np.tile(BIAS, repeats)
    args = X, *wide, (LABELS % 3).astype(np.int32)
    for a, e in zip(*map(jax.tree.leaves, (exported.call(*args), both(*args))), strict=True):
      assert relative_error(a, e) < 2e-6


@pytest.mark.long
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_export_of_the_linear_loss_with_a_symbolic_number_of_tokens(reduction):
  pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

  def both(x):
    loss = lambda x: LINEAR_LOSS(x, WEIGHT, jnp.arange(x.shape[0]) % 5, reduction=reduction).sum()
    return jax.value_and_grad(loss)(x)

  (tokens,) = export.symbolic_shape("2*n")
  exported = export.export(jax.jit(both))(jax.ShapeDtypeStruct((tokens, 4), np.float32))
  loaded = export.deserialize(exported.serialize())
  for rows in (6, 2):
    assert_near(loaded.call(X[:rows]), both(X[:rows]))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_symbolic_number_of_tokens_makes_whole_chunks(chunk_size):
  (batch,) = export.symbolic_shape("batch")
  f = jax.jit(
    lambda x, t: softmax_jax.linear_softmax_cross_entropy(x, WEIGHT, t, chunk_size=chunk_size)
  )
  shapes = jax.ShapeDtypeStruct((batch, 4), np.float32), jax.ShapeDtypeStruct((batch,), np.int32)
  with pytest.raises(ValueError) as raised:
    export.export(f)(*shapes)
  assert str(raised.value) == (
    "linear_softmax_cross_entropy expected a chunk_size that divides the symbolic number of "
    f"tokens, batch, got {chunk_size}. Pass chunk_size=512 for "
    "jax.export.symbolic_shape('512*n'), say."
  )


def test_a_symbolic_number_of_classes_needs_a_chunk_size():
  (classes,) = export.symbolic_shape("classes")
  f = jax.jit(lambda weight: softmax_jax.linear_softmax_cross_entropy(X, weight, LABELS))
  with pytest.raises(ValueError) as raised:
    export.export(f)(jax.ShapeDtypeStruct((4, classes), np.float32))
  assert str(raised.value) == (
    "linear_softmax_cross_entropy expected a chunk_size for the symbolic number of classes, "
    "classes, got None. Pass chunk_size=512, say: the memory is that of the logits of as many "
    "tokens."
  )


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


@enable_forward_mode
@jax.custom_vjp
def square(x):
  return x * x


square.defvjp(lambda x: (x * x, x), lambda x, y_bar: (2 * x * y_bar,))


def test_functions_of_a_user_are_copied_and_pickled_by_name():
  """JAX's own custom_vjp functions cannot be."""
  for copied in (copy.copy(square), copy.deepcopy(square), pickle.loads(pickle.dumps(square))):
    assert copied is square


def test_results_are_copied_and_pickled():
  report = check_derivatives(jnp.sin, np.ones(2, np.float32), checks=["vjp"])
  for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
    assert copied == report
    assert str(copied) == str(report)
  _, aux = cross_entropy(LOGITS, LABELS, return_aux=True)
  results = aux, jax.jit(jax.grad(plain_loss))(WEIGHT, BIAS), jax.jit(square)(BIAS)
  for copied in (copy.deepcopy(results), pickle.loads(pickle.dumps(results))):
    chex.assert_trees_all_equal(copied, results)


# --- threads and processes ------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.long)])
def test_threads_that_call_one_function(compiled):
  """Including the first calls, which compile at the same time."""
  f = jax.value_and_grad(lambda z, c: cross_entropy(z, LABELS % z.shape[1], z_loss=c).sum())
  g = jax.jit(f) if compiled else f
  widths = [4, 5] * 8
  with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda width: g(LOGITS[:, :width], 0.1), widths))
  for width, result in zip(widths, results, strict=True):
    assert_near(result, f(LOGITS[:, :width], 0.1))


MODES = {
  "grad": jax.grad,
  "jvp": lambda f: lambda *args: jax.jvp(f, args, args)[1],
  "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*args),
  "vmap": lambda f: lambda w, b: jax.vmap(jax.grad(f), (0, None))(jnp.stack([w, 2 * w]), b),
  "jit": lambda f: jax.jit(jax.value_and_grad(f)),
}
TASKS = [(mode, name) for mode in MODES for name in LOSSES]


def differentiate(task):
  mode, name = task
  return MODES[mode](LOSSES[name])(WEIGHT, BIAS)


@pytest.mark.long
def test_threads_that_differentiate_at_once():
  """Different functions in different modes, without `jax.jit` and with."""

  async def all_at_once():
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(8) as pool:
      return await asyncio.gather(
        *(loop.run_in_executor(pool, differentiate, t) for t in 2 * TASKS)
      )

  results = asyncio.run(all_at_once())
  for task, result in zip(2 * TASKS, results, strict=True):
    assert_near(result, differentiate(task))


@pytest.mark.long
def test_a_process_that_is_spawned():
  context = multiprocessing.get_context("spawn")
  task = ("grad", "linear")
  with ProcessPoolExecutor(1, mp_context=context) as pool:
    loss = functools.partial(cross_entropy, labels=LABELS, reduction="mean")
    value = pool.submit(loss, LOGITS)
    gradient, squared = pool.submit(differentiate, task), pool.submit(square, 3.0)
    assert_near(value.result(), loss(LOGITS))
    assert_near(gradient.result(), EXPECTED[0])
    assert squared.result() == 9
