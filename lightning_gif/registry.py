"""Registries of named choices: selectors, solvers, inverses, methods, samplers, goals and strategies."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from .errors import ConfigurationError

__all__ = ["Registry", "declares", "nearest"]

T = TypeVar("T")


def nearest(given: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: it suggests the closest known name, or lists all names."""
    names = sorted(names)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


def declares(**facts: Any) -> Callable[[T], T]:
    """A decorator with which a function declares facts about itself, whatever name it is registered under.

    Args:
        **facts: The facts by name. Each registry documents which it knows.
    """

    def add(item: T) -> T:
        item.__declared__ = facts  # type: ignore[attr-defined]
        return item

    return add


def _facts(item: Any) -> Mapping[str, Any]:
    """What a function declares; for a ``functools.partial`` of one, what that one declares."""
    while isinstance(item, partial) and not hasattr(item, "__declared__"):
        item = item.func
    return getattr(item, "__declared__", {})


class Registry(Mapping[str, T]):
    """A mapping from names to implementations, to which you can add your own.

    Args:
        kind: The kind of the registered objects, for error messages, such as ``"selector"``.
        **facts: The facts that an entry can declare with :func:`declares`, each with its value for entries that do not.

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

    def __init__(self, kind: str, **facts: Any) -> None:
        self.kind = kind
        self._facts = facts
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a function or class.

        Args:
            name: The name to register it under.

        Raises:
            ConfigurationError: If the name is taken, or the entry declares a fact that is not known here.
        """

        def add(item: T) -> T:
            for fact in _facts(item):
                if fact not in self._facts:
                    raise ConfigurationError(
                        f"The {self.kind} {name!r} declares {fact!r}, which means nothing for a {self.kind}."
                        f" {nearest(fact, self._facts) if self._facts else 'It can declare nothing.'}"
                    )
            if name in self._items:
                raise ConfigurationError(f"A {self.kind} named {name!r} is registered already; choose another name.")
            self._items[name] = item
            return item

        return add

    def declared(self, item: T, fact: str) -> Any:
        """What an entry, or something like it that is not registered, declares about a fact."""
        return _facts(item).get(fact, self._facts[fact])

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
