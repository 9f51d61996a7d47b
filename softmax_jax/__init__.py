"""Softmax and the losses built on it, with gradients derived by hand."""

__version__ = "0.1.0"
