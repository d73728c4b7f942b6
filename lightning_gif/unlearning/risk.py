"""The risk that an edit should lower, term by term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.products import Losses
from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.objective import Objective


@dataclass(frozen=True)
class OutputLoss:
    """A function of what a model gives for each example, as :class:`~lightning_gif.curvature.products.Losses`.

    Attributes:
        outputs: From parameters and a batch to that: the objective's logits ``(B, C)``, or its losses ``(B,)``.
        function: From that and the batch to the sum over its examples.
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
        expected: ``(B, C)``.
    """

    expected: Tensor


@dataclass(frozen=True)
class QuantileMatchingLoss:
    """``(t − ℓ)²/(2σ)`` of a loss.

    ``t`` is the loss that an example should have: that of the unseen one of its class whose rank there is its own among
    the forgotten ones, with the trained weights (the transport of one distribution to the other that keeps the order).

    Attributes:
        objective: Whose losses.
        groups: By class, the losses of the forgotten examples and of the unseen ones with the trained weights, sorted.
        size: ``σ``.
    """

    objective: Objective
    groups: dict[int, tuple[Tensor, Tensor]]
    size: float = 1.0

    def wanted(self, losses: Tensor, classes: Tensor) -> Tensor:
        """``t`` ``(B,)`` for losses ``(B,)`` with the trained weights; these themselves where nothing is to compare."""
        found = losses.clone()
        for label, (forgotten, unseen) in self.groups.items():
            here = classes == label
            mine = losses[here]
            found[here] = torch.quantile(unseen, _rank(mine, forgotten))
        return found

    def sum(self, losses: Tensor, batch: Batch) -> Tensor:
        """Over a batch, whose losses ``(B,)`` are now these."""
        with torch.no_grad():
            trained = self.objective.losses(self.objective.theta, batch)
            classes = batch.classes
            wanted = self.wanted(trained, torch.zeros_like(trained, dtype=torch.long) if classes is None else classes)
        return (wanted - losses).square().sum() / (2 * self.size)


def _rank(values: Tensor, among: Tensor) -> Tensor:
    """Where ``values`` stand among others ``(m,)``, sorted, from 0 to 1: of equal ones in the middle.

    In between it is linear: what is computed anew in other batches may differ by rounding, and still stand there.
    """
    levels, counts = among.unique_consecutive(return_counts=True)
    heights = (counts.cumsum(0) - counts / 2).to(values) / len(among)
    if len(levels) == 1:
        return heights.expand(len(values))
    above = torch.searchsorted(levels, values).clamp(1, len(levels) - 1)
    way = (values - levels[above - 1]) / (levels[above] - levels[above - 1])
    return torch.lerp(heights[above - 1], heights[above], way.clamp(0, 1))


@dataclass(frozen=True)
class RiskTerm:
    """A part of the risk: the mean of a function of examples, less a slope in it that no edit should answer.

    Attributes:
        weight: In the risk.
        seen: The examples that solves see.
        measured: The examples that steps are measured on.
        curved: How many of those seen give the curvature, near the end of the walk.
        losses: The function; the training loss where it is the objective itself.
        bound: What has the curvature of a parabola above the function, for where that of its own leads nowhere.
        left_seen: The slope ``(p,)`` that is subtracted, over those seen.
        left_measured: The same over those measured.
    """

    weight: float
    seen: Examples
    measured: Examples
    curved: int
    losses: Losses
    bound: Losses | None = None
    left_seen: Tensor | None = None
    left_measured: Tensor | None = None


def labels_of(batch: Batch) -> Tensor:
    """The classes ``(B,)`` of a batch of a model that predicts some."""
    labels = batch.classes
    assert labels is not None  # else it would not be known what is predicted
    return labels


def bound_curvature(log_odds: Tensor) -> Tensor:
    """The second derivative of the flattest parabola that touches ``−log(1 − p)`` and lies above it, elementwise.

    With ``z`` the log-odds of ``p`` where it touches, it is ``tanh(z/2)/(2z)`` (Jaakkola and Jordan, *Statistics and
    Computing* 10, 2000). Where ``p`` is close to one the function is a straight line in ``z`` and its own curvature
    vanishes; the parabola has its minimum near ``−|z|``.
    """
    size = log_odds.abs().clamp_min(1e-3)  # where it is 1/4, up to rounding
    return (size / 2).tanh() / (2 * size)
