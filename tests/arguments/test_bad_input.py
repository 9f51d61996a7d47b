"""Every argument of every public function, called with what does not belong there.

The outcome is the documented result, compared with SciPy's in float64, or a TypeError or ValueError
whose message begins with the name of the function; never an error from the inside of JAX, and never
another number. What each argument takes is said once, in `ARGUMENTS` and the `Kind`s.
"""

import dataclasses
import decimal
import fractions
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special

import softmax_jax as sj
from softmax_jax import derivatives
from softmax_jax.verify import DerivativeError, Report, Row, check_derivatives

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
T = np.array([[0.5, 0, 0.25, 0.25], [0, 1, 0, 0], [0.125, 0.5, 0.25, 1]], np.float32)
W = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)[:, ::-1].copy()
LABELS = np.array([0, 3, 1], np.int32)
MASK = X > -0.9
MASK[2, 3] = False


# --- hostile values -------------------------------------------------------------------------------


class ByNumPy:
  def __init__(self, value):
    self.value = value

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.value, dtype)


class ByJax:
  def __init__(self, value):
    self.value = value

  def __jax_array__(self):
    return jnp.asarray(self.value)


class Broken:
  """Raises whatever is done with it."""

  def __array__(self, dtype=None, copy=None):
    raise RuntimeError("no array")

  __index__ = __float__ = __bool__ = __len__ = __iter__ = __hash__ = __array__
  __eq__ = lambda self, other: self.__array__()


class BrokenByJax(Broken):
  def __jax_array__(self):
    raise RuntimeError("no array")


class Index:
  def __init__(self, value):
    self.value = value

  def __index__(self):
    return self.value


class Int(int):
  pass


class Str(str):
  pass


class Subclass(np.ndarray):
  pass


def _function(x):
  return x


def _deleted(x):
  x = jnp.array(x)
  x.delete()
  return x


# Made anew for each call, since some are used up.
FIXED = {
  "None": lambda: None,
  "True": lambda: True,
  "False": lambda: False,
  **{str(n): lambda n=n: n for n in (0, 1, -1, 2, -3, 7, 2**31, 2**63, 2**70, -(2**70))},
  **{str(x): lambda x=x: x for x in (0.0, 0.5, 1.0, 1.5, -0.5, 1e300, 1e-300)},
  **{str(x): lambda x=x: x for x in (float("nan"), float("inf"), -float("inf"), 1j)},
  "np.bool_": lambda: np.bool_(True),
  "np.int8": lambda: np.int8(1),
  "np.uint64": lambda: np.uint64(2**64 - 1),
  "np.float16": lambda: np.float16(0.5),
  "np.float64": lambda: np.float64(0.5),
  "np.longdouble": lambda: np.longdouble(0.5),
  "np.complex64": lambda: np.complex64(1),
  "np.datetime64": lambda: np.datetime64("2020-01-01"),
  "np.timedelta64": lambda: np.timedelta64(1, "s"),
  "np.void": lambda: np.void(b"ab"),
  "np.str_": lambda: np.str_("no"),
  "np.bytes_": lambda: np.bytes_(b"no"),
  "np.ma.masked": lambda: np.ma.masked,
  "0-d int": lambda: np.array(1),
  "0-d float": lambda: np.array(0.5, np.float32),
  "0-d bool": lambda: jnp.asarray(True),
  "0-d jax int": lambda: jnp.asarray(1),
  "0-d jax float": lambda: jnp.asarray(0.5),
  "0-d object": lambda: np.array(None),
  "0-d str": lambda: np.array("mean"),
  "0-d deleted": lambda: _deleted(1),
  "0-d __array__": lambda: ByNumPy(np.float32(0.5)),
  "0-d __jax_array__": lambda: ByJax(0.5),
  "wide by __array__": lambda: ByNumPy(np.array([0, 2**32 + 3, 1])),
  "Int": lambda: Int(1),
  "Index": lambda: Index(0),
  "Decimal": lambda: decimal.Decimal("0.5"),
  "Fraction": lambda: fractions.Fraction(1, 2),
  "()": lambda: (),
  "[]": lambda: [],
  "(0,)": lambda: (0,),
  "(0, 1)": lambda: (0, 1),
  "[1, 0]": lambda: [1, 0],
  "range(2)": lambda: range(2),
  "range(4)": lambda: range(4),
  "(0, None)": lambda: (0, None),
  "(0.0,)": lambda: (0.0,),
  "((0,),)": lambda: ((0,),),
  "(True,)": lambda: (True,),
  "(0, -2)": lambda: (0, -2),
  "(0, 2)": lambda: (0, 2),
  "['mean']": lambda: ["mean"],
  "('mean',)": lambda: ("mean",),
  "'mean'": lambda: "mean",
  "Str": lambda: Str("mean"),
  "'Mean'": lambda: "Mean",
  "b'mean'": lambda: b"mean",
  "b'\\0'": lambda: b"\0",
  "bytearray": lambda: bytearray(b"\0\1\0"),
  "''": lambda: "",
  "dict": lambda: {"a": 1},
  "set": lambda: {0},
  "frozenset": lambda: frozenset([0]),
  "generator": lambda: (i for i in (0, 1)),
  "int array": lambda: np.array([0, 1]),
  "array of strings": lambda: np.array(["mean", "sum"]),
  "ragged": lambda: np.array([[1], [1, 2]], object),
  "key": lambda: jax.random.key(0),
  "keys": lambda: jax.random.split(jax.random.key(0), 3),
  "float0": lambda: np.zeros((3, 4), jax.dtypes.float0),
  "Broken": Broken,
  "BrokenByJax": BrokenByJax,
  "function": lambda: _function,
  "module": lambda: np,
  "class": lambda: int,
  "dtype": lambda: np.dtype("float32"),
  "object": object,
  "Ellipsis": lambda: ...,
  "slice": lambda: slice(None),
  "error": lambda: ValueError("x"),
  "aval": lambda: jax.typeof(jnp.asarray(X)),
}

# What is made of a good array: what is taken, as the same numbers; what is not; other shapes.
SAME = {
  "NumPy": lambda x: x,
  "JAX": jnp.asarray,
  "subclass": lambda x: x.view(Subclass),
  "__array__": ByNumPy,
  "__jax_array__": ByJax,
  "Fortran": lambda x: np.array(x, order="F"),
  "read-only": lambda x: np.broadcast_to(x, x.shape),
  "negative strides": lambda x: np.flip(np.flip(x).copy()),
}
NEVER = {
  "list": lambda x: list(np.atleast_1d(x)),
  "tuple": lambda x: tuple(np.atleast_1d(x)),
  "lists": lambda x: np.atleast_1d(x).tolist(),
  "memoryview": lambda x: memoryview(np.atleast_1d(x)),
  "object dtype": lambda x: x.astype(object),
  "str dtype": lambda x: x.astype(str),
  "bytes dtype": lambda x: x.astype(bytes),
  "datetime": lambda x: np.zeros(x.shape, "M8[s]"),
  "timedelta": lambda x: np.zeros(x.shape, "m8[s]"),
  "structured": lambda x: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]),
  "recarray": lambda x: np.zeros(x.shape, [("a", "f4")]).view(np.recarray),
  "masked": lambda x: np.ma.masked_array(x, np.zeros(x.shape, bool)),
  "complex": lambda x: x + 0j,
  "deleted": _deleted,
  "ShapeDtypeStruct": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
}
SHAPES = {
  "more axes": lambda x: np.broadcast_to(x, (2, 2, 2, *x.shape)),
  "fewer axes": lambda x: x[0],
  "longer": lambda x: np.concatenate([x, x], -1),
  "empty": lambda x: x[:0],
}
FLOATS = ("bfloat16",)
INTEGERS = ("int64", "uint2")
NARROW = ("float8_e4m3fn", "float6_e2m3fn", "float4_e2m1fn")
DTYPES = (*FLOATS, *INTEGERS, "bool", *NARROW, "longdouble", ">f4", ">i4")


# --- what each argument takes ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
  """What an argument takes.

  Attributes:
    good: an array that it takes, or None if it takes no arrays.
    dtypes: those of `DTYPES` in which it takes that.
    fixed: those of `FIXED` that it takes, by name, and what they stand for.
    shapes: those of `SHAPES` that it takes; None stands for any, which are not tried here.
  """

  good: np.ndarray | None
  dtypes: tuple[str, ...] = ()
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  shapes: tuple[str, ...] | None = ()

  def cases(self) -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Their names, what makes the value, and what it stands for or `REFUSED`."""
    for name, make in FIXED.items():
      yield name, make, self.fixed.get(name, REFUSED)
    good = X if self.good is None else self.good
    for name, make in {**SAME, **NEVER}.items():
      taken = self.good is not None and name in SAME
      yield name, lambda make=make: make(good), good if taken else REFUSED
    for name, make in SHAPES.items():
      if self.shapes is not None and (good.ndim or name == "more axes"):
        value = make(good)
        yield name, lambda value=value: value, value if name in self.shapes else REFUSED
    for name in DTYPES:
      value = (np.abs(good) if name[0] in "ub" else good).astype(getattr(ml_dtypes, name, name))
      yield name, lambda value=value: value, value if name in self.dtypes else REFUSED


REFUSED = object()

REAL = (*FLOATS, *INTEGERS)
OPTIONAL = {"None": None}
INTS = {str(n): n for n in (0, 1, -1, 2, -3, 7)}
INTS |= dict.fromkeys(("np.int8", "Int", "0-d int", "0-d jax int"), 1)
X64 = jax.config.jax_enable_x64
# What JAX makes of large and small numbers in float32.
NUMBERS = INTS | {str(x): x for x in (0.0, 0.5, 1.0, 1.5, -0.5, np.nan, np.inf, -np.inf)}
NUMBERS |= {"1e+300": np.inf, "1e-300": 0.0}
NUMBERS |= dict.fromkeys(("np.float16", "np.float64", "0-d float", "0-d jax float"), 0.5)
NUMBERS |= dict.fromkeys(("0-d __array__", "0-d __jax_array__"), 0.5)
if X64:  # integers of 64 bits are numbers too
  NUMBERS |= {"2147483648": 2**31, "np.uint64": 2**64 - 1}
OF_THEIR_OWN = NUMBERS | ({"1e+300": 1e300} if X64 else {})  # not brought to float32
SHARES = {name: x for name, x in NUMBERS.items() if 0 <= x <= 1}
CAPS = {name: x for name, x in NUMBERS.items() if 0 < x < np.inf}
BOOLS = {"True": True, "False": False, "np.bool_": True}
FLAGS = {name: bool(n) for name, n in INTS.items() if n in (0, 1)} | BOOLS | {"Index": False}
AXES = {"0": 0, "Index": 0, "(0,)": 0, "None": None, "()": (), "[]": ()}
AXES |= dict.fromkeys(("1", "-1", "np.int8", "Int", "0-d int", "0-d jax int"), 1)
AXES |= dict.fromkeys(("(0, 1)", "[1, 0]", "range(2)"), (0, 1))
LAST = {name: a for name, a in AXES.items() if a == 1}
SIZES = {name: n for name, n in INTS.items() if n > 0}
LARGE = {str(n): n for n in (2**31, 2**63, 2**70)} | {"np.uint64": 2**64 - 1}
WIDE = {"wide by __array__": np.array([0, 2**32 + 3, 1])} if X64 else {}  # refused in 32 bits
VECTOR = {"int array": np.array([0, 1])} | WIDE

any_shape = Kind(X, REAL, VECTOR, None)
like_x = Kind(X, REAL)
logits = Kind(X, FLOATS)
where = Kind(MASK, ("bool",), OPTIONAL | BOOLS | {"0-d bool": True})
axis = Kind(None, fixed=AXES)
flag = Kind(None, fixed=FLAGS)
scalar = Kind(np.array(0.5, np.float32), REAL, NUMBERS)
integers = Kind(LABELS, INTEGERS, WIDE)
# No label is as large as those that JAX would wrap.
ignored = Kind(np.array(1), INTEGERS, INTS | LARGE | {str(-(2**70)): -(2**70)} | OPTIONAL)
none = Kind(None, fixed=OPTIONAL)


def one_per_class(size, dtypes=REAL):
  return Kind(np.linspace(0.5, 2, size, dtype=np.float32), dtypes, OPTIONAL)


options = {
  "label_smoothing": Kind(np.array(0.5, np.float32), REAL, SHARES),
  "z_loss": scalar,
  "reduction": Kind(None, fixed={"'mean'": "mean", "Str": "mean"}),
  "axis_name": none,
}

# function, its good arguments, and what each argument takes
FUNCTIONS = {
  "softmax": (
    sj.softmax,
    {"x": X},
    {
      "x": any_shape,
      "axis": axis,
      "where": dataclasses.replace(where, shapes=("fewer axes",)),
      "axis_name": none,
    },
  ),
  "log_softmax": (
    sj.log_softmax,
    {"x": X},
    {
      "x": any_shape,
      "axis": axis,
      "where": dataclasses.replace(where, shapes=("fewer axes",)),
      "axis_name": none,
    },
  ),
  "logsumexp": (
    sj.logsumexp,
    {"a": X},
    {
      "a": Kind(X, REAL, OF_THEIR_OWN | VECTOR, None),
      "axis": axis,
      "b": Kind(np.abs(X), ("bfloat16", "int64"), NUMBERS | OPTIONAL, ("more axes", "fewer axes")),
      "keepdims": flag,
      "return_sign": flag,
      "where": dataclasses.replace(where, shapes=("fewer axes",)),
      "axis_name": none,
    },
  ),
  "softmax_cross_entropy": (
    sj.softmax_cross_entropy,
    {"logits": X, "labels": T},
    {
      "logits": Kind(X, FLOATS, {}, ("more axes", "fewer axes")),
      "labels": Kind(T, REAL, OF_THEIR_OWN, ("more axes", "fewer axes")),
      "axis": axis,
      "where": where,
      "class_weights": one_per_class(4),
      "return_aux": flag,
      **options,
    },
  ),
  "softmax_cross_entropy_with_integer_labels": (
    sj.softmax_cross_entropy_with_integer_labels,
    {"logits": X, "labels": LABELS},
    {
      "logits": Kind(X, FLOATS, {}, ("longer",)),
      "labels": integers,
      "axis": Kind(None, fixed=LAST),  # the labels do not fit the others
      "where": where,
      "class_weights": one_per_class(4),
      "ignore_index": ignored,
      "return_aux": flag,
      **options,
    },
  ),
  "linear_softmax_cross_entropy": (
    sj.linear_softmax_cross_entropy,
    {"x": X, "weight": W, "labels": LABELS},
    {
      "x": Kind(X, ("bfloat16",)),
      "weight": Kind(W, ("bfloat16",), {}, ("longer",)),
      "labels": integers,
      "bias": one_per_class(5, FLOATS),
      "vocab_axis": Kind(None, fixed=LAST),
      "class_weights": one_per_class(5),
      "softcap": Kind(np.array(0.5, np.float32), FLOATS, CAPS | OPTIONAL),
      "ignore_index": ignored,
      "chunk_size": Kind(None, fixed=SIZES | LARGE | OPTIONAL),
      "num_classes": Kind(
        None, fixed={k: n for k, n in SIZES.items() if n < 3} | {"0": 0, "Index": 0} | OPTIONAL
      ),
      **options,
    },
  ),
  **{
    name: (getattr(derivatives, name), dict.fromkeys(kinds, X), kinds)
    for name, kinds in {
      "softmax_jacobian": {"x": dataclasses.replace(like_x, fixed=VECTOR, shapes=None)},
      "softmax_jvp": {"x": like_x, "x_dot": like_x},
      "softmax_vjp": {"x": like_x, "y_bar": like_x},
      "softmax_hvp": {"x": like_x, "y_bar": like_x, "x_dot": like_x},
      "log_softmax_jacobian": {"x": dataclasses.replace(like_x, fixed=VECTOR, shapes=None)},
      "logsumexp_hessian": {"x": dataclasses.replace(like_x, fixed=VECTOR, shapes=None)},
      "cross_entropy_gradient": {"logits": logits, "labels": Kind(T, FLOATS, WIDE)},
      "cross_entropy_hessian": {"logits": Kind(X, FLOATS, {}, None)},
      "cross_entropy_hvp": {"logits": logits, "x_dot": like_x},
    }.items()
  },
}
ARGUMENTS = [(function, name) for function, (_, _, kinds) in FUNCTIONS.items() for name in kinds]
STATIC = (
  *("axis", "axis_name", "reduction", "keepdims", "return_sign", "return_aux"),
  *("vocab_axis", "chunk_size", "num_classes"),
)


# --- the oracle -----------------------------------------------------------------------------------


def _jacobian(x):
  a = scipy.special.softmax(x, axis=-1)
  return a[..., None] * np.eye(a.shape[-1]) - a[..., :, None] * a[..., None, :]


def _product(x, v):
  return np.einsum("...ij,...j->...i", _jacobian(x), v)


def _hvp(x, y_bar, x_dot):
  a = scipy.special.softmax(x, axis=-1)
  p = (y_bar - np.sum(a * y_bar, -1, keepdims=True)) * (
    x_dot - np.sum(a * x_dot, -1, keepdims=True)
  )
  return _product(x, p)


def _soft_loss(logits, labels, axis=-1, where=True, weights=None, smoothing=0.0, z_loss=0.0):
  """Losses per row, and their log-normalizers."""
  logits, labels, where = np.broadcast_arrays(logits, labels, where)
  z = np.where(where, logits, -np.inf)
  axes = tuple(range(z.ndim)) if axis is None else axis
  any_ = np.any(where, axis=axes)
  count = np.maximum(np.sum(where, axis=axes, keepdims=True), 1)
  with np.errstate(all="ignore"):
    lse = scipy.special.logsumexp(z, axis=axes, keepdims=True)
    cost = np.where(where, lse - z, 0)
    w = 1.0 if weights is None else weights
    label = (1 - smoothing) * labels + smoothing / count
    lse = np.where(any_, np.squeeze(lse, axes), 0)
    return np.sum(w * label * cost, axis=axes) + z_loss * lse**2, lse


def _reduced(losses, reduction, weight):
  if reduction == "none":
    return losses
  return np.sum(losses) / (weight if reduction == "mean" else 1)


def softmax_cross_entropy(
  logits,
  labels,
  axis=-1,
  where=None,
  class_weights=None,
  label_smoothing=0.0,
  z_loss=0.0,
  reduction="none",
  return_aux=False,
  axis_name=None,
):
  where = True if where is None else where
  losses, lse = _soft_loss(logits, labels, axis, where, class_weights, label_smoothing, z_loss)
  loss = _reduced(losses, reduction, losses.size)
  return (loss, (losses, lse, 0 * losses, losses.size)) if return_aux else loss


def _one_hot(labels, classes):
  """NaN in a row whose label is no class."""
  invalid = (labels < 0) | (labels >= classes)
  return np.where(invalid[:, None], np.nan, np.arange(classes) == labels[:, None])


def integer_cross_entropy(
  logits,
  labels,
  axis=-1,
  where=None,
  class_weights=None,
  label_smoothing=0.0,
  z_loss=0.0,
  ignore_index=None,
  reduction="none",
  return_aux=False,
  axis_name=None,
):
  where = np.broadcast_to(True if where is None else where, logits.shape)
  w = np.ones(logits.shape[-1]) if class_weights is None else class_weights
  losses, lse = _soft_loss(logits, _one_hot(labels, len(w)), -1, where, w, label_smoothing, z_loss)
  counts = np.any(where, -1)
  if ignore_index is not None:
    counts = counts & (labels != ignore_index)
  labels = labels % len(w)  # those that are no class have a loss of NaN already
  at_label = where[np.arange(len(labels)), labels]
  losses = np.where(counts, np.where(at_label, losses, np.inf), 0)
  weight = np.sum(np.where(counts, w[labels], 0))
  loss = _reduced(losses, reduction, weight)
  return (loss, (losses, lse, 0 * losses, weight)) if return_aux else loss


def linear_cross_entropy(
  x, weight, labels, bias=None, softcap=None, reduction="mean", vocab_axis=-1, **options
):
  for name in ("chunk_size", "axis_name"):
    options.pop(name, None)
  num_classes = options.pop("num_classes", None)
  if num_classes is not None:  # without classes the loss is 0; class 3 is not the only one
    return np.nan if num_classes else 0.0
  z = x @ weight + (0 if bias is None else bias)
  z = z if softcap is None else softcap * np.tanh(z / softcap)
  return integer_cross_entropy(z, labels, reduction=reduction, **options)


def _masked(function, fill):
  def f(x, axis=-1, where=None, axis_name=None):
    where = np.broadcast_to(True if where is None else where, x.shape)
    with np.errstate(all="ignore"):
      return np.where(where, function(np.where(where, x, -np.inf), axis=axis), fill)

  return f


def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False, where=None, axis_name=None):
  if where is not None:
    a = np.where(where, a, -np.inf)
  with np.errstate(all="ignore"):
    return scipy.special.logsumexp(a, axis, b, keepdims, return_sign)


def _cross_entropy_gradient(logits, labels):
  labels = labels if labels.ndim == logits.ndim else _one_hot(labels, logits.shape[-1])
  return scipy.special.softmax(logits, axis=-1) * np.sum(labels, -1, keepdims=True) - labels


ORACLE = {
  "softmax": _masked(scipy.special.softmax, 0),
  "log_softmax": _masked(scipy.special.log_softmax, -np.inf),
  "logsumexp": logsumexp,
  "softmax_cross_entropy": softmax_cross_entropy,
  "softmax_cross_entropy_with_integer_labels": integer_cross_entropy,
  "linear_softmax_cross_entropy": linear_cross_entropy,
  "softmax_jacobian": _jacobian,
  "softmax_jvp": lambda x, x_dot: _product(x, x_dot),
  "softmax_vjp": lambda x, y_bar: _product(x, y_bar),
  "softmax_hvp": _hvp,
  "log_softmax_jacobian": lambda x: (
    np.eye(x.shape[-1]) - scipy.special.softmax(x, axis=-1)[..., None, :]
  ),
  "logsumexp_hessian": _jacobian,
  "cross_entropy_hessian": lambda logits: _jacobian(logits),
  "cross_entropy_hvp": lambda logits, x_dot: _product(logits, x_dot),
  "cross_entropy_gradient": _cross_entropy_gradient,
}


def _plain(value):
  """``value`` as the oracle takes it."""
  if isinstance(value, np.ndarray) and value.dtype != bool:
    return value.astype(np.int64 if jnp.issubdtype(value.dtype, jnp.integer) else np.float64)
  return value


def _wrong(actual, expected):
  """What is wrong with the numbers, or ""."""
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for mine, theirs in zip(actual, expected, strict=True):
    if mine.shape != np.shape(theirs):
      return f"shape {mine.shape} for {np.shape(theirs)}"
    bound = max(1e-6, float(jnp.finfo(mine.dtype).eps))
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


# --- the sweep ------------------------------------------------------------------------------------


def _outcome(function, call):
  """What ``call`` returns, and the message of its error, which tells what is wrong with that."""
  try:
    with np.errstate(over="ignore"):  # of JAX, where a number is too large for float32
      return call(), ""
  except Exception as error:
    message = str(error)
    own = type(error) in (TypeError, ValueError) and message.startswith(
      (f"{function} expected ", f"{function} knows no ")
    )
    return None, message if own else f"NOT OURS: {type(error).__name__}: {message}"


def _refuses_two_dtypes(message):
  """Whether that is so because the promotion of dtypes is switched off."""
  strict = jax.config.jax_numpy_dtype_promotion == "strict"
  return strict and "of dtypes that promote to a common one" in message


def _names(argument, message):
  """Whether a message says which argument is wrong."""
  if argument == "axis":  # or that the labels do not fit it
    return True
  return argument.rstrip("s").replace("_", " ") in message.replace("_", " ")


def _with_marks(function, argument):
  """Of `num_classes`, as the labels that it is too small for give NaN."""
  marks = pytest.mark.without("debug_nans") if argument == "num_classes" else ()
  return pytest.param(function, argument, marks=marks)


@pytest.mark.parametrize("function,argument", [_with_marks(*a) for a in ARGUMENTS], ids=str)
def test_an_error_that_names_the_function_or_the_documented_result(function, argument):
  f, good, kinds = FUNCTIONS[function]
  good = {name: x for name, x in good.items() if name != argument}
  arrays = jax.tree.map(jnp.asarray, good)
  faults, messages = [], set()
  for name, make, meaning in kinds[argument].cases():
    out, message = _outcome(function, lambda make=make: f(**arrays, **{argument: make()}))
    if _refuses_two_dtypes(message):
      fault = ""
    elif meaning is not REFUSED:
      plain = {k: _plain(x) for k, x in {**good, argument: meaning}.items()}
      fault = message or _wrong(out, ORACLE[function](**plain))
    elif not message:
      fault = f"taken: {out}"
    elif not _names(argument, message) or message.startswith("NOT"):
      fault = message
    elif message in messages:
      fault = ""
    else:  # as clear where the other arrays are traced
      messages.add(message)
      of_arrays = functools.partial(f, **{argument: make()})
      _, traced = _outcome(function, lambda g=of_arrays: jax.eval_shape(lambda xs: g(**xs), arrays))
      fault = f"traced, {traced}" if not traced or traced.startswith("NOT") else ""
    if fault:
      faults.append(f"{name}: {fault}")
  assert not faults, "\n".join(faults)


@pytest.mark.without("disable_jit")  # under which nothing is traced
@pytest.mark.parametrize("function,argument", [a for a in ARGUMENTS if a[1] in STATIC], ids=str)
def test_a_traced_value_in_place_of_a_static_one(function, argument):
  f, good, _ = FUNCTIONS[function]
  for value in (1, 1.0, True, jnp.arange(2)):
    call = jax.jit(lambda value: f(**good, **{argument: value}))
    _, message = _outcome(function, lambda call=call, value=value: call(value))
    assert message.startswith(f"{function} expected {argument} ") and "traced value" in message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_wrong_is_said_inside_of_transformations(function):
  f, good, kinds = FUNCTIONS[function]
  first, *others = good
  rest = {name: jnp.asarray(good[name]) for name in others}
  for argument in kinds:
    if argument == first:
      continue
    bad = lambda x, argument=argument: f(**{**rest, first: x, argument: {}})
    for transform in (jax.jit, jax.grad, jax.jacfwd, jax.vmap):
      x = jnp.asarray(good[first])[(None,) if transform is jax.vmap else ()]
      _, message = _outcome(function, lambda t=transform, bad=bad, x=x: t(bad)(x))
      assert message.startswith(f"{function} expected ") and argument in message, message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_keyword_and_one_argument_too_many(function):
  f, good, kinds = FUNCTIONS[function]
  with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument 'dim'"):
    f(**good, dim=1)
  with pytest.raises(TypeError, match=rf"^{function}\(\) takes .* positional argument"):
    f(*good.values(), *[None] * (len(kinds) + 1 - len(good)))
  with pytest.raises(TypeError, match=rf"^{function}\(\) missing 1 required positional argument"):
    f(*list(good.values())[1:])


def test_the_arguments_of_this_file_are_all_there_are():
  named = {name for name in derivatives.__all__} | set(sj.__all__)
  assert named - set(FUNCTIONS) == {"CrossEntropyAux", "enable_forward_mode"}
  for f, _, kinds in FUNCTIONS.values():
    assert set(inspect.signature(f).parameters) == set(kinds)


# --- enable_forward_mode --------------------------------------------------------------------------


def _cube():
  @jax.custom_vjp
  def cube(x):
    return x**3

  cube.defvjp(lambda x: (x**3, x), lambda x, y_bar: (3 * x**2 * y_bar,))
  return cube


def test_what_is_no_custom_vjp_function_and_what_is_no_rule():
  cube = _cube()
  others = {
    "jit": lambda: jax.jit(cube),
    "custom_jvp": lambda: jax.custom_jvp(_function),
    "twice": lambda: sj.enable_forward_mode(cube),
    "the class": lambda: jax.custom_vjp,
  }
  name = "enable_forward_mode"
  for make in {**FIXED, **others}.values():
    _, message = _outcome(name, lambda make=make: sj.enable_forward_mode(make()))
    assert message.startswith("enable_forward_mode expected a jax.custom_vjp function, got ")
  for make in FIXED.values():
    value = make()
    _, message = _outcome(name, lambda value=value: sj.enable_forward_mode(cube, value))
    if value is None or callable(value):
      assert not message
    else:
      assert message.startswith("enable_forward_mode expected tangent to be a function, got ")


@pytest.mark.parametrize("name", [n for n in FIXED if n not in ("1e+300", "generator")])
def test_a_tangent_rule_that_returns_no_tangent(name):
  value = FIXED[name]()
  f = sj.enable_forward_mode(_cube(), tangent=lambda x, args_dot: value)
  x = np.array(2, jnp.result_type(float))
  call = lambda: jax.jvp(f, (x,), (np.ones_like(x),))[1]
  if value is None:  # documented: no tangent
    assert call() == 0
  elif isinstance(value, float) or name in ("0-d float", "0-d jax float")[X64:]:
    np.testing.assert_array_equal(call(), value)
  else:
    with pytest.raises(TypeError, match=r"^the tangent rule of cube must return "):
      call()


def test_the_error_of_a_call_with_other_arguments_names_the_function():
  @sj.enable_forward_mode
  @jax.custom_vjp
  def cube(x):
    return x**3

  def power(n, x):
    return x**n

  power = sj.enable_forward_mode(jax.custom_vjp(power, nondiff_argnums=(0,)))
  for call in (
    lambda: cube(),
    lambda: cube(1.0, 2.0),
    lambda: cube(y=1.0),
    lambda: power(3),
    lambda: power(3, 1.0, 2.0),
    lambda: power(3, y=1.0),
  ):
    with pytest.raises(TypeError, match=r"cube|power\(\)"):
      call()


# --- verify ---------------------------------------------------------------------------------------


def _takes(name, value):
  """Whether an option of `check_derivatives` takes ``value``."""
  number = isinstance(value, numbers.Real) and value >= 0
  return {
    "f": callable(value),
    "reference": value is None or callable(value),
    "jacobian": value is None or callable(value),
    "kwargs": value is None or isinstance(value, dict),
    "edge_points": isinstance(value, (list, tuple)) and all(isinstance(p, tuple) for p in value),
    "checks": value is None or (isinstance(value, (list, tuple)) and not value),
    "skip": isinstance(value, (list, tuple)) and not value,
    "bounds": value is None,
    "max_residual_bytes": value is None or number,
    "name": value is None or isinstance(value, str),
    "seed": number and isinstance(value, (int, np.integer)),
  }[name]


VERIFY = [p for p in inspect.signature(check_derivatives).parameters if p != "args"]


@pytest.mark.parametrize("option", VERIFY)
def test_the_options_of_check_derivatives(option):
  """All values that it does not take, and those of others that run no check."""
  faults = []
  values = FIXED | {"[array]": lambda: [X], "[list, array]": lambda: [[X], X]}
  del values["np.timedelta64"]  # of which NumPy says that it is an integer
  for name, make in values.items():
    value = make()
    if _takes(option, value) and option in ("f", "reference", "jacobian", "kwargs"):
      continue  # and calls it
    given = {"f": jnp.sin, "checks": [], option: value}
    if option == "checks" and value is None:
      continue  # all checks
    _, message = _outcome("check_derivatives", lambda given=given: _check(**given))
    if bool(message) == _takes(option, value) or message.startswith("NOT OURS"):
      faults.append(f"{name}: {message}")
  assert not faults, "\n".join(faults)


def _check(f, **kwargs):
  return check_derivatives(f, jnp.float32(0.5), **kwargs)


# Of other things, as lists, the function has to say what it makes.
@pytest.mark.parametrize(
  "name",
  [n for n, make in NEVER.items() if isinstance(make(X), (np.ndarray, jax.Array))]
  + ["longdouble", ">f4"],
)
def test_arguments_of_check_derivatives_that_are_no_arrays_of_jax(name):
  make = NEVER.get(name, lambda x: x.astype(name))
  value = make(X)
  with pytest.raises(
    (TypeError, ValueError), match=r"^check_derivatives expected .*(args\[0\]|real)"
  ):
    check_derivatives(jnp.sin, value, checks=["value"])


def test_bounds_and_reports():
  for bounds, error in (
    ({"vjp": "1"}, TypeError),
    ({1: 1.0}, TypeError),
    ({"vjp": -1.0}, ValueError),
    ({"vjp": np.nan}, ValueError),
    ({"vpj": 1.0}, ValueError),
  ):
    with pytest.raises(error, match=r"^check_derivatives (expected|knows no) "):
      _check(jnp.sin, checks=[], bounds=bounds)
  row = Row("f", "vjp", "passed")
  for rows in (None, row, [row], (row, None), "ab", 3):
    with pytest.raises(TypeError, match=r"^Report expected a tuple of Row, got "):
      Report(rows)
  for other in (3, None, row, (row,)):
    with pytest.raises(TypeError, match="unsupported operand"):
      Report((row,)) + other
  assert Report((row,)) and not Report(())
  with pytest.raises(DerivativeError, match="no derivative was confirmed"):
    Report(()).raise_if_failed()
