"""What a strategy sees of an edit that is being searched for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

__all__ = ["Goal", "LocalModel", "Point", "Walk"]


class Goal(str, Enum):
    """What an edit is for, and so what the risk is that it should lower.

    ``CLASS``: the forgotten examples are all that is known of their classes; none of them may be predicted any more,
    and nothing says what is to be predicted instead. By Bayes' rule a model that knows the probabilities of the classes
    knows them without some: it rules these out and divides by what is left (linear filtration; Baumhauer, Schöttle and
    Zeppelzauer, *Machine Learning* 111, 2022). What the trained model so expects of retained examples is what the
    edited one should predict. The risk is the mean of ``KL(expected ‖ predicted)`` over them, which can become zero
    without any fit to the labels of a sample, and a fifth of the mean of ``−log(1 − p)`` over the forgotten ones, with
    ``p`` the probability of the classes in question (unlikelihood; Welleck et al., ICLR 2020): unlike a loss with its
    sign turned, it has a minimum.
    ``EXAMPLES``: others like them stay, or it is not known what is predicted. The risk is the loss of the retained
    data, which retraining would minimise. No training ends in an exact minimum, and on a sample of the data even that
    has a slope: what there is of it in the loss of *all* data at the trained weights is subtracted, so that an edit
    answers the change of the data, and neither goes on training nor fits the sample. Where there are unseen examples to
    compare with, a forgotten one should have the loss ``t`` of the unseen one of its class and rank: what was learned
    by heart is what retraining without it would get wrong, and it is what a trained model finds hardest. Of those whose
    loss ``ℓ`` was less than that, ``(t − ℓ)²/(2σ)`` is a part of the risk, with ``σ`` the root mean square of what they
    lack, and eight times the weight of a retained loss.
    ``LABELS``: labels are corrected. The risk is ``KL(expected ‖ predicted)`` over the retained examples, with no class
    ruled out, and the cross-entropy of the corrected ones, each of which weighs eight times a retained one. Where it is
    not known what is predicted, it is their losses, each example with the same weight: what retraining would minimise.
    Less a slope it would have no minimum in a model that is not convex.
    """

    CLASS = "class"
    EXAMPLES = "examples"
    LABELS = "labels"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Point:
    """What a model is at a point of the way, measured on training-side data.

    The retained examples are others than those that the solves have seen, where there are enough of them.

    Attributes:
        steps: How much of each solved change is made, in the order of the solves: multiples, 1 is the natural step.
        forget_loss: Mean loss of (a sample of) the examples to be forgotten, with their old labels.
        retain_loss: Mean loss of (a sample of) the retained training data.
        risk: What should become small, see :class:`Goal`.
        remembered: For a class, the share of its examples that are still predicted as it. For labels, the share of the
            corrected examples that are not predicted as they should be. For single examples, how well a threshold on
            the loss tells them from unseen ones of the same class (AUROC, 0.5: not at all).
            NaN where it is not known.
    """

    steps: tuple[float, ...]
    forget_loss: float
    retain_loss: float
    risk: float
    remembered: float

    @property
    def step(self) -> float:
        """The multiple of the first change."""
        return self.steps[0] if self.steps else 0.0

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """The step size of each change."""
        return self.steps

    @property
    def memorization(self) -> float:
        """How much of the forget data is remembered."""
        return self.remembered

    @property
    def moved(self) -> bool:
        """Whether anything is changed here."""
        return any(self.steps)


class LocalModel(NamedTuple):
    """The risk along a solved change: ``risk(s) − risk(0) ≈ slope·s + bend·s²/2``, bent as what was solved with is."""

    slope: float
    bend: float

    def change(self, step: float) -> float:
        """By how much the risk should change."""
        return self.slope * step + self.bend * step**2 / 2


class Walk(Protocol):
    """The way from the trained weights to the edited ones, as a strategy sees it.

    Attributes:
        goal: What the edit is for.
        enough: The largest :attr:`Point.remembered` that counts as forgotten, or as corrected; ``None`` where nothing
            tells.
        affordable: The largest retained loss that forgetting may cost: for single examples a tenth of the way to that
            of unseen ones; where there are none, a tenth more than before, or ``m/(n−m)`` if that is more.
        path: All points that were measured, in order. The first is the trained model.
    """

    goal: Goal
    enough: float | None
    affordable: float
    path: list[Point]

    def answer(self) -> LocalModel:
        """Solves for the change of the theory: what answers the removal or relabelling at the trained weights.

        Its local model bends as the retained loss does: all other parts of the risk are in its slope alone.
        """

    def descend(self, at: Point) -> LocalModel:
        """Solves, at the weights of a point, for what lowers the risk.

        The first change, and others while most of a class or a quarter of the wrong labels is remembered, is by the
        method of the edit: least squares hold whatever the curvature is so far from where the risk is least. There the
        second and later ones take the curvature of a bound for a class, and all are damped where the labels of a
        classifier are corrected, the more so the more changes behind ``at`` nothing came of. All others are damped
        Newton steps on the targets.
        """

    def measure(self, *steps: float) -> Point:
        """The point that so much of each change leads to that was solved for, in the order of the solves.

        Raises:
            ConfigurationError: If these are more steps than changes were solved for.
        """
