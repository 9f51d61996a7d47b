"""What a compiled program makes a device do, read from the text of its optimized HLO.

XLA tells how many bytes a program moves on a CPU only: on a GPU it says nothing, and on a TPU it
counts the body of a loop once. But each instruction of an optimized program is a kernel that reads
its operands from main memory and writes its outputs there, so that a sum over the instructions that
run has it all. Three things need care: loops, kernels that read or write a slice of an array, and
arrays that stay on the chip.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# What only names, groups or allocates arrays.
_FREE = {
  "add-dependency",
  "after-all",
  "bitcast",
  "constant",
  "domain",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
}
_FREE_CALLS = re.compile('custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_PALLAS = re.compile('custom_call_target="(tpu_custom_call|__gpu\\$xla.gpu.triton|mosaic_gpu)')
_SLICES = ("dynamic-slice", "gather", "slice")
# Inside a fusion these are computed where they are used, entry by entry.
_LOOKED_THROUGH = ("bitcast", "convert", "reshape")
_UNKNOWN_CYCLES = 2**63 - 1

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
  """An array that an instruction returns; `padded_bytes` are those of whole tiles, on a TPU."""

  size: int
  bytes: int
  padded_bytes: int
  on_chip: bool


class Instruction(NamedTuple):
  """`name = arrays opcode(arguments), attributes`."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  arguments: str
  attributes: str
  is_root: bool

  @property
  def operands(self) -> list[str]:
    """The names of the instructions that it takes."""
    return [] if self.opcode == "constant" else _NAME.findall(self.arguments)

  def called(self, *keys: str) -> list[str]:
    """The names of the computations after the first of these attributes, as in `calls=%name`."""
    for key in keys:
      if found := re.search(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes):
        return [found[1]] if found[1] else _NAME.findall(found[2])
    return []


Computation = dict[str, Instruction]


class Program(NamedTuple):
  """The computations of a program by name, and the name of the one that is run."""

  computations: dict[str, Computation]
  entry: str


class Kernel(NamedTuple):
  """An instruction that runs: how often, and what it moves each time.

  reads, writes: bytes in main memory. cycles: the compiler's estimate, 0 where it makes none.
  exchanged: the kinds of collectives that it is made of, each with the bytes of the larger of its
  operands and outputs. hidden: whether it is not XLA's, so that it may read an operand many times.
  """

  opcode: str
  runs: int
  reads: int
  writes: int
  cycles: int
  exchanged: tuple[tuple[str, int], ...]
  hidden: bool


# --- the text ------------------------------------------------------------------------------------


def _array(dtype: str, dimensions: str, layout: str) -> Array:
  dims = [int(n) for n in re.findall(r"\d+", dimensions)]
  bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
  order, _, rest = layout.partition(":")
  # The layout lists the dimensions from the fastest to the slowest; tiles are of the fastest.
  physical = [dims[int(i)] for i in reversed(re.findall(r"\d+", order))] or dims
  if tile := re.match(r"T\(([\d,]+)\)", rest):
    sides = [int(n) for n in tile[1].split(",")]
    physical = [1] * (len(sides) - len(physical)) + physical
    for i, side in enumerate(reversed(sides), 1):
      physical[-i] = -(-physical[-i] // side) * side
  on_chip = bool(re.search(r"S\([1-9]", rest))  # On a TPU, S(1) is VMEM.
  size, padded = math.prod(dims), math.prod(physical)
  return Array(size, math.ceil(size * bits / 8), math.ceil(padded * bits / 8), on_chip)


def _closing(text: str, start: int) -> int:
  """The position of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if not depth:
      return i
  raise ValueError(f"a parenthesis is never closed: {text}")


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opens = rest.index("(", end)
  closes = _closing(rest, opens)
  return Instruction(
    name,
    tuple(_array(*found) for found in _ARRAY.findall(rest[:end])),
    rest[end:opens].strip(),
    rest[opens + 1 : closes],
    rest[closes + 1 :],
    bool(root),
  )


def parse(text: str) -> Program:
  """The program of what `compiled.as_text()` returns."""
  computations: dict[str, Computation] = {}
  entry = ""
  current: Computation = {}
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = computations[found[2]] = {}
      entry = found[2] if found[1] else entry
    elif found := _INSTRUCTION.match(line):
      current[found[2]] = _instruction(*found.groups())
  if not entry:
    raise ValueError("this is no HLO program")
  return Program(computations, entry)


# --- what an instruction reads and writes --------------------------------------------------------


def _root(computation: Computation) -> Instruction:
  return next(each for each in computation.values() if each.is_root)


def _part(part: Instruction, of: Instruction) -> float:
  """The size of a slice in units of the whole array."""
  return min(1.0, part.arrays[0].size / max(1, of.arrays[0].size))


def _part_read(program: Program, within: Computation, user: Instruction, position: int) -> float:
  """The part of its operand at `position` that `user` reads."""
  operand = within[user.operands[position]]
  if user.opcode == "fusion" and len(operand.arrays) == 1:
    fused = program.computations[user.called("calls")[0]]
    parameters = (each for each in fused.values() if each.opcode == "parameter")
    return _part_used(program, fused, next(p for p in parameters if p.arguments == str(position)))
  if position == 0 and user.opcode in _SLICES:
    return _part(user, operand)
  if position == 0 and user.opcode == "dynamic-update-slice":
    return 0.0
  if position == 0 and user.opcode == "scatter":
    return _part(within[user.operands[-1]], operand)
  return 1.0


def _part_used(program: Program, fused: Computation, value: Instruction) -> float:
  """The part of `value` that the others of a fused computation read."""
  part = 0.0
  for user in fused.values():
    for position, name in enumerate(user.operands):
      if name == value.name and user.opcode in _LOOKED_THROUGH and not user.is_root:
        part += _part_used(program, fused, user)
      elif name == value.name:
        part += _part_read(program, fused, user, position)
  return min(1.0, part)


def _parts_written(program: Program, within: Computation, maker: Instruction) -> list[float]:
  """By output of `maker`, the part of it that is written; the rest is there already."""
  if maker.opcode == "fusion":
    fused = program.computations[maker.called("calls")[0]]
    return _parts_written(program, fused, _root(fused))
  if maker.opcode == "tuple":
    operands = [_parts_written(program, within, within[name]) for name in maker.operands]
    return [part for parts in operands for part in parts]  # an operand may be a tuple itself
  if maker.opcode == "bitcast":
    return _parts_written(program, within, within[maker.operands[0]])
  if maker.opcode == "dynamic-update-slice":
    return [_part(within[maker.operands[1]], maker)]
  if maker.opcode == "scatter" and len(maker.arrays) == 1:
    return [_part(within[maker.operands[-1]], maker)]
  return [1.0] * len(maker.arrays)


def _exchanged(
  program: Program, within: Computation, instruction: Instruction
) -> tuple[tuple[str, int], ...]:
  if instruction.opcode in _COLLECTIVES:
    given = [array for name in instruction.operands for array in within[name].arrays]
    both = (sum(array.bytes for array in arrays) for arrays in (given, instruction.arrays))
    return ((instruction.opcode, max(both)),)
  if instruction.opcode != "fusion":
    return ()
  fused = program.computations[instruction.called("calls")[0]]
  return tuple(pair for each in fused.values() for pair in _exchanged(program, fused, each))


def _kernel(program: Program, within: Computation, instruction: Instruction, runs: int) -> Kernel:
  reads = writes = 0.0
  for position, name in enumerate(instruction.operands):
    for array in within[name].arrays:
      if not array.on_chip:
        reads += array.padded_bytes * _part_read(program, within, instruction, position)
  parts = _parts_written(program, within, instruction)
  for array, part in zip(instruction.arrays, parts, strict=True):
    if not array.on_chip:
      writes += array.padded_bytes * part
  estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  cycles = int(estimate[1]) if estimate else 0
  return Kernel(
    instruction.opcode,
    runs,
    round(reads),
    round(writes),
    cycles if cycles < _UNKNOWN_CYCLES else 0,
    _exchanged(program, within, instruction),
    bool(_PALLAS.search(instruction.attributes)),
  )


# --- what runs -----------------------------------------------------------------------------------


def _constant(computation: Computation, name: str) -> int | None:
  """The whole number that an instruction stands for, if it is a constant."""
  instruction = computation[name]
  if instruction.opcode in ("bitcast", "copy"):
    return _constant(computation, instruction.operands[0])
  number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
  return int(instruction.arguments) if number else None


def _trips(program: Program, within: Computation, loop: Instruction) -> int:
  """How often the body of a loop runs, if its counter goes up by one to a constant."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  condition = program.computations[loop.called("condition")[0]]
  test = _root(condition)
  start = within[loop.operands[0]]
  if test.opcode == "compare" and "direction=LT" in test.attributes and start.opcode == "tuple":
    counter = condition[test.operands[0]]
    end = _constant(condition, test.operands[1])
    if found := re.search(r"\bindex=(\d+)", counter.attributes):
      begin = _constant(within, start.operands[int(found[1])])
      if begin is not None and end is not None:
        return max(0, end - begin)
  raise ValueError(f"how often does the loop {loop.name} run?")


def _finished(computation: Computation, done: Instruction) -> Instruction:
  """The instruction that an asynchronous pair stands for, as if it ran where it ends."""
  start = computation[done.operands[0]]
  while start.opcode.endswith("-update"):
    start = computation[start.operands[0]]
  if not start.opcode.endswith("-start"):  # It was started in the round of a loop before.
    return done._replace(opcode=done.opcode.removesuffix("-done"))
  return done._replace(
    opcode=start.opcode.removesuffix("-start"),
    arguments=start.arguments,
    attributes=start.attributes,
  )


def _running(program: Program, name: str, runs: int) -> Iterator[Kernel]:
  computation = program.computations[name]
  for instruction in computation.values():
    if instruction.opcode.endswith(("-start", "-update")):
      continue
    if instruction.opcode.endswith("-done"):
      instruction = _finished(computation, instruction)
    opcode = instruction.opcode
    if opcode == "while":
      trips = _trips(program, computation, instruction)
      yield from _running(program, instruction.called("body")[0], runs * trips)
    elif opcode == "conditional":
      keys = ("branch_computations", "true_computation")
      branches = [*instruction.called(*keys), *instruction.called("false_computation")]
      each = [list(_running(program, branch, runs)) for branch in branches]
      yield from max(each, key=lambda kernels: sum(k.runs * (k.reads + k.writes) for k in kernels))
    elif opcode in ("call", "async"):
      yield from _running(program, instruction.called("to_apply", "calls")[0], runs)
    elif opcode not in _FREE and not _FREE_CALLS.search(instruction.attributes):
      yield _kernel(program, computation, instruction, runs)


def kernels(program: Program) -> list[Kernel]:
  """The kernels that run, in order; of a conditional, those of the branch that moves most."""
  return list(_running(program, program.entry, 1))


def argument_bytes(program: Program) -> list[int]:
  """The bytes of each argument of the program, on one device."""
  entry = program.computations[program.entry].values()
  return [sum(a.bytes for a in each.arrays) for each in entry if each.opcode == "parameter"]
