"""Whether an edit worked, in one line: by which measure, and how certain that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from .outcomes import Outcome, PairedChange, auroc_change, wilson_interval

__all__ = ["Evidence", "Grade", "Verdict", "of_correction", "of_membership", "of_prediction", "of_share"]


# Which share of the wanted change counts as done, which as done in part, and which as too much.
_DONE, _PARTLY, _TOO_FAR = 0.75, 0.25, 1.5

# A change of a loss by less than this share of its scale counts as none, see _scale.
_SMALL = 0.02

# Half the width of an interval, as a share of the wanted change, above which it is put in words. Beyond it, an edit
# that made just the wanted change could as well have grade "Partly done" by chance.
_WIDE = 0.25

# A removal that raises the retained loss by more than this share of the rise of the forget loss has changed the model
# as a whole.
_SPOILT = 0.5

_NAMES = {"relabelled": "corrected examples with their new labels", "forget": "forget examples"}

_NO_RETRAINING = "This compares the edit with a prediction, not with a retrained model."


class Grade(str, Enum):
    """How far an edit got.

    Attributes:
        DONE: The measure has reached its target, within its uncertainty.
        PARTLY: It came closer, but not all the way.
        NOT_DONE: It did not come closer, or hardly.
        TOO_FAR: It went beyond the target, or changed the retained examples nearly as much.
        NOTHING_TO_DO: It was at the target before the edit.
        UNKNOWN: Nothing measures it.
    """

    DONE = "Done"
    PARTLY = "Partly done"
    NOT_DONE = "Not done"
    TOO_FAR = "Too far"
    NOTHING_TO_DO = "Nothing to do"
    UNKNOWN = "Not known"


@dataclass(frozen=True)
class Verdict:
    """Whether an edit worked.

    Attributes:
        grade: How far it got.
        reason: By which measure, with its uncertainty, in one or two sentences.
    """

    grade: Grade
    reason: str

    def __str__(self) -> str:
        return f"{self.grade.value}. {self.reason}"


@dataclass(frozen=True)
class Evidence:
    """What a verdict is based on.

    Attributes:
        outcomes: The losses and predicted classes by the name of the examples: ``"forget"``, ``"retain"``, and
            ``"relabelled"`` and ``"unseen"`` if there are such examples.
        predicted: The mean losses that theory predicts for training without the forget examples, or with the new
            labels; empty unless the strategy aims at them.
    """

    outcomes: Mapping[str, Outcome]
    predicted: Mapping[str, float]


def of_prediction(evidence: Evidence) -> Verdict:
    """The verdict on an edit that aims at predicted losses: of the corrected examples if there are any, else forget."""
    name = "relabelled" if "relabelled" in evidence.outcomes else "forget"
    outcome, goal = evidence.outcomes[name], evidence.predicted[name]
    start, end = float(outcome.before.mean()), float(outcome.after.mean())
    wanted, change = goal - start, outcome.change
    how = "with these labels" if name == "relabelled" else "without them"
    losses = f"The loss of the {_NAMES[name]} was {start:.4g}. Theory predicts {goal:.4g} for training {how}"
    if not math.isfinite(wanted):
        return Verdict(Grade.UNKNOWN, f"{losses}, which is not a finite number.")
    if abs(wanted) <= _SMALL * _scale(evidence.outcomes, start):
        return Verdict(
            Grade.NOTHING_TO_DO,
            f"{losses}, which is hardly a change. After the edit it is {end:.4g}{_bounds(change)}. You can undo the"
            f" edit. {_NO_RETRAINING}",
        )
    share = change.mean / wanted
    reached = _share_of_change(share, change.half_width / abs(wanted), len(outcome.before))
    grade = _grade(share)
    spoilt = _spoilt(evidence.outcomes) if name == "forget" and grade is Grade.DONE and wanted > 0 else ""
    grade = Grade.TOO_FAR if spoilt else grade
    return Verdict(grade, f"{losses}. After the edit it is {end:.4g}: {reached}{spoilt} {_NO_RETRAINING}")


def _spoilt(outcomes: Mapping[str, Outcome]) -> str:
    """A sentence on a removal that raises the retained loss nearly as much as that of the forget examples; or ``""``.

    Training without some examples lowers the loss of the others, so it is not expected to raise this loss.
    """
    retain, forget = outcomes.get("retain"), outcomes["forget"]
    if retain is None or retain.change.is_noise:
        return ""
    start, end, change = float(retain.before.mean()), float(retain.after.mean()), retain.change.mean
    if change <= _SMALL * _scale(outcomes, start) or change <= _SPOILT * forget.change.mean:
        return ""
    return (
        f" But the loss of the retained examples rose from {start:.4g} to {end:.4g}, which training without the forget"
        " examples is not expected to do. Undo the edit."
    )


def _share_of_change(share: float, half_width: float, count: int) -> str:
    """Which share of a predicted change an edit made, in one or two sentences.

    Args:
        share: The share, as a mean over the examples.
        half_width: Half the width of its 95 % interval; NaN for a single example.
        count: The number of examples.
    """
    whole = f"{100 * share:.0f}"
    if math.isnan(half_width):
        return f"{whole} % of the predicted change. For a single example, the uncertainty of this is not known."
    if half_width <= _WIDE:
        return f"{whole} ± {100 * half_width:.0f} % of the predicted change."
    return (
        f"{whole} % of the predicted change, as a mean over {count} examples. Their changes differ much: over many"
        f" examples like these, the mean would be between {100 * (share - half_width):.0f} % and"
        f" {100 * (share + half_width):.0f} % (95 % interval)."
    )


def of_share(remaining: tuple[torch.Tensor, torch.Tensor], target: float, sentence: str, *, is_sample: bool) -> Verdict:
    """The verdict on examples of which few should remain in some state.

    Args:
        remaining: Whether each example is in that state before and after the edit, ``(n,)`` each.
        target: The share that may remain.
        sentence: The sentence on it, with ``{after}``, ``{before}`` and ``{count}``.
        is_sample: Whether the examples stand for others like them, so that a share may be above the target by chance.
    """
    before, after = remaining
    count, first, last = len(before), int(before.sum()), int(after.sum())
    low, high = wilson_interval(last, count)
    reason = sentence.format(after=last, before=first, count=count)
    reason += f" 95 % interval of the share: {100 * low:.1f} % to {100 * high:.1f} %."
    if first / count <= target:
        return Verdict(Grade.NOTHING_TO_DO, reason)
    if (low if is_sample else last / count) <= target:
        return Verdict(Grade.DONE, reason)
    gained, lost = int((before & ~after).sum()), int((after & ~before).sum())
    return Verdict(Grade.PARTLY if gained - lost > 2 * math.sqrt(gained + lost) else Grade.NOT_DONE, reason)


def of_membership(evidence: Evidence) -> Verdict:
    """The verdict on a removal of examples whose losses should become like those of unseen examples."""
    forget, unseen = evidence.outcomes["forget"], evidence.outcomes.get("unseen")
    first, last, moved = auroc_change(forget, unseen) if unseen is not None else (PairedChange(math.nan, 0.0),) * 3
    if math.isnan(first.mean):
        return _of_loss(evidence.outcomes)
    measure = (
        f"A threshold on the loss tells forget from unseen examples with an AUROC of {0.5 + last.mean:.3f}"
        f"{_bounds(last, 3)} (before: {0.5 + first.mean:.3f}{_bounds(first, 3)}; 0.5: not at all)."
    )
    if first.mean < -first.half_width:
        return Verdict(
            Grade.NOTHING_TO_DO, f"{measure} Before the edit, the losses of the forget examples were already larger."
        )
    if first.mean <= first.half_width:
        return Verdict(
            Grade.NOTHING_TO_DO,
            f"{measure} Before the edit, the losses of both were already alike, within the uncertainty.",
        )
    if moved.is_noise or moved.mean >= 0:
        return Verdict(Grade.NOT_DONE, measure)
    return Verdict(Grade.DONE if last.mean <= last.half_width else Grade.PARTLY, measure)


def of_correction(outcomes: Mapping[str, Outcome]) -> Verdict:
    """The verdict on new labels for a model whose predicted classes are not known: by the loss with them."""
    corrected, retain = outcomes["relabelled"], outcomes["retain"]
    start, end = float(corrected.before.mean()), float(corrected.after.mean())
    wanted = float(retain.after.mean()) - start
    reason = (
        f"The loss with the new labels went from {start:.4g} to {end:.4g}{_bounds(corrected.change)}; that of the"
        f" retained examples is {start + wanted:.4g}."
    )
    if wanted >= 0:
        return Verdict(Grade.NOTHING_TO_DO, reason)
    grade = _grade(corrected.change.mean / wanted)
    return Verdict(Grade.DONE if grade is Grade.TOO_FAR else grade, reason)  # a smaller loss is no harm


def _scale(outcomes: Mapping[str, Outcome], loss: float) -> float:
    """The scale of a loss: one nat for a classifier, the retained loss for other models, and the loss itself if larger.

    A squared error has no natural unit.
    """
    retain = outcomes.get("retain")
    unit = 1.0 if retain is None or retain.predicted_before is not None else abs(float(retain.before.mean()))
    return max(abs(loss), unit)


def _of_loss(outcomes: Mapping[str, Outcome]) -> Verdict:
    """The verdict if nothing says what the loss of the forget examples should be."""
    forget = outcomes["forget"]
    start, end, change = float(forget.before.mean()), float(forget.after.mean()), forget.change
    moved = abs(change.mean) > _SMALL * _scale(outcomes, start) and not change.is_noise
    reason = f"The loss of the forget examples was {start:.4g}. After the edit it is {end:.4g}{_bounds(change)}"
    if not moved:
        return Verdict(Grade.NOT_DONE, f"{reason}: hardly a change.")
    return Verdict(Grade.UNKNOWN, f"{reason}. There are no unseen examples of their labels to compare it with.")


def _grade(share: float) -> Grade:
    if share > _TOO_FAR:
        return Grade.TOO_FAR
    return Grade.DONE if share >= _DONE else Grade.PARTLY if share >= _PARTLY else Grade.NOT_DONE


def _bounds(change: PairedChange, digits: int | None = None) -> str:
    """Half the width of the 95 % interval of a change, if it is known: ``" ± 0.02"``."""
    half = change.half_width
    return "" if math.isnan(half) else f" ± {half:.{digits}f}" if digits is not None else f" ± {half:.2g}"
