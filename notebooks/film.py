"""Animated pictures in a notebook."""

import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


class Film:
  """An animated PNG of three plots, which shows wherever a PNG does.

  ``draw(axes, value)`` draws the picture of each of the values on three empty axes. The film runs
  back and forth.
  """

  def __init__(self, draw: Callable[[Any, Any], None], values: Iterable[Any]) -> None:
    """Draws the film."""
    pictures = _pictures(draw, values)
    pictures += pictures[-2::-1]
    frames = [Image.fromarray(pictures[0])]
    for before, after in itertools.pairwise(pictures):  # transparent where nothing changes
      frames.append(Image.fromarray(after * (before != after).any(axis=-1, keepdims=True)))
    file = io.BytesIO()
    frames[0].save(
      file, "PNG", save_all=True, append_images=frames[1:], duration=120, loop=0, blend=1
    )
    self._png = file.getvalue()

  def __repr__(self) -> str:
    """What stands where no picture can."""
    return "Film()"

  def _repr_png_(self) -> bytes:
    return self._png


def _pictures(draw: Callable[[Any, Any], None], values: Iterable[Any]) -> list[np.ndarray]:
  figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained")
  pictures = []
  for value in values:
    for axis in axes:
      axis.clear()
    draw(axes, value)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # everything stays where it is in the first picture
    pictures.append(np.array(figure.canvas.buffer_rgba()))
  plt.close(figure)
  return pictures
