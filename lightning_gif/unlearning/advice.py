"""Warnings about an edit that missed its target or cost too much."""

from __future__ import annotations

from .._compat import rank_zero_warn
from ..errors import GIFWarning
from ..reporting.notes import warn_and_note
from ..reporting.progress import duration
from .goals import Goal
from .task import Scales
from .verdict import Grade, Verdict

__all__ = ["note_cheaper_retraining", "warn_cost", "warn_refreshed_statistics", "warn_unfinished"]


def note_cheaper_retraining(seconds: float, training: float, notes: list[str]) -> None:
    """Notes that the edit took longer than the training. Then training again is more exact, and cheaper.

    Args:
        seconds: The seconds of the edit.
        training: The seconds of all recorded fits; 0 if none was recorded, and NaN if a part of one was not.
        notes: The notes of the report, which are extended.
    """
    if 0 < training < seconds:
        notes.append(
            f"Retraining is cheaper here: this edit took {duration(seconds)}, and the whole training"
            f" {duration(training)}."
        )


def warn_unfinished(goal: Goal, verdict: Verdict | None, notes: list[str], *, is_edit: bool) -> None:
    """Warns if an edit did not work, or changes nothing. The note has what to do about it, also if it worked in part.

    Args:
        goal: The goal of the edit.
        verdict: Whether the edit worked; ``None`` if it is not known.
        notes: The notes of the report, which are extended.
        is_edit: Whether the edit changes anything.
    """
    grade = None if verdict is None else verdict.grade
    if not is_edit and grade is not Grade.NOTHING_TO_DO:
        warn_and_note(
            notes,
            "No step size lowered the risk, so the edit changes nothing. Use step='natural' to make the natural step"
            " anyway.",
        )
        return
    remedies = {
        Grade.NOT_DONE: goal.remedy,
        Grade.PARTLY: goal.remedy,
        Grade.TOO_FAR: "Undo the edit, and give a larger `damping`.",
    }
    if grade in remedies:
        notes.append(remedies[grade])
        if grade is not Grade.PARTLY:
            rank_zero_warn(f"{verdict} {remedies[grade]}", category=GIFWarning)


def warn_refreshed_statistics(goal: Goal, old: dict[str, float], new: dict[str, float], notes: list[str]) -> None:
    """Warns if recomputed running statistics raise a loss.

    Args:
        goal: The goal of the edit.
        old: Mean losses of the edited model with the old running statistics, by name.
        new: Mean losses with the recomputed running statistics.
        notes: The notes of the report, which are extended.
    """
    for name in ("retain", "relabelled"):
        if name in new and new[name] - old[name] > goal.notable_increase * abs(old[name]):
            warn_and_note(
                notes,
                f"The recomputed running statistics raise the {name} loss from {old[name]:.4g} to {new[name]:.4g}. The"
                " edit was computed with the old statistics. Omit `refresh_statistics` to keep the old ones.",
            )


def warn_cost(goal: Goal, scales: Scales, before: dict[str, float], after: dict[str, float], notes: list[str]) -> None:
    """Warns about losses that the edit raised more than its goal tolerates.

    Args:
        goal: The goal of the edit.
        scales: The scales of the goal's limits.
        before: Mean losses at the trained weights, by name.
        after: Mean losses of the edited model.
        notes: The notes of the report, which are extended.
    """
    for message in goal.costs(before, after, scales):
        warn_and_note(notes, message)
