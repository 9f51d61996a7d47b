"""Functions of rows that are spread over a mesh, and derivatives of second order of them."""

import jax
import jax.numpy as jnp
import numpy as np
from mesh_cases import (
  CASES,
  LOGITS,
  MASK,
  PROBABILITIES,
  SAME,
  SPREAD,
  mesh,
  soft,
)
from oracle import relative_error

from softmax_jax import log_softmax, softmax


def every_derivative(f, args, count):
  """Value, first derivatives and nestings of two modes, by the first ``count`` arguments."""
  moving, others = args[:count], args[count:]
  dots = tuple(jnp.cos(3 * x) for x in moving)
  g = lambda *moving: f(*moving, *others)
  total = lambda *moving: jnp.sum(jnp.sin(g(*moving)))
  gradient = jax.grad(total, tuple(range(count)))
  along = lambda *moving: jax.jvp(g, moving, dots)[1]
  return {
    "value": g(*moving),
    "gradient": gradient(*moving),
    "forward": along(*moving),
    "forward over reverse": jax.jvp(gradient, moving, dots)[1],
    "reverse over reverse": jax.vjp(gradient, *moving)[1](dots),
    "forward over forward": jax.jvp(along, moving, dots)[1],
  }


def assert_close(actual, expected):
  for what, e in expected.items():
    for a, b in zip(*map(jax.tree.leaves, (actual[what], e)), strict=True):
      assert a.dtype == b.dtype == np.float64
      assert relative_error(a, b) < 1e-11, what


def wide(a):
  a = np.asarray(a)
  return a.astype(np.float64) if a.dtype == np.float32 else a


# A batch that is spread over another axis of the mesh than the classes.

B = 4

# Rows of a few classes on each device take another way.
SHORT = {
  "softmax of short rows": (lambda n, z: softmax(z, axis_name=n), [LOGITS[:, :32]], [SPREAD], 1),
  "masked log_softmax of short rows": (
    lambda n, z, m: jnp.exp(log_softmax(z, where=m, axis_name=n)),
    [LOGITS[:, :32], MASK[:, :32]],
    [SPREAD, SPREAD],
    1,
  ),
  "soft labels of short rows": (
    lambda n, z, t: soft(z, t, axis_name=n),
    [LOGITS[:, :32], PROBABILITIES[:, :32]],
    [SPREAD, SPREAD],
    2,
  ),
}
BATCHED = {
  **{case: (f, args, specs, count) for case, (f, args, specs, _, count, *_) in CASES.items()},
  **SHORT,
}


def on_mesh(case):
  f, args, specs, count = BATCHED[case]
  out_specs = SPREAD if "softmax" in case else SAME
  local = lambda *args: f("v", *args)
  g = jax.shard_map(local, mesh=mesh(2, 4), in_specs=tuple(specs), out_specs=out_specs)
  return g, lambda *args: f(None, *args), args, count


def batched(a):
  """Rows in other orders, so that labels and masks fit their logits; scalars of other sizes."""
  a = wide(a)
  return np.stack([np.roll(a, i, 0) if a.ndim else a * (1 + i / 4) for i in range(B)])


def in_axes_of(count):
  """All arguments batched, each alone, and all but one."""
  yield (0,) * count
  if count > 1:
    yield from {tuple(0 if i == j else None for i in range(count)) for j in range(count)}
  if count > 2:
    yield from {tuple(None if i == j else 0 for i in range(count)) for j in range(count)}
