"""The one choice that depends on the platform: how the sums along a row are formed.

What such a sum costs differs between platforms, so that a function comes in several forms. They
compute the same:

- ``plain`` reads the row once for each sum. On a CPU arithmetic is the limit, and only sums of one
  operand are vectorized.
- ``one_read`` forms all sums in one `jax.lax.reduce`, which combines the parts of a row in any
  order. On a GPU or TPU the bytes that are read are the limit.
- ``on_chip`` is written so that XLA:GPU makes one kernel of it, which holds a row of up to
  `ON_CHIP` entries in its registers and reads it once however many sums there are.

Derivatives are those of ``plain`` everywhere: a reduction with a combiner of our own has none that
JAX could transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.export import is_symbolic_dim

from softmax_jax._forward_mode import PLATFORMS, by_platform
from softmax_jax._rows import Rows

# The longest row of which XLA:GPU makes one kernel.
ON_CHIP = 16_384

# Tests set this to run a form on any platform.
always: Literal["plain", "on_chip", "one_read"] | None = None


class Forms(NamedTuple):
  """The forms of a function, the first argument of which holds the rows."""

  plain: Callable[..., Any]
  one_read: Callable[..., Any]
  on_chip: Callable[..., Any] | None = None

  def on_gpu(self, x: jax.Array, rows: Rows) -> Callable[..., Any]:
    """The form for a GPU, which reads rows once only where they lie along the last axis."""
    if rows.axes != (x.ndim - 1,):
      return self.plain
    return self.on_chip if self.on_chip and fits_on_chip(x, rows) else self.one_read


def fits_on_chip(x: jax.Array, rows: Rows) -> bool:
  """Whether XLA:GPU can hold a row of ``x`` in the registers of a kernel."""
  size = math.prod(x.shape[axis] for axis in rows.axes)
  whole = rows.axis_name is None and rows.axes == (x.ndim - 1,)
  return whole and not is_symbolic_dim(size) and size <= ON_CHIP


def in_form_of_platform(forms: Forms, rows: Rows, x: jax.Array, *args: Any) -> Any:
  """``forms.plain(x, *args)``, in the form for the platform."""
  on_gpu = forms.on_gpu(x, rows)
  others = {"cuda": on_gpu, "rocm": on_gpu, "tpu": forms.one_read}
  if always is not None:
    others = {platform: getattr(forms, always) or forms.one_read for platform in PLATFORMS}
  return by_platform(forms.plain, others, x, *args)
