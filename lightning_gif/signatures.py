"""The arguments of functions: names are checked, and ``help`` lists the settings that a call can override."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from .config import Overrides
from .errors import ConfigurationError
from .registry import nearest

__all__ = ["check_argument_names", "keywords", "spell_out"]

P = ParamSpec("P")
R = TypeVar("R")

# The entry of a method's docstring about the settings that it can override.
_OVERRIDES = re.compile(r" {12}\*\*overrides:.*\n(?: {16}.*\n)*")


def keywords(method: Callable[..., object]) -> list[str]:
    """The names of a method's keyword-only arguments, without the settings that it can override."""
    parameters = inspect.signature(method).parameters.values()
    own = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    return [name for name in own if name not in Overrides.__annotations__]


def check_argument_names(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: an argument with an unknown name raises an error that suggests the nearest name.

    Args:
        function: An ``__init__`` without ``**kwargs``.
    """
    known = list(inspect.signature(function).parameters)[1:]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise ConfigurationError(
                    f"{type(args[0]).__name__} has no argument {name!r}, got {name}={kwargs[name]!r}."
                    f" {nearest(name, known)}"
                )
        return function(*args, **kwargs)

    return checked


class _Unquoted(str):
    """An annotation that a printed signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _AsInCallback:
    """The default of an argument that overrides a setting: what the callback has."""

    def __repr__(self) -> str:
        return "..."


def spell_out(methods: Iterable[Callable[..., object]], documented: str | None) -> None:
    """Replaces ``**overrides`` by the arguments that it stands for, in the signature and the docstring of methods.

    Type checkers and editors find these arguments in :class:`~lightning_gif.config.Overrides`. This is for ``help`` and
    for consoles, which ask the running program.

    Args:
        methods: Functions with ``**overrides``.
        documented: The docstring that documents the settings; ``None`` if Python removes docstrings.
    """
    settings = {name: _Unquoted(hint.__forward_arg__) for name, hint in Overrides.__annotations__.items()}
    default = _AsInCallback()
    entries = {} if documented is None else _entries(documented)
    documentation = "".join(textwrap.indent(entries[name], " " * 12) for name in settings if name in entries)
    for method in methods:
        signature = inspect.signature(method)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        given = [own[0], *(one.replace(annotation=_Unquoted(one.annotation)) for one in own[1:])]  # `self` has none
        given += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, hint in settings.items()
        ]
        result = _Unquoted(signature.return_annotation)
        method.__signature__ = inspect.Signature(given, return_annotation=result)  # type: ignore[attr-defined]
        if method.__doc__ is not None:
            method.__doc__ = re.sub(_OVERRIDES, lambda found: found[0] + documentation, method.__doc__)


def _entries(docstring: str) -> dict[str, str]:
    """The texts of the arguments that a docstring documents, each with its name and without indentation."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2]
    return {found[2]: textwrap.dedent(found[1]) for found in re.finditer(r"( {4}(\w+):.*\n(?: {8}.*\n)*)", section)}
