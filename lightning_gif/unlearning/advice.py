"""Warnings about an edit that missed its target or cost too much."""

from __future__ import annotations

from ..reporting.notes import warn_and_note
from .goals import Goal
from .protocol import Trial
from .task import Scales

__all__ = ["warn_cost", "warn_refreshed_statistics", "warn_unfinished"]


def warn_unfinished(goal: Goal, before: Trial, chosen: Trial, target: float | None, notes: list[str]) -> None:
    """Warns if the edit missed its target or changes nothing.

    Args:
        goal: The goal of the edit.
        before: The trial of the trained model.
        chosen: The trial that the edit realises.
        target: The target memorization; ``None`` if it is unknown.
        notes: The notes of the report, which are extended.
    """
    shortfall = goal.shortfall(before, chosen, target)
    if shortfall is not None and goal.warns_of_shortfall:
        warn_and_note(notes, shortfall)
    elif shortfall is not None:
        notes.append(shortfall)
    elif not chosen.is_edit:
        warn_and_note(
            notes,
            "No step size lowered the risk, so the edit changes nothing. Use step='natural' to make the natural step"
            " anyway.",
        )


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
