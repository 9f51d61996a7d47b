"""The compared functions of each library, made into programs that can be timed.

Peers have the names in `PEERS`. `softmax_jax` is compared with each on the same inputs.
"""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

import softmax_jax

OURS = "softmax_jax"
# In the order of the tables. "products" are the bare matrix products of the linear loss.
PEERS = ("jax.nn", "optax", "distrax", "torch", "torch.compile", "tokamax", "products")

FORWARD, VJP, PULL = "forward", "forward + vjp", "vjp alone"
LOSS, GRADIENT = "loss", "loss + gradient"
BY_TARGET = "loss + gradient by the target"  # of a divergence, whose second argument that is

INTEGER, SOFT = "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy"
LINEAR = "linear_softmax_cross_entropy"
ENTROPY, DIVERGENCE = "softmax_entropy", "softmax_kl_divergence"
OF_TWO_ARRAYS = (SOFT, DIVERGENCE)  # of the shape of the logits


def version(peer: str) -> str | None:
  """The version of a peer's package, or None where it is not installed or cannot be imported."""
  if peer in ("jax.nn", "products", OURS):
    return softmax_jax.__version__ if peer == OURS else jax.__version__
  package = peer.partition(".")[0]
  if importlib.util.find_spec(package) is None:
    return None
  if package == "distrax" and not _is_importable(package):
    return None
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


@functools.cache
def _is_importable(package: str) -> bool:
  """Whether it works: distrax needs a TensorFlow Probability that knows this JAX."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      importlib.import_module(package)
    except Exception:
      return False
  return True


class Program(NamedTuple):
  """A compiled function bound to its arguments.

  call: starts it and returns its outputs; wait: returns once they are there; fetch: gives them as
  NumPy arrays; temp_bytes: what it allocates beside arguments and outputs, if that is known.
  """

  call: Callable[[], Any]
  wait: Callable[[Any], Any]
  fetch: Callable[[Any], list[np.ndarray]]
  temp_bytes: int | None

  def repeated(self, *, queue: bool) -> Callable[[int], None]:
    """The function of n that runs the program n times.

    With `queue` all calls are started before the last is waited for, as a device works through
    them in order; otherwise each is waited for. Outputs are dropped at once: the next call
    allocates its own, in every library.
    """

    def run(n: int) -> None:
      for _ in range(n - 1):
        if queue:
          self.call()
        else:
          self.wait(self.call())
      self.wait(self.call())

    return run


# --- JAX -----------------------------------------------------------------------------------------


def jax_functions(peer: str, platform: str) -> dict[str, Callable[..., Any]]:
  """By our names, functions of (logits, labels) or (x, weight, labels) over the last axis.

  `platform` is what they are compiled for: cpu, gpu or tpu.
  """
  if peer == OURS:
    return {
      "softmax": softmax_jax.softmax,
      "log_softmax": softmax_jax.log_softmax,
      "logsumexp": functools.partial(softmax_jax.logsumexp, axis=-1),
      INTEGER: softmax_jax.softmax_cross_entropy_with_integer_labels,
      SOFT: softmax_jax.softmax_cross_entropy,
      LINEAR: softmax_jax.linear_softmax_cross_entropy,
      ENTROPY: softmax_jax.softmax_entropy,
      DIVERGENCE: softmax_jax.softmax_kl_divergence,
    }
  if peer == "jax.nn":

    def entropy(z: jax.Array) -> jax.Array:
      return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), axis=-1)

    return {
      ENTROPY: entropy,
      "softmax": jax.nn.softmax,
      "log_softmax": jax.nn.log_softmax,
      "logsumexp": functools.partial(jax.nn.logsumexp, axis=-1),
    }
  if peer == "optax":
    from optax import losses

    integer: Callable[..., jax.Array] = losses.softmax_cross_entropy_with_integer_labels
    soft: Callable[..., jax.Array] = losses.softmax_cross_entropy

    def linear(x: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
      return jnp.mean(integer(x @ weight, labels))

    def divergence(z: jax.Array, w: jax.Array) -> jax.Array:
      return losses.kl_divergence(jax.nn.log_softmax(z), jax.nn.softmax(w))

    return {INTEGER: integer, SOFT: soft, LINEAR: linear, DIVERGENCE: divergence}
  if peer == "distrax":
    distrax: Any = importlib.import_module("distrax")  # Optional like torch, and not typed.
    of: Callable[[jax.Array], Any] = lambda logits: distrax.Categorical(logits=logits)
    return {
      ENTROPY: lambda z: of(z).entropy(),
      DIVERGENCE: lambda z, w: of(w).kl_divergence(of(z)),
    }
  if peer == "tokamax":
    tokamax: Any = importlib.import_module("tokamax")  # Optional like torch, and not typed.
    # It has a kernel for TPUs, which it finds itself; elsewhere it would materialize the logits.
    implementation = None if platform == "tpu" else "chunked_xla"

    def linear(x: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
      return tokamax.linear_softmax_cross_entropy_loss(
        x, labels, weight, reduction="mean", implementation=implementation
      )

    return {LINEAR: linear}

  def product(x: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    return x @ weight

  return {LINEAR: product}


def in_mode(f: Callable[..., Any], function: str, mode: str) -> Callable[..., Any]:
  """The program of `function` in `mode`, one of which is compiled for each line of a suite."""
  if mode == VJP:

    def with_vjp(x: jax.Array, y_bar: jax.Array) -> tuple[jax.Array, ...]:
      y, pull = cast(tuple[jax.Array, Callable[..., Any]], jax.vjp(f, x))
      return y, *pull(y_bar)

    return with_vjp
  if mode not in (GRADIENT, BY_TARGET):
    return f
  if function != LINEAR:
    by = 1 if mode == BY_TARGET else 0

    def of_mean(*arrays: jax.Array) -> Any:
      mean: Callable[..., jax.Array] = lambda *arrays: jnp.mean(f(*arrays))
      return jax.value_and_grad(mean, by)(*arrays)

    return of_mean

  def with_gradients(x: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    loss, bars = jax.value_and_grad(f, (0, 1))(x, weight, labels)
    return loss, *bars

  return with_gradients


def _products(x: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
  """The three products of the linear loss and its gradients."""
  logits = x @ weight
  return logits @ weight.T, x.T @ logits


def _jax_program(peer: str, function: str, mode: str, arguments: Sequence[np.ndarray]) -> Program:
  arrays = jax.device_put(tuple(arguments))
  if (peer, mode) == ("products", GRADIENT):
    f = _products
  elif mode == PULL:
    g = jax_functions(peer, jax.default_backend())[function]
    arrays = (jax.jit(lambda x: jax.vjp(g, x)[1])(arrays[0]), arrays[1])
    f = lambda pull, y_bar: pull(y_bar)
  else:
    f = in_mode(jax_functions(peer, jax.default_backend())[function], function, mode)
  compiled = jax.jit(f).lower(*arrays).compile()
  memory = compiled.memory_analysis()  # Not every backend has one.
  fetch: Callable[[Any], list[np.ndarray]] = lambda outputs: [
    np.asarray(output) for output in jax.tree.leaves(outputs)
  ]
  return Program(
    functools.partial(compiled, *arrays),
    jax.block_until_ready,
    fetch,
    None if memory is None else memory.temp_size_in_bytes,
  )


def copy_program(logits: np.ndarray) -> Program:
  """Reads the logits and writes as much: what the machine's memory can do."""
  array = jax.device_put(logits)
  compiled = jax.jit(jax.lax.neg).lower(array).compile()
  fetch: Callable[[Any], list[np.ndarray]] = lambda y: [y]
  return Program(functools.partial(compiled, array), jax.block_until_ready, fetch, 0)


# --- torch ---------------------------------------------------------------------------------------


def threads() -> int:
  """How many threads XLA has on a CPU: one for each processor that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _torch() -> Any:
  return importlib.import_module("torch")  # Optional, and its functions are typed in part.


def torch_reaches_the_device() -> bool:
  """Whether torch, which must be installed, computes where JAX does."""
  torch = _torch()
  backend = jax.default_backend()
  return backend == "cpu" or (backend == "gpu" and torch.cuda.is_available())


def _torch_program(peer: str, function: str, mode: str, arguments: Sequence[np.ndarray]) -> Program:
  torch = _torch()
  device = "cpu" if jax.default_backend() == "cpu" else "cuda"
  if device == "cpu":
    torch.set_num_threads(threads())
  else:
    torch.set_float32_matmul_precision("high")  # JAX's default rounding of products.

  def tensor(array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:
      return torch.from_numpy(array.astype(np.float32)).to(device, torch.bfloat16)
    if array.dtype == np.int32:
      array = array.astype(np.int64)  # torch takes no other class indices.
    return torch.from_numpy(array).to(device)

  cross_entropy = torch.nn.functional.cross_entropy
  softmaxes: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
  }

  def each(z: Any, labels: Any) -> Any:  # torch wants the classes along the second axis
    labels = labels.flatten() if function == INTEGER else labels.flatten(0, -2)
    return cross_entropy(z.flatten(0, -2), labels, reduction="none")

  mean: Callable[[Any, Any], Any] = lambda z, labels: each(z, labels).mean()
  linear: Callable[[Any, Any, Any], Any] = lambda x, weight, labels: cross_entropy(
    x @ weight, labels
  )
  differentiated = mode in (GRADIENT, BY_TARGET)
  dense = mean if differentiated else each

  def entropy(z: Any) -> Any:
    losses = torch.distributions.Categorical(logits=z, validate_args=False).entropy()
    return losses.mean() if differentiated else losses

  def divergence(z: Any, w: Any) -> Any:
    log_q, log_p = (torch.log_softmax(x, -1) for x in (z, w))
    losses = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return losses.mean() if differentiated else losses

  functions: dict[str, Callable[..., Any]] = {
    **softmaxes,
    INTEGER: dense,
    SOFT: dense,
    LINEAR: linear,
    ENTROPY: entropy,
    DIVERGENCE: divergence,
  }
  f = functions[function]
  if peer == "torch.compile":
    torch.compiler.reset()  # After a few shapes of one function torch falls back to eager mode.
    f = torch.compile(f, dynamic=False)

  tensors = [tensor(array) for array in arguments]
  if mode == VJP:
    x, y_bar = tensors
    x.requires_grad_()

    def call() -> tuple[Any, ...]:
      y = f(x)
      return y.detach(), *torch.autograd.grad(y, x, y_bar)
  elif mode == PULL:
    x, y_bar = tensors
    y = f(x.requires_grad_())

    def call() -> tuple[Any, ...]:
      return torch.autograd.grad(y, x, y_bar, retain_graph=True)
  elif differentiated:
    leaves = tensors[:2] if function == LINEAR else [tensors[1 if mode == BY_TARGET else 0]]
    for leaf in leaves:
      leaf.requires_grad_()

    def call() -> tuple[Any, ...]:
      loss = f(*tensors)
      return loss.detach(), *torch.autograd.grad(loss, leaves)
  else:

    def call() -> tuple[Any, ...]:
      with torch.no_grad():
        return (f(*tensors),)

  wait: Callable[[Any], Any] = lambda _: torch.cuda.synchronize() if device == "cuda" else None
  fetch: Callable[[Any], list[np.ndarray]] = lambda outputs: [
    y.double().cpu().numpy() for y in outputs
  ]
  return Program(call, wait, fetch, None)


def build(peer: str, function: str, mode: str, arguments: Sequence[np.ndarray]) -> Program:
  """The program of `peer` for `function` in `mode`, compiled.

  Args:
    peer: one of `PEERS`, or `OURS`.
    function: our name of it.
    mode: `FORWARD`, `VJP` or `PULL` (arguments x and y_bar; `PULL` is the VJP without the value),
      `LOSS` or `GRADIENT` (logits and labels, or x, weight and labels; `GRADIENT` is of the mean
      loss), or of a divergence `BY_TARGET`.
    arguments: NumPy arrays.
  """
  make = _torch_program if peer.startswith("torch") else _jax_program
  return make(peer, function, mode, arguments)


def peers_of(function: str) -> tuple[str, ...]:
  """The peers that have `function`."""
  if function == LINEAR:
    return ("optax", "torch", "torch.compile", "tokamax", "products")
  library = "optax" if function in (INTEGER, SOFT, DIVERGENCE) else "jax.nn"
  others = ("torch", "torch.compile")
  return (library, "distrax", *others) if function in (ENTROPY, DIVERGENCE) else (library, *others)
