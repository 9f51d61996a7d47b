"""A language model's last layer, trained over all devices of several machines.

Start it on every machine, with the address of the first, their number, and the number of each:

  python examples/train_on_several_machines.py --coordinator HOST:8476 --processes 2 --process 0
  python examples/train_on_several_machines.py --coordinator HOST:8476 --processes 2 --process 1

The classes are spread over the devices of each machine, whose wires are fast, and the tokens over
the machines. The tokens are random, and learnable: each is followed by one of a few others. On one
machine no option is needed; the losses are the same however many devices there are.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from softmax_jax import linear_softmax_cross_entropy

CLASSES, FEATURES, TOKENS = 1000, 64, 512


def main() -> None:
  """Trains, and prints the loss of every step."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  parser.add_argument("--processes", type=int, default=1, metavar="N")
  parser.add_argument("--process", type=int, default=0, metavar="I", help="from 0 to N - 1")
  parser.add_argument("--cpu-devices", type=int, default=0, metavar="N", help="to try it on a CPU")
  parser.add_argument("--steps", type=int, default=20)
  args = parser.parse_args()
  if args.cpu_devices:
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
  if args.processes > 1:
    # A machine that is gone ends the others after this time, instead of leaving them waiting.
    jax.distributed.initialize(
      args.coordinator,
      args.processes,
      args.process,
      initialization_timeout=60,
      heartbeat_timeout_seconds=10,
    )

  mesh = jax.make_mesh(
    (args.processes, jax.device_count() // args.processes),
    ("data", "vocab"),
    axis_types=(AxisType.Auto,) * 2,
  )
  step, weights = build(mesh)
  for number in range(1, args.steps + 1):
    tokens, labels = batch(number)
    place = lambda a: jax.make_array_from_callback(
      a.shape, NamedSharding(mesh, P("data")), lambda index, a=a: a[index]
    )
    weights, loss = step(weights, place(tokens), place(labels))
    print(f"step {number}: loss {float(loss):.6f}", flush=True)


def build(mesh: jax.sharding.Mesh):
  """The compiled training step, and the first weights: embedding ``[V, H]`` and head ``[H, V]``."""
  devices = mesh.shape["vocab"]
  columns = -(-CLASSES // devices) * devices  # padded to a multiple of the devices
  spread, everywhere = NamedSharding(mesh, P(None, "vocab")), NamedSharding(mesh, P())

  def loss_of_device(x, head, labels):  # the tokens of one machine, the classes of one device
    loss = linear_softmax_cross_entropy(
      x, head, labels, num_classes=CLASSES, chunk_size=128, axis_name="vocab"
    )
    return jax.lax.pmean(loss, "data")

  specs = P("data"), P(None, "vocab"), P("data")
  loss_on_mesh = jax.shard_map(loss_of_device, mesh=mesh, in_specs=specs, out_specs=P())

  @jax.jit
  def step(weights, tokens, labels):
    def loss(weights):
      embedding, head = weights
      return loss_on_mesh(embedding[tokens], head, labels)

    value, gradients = jax.value_and_grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 20 * g, weights, gradients), value

  def initial():
    embedding = jax.random.normal(jax.random.key(0), (CLASSES, FEATURES))
    return embedding, jnp.zeros((FEATURES, columns))

  return step, jax.jit(initial, out_shardings=(everywhere, spread))()


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and what follows them, the same on every machine."""
  rng = np.random.default_rng(number)
  tokens = rng.integers(0, CLASSES, TOKENS)
  return tokens, (7 * tokens + rng.integers(0, 4, TOKENS)) % CLASSES


if __name__ == "__main__":
  main()
