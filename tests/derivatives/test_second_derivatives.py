"""Second derivatives where coefficients are 0 and where rows or entries do not count.

Each family looks at the whole Hessian by all arguments at once, in every nesting of two modes,
beside plain formulas in float64 (`plain`). One program per function, shape and dtype serves all of
them; `pytest -m long` compiles those of more shapes and dtypes.
"""

import functools
import itertools

import numpy as np
import plain
import pytest
from oracle import random, relative_error
from plain import FEW, LINEAR, MORE, assert_right, case
from second_order_programs import INF, JUNK, assert_no_part, batched, dense_losses, every_loss

# Coefficients.


@pytest.mark.few(1)
@every_loss
def test_coefficients_of_zero_one_and_between_have_all_second_derivatives(
  function, classes, dtype, vmapped
):
  program = function, classes, dtype, vmapped
  coefficients = itertools.product([0.0, 0.3, 1.0], [0.0, 0.7, 1.0])
  assert_right(program, [case(*program, alpha=a, z_loss=c) for a, c in coefficients])


def some_zeros(classes):
  """Class weights of 0 at the labels of two rows and at another class, and of 1."""
  weights = 0.5 + np.abs(random(1, classes))
  weights[1], weights[3], weights[4], weights[2] = 0, 0, 0, 1
  return weights


@every_loss
def test_class_weights_of_zero_have_all_second_derivatives(function, classes, dtype, vmapped):
  program = function, classes, dtype, vmapped
  make = functools.partial(case, *program, weights=some_zeros(classes))
  assert_right(program, [make(alpha=a, z_loss=c) for a, c in [(0, 0), (0.3, 0.7), (1, 1), (0, 1)]])


# Infinite losses. What has weight 0 adds nothing, and neither do its derivatives. Those by the
# weight itself are 0 by definition, as they are infinite; what their derivatives are is not said.


@dense_losses
def test_a_class_of_weight_zero_at_minus_infinity_adds_nothing(function, classes, dtype, vmapped):
  """Class 1, which is the label of a row; whatever the smoothing."""
  program = function, classes, dtype, vmapped
  cases = []
  for alpha in (0.3, 0.0, 1.0):
    args, rows = case(*program, alpha=alpha, weights=some_zeros(classes))
    args["logits"][:, 1], rows.share[:, 1] = -INF, 0
    cases.append((args, rows))
  unsure = {"class_weights": np.arange(classes) == 1}
  for derivatives in assert_right(program, cases, unsure):
    assert_no_part(derivatives, args, {"logits": np.isinf(args["logits"])}, unsure)


@dense_losses
def test_smoothing_of_zero_adds_nothing_at_minus_infinity(function, classes, dtype, vmapped):
  """A traced coefficient 0 of an infinite loss."""
  program = function, classes, dtype, vmapped
  args, rows = case(*program, alpha=0.0)
  args["logits"][:, 4], rows.share[:, 4] = -INF, 0
  unsure = {"label_smoothing": True, "class_weights": np.arange(classes) == 4}
  if function == "soft":
    args["labels"][:, 4] = 0
    unsure["labels"] = np.arange(classes) == 4
  assert_right(program, [(args, rows)], unsure)


@pytest.mark.few(1)
@batched
@pytest.mark.parametrize("classes", [pytest.param(FEW, marks=pytest.mark.long), MORE])
def test_soft_labels_of_zero_at_minus_infinity_add_nothing(classes, vmapped):
  """Without a mask, class weights and smoothing, where this is not looked for at first."""
  program = "soft", classes, np.float32, vmapped
  args, rows = case(*program)
  args = {name: args[name] for name in ("logits", "labels", "z_loss")}
  rows = rows._replace(where=None)
  at = np.zeros((3, classes), bool)
  at[0, 0] = at[0, 4] = at[1, 0] = at[2, 3] = True
  args["logits"][at], args["labels"][at], rows.share[at] = -INF, 0, 0
  (derivatives,) = assert_right(program, [(args, rows)], {"labels": at})
  assert_no_part(derivatives, args, {"logits": at}, {"labels": at})


def test_the_nestings_agree_where_a_soft_label_of_zero_meets_minus_infinity():
  """On the derivatives by that label too, and the Hessian is symmetric."""
  args, rows = case("soft", FEW, np.float32, False)
  args = {name: args[name] for name in ("logits", "labels", "z_loss")}
  args["logits"][:, 4], args["labels"][:, 4], rows.share[:, 4] = -INF, 0, 0
  program = plain.program("soft")
  hvps = program(args, rows._replace(where=None), plain.directions_for(args)).hvps
  hessians = {name: np.asarray(hvps[name])[len(args) :] for name in plain.NESTINGS[:3]}
  first = hessians["forward over reverse"]
  for name, hessian in {**hessians, "transposed": first.T}.items():
    assert relative_error(hessian, first) < 1e-5, name


# Rows and entries that do not count.


def hide_row(function, args, rows, junk, by_label):
  """Row 1, which then holds ``junk``. Returns what has no part in ``args``."""
  of_row = "x" if function in LINEAR else "logits"
  at = np.arange(3) == 1
  if by_label:
    rows.labels[at] = -1
  else:
    rows.where[at] = False
  rows.share[at] = 0
  args[of_row][at] = junk
  if junk == INF:  # other entries are finite
    args[of_row][at, 1:] = 2
  hidden = {of_row: np.broadcast_to(at[:, None], args[of_row].shape)}
  if function == "soft":
    args["labels"][at] = junk
    hidden["labels"] = np.broadcast_to(at[:, None], args["labels"].shape)
  return hidden


@every_loss
def test_rows_that_do_not_count_may_hold_anything(function, classes, dtype, vmapped):
  """All derivatives by them are exactly 0, and the others are as without them."""
  program = function, classes, dtype, vmapped
  cases, hidden = [], []
  ways = [True] if function in LINEAR else [False] if function == "soft" else [True, False]
  for junk, by_label in itertools.product(JUNK, ways):
    args, rows = case(*program)
    hidden.append(hide_row(function, args, rows, junk, by_label))
    cases.append((args, rows))
  for derivatives, (args, _), of_row in zip(
    assert_right(program, cases), cases, hidden, strict=True
  ):
    assert_no_part(derivatives, args, of_row)


def hide_entries(args, rows, junk, of_rows):
  """Several in two rows, and all of the third."""
  at = np.zeros(rows.where.shape, bool)
  at[0, 2] = at[0, 4] = at[1, 1] = True
  at[2] = True
  rows.where[at], rows.share[at] = False, 0
  rows.classes[:] = np.maximum(np.sum(~at, axis=1), 1)
  for name in of_rows:
    args[name][at] = junk
  return {name: at for name in of_rows}


@pytest.mark.long
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("classes", [FEW, pytest.param(MORE, marks=pytest.mark.long)])
@pytest.mark.parametrize("function", ["integer", "soft"])
def test_masked_classes_may_hold_anything(function, classes, junk):
  program = function, classes, np.float32, False
  args, rows = case(*program)
  of_rows = ["logits", "labels"] if function == "soft" else ["logits"]
  hidden = hide_entries(args, rows, junk, of_rows)
  (derivatives,) = assert_right(program, [(args, rows)])
  assert_no_part(derivatives, args, hidden)


@pytest.mark.few(2)
@batched
@pytest.mark.parametrize("classes", [pytest.param(FEW, marks=pytest.mark.long), MORE])
@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
def test_masked_entries_may_hold_anything(function, classes, vmapped):
  name = "a" if function == "logsumexp" else "x"
  program = function, classes, np.float32, vmapped
  cases = []
  for junk in JUNK:
    _, rows = case("integer", classes, np.float32, False)
    args = {name: random(5, (3, classes))}
    hidden = hide_entries(args, rows, junk, [name])
    cases.append((args, rows))
  for derivatives in assert_right(program, cases):
    assert_no_part(derivatives, args, hidden)


# logsumexp with coefficients.


def scaled(shape, function):
  _, rows = case("integer", shape[-1], np.float32, False)
  rng = np.random.default_rng(3)
  b = rng.uniform(0.5, 2, size=shape).astype(np.float32)
  b[..., 1] = b[..., 4] = 0
  b[..., 2] *= -0.1  # the sums stay positive
  if function == "logsumexp with sign":
    b = -b
  return {"a": random(5, (3, shape[-1])), "b": b}, rows


with_coefficients = pytest.mark.parametrize(
  ("function", "shape"),
  [
    ("logsumexp", (3, FEW)),
    ("logsumexp", (3, MORE)),
    ("logsumexp with sign", (FEW,)),
    ("logsumexp with sign", (MORE,)),
  ],
)


@with_coefficients
def test_logsumexp_has_all_second_derivatives_by_coefficients_of_zero(function, shape):
  args, rows = scaled(shape, function)
  assert_right((function, shape[-1], np.float32, False), [(args, rows)])


@pytest.mark.parametrize("junk", JUNK)
@with_coefficients
def test_what_has_coefficient_zero_in_a_logsumexp_may_hold_anything(function, shape, junk):
  """The derivative by its coefficient is 0 too, unless it is finite."""
  args, rows = scaled(shape, function)
  args["a"][1, 4], rows.share[1, 4] = junk, 0
  (derivatives,) = assert_right((function, shape[-1], np.float32, False), [(args, rows)])
  assert_no_part(derivatives, args, {"a": ~np.isfinite(args["a"])})


@pytest.mark.parametrize("junk", JUNK)
def test_masked_entries_of_a_logsumexp_with_coefficients_may_hold_anything(junk):
  args, rows = scaled((3, MORE), "logsumexp")
  hidden = hide_entries(args, rows, junk, ["a", "b"])
  (derivatives,) = assert_right(("logsumexp", MORE, np.float32, False), [(args, rows)])
  assert_no_part(derivatives, args, hidden)
