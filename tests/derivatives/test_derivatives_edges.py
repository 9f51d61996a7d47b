"""softmax_jax.derivatives at infinities, NaN and labels that do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import MATRICES, arguments, closed_forms, further, gradient
from oracle import relative_error


@pytest.mark.parametrize("i", [0, 2])
def test_minus_infinity_has_probability_zero(i):
  """As if the entry were not there; higher derivatives are exactly 0 there too."""
  x, c, v, _, t = arguments(17, (6,))
  x, t, label = x.at[i].set(-jnp.inf), t.at[i].set(0), np.array(1, np.int32)
  keep = np.arange(6) != i
  alone = closed_forms(*(a[keep] for a in (x, c, v)), label - (i < 1), t[keep])
  modes = {mode: further(mode, x, c, v, label, t) for mode in (jax.jacfwd, jax.jacrev)}
  for name, value in closed_forms(x, c, v, label, t).items():
    inside = np.ix_(keep, keep) if name in MATRICES else keep
    assert relative_error(value[inside], alone[name]) < 4 * 2**-24, name
    for by_x in modes.values():
      assert np.all(np.isfinite(by_x[name])), name
      np.testing.assert_array_equal(by_x[name][..., i], 0)
    if name == "log_softmax_jacobian":
      np.testing.assert_array_equal(value[:, i], np.eye(6)[i])
      peer = jax.jit(jax.jacrev(jax.nn.log_softmax))(x)
      assert relative_error(value, peer) < 4 * 2**-24
    else:
      np.testing.assert_array_equal(value[i], 0)
      np.testing.assert_array_equal(value[..., i], 0)


def test_label_of_minus_infinity():
  x = jnp.array([0.0, -jnp.inf, 0.0])
  for label in (1, jnp.array([0.0, 1.0, 0.0])):
    np.testing.assert_array_equal(gradient(x, label), [0.5, -1.0, 0.5])


@pytest.mark.without("debug_nans", "enable_x64")
@pytest.mark.parametrize("bad", ["nan", "inf", "two inf", "-inf alone"])
def test_a_bad_row_is_nan_and_touches_no_other(bad):
  args = arguments(18, (3, 4))
  good = closed_forms(*args)
  row = {"nan": [1, np.nan, 2, 0], "inf": [1, np.inf, 2, 0], "two inf": [np.inf, 0, np.inf, 1]}
  x = args[0].at[1].set(jnp.array(row.get(bad, [-np.inf] * 4)))
  for name, value in closed_forms(x, *args[1:]).items():
    expected = np.array(good[name])
    expected[1] = 0 if name == "logsumexp_hessian" and bad == "-inf alone" else np.nan
    np.testing.assert_array_equal(value, expected, err_msg=name)


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_class(bad):
  args = arguments(19, (2, 1))
  x = jnp.array([[3.0], [bad]])
  for name, value in closed_forms(x, *args[1:]).items():
    expected = 0 if name == "logsumexp_hessian" and bad == -np.inf else np.nan
    np.testing.assert_array_equal(value.ravel(), [0, expected], err_msg=name)


def test_further_derivatives_of_minus_infinity_alone():
  x, *args = arguments(22, (6,))
  for mode in (jax.jacfwd, jax.jacrev):
    value = further(mode, jnp.full_like(x, -jnp.inf), *args)["logsumexp_hessian"]
    np.testing.assert_array_equal(value, np.zeros((6, 6, 6)))


@pytest.mark.without("debug_nans")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_labels_out_of_range(dtype):
  x = arguments(20, (4, 3))[0]
  info = np.iinfo(dtype)
  labels = np.array([1, info.max, 3, info.min], dtype)
  values = np.asarray(gradient(x, labels))
  for is_nan in (np.isnan(values).all(-1), np.isnan(values).any(-1)):
    np.testing.assert_array_equal(is_nan, [False, True, True, info.min != 0])
  np.testing.assert_array_equal(values[0], gradient(x, np.ones(4, np.int32))[0])


@pytest.mark.without("debug_nans")
def test_labels_of_a_narrow_dtype():
  """An int8 label of 100 is class 100 of 300, and -1 is no class."""
  x = arguments(21, (2, 300))[0]
  values = gradient(x, np.array([100, -1], np.int8))
  expected = gradient(x, (np.arange(300) == [[100], [0]]).astype(np.float32))
  np.testing.assert_array_equal(values[0], expected[0])
  assert np.all(np.isnan(values[1]))
