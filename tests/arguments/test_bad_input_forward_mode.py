"""enable_forward_mode, called with what does not belong there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented_arguments import X64
from hostile_values import FIXED, identity
from outcomes import outcome

import softmax_jax as sj


def _cube():
  @jax.custom_vjp
  def cube(x):
    return x**3

  cube.defvjp(lambda x: (x**3, x), lambda x, y_bar: (3 * x**2 * y_bar,))
  return cube


def test_what_is_no_custom_vjp_function_and_what_is_no_rule():
  cube = _cube()
  others = {
    "jit": lambda: jax.jit(cube),
    "custom_jvp": lambda: jax.custom_jvp(identity),
    "twice": lambda: sj.enable_forward_mode(cube),
    "the class": lambda: jax.custom_vjp,
  }
  name = "enable_forward_mode"
  for make in {**FIXED, **others}.values():
    _, message = outcome(name, lambda make=make: sj.enable_forward_mode(make()))
    assert message.startswith("enable_forward_mode expected a jax.custom_vjp function, got ")
  for make in FIXED.values():
    value = make()
    _, message = outcome(name, lambda value=value: sj.enable_forward_mode(cube, value))
    if value is None or callable(value):
      assert not message
    else:
      assert message.startswith("enable_forward_mode expected tangent to be a function, got ")


@pytest.mark.parametrize("name", [n for n in FIXED if n not in ("1e+300", "generator")])
def test_a_tangent_rule_that_returns_no_tangent(name):
  value = FIXED[name]()
  f = sj.enable_forward_mode(_cube(), tangent=lambda x, args_dot: value)
  x = np.array(2, jnp.result_type(float))
  call = lambda: jax.jvp(f, (x,), (np.ones_like(x),))[1]
  if value is None:  # documented: no tangent
    assert call() == 0
  elif isinstance(value, float) or name in ("0-d float", "0-d jax float")[X64:]:
    np.testing.assert_array_equal(call(), value)
  else:
    with pytest.raises(TypeError, match=r"^the tangent rule of cube must return "):
      call()


def test_the_error_of_a_call_with_other_arguments_names_the_function():
  @sj.enable_forward_mode
  @jax.custom_vjp
  def cube(x):
    return x**3

  def power(n, x):
    return x**n

  power = sj.enable_forward_mode(jax.custom_vjp(power, nondiff_argnums=(0,)))
  cube.defvjp(lambda x: (x**3, x), lambda x, y_bar: (3 * x**2 * y_bar,))
  power.defvjp(lambda n, x: (x**n, x), lambda n, x, y_bar: (n * x ** (n - 1) * y_bar,))
  for call in (
    lambda: cube(),
    lambda: cube(1.0, 2.0),
    lambda: cube(y=1.0),
    lambda: power(3),
    lambda: power(3, 1.0, 2.0),
    lambda: power(3, y=1.0),
  ):
    with pytest.raises(TypeError, match=r"cube|power\(\)"):
      call()
