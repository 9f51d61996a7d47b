"""What each argument of each public function accepts: a `Kind` for each in `FUNCTIONS`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from hostile_values import (
  DTYPES,
  FIXED,
  FLOATS,
  INTEGERS,
  LABELS,
  MASK,
  NEVER,
  SAME,
  SHAPES,
  T,
  W,
  X,
)

import softmax_jax as sj
from softmax_jax import derivatives


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
    """Each case: its name, a function that makes the value, and its meaning or `REFUSED`."""
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
FLOATING = {name: x for name, x in OF_THEIR_OWN.items() if not isinstance(x, int)}
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
# An integer too large for JAX is taken too: no label equals it.
ignored = Kind(np.array(1), INTEGERS, INTS | LARGE | {str(-(2**70)): -(2**70)} | OPTIONAL)
none = Kind(None, fixed=OPTIONAL)
HEAD = jax.tree_util.Partial(lambda params, x: x @ params)  # a pytree without leaves


def one_per_class(size, dtypes=REAL):
  return Kind(np.linspace(0.5, 2, size, dtype=np.float32), dtypes, OPTIONAL)


one_per_row = one_per_class(len(LABELS))
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
      "sample_weights": one_per_row,
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
      "sample_weights": one_per_row,
      "ignore_index": ignored,
      "ignore_invalid": flag,
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
      "sample_weights": one_per_row,
      "logit_scale": Kind(np.array(0.5, np.float32), FLOATS, CAPS | OPTIONAL),
      "softcap": Kind(np.array(0.5, np.float32), FLOATS, CAPS | OPTIONAL),
      "ignore_index": ignored,
      "ignore_invalid": flag,
      "chunk_size": Kind(None, fixed=SIZES | LARGE | OPTIONAL),
      "num_classes": Kind(
        None, fixed={k: n for k, n in SIZES.items() if n < 3} | {"0": 0, "Index": 0} | OPTIONAL
      ),
      "logits_sharding": none,
      "return_aux": flag,
      **options,
    },
  ),
  "chunked_softmax_cross_entropy": (
    sj.chunked_softmax_cross_entropy,
    {"head": HEAD, "params": W, "x": X, "labels": LABELS},
    {
      "head": None,
      "params": None,
      "x": None,
      "labels": integers,
      "class_weights": one_per_class(5),
      "sample_weights": one_per_row,
      "ignore_index": ignored,
      "ignore_invalid": flag,
      "chunk_size": Kind(None, fixed=SIZES | LARGE | OPTIONAL),
      "return_aux": flag,
      **{name: kind for name, kind in options.items() if name != "axis_name"},
    },
  ),
  "softmax_entropy": (
    sj.softmax_entropy,
    {"logits": X},
    {"logits": Kind(X, FLOATS, {}, None), "axis": axis, "where": where, "axis_name": none},
  ),
  "softmax_kl_divergence": (
    sj.softmax_kl_divergence,
    {"logits": X, "target_logits": T},
    {
      "logits": Kind(X, FLOATS, {}, ("more axes", "fewer axes")),
      "target_logits": Kind(T, FLOATS, FLOATING, ("more axes", "fewer axes")),
      "axis": axis,
      "where": where,
      "temperature": Kind(np.array(1, np.float32), REAL, CAPS),
      "reduction": options["reduction"],
      "axis_name": none,
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
ARGUMENTS = [  # but for a user's function and the pytrees that it takes
  (function, name)
  for function, (_, _, kinds) in FUNCTIONS.items()
  for name, kind in kinds.items()
  if kind is not None
]
STATIC = (
  *("axis", "axis_name", "reduction", "keepdims", "return_sign", "return_aux", "ignore_invalid"),
  *("vocab_axis", "chunk_size", "num_classes", "logits_sharding"),
)
