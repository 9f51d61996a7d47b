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
JAX could transpose. JAX 0.10 drops rules of ours in a scan that is differentiated twice, and would
differentiate such a reduction; so ``plain`` is its only form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import AxisType

from softmax_jax._devices import varying_axes
from softmax_jax._rows import Rows

# The longest row of which XLA:GPU makes one kernel.
ON_CHIP = 16_384

_ONLY_PLAIN = jax.__version_info__ < (0, 11)

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def by_platform(forms: Forms, rows: Rows, x: jax.Array, *args: Any) -> Any:
  """``forms.plain(x, *args)``, in the form for the platform."""
  if always is not None:
    return (getattr(forms, always) or forms.one_read)(x, *args)
  if _ONLY_PLAIN:
    return forms.plain(x, *args)
  branches = {"cpu": forms.plain, "gpu": forms.on_gpu(x, rows), "tpu": forms.one_read}
  cpu, gpu, tpu = branches.values()
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Manual in mesh.axis_types or varying_axes(x):
    # JAX cannot vmap a branch with an ``spmd_axis_name`` there. But the mesh knows its devices.
    device = mesh.abstract_device
    return branches.get(device.platform if device else "cpu", cpu)(x, *args)
  on_gpu = {} if gpu is tpu else {"cuda": gpu, "rocm": gpu}  # each branch is traced
  return lax.platform_dependent(x, *args, cpu=cpu, **on_gpu, default=tpu)


@by_platform.defjvp
def _by_platform_jvp(forms: Forms, rows: Rows, primals: Any, tangents: Any) -> tuple[Any, Any]:
  return by_platform(forms, rows, *primals), jax.jvp(forms.plain, primals, tangents)[1]
