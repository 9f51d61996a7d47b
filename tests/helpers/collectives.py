"""The collectives of a compiled program: what its devices exchange."""

import re

import jax

_COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(f, *args):
  """The kind of each collective of ``jit(f)(*args)``, and the shapes of what it returns."""
  return found_in(jax.jit(f).lower(*args).compile().as_text())


def found_in(program):
  """The same from the text of a compiled program."""
  found = []
  for line in program.splitlines():
    if match := _COLLECTIVE.search(line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
      found.append((match[2], [tuple(int(n) for n in s.split(",") if n) for s in shapes]))
  return found
