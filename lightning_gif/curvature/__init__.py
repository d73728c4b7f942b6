"""The curvature of the training loss: products, streamed over data, the methods made of them, and inverses."""

from .._moved import forward

__getattr__ = forward(__name__)
