"""What a strategy learns of an edit: trials, their limits, and the predicted change of the risk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .._moved import renamed, warn_renamed

__all__ = ["GoalName", "Limits", "QuadraticModel", "Trial"]


class GoalName(str, Enum):
    """The names of the three built-in goals, as a report has them: each equals its string.

    Attributes:
        CLASS: See :class:`~lightning_gif.unlearning.goals.ClassRemoval`.
        EXAMPLES: See :class:`~lightning_gif.unlearning.goals.ExampleRemoval`.
        LABELS: See :class:`~lightning_gif.unlearning.goals.LabelCorrection`.
    """

    CLASS = "class"
    EXAMPLES = "examples"
    LABELS = "labels"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Trial:
    """The model at given step sizes, measured on training-side data.

    The retained examples are others than those that the solves have seen, where there are enough of them.

    Attributes:
        step_sizes: The multiple of each solved change, in the order of the solves; 1 is the natural step.
        forget_loss: Mean loss of (a sample of) the forget examples, with the labels they were trained with.
        retain_loss: Mean loss of (a sample of) the retained examples.
        risk: What the edit minimises; its definition belongs to the goal, see :mod:`lightning_gif.unlearning.goals`.
        memorization: Class removal: the share of the forget examples that are still predicted as their class. Label
            correction: the share of the corrected examples that are not predicted as their new label. Example removal:
            how well a threshold on the loss separates the forget examples from unseen ones of the same label (AUROC,
            0.5: not at all). NaN where it is not known.
    """

    step_sizes: tuple[float, ...]
    forget_loss: float
    retain_loss: float
    risk: float
    memorization: float

    @property
    def step_size(self) -> float:
        """The multiple of the first change."""
        return self.step_sizes[0] if self.step_sizes else 0.0

    @property
    def is_edit(self) -> bool:
        """Whether the trial differs from the trained model: some step size is not zero."""
        return any(self.step_sizes)

    steps = renamed("Trial.steps", "step_sizes")
    step = renamed("Trial.step", "step_size")
    remembered = renamed("Trial.remembered", "memorization")
    moved = renamed("Trial.moved", "is_edit")


class QuadraticModel(NamedTuple):
    """The predicted change of the risk along a solved change ``x``: ``slope·s + curvature·s²/2`` at step size ``s``.

    Attributes:
        slope: ``∇riskᵀx`` at the weights that the change was solved at.
        curvature: ``xᵀCx`` with the matrix ``C`` of the solve.
    """

    slope: float
    curvature: float

    def change(self, step_size: float) -> float:
        """The predicted change of the risk at a step size."""
        return self.slope * step_size + self.curvature * step_size**2 / 2

    @property
    def bend(self) -> float:
        """The old name of ``curvature``."""
        warn_renamed("QuadraticModel.bend", "curvature")
        return self.curvature


class Limits(NamedTuple):
    """How far an edit should go, and what it may cost.

    Attributes:
        target_memorization: The largest :attr:`Trial.memorization` that counts as forgotten or corrected; ``None``
            where memorization is not known.
        max_retain_loss: The largest retained loss that the edit may cause.
    """

    target_memorization: float | None
    max_retain_loss: float

    def are_reached(self, trial: Trial) -> bool:
        """Whether a trial is at the target memorization; true where there is none."""
        return self.target_memorization is None or trial.memorization <= self.target_memorization

    def allow(self, trial: Trial) -> bool:
        """Whether the retained loss of a trial is finite and at most the largest allowed one."""
        return math.isfinite(trial.retain_loss) and trial.retain_loss <= self.max_retain_loss
