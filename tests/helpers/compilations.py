"""Counting what XLA compiles."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
  """A list that grows by one with every program that XLA compiles."""
  compiled = []

  def listener(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
