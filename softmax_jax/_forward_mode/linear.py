"""The primitive `linear_map`: a linear call that is given with its transpose.

    linear_map_p.bind(*residuals, *xs, name, num_residuals, apply, transpose, out_types) -> ys

- ``name``: of the user's function, for errors and printed programs.
- ``apply(residuals, xs) -> ys``: linear in xs.
- ``transpose(residuals, y_bars) -> x_bars``: its transpose, with None for a zero on both sides.
- ``out_types``: the types of ys, so that ``apply`` is traced only where it runs. In reverse mode
  only ``transpose`` ever does.

``transpose`` runs in place, while JAX transposes, exactly as the backward rule of a plain
`jax.custom_vjp` function does. ``apply`` runs later, when the program is compiled, and must not
close over a tracer: whatever is traced travels in ``residuals``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive, jaxpr_as_fun, unmapped_aval
from jax.interpreters import ad, batching, mlir

from softmax_jax._devices import varying_axes

Values = Sequence[Any]  # arrays or what JAX traces in their place, and their types
Linear = Callable[[Values, Values], Values]

linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True


# Evaluation and compilation.


def _impl(*args: Any, name: str, num_residuals: int, apply: Linear, **_: Any) -> Values:
  try:
    return apply(args[:num_residuals], args[num_residuals:])
  except jax.errors.UnexpectedTracerError as error:
    raise _closes_over_tracer(name) from error


def _lowered(*args: Any, name: str, **params: Any) -> Values:
  program = jax.make_jaxpr(functools.partial(_impl, name=name, **params))(*args)
  if any(isinstance(const, Tracer) for const in program.consts):
    raise _closes_over_tracer(name)
  return jaxpr_as_fun(program)(*args)


def _closes_over_tracer(name: str) -> TypeError:
  return TypeError(
    f"enable_forward_mode cannot differentiate {name} in forward mode, because its rules close "
    f"over a value that JAX is tracing. Make that value an argument of {name}. Reverse mode is not "
    "affected."
  )


# Differentiation.


def _jvp(
  primals: Values,
  tangents: Values,
  *,
  num_residuals: int,
  apply: Linear,
  out_types: Values,
  **params: Any,
) -> tuple[Values, Values]:
  bind = functools.partial(
    linear_map_p.bind, num_residuals=num_residuals, apply=apply, out_types=out_types, **params
  )
  residuals, xs = primals[:num_residuals], primals[num_residuals:]
  residual_dots, x_dots = tangents[:num_residuals], tangents[num_residuals:]
  ys = bind(*primals)
  y_dots = [ad.Zero(y_type) for y_type in out_types]
  if any(type(x_dot) is not ad.Zero for x_dot in x_dots):
    # The map is linear in xs and is its own derivative there.
    y_dots = bind(*residuals, *map(ad.instantiate_zeros, x_dots))
  moving = nonzero(residual_dots)
  if moving:
    # The map itself moves with its residuals: this is where second derivatives come from.
    _, more = jax.jvp(
      lambda *moved: tuple(apply(tuple(replaced(residuals, moving, moved)), xs)),
      tuple(residuals[i] for i in moving),
      tuple(residual_dots[i] for i in moving),
    )
    y_dots = [m if type(y) is ad.Zero else y + m for y, m in zip(y_dots, more, strict=True)]
  return ys, y_dots


def _transpose(
  y_bars: Values, *args: Any, num_residuals: int, transpose: Linear, **_: Any
) -> Values:
  residuals = args[:num_residuals]
  x_bars = transpose(residuals, [None if type(y) is ad.Zero else y for y in y_bars])
  return [None] * num_residuals + list(x_bars)


def nonzero(tangents: Values) -> list[int]:
  """Which of the tangents JAX does not know to be 0."""
  return [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]


def replaced(values: Values, where: Sequence[int], new: Values) -> list[Any]:
  """The values, with ``new`` ones in the places ``where``."""
  result = list(values)
  for i, value in zip(where, new, strict=True):
    result[i] = value
  return result


# Batching.


def _batch(
  axis_data: Any,
  args: Values,
  dims: Sequence[int | None],
  *,
  num_residuals: int,
  apply: Linear,
  transpose: Linear,
  out_types: Values,
  **params: Any,
) -> tuple[Values, Sequence[int | None]]:
  bind = functools.partial(linear_map_p.bind, num_residuals=num_residuals, **params)
  if all(dim is None for dim in dims) and type(axis_data.name) is object:
    # JAX also calls this rule with nothing batched. The axis does not matter then if it has no name
    # (in place of which JAX puts a bare object); otherwise a collective in the rule may need it.
    ys = bind(*args, apply=apply, transpose=transpose, out_types=out_types)
    return ys, [None] * len(ys)
  size, axes = axis_data.size, axes_of_batch(axis_data, args)

  def over_batch(linear: Linear) -> Linear:
    return jax.vmap(
      linear,
      in_axes=(tuple(dims[:num_residuals]), 0),
      axis_size=size,
      axis_name=axis_data.name,
      spmd_axis_name=axis_data.spmd_name,
    )

  xs = [
    batching.bdim_at_front(x, dim, size, axis_data.explicit_mesh_axis)
    for x, dim in zip(args[num_residuals:], dims[num_residuals:], strict=True)
  ]
  ys = bind(
    *args[:num_residuals],
    *xs,
    apply=over_batch(apply),
    transpose=over_batch(transpose),
    out_types=tuple(
      _type_varying_over(axes, unmapped_aval(size, 0, y_type, axis_data.explicit_mesh_axis))
      for y_type in out_types
    ),
  )
  return ys, [0] * len(ys)


def _type_varying_over(axes: frozenset[str], x_type: Any) -> Any:
  """The type of an array that varies over ``axes`` too."""
  manual = x_type.manual_axis_type
  return x_type.update(manual_axis_type=manual.update(varying=manual.varying | axes))


def axes_of_batch(axis_data: Any, args: Values) -> frozenset[str]:
  """The mesh axes that a batch is spread over inside `jax.shard_map`.

  With `jax.vmap(..., spmd_axis_name=...)` around that, what is batched varies over them.
  """
  names = frozenset(axis_data.spmd_name or ())
  return names & frozenset[str]().union(*map(varying_axes, args))


linear_map_p.def_impl(_impl)
linear_map_p.def_abstract_eval(lambda *_, out_types, **__: list(out_types))
ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.fancy_primitive_batchers[linear_map_p] = _batch
mlir.register_lowering(linear_map_p, mlir.lower_fun(_lowered, multiple_results=True))


def linear_map(
  name: str, apply: Linear, transpose: Linear, residuals: Values, x: Any, like: Any
) -> Any:
  """``apply(residuals, [x])[0]``, of the type of ``like``: linear for JAX though it may compare x.

  Its transpose is ``transpose(residuals, [y_bar])[0]``, of which the same holds.
  """
  x_type, y_type = (jax.typeof(array).to_tangent_aval() for array in (x, like))
  return _Map(name, apply, transpose, x_type, y_type).bind(residuals, [x])[0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Map:
  """A linear map from one array to one, of which JAX can take the transpose again and again."""

  name: str
  apply: Linear
  transpose: Linear
  x_type: Any
  y_type: Any

  def bind(self, residuals: Values, xs: Values) -> Values:
    transposed = _Map(self.name, self.transpose, self.apply, self.y_type, self.x_type)
    return linear_map_p.bind(
      *residuals,
      *xs,
      name=self.name,
      num_residuals=len(residuals),
      apply=self.apply,
      transpose=transposed.bind,
      out_types=(self.y_type,),
    )
