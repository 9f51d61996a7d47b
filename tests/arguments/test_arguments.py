"""Bad calls: the type of the error and its whole message."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from argument_errors import CASES, LABELS, X

import softmax_jax as sj


@pytest.mark.without("enable_x64", "disable_jit")
@pytest.mark.parametrize("name", CASES)
def test_the_whole_message(name):
  call, error, message = CASES[name]
  with np.errstate(over="ignore"), pytest.raises(error) as raised:  # JAX, of a number too large
    call()
  assert str(raised.value) == message
  assert type(raised.value) is error


def test_the_smallest_softcap_is_taken():
  smallest = float(np.finfo(np.float32).tiny)
  jax.eval_shape(lambda: sj.linear_softmax_cross_entropy(X, X.T, LABELS, softcap=smallest))


def test_what_is_wrong_under_jit_raises_at_trace_time():
  with pytest.raises(ValueError, match=re.escape("got axis=2.")):
    jax.jit(lambda x: sj.softmax(x, axis=2))(X)


def test_numpy_integers_are_axes():
  np.testing.assert_array_equal(sj.softmax(X, np.int64(1)), sj.softmax(X, 1))
  np.testing.assert_array_equal(sj.logsumexp(X, [np.int32(0), 1]), sj.logsumexp(X))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32])
def test_integers_are_promoted_without_wrapping(dtype):
  low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
  x = np.array([[low, high], [high, high]], dtype)
  y = sj.softmax(x)
  assert y.dtype == jnp.float32
  np.testing.assert_array_equal(y, [[0, 1], [0.5, 0.5]])
