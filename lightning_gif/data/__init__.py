"""Batches, the examples in them, their labels, and which training examples they are."""

from .._moved import forward

__getattr__ = forward(__name__)
