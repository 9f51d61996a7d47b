"""The forms in which the sums along a row are computed, on any platform."""

import contextlib

import jax
import pytest

from softmax_jax import _platform

BY_PLATFORM = "by platform"


@contextlib.contextmanager
def in_form(name):
  """What is compiled inside takes this form, or by `BY_PLATFORM` that for its platform."""
  if name == BY_PLATFORM:
    yield
    return
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_platform, "always", name)
    jax.clear_caches()
    try:
      yield
    finally:
      jax.clear_caches()
