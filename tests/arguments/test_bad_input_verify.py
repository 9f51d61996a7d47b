"""Reports and the options of check_derivatives, given what does not belong there."""

import inspect
import numbers

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hostile_values import FIXED, NEVER, X
from outcomes import outcome

from softmax_jax.verify import DerivativeError, Report, Row, check_derivatives


def _takes(name, value):
  """Whether an option of `check_derivatives` takes ``value``."""
  number = isinstance(value, numbers.Real) and value >= 0
  return {
    "f": callable(value),
    "reference": value is None or callable(value),
    "jacobian": value is None or callable(value),
    "kwargs": value is None or isinstance(value, dict),
    "edge_points": isinstance(value, (list, tuple)) and all(isinstance(p, tuple) for p in value),
    "checks": value is None or (isinstance(value, (list, tuple)) and not value),
    "skip": isinstance(value, (list, tuple)) and not value,
    "fast": type(value) is bool,
    "progress": value is None or callable(value),
    "bounds": value is None,
    "max_residual_bytes": value is None or number,
    "name": value is None or isinstance(value, str),
    "seed": number and isinstance(value, (int, np.integer)),
  }[name]


VERIFY = [p for p in inspect.signature(check_derivatives).parameters if p != "args"]


@pytest.mark.parametrize("option", VERIFY)
def test_the_options_of_check_derivatives(option):
  """Values that an option refuses, and those it accepts that do not start a check."""
  faults = []
  values = FIXED | {"[array]": lambda: [X], "[list, array]": lambda: [[X], X]}
  del values["np.timedelta64"]  # of which NumPy says that it is an integer
  for name, make in values.items():
    value = make()
    if _takes(option, value) and option in ("f", "reference", "jacobian", "kwargs", "progress"):
      continue  # and calls it
    given = {"f": jnp.sin, "checks": [], option: value}
    if (option == "checks" and value is None) or (option == "fast" and value is True):
      continue  # many checks
    _, message = outcome("check_derivatives", lambda given=given: _check(**given))
    if bool(message) == _takes(option, value) or message.startswith("NOT OURS"):
      faults.append(f"{name}: {message}")
  assert not faults, "\n".join(faults)


def _check(f, **kwargs):
  return check_derivatives(f, jnp.float32(0.5), **kwargs)


# Lists and the like are pytrees: the function under test decides what to make of them.
@pytest.mark.parametrize(
  "name",
  [n for n, make in NEVER.items() if isinstance(make(X), (np.ndarray, jax.Array))]
  + ["longdouble", ">f4"],
)
def test_arguments_of_check_derivatives_that_are_no_arrays_of_jax(name):
  make = NEVER.get(name, lambda x: x.astype(name))
  value = make(X)
  with pytest.raises(
    (TypeError, ValueError), match=r"^check_derivatives expected .*(args\[0\]|real)"
  ):
    check_derivatives(jnp.sin, value, checks=["value"])


def test_bounds_and_reports():
  for bounds, error in (
    ({"vjp": "1"}, TypeError),
    ({1: 1.0}, TypeError),
    ({"vjp": -1.0}, ValueError),
    ({"vjp": np.nan}, ValueError),
    ({"vpj": 1.0}, ValueError),
  ):
    with pytest.raises(error, match=r"^check_derivatives (expected|knows no) "):
      _check(jnp.sin, checks=[], bounds=bounds)
  row = Row("f", "vjp", "passed")
  for rows in (None, row, [row], (row, None), "ab", 3):
    with pytest.raises(TypeError, match=r"^Report expected a tuple of Row, got "):
      Report(rows)
  for other in (3, None, row, (row,)):
    with pytest.raises(TypeError, match="unsupported operand"):
      Report((row,)) + other
  assert Report((row,)) and not Report(())
  with pytest.raises(DerivativeError, match="not every derivative was confirmed"):
    Report(()).raise_if_failed()
