"""What softmax_jax.derivatives refuses: the type of the error and its whole message."""

import numpy as np
import pytest

from softmax_jax import derivatives

X = np.zeros((2, 3), np.float32)
REAL, BOOL, COMPLEX = np.zeros(3, np.float32), np.zeros(3, bool), np.zeros(3, np.complex64)
OF_X = {
  "softmax_jacobian": 0,
  "softmax_jvp": 1,
  "softmax_vjp": 1,
  "softmax_hvp": 2,
  "log_softmax_jacobian": 0,
  "logsumexp_hessian": 0,
}
OF_LOGITS = {"cross_entropy_gradient": 1, "cross_entropy_hessian": 0, "cross_entropy_hvp": 1}


def assert_raises(error, message, f, *args):
  with pytest.raises(error) as raised:
    f(*args)
  assert str(raised.value) == message


def test_every_public_function_is_tested():
  assert set(derivatives.__all__) == OF_X.keys() | OF_LOGITS.keys()


@pytest.mark.parametrize("name", OF_X | OF_LOGITS)
def test_errors_of_the_logits(name):
  f = getattr(derivatives, name)
  x = "x" if name in OF_X else "logits"
  others = [REAL] * (OF_X | OF_LOGITS)[name]
  assert_raises(
    ValueError,
    f"{name} expected {x} of shape [*B, K] with at least one axis, got shape (). "
    f"Pass {x}.reshape(1).",
    *(f, np.float32(1.0), *others),
  )
  for wrong in (BOOL, COMPLEX):
    kind = "real" if name in OF_X else "floating"
    fix = f" Pass 1.0 * {x}." if wrong is BOOL and name in OF_X else ""
    message = f"{name} expected {x} of a {kind} dtype, got dtype {wrong.dtype}.{fix}"
    assert_raises(TypeError, message, f, wrong, *others)
  assert_raises(
    TypeError,
    f"{name} expected {x} to be an array, got list. Pass jnp.asarray({x}).",
    *(f, [1.0, 2.0, 3.0], *others),
  )
  if name in OF_LOGITS:
    assert_raises(
      TypeError,
      f"{name} expected logits of a floating dtype, got dtype int32. "
      f"Pass logits.astype(jnp.float32).",
      *(f, np.zeros(3, np.int32), *others),
    )


@pytest.mark.parametrize(
  ("name", "vector", "of"),
  [
    ("softmax_jvp", "x_dot", "x"),
    ("softmax_vjp", "y_bar", "x"),
    ("softmax_hvp", "y_bar", "x"),
    ("softmax_hvp", "x_dot", "x"),
    ("cross_entropy_hvp", "x_dot", "logits"),
  ],
)
def test_errors_of_the_vectors(name, vector, of):
  second = (name, vector) == ("softmax_hvp", "x_dot")
  others = {"y_bar": X} if second else {"x_dot": X} if name == "softmax_hvp" else {}
  f = lambda wrong: getattr(derivatives, name)(X, **others, **{vector: wrong})
  for shape in ((3,), (1, 3), (2, 1), (2, 3, 1), ()):
    assert_raises(
      ValueError,
      f"{name} expected {vector} of the shape of {of}, (2, 3), got shape {shape}. "
      f"Broadcast it with jnp.broadcast_to({vector}, {of}.shape).",
      *(f, np.zeros(shape, np.float32)),
    )
  for wrong, fix in ((X > 0, f" Pass 1.0 * {vector}."), (X + 0j, "")):
    assert_raises(
      TypeError,
      f"{name} expected {vector} of a real dtype, got dtype {wrong.dtype}.{fix}",
      *(f, wrong),
    )


@pytest.mark.parametrize(
  ("labels", "error", "message"),
  [
    (
      np.zeros(3, np.int32),
      ValueError,
      "integer labels of shape (2,), one class index per row of logits of shape (2, 3), got shape "
      "(3,). Probabilities need a floating dtype.",
    ),
    (
      np.zeros((2, 3), np.int32),
      ValueError,
      "integer labels of shape (2,), one class index per row of logits of shape (2, 3), got shape "
      "(2, 3). Probabilities need a floating dtype.",
    ),
    (
      np.zeros(2, np.float32),
      ValueError,
      "probabilities as labels to have the shape of logits, (2, 3), got shape (2,). Class indices "
      "need an integer dtype.",
    ),
    (
      np.zeros(3, np.float32),
      ValueError,
      "probabilities as labels to have the shape of logits, (2, 3), got shape (3,). Class indices "
      "need an integer dtype.",
    ),
    (X > 0, TypeError, "labels of a real dtype, got dtype bool. Pass 1.0 * labels."),
    (X + 0j, TypeError, "labels of a real dtype, got dtype complex64."),
    ([0, 1], TypeError, "labels to be an array, got list. Pass jnp.asarray(labels)."),
  ],
)
def test_errors_of_the_labels(labels, error, message):
  message = f"cross_entropy_gradient expected {message}"
  assert_raises(error, message, derivatives.cross_entropy_gradient, X, labels)
