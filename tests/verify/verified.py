"""Functions for `check_derivatives`, and the status of each check in a report."""

import jax
import jax.numpy as jnp
import numpy as np

from softmax_jax import enable_forward_mode

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


BESIDE_NUMBERS = ("structure", "residuals", "traces")
MODES = ("forward", "reverse")
ORDERS = [f"{a} over {b}" for a in MODES for b in MODES]


def statuses(report):
  return {row.check: row.status for row in report.rows}


def with_rule(f, bwd, fwd=None):
  """The function f of one array with the backward rule bwd(x, u), and with forward mode."""
  rule = jax.custom_vjp(f)
  rule.defvjp(fwd or (lambda x: (f(x), x)), lambda x, u: (bwd(x, u),))
  return enable_forward_mode(rule)


def oscillating(frequency):
  """x + 1e-3 sin(frequency x), whose rule gives half of the gradient."""
  f = lambda x: x + 1e-3 * jnp.sin(frequency * x)
  half = lambda x: 0.5 * (1 + 1e-3 * frequency * jnp.cos(frequency * x))
  return with_rule(f, lambda x, u: half(x) * u)
