"""Batches, examples, their labels and their dataset indices."""

from .._moved import forward

__getattr__ = forward(__name__)
