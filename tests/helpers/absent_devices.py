"""GPUs and TPUs that XLA compiles for though they are not there."""

import pytest

from softmax_jax.benchmark import targets


def required(target):
  """The target; the test is skipped where what compiles for it is not installed."""
  try:
    targets.require(target)
  except targets.MissingError as error:
    pytest.skip(str(error))
  return target
