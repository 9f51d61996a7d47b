"""Values that do not belong in an argument, and what is made of a good array."""

import decimal
import fractions

import jax
import jax.numpy as jnp
import numpy as np

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
T = np.array([[0.5, 0, 0.25, 0.25], [0, 1, 0, 0], [0.125, 0.5, 0.25, 1]], np.float32)
W = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)[:, ::-1].copy()
LABELS = np.array([0, 3, 1], np.int32)
MASK = X > -0.9
MASK[2, 3] = False


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


def identity(x):
  return x


def deleted(x):
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
  "0-d deleted": lambda: deleted(1),
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
  "function": lambda: identity,
  "module": lambda: np,
  "class": lambda: int,
  "dtype": lambda: np.dtype("float32"),
  "object": object,
  "Ellipsis": lambda: ...,
  "slice": lambda: slice(None),
  "error": lambda: ValueError("x"),
  "aval": lambda: jax.typeof(jnp.asarray(X)),
}

# Made from a good array: SAME is accepted with the same numbers, NEVER is refused, SHAPES differ.
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
  "deleted": deleted,
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
