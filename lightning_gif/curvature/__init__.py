"""The curvature of the training loss: its products with vectors, the influence methods, and inverses."""

from .._moved import forward

__getattr__ = forward(__name__)
