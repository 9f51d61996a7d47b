"""enable_forward_mode under every transformation and nesting, against plain JAX."""

import pytest
from comparisons import assert_close, fast_jit
from custom_rules import make_orbit, make_spiral, orbit, spiral, with_orbit_tangent, with_tangent
from transformation_cases import TRANSFORMATIONS


def check_transformation(transformation, functions, reference):
  transform = TRANSFORMATIONS[transformation]
  *ours, expected = fast_jit(lambda: [transform(f) for f in (*functions, reference)])()
  for actual in ours:
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformation(transformation):
  check_transformation(transformation, [make_spiral(), make_spiral(enable=with_tangent)], spiral)


@pytest.mark.parametrize(
  "transformation",
  ["linearize", "hessian", "vmap jacfwd", "jacrev vmap", "jacfwd scan", "jacrev scan"],
)
def test_transformation_of_a_rule_that_scans(transformation):
  functions = [make_orbit(), make_orbit(enable=with_orbit_tangent)]
  check_transformation(transformation, functions, orbit)
