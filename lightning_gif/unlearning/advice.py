"""Warnings about an edit that fell short of its target, or that cost too much."""

from __future__ import annotations

from ..reporting.notes import warn_and_note
from .goals import NOTABLE_INCREASE, Goal
from .protocol import Trial
from .task import Scales

__all__ = ["warn_cost", "warn_refreshed_statistics", "warn_unfinished"]


def warn_unfinished(goal: Goal, before: Trial, chosen: Trial, target: float | None, notes: list[str]) -> None:
    """Warns of an edit that fell short of its target, or that changes nothing.

    Args:
        goal: The goal of the edit.
        before: The trained model.
        chosen: The edit.
        target: The target memorization; ``None`` where it is unknown.
        notes: Of the report.
    """
    shortfall = goal.shortfall(before, chosen, target)
    if shortfall is not None and goal.warns_of_shortfall:
        warn_and_note(notes, shortfall)
    elif shortfall is not None:
        notes.append(shortfall)
    elif not chosen.is_edit:
        warn_and_note(
            notes,
            "The search found no step that lowers the risk on the data that retraining would see; the edit changes"
            " nothing. step='natural' makes the natural step all the same.",
        )


def warn_refreshed_statistics(old: dict[str, float], new: dict[str, float], notes: list[str]) -> None:
    """Warns of losses by name that are larger with the running statistics that were computed anew."""
    for name in ("retain", "relabelled"):
        if name in new and new[name] - old[name] > NOTABLE_INCREASE * abs(old[name]):
            warn_and_note(
                notes,
                f"The running statistics that were computed anew raise the {name} loss: {old[name]:.4g} without them,"
                f" {new[name]:.4g} with them. The edit was solved for with the old ones. Leave `refresh_statistics` out"
                " if that matters more.",
            )


def warn_cost(goal: Goal, scales: Scales, before: dict[str, float], after: dict[str, float], notes: list[str]) -> None:
    """Warns where an edit corrected labels at the cost of the retained examples, or the other way round.

    Args:
        goal: The goal of the edit.
        scales: What its budgets are relative to.
        before: Mean losses at the trained weights, by name, ``"relabelled"`` among them.
        after: The same of the edited model.
        notes: Of the report.
    """
    gained = before["relabelled"] - after["relabelled"]
    if after["retain"] - before["retain"] > goal.tolerated_increase(before["retain"], gained, scales):
        warn_and_note(
            notes,
            f"The retained loss rose from {before['retain']:.4g} to {after['retain']:.4g}. The new labels are not what"
            " the other examples teach; a model that is trained with them would not follow all of them either. Make"
            " sure that they are right, and undo the edit if it is not worth it.",
        )
    if -gained > NOTABLE_INCREASE * abs(before["relabelled"]):
        warn_and_note(
            notes,
            f"The loss of the corrected examples rose from {before['relabelled']:.4g} to {after['relabelled']:.4g}: the"
            " risk fell by that of the retained ones. Training had not ended there, or they are too few.",
        )
