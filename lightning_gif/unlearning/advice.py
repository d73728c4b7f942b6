"""Warnings about an edit that did not do what it was for, or did it at a price."""

from __future__ import annotations

from ..reporting.notes import warn_and_note
from .problem import WORSE, ModelEditProblem
from .protocol import Goal, Point


def warn_unfinished(walk: ModelEditProblem, chosen: Point, notes: list[str]) -> None:
    """Warns of a search that did not find what it was for."""
    share = f"{100 * chosen.remembered:.1f} %"
    if walk.goal is Goal.CLASS and walk.enough is not None and not chosen.remembered <= walk.enough:
        warn_and_note(
            notes,
            f"{share} of the class are still predicted as it. More would have raised the retained loss too far, was not"
            " found, or was not asked for. Try targets='batch', another selector, a larger ratio, or another `step`.",
        )
    elif walk.goal is Goal.LABELS and walk.enough is not None and chosen.moved and chosen.remembered > walk.enough:
        warn_and_note(
            notes,
            f"{share} of the corrected labels are not predicted as they should be. Look at the retained loss as well,"
            " and undo the edit if it is not worth it.",
        )
    elif walk.goal is Goal.EXAMPLES and chosen.moved and walk.enough is not None:
        before = walk.path[0]
        told_apart = before.remembered > walk.enough  # by smaller losses than those of unseen ones
        if told_apart and abs(chosen.remembered - walk.enough) >= abs(before.remembered - walk.enough):
            notes.append(
                "Their losses tell the examples from unseen ones as well as before, or better (AUROC"
                f" {before.remembered:.3f} -> {chosen.remembered:.3f}). Undo the edit if that is not worth it."
            )
    elif not chosen.moved:
        warn_and_note(
            notes,
            "The search found no step that lowers the risk on the data that retraining would see; the edit changes"
            " nothing. step='natural' makes the step of the theory all the same.",
        )


def warn_refreshed_statistics(old: dict[str, float], new: dict[str, float], notes: list[str]) -> None:
    """Warns of losses by name that are larger with the running statistics that were computed anew."""
    for name in ("retain", "relabelled"):
        if name in new and new[name] - old[name] > WORSE * abs(old[name]):
            warn_and_note(
                notes,
                f"The running statistics that were computed anew raise the {name} loss: {old[name]:.4g} without them,"
                f" {new[name]:.4g} with them. The edit was solved for with the old ones. Leave `refresh_statistics` out"
                " if that matters more.",
            )


def warn_cost(walk: ModelEditProblem, before: dict[str, float], after: dict[str, float], notes: list[str]) -> None:
    """Warns where a search corrected labels at the cost of the others, or the others' at theirs; losses by name."""
    gained = before["relabelled"] - after["relabelled"]
    if after["retain"] - before["retain"] > walk.tolerated(before["retain"], gained):
        warn_and_note(
            notes,
            f"The retained loss rose from {before['retain']:.4g} to {after['retain']:.4g}. The new labels are not what"
            " the other examples teach; a model that is trained with them would not follow all of them either. Make"
            " sure that they are right, and undo the edit if it is not worth it.",
        )
    if -gained > WORSE * abs(before["relabelled"]):
        warn_and_note(
            notes,
            f"The loss of the corrected examples rose from {before['relabelled']:.4g} to {after['relabelled']:.4g}: the"
            " risk fell by that of the retained ones. Training had not ended there, or they are too few.",
        )
