"""Bad options of the two losses: the type of the error and its whole message."""

import pytest
from option_errors import ERRORS, T, X

from softmax_jax import softmax_cross_entropy


@pytest.mark.without("enable_x64")
@pytest.mark.parametrize("case", ERRORS)
def test_the_whole_message(case):
  call, error, message = ERRORS[case]
  with pytest.raises(error) as raised:
    call()
  assert str(raised.value) == message
  assert type(raised.value) is error


def test_soft_labels_have_no_index_to_ignore():
  with pytest.raises(TypeError, match="unexpected keyword argument 'ignore_index'"):
    softmax_cross_entropy(X, T, ignore_index=0)
