"""Registries of named choices: selectors, solvers, inverses, methods, samplers, goals and strategies."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .errors import ConfigurationError

__all__ = ["Registry", "nearest"]

T = TypeVar("T")


def nearest(given: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: it suggests the closest known name, or lists all names."""
    names = sorted(names)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


class Registry(Mapping[str, T]):
    """A mapping from names to implementations, to which you can add your own.

    Args:
        kind: The kind of the registered objects, for error messages, such as ``"selector"``.

    Example:
        >>> solvers = Registry("solver")
        >>> @solvers.register("noop")
        ... def noop(): ...
        >>> list(solvers)
        ['noop']
        >>> solvers["nop"]
        Traceback (most recent call last):
        ...
        lightning_gif.errors.ConfigurationError: Unknown solver 'nop'. Did you mean 'noop'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a function or class.

        Args:
            name: The name to register it under.

        Raises:
            ConfigurationError: If the name is taken.
        """

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigurationError(f"A {self.kind} named {name!r} is registered already; choose another name.")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._items:
            raise ConfigurationError(f"Unknown {self.kind} {name!r}. {nearest(str(name), self._items)}")
        return self._items[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The implementation with this name, or ``default`` if the name is unknown."""
        return self._items[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self._items)})"
