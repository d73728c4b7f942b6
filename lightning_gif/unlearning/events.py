"""The events of a trainer's edits: dry runs, edits, and undone edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..storage.audit_log import Event

__all__ = ["FIRST_EDIT", "EventList", "Happened"]


class Happened(NamedTuple):
    """An event.

    Attributes:
        number: Its number, from 1 in the order of time.
        event: Its kind.
        in_weights: The number of edits that are in the weights after it.
    """

    number: int
    event: Event
    in_weights: int

    @property
    def is_dry_run(self) -> bool:
        """Whether it changed nothing."""
        return self.event == "dry_run"


@dataclass
class EventList:
    """The events of all edits that one callback made, in the order of time.

    Attributes:
        rows: One row for each event, as they are logged.
        number: The number of events.
        in_weights: The number of edits that are in the weights.
    """

    rows: list[list[Any]] = field(default_factory=list)
    number: int = 0
    in_weights: int = 0

    def add(self, event: Event) -> Happened:
        """Counts an event."""
        self.number += 1
        if event != "dry_run":
            self.in_weights = max(0, self.in_weights + (-1 if event == "undo" else 1))
        return Happened(self.number, event, self.in_weights)


FIRST_EDIT = Happened(1, "unlearn", 1)
"""The event of an edit that is known from its report alone."""
