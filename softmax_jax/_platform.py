"""The one choice that depends on the platform: how the sums along a row are formed.

What such a sum costs differs between platforms, so that a function may come in up to three forms.
They compute the same:

- ``plain`` reads the row once for each sum. On a CPU arithmetic is the limit, and only sums of one
  operand are vectorized.
- ``one_read`` forms all sums in one `jax.lax.reduce`, which combines the parts of a row in any
  order. On a GPU or TPU the bytes that are read are the limit.
- ``on_chip`` is written so that XLA:GPU makes one kernel of it, which holds a row of up to
  `_ON_CHIP` entries in its registers and reads it once however many sums there are.

Derivatives are those of ``plain`` everywhere: a reduction with a combiner of our own has none that
JAX could transpose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, TypeVarTuple

import jax
from jax import lax
from jax.export import is_symbolic_dim

from softmax_jax._rows import Rows

Args = TypeVarTuple("Args")
Out = TypeVar("Out")

# The longest row of which XLA:GPU makes one kernel.
_ON_CHIP = 16_384

# Tests set this to run a form on any platform.
always: Literal["plain", "on_chip", "one_read"] | None = None


def fits_on_chip(x: jax.Array, rows: Rows) -> bool:
  """Whether XLA:GPU can hold a row of ``x`` in the registers of a kernel."""
  size = math.prod(x.shape[axis] for axis in rows.axes)
  whole = rows.axis_name is None and rows.axes == (x.ndim - 1,)
  return whole and not is_symbolic_dim(size) and size <= _ON_CHIP


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def by_platform(
  plain: Callable[[*Args], Out],
  one_read: Callable[[*Args], Out],
  on_chip: Callable[[*Args], Out] | None,
  *args: *Args,
) -> Out:
  """``plain(*args)``, in the form for the platform; ``on_chip`` is None where it does not fit."""
  forms = {"plain": plain, "one_read": one_read, "on_chip": on_chip or one_read}
  if always is not None:
    return forms[always](*args)
  plain, one_read, gpu = (_all_varying(form) for form in forms.values())
  return lax.platform_dependent(*args, cpu=plain, cuda=gpu, rocm=gpu, default=one_read)


@by_platform.defjvp
def _by_platform_jvp(
  plain: Any, one_read: Any, on_chip: Any, primals: Any, tangents: Any
) -> tuple[Any, Any]:
  return by_platform(plain, one_read, on_chip, *primals), jax.jvp(plain, primals, tangents)[1]


def _all_varying(form: Callable[..., Any]) -> Callable[..., Any]:
  """``form``, made a branch that can be vmapped with an ``spmd_axis_name`` in `jax.shard_map`.

  There an output varies over that axis only where it meets a constant, and the outputs of branches
  must vary alike.
  """
  return lambda *args: jax.tree.map(lambda x: x * 1, form(*args))
