"""What the errors say that a function, or JAX, raises."""

from __future__ import annotations


def message(error: BaseException) -> str:
  """What an error says; nothing if that fails, as it may in a class of the user's."""
  try:
    return str(error).strip()
  except Exception:
    return ""


def first_line(error: BaseException, length: int = 100) -> str:
  """The first line of an error's message, at most so many characters of it.

  Where JAX reports an error inside a callback, it is the line of that.
  """
  lines = message(error).splitlines() or [""]
  if "Traceback (most recent call last)" in lines[0]:
    text = next((line for line in lines[1:] if not line.startswith(" ")), lines[0])
  else:
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
  return text if len(text) <= length else text[: length - 3] + "..."


def not_offered(error: BaseException) -> str:
  """Why JAX cannot transform a function that way, or "" if ``error`` says something else."""
  text = message(error)
  if isinstance(error, TypeError) and ("forward-mode" in text or "in forward mode" in text):
    return "f has no forward mode (see softmax_jax.enable_forward_mode)"
  if isinstance(error, ValueError) and "Reverse-mode differentiation does not work" in text:
    return "f has no reverse mode"
  if isinstance(error, NotImplementedError) or "do not support JVP" in text:
    return f"JAX cannot do this: {first_line(error)}"
  return ""
