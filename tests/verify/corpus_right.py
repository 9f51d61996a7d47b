"""More than 200 right functions, in families, for `scoreboard.py`.

`functions()` yields a name, a function and its arguments.
"""

import functools
import itertools

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import optax

SCALES = (1e-20, 1e-10, 1e-4, 1e4, 1e10, 1e20)
DTYPES = ("float16", "bfloat16", "float64")


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), "float32")


def between(low, high, *shape):
  return jnp.asarray(np.random.default_rng(len(shape)).uniform(low, high, shape), "float32")


def positive_definite(n):
  a = normal(n, n)
  return a @ a.T + n * jnp.eye(n)


X, P, U = normal(2, 3), between(0.5, 2, 2, 3), between(-0.8, 0.8, 2, 3)
LABELS = jnp.array([0, 2])


def of_one_array():
  names = (
    "celu elu gelu glu hard_sigmoid hard_swish hard_tanh leaky_relu log_sigmoid log_softmax "
    "logmeanexp logsumexp mish relu relu6 selu sigmoid silu soft_sign softmax softplus "
    "sparse_plus sparse_sigmoid squareplus standardize"
  )
  for name in names.split():
    x = normal(2, 4)
    if hasattr(jax.nn, name):
      yield f"jax.nn.{name}", getattr(jax.nn, name), (x,)
  names = (
    "abs arcsinh arctan cbrt ceil cos cosh cumsum cumprod exp exp2 expm1 floor max mean median "
    "min negative prod ptp sign sin sinc sinh sort square std sum tan tanh var"
  )
  for name in names.split():
    yield f"jnp.{name}", getattr(jnp, name), (X,)
  for name in ["log", "log10", "log1p", "log2", "reciprocal", "sqrt"]:
    yield f"jnp.{name}", getattr(jnp, name), (P,)
  for name in ["arccos", "arcsin", "arctanh"]:
    yield f"jnp.{name}", getattr(jnp, name), (U,)
  for name in [
    "entr",
    "erf",
    "erfc",
    "erfinv",
    "expit",
    "i0",
    "i0e",
    "i1",
    "i1e",
    "log_ndtr",
    "ndtr",
    "ndtri",
  ]:
    x = between(0.1, 0.9, 2, 3) if name in ("entr", "erfinv", "ndtri") else X
    yield f"special.{name}", getattr(jsp.special, name), (x,)
  for name in ["digamma", "gammaln", "gamma", "logit"]:
    x = between(0.1, 0.9, 2, 3) if name == "logit" else P
    yield f"special.{name}", getattr(jsp.special, name), (x,)


def of_two_arrays():
  y = normal(2, 3, seed=1)
  names = "add arctan2 divide hypot logaddexp logaddexp2 maximum minimum multiply subtract"
  for name in names.split():
    yield f"jnp.{name}", getattr(jnp, name), (X, y)
  yield "jnp.power", jnp.power, (P, y)
  for name, f in (
    ("dot", lambda x, y: x @ y.T),
    ("outer", jnp.outer),
    ("kron", jnp.kron),
    ("einsum", lambda x, y: jnp.einsum("ij,kj->ik", x, y)),
    ("tensordot", lambda x, y: jnp.tensordot(x, y, axes=2)),
    ("cross", jnp.cross),
    ("inner", jnp.inner),
    ("vdot", jnp.vdot),
  ):
    yield f"jnp.{name}", f, (X, y)
  yield "jnp.convolve", jnp.convolve, (normal(5), normal(3))
  for name in ["betaln", "kl_div", "rel_entr", "xlogy", "xlog1py"]:
    yield f"special.{name}", getattr(jsp.special, name), (P, between(0.5, 2, 2, 3) + 0.1)
  for name in ["norm.logpdf", "norm.logcdf", "cauchy.logpdf", "laplace.logpdf", "logistic.logpdf"]:
    module, function = name.split(".")
    yield f"stats.{name}", getattr(getattr(jsp.stats, module), function), (X, y)


def linear_algebra():
  a, b = positive_definite(3), normal(3, 2)
  for name, f in (
    ("det", jnp.linalg.det),
    ("slogdet", lambda a: jnp.linalg.slogdet(a)[1]),
    ("inv", jnp.linalg.inv),
    ("cholesky", jnp.linalg.cholesky),
    ("eigvalsh", jnp.linalg.eigvalsh),
    ("singular values", lambda a: jnp.linalg.svd(a, compute_uv=False)),
    ("norm", jnp.linalg.norm),
    ("matrix_power", lambda a: jnp.linalg.matrix_power(a, 3)),
    ("trace", jnp.trace),
    ("expm", lambda a: jsp.linalg.expm(0.1 * a)),
    ("triu", jnp.triu),
    ("QR", lambda a: jnp.linalg.qr(a)[1]),
  ):
    yield f"linalg.{name}", f, (a,)
  yield "linalg.solve", jnp.linalg.solve, (a, b)
  solve = functools.partial(jsp.linalg.solve_triangular, lower=True)
  yield "linalg.solve_triangular", solve, (jnp.tril(a), b)
  yield "linalg.cho_solve", lambda a, b: jsp.linalg.cho_solve((a, True), b), (jnp.tril(a), b)
  yield "linalg.lstsq", lambda a, b: jnp.linalg.lstsq(a, b)[0], (normal(4, 2), normal(4, 1))


def of_shapes():
  for name, f in (
    ("reshape", lambda x: x.reshape(3, 2) ** 2),
    ("transpose", lambda x: jnp.sin(x).T),
    ("flip", lambda x: jnp.flip(x**2)),
    ("roll", lambda x: jnp.roll(x**2, 1)),
    ("pad", lambda x: jnp.pad(x**2, 1, mode="edge")),
    ("tile", lambda x: jnp.tile(x**2, (2, 1))),
    ("repeat", lambda x: jnp.repeat(x**2, 2, axis=0)),
    ("concatenate", lambda x: jnp.concatenate([x, jnp.sin(x)])),
    ("stack", lambda x: jnp.stack([x, jnp.sin(x)])),
    ("split", lambda x: jnp.split(jnp.sin(x), 3, axis=1)),
    ("diag", lambda x: jnp.diag(x[0] ** 2)),
    ("slice", lambda x: x[:, ::2] ** 2),
    ("where", lambda x: jnp.where(x > 0.1, jnp.sin(x), x**2)),
    ("clip", lambda x: jnp.clip(x, -0.5, 0.5)),
    ("top_k", lambda x: jax.lax.top_k(x, 2)[0]),
    ("segment_sum", lambda x: jax.ops.segment_sum(x**2, LABELS, 3)),
    ("scatter", lambda x: jnp.zeros((3, 3)).at[LABELS].add(x**2)),
    ("interp", lambda x: jnp.interp(x, jnp.linspace(-3, 3, 7), jnp.arange(7.0) ** 2)),
    ("FFT", lambda x: jnp.abs(jnp.fft.fft(x)) ** 2),
    ("resize", lambda x: jax.image.resize(x, (4, 6), "linear")),
  ):
    yield f"shapes: {name}", f, (X,)
  yield "shapes: take", lambda x, i: jnp.take(x**2, i, axis=1), (X, LABELS)
  yield "shapes: gather", lambda x, i: x[jnp.arange(2), i] ** 2, (X, LABELS)
  yield "shapes: dynamic_slice", lambda x, i: jax.lax.dynamic_slice(x, (0, i), (2, 2)), (X, 1)


def of_optax():
  y = normal(2, 3, seed=1)
  t = jax.nn.softmax(y)
  names = "squared_error l2_loss huber_loss log_cosh cosine_distance"
  for name in names.split():
    yield f"optax.{name}", getattr(optax, name), (X, y)
  names = "softmax_cross_entropy sigmoid_binary_cross_entropy kl_divergence"
  for name in names.split():
    x = jax.nn.log_softmax(X) if name == "kl_divergence" else X
    yield f"optax.{name}", getattr(optax, name), (x, t)
  yield "optax.integer labels", optax.softmax_cross_entropy_with_integer_labels, (X, LABELS)
  # By labels of 0 and 1 its derivative is wrong (`test_verify_scoreboard.py`).
  yield "optax.focal", optax.sigmoid_focal_loss, (X, 0.1 + 0.8 * jnp.round(t))
  yield "optax.hinge_loss", optax.hinge_loss, (X, jnp.sign(y))

  def step(x, g, optimizer):
    updates, _ = optimizer.update(g, optimizer.init(x), x)
    return optax.apply_updates(x, updates)

  for name in ("sgd", "rmsprop", "lion"):
    optimizer = getattr(optax, name)(0.1)
    yield f"optax.{name}", functools.partial(step, optimizer=optimizer), (X, y)

  def unrolled(x, y, optimizer):
    state = optimizer.init(x)
    for _ in range(5):
      updates, state = optimizer.update(jnp.sin(x) - y, state, x)
      x = optax.apply_updates(x, updates)
    return x

  for name in ("adam", "nadam"):
    optimizer = getattr(optax, name)(0.1)
    yield f"optax.{name}, unrolled", functools.partial(unrolled, optimizer=optimizer), (X, y)


def modules():
  image = normal(1, 4, 4, 2)
  for name, module, x in (
    ("Dense", flax.linen.Dense(3), X),
    ("LayerNorm", flax.linen.LayerNorm(), X),
    ("RMSNorm", flax.linen.RMSNorm(), X),
    ("Conv", flax.linen.Conv(2, (3, 3)), image),
    ("GroupNorm", flax.linen.GroupNorm(num_groups=1), image),
    ("attention", flax.linen.MultiHeadDotProductAttention(1), normal(1, 3, 2)),
  ):
    parameters = module.init(jax.random.key(0), x)
    yield f"flax.{name}", module.apply, (parameters, x)
  key = jax.random.key(0)
  for name, module, x in (
    ("Linear", equinox.nn.Linear(3, 2, key=key), X[0]),
    ("MLP", equinox.nn.MLP(3, 2, 4, 1, key=key), X[0]),
    ("LayerNorm", equinox.nn.LayerNorm(3), X[0]),
    ("Conv1d", equinox.nn.Conv1d(2, 2, 2, key=key), X),
    ("GRUCell", lambda x, h: equinox.nn.GRUCell(3, 2, key=key)(x, h), None),
  ):
    if x is None:
      yield f"equinox.{name}", module, (X[0], normal(2))
    else:
      yield f"equinox.{name}", lambda module, x: module(x), (module, x)


def control_flow():
  def rnn(x, w):
    def step(h, row):
      h = jnp.tanh(w @ h + row)
      return h, h

    return jax.lax.scan(step, x[0], x)

  def newton(a):
    step = lambda _, x: 0.5 * (x + a / x)
    return jax.lax.fori_loop(0, 6, step, jnp.ones_like(a))

  @jax.custom_jvp
  def log1pexp(x):
    return jnp.logaddexp(x, 0)

  log1pexp.defjvps(lambda dot, y, x: jax.nn.sigmoid(x) * dot)
  yield "control: scan", rnn, (X, normal(3, 3))
  yield "control: fori_loop", newton, (P,)
  yield "control: cond", lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), (X,)
  yield "control: switch", lambda i, x: jax.lax.switch(i, (jnp.sin, jnp.exp), x), (1, X)
  yield "control: map", lambda x: jax.lax.map(jnp.sin, x), (X,)
  yield "control: custom_jvp", log1pexp, (X,)
  yield "control: checkpoint", jax.checkpoint(lambda x: jnp.sin(jnp.exp(x))), (X,)
  yield "control: vmap", jax.vmap(lambda x: x / jnp.sum(x**2)), (X,)
  yield "control: jit", jax.jit(lambda x: jnp.tanh(x) ** 3), (X,)
  yield "control: gradient", jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2)), (X,)
  yield "control: associative_scan", lambda x: jax.lax.associative_scan(jnp.multiply, x), (P,)
  for rate in (0.1, 0.5):

    def dropout(key, x, rate=rate):
      return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x**2 / (1 - rate), 0)

    yield f"random: dropout {rate}", dropout, (jax.random.key(0), X)
  noise = lambda key, m, s: m + s * jax.random.normal(key, m.shape)
  yield "random: normal", noise, (jax.random.key(0), X, P)


def scales():
  for (name, f), scale in itertools.product(
    {
      "linear": lambda x, s: 2 * x + 1 * s,
      "tanh(x/s)": lambda x, s: jnp.tanh(x / s),
      "c sin": lambda x, s: s * jnp.sin(x / s),
      "softmax(x/s)": lambda x, s: jax.nn.softmax(x / s),
      "abs": lambda x, s: jnp.abs(x),
    }.items(),
    SCALES,
  ):
    yield f"scale {scale:g}: {name}", functools.partial(f, s=scale), (X * scale,)


def dtypes():
  for dtype, (name, f) in itertools.product(
    DTYPES,
    {
      "sin": jnp.sin,
      "softmax": jax.nn.softmax,
      "logsumexp": jax.nn.logsumexp,
      "gelu": jax.nn.gelu,
      "sum of squares": lambda x: jnp.sum(x**2),
      "matmul": lambda x: x @ x.T,
      "standardize": jax.nn.standardize,
      "cumsum": jnp.cumsum,
      "casts inside": lambda x: jnp.sin(x.astype("float32")).astype(x.dtype),
    }.items(),
  ):
    yield f"{dtype}: {name}", f, (np.asarray(X).astype(jnp.dtype(dtype)),)


FAMILIES = (
  *(of_one_array, of_two_arrays, linear_algebra, of_shapes, of_optax, modules),
  *(control_flow, scales, dtypes),
)


def functions():
  """A name, a function and its arguments, for each."""
  for family in FAMILIES:
    yield from family()
