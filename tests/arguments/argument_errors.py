"""Bad calls: the call, the type of the error and its whole message."""

import jax
import jax.numpy as jnp
import numpy as np

import softmax_jax as sj

X = jnp.zeros((3, 4), jnp.float32)
LABELS = jnp.zeros(3, jnp.int32)
INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"


def _deleted():
  x = jnp.zeros(2)
  x.delete()
  return x


def _axis(x):
  """Traces with the axis as a traced value, where a static one is needed."""
  return jax.jit(lambda axis: sj.softmax(x, axis))(1)


# call, type of the error, message
CASES = {
  "bool x": (
    lambda: sj.softmax(X > 0),
    TypeError,
    "softmax expected x of a real dtype, got dtype bool. Pass 1.0 * x.",
  ),
  "complex x": (
    lambda: sj.log_softmax(X.astype(complex)),
    TypeError,
    "log_softmax expected x of a real dtype, got dtype complex64.",
  ),
  "complex a": (
    lambda: sj.logsumexp(X.astype(complex)),
    TypeError,
    "logsumexp expected a of a real dtype, got dtype complex64.",
  ),
  "complex b": (
    lambda: sj.logsumexp(X, b=1j),
    TypeError,
    "logsumexp expected b of a real dtype, got dtype complex64.",
  ),
  "x None": (
    lambda: sj.softmax(None),
    TypeError,
    "softmax expected x to be an array, got NoneType.",
  ),
  "x a string": (
    lambda: sj.softmax("1, 2"),
    TypeError,
    "softmax expected x to be an array, got str.",
  ),
  "x a list": (
    lambda: sj.softmax([1.0, 2.0]),
    TypeError,
    "softmax expected x to be an array, got list. Pass jnp.asarray(x).",
  ),
  "labels a tuple": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, (0, 0, 0)),
    TypeError,
    f"{INTEGER} expected labels to be an array, got tuple. Pass jnp.asarray(labels).",
  ),
  "a masked array": (
    lambda: sj.softmax(np.ma.masked_array([1.0, 2.0], [True, False])),
    TypeError,
    "softmax expected x to be an array, got a NumPy masked array, whose mask JAX would drop. "
    "Pass x.data and where=~x.mask.",
  ),
  "a dtype that JAX lacks": (
    lambda: sj.softmax(np.array([1.0, 2.0], ">f4")),
    TypeError,
    "softmax expected x of a dtype that JAX has, got dtype >f4. Convert it with astype.",
  ),
  "a float of one byte": (
    lambda: sj.log_softmax(X.astype(jnp.float8_e4m3fn)),
    TypeError,
    "log_softmax expected x of a dtype of at least 16 bits, got dtype float8_e4m3fn. "
    "Pass x.astype(jnp.bfloat16).",
  ),
  "integers that JAX would wrap": (
    lambda: sj.softmax(np.array([0, 2**32])),
    TypeError,
    "softmax expected integers of at most 32 bits in x, got larger ones, which JAX cannot hold.",
  ),
  "a large Python int": (
    lambda: sj.logsumexp(2**40),
    TypeError,
    "logsumexp expected integers of at most 32 bits in a, got larger ones, which JAX cannot hold.",
  ),
  "a deleted array": (
    lambda: sj.softmax(_deleted()),
    ValueError,
    "softmax expected x to be an array, got one that was deleted, as arrays are that jax.jit is "
    "given with donate_argnums. Use what that call returned in its place.",
  ),
  "where without a value": (
    lambda: sj.softmax(X, where=jax.ShapeDtypeStruct(X.shape, bool)),
    TypeError,
    "softmax expected where to be an array, got ShapeDtypeStruct.",
  ),
  "keepdims a string": (
    lambda: sj.logsumexp(X, keepdims="no"),
    TypeError,
    "logsumexp expected keepdims to be True or False, static, got str.",
  ),
  "return_sign traced": (
    lambda: jax.jit(lambda flag: sj.logsumexp(X, return_sign=flag))(True),
    TypeError,
    "logsumexp expected return_sign to be True or False, static, got a traced value.",
  ),
  "return_aux a number": (
    lambda: sj.softmax_cross_entropy(X, X, return_aux=2),
    ValueError,
    f"{SOFT} expected return_aux to be True or False, static, got 2.",
  ),
  "axis_name repeated": (
    lambda: sj.softmax(X, axis_name=("i", "i")),
    TypeError,
    "softmax expected axis_name to be the name of a mesh axis or a tuple of distinct names, got "
    "('i', 'i').",
  ),
  "axis_name a list": (
    lambda: sj.log_softmax(X, axis_name=["i"]),
    TypeError,
    "log_softmax expected axis_name to be the name of a mesh axis or a tuple of distinct names, "
    "got ['i'].",
  ),
  "axis of bytes": (
    lambda: sj.softmax(X, axis=b"\0"),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got bytes.",
  ),
  "axis an array": (
    lambda: sj.softmax(X, axis=np.array([0, 1])),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got an array of "
    "shape (2,) and dtype int64.",
  ),
  "reduction an array": (
    lambda: sj.softmax_cross_entropy(X, X, reduction=X),
    ValueError,
    f'{SOFT} expected reduction to be "none", "sum" or "mean", got an array of shape (3, 4) and '
    "dtype float32.",
  ),
  "softcap too large for float32": (
    lambda: sj.linear_softmax_cross_entropy(X, X.T, LABELS, softcap=1e300),
    ValueError,
    "linear_softmax_cross_entropy expected softcap to be positive and finite in float32, got "
    "1e+300. Pass None for no softcap.",
  ),
  "vocab_axis out of range": (
    lambda: sj.linear_softmax_cross_entropy(X, X.T, LABELS, vocab_axis=2),
    ValueError,
    "linear_softmax_cross_entropy expected weight [H, V] with vocab_axis=-1, or [V, H] with "
    "vocab_axis=0, got shape (4, 3) with vocab_axis=2.",
  ),
  "weight [V, H]": (
    lambda: sj.linear_softmax_cross_entropy(X, jnp.ones((5, 4)), LABELS),
    ValueError,
    "linear_softmax_cross_entropy expected x of shape [..., 5] for weight of shape (5, 4) with "
    "vocab_axis=1, got shape (3, 4). For a weight [V, H] pass vocab_axis=0.",
  ),
  "weight [H, V]": (
    lambda: sj.linear_softmax_cross_entropy(X, jnp.ones((4, 5)), LABELS, vocab_axis=0),
    ValueError,
    "linear_softmax_cross_entropy expected x of shape [..., 5] for weight of shape (4, 5) with "
    "vocab_axis=0, got shape (3, 4). For a weight [H, V] pass vocab_axis=-1.",
  ),
  "weight of other features": (
    lambda: sj.linear_softmax_cross_entropy(X, jnp.ones((6, 5)), LABELS),
    ValueError,
    "linear_softmax_cross_entropy expected x of shape [..., 6] for weight of shape (6, 5) with "
    "vocab_axis=1, got shape (3, 4).",
  ),
  "axis out of range": (
    lambda: sj.softmax(X, axis=2),
    ValueError,
    "softmax expected axis in [-2, 2) for x of shape (3, 4), got axis=2.",
  ),
  "axis out of range below": (
    lambda: sj.logsumexp(X, axis=(0, -3)),
    ValueError,
    "logsumexp expected axis in [-2, 2) for a of shape (3, 4), got axis=-3.",
  ),
  "axis of a scalar": (
    lambda: sj.softmax(jnp.float32(1)),
    ValueError,
    "softmax expected axis=None or axis=() for x of shape (), got axis=-1.",
  ),
  "duplicate axes": (
    lambda: sj.log_softmax(X, axis=(1, -1)),
    ValueError,
    "log_softmax expected distinct axes, got axis=(1, -1) for x of shape (3, 4).",
  ),
  "axis a float": (
    lambda: sj.softmax(X, axis=1.0),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got float.",
  ),
  "axis a bool": (
    lambda: sj.softmax(X, axis=True),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got bool.",
  ),
  "axis a string": (
    lambda: sj.softmax(X, axis="rows"),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got str.",
  ),
  "axis traced": (
    lambda: _axis(X),
    TypeError,
    "softmax expected axis to be an int, a tuple of ints or None, all static, got a traced value.",
  ),
  "where not boolean": (
    lambda: sj.softmax(X, where=X),
    TypeError,
    "softmax expected where to be boolean, got dtype float32. Pass where != 0.",
  ),
  "where of another shape": (
    lambda: sj.softmax(X, where=jnp.ones((2, 4), bool)),
    ValueError,
    "softmax expected where to broadcast to x of shape (3, 4), got shape (2, 4).",
  ),
  "where larger than x": (
    lambda: sj.logsumexp(X, where=jnp.ones((2, 3, 4), bool)),
    ValueError,
    "logsumexp expected where to broadcast to a of shape (3, 4), got shape (2, 3, 4).",
  ),
  "where of a loss": (
    lambda: sj.softmax_cross_entropy(X, X, where=jnp.ones(4, bool)),
    ValueError,
    f"{SOFT} expected where to broadcast to logits of shape (3, 4), or one value per row, of shape "
    "(3,), got shape (4,).",
  ),
  "where of logits that broadcast": (
    lambda: sj.softmax_cross_entropy(X[0], X, where=jnp.ones(2, bool)),
    ValueError,
    f"{SOFT} expected where to broadcast to logits of shape (4,) with labels of shape (3, 4), or "
    "one value per row, of shape (3,), got shape (2,).",
  ),
  "where of logits that broadcast against indices": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X[:1], LABELS, where=jnp.ones(2, bool)),
    ValueError,
    f"{INTEGER} expected where to broadcast to logits of shape (1, 4) with labels of shape (3,), "
    "or one value per row, of shape (3,), got shape (2,).",
  ),
  "b of another shape": (
    lambda: sj.logsumexp(X, b=jnp.ones(3)),
    ValueError,
    "logsumexp expected a and b to broadcast against each other, got shapes (3, 4) and (3,).",
  ),
  "integer logits": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X.astype(int), LABELS),
    TypeError,
    f"{INTEGER} expected logits of a floating dtype, got dtype int32. "
    "Pass logits.astype(jnp.float32).",
  ),
  "integer logits, soft labels": (
    lambda: sj.softmax_cross_entropy(X.astype(int), X),
    TypeError,
    f"{SOFT} expected logits of a floating dtype, got dtype int32. "
    "Pass logits.astype(jnp.float32).",
  ),
  "complex logits": (
    lambda: sj.softmax_cross_entropy(X.astype(complex), X),
    TypeError,
    f"{SOFT} expected logits of a floating dtype, got dtype complex64.",
  ),
  "float labels": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, X),
    TypeError,
    f"{INTEGER} expected labels of an integer dtype, got dtype float32. "
    "For one probability per class use softmax_cross_entropy.",
  ),
  "bool labels": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, X[:, 0] > 0),
    TypeError,
    f"{INTEGER} expected labels of an integer dtype, got dtype bool.",
  ),
  "complex labels": (
    lambda: sj.softmax_cross_entropy(X, X.astype(complex)),
    TypeError,
    f"{SOFT} expected labels of a real dtype, got dtype complex64.",
  ),
  "rank of labels": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, X.astype(int)),
    ValueError,
    f"{INTEGER} expected one label per row, of shape (3,) for logits of shape (3, 4), got shape "
    "(3, 4).",
  ),
  "number of labels": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, jnp.zeros(5, int)),
    ValueError,
    f"{INTEGER} expected one label per row, of shape (3,) for logits of shape (3, 4), got shape "
    "(5,).",
  ),
  "shape of soft labels": (
    lambda: sj.softmax_cross_entropy(X, jnp.zeros((3, 5))),
    ValueError,
    f"{SOFT} expected logits and labels to broadcast against each other, got shapes (3, 4) and "
    "(3, 5).",
  ),
  "logits of rank 0": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(jnp.float32(0), 0),
    ValueError,
    f"{INTEGER} expected axis=None or axis=() for logits of shape (), got axis=-1.",
  ),
  "axis of a loss": (
    lambda: sj.softmax_cross_entropy_with_integer_labels(X, LABELS, axis=-3),
    ValueError,
    f"{INTEGER} expected axis in [-2, 2) for logits of shape (3, 4), got axis=-3.",
  ),
}
