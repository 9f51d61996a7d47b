"""The programs of `test_second_derivatives`: one per function, shape and dtype."""

import numpy as np
import plain
import pytest
from plain import FEW, LINEAR, MORE

INF, NAN = np.inf, np.nan
JUNK = (NAN, INF, -INF)

# Function, classes, dtype, and whether several cases are computed at once by `jax.vmap`.
DEFAULT = [
  ("integer", MORE, np.float32, True),
  ("soft", FEW, np.float32, False),
  ("linear, none", FEW, np.float32, False),
]
LONG = [
  ("integer", FEW, np.float64, False),
  ("soft", MORE, np.float32, True),
  ("integer", FEW, np.float32, True),
  ("integer", MORE, np.float32, False),
  ("soft", FEW, np.float64, False),
  ("soft", MORE, np.float32, False),
  ("linear, none", MORE, np.float64, False),
  ("linear, mean", MORE, np.float32, False),
  ("linear, sum", FEW, np.float32, True),
]


def programs(*functions):
  """A test for each of the programs of some functions."""
  return pytest.mark.parametrize(
    ("function", "classes", "dtype", "vmapped"),
    [
      pytest.param(
        *case,
        marks=() if case in DEFAULT else pytest.mark.long,
        id=f"{case[0]}-{case[1]}-{case[2].__name__}" + "-vmap" * case[3],
      )
      for case in DEFAULT + LONG
      if case[0] in functions
    ],
  )


every_loss = programs("integer", "soft", *LINEAR)
dense_losses = programs("integer", "soft")
batched = pytest.mark.parametrize("vmapped", [False, True], ids=["jit", "vmap"])


def assert_no_part(derivatives, args, hidden, unsure=None):
  """Exactly no derivative by the entries that each mask of ``hidden`` names, of either order.

  Nor one of first order by what is ``unsure``.
  """
  no_part, sure = plain.flat(args, hidden), ~plain.flat(args, unsure or {})
  np.testing.assert_array_equal(derivatives.gradient[no_part | ~sure], 0)
  for nesting, hvps in derivatives.hvps.items():
    np.testing.assert_array_equal(hvps[: len(args), no_part], 0, err_msg=nesting)
    hessian = hvps[len(args) :]
    if len(hessian):
      np.testing.assert_array_equal(hessian[np.ix_(sure, no_part)], 0, err_msg=nesting)
      np.testing.assert_array_equal(hessian[np.ix_(no_part, sure)], 0, err_msg=nesting)
