"""What hypothesis draws for the properties, and how often."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

SHAPES = [(3, 2), (2, 5), (1, 17)]
SCALES = (1e-30, 1e-3, 1.0, 10.0, 1e4)
U = 2.0**-24  # one rounding error in float32
TINY = 2.0**-126  # what is smaller underflows


@st.composite
def logits(draw):
  """Rows of float32, with ties and far outliers."""
  shape = draw(st.sampled_from(SHAPES))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  z = rng.standard_normal(shape) * draw(st.sampled_from(SCALES))
  if draw(st.booleans()):
    z[:, 0] = z.max(axis=1)  # a tie with the largest
  if draw(st.booleans()):
    z[:, -1] = z.max(axis=1) + draw(st.sampled_from([1.0, 20.0, 80.0]))  # one class leads
  return z.astype(np.float32)


EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=1000, deadline=None, database=None)
PROPERTIES = collections.defaultdict(dict)  # by the module of the test


def property_of(*strategies, many=None):
  """A test of fifty cases, the same in every run; `test_many_cases` draws others, of ``many``."""

  def as_test(f):
    PROPERTIES[f.__module__][f.__name__.removeprefix("test_")] = f, many or strategies
    return EXAMPLES(given(*strategies)(f))

  return as_test


def draw_many(module, name, seed):
  """The property of this name in a test module, of many other cases."""
  f, strategies = PROPERTIES[module][name]
  seeded(seed)(MANY(given(*strategies)(f)))()


@functools.cache
def compiled(f):
  return jax.jit(f)


def labels_of(z):
  return np.arange(len(z)) % z.shape[1]


INF, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 20.0, -90.0, -INF, "max", "-max", "subnormal", "normal", INF, NAN)
EXTREME = [((2, 5), "float32"), ((1, 17), "float32"), ((2, 5), "bfloat16"), ((2, 5), "float16")]
MORE_EXTREME = [
  (shape, dtype)
  for shape in ((2, 5), (1, 17), (3, 1))
  for dtype in ("float32", "bfloat16", "float16", "float64")
]


def special(name, dtype):
  limits = jnp.finfo(dtype)
  return {
    "max": float(limits.max),
    "-max": float(limits.min),
    "subnormal": float(limits.smallest_subnormal),
    "normal": float(limits.tiny),
  }.get(name, name)


@st.composite
def extreme(draw, kinds):
  """Logits of any values, a mask, one class and one share for each class; and the dtype's name."""
  shape, dtype = draw(st.sampled_from(kinds))
  # The values that spoil a row stand last, so that most rows are without.
  values = SPECIAL[: draw(st.sampled_from([6, 7, 11, 13]))]
  entry = st.one_of(st.sampled_from(values), st.integers(-1000, 1000).map(lambda n: n / 50))
  size = shape[0] * shape[1]
  z = draw(st.lists(entry, min_size=size, max_size=size))
  z = np.array([special(x, dtype) for x in z]).reshape(shape)
  if draw(st.booleans()):
    z[0] = special(draw(st.sampled_from(values)), dtype)  # the same everywhere
  mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
  mask = np.array(mask).reshape(shape) | draw(st.booleans())
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  labels = rng.integers(0, shape[1], shape[0])
  shares = rng.integers(0, 3, shape) / 4
  return np.asarray(jnp.asarray(z, dtype)) if dtype != "float64" else z, mask, labels, shares, dtype


SEEDS = st.integers(0, 2**32 - 1)
SHARE = st.floats(0, 1, width=32)


@st.composite
def options(draw):
  """Smoothing, z-loss and class weights, some of which are 0."""
  rng = np.random.default_rng(draw(SEEDS))
  zero = draw(st.booleans())
  weights = lambda classes: (rng.uniform(size=classes) * rng.integers(zero, 2, classes)).astype(
    np.float32
  )
  return np.float32(draw(SHARE)), np.float32(draw(SHARE)), weights
