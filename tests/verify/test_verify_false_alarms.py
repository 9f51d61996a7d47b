"""No false alarm: right functions of all kinds pass, whatever the arguments and cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from right_functions import FEWER_SEEDS, FUNCTIONS, OFTEN, draw

from softmax_jax.verify import check_derivatives, chosen_checks, run_checks, verifier


@pytest.mark.few(6)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_passes_with_some_seeds(name):
  passes_with_seeds(name, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_passes_with_many_seeds(name):
  passes_with_seeds(name, 10 if name in FEWER_SEEDS else 100)


def passes_with_seeds(name, count):
  f, specs = FUNCTIONS[name]
  v = verifier(f, *draw(specs, 0))
  for seed in range(count):
    checks = OFTEN if seed < 10 else OFTEN[:4]
    report = run_checks(v.at(draw(specs, seed), seed), checks).raise_if_failed()
    assert {row.check for row in report.rows if row.status == "passed"} == set(checks)


@pytest.mark.parametrize("name", ["integer labels", "scan"])
def test_passes_every_check(name):
  f, specs = FUNCTIONS[name]
  report = run_checks(verifier(f, *draw(specs, 0)), chosen_checks(None)).raise_if_failed()
  reasons = {row.check: row.reason for row in report.rows if row.status == "skipped"}
  assert set(reasons) <= {
    *("each_output", "each_argument", "jacobian: closed form", "residuals", "edge_points")
  }


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["softmax", "soft labels", "layer norm"])
def test_passes_in_sixteen_bits(name, dtype):
  f, specs = FUNCTIONS[name]
  v = verifier(f, *draw(specs, 0, dtype))
  for seed in range(5):
    run_checks(v.at(draw(specs, seed, dtype), seed), OFTEN).raise_if_failed()


@pytest.mark.parametrize("name", ["softmax", "relu"])
def test_passes_with_many_elements(name):
  """Some of 65,536 normal numbers lie within the smallest step of the kink of a relu."""
  f, specs = FUNCTIONS[name]
  v = verifier(f, *draw(specs, 0, scale=45))
  for seed in range(2):
    run_checks(v.at(draw(specs, seed, scale=45), seed), OFTEN).raise_if_failed()


EDGES = {  # and points with a kink, a logit of -inf, a large one or a coefficient of 0
  "kink of the gradient": (lambda x: x * jnp.abs(x), [[0, 1, 2, -1], [0, 0, 1, 0]]),
  "kink of one entry": (jax.nn.relu, [[0, 1, 2, -1]]),
  "equal maxima": (lambda x: jax.nn.relu(x - jnp.max(x)) + x**2, [[1, 1, 2, 2]]),
  "-inf": (jax.nn.log_softmax, [[-np.inf, 1, 2, 0], [0, -np.inf, -np.inf, 0]]),
  "large": (jax.nn.logsumexp, [[90, 1, 2, 0], [1e10, 0, 0, 1]]),
  "coefficient": (lambda x: x[..., 0] * jax.nn.logsumexp(x[..., 1:]) ** 2, [[0, 1, 2, 3]]),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", EDGES)
def test_passes_at_edge_points(name):
  f, rows = EDGES[name]
  points = [(np.float32(row),) for row in rows]
  for seed in range(3):
    x = np.random.default_rng(seed).uniform(0.1, 1, 4).astype(np.float32)
    report = check_derivatives(f, x, edge_points=points, checks=["edge_points"], seed=seed)
    report.raise_if_failed()
