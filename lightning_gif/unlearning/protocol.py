"""The types that strategies work with: trials, limits, and the predicted change of the risk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .._moved import renamed, warn_renamed

__all__ = ["GoalName", "Limits", "QuadraticModel", "Trial"]


class GoalName(str, Enum):
    """The names of the three built-in goals in a report. Each equals its string.

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

    The retained examples are ones that the solves have not seen, if there are enough of them.

    Attributes:
        step_sizes: The multiple of each change, in the order of the solves; 1 is the natural step.
        forget_loss: The mean loss of (a sample of) the forget examples, with their labels in training.
        retain_loss: The mean loss of (a sample of) the retained examples.
        risk: The quantity that the edit minimises. Each goal defines it, see :mod:`lightning_gif.unlearning.goals`. NaN
            if the strategy does not use it, as ``"match"``.
        memorization: Class removal: the share of the forget examples that are still predicted as one of the forgotten
            classes. Label correction: the share of the corrected examples that are not predicted as their new label.
            Example removal: the membership AUROC, which says how well a threshold on the loss separates the forget
            examples from unseen examples of the same label (0.5: not at all). NaN if it is not known.
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
        """Whether the trial differs from the trained model, that is, whether some step size is not zero."""
        return any(self.step_sizes)

    steps = renamed("Trial.steps", "step_sizes")
    step = renamed("Trial.step", "step_size")
    remembered = renamed("Trial.remembered", "memorization")
    moved = renamed("Trial.moved", "is_edit")


class QuadraticModel(NamedTuple):
    """The predicted change of the risk along a change ``x``: ``slope·s + curvature·s²/2`` at step size ``s``.

    Attributes:
        slope: ``∇riskᵀx`` at the weights at which the change was solved.
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
    """The target memorization and the maximal retained loss of an edit.

    Attributes:
        target_memorization: The largest :attr:`Trial.memorization` that counts as forgotten or corrected; ``None``
            if memorization is not known.
        max_retain_loss: The largest retained loss that the edit may cause.
    """

    target_memorization: float | None
    max_retain_loss: float

    def are_reached(self, trial: Trial) -> bool:
        """Whether a trial reaches the target memorization; true if there is no target."""
        return self.target_memorization is None or trial.memorization <= self.target_memorization

    def allow(self, trial: Trial) -> bool:
        """Whether the retained loss of a trial is finite and within its limit."""
        return math.isfinite(trial.retain_loss) and trial.retain_loss <= self.max_retain_loss
