"""Groups of tuned numbers that are checked when they are created."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigurationError

__all__ = ["CheckedNumbers", "number"]


def number(default: float, low: float = 0.0, high: float = math.inf, *, open_low: bool = True) -> Any:
    """A field of :class:`CheckedNumbers`. Its values must be whole numbers if ``default`` is an ``int``.

    Args:
        default: The default value.
        low: The lower end of the allowed range.
        high: The largest allowed value, if it is finite.
        open_low: Whether ``low`` itself is not allowed.
    """
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low})


@dataclass(frozen=True)
class CheckedNumbers:
    """Base class of frozen dataclasses whose fields are declared with :func:`number`.

    Raises:
        ConfigurationError: If a value is not a number, or is out of range.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low, high = getattr(self, entry.name), entry.metadata["low"], entry.metadata["high"]
            whole = isinstance(entry.default, int)
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if fits:
                above = value > low if entry.metadata["open_low"] else value >= low
                fits = above and value <= high and math.isfinite(value)
            if not fits:
                bounds = f"{'above' if entry.metadata['open_low'] else 'at least'} {low:g}"
                bounds += f" and at most {high:g}" if math.isfinite(high) else ""
                raise ConfigurationError(
                    f"`{entry.name}` of {type(self).__name__} must be a {'whole ' if whole else ''}number {bounds}, got"
                    f" {value!r}. The default is {entry.default:g}."
                )
