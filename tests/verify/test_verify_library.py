"""The library's own functions under `check_derivatives`, as `softmax-jax verify` runs them."""

import pytest

import softmax_jax
from softmax_jax import derivatives
from softmax_jax.verify import CHECKS, library

CASES = [case for case in library.cases() if case.dtype == "float32"]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_derivatives(case):
  report = case.run().raise_if_failed()
  wanted = set(case.checks or CHECKS) - set(case.skip)
  assert {row.check.partition(":")[0] for row in report.rows} == wanted


def test_every_public_function_is_verified():
  verified = {case.name.partition("(")[0] for case in library.cases()}
  public = {name for name in softmax_jax.__all__ if not name[0].isupper()}
  assert verified == (public - {"enable_forward_mode"}) | {
    f"derivatives.{name}" for name in derivatives.__all__
  }


def test_every_dtype_is_verified():
  dtypes = {case.dtype for case in library.cases()}
  assert dtypes == set(library.DTYPES)
