"""Checks of arguments that only the chunked loss has."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softmax_jax._arguments import is_concrete
from softmax_jax._linear_cross_entropy.arguments import LinearArguments


class HeadArguments(LinearArguments):
  """The arguments of a head and a loss on it."""

  def as_features(self, x: Any, rows: tuple[int, ...]) -> Any:
    """``x`` as a pytree of arrays that begin with the axes of the labels, ``rows``."""
    x = jax.tree.map(jnp.asarray, x)
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
      if leaf.shape[: len(rows)] != rows:
        raise ValueError(
          f"{self} expected features for labels of shape {rows}, so that x (or each array in it) "
          f"has the shape {(*rows, ...)}, got shape {leaf.shape}."
        )
    if not leaves:
      raise ValueError(f"{self} expected x to hold at least one array of features.")
    return x

  def as_head(self, head: Any) -> Any:
    """``head`` as a function that can be a static argument."""
    if not callable(head):
      raise TypeError(
        f"{self} expected head to be a function of params and x, got {type(head).__name__}."
      )
    try:
      hash(head)
    except TypeError:  # a method of an object that holds arrays
      return functools.partial(head)
    return head

  def logits_of_head(self, head: Any, params: Any, x: Any, rows: tuple[int, ...]) -> Any:
    """The shape and dtype of the logits of two tokens, after a check that these are logits."""
    two = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape[len(rows) :]), a.dtype), x)
    # A new function each time: of one that lives on JAX would keep a little for each call.
    traced = jax.make_jaxpr(lambda params, x: head(params, x), return_shape=True)
    jaxpr, logits = traced(params, two)
    for const in jaxpr.consts:
      if not is_concrete(const):
        raise ValueError(
          f"{self} expected head to close over no array that JAX is tracing, such as one of shape "
          f"{const.shape} here. Pass it in params."
        )
    if not isinstance(logits, jax.ShapeDtypeStruct):
      raise TypeError(
        f"{self} expected head(params, x) to return one array of logits, got "
        f"{jax.tree.structure(logits)}."
      )
    if not jnp.issubdtype(logits.dtype, jnp.floating) or jnp.finfo(logits.dtype).bits < 16:
      raise TypeError(
        f"{self} expected head(params, x) to return logits of a floating dtype of at least 16 "
        f"bits, got {logits.dtype}."
      )
    if len(logits.shape) != 2 or logits.shape[0] != 2:
      raise ValueError(
        f"{self} expected head(params, x) to return one row of logits per token, [2, V] for two "
        f"tokens of labels of shape {rows}, got shape {logits.shape}."
      )
    return logits
