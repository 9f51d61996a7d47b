"""What holds of masked rows of any values: the largest, subnormal, infinite, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_cases import (
  EXTREME,
  INF,
  MORE_EXTREME,
  PROPERTIES,
  compiled,
  draw_many,
  extreme,
  property_of,
)
from row_formulas import (
  BOUNDS,
  assert_entries,
  assert_gradient,
  functions_and_gradients,
  of_one_row,
)


@property_of(extreme(EXTREME), many=(extreme(MORE_EXTREME),))
def test_masked_functions_are_those_of_what_is_left(case):
  """Of any values, next to masked entries of any values: against formulas for one row alone."""
  *arrays, dtype = case
  z, mask, labels, shares = arrays
  with jax.enable_x64(dtype == "float64"):
    arrays = [z, mask, labels, shares.astype(z.dtype)]
    values, gradients = jax.tree.map(np.asarray, compiled(functions_and_gradients)(*arrays))
  wide = "float64" if dtype == "float64" else "float32"
  for i, (row, left) in enumerate(zip(z, mask, strict=True)):
    label = int(left[: labels[i]].sum()) if left[labels[i]] else None
    expected = of_one_row(row[left].astype(float), label, shares[i][left], wide)
    for name, value in expected[0].items():
      actual = values[name][i]
      if actual.ndim:
        np.testing.assert_array_equal(actual[~left], -INF if name == "log_softmax" else 0)
        actual = actual[left]
      kind = wide if name in ("integer", "soft") else dtype
      if value is not None:
        # The largest logit and the logarithm of the sum may cancel.
        top = np.abs(row[left].astype(float).max(initial=-INF))
        terms = top if name == "logsumexp" and np.isfinite(top) else 0
        assert_entries(actual, value, kind, BOUNDS[name], terms)
    for name, gradient in expected[1].items():
      np.testing.assert_array_equal(gradients[name][i][~left], 0)
      if gradient is not None:
        # Shares of several classes may be those predicted, and their difference is what cancels.
        several = name == "soft" and np.count_nonzero(shares[i][left]) > 1
        terms = np.linalg.norm(shares[i][left]) if several else 0
        assert_gradient(gradients[name][i][left], gradient, terms, dtype)


@property_of(extreme(EXTREME), many=(extreme(MORE_EXTREME),))
def test_a_batch_of_any_values_is_its_rows(case):
  *arrays, dtype = case
  with jax.enable_x64(dtype == "float64"):
    arrays[3] = arrays[3].astype(arrays[0].dtype)
    whole = jax.tree.map(np.asarray, compiled(functions_and_gradients)(*arrays))
    rows = jax.tree.map(np.asarray, compiled(rows_of_functions_and_gradients)(*arrays))
    for name in whole[0]:
      kind = rows[0][name].dtype
      assert_entries(rows[0][name], whole[0][name], kind, BOUNDS[name], terms=1)
    for name, gradient in whole[1].items():
      gradient, row = gradient.astype(np.longdouble), rows[1][name].astype(np.longdouble)
      np.testing.assert_array_equal(np.isnan(row), np.isnan(gradient))
      limits = jnp.finfo(dtype)
      atol = 8 * float(limits.eps) * arrays[3].max(initial=1) + 16 * float(limits.tiny)
      np.testing.assert_allclose(row, gradient, rtol=0, atol=atol)


rows_of_functions_and_gradients = jax.vmap(functions_and_gradients)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROPERTIES[__name__])
def test_many_cases(name, seed):
  draw_many(__name__, name, seed)
