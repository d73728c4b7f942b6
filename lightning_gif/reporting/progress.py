"""What a call is doing: a bar in a terminal or notebook, and otherwise a line every ten seconds, as for a log file."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any

from tqdm.auto import tqdm
from typing_extensions import Self

__all__ = ["Lines", "duration", "progress"]

_SECONDS = 10.0


def progress(description: str, total: int | None, *, shown: bool) -> tqdm[Any] | Lines:
    """The progress of a part of a call. It is a context manager with a method ``update``.

    Args:
        description: What the call is doing.
        total: How much there is to do; ``None`` if this is not known.
        shown: Whether it is shown at all.
    """
    interactive = sys.stderr.isatty() or any("notebook" in base.__module__ for base in tqdm.__mro__)
    if interactive or not shown:
        return tqdm(total=total, desc=description, disable=not shown, leave=False)
    return Lines(description, total)


class Lines:
    """Progress where nothing can be overwritten: a line every ten seconds, and none for what takes less time.

    Args:
        description: What is being done.
        total: How much there is to do; ``None`` if this is not known.
    """

    def __init__(self, description: str, total: int | None) -> None:
        self._description, self._total = description, total
        self._done = 0
        self._begin = self._last = monotonic()

    def update(self, done: int = 1) -> None:
        """Adds to what has been done."""
        self._done += done
        now = monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            print(self._line(now - self._begin), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        if self._total is None:
            return f"{self._description}: {self._done} in {duration(seconds)}"
        left = seconds * max(0, self._total - self._done) / max(1, self._done)
        done = f"{self._done} of {self._total} in {duration(seconds)}"
        return f"{self._description}: {done}, about {duration(left)} left"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
