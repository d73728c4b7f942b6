"""The terms of a risk, and the losses in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..curvature.products import Losses
from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.objective import Objective

__all__ = [
    "OutputLoss",
    "QuantileMatchingLoss",
    "RiskTerm",
    "Unlikelihood",
    "UnlikelihoodBound",
    "WithTeacher",
    "bound_curvature",
    "cross_entropy",
    "divergence",
    "labels_of",
    "log_odds",
    "teacher",
    "teacher_loss",
]


@dataclass(frozen=True)
class OutputLoss:
    """A loss as a function of the model's outputs, see :class:`~lightning_gif.curvature.products.Losses`.

    Attributes:
        outputs: From parameters and a batch to the outputs: logits ``(B, C)``, or losses ``(B,)``.
        function: From the outputs and the batch to the sum over its examples.
    """

    outputs: Callable[[Tensor, Batch], Tensor]
    function: Callable[[Tensor, Batch], Tensor]

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        return self.function(self.outputs(theta, batch), batch)

    def loss_sum_at(self, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda outputs: self.function(outputs, batch)


@dataclass(frozen=True)
class WithTeacher(Batch):
    """A batch with the probabilities that the edited model should predict for it.

    Attributes:
        expected: The expected probabilities ``(B, C)``.
    """

    expected: Tensor


@dataclass(frozen=True)
class QuantileMatchingLoss:
    """The squared distance ``(t − ℓ)²/(2σ)`` of a loss ``ℓ`` to its target loss ``t``.

    The target loss of a forget example is a quantile of the losses of the unseen examples of its class. The level of
    the quantile is the rank of the example's own loss among the forget examples of that class. All losses here are at
    the trained weights. So the targets have the distribution of the unseen losses, in the order of the forget losses.

    Attributes:
        objective: An open objective at the trained weights.
        groups: The sorted losses of the forget and of the unseen examples at the trained weights, by class.
        scale: ``σ``, in the unit of the loss.
    """

    objective: Objective
    groups: dict[int, tuple[Tensor, Tensor]]
    scale: float = 1.0

    def targets(self, losses: Tensor, classes: Tensor) -> Tensor:
        """The target losses ``(B,)``. For classes that are not in ``groups`` they equal the losses.

        Args:
            losses: The losses ``(B,)`` at the trained weights.
            classes: The labels ``(B,)``.
        """
        targets = losses.clone()
        for label, (forget, unseen) in self.groups.items():
            here = classes == label
            own = losses[here]
            targets[here] = torch.quantile(unseen, _rank(own, forget))
        return targets

    def sum(self, losses: Tensor, batch: Batch) -> Tensor:
        """The sum of ``(t − ℓ)²/(2σ)`` over a batch with losses ``ℓ`` ``(B,)``."""
        with torch.no_grad():
            trained = self.objective.losses(self.objective.theta, batch)
            classes = batch.classes
            targets = self.targets(trained, torch.zeros_like(trained, dtype=torch.long) if classes is None else classes)
        return (targets - losses).square().sum() / (2 * self.scale)


def _rank(values: Tensor, among: Tensor) -> Tensor:
    """The rank of ``values`` in ``among`` ``(m,)``, which is sorted, as a number from 0 to 1.

    Equal values get the middle of their ranks. Between values the rank is interpolated linearly: a loss that is
    computed again in another batch can differ by rounding, and then has nearly the same rank.
    """
    levels, counts = among.unique_consecutive(return_counts=True)
    heights = (counts.cumsum(0) - counts / 2).to(values) / len(among)
    if len(levels) == 1:
        return heights.expand(len(values))
    above = torch.searchsorted(levels, values).clamp(1, len(levels) - 1)
    fraction = (values - levels[above - 1]) / (levels[above] - levels[above - 1])
    return torch.lerp(heights[above - 1], heights[above], fraction.clamp(0, 1))


@dataclass(frozen=True)
class RiskTerm:
    """A part of the risk: the mean of a function of examples, less its baseline gradient.

    Attributes:
        weight: Its weight in the risk.
        fit: The examples that solves see.
        eval: The examples that trials are measured on.
        n_curvature: How many of ``fit`` give the curvature, near the end of an edit.
        losses: The function; the objective itself for the training loss.
        bound: A function that gives the curvature instead of ``losses`` while memorization is far from its target: that
            of a parabola above ``losses``. ``None`` if ``losses`` have a useful curvature everywhere.
        baseline_fit: The gradient ``(p,)`` that is subtracted from the gradient over ``fit``.
        baseline_eval: The gradient ``(p,)`` that is subtracted from the gradient over ``eval``.
    """

    weight: float
    fit: Examples
    eval: Examples
    n_curvature: int
    losses: Losses
    bound: Losses | None = None
    baseline_fit: Tensor | None = None
    baseline_eval: Tensor | None = None

    def fit_gradient(self, objective: Objective, theta: Tensor) -> Tensor:
        """The gradient over ``fit`` at parameters ``(p,)``, less the baseline, without the weight."""
        gradient = objective.gradient(self.fit, theta, self.losses.loss_sum)
        return gradient if self.baseline_fit is None else gradient - self.baseline_fit

    def eval_gradient(self, objective: Objective) -> Tensor:
        """The gradient over ``eval`` at the trained weights, less the baseline, without the weight."""
        gradient = objective.gradient(self.eval, loss_sum=self.losses.loss_sum)
        return gradient if self.baseline_eval is None else gradient - self.baseline_eval


def labels_of(batch: Batch) -> Tensor:
    """The labels ``(B,)`` of a batch of a classifier."""
    labels = batch.classes
    assert labels is not None  # a model counts as a classifier only if its batches have labels
    return labels


def teacher(objective: Objective, forgotten_classes: Tensor) -> Callable[[Batch], WithTeacher]:
    """A function that adds the expected probabilities to a batch.

    These are the probabilities of the trained model given that the class is none of the forgotten ones (Bayes' rule).
    This is linear filtration (Baumhauer, Schöttle and Zeppelzauer, *Machine Learning* 111, 2022).

    Args:
        objective: An open objective.
        forgotten_classes: A mask ``(C,)``.
    """

    def with_teacher(batch: Batch) -> WithTeacher:
        with torch.no_grad():
            trained = objective.logits(objective.theta, batch)
            expected = torch.where(forgotten_classes, -math.inf, trained).softmax(1)
            return WithTeacher(batch.data, batch.ids, batch.size, expected)

    return with_teacher


def teacher_loss(objective: Objective) -> OutputLoss:
    """:func:`divergence` as a loss of batches :class:`WithTeacher`."""
    return OutputLoss(objective.logits, divergence)


def divergence(logits: Tensor, batch: Batch) -> Tensor:
    """The sum of ``KL(expected ‖ predicted)`` over a batch :class:`WithTeacher`."""
    assert isinstance(batch, WithTeacher)  # the examples of this loss are mapped with ``teacher``
    log_predicted = logits.log_softmax(1).masked_fill(batch.expected == 0, 0.0)  # logits of a masked class are −∞
    return (torch.special.entr(batch.expected).neg() - batch.expected * log_predicted).sum()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The sum of ``−log p(label)`` over a batch, without any other terms of the training loss."""
    return F.cross_entropy(logits, labels_of(batch), reduction="sum")


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """The log-odds ``(B,)`` of the predicted probability of ``classes``, a mask ``(C,)``."""
    return logits[:, classes].logsumexp(1) - logits[:, ~classes].logsumexp(1)


@dataclass(frozen=True)
class Unlikelihood:
    """The sum of ``−log(1 − p)`` over a batch, where ``p`` is the predicted probability of some classes.

    Unlike a negated cross-entropy, it has a lower bound (Welleck et al., ICLR 2020).

    Attributes:
        classes: A mask ``(C,)``.
    """

    classes: Tensor

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.softplus(log_odds(logits, self.classes)).sum()


@dataclass(frozen=True)
class UnlikelihoodBound:
    """The quadratic part of the parabola of :func:`bound_curvature`, around the present log-odds.

    Attributes:
        classes: A mask ``(C,)``.
    """

    classes: Tensor

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        odds = log_odds(logits, self.classes)
        at = odds.detach()
        return (bound_curvature(at) / 2 * (odds - at).square()).sum()


def bound_curvature(log_odds: Tensor) -> Tensor:
    """The second derivative of the flattest parabola that touches ``−log(1 − p)`` and lies above it, elementwise.

    The parabola is a function of the log-odds ``z`` of ``p``. If it touches at ``z``, its second derivative is
    ``tanh(z/2)/(2z)`` (Jaakkola and Jordan, *Statistics and Computing* 10, 2000). If ``p`` is close to 1,
    ``−log(1 − p)`` is nearly linear in ``z``, so that its own curvature vanishes. The parabola still has curvature, and
    its minimum is near ``−|z|``.
    """
    size = log_odds.abs().clamp_min(1e-3)  # avoids 0/0; below, the result is 1/4 up to rounding
    return (size / 2).tanh() / (2 * size)
