"""Second derivatives of the public functions, and of plain formulas that they must match.

A formula is computed in float64 and has no select: what takes no part is replaced by a number and
multiplied by 0, so that JAX's derivatives of every order are those of mathematics.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from oracle import default_promotion, random, wide

import softmax_jax

NESTINGS = (
  "reverse over reverse",
  "forward over reverse",
  "reverse over forward",
  "forward over forward",
)


FEW, MORE = 5, 19  # classes: short rows have sums of their own
LABELS = np.array([1, 0, 3], np.int32)
LINEAR = "linear, none", "linear, sum", "linear, mean"


class Rows(NamedTuple):
  """What is not differentiated, all arrays.

  Attributes:
    cotangents: [R], of the losses of the rows.
    labels: [R], integers, -1 in rows that do not count.
    where: [R, K] or [R] or None.
    share: [R, K], 1 where an entry takes part and 0 where not; for the formulas.
    classes: [R], the number of classes among which smoothing divides; for the formulas.
  """

  cotangents: np.ndarray
  labels: np.ndarray
  where: np.ndarray | None
  share: np.ndarray
  classes: np.ndarray


class SecondOrder(NamedTuple):
  """``hvps`` has for each nesting the products of the Hessian with directions, [D, N].

  Those are one at random for each argument, and then, but for the last nesting, the unit vectors.
  """

  value: jax.Array
  gradient: jax.Array
  hvps: dict


def second_order(f, nestings=NESTINGS):
  """The derivatives of a number ``f(args, rows)`` by the concatenation of all of ``args``."""

  def derivatives(args, rows, directions):
    point, unravel = ravel_pytree(args)
    g = lambda v: f(unravel(v), rows)
    along = lambda g, u: lambda v: jax.jvp(g, (v,), (u,))[1]
    eye = jnp.eye(point.size, dtype=point.dtype)
    hvp = {
      "reverse over reverse": lambda u: jax.grad(lambda v: jnp.vdot(jax.grad(g)(v), u))(point),
      "forward over reverse": lambda u: along(jax.grad(g), u)(point),
      "reverse over forward": lambda u: jax.grad(along(g, u))(point),
      "forward over forward": lambda u: jax.vmap(lambda w: along(along(g, u), w)(point))(eye),
    }
    value, gradient = jax.value_and_grad(g)(point)
    few = directions[: len(args)]
    hvps = {
      name: jax.vmap(hvp[name])(few if name == "forward over forward" else directions)
      for name in nestings
    }
    return SecondOrder(value, gradient, hvps)

  return derivatives


def flat(args, parts, fill=False):
  """One array over the concatenation of ``args``, of the ``parts`` that there are."""
  of = lambda name: np.broadcast_to(parts.get(name, fill), np.shape(args[name])).ravel()
  return np.concatenate([of(name) for name in sorted(args)])


def directions_for(args, unsure=None):
  """One direction at random for each argument, and all unit vectors of their concatenation.

  The former leave out what is ``unsure``.
  """
  sure = ~flat(args, unsure or {})
  random_ones = [
    random(i, sure.size) * flat(args, {x: True}) * sure for i, x in enumerate(sorted(args))
  ]
  dtype = jax.tree.leaves(args)[0].dtype
  return np.concatenate([random_ones, np.eye(sure.size)]).astype(dtype)


# The functions: what the library computes and, below, the formulas.


def options(args):
  names = "class_weights", "label_smoothing", "z_loss"
  return {name: args[name] for name in names if name in args}


def integer_loss(args, rows):
  f = softmax_jax.softmax_cross_entropy_with_integer_labels
  return f(args["logits"], rows.labels, where=rows.where, ignore_index=-1, **options(args))


def soft_loss(args, rows):
  return softmax_jax.softmax_cross_entropy(
    args["logits"], args["labels"], where=rows.where, **options(args)
  )


def linear_loss(args, rows, reduction):
  return softmax_jax.linear_softmax_cross_entropy(
    args["x"],
    args["weight"],
    rows.labels,
    bias=args["bias"],
    ignore_index=-1,
    reduction=reduction,
    chunk_size=2,
    **options(args),
  )


def normalizer(args, rows):
  lse = softmax_jax.logsumexp(args["a"], axis=-1, b=args.get("b"), where=rows.where)
  return jnp.where(jnp.max(rows.share, axis=1) > 0, lse, 0)


def signed_normalizer(args, rows):
  return softmax_jax.logsumexp(args["a"], axis=-1, b=args["b"], return_sign=True)[0]


def entries(f):
  """Of softmax and log_softmax, whose result is not finite where masked."""
  return lambda args, rows: jnp.sum(
    jnp.where(rows.share > 0, f(args["x"], where=rows.where) * weights_of(rows), 0), axis=1
  )


def weights_of(rows):
  """Of the entries in a sum, all different."""
  return jnp.asarray(np.cos(1.0 + np.arange(rows.share.shape[1])), rows.share.dtype)[None]


FUNCTIONS = {
  "integer": integer_loss,
  "soft": soft_loss,
  "linear, none": functools.partial(linear_loss, reduction="none"),
  "linear, sum": functools.partial(linear_loss, reduction="sum"),
  "linear, mean": functools.partial(linear_loss, reduction="mean"),
  "logsumexp": normalizer,
  "logsumexp with sign": signed_normalizer,
  "softmax": entries(lambda x, where: softmax_jax.softmax(x, where=where)),
  "log_softmax": entries(lambda x, where: softmax_jax.log_softmax(x, where=where)),
}


def total(rows, y):
  """One number of a result, to which its value matters too: it is not linear."""
  y = y + y**2 / 8
  return jnp.vdot(rows.cotangents, y) if y.ndim else y


def number(function, args, rows):
  return total(rows, FUNCTIONS[function](args, rows))


def cross_entropy(args, rows, *, soft=False, reduction="none"):
  """Either loss of logits with all options but those that ``args`` lacks."""
  z, m = args["logits"], rows.share
  one_hot = (rows.labels[:, None] == np.arange(z.shape[1])[None]).astype(z.dtype)
  t = args["labels"] if soft else one_hot
  w = args.get("class_weights", jnp.ones(z.shape[1]))[None]
  alpha, z_loss = args.get("label_smoothing", 0.0), args.get("z_loss", 0.0)
  counts = jnp.max(m, axis=1)
  lse = jnp.log(jnp.sum(m * jnp.exp(z), axis=1) + (1 - counts))
  p = w * ((1 - alpha) * t + alpha / rows.classes[:, None])
  losses = jnp.sum(m * p * (lse[:, None] - z), axis=1) + counts * z_loss * lse**2
  if reduction == "none":
    return losses
  return jnp.sum(losses) / (1 if reduction == "sum" else jnp.vdot(counts, jnp.sum(t * w, axis=1)))


def linear(args, rows, *, reduction):
  rest = {name: args[name] for name in args if name not in ("x", "weight", "bias")}
  z = args["x"] @ args["weight"] + args["bias"][None]
  return cross_entropy({"logits": z, **rest}, rows, reduction=reduction)


def log_of_sum(args, rows):
  counts = jnp.max(rows.share, axis=1)
  s = jnp.sum(rows.share * args.get("b", 1.0) * jnp.exp(args["a"]), axis=1) + (1 - counts)
  return jnp.log(s**2) / 2


def probabilities(args, rows, *, log=False):
  m = rows.share
  s = jnp.sum(m * jnp.exp(args["x"]), axis=1) + (1 - jnp.max(m, axis=1))
  log_a = args["x"] - jnp.log(s)[:, None]
  y = m * (log_a if log else jnp.exp(log_a)) * weights_of(rows)
  return jnp.sum(y, axis=1)


FORMULAS = {
  "integer": cross_entropy,
  "soft": functools.partial(cross_entropy, soft=True),
  "linear, none": functools.partial(linear, reduction="none"),
  "linear, sum": functools.partial(linear, reduction="sum"),
  "linear, mean": functools.partial(linear, reduction="mean"),
  "logsumexp": log_of_sum,
  "logsumexp with sign": log_of_sum,
  "softmax": probabilities,
  "log_softmax": functools.partial(probabilities, log=True),
}


# The comparison.


# Compiling is what takes time here, and not running.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def program(function, vmapped=False):
  """The derivatives of a function of the library, compiled; or of several cases at once."""
  f = second_order(functools.partial(number, function))
  return jax.jit(jax.vmap(f, (0, 0, None)) if vmapped else f, compiler_options=QUICKLY)


@functools.cache
def formula(function):
  f = second_order(lambda args, rows: total(rows, FORMULAS[function](args, rows)), NESTINGS[1:2])
  f = default_promotion()(f)
  return jax.jit(f, compiler_options=QUICKLY)


def expected(function, args, rows, unsure=None):
  """The derivatives of the formula, in float64: what is no number takes no part there."""
  with jax.enable_x64(True):
    finite = lambda x: np.nan_to_num(wide(x).astype(np.float64), nan=0, posinf=0, neginf=0)
    args = {name: finite(x) for name, x in args.items()}
    numbers = {name: finite(getattr(rows, name)) for name in ("cotangents", "share", "classes")}
    rows = rows._replace(where=None, **numbers)
    return jax.tree.map(np.asarray, formula(function)(args, rows, directions_for(args, unsure)))


def faults(actual, expected, args, tolerance, unsure=None, floor=0.0):
  """What of the derivatives is wrong, block by block: each pair of arguments has a norm of its own.

  Where the formula gives 0, but for the rounding errors of float64, the library has to give 0 but
  for those of its dtype. A norm counts as at least ``floor`` times the largest derivative: among
  arguments at random there are some for which a sum over rows cancels. What is ``unsure`` has no
  derivatives in mathematics, and only has to give finite numbers.
  """
  sure = ~flat(args, unsure or {})
  (reference,) = expected.hvps.values()
  size = np.max(np.abs(expected.gradient)) + np.max(np.abs(reference))
  slices = {name: np.flatnonzero(flat(args, {name: True}) & sure) for name in sorted(args)}
  found = {}

  def compare(what, ours, theirs, block=0.0):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
    norm = max(np.linalg.norm(theirs), np.linalg.norm(block))
    norm = size if norm <= 1e-13 * size else max(norm, floor * size)
    wrong = not np.linalg.norm(ours - theirs) <= tolerance * norm
    if wrong:
      found[what] = f"{np.linalg.norm(ours):.3g} in norm, not {np.linalg.norm(theirs):.3g}"

  compare("value", actual.value, expected.value)
  for j, columns in slices.items():
    compare(j, actual.gradient[columns], expected.gradient[columns])
  for nesting, ours in actual.hvps.items():
    for place, (i, entries) in enumerate(slices.items()):
      of_i = [place] if len(ours) == len(args) else len(args) + entries
      for j, columns in slices.items():
        at = np.ix_(of_i, columns)
        block = reference[np.ix_(len(args) + entries, columns)]
        compare(f"{nesting}: {i}, {j}", ours[at], reference[at], block)
  for nesting, ours in actual.hvps.items():
    if not np.all(np.isfinite(ours)):
      found.setdefault(nesting, "not finite")
  return found


def case(function, classes, dtype, vmapped, *, alpha=0.3, z_loss=0.7, weights=None):
  """Arguments and rows of a loss. Soft labels hold 0, 1 and what is between.

  Where several cases are computed at once masks have one value per row.
  """
  if weights is None:
    weights = 0.5 + np.abs(random(1, classes))
  args = {"class_weights": weights, "label_smoothing": alpha, "z_loss": z_loss}
  if function in LINEAR:
    shapes = {"x": (3, 2), "weight": (2, classes), "bias": (classes,)}
    args |= {name: random(i, shape) for i, (name, shape) in enumerate(shapes.items())}
  else:
    args["logits"] = random(5, (3, classes))
  if function == "soft":
    labels = np.abs(random(6, (3, classes)))
    labels[0] = np.eye(classes)[LABELS[0]]
    labels[1, :2] = 0, 1
    args["labels"] = labels
  args = {name: np.array(x, dtype) for name, x in args.items()}
  rows = Rows(
    cotangents=np.array([1, -0.5, 2], dtype),
    labels=LABELS.copy(),
    where=np.ones(3 if vmapped else (3, classes), bool),
    share=np.ones((3, classes), dtype),
    classes=np.full(3, classes, dtype),
  )
  return args, rows


def assert_right(kind, cases, unsure=None, floor=0.0):
  """Returns the derivatives of each case, which are those of the formula."""
  function, _, dtype, vmapped = kind
  tolerance = 64 * float(jnp.finfo(dtype).eps)
  run, directions = program(function, vmapped), directions_for(cases[0][0], unsure)
  with jax.enable_x64(dtype == np.float64):
    if vmapped:  # always as many, so that one program serves
      stacked = jax.tree.map(lambda *xs: np.resize(np.stack(xs), (9, *np.shape(xs[0]))), *cases)
      together = jax.tree.map(np.asarray, run(*stacked, directions))
      ours = [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(cases))]
    else:
      ours = [jax.tree.map(np.asarray, run(*case, directions)) for case in cases]
  for i, (actual, (args, rows)) in enumerate(zip(ours, cases, strict=True)):
    theirs = expected(function, args, rows, unsure)
    found = faults(actual, theirs, args, tolerance, unsure, floor)
    assert not found, f"case {i}: {found}"
  return ours
