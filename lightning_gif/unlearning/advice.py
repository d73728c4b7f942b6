"""Warnings about an edit that missed its target or cost too much."""

from __future__ import annotations

import math

from ..reporting.notes import warn_and_note
from .goals import Goal
from .protocol import Trial
from .task import Scales

__all__ = ["note_removal", "warn_cost", "warn_refreshed_statistics", "warn_unfinished"]


# Which share of the predicted change of the loss counts as done, and which as done in part.
_DONE, _PARTLY = 0.75, 0.25

# Above this share, an edit has gone too far.
_TOO_FAR = 1.5

# A predicted change of the loss by less than this share of the loss, or of one nat, counts as none.
_SMALL = 0.02


def note_removal(
    before: dict[str, float], after: dict[str, float], predicted: dict[str, float], notes: list[str]
) -> None:
    """Notes how much of the predicted change of the forget loss an edit made.

    Args:
        before: Mean losses at the trained weights, by name.
        after: Mean losses of the edited model.
        predicted: The losses that are predicted for training without the forget examples.
        notes: The notes of the report, which are extended.
    """
    start, end, goal = (part["forget"] for part in (before, after, predicted))
    wanted = goal - start
    losses = f"The loss of the forget examples was {start:.4g}. Theory predicts {goal:.4g} for training without them"
    if not math.isfinite(wanted):
        warn_and_note(notes, f"{losses}, which is not a finite number. Give a larger `damping`.")
        return
    if abs(wanted) <= _SMALL * max(abs(start), 1.0):
        notes.append(
            f"Not much to forget. {losses}: the model hardly depends on these examples. After the edit it is {end:.4g}."
        )
        return
    share = (end - start) / wanted
    verdict = "Done" if share >= _DONE else "Partly done" if share >= _PARTLY else "Not done"
    verdict = "Too far" if share > _TOO_FAR else verdict
    message = f"{verdict}. {losses}. After the edit it is {end:.4g}: {100 * share:.0f} % of the predicted change."
    if verdict == "Not done":
        warn_and_note(notes, f"{message} Retrain without these examples if they must be forgotten.")
    elif verdict == "Too far":
        warn_and_note(notes, f"{message} Undo the edit, and give a larger `damping`.")
    else:
        notes.append(message)


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
