"""Tests of many cases, of which `pytest` runs a few and `pytest -m long` the others."""

import pytest


def quick_or_long(cases, quick):
  """The cases as parameters, of which those in `quick`, or for which it is true, are not `long`."""
  is_quick = quick if callable(quick) else lambda case: case in quick
  marks = lambda case: () if is_quick(case) else pytest.mark.long
  as_tuple = lambda case: case if isinstance(case, tuple) else (case,)
  return [pytest.param(*as_tuple(case), marks=marks(case)) for case in cases]
