"""The user's module as pure functions of a flat parameter vector."""

from .._moved import forward

__getattr__ = forward(__name__)
