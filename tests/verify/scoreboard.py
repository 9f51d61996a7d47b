"""How many faults `check_derivatives` and other tools find, and how often they are wrong.

  python tests/verify/scoreboard.py results.jsonl

runs each tool on the wrong rules of `corpus_wrong.py` and on their right twins, then on the right
functions of `corpus_right.py`. Results are appended to the file; what it holds already is not run
again. The numbers are those of the table in
docs/reference/verify.rst. It needs chex, equinox, flax and optax.
"""

import collections
import json
import os
import pathlib
import sys
import time
import warnings

# Half of the time goes into machine code, whose speed does not matter here.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import chex
import corpus_right
import corpus_wrong
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from softmax_jax.verify import check_derivatives


def whole(f, args, modes, fast=False):
  """What `check_derivatives` says of f: right, wrong, or a derivative is unconfirmed."""
  report = check_derivatives(f, *args, fast=fast)
  return "right" if report else "wrong" if report.failed else "unconfirmed"


def fast(f, args, modes):
  return whole(f, args, modes, fast=True)


def passes(check):
  """A tool that raises where it finds a fault."""

  def tool(f, args, modes):
    try:
      check(f, args, modes)
    except Exception:
      return "wrong"
    return "right"

  return tool


@passes
def jax_check_grads(f, args, modes):
  check_grads(f, args, order=2, modes=modes)


@passes
def chex_numerical_grads(f, args, modes):
  chex.assert_numerical_grads(f, args, order=1, modes=modes)


@passes
def gradcheck(f, args, modes):
  """The Jacobian in float64 by differences, with the steps and tolerances of torch's gradcheck."""
  with jax.enable_x64(True):
    args = [jnp.asarray(np.asarray(x), "float64") for x in args]
    jacobians = jax.jacrev(f, argnums=tuple(range(len(args))))(*args)
    value = jax.jit(f)
    for j, (x, jacobian) in enumerate(zip(args, jacobians, strict=True)):
      columns = []
      for step in np.eye(x.size).reshape(-1, *x.shape) * 1e-6:
        above, below = (value(*args[:j], x + h, *args[j + 1 :]) for h in (step, -step))
        columns.append((np.asarray(above) - below) / 2e-6)
      numerical = np.stack(columns, axis=-1).reshape(jacobian.shape)
      np.testing.assert_allclose(jacobian, numerical, rtol=1e-3, atol=1e-5)


def is_float(x):
  return isinstance(x, float) or jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)


def of_floats(f, args):
  """f as a function of floating arrays to one array, for tools that take no others, and these."""
  leaves, tree = jax.tree.flatten(args)
  places = [i for i, x in enumerate(leaves) if is_float(x)]

  def of_arrays(*xs):
    given = dict(zip(places, xs, strict=True))
    outs = f(*jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)]))
    return ravel_pytree([y for y in jax.tree.leaves(outs) if is_float(y)])[0]

  return of_arrays, [leaves[i] for i in places]


TOOLS = {
  "check_derivatives": whole,
  "check_derivatives, fast": fast,
  "check_grads": jax_check_grads,
  "gradcheck": gradcheck,
  "chex": chex_numerical_grads,
}


def jobs():
  """A key and a function that gives the verdict, of each tool on each function."""
  for name, modes, wrong, twin, args in corpus_wrong.rules():
    for tool, run in TOOLS.items():
      kind = "forward" if "fwd" in modes else "backward"
      function = name.split(":")[0]
      yield (tool, "twin", f"{function}, {kind}"), run, (twin, args, modes)
      yield (tool, "wrong", f"{function}, {kind}|{name}"), run, (wrong, args, modes)
  for tool, run in TOOLS.items():
    for name, f, args in corpus_right.functions():
      subject = (f, args) if tool.startswith("check_derivatives") else of_floats(f, args)
      yield (tool, "right", name), run, (*subject, ("fwd", "rev"))


def measure(file):
  """Runs what the file does not hold yet; returns the verdicts and the seconds of CPU by key."""
  lines = file.read_text().splitlines() if file.exists() else []
  known = {tuple(key): (verdict, seconds) for key, verdict, seconds in map(json.loads, lines)}
  for key, run, subject in jobs():
    if key in known:
      continue
    start = time.process_time()
    with jax.enable_x64("float64" in key[2]), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        verdict = run(*subject)
      except Exception as error:
        verdict = f"raised {type(error).__name__}: {error}"[:200]
    known[key] = verdict, time.process_time() - start
    with file.open("a") as stream:
      stream.write(json.dumps([key, *known[key]]) + "\n")
  return known


def show(known):
  """Prints the scoreboard (with CPU time per twin), and what `check_derivatives` missed."""
  twins = {key[::2]: verdict for key, (verdict, _) in known.items() if key[1] == "twin"}
  print(f"{'tool':<24} {'found':>5} {'of':>4} {'right twins refused':>20} {'median s':>9}")
  for tool in TOOLS:
    wrong = {k[2]: v for k, v in known.items() if k[:2] == (tool, "wrong")}
    found = [n for n, (v, _) in wrong.items() if v == "wrong" and _passed(twins, tool, n)]
    refused = sum(v != "right" for (t, _), v in twins.items() if t == tool)
    seconds = np.median([s for k, (_, s) in known.items() if k[:2] == (tool, "twin")])
    print(f"{tool:<24} {len(found):>5} {len(wrong):>4} {refused:>20} {seconds:>9.2f}")
    if tool.startswith("check_derivatives"):
      print("".join(f"  {n}: {v}\n" for n, (v, _) in wrong.items() if n not in found), end="")
  for tool in TOOLS:
    right = {k[2]: v for k, (v, _) in known.items() if k[:2] == (tool, "right")}
    verdicts = collections.Counter(v.split(":")[0] for v in right.values())
    print(f"{tool} of {len(right)} right functions:", dict(verdicts))
    for name, verdict in right.items():
      if verdict != "right":
        print(f"  {name}: {verdict}")


def _passed(twins, tool, name):
  return twins[tool, name.split("|")[0]] == "right"


if __name__ == "__main__":
  show(measure(pathlib.Path(sys.argv[1])))
