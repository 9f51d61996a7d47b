"""The derivative of one call of a function with a backward rule, as two linear maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import ad

from softmax_jax._devices import varying_as
from softmax_jax._forward_mode.linear import Values, linear_map_p, replaced

# What a function raises that needs the value of a traced array.
_CONCRETE = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)


def differentiable(types: Values) -> list[int]:
  """Which of the tangents of these types there are; those of integers are none."""
  return [i for i, x_type in enumerate(types) if x_type.dtype != jax.dtypes.float0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Derivative:
  """The derivative of one call, as two linear maps. It holds no array, only structures and types.

  Attributes:
    name: the name of the function.
    backward: the backward rule, ``(residuals, out_bar) -> x_bars``, with an `ad.Zero` for a zero in
      ``out_bar`` and None for one in ``x_bars``.
    tangent: None or the tangent rule, ``(residuals, x_dots) -> y_dots``, of the outputs that have
      tangents.
    x_types: the types of the cotangents of the differentiated arrays.
    out_tree: the structure of the output.
    out_types: the types of the tangents of its leaves.
    residuals_tree: the structure of the residuals that both rules take.
  """

  name: str
  backward: Callable[[Any, Any], Values]
  tangent: Callable[[Any, Values], Values] | None
  x_types: Values
  out_tree: Any
  out_types: Values
  residuals_tree: Any

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name})"  # printed programs show it

  def along(self, residuals: Values, x_dots: Values) -> list[Any]:
    """The tangents of the leaves of the output, None for a zero; a call of `linear_map`."""
    moved = differentiable(self.out_types)
    y_dots: list[Any] = [None] * len(self.out_types)
    if not moved:
      return y_dots
    dots = linear_map_p.bind(
      *residuals,
      *x_dots,
      name=self.name,
      num_residuals=len(residuals),
      apply=self.push_by_transposition if self.tangent is None else self.push_by_rule,
      transpose=self.pull,
      out_types=tuple(self.y_types),
    )
    return replaced(y_dots, moved, dots)

  @property
  def y_types(self) -> Values:
    return [self.out_types[i] for i in differentiable(self.out_types)]

  def pull(self, residuals: Values, y_bars: Values) -> Values:
    """``y_bar -> J^T y_bar``: the backward rule."""
    bars = [ad.Zero(y_type.to_ct_aval()) for y_type in self.out_types]
    for i, y_bar in zip(differentiable(self.out_types), y_bars, strict=True):
      bars[i] = bars[i] if y_bar is None else y_bar
    return self.backward(
      jax.tree.unflatten(self.residuals_tree, residuals), jax.tree.unflatten(self.out_tree, bars)
    )

  def push_by_transposition(self, residuals: Values, x_dots: Values) -> Values:
    """``x_dot -> J x_dot``: the transpose of `pull`."""

    def rule(*y_bars: Any) -> tuple[Any, ...]:
      return tuple(
        ad.zeros_like_aval(x) if x_bar is None else jax.lax.convert_element_type(x_bar, x.dtype)
        for x_bar, x in zip(self.pull(residuals, y_bars), self.x_types, strict=True)
      )

    try:
      transposed = jax.linear_transpose(rule, *self.y_types)
    except _CONCRETE as error:
      raise _untransposable(self.name, error) from error
    try:
      return tuple(transposed(tuple(x_dots)))
    except jax.errors.UnexpectedTracerError:
      raise
    except Exception as error:
      raise _untransposable(self.name, error) from error

  def push_by_rule(self, residuals: Values, x_dots: Values) -> Values:
    """``x_dot -> J x_dot``: the tangent rule."""
    assert self.tangent is not None
    return tuple(self.tangent(jax.tree.unflatten(self.residuals_tree, residuals), x_dots))


def _untransposable(name: str, error: Exception) -> TypeError:
  return TypeError(
    f"enable_forward_mode cannot differentiate {name} in forward mode, because JAX cannot "
    f"transpose its backward rule ({type(error).__name__}: {error}). Make the rule linear in "
    "the cotangent with operations that JAX can transpose, or pass a rule of your own: "
    f"enable_forward_mode({name}, tangent=...). Reverse mode is not affected."
  )


def checked_tangent(name: str, out_dot: Any, out_tree: Any, out_types: Values) -> Values:
  """The tangents of the differentiable outputs, as the user's tangent rule returned them."""
  dots: list[Any] = []
  try:
    dots = out_tree.flatten_up_to(out_dot)
    fits = jax.tree_util.all_leaves(dots, is_leaf=lambda dot: dot is None)
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise TypeError(
      f"the tangent rule of {name} must return the structure of its output, {out_tree}, "
      f"got {jax.tree.structure(out_dot)}."
    )
  checked: list[Any] = []
  for i in differentiable(out_types):
    expected, dot = out_types[i], dots[i]
    if dot is None:
      dot = ad.zeros_like_aval(expected)
    try:
      actual = jax.typeof(dot)
    except Exception:  # of JAX: no array
      actual = None
    if actual is None or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
      raise TypeError(
        f"the tangent rule of {name} must return tangents of the shape and dtype of its output, "
        f"{expected.str_short()}, got {actual.str_short() if actual else type(dot).__name__}."
      )
    checked.append(varying_as(expected, dot))
  return checked
