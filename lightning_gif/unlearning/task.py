"""What an edit is for, and the data that it is decided on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.memory import bytes_to_keep
from ..curvature.sampling import curvature_sample
from ..data.examples import Examples
from ..data.identity import locate
from ..data.targets import find_targets
from ..defaults import sample_size
from ..errors import BatchError, TrainingDataError
from ..objective.objective import Objective
from ..reporting.notes import warn_and_note
from .protocol import Goal

# How many examples a step is measured on, at most, of each kind.
_MEASURED = 1024

# Fewer examples are too few to tell how well a threshold on their loss tells them from unseen ones.
_FEWEST = 20


def check_new_labels(corrected: Examples, classes: int) -> None:
    """Raises a :class:`~lightning_gif.errors.BatchError` for a new label that is none of the predicted classes."""
    for batch in corrected.local_batches():
        new = find_targets(batch.data)
        wrong = None if new is None else new[(new < 0) | (new >= classes)]
        if wrong is not None and wrong.numel():
            raise BatchError(
                f"`relabel` has the class {wrong[0].item()}, but the model predicts {classes}: 0 to {classes - 1}."
            )


@dataclass(frozen=True)
class Task:
    """What an edit is for and the data that it is decided on.

    Attributes:
        goal: See :class:`~lightning_gif.unlearning.protocol.Goal`.
        forget: The examples in question.
        judged: Those of them whose losses are looked at.
        corrected: Those in question with their new labels; ``None`` for removal.
        amended: Those of them that steps are measured on.
        sample: The retained examples that the curvature is taken over.
        check: The retained examples that steps are measured on: others, where there are enough.
        unseen: Examples that the model was not trained on; ``None`` where there are none, or the goal needs none.
        share: ``m/(n−m)``, the weight of the forgotten examples.
        gone: A mask ``(C,)`` over the classes that are predicted, true for those to be forgotten; ``None`` for single
            examples, and where it is not known what is predicted.
    """

    goal: Goal
    forget: Examples
    judged: Examples
    corrected: Examples | None
    amended: Examples | None
    sample: Examples
    check: Examples
    unseen: Examples | None
    share: float
    gone: Tensor | None

    @classmethod
    def prepare(
        cls,
        objective: Objective,
        forget: Examples,
        corrected: Examples | None,
        retained: Examples,
        rest: Examples,
        unseen: Examples | None,
        settings: Settings,
        share: float,
        notes: list[str],
    ) -> Task:
        if corrected is None:
            goal, gone = _goal_of_removal(objective, forget, rest, notes)
        else:
            goal, predicted = Goal.LABELS, objective.n_classes(corrected)
            gone = None if predicted is None else torch.zeros(predicted, dtype=torch.bool, device=objective.device)
        memory, seed = bytes_to_keep(settings, objective) / 4, settings.seed
        count = sample_size(settings, class_removal=goal is Goal.CLASS)
        measured = _MEASURED if count is None else min(count, _MEASURED)
        sample = curvature_sample(objective, retained, count, settings.curvature_sampling, seed)
        # A solve lowers the loss of the examples that it sees more than that of others like them, so steps are measured
        # on others.
        taken = torch.isin(retained.ids, sample.ids).nonzero().squeeze(1)
        left = len(retained) - len(taken)
        check = all_but(retained, taken) if left and left >= min(len(sample), measured) // 2 else sample

        judged = forget.sample(measured, seed)
        compared = None
        if unseen is not None and goal is Goal.EXAMPLES:
            if min(len(forget), len(unseen)) >= _FEWEST:
                compared = unseen.sample(count, seed).cached(memory)
                objective.check(compared, "unseen")
            else:
                notes.append(
                    f"Fewer than {_FEWEST} examples are too few to compare with unseen ones, or to compare others with:"
                    " how far to go is told by the theory and by the risk on what is retained."
                )
        return cls(
            goal=goal,
            forget=forget,
            judged=judged.cached(memory),
            corrected=corrected,
            amended=None if corrected is None else corrected.sample(measured, seed),
            sample=sample.cached(memory),
            check=check.sample(measured, seed).cached(memory),
            unseen=compared,
            share=share,
            gone=gone,
        )


def _goal_of_removal(
    objective: Objective, forget: Examples, rest: Examples, notes: list[str]
) -> tuple[Goal, Tensor | None]:
    """What a removal is for, and a mask over the predicted classes, true for those to be forgotten.

    Args:
        objective: An open objective.
        forget: The examples in question.
        rest: All training examples that stay, whatever is given as retained.
        notes: Of the report.
    """
    gone = forget.classes
    if gone is None or not rest.has_none_of(gone):
        return Goal.EXAMPLES, None
    predicted = objective.n_classes(forget)
    if predicted is None or objective.n_classes(rest) != predicted:
        warn_and_note(
            notes,
            "All examples of a class are to be forgotten, but it cannot be seen what the model predicts: its loss does"
            " not call F.cross_entropy (or F.nll_loss) with one row of logits for each example and the labels of the"
            " batch. They are removed as single examples are, and may still be predicted as their class.",
        )
        return Goal.EXAMPLES, None
    mask = torch.zeros(predicted, dtype=torch.bool, device=objective.device)
    mask[gone.unique().long()] = True
    return Goal.CLASS, mask


def all_but(examples: Examples, positions: Tensor) -> Examples:
    """The examples at all other positions."""
    keep = torch.ones(len(examples), dtype=torch.bool)
    keep[positions] = False
    return examples.subset(keep.nonzero().squeeze(1))


def retained_examples(train: Examples, forget: Examples, found: Tensor, notes: list[str]) -> Examples:
    """The training examples that are not to be forgotten."""
    if not len(found):
        raise TrainingDataError(
            f"None of the {len(forget)} examples to be forgotten is in the training data, by dataset index or by"
            " content: the model was not trained on them, or in another form (random augmentation). In that case give a"
            " DataLoader over a Subset of the training set, or the data to keep as `retain`."
        )
    if len(found) > len(forget):
        notes.append(
            f"The training data hold {len(found)} copies of the {len(forget)} forget examples; all of them are"
            " forgotten."
        )
    if len(found) < len(forget):
        warn_and_note(
            notes,
            f"{len(forget) - len(found)} of the {len(forget)} forget examples were not found in the training data, by"
            " dataset index or by content. If the model was trained on them in another form (random augmentation),"
            " these forms are still among the data to keep: give a DataLoader over a Subset of the training set, or the"
            " data to keep as `retain`.",
        )
    if len(found) == len(train):
        raise TrainingDataError("All training examples are to be forgotten; nothing would be retained. Train anew.")
    return all_but(train, found)


def without_forgotten(retain: Examples, forget: Examples, notes: list[str]) -> Examples:
    """The given examples to keep, less those to be forgotten."""
    both = locate(forget, retain)
    if len(both):
        warn_and_note(
            notes, f"{len(both)} of the examples given as `retain` are to be forgotten; they are not retained."
        )
    if len(both) == len(retain):
        raise TrainingDataError("All examples given as `retain` are to be forgotten; nothing would be retained.")
    return all_but(retain, both) if len(both) else retain
