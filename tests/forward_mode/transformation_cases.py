"""Transformations of a function of one array, each with the arrays it is evaluated at."""

import functools
import itertools

import jax
import jax.numpy as jnp
from comparisons import total
from custom_rules import BATCH, V, X


def iterated(f, x):
  return jax.lax.scan(lambda c, a: (0.5 * f(c) + a, f(c)), x, jnp.stack([x, x]))


def looped(f, x):
  return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 0.5 * f(c[1])), (0, x))[1]


def branched(f, x):
  return jax.lax.cond(x[0] > 0, f, lambda x: f(x * x), x)


def counted(f, x):
  return jax.lax.fori_loop(0, 2, lambda _, c: 0.5 * f(c), x)


def custom_jvp_around(f):
  g = jax.custom_jvp(lambda x: f(x) + x)
  g.defjvp(lambda xs, dots: jax.jvp(lambda x: f(x) + x, xs, dots))
  return g


def custom_vjp_around(f):
  g = jax.custom_vjp(lambda x: f(x) + x)
  g.defvjp(lambda x: jax.vjp(lambda x: f(x) + x, x), lambda pullback, y_bar: pullback(y_bar))
  return g


TRANSFORMATIONS = {
  "value": lambda f: f(X),
  "jvp": lambda f: jax.jvp(f, (X,), (V,)),
  "vjp": lambda f: jax.vjp(f, X)[1](V),
  "linearize": lambda f: jax.linearize(f, X)[1](V),
  "linear_transpose linearize": lambda f: jax.linear_transpose(jax.linearize(f, X)[1], X)(V),
  "linear_transpose twice": lambda f: jax.linear_transpose(
    lambda t: jax.linear_transpose(jax.linearize(f, X)[1], X)(t)[0], X
  )(V),
  "hessian": lambda f: jax.hessian(f)(X),
  "grad": lambda f: jax.grad(total(f))(X),
  "jvp of grad": lambda f: jax.jvp(jax.grad(total(f)), (X,), (V,)),
  "grad of jvp": lambda f: jax.grad(lambda x: total(lambda v: jax.jvp(f, (x,), (v,))[1])(V))(X),
  "vjp of jvp": lambda f: jax.vjp(lambda x, v: jax.jvp(f, (x,), (v,)), X, V)[1]((V, X)),
  "vmap jvp": lambda f: jax.vmap(lambda x, v: jax.jvp(f, (x,), (v,)))(BATCH, -BATCH),
  "vmap jvp x": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (V,)))(BATCH),
  "vmap jvp v": lambda f: jax.vmap(lambda v: jax.jvp(f, (X,), (v,)), out_axes=(None, 1))(BATCH),
  "vmap jvp of a constant": lambda f: jax.vmap(lambda x: x + jax.jvp(f, (X,), (V,))[1])(BATCH),
  "vmap jacfwd": lambda f: jax.vmap(jax.jacfwd(f), in_axes=1, out_axes=2)(BATCH.T),
  "vmap jacrev": lambda f: jax.vmap(jax.jacrev(f), in_axes=-1, out_axes=-1)(BATCH.T),
  "vmap hessian": lambda f: jax.vmap(jax.hessian(f))(BATCH),
  "vmap vmap jacfwd": lambda f: jax.vmap(jax.vmap(jax.jacfwd(f)), in_axes=1)(BATCH[:, None]),
  "jacfwd vmap": lambda f: jax.jacfwd(jax.vmap(f, in_axes=1, out_axes=1))(BATCH.T),
  "jacrev vmap": lambda f: jax.jacrev(jax.vmap(f))(BATCH),
  "jacfwd vmap grad": lambda f: jax.jacfwd(jax.vmap(jax.grad(total(f))))(BATCH),
  "jacrev vmap jacfwd": lambda f: jax.jacrev(jax.vmap(jax.jacfwd(f)))(BATCH),
  "vmap grad jit": lambda f: jax.vmap(jax.grad(total(jax.jit(f))))(BATCH),
  "jacfwd jit vmap jit": lambda f: jax.jacfwd(jax.jit(jax.vmap(jax.jit(f))))(BATCH),
  "hessian jit": lambda f: jax.hessian(jax.jit(f))(X),
  "jvp checkpoint": lambda f: jax.jvp(jax.checkpoint(f), (X,), (V,)),
  "grad checkpoint": lambda f: jax.grad(total(jax.checkpoint(lambda x: f(f(x)))))(X),
  "hessian checkpoint": lambda f: jax.hessian(jax.checkpoint(f))(X),
  "grad checkpoint jvp": lambda f: jax.grad(
    total(jax.checkpoint(lambda x: jax.jvp(f, (x,), (V,))[1]))
  )(X),
  "jacfwd scan": lambda f: jax.jacfwd(functools.partial(iterated, f))(X),
  "jacrev scan": lambda f: jax.jacrev(functools.partial(iterated, f))(X),
  "hessian scan": lambda f: jax.hessian(lambda x: iterated(f, x)[0])(X),
  "scan jvp": lambda f: iterated(lambda x: jax.jvp(f, (x,), (V,))[1], X),
  "scan jvp grad": lambda f: iterated(lambda x: jax.jvp(jax.grad(total(f)), (x,), (V,))[1], X),
  "grad scan jacfwd": lambda f: jax.grad(
    lambda x: jnp.sum(iterated(lambda x: jax.jacfwd(f)(x) @ x, x)[0])
  )(X),
  "jvp while_loop": lambda f: jax.jvp(functools.partial(looped, f), (X,), (V,)),
  "jacfwd while_loop": lambda f: jax.jacfwd(functools.partial(looped, f))(X),
  "while_loop jvp": lambda f: looped(lambda x: jax.jvp(f, (x,), (V,))[1], X),
  "while_loop grad": lambda f: looped(jax.grad(total(f)), X),
  "vmap jvp while_loop": lambda f: jax.vmap(
    lambda x: jax.jvp(functools.partial(looped, f), (x,), (V,))
  )(BATCH),
  "jacfwd fori_loop": lambda f: jax.jacfwd(functools.partial(counted, f))(X),
  "jacrev fori_loop": lambda f: jax.jacrev(functools.partial(counted, f))(X),
  "jacfwd cond": lambda f: jax.jacfwd(functools.partial(branched, f))(X),
  "jacrev cond": lambda f: jax.jacrev(functools.partial(branched, f))(-X),
  "vmap jacfwd cond": lambda f: jax.vmap(jax.jacfwd(functools.partial(branched, f)))(BATCH),
  "jacfwd map": lambda f: jax.jacfwd(lambda xs: jax.lax.map(f, xs))(BATCH),
  "jacrev map": lambda f: jax.jacrev(lambda xs: jax.lax.map(f, xs))(BATCH),
  "map jacfwd": lambda f: jax.lax.map(jax.jacfwd(f), BATCH),
  "jacfwd custom_jvp": lambda f: jax.jacfwd(custom_jvp_around(f))(X),
  "hessian custom_jvp": lambda f: jax.hessian(custom_jvp_around(f))(X),
  "jacrev custom_vjp": lambda f: jax.jacrev(custom_vjp_around(f))(X),
} | {
  " ".join(nest): functools.partial(
    lambda nest, f: functools.reduce(lambda g, d: getattr(jax, d)(g), reversed(nest), f)(X), nest
  )
  for depth in (1, 2, 3)
  for nest in itertools.product(["jacfwd", "jacrev"], repeat=depth)
}
