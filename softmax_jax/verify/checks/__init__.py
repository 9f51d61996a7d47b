"""The checks, each of them a function from a `Verifier` to rows, listed in `CHECKS` by name.

In their docstrings u is a random cotangent of the outputs, v a random tangent of the arguments, and
J the Jacobian. Unless it says otherwise a check compares with the float64 reference.
"""

from softmax_jax.verify.checks.edges import edge_points
from softmax_jax.verify.checks.first_order import (
  dot_product,
  each_argument,
  each_output,
  finite_differences,
  jvp,
  linearity,
  repeated,
  value,
  vjp,
)
from softmax_jax.verify.checks.jacobians import jacobian
from softmax_jax.verify.checks.second_order import second_order
from softmax_jax.verify.checks.structure import residuals, structure, traces
from softmax_jax.verify.checks.transformed import (
  checkpoint,
  jit,
  scan,
  vmap_batch,
  vmap_each_argument,
)

_ORDER = (
  *(
    value,
    vjp,
    repeated,
    each_output,
    each_argument,
    finite_differences,
    jvp,
    dot_product,
    linearity,
    jacobian,
  ),
  *(jit, vmap_each_argument, vmap_batch, checkpoint, scan, second_order),
  *(structure, residuals, traces, edge_points),
)
CHECKS = {check.__name__: check for check in _ORDER}
# Those that compile little, of which a small function needs less than a second.
FAST = (
  *("value", "vjp", "repeated", "each_output", "finite_differences", "jvp", "dot_product"),
  *("linearity", "vmap_batch", "structure", "edge_points"),
)
