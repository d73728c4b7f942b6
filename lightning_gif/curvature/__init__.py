"""The curvature of the training loss: products streamed over data, influence methods, and inverses."""

from .._moved import forward

__getattr__ = forward(__name__)
