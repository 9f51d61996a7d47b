"""Train the language model of examples/train_text.py over all devices of several machines.

Start it on every machine, with the address of the first, their number, and the number of each:

  python examples/train_on_several_machines.py --coordinator HOST:8476 --processes 2 --process 0
  python examples/train_on_several_machines.py --coordinator HOST:8476 --processes 2 --process 1

The classes are spread over the devices of each machine, whose links are fast, and the words of a
batch over the machines. On one machine no option is needed; the losses are the same however many
devices there are. Every machine needs the same Python, as its standard library is the text.
"""

import sys

import jax
import train_text


def main() -> None:
  """Trains, and prints the loss of some steps."""
  parser = train_text.options()
  parser.description = __doc__
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  parser.add_argument("--processes", type=int, default=1, metavar="N")
  parser.add_argument("--process", type=int, default=0, metavar="I", help="from 0 to N - 1")
  args = parser.parse_args()
  if args.processes > 1:
    # If a machine fails, the others end after this time instead of waiting forever.
    jax.distributed.initialize(
      args.coordinator,
      args.processes,
      args.process,
      initialization_timeout=60,
      heartbeat_timeout_seconds=10,
    )
  failure = train_text.run(args, train_text.devices_of(args.devices, args.processes))
  sys.exit(f"failed: {failure}" if failure else 0)


if __name__ == "__main__":
  main()
