"""What a call with a bad argument gives, and what is wrong with it."""

import jax
import jax.numpy as jnp
import numpy as np


def plain_value(value):
  """``value`` as the oracle takes it."""
  if isinstance(value, np.ndarray) and value.dtype != bool:
    return value.astype(np.int64 if jnp.issubdtype(value.dtype, jnp.integer) else np.float64)
  return value


def wrong_numbers(actual, expected):
  """How the numbers differ from what is expected, or "" if they agree."""
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for mine, theirs in zip(actual, expected, strict=True):
    if mine.shape != np.shape(theirs):
      return f"shape {mine.shape} for {np.shape(theirs)}"
    floating = jnp.issubdtype(mine.dtype, jnp.floating)
    bound = max(1e-6, float(jnp.finfo(mine.dtype).eps)) if floating else 0
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    finite = np.isfinite(theirs)
    size = max(1, np.max(np.abs(theirs[finite]), initial=0))  # whose square may be infinite
    error = np.linalg.norm((mine[finite] - theirs[finite]) / size)
    if not (
      np.array_equal(mine[~finite], theirs[~finite], equal_nan=True)
      and error <= bound * np.linalg.norm(theirs[finite] / size)
    ):
      return f"{mine} for {theirs}"
  return ""


def outcome(function, call):
  """What ``call`` returns, and the message of its error, marked if it is not one of ours."""
  try:
    with np.errstate(over="ignore"):  # of JAX, where a number is too large for float32
      return call(), ""
  except Exception as error:
    message = str(error)
    own = type(error) in (TypeError, ValueError) and message.startswith(
      (f"{function} expected ", f"{function} knows no ")
    )
    return None, message if own else f"NOT OURS: {type(error).__name__}: {message}"


def refuses_two_dtypes(message):
  """Whether the error comes from dtype promotion being switched off."""
  strict = jax.config.jax_numpy_dtype_promotion == "strict"
  return strict and "of dtypes that promote to a common one" in message


def names_argument(argument, message):
  """Whether a message says which argument is wrong."""
  if argument == "axis":  # or that the labels do not fit it
    return True
  return argument.rstrip("s").replace("_", " ") in message.replace("_", " ")
