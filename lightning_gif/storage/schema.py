"""Reads records of plain values from untrusted files, and checks that the values have the expected types."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from ..errors import ConfigurationError, GIFError

__all__ = ["MOST_BYTES", "parse", "parse_errors_name", "read", "restored", "restored_fields"]


# The largest size of a record that is read. In memory it takes about ten times as much.
MOST_BYTES = 2**28


@contextmanager
def parse_errors_name(
    path: str | os.PathLike[str], remedy: str, kind: type[GIFError] = ConfigurationError
) -> Iterator[None]:
    """Re-raises errors about the contents of an untrusted file as one that names the file and says what to do.

    Args:
        path: The file.
        remedy: What to do about a damaged file, as a sentence.
        kind: The class of the error. Errors of this class pass unchanged.

    Raises:
        kind: Instead of an error about a missing key, or about a wrong type, value or shape.
    """
    try:
        yield
    except (
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        if isinstance(error, kind):
            raise
        raise kind(f"{os.fspath(path)!r} is damaged: {type(error).__name__}: {error}. {remedy}") from error


def parse(text: str | bytes) -> Any:
    """JSON as plain values.

    Raises:
        ValueError: If the text is not JSON, is nested too deeply, or has an object with the same key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("the record is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("the record has the same key twice")
    return values


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file as plain values, see :func:`parse`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has more than :data:`MOST_BYTES` bytes, or for the reasons in :func:`parse`.
    """
    size = os.stat(path).st_size
    if size > MOST_BYTES:
        raise ValueError(f"the record has {size} bytes, but at most {MOST_BYTES} are read")
    return parse(Path(path).read_bytes())


def restored_fields(kind: type, record: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """The values for the fields of a dataclass from a record, each converted to the type of its field.

    Args:
        kind: The dataclass.
        record: A mapping from the names of all its fields to plain values.
        without: Fields that are not in the record.

    Raises:
        TypeError: If names are missing or unknown, or a value has another type.
        ValueError: If a value is not a member of its enumeration.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name not in without]
    if not isinstance(record, Mapping) or record.keys() != set(names):
        given = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise TypeError(f"a record of {kind.__name__} must have {', '.join(names)}; got {str(given)[:200]}")
    return {name: restored(hints[name], record[name], name) for name in names}


def restored(hint: Any, value: Any, what: str) -> Any:
    """Converts a plain value to a type, such as a list to a tuple, or a string to a member of an enumeration.

    Args:
        hint: The type: ``Any``, ``None``, ``bool``, ``int``, ``float``, ``str``; an enumeration, a named tuple or a
            dataclass; or a list, tuple, dictionary or union of these.
        value: The value.
        what: The name of the value, for messages.

    Raises:
        TypeError: If the value does not have the type.
        ValueError: If it is not a member of the enumeration.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return restored(part, value, what)
            except (TypeError, ValueError):
                continue
    elif origin is list and isinstance(value, list):
        return [restored(parts[0], item, f"{what}[{i}]") for i, item in enumerate(value)]
    elif origin is tuple and isinstance(value, list):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(kinds) == len(value):
            return tuple(
                restored(k, item, f"{what}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True))
            )
    elif origin is dict and isinstance(value, dict):
        return {key: restored(parts[1], item, f"{what}[{key!r}]") for key, item in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) or abs(value) < 2**1023:
            return float(value)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif hint in (None, type(None)) and value is None:
        return None
    elif isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str):
        return hint(value)
    elif isinstance(hint, type) and hasattr(hint, "_fields") and isinstance(value, list):
        hints = get_type_hints(hint)
        if len(value) == len(hints):
            return hint(
                *(restored(hints[name], item, f"{what}.{name}") for name, item in zip(hints, value, strict=True))
            )
    elif hasattr(hint, "__dataclass_fields__"):
        return hint(**restored_fields(hint, value))
    raise TypeError(f"{what} is {value!r:.80}, expected {getattr(hint, '__name__', hint)}")
