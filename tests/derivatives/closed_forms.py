"""Every function of softmax_jax.derivatives, and the same by autodiff and by the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from oracle import random, wide

from softmax_jax import derivatives

MATRICES = (
  "softmax_jacobian",
  "log_softmax_jacobian",
  "logsumexp_hessian",
  "cross_entropy_hessian",
)
PRODUCTS = ("softmax_jvp", "softmax_vjp", "softmax_hvp", "cross_entropy_hvp")
GRADIENTS = ("integer_gradient", "soft_gradient")


def functions(x, y_bar, x_dot, labels, probabilities):
  """Every function of the module at the same arguments, each as a function of x alone."""
  d = derivatives
  return {
    **{name: getattr(d, name) for name in MATRICES},
    "softmax_jvp": lambda x: d.softmax_jvp(x, x_dot),
    "softmax_vjp": lambda x: d.softmax_vjp(x, y_bar),
    "softmax_hvp": lambda x: d.softmax_hvp(x, y_bar, x_dot),
    "cross_entropy_hvp": lambda x: d.cross_entropy_hvp(x, x_dot),
    "integer_gradient": lambda x: d.cross_entropy_gradient(x, labels),
    "soft_gradient": lambda x: d.cross_entropy_gradient(x, probabilities),
  }


@jax.jit
def closed_forms(x, *args):
  return {name: f(x) for name, f in functions(x, *args).items()}


@functools.partial(jax.jit, static_argnums=0)
def further(mode, x, *args):
  """The closed forms differentiated once more; one row."""
  return {name: mode(f)(x) for name, f in functions(x, *args).items()}


gradient = jax.jit(derivatives.cross_entropy_gradient)


def arguments(seed, shape, dtype=np.float32, scale=3.0):
  """x, y_bar, x_dot, integer labels, and soft labels that do not sum to one."""
  x, y_bar, x_dot, t = (
    jnp.asarray(random(seed + i, shape, np.float64, s).astype(dtype))
    for i, s in enumerate((scale, 2.0, 3.0, 1.0))
  )
  labels = np.random.default_rng(seed).integers(0, max(shape[-1], 1), shape[:-1], np.int32)
  return x, y_bar, x_dot, labels, abs(t)


def by_autodiff(x, y_bar, x_dot, label, t):
  """The same for one row, by JAX's own derivatives of jax.nn and optax; each in both modes."""
  soft = lambda x: optax.softmax_cross_entropy(x, t)
  integer = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, label)
  vjp = lambda x: jax.vjp(jax.nn.softmax, x)[1](y_bar)[0]
  hessians = lambda f: (jax.jacfwd(jax.jacrev(f))(x), jax.jacrev(jax.jacrev(f))(x))
  both = lambda f: (jax.jacfwd(f)(x), jax.jacrev(f)(x))
  jvp = lambda f: jax.jvp(f, (x,), (x_dot,))[1]
  return {
    "softmax_jacobian": both(jax.nn.softmax),
    "log_softmax_jacobian": both(jax.nn.log_softmax),
    "logsumexp_hessian": hessians(jax.nn.logsumexp),
    "cross_entropy_hessian": hessians(integer),
    "softmax_jvp": (jvp(jax.nn.softmax),),
    "softmax_vjp": (vjp(x),),
    "softmax_hvp": (jvp(vjp), jax.jacrev(vjp)(x) @ x_dot),
    "cross_entropy_hvp": (jvp(jax.grad(integer)), jvp(jax.grad(soft)) / t.sum()),
    "integer_gradient": both(integer),
    "soft_gradient": both(soft),
  }


def by_oracle(x, y_bar, x_dot, labels, t):
  """The same, for any batch, in extended precision."""
  shape, K = x.shape, x.shape[-1]
  rows = [wide(v).reshape(-1, K) for v in (x, y_bar, x_dot, t)]
  results = {name: [] for name in functions(x, y_bar, x_dot, labels, t)}
  for z, c, v, t_row, label in zip(*rows, np.reshape(labels, -1), strict=True):
    j = oracle.jacobian("softmax", z)
    of_labels = lambda t, z=z: oracle.linearize("softmax_cross_entropy", z, t)[2](1.0)[0]
    row = {
      **dict.fromkeys(MATRICES, j),
      "log_softmax_jacobian": oracle.jacobian("log_softmax", z),
      **dict.fromkeys(("softmax_jvp", "cross_entropy_hvp"), j @ v),
      "softmax_vjp": c @ j,
      "softmax_hvp": np.einsum("ijk,i,k->j", oracle.hessian("softmax", z), c, v),
      "integer_gradient": of_labels(wide(np.arange(K) == label)),
      "soft_gradient": of_labels(t_row),
    }
    for name, value in row.items():
      results[name].append(value)
  return {
    name: np.array(value, np.longdouble).reshape(shape + (K,) * (name in MATRICES))
    for name, value in results.items()
  }
