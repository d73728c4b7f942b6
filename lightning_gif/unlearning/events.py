"""The events of a trainer's edits: dry runs, edits, and undone edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..storage.audit_log import Event

__all__ = ["FIRST_DRY_RUN", "FIRST_EDIT", "EventList", "Happened"]


class Happened(NamedTuple):
    """An event.

    Attributes:
        number: Its number, from 1 in the order of time.
        event: Its kind.
        in_weights: The number of edits that are in the weights after it.
        epoch: The number of the trainer's epochs at that time; ``None`` if it is not known.
        global_step: The number of its optimizer steps at that time; ``None`` if it is not known.
    """

    number: int
    event: Event
    in_weights: int
    epoch: int | None = None
    global_step: int | None = None

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

    def add(self, event: Event, epoch: int | None = None, global_step: int | None = None) -> Happened:
        """Counts an event.

        Args:
            event: Its kind.
            epoch: The number of the trainer's epochs; ``None`` if it is not known.
            global_step: The number of its optimizer steps; ``None`` if it is not known.
        """
        self.number += 1
        if event != "dry_run":
            self.in_weights = max(0, self.in_weights + (-1 if event == "undo" else 1))
        return Happened(self.number, event, self.in_weights, epoch, global_step)

    def state(self) -> dict[str, Any]:
        """The events as plain values, for a checkpoint: a resumed run goes on counting."""
        return {"rows": [list(row) for row in self.rows], "number": self.number, "in_weights": self.in_weights}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self.rows[:] = [list(row) for row in state["rows"]]
        self.number, self.in_weights = state["number"], state["in_weights"]


FIRST_EDIT = Happened(1, "unlearn", 1)
"""The event of an edit that is known from its report alone."""

FIRST_DRY_RUN = Happened(1, "dry_run", 0)
"""The event of a dry run that is known from its report alone."""
