"""What a call is doing: one bar in a terminal or notebook, else a line every ten seconds, as for a log file."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress", "duration"]

# The least number of seconds between two lines, and between two states of the bar.
_LINES, _BAR = 10.0, 0.1


@dataclass
class _Stage:
    """A stage that has begun.

    Attributes:
        description: What the call is doing.
        total: How much there is to do, at most; ``None`` if this is not known.
        work: The work of all of it; ``None`` if it is not known.
        begin: The time of its beginning.
        done: How much has been done.
        last: The time of the last update.
        each: The seconds for one of ``total``, at each update.
    """

    description: str
    total: int | None
    work: float | None
    begin: float
    done: int = 0
    last: float = 0.0
    each: list[float] = field(default_factory=list)

    @property
    def pace(self) -> float | None:
        """The seconds for one of ``total``: the median, since first passes and what is between passes take longer."""
        return statistics.median(self.each) if self.each else None

    @property
    def rate(self) -> float | None:
        """The seconds for each unit of work; ``None`` if they are not known."""
        return None if self.pace is None or not self.work or not self.total else self.pace * self.total / self.work

    def rest(self, now: float, expected: float) -> float | None:
        """The seconds until its end; ``None`` if they are not known.

        Args:
            now: The time.
            expected: The seconds that all of it is expected to take; 0 if they are not known.
        """
        rest = expected - (now - self.begin)
        if rest > 0:
            return rest
        return None if self.total is None or self.pace is None else max(self.total - self.done, 0) * self.pace


class Progress:
    """The progress of one call, which goes through stages one after another.

    The time that the call will still take is shown if all stages that remain were announced by :meth:`expect`. A stage
    that was there before is expected to take as long again. Of others the rest is expected to go on as fast as before,
    and later ones are compared with the present or the last one by their work. Without an announcement, only the stage,
    its count and the time so far are shown.

    Args:
        shown: Whether anything is shown at all.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm[Any] | None = None
        self._expected: list[tuple[str, float | None]] | None = None
        self._at_most = False
        self._took: dict[str, float] = {}  # the seconds of stages that are over
        self._rate: float | None = None
        self._begin = self._last = -1.0

    def expect(self, *stages: tuple[str, float | None], at_most: bool = False) -> None:
        """Announces all stages that remain, in their order.

        Args:
            *stages: The description of each stage and its work, in any unit that is the same for all; ``None`` if the
                work is not known.
            at_most: Whether the last ones may be left out.
        """
        self._expected, self._at_most = list(stages), at_most

    @contextlib.contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A block that is one stage. It yields a function that adds to what has been done, by default 1.

        Args:
            description: What the call is doing.
            total: How much there is to do, at most; ``None`` if this is not known.
        """
        now = monotonic()
        if self._begin < 0:
            self._begin = self._last = now
        stage, is_over = _Stage(description, total, self._announced(description), now, last=now), False

        def update(count: int = 1) -> None:
            if self._shown and not is_over:
                at = monotonic()
                stage.each.append((at - stage.last) / max(count, 1))
                stage.done, stage.last = stage.done + count, at
                if stage.total is not None and stage.done > stage.total:
                    stage.total = None  # it takes longer than expected
                self._show(stage, at)

        try:
            yield update
        finally:
            took = self._took[description] = monotonic() - stage.begin
            self._rate = stage.rate or (took / stage.work if stage.work else self._rate)
            is_over = True  # what is done later belongs to no stage

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def _is_interactive(self) -> bool:
        return sys.stderr.isatty() or any("notebook" in base.__module__ for base in tqdm.__mro__)

    def _announced(self, description: str) -> float | None:
        """The work of a stage that begins now. Announced stages that were left out before it are no more expected.

        After a stage that was not announced, it is not known what remains.
        """
        names = [name for name, _ in self._expected or []]
        if self._expected is None or description not in names:
            self._expected = None
            return None
        place = names.index(description)
        work = self._expected[place][1]
        del self._expected[: place + 1]
        return work

    def _left(self, stage: _Stage, now: float) -> float | None:
        """The seconds that the call will still take; ``None`` if they are not known."""
        if self._expected is None:
            return None
        rest = stage.rest(now, self._took.get(stage.description, (self._rate or 0.0) * (stage.work or 0.0)))
        if rest is None:
            return None
        own = now - stage.begin + rest
        for description, work in self._expected:
            rate = stage.rate or self._rate
            if description in self._took:
                rest += self._took[description]
            elif description == stage.description:
                rest += own
            elif work is None or rate is None:
                return None
            else:
                rest += rate * work
        return rest

    def _show(self, stage: _Stage, now: float) -> None:
        if now - self._last < (_BAR if self._is_interactive else _LINES):
            return
        self._last = now
        so_far, left = now - self._begin, self._left(stage, now)
        about = "at most" if self._at_most else "about"
        times = f"{duration(so_far)} so far" + ("" if left is None else f", {about} {duration(left)} left")
        what = f"{stage.description}: {stage.done}{'' if stage.total is None else f' of {stage.total}'}"
        if not self._is_interactive:
            print(f"{what}; {times}", file=sys.stderr, flush=True)
            return
        shape = f"{what}; {times}" if left is None else f"{what} |{{bar}}| {times}"
        if self._bar is None:
            self._bar = tqdm(leave=False, total=1.0, bar_format=shape)  # a bar of a notebook keeps its total
        self._bar.n, self._bar.bar_format = 0.0 if left is None else so_far / max(so_far + left, _BAR), shape
        self._bar.refresh()


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
