"""From the examples to be forgotten to an edit of the weights."""

from .._moved import forward
from .unlearn import unlearn

__all__ = ["unlearn"]

__getattr__ = forward(__name__)
