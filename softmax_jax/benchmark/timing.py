"""Times of several programs that do the same work, taken so that they can be compared.

A machine's speed drifts: other processes, temperature, memory. So every round times every program
once, in a random order, and a ratio is formed within a round, where both times saw the same
machine. The median over the rounds leaves out the rounds that were disturbed.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping

import numpy as np

MIN_ROUNDS = 3  # Taken even where the budget is spent.
_MAX_REPEATS = 10_000


def _repeats(run: Callable[[int], None], sample_seconds: float, clock: Callable[[], float]) -> int:
  """How many calls in a row take at least `sample_seconds`; the first call here is the warm-up."""
  run(1)
  repeats = 1
  while repeats < _MAX_REPEATS:
    start = clock()
    run(repeats)
    took = clock() - start
    if took >= sample_seconds:
      break
    wanted = 1.1 * repeats * sample_seconds / max(took, 1e-9)
    repeats = min(max(2 * repeats, math.ceil(wanted)), _MAX_REPEATS)
  return repeats


def interleave(
  programs: Mapping[str, Callable[[int], None]],
  *,
  rounds: int,
  seconds: float,
  sample_seconds: float = 5e-3,
  seed: int = 0,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
  """Seconds per call of each program, one number per round: `[rounds]` each.

  Args:
    programs: by name, functions of n that call the program n times and return when all is done.
    rounds: the number of rounds at most.
    seconds: no round starts later than this after the first one, beyond the first `MIN_ROUNDS`.
    sample_seconds: a program is called as often in a row as fills this time, so that neither the
      clock's resolution nor a single wait for the device shows.
    seed: decides the order within each round.
    clock: returns seconds.
  """
  rng = np.random.default_rng(seed)
  names = list(programs)
  repeats = {name: _repeats(run, sample_seconds, clock) for name, run in programs.items()}
  times: dict[str, list[float]] = {name: [] for name in names}
  collecting = gc.isenabled()
  gc.disable()  # A collection would land on one program of a round.
  try:
    begin = clock()
    for done in range(rounds):
      if done >= MIN_ROUNDS and clock() - begin > seconds:
        break
      for i in rng.permutation(len(names)):
        name = names[int(i)]
        if repeats[name] > 1:
          # Idle threads of the program before may still be spinning, and the caches hold its data.
          programs[name](max(1, repeats[name] // 4))
        start = clock()
        programs[name](repeats[name])
        times[name].append((clock() - start) / repeats[name])
  finally:
    if collecting:
      gc.enable()
  return {name: np.array(values) for name, values in times.items()}


def median_ratio(times: np.ndarray, peer_times: np.ndarray) -> float:
  """The median over the rounds of the ratio within a round."""
  return float(np.median(times / peer_times))
