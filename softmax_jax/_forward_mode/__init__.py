"""Forward-mode differentiation for `jax.custom_vjp` functions.

JAX refuses `jvp`, `linearize` and `jacfwd` on a `jax.custom_vjp` function. Yet its backward rule
y_bar -> J^T y_bar is linear and already contains the forward one: the transpose of J^T is J. What
JAX lacks is a linear call that can be batched and whose transpose is *given*, so that reverse mode
still runs exactly the hand-derived rule.

- `linear` defines that call, the primitive `linear_map`.
- `transform` builds `enable_forward_mode` on it, and `derivative` the linear maps of one call.
- `hijax` does the same for JAX's new implementation of `jax.custom_vjp` (``jax_custom_vjp3``), in
  which a function is a primitive with a backward rule.
- `loops` defines the primitive `rule`, for rules that loop inside `jax.shard_map`.
- `platforms` defines the primitive `by_platform`, of which one function has the derivatives and
  others, on some platforms or for several devices, the value.

This is the one package of the library that goes beyond JAX's documented public API, but for
`softmax_jax._devices`, which reads the `manual_axis_type` of types. It uses

- `jax.extend.core`: `Primitive` with its `is_high`, `Literal`, `jaxpr_as_fun`, `unmapped_aval`, and
  the current trace (`take_current_trace`, `set_current_trace`) with its `parent_trace`;
- `jax.interpreters`: `ad`, `batching`, `mlir` and `partial_eval.JaxprTracer` with its `_trace`;
- of the context of a lowering rule: `axis_context.num_devices` and
  `lowering_parameters.for_export` of its `module_context`;
- of the types that `jax.typeof` returns: `manual_axis_type`, `to_tangent_aval`, `to_ct_aval`,
  `str_short` and `update`;
- of a `jax.custom_vjp` object: `fun`, `fwd`, `bwd`, `symbolic_zeros`, `nondiff_argnums`,
  `optimize_remat`, and from JAX 0.12 on `generic_batching`, `with_logs` and `with_accums`;
- from JAX 0.12 on, with ``jax_custom_vjp3``: `jax.experimental.hijax` with `HiPrim`, `GradAccum`,
  `ValAccum`, `Zero`, `jvp_from_lin` and `vmap_rule`; the name of its equations and their parameter
  `_prim`, and of that for a `jax.custom_vjp` function `opt_remat`, `remat_rules`, and the form of
  its residuals under `jax.vmap`; and `custom_vjp_rules` of the trace that `remat` gets.
"""

from softmax_jax._forward_mode.linear import linear_map
from softmax_jax._forward_mode.loops import rule_with_loops
from softmax_jax._forward_mode.platforms import PLATFORMS, IfAny, by_platform, with_derivative_of
from softmax_jax._forward_mode.transform import enable_forward_mode

__all__ = [
  "PLATFORMS",
  "IfAny",
  "by_platform",
  "enable_forward_mode",
  "linear_map",
  "rule_with_loops",
  "with_derivative_of",
]
