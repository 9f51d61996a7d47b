"""The options of `check_derivatives`, each with what it must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any


def require(fits: bool, what: str, expected: str, value: Any) -> None:
  """Raises a `TypeError` about ``value`` unless it fits."""
  if not fits:
    raise TypeError(
      f"check_derivatives expected {what} to be {expected}, got {type(value).__name__}."
    )


def names(what: str, checks: Any) -> Collection[str]:
  """Names of checks as a collection, also where they are a single string."""
  found: Any = [checks] if isinstance(checks, str) else checks
  fits = _is_a(found, (Sequence, Set, Mapping)) and all(isinstance(name, str) for name in found)
  require(fits, what, "names of checks", checks)
  return found


def _is_a(value: Any, kind: Any) -> bool:
  return isinstance(value, kind)


def _has_names(value: Any) -> bool:
  return _is_a(value, (Mapping, NoneType)) and all(isinstance(key, str) for key in value or ())


@dataclass(frozen=True)
class _Kind:
  """What an option must be, in words and as a test."""

  expected: str
  fits: Callable[[Any], bool]


_FUNCTION = _Kind("a function", lambda x: x is None or callable(x))
_KWARGS = _Kind("a dict with names as keys", _has_names)
_POINTS = _Kind(
  "a list of tuples of arguments",
  lambda x: _is_a(x, (list, tuple)) and all(_is_a(args, (list, tuple)) for args in x),
)
_BOUNDS = _Kind(
  "a dict from names to numbers",
  lambda x: _has_names(x) and all(_is_a(x[name], Real) for name in x or ()),
)
_NUMBER = _Kind("a number", lambda x: _is_a(x, (Real, NoneType)))
_STRING = _Kind("a string", lambda x: _is_a(x, (str, NoneType)))
_INTEGER = _Kind("an int", lambda x: _is_a(x, Integral))


@dataclass
class Options:
  """What `check_derivatives` takes beside a function, its arguments and the checks to run."""

  reference: Callable[..., Any] | None = field(default=None, metadata={"kind": _FUNCTION})
  jacobian: Callable[..., Any] | None = field(default=None, metadata={"kind": _FUNCTION})
  kwargs: Mapping[str, Any] | None = field(default=None, metadata={"kind": _KWARGS})
  edge_points: Sequence[Sequence[Any]] = field(default=(), metadata={"kind": _POINTS})
  bounds: Mapping[str, float] | None = field(default=None, metadata={"kind": _BOUNDS})
  max_residual_bytes: int | None = field(default=None, metadata={"kind": _NUMBER})
  name: str | None = field(default=None, metadata={"kind": _STRING})
  seed: int = field(default=0, metadata={"kind": _INTEGER})
  skip: Collection[str] = ()

  def __post_init__(self):
    """Raises where an option is of another type than `check_derivatives` says, or negative."""
    self.skip = names("skip", self.skip)
    for option in fields(self):
      if "kind" in option.metadata:
        kind, value = option.metadata["kind"], getattr(self, option.name)
        require(kind.fits(value), option.name, kind.expected, value)
    numbers = {"seed": self.seed, "max_residual_bytes": self.max_residual_bytes or 0}
    numbers |= {f"bounds[{check!r}]": bound for check, bound in (self.bounds or {}).items()}
    for what, number in numbers.items():
      if not number >= 0:  # NaN is not.
        raise ValueError(f"check_derivatives expected {what} to be at least 0, got {number}.")
