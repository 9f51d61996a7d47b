"""Every argument of every public function, called with what does not belong there.

The outcome is the documented result, compared with SciPy's in float64, or a TypeError or ValueError
whose message begins with the name of the function; never an error from the inside of JAX, and never
another number.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented_arguments import ARGUMENTS, FUNCTIONS, REFUSED, STATIC
from outcomes import names_argument, outcome, plain_value, refuses_two_dtypes, wrong_numbers
from scipy_formulas import ORACLE

import softmax_jax as sj
from softmax_jax import derivatives


def _with_marks(function, argument):
  """Off for `num_classes`: labels that do not fit a small number of classes give NaN."""
  marks = pytest.mark.without("debug_nans") if argument == "num_classes" else ()
  return pytest.param(function, argument, marks=marks)


@pytest.mark.few(24)
@pytest.mark.parametrize("function,argument", [_with_marks(*a) for a in ARGUMENTS], ids=str)
def test_an_error_that_names_the_function_or_the_documented_result(function, argument):
  f, good, kinds = FUNCTIONS[function]
  good = {name: x for name, x in good.items() if name != argument}
  arrays = jax.tree.map(jnp.asarray, good)
  faults, messages = [], set()
  for name, make, meaning in kinds[argument].cases():
    out, message = outcome(function, lambda make=make: f(**arrays, **{argument: make()}))
    if refuses_two_dtypes(message):
      fault = ""
    elif meaning is not REFUSED:
      plain = {k: plain_value(x) for k, x in {**good, argument: meaning}.items()}
      fault = message or wrong_numbers(out, ORACLE[function](**plain))
    elif not message:
      fault = f"taken: {out}"
    elif not names_argument(argument, message) or message.startswith("NOT"):
      fault = message
    elif message in messages:
      fault = ""
    else:  # as clear where the other arrays are traced
      messages.add(message)
      of_arrays = functools.partial(f, **{argument: make()})
      _, traced = outcome(function, lambda g=of_arrays: jax.eval_shape(lambda xs: g(**xs), arrays))
      fault = f"traced, {traced}" if not traced or traced.startswith("NOT") else ""
    if fault:
      faults.append(f"{name}: {fault}")
  assert not faults, "\n".join(faults)


@pytest.mark.without("disable_jit")  # under which nothing is traced
@pytest.mark.parametrize("function,argument", [a for a in ARGUMENTS if a[1] in STATIC], ids=str)
def test_a_traced_value_in_place_of_a_static_one(function, argument):
  f, good, _ = FUNCTIONS[function]
  for value in (1, 1.0, True, jnp.arange(2)):
    call = jax.jit(lambda value: f(**good, **{argument: value}))
    _, message = outcome(function, lambda call=call, value=value: call(value))
    assert message.startswith(f"{function} expected {argument} ") and "traced value" in message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_wrong_is_said_inside_of_transformations(function):
  f, good, kinds = FUNCTIONS[function]
  first = next(name for name, x in good.items() if isinstance(x, np.ndarray))
  rest = {name: jax.tree.map(jnp.asarray, x) for name, x in good.items() if name != first}
  for argument, kind in kinds.items():
    if argument == first or kind is None:
      continue
    bad = lambda x, argument=argument: f(**{**rest, first: x, argument: {}})
    for transform in (jax.jit, jax.grad, jax.jacfwd, jax.vmap):
      x = jnp.asarray(good[first])[(None,) if transform is jax.vmap else ()]
      _, message = outcome(function, lambda t=transform, bad=bad, x=x: t(bad)(x))
      assert message.startswith(f"{function} expected ") and argument in message, message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_keyword_and_one_argument_too_many(function):
  f, good, kinds = FUNCTIONS[function]
  with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument 'dim'"):
    f(**good, dim=1)
  with pytest.raises(TypeError, match=rf"^{function}\(\) takes .* positional argument"):
    f(*good.values(), *[None] * (len(kinds) + 1 - len(good)))
  with pytest.raises(TypeError, match=rf"^{function}\(\) missing 1 required positional argument"):
    f(*list(good.values())[1:])


def test_the_arguments_of_this_file_are_all_there_are():
  named = {name for name in derivatives.__all__} | set(sj.__all__)
  assert named - set(FUNCTIONS) == {"CrossEntropyAux", "enable_forward_mode"}
  for f, _, kinds in FUNCTIONS.values():
    assert set(inspect.signature(f).parameters) == set(kinds)
