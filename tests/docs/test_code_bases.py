"""Both sides of each diff of docs/code_bases.md compute the same, and so do their gradients."""

import ast
import functools

import code_base_formulas as formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error
from pages import DOCS, blocks, run, text_of

from softmax_jax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

PAGE = DOCS / "code_bases.md"
DIFFS = blocks(PAGE, "diff")
SECTIONS = [section for section in text_of(PAGE).split("\n## ") if "```diff" in section]


def sides(diff):
  """The code before and after a diff."""
  lines = diff.splitlines()
  return ["\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-"]


def assigned(code):
  """The names that a piece of code assigns, in their order."""
  names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
  names = [node for node in names if isinstance(node.ctx, ast.Store)]
  return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: node.lineno)))


def outcome(code, wanted, imports, arrays):
  """The values of the wanted names, and the gradients of the first by all arrays."""

  def values(arrays):
    names = imports | formulas.names(arrays)
    exec(compile(code, str(PAGE), "exec"), names)
    first, *others = [jnp.asarray(names[name]) for name in wanted]
    return jnp.vdot(first, jnp.cos(jnp.arange(first.size))), (first, *others)

  (_, found), gradients = jax.value_and_grad(values, has_aux=True)(arrays)
  return found, gradients


def outcomes(diffs, arrays):
  """Of each diff that of both sides, for the names that both assign."""
  imports = run(PAGE, blocks(PAGE, "python")[0])
  for before, after in map(sides, diffs):
    common = [name for name in assigned(before) if name in assigned(after)]
    yield [outcome(code, common, imports, arrays) for code in (before, after)]


def error(before, after):
  """The largest relative error in norm."""
  assert any(np.any(gradient) for gradient in jax.tree.leaves(before[1]))
  return max(
    relative_error(np.asarray(x, float), np.asarray(y, float))
    for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True)
    if np.any(x) or np.any(y)  # not by the arrays of other diffs
  )


def errors(diffs):
  """The error of each diff in float64: one program, compiled in a hurry."""
  program = jax.jit(
    lambda arrays: list(outcomes(diffs, arrays)),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  with jax.enable_x64(True):
    return [error(*pair) for pair in program(formulas.ARRAYS)]


@pytest.fixture(scope="module")
def found():
  return dict(zip(DIFFS, errors(DIFFS), strict=True))


@pytest.mark.parametrize("diff", DIFFS, ids=[sides(diff)[0].split("(")[0] for diff in DIFFS])
def test_both_sides_are_the_same(diff, found):
  assert found[diff] < 1e-12


def test_there_are_nine():
  links = text_of(PAGE).split("\n## ")[0].count("](#")
  assert len(SECTIONS) == links == 9


def test_a_wrong_line_is_noticed():
  right = "e * K / (K - 1)"
  diff = next(diff for diff in DIFFS if right in diff and "sample_weights=weights, " in diff)
  wrong = [diff.replace(right, "e"), diff.replace("sample_weights=weights, ", "")]
  assert min(errors(wrong)) > 1e-3


def test_what_differs_in_axlearn():
  """A mean divides by 1 at least there, and a live target out of range counts."""
  logits = formulas.ARRAYS["logits"]
  loss = functools.partial(
    softmax_cross_entropy_with_integer_labels, logits, reduction="sum", return_aux=True
  )
  few = 0.1 * formulas.MASK
  total, aux = loss(formulas.LABELS, sample_weights=few)
  assert aux.weight < 1
  theirs, _ = formulas.axlearn_loss(logits, formulas.LABELS, few)
  assert relative_error(total / jnp.maximum(aux.weight, 1), theirs) < 1e-6

  padded = np.where(formulas.MASK, formulas.LABELS, -1)
  total, aux = loss(padded, ignore_invalid=True)
  theirs, _ = formulas.axlearn_loss(logits, padded, np.ones_like(padded))
  assert aux.weight == formulas.MASK.sum()
  assert relative_error(total / padded.size, theirs) < 1e-6


def test_the_memory_of_one_hot_labels():
  z, y = jax.ShapeDtypeStruct((1024, 8192), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.int32)
  one_hot = lambda labels: jax.nn.one_hot(labels, 8192)
  optax = pytest.importorskip("optax", reason="optax, a peer of the losses, is not installed")

  def megabytes(loss):
    program = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).mean())).lower(z, y)
    return program.compile().memory_analysis().temp_size_in_bytes / 1e6

  prose = " ".join(text_of(PAGE).split())
  theirs = megabytes(lambda z, y: optax.softmax_cross_entropy(z, one_hot(y)))
  soft = megabytes(lambda z, y: softmax_cross_entropy(z, one_hot(y)))
  assert f"take {theirs:.0f} MB of temporaries with one-hot labels and optax" in prose
  assert f"it takes {soft:.0f} MB" in prose
  assert megabytes(softmax_cross_entropy_with_integer_labels) < 0.1
  assert "Soft labels take half as much again as in optax" in text_of(DOCS / "comparison.md")
  assert soft / theirs == pytest.approx(1.5, rel=0.01)
