"""Checks of arguments, and the error messages of the library.

Every message names the function, what it expected and what it got, and ends with the fix where
there is one. Only what JAX knows while tracing is checked (types, shapes, dtypes, axes), never a
value that may be traced.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from softmax_jax._arrays import with_rank
from softmax_jax._devices import varying_axes

Axis = int | Sequence[int] | None

# The methods by which things tell JAX that they are arrays.
_ARRAY_PROTOCOLS = ("__array__", "__jax_array__", "__cuda_array_interface__")


class Arguments:
  """The arguments of a public function, whose name every message begins with."""

  def __init__(self, function: str) -> None:
    self._function = function

  def __str__(self) -> str:
    return self._function

  def as_array(self, name: str, value: Any) -> jax.Array:
    """``value`` as a JAX array; sequences and masked arrays are refused."""
    if isinstance(value, np.ma.MaskedArray):
      raise TypeError(
        f"{self} expected {name} to be an array, got a NumPy masked array, whose mask JAX would "
        f"drop. Pass {name}.data and where=~{name}.mask."
      )
    no_array = f"{self} expected {name} to be an array, got {type(value).__name__}."
    if isinstance(value, Sequence):
      raise TypeError(no_array + (f" Pass jnp.asarray({name})." if _is_sequence(value) else ""))
    if isinstance(value, jax.Array):  # jnp.asarray would copy a traced one
      if is_concrete(value) and value.is_deleted():
        raise ValueError(
          f"{self} expected {name} to be an array, got one that was deleted, as arrays are that "
          "jax.jit is given with donate_argnums. Use what that call returned in its place."
        )
      return value
    protocols = [p for p in _ARRAY_PROTOCOLS if hasattr(value, p)]
    if not protocols and not isinstance(value, (bool, int, float, complex)):
      raise TypeError(no_array)  # JAX turns some other objects into booleans
    try:
      x = jnp.asarray(value)
      exact = np.asarray(value) if protocols == ["__array__"] else None
    except OverflowError as error:
      raise self._too_wide(name) from error
    except Exception as error:  # of JAX, or of the method that makes an array of the value
      if isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(
          f"{self} expected {name} of a dtype that JAX has, got dtype {value.dtype}. Convert it "
          "with astype."
        ) from error
      raise TypeError(no_array) from error
    if exact is not None and exact.dtype.kind in "iu" and exact.dtype != x.dtype and exact.size:
      info = jnp.iinfo(x.dtype)
      if np.min(exact) < info.min or np.max(exact) > info.max:
        raise self._too_wide(name)
    return x

  def _too_wide(self, name: str) -> TypeError:
    bits = jnp.iinfo(jnp.result_type(int)).bits
    return TypeError(
      f"{self} expected integers of at most {bits} bits in {name}, got larger ones, which JAX "
      "cannot hold."
    )

  def as_real(self, name: str, value: Any) -> jax.Array:
    """``value`` as an array of a floating dtype; integers become what ``jnp.exp`` makes of them."""
    x = self.as_array(name, value)
    if jnp.issubdtype(x.dtype, jnp.integer):
      return x.astype(jnp.float64 if jnp.iinfo(x.dtype).bits == 64 else jnp.float32)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise self._not_real(name, x)
    return self._of_sixteen_bits(name, x)

  def _not_real(self, name: str, x: jax.Array) -> TypeError:
    fix = f" Pass 1.0 * {name}." if x.dtype == bool and x.ndim else ""  # of a mask
    return TypeError(f"{self} expected {name} of a real dtype, got dtype {x.dtype}.{fix}")

  def _of_sixteen_bits(self, name: str, x: jax.Array) -> jax.Array:
    """``x``, unless it is of a floating dtype of fewer than sixteen bits.

    Those of eight bits hold few probabilities and gradients: most of these would be 0, and some
    have no infinity for the logarithm of 0. For those of four and six bits XLA lacks operations.
    """
    if jnp.finfo(x.dtype).bits < 16:
      raise TypeError(
        f"{self} expected {name} of a dtype of at least 16 bits, got dtype {x.dtype}. "
        f"Pass {name}.astype(jnp.bfloat16)."
      )
    return x

  def promoted(
    self, name: str, value: Any, other: str, other_value: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Both values as arrays of their common floating dtype."""
    arrays = self.as_array(name, value), self.as_array(other, other_value)
    for array_name, array in zip((name, other), arrays, strict=True):
      self.as_real(array_name, array)
    try:
      dtype = jnp.result_type(*arrays)
    except ValueError as error:
      raise TypeError(
        f"{self} expected {name} and {other} of dtypes that promote to a common one, got "
        f"{arrays[0].dtype} and {arrays[1].dtype}. Convert one with astype."
      ) from error
    x, y = (self.as_real(name, cast(array, dtype)) for array in arrays)
    return x, y

  def as_logits(self, name: str, value: Any) -> jax.Array:
    """``value`` as an array of a floating dtype; anything else is refused."""
    x = self.as_array(name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      fix = f" Pass {name}.astype(jnp.float32)." if jnp.issubdtype(x.dtype, jnp.integer) else ""
      raise TypeError(f"{self} expected {name} of a floating dtype, got dtype {x.dtype}.{fix}")
    return self._of_sixteen_bits(name, x)

  def as_class_indices(self, labels: Any) -> jax.Array:
    """``labels`` as an array of a signed integer dtype of at least 32 bits."""
    x = self.as_array("labels", _narrowed(labels))
    if not jnp.issubdtype(x.dtype, jnp.integer):
      fix = (
        " For one probability per class use softmax_cross_entropy."
        if jnp.issubdtype(x.dtype, jnp.floating)
        else ""
      )
      raise TypeError(f"{self} expected labels of an integer dtype, got dtype {x.dtype}.{fix}")
    # Wide and signed, so that indices compare with any number of classes and with negative values.
    return _saturated(x, jnp.int32 if jnp.iinfo(x.dtype).bits <= 32 else jnp.int64)

  def as_ignore_index(self, ignore_index: Any, dtype: DTypeLike) -> jax.Array:
    """``ignore_index`` as a scalar of the dtype of the labels."""
    x = self.as_array("ignore_index", _narrowed(ignore_index))
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise TypeError(f"{self} expected ignore_index of an integer dtype, got dtype {x.dtype}.")
    if x.ndim:
      raise ValueError(f"{self} expected ignore_index to be a scalar, got shape {x.shape}.")
    return _saturated(x, dtype)

  def as_coefficient(self, name: str, value: Any, dtype: DTypeLike) -> jax.Array:
    """``value`` as a scalar of ``dtype``."""
    x = self.as_real(name, value)
    if x.ndim:
      raise ValueError(f"{self} expected {name} to be a scalar, got shape {x.shape}.")
    return x.astype(dtype)

  def as_label_smoothing(self, value: Any, dtype: DTypeLike) -> jax.Array:
    """``value`` as a scalar of ``dtype``, in [0, 1] if that can be known."""
    x = self.as_coefficient("label_smoothing", value, dtype)
    number = known_number(value)
    if number is not None and not 0 <= number <= 1:
      raise ValueError(f"{self} expected label_smoothing in [0, 1], got {number:g}.")
    return x

  def as_positive(self, name: str, value: Any, dtype: DTypeLike, fix: str = "") -> jax.Array:
    """``value`` as a scalar of ``dtype``, positive and finite if that can be known."""
    x = self.as_coefficient(name, value, dtype)
    number, limits = known_number(value), np.finfo(dtype)
    if number is not None and not float(limits.tiny) <= number <= float(limits.max):
      raise ValueError(
        f"{self} expected {name} to be positive and finite in {limits.dtype}, got {number:g}.{fix}"
      )
    return x

  def as_class_weights(self, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """``value`` as an array with one number per class."""
    x = self.as_real("class_weights", value)
    if x.shape != shape:
      raise ValueError(
        f"{self} expected one class weight per class, of shape {shape}, got shape {x.shape}."
      )
    return x

  def as_sample_weights(self, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """``value`` as an array with one number per row of the losses, which have this shape."""
    x = self.as_real("sample_weights", value)
    if x.shape != shape:
      raise ValueError(
        f"{self} expected one sample weight per row, of shape {shape}, got shape {x.shape}."
      )
    return x

  def as_probabilities(self, labels: Any) -> jax.Array:
    """``labels`` as an array of a real dtype."""
    x = self.as_array("labels", labels)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
      raise self._not_real("labels", x)
    return x if jnp.issubdtype(x.dtype, jnp.integer) else self._of_sixteen_bits("labels", x)

  def as_mask(self, where: Any, name: str, shape: tuple[int, ...]) -> jax.Array:
    """``where`` as a boolean array of the rank of ``shape``, to which it broadcasts."""
    mask = self._as_booleans(where)
    if _broadcast_shapes(mask.shape, shape) != shape:
      raise ValueError(
        f"{self} expected where to broadcast to {name} of shape {shape}, got shape {mask.shape}."
      )
    return with_rank(mask, len(shape))

  def as_class_mask(
    self,
    where: Any,
    logits: tuple[int, ...],
    labels: tuple[int, ...],
    shape: tuple[int, ...],
    class_axes: tuple[int, ...],
    name: str = "labels",
  ) -> jax.Array:
    """``where`` as a boolean array of the rank of ``shape``, that of the logits beside the labels.

    It broadcasts to that as an array of the rank of the logits that were given, of shape
    ``logits``, or holds one value per row: then ``class_axes`` are inserted.
    """
    mask = self._as_booleans(where)
    rows = tuple(size for a, size in enumerate(shape) if a not in class_axes)
    of_logits = mask.ndim == len(logits) and _broadcast_shapes(mask.shape, shape) == shape
    per_row = mask.ndim == len(rows) and not of_logits
    expected = rows if per_row else shape
    if _broadcast_shapes(mask.shape, expected) != expected:
      beside = "" if logits == shape else f" with {name} of shape {labels}"
      raise ValueError(
        f"{self} expected where to broadcast to logits of shape {logits}{beside}, or one value "
        f"per row, of shape {rows}, got shape {mask.shape}."
      )
    if per_row:
      mask = jnp.expand_dims(mask, class_axes)
    return with_rank(mask, len(shape))

  def _as_booleans(self, where: Any) -> jax.Array:
    mask = self.as_array("where", where)
    if mask.dtype != jnp.bool_:
      raise TypeError(
        f"{self} expected where to be boolean, got dtype {mask.dtype}. Pass where != 0."
      )
    return mask

  def common_shape(
    self, name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
  ) -> tuple[int, ...]:
    """The shape that two arguments broadcast to."""
    shape_of_both = _broadcast_shapes(shape, other_shape)
    if shape_of_both is None:
      raise ValueError(
        f"{self} expected {name} and {other} to broadcast against each other, got shapes {shape} "
        f"and {other_shape}."
      )
    return shape_of_both

  def rows_of_labels(
    self, labels: tuple[int, ...], rows: tuple[int, ...], logits: tuple[int, ...]
  ) -> tuple[int, ...]:
    """The shape of the losses, for labels of this shape and one row of logits per ``rows``."""
    shape = _broadcast_shapes(labels, rows) if len(labels) == len(rows) else None
    if shape is None:
      raise ValueError(
        f"{self} expected one label per row, of shape {rows} for logits of shape {logits}, got "
        f"shape {labels}."
      )
    return shape

  def as_axes(self, name: str, axis: Axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``axis`` (an int, several, or None for all) as non-negative ints in the order given."""
    ndim = len(shape)
    if axis is None:
      return tuple(range(ndim))
    axes_given = tuple(axis) if _is_sequence(axis) else (axis,)
    axes = tuple(self.as_axis(name, a, shape) for a in axes_given)
    if len(set(axes)) < len(axes):
      raise ValueError(
        f"{self} expected distinct axes, got axis={axes_given} for {name} of shape {shape}."
      )
    return axes

  def as_axis(self, name: str, axis: Any, shape: tuple[int, ...]) -> int:
    """``axis`` as a non-negative int."""
    ndim = len(shape)
    index = self.as_static_int("axis", axis, "an int, a tuple of ints or None, all static")
    if not -ndim <= index < ndim:
      if ndim == 0:
        raise ValueError(
          f"{self} expected axis=None or axis=() for {name} of shape (), got axis={index}."
        )
      raise ValueError(
        f"{self} expected axis in [{-ndim}, {ndim}) for {name} of shape {shape}, got axis={index}."
      )
    return index % ndim

  def as_static_int(self, name: str, value: Any, expected: str) -> int:
    """``value`` as an int that is known while tracing; ``expected`` says what else it may be."""
    try:
      if isinstance(value, (bool, np.bool_)):
        raise TypeError("a bool is no index")
      return operator.index(value)
    except Exception as error:  # of JAX, or of the value's own __index__
      got = type(value).__name__ if isinstance(value, (str, type(None))) else _described(value)
      raise TypeError(f"{self} expected {name} to be {expected}, got {got}.") from error

  def as_flag(self, name: str, value: Any) -> bool:
    """``value`` as a bool that is known while tracing; 0 and 1 are such."""
    if type(value) in (bool, np.bool_):
      return bool(value)
    expected = "True or False, static"
    number = self.as_static_int(name, value, expected)
    if number not in (0, 1):
      raise ValueError(f"{self} expected {name} to be {expected}, got {number}.")
    return bool(number)

  def check_reduction(self, value: Any) -> None:
    """Raises unless ``value`` names a reduction."""
    if not isinstance(value, str) or value not in ("none", "sum", "mean"):
      raise ValueError(
        f'{self} expected reduction to be "none", "sum" or "mean", got {_described(value)}.'
      )

  def check_axis_name(
    self,
    axis_name: str | tuple[object, ...],
    name: str,
    array: jax.Array,
    **same: jax.Array,
  ) -> None:
    """Raises unless ``axis_name`` is a mesh axis that spreads ``array`` and none of ``same``."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
      raise TypeError(
        f"{self} expected axis_name to be the name of a mesh axis or a tuple of distinct names, "
        f"got {_described(axis_name)}."
      )
    for n in names:
      try:
        index = lax.axis_index(n)
      except NameError as error:
        raise ValueError(
          f"{self} expected axis_name={axis_name!r} to name an axis of a surrounding "
          "jax.shard_map, but there is none of that name. Without shard_map leave axis_name out: "
          "JAX partitions the plain function by itself."
        ) from error
      if n not in varying_axes(index):
        raise ValueError(
          f"{self} expected axis_name={axis_name!r} to name an axis of a jax.shard_map with "
          "check_vma=True. Without that (or in jax.vmap and jax.pmap) JAX does not know which "
          "values are the same on all devices, and a gradient taken outside would silently be too "
          "large by the number of devices. Pass check_vma=True."
        )
      if n not in varying_axes(array):
        raise ValueError(
          f"{self} expected {name} to be spread over the mesh axis {n!r}, got the same {name} on "
          f"all of its devices. Put {n!r} at the class axis in the in_specs of shard_map."
        )
      for other, value in same.items():
        if n in varying_axes(value):
          raise ValueError(
            f"{self} expected the same {other} on all devices of the mesh axis {n!r}, got "
            f"{other} that may differ. Leave {n!r} out of their in_specs; lax.pmax({other}, {n!r}) "
            "tells JAX that they are the same."
          )

  def check_one_class_axis(self, axes: tuple[int, ...]) -> None:
    """Raises unless the classes have one axis, as slices of them must."""
    if len(axes) != 1:
      raise ValueError(f"{self} expected one class axis where axis_name is given, got axis={axes}.")

  def check_merged(self, axes: tuple[int, ...], parts: Sequence[Any]) -> None:
    """Raises unless several class axes can be made one where their types say how they are spread.

    ``parts`` are the mesh axes of each; all that are None must come last.
    """
    whole = [part is None for part in parts]
    if whole != sorted(whole):
      raise ValueError(
        f"{self} expected logits to be spread along the first of several class axes, "
        f"axis={axes}, got these spread over the mesh axes {', '.join(map(repr, parts))}. Pass "
        "jax.sharding.reshard(logits, ...)."
      )


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
  """Whether ``value`` is a sequence of anything but characters or bytes."""
  return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _described(value: Any) -> str:
  """``value`` itself, if it is made of strings; otherwise what kind of thing it is."""
  if not is_concrete(value):
    return "a traced value"
  if isinstance(value, (jax.Array, np.ndarray)):
    return f"an array of shape {value.shape} and dtype {value.dtype}"
  parts: Sequence[Any] = value if _is_sequence(value) else (value,)
  shown = value is None or all(isinstance(part, str) for part in parts)
  return repr(value) if shown else type(value).__name__


def cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """``x`` in ``dtype``; itself, not a copy, where it has that already."""
  return x if x.dtype == dtype else x.astype(dtype)


def _narrowed(value: Any) -> Any:
  """``value`` with NumPy's and Python's wide integers clipped to 32 bits, where JAX would wrap."""
  info = np.iinfo(np.int32)
  kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]  # of Any
  if issubclass(kind, int) and kind is not bool:
    return min(max(value, info.min), info.max)
  if issubclass(kind, (np.ndarray, np.generic)) and not issubclass(kind, np.ma.MaskedArray):
    x = np.asarray(value)
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
      return np.clip(x, info.min, info.max).astype(np.int32)
  return value


def _saturated(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Integers in another integer dtype, the nearest there is where one does not fit."""
  own, new = jnp.iinfo(x.dtype), jnp.iinfo(dtype)
  if own.max > new.max:
    x = jnp.minimum(x, np.array(new.max, x.dtype))
  if own.min < new.min:
    x = jnp.maximum(x, np.array(new.min, x.dtype))
  return x.astype(dtype)


def is_concrete(x: Any) -> bool:
  """Whether the value of ``x`` is known while tracing."""
  return not isinstance(x, Tracer)


def known_number(scalar: Any) -> float | None:
  """The number that ``scalar`` is, or None where that is not known while tracing."""
  as_jax = getattr(scalar, "__jax_array__", None)
  x = scalar if as_jax is None else as_jax()
  return float(np.asarray(x)) if is_concrete(x) else None


def _broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    return None


def compute_dtype(*dtypes: DTypeLike) -> np.dtype:
  """The dtype that sums are formed in: the widest of ``dtypes``, at least float32."""
  return np.dtype(
    jnp.float64 if any(np.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32
  )
