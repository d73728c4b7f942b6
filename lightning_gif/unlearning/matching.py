"""Matching: changes the weights until the predictions on the forget examples are those that theory predicts.

A step in the direction of the influence has the right effect on predictions only near the trained weights. So its first
order effect on the predictions is what the edit aims at, and a short training reaches it, which also goes on with the
retained examples. This is the datamodel matching of Georgiev et al. (arXiv 2410.23232), with predictions from one
damped Gauss–Newton step instead of datamodels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..curvature.products import output_derivative
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import NonFiniteError
from ..objective.objective import Objective
from .budget import MemoryBudget
from .checked import CheckedNumbers, number
from .risk import OutputLoss

__all__ = ["Matching", "Outputs", "Rounds", "WithPredictions", "match", "predicted", "to_predicted"]


@dataclass(frozen=True)
class Matching(CheckedNumbers):
    """The tuned numbers of ``"match"``. benchmarks/README.md, "Single examples removed", has what they do.

    Attributes:
        curvature_examples: The number of retained examples that give the curvature, with ``curvature_examples="auto"``.
            If there are more forget examples, it is their number.
        preconditioner_examples: The number of these from which the EK-FAC preconditioner of the solve is fitted.
        iterations: The largest number of iterations of the solve, if neither ``max_iter`` nor ``rtol`` is given.
        evaluation: The largest number of examples of each kind that a trial is measured on.
        earlier_share: The weight of snapshots in the gradient of the leave-out step; 1 minus it is that of the trained
            model.
        unknown_damping: The damping if the training was not recorded and none is given, as a share of the largest
            eigenvalue of the curvature.
        prediction_tolerance: The first change is enough if the loss of the forget examples is as predicted, up to this
            share of the predicted change, and that of the retained examples up to this share of the loss.
        steps: The number of steps of gradient descent.
        relabel_steps: The number of steps for every ``2 * forgotten`` new labels, rounded up. The steps also repair
            what the old labels had spoiled.
        retained: The number of retained examples of each step.
        forgotten: The largest number of forget examples of each step.
        forget_weight: The weight of the forget examples in each step, if each step has all of them. It is multiplied by
            the number of steps that go through all of them, so that each example has the same influence.
        momentum: The momentum of the steps.
        rate: The largest rate of a step with momentum, as a multiple of the reciprocal of the largest eigenvalue. It
            falls to zero along a cosine.
        rate_examples: The number of retained examples from which this eigenvalue is estimated.
    """

    curvature_examples: int = number(600, low=1, open_low=False)
    preconditioner_examples: int = number(150, low=1, open_low=False)
    iterations: int = number(8, low=1, open_low=False)
    evaluation: int = number(300, low=2, open_low=False)
    earlier_share: float = number(0.3, high=1.0, open_low=False)
    unknown_damping: float = number(5e-4)
    prediction_tolerance: float = number(0.1, open_low=False)
    steps: int = number(20, low=0, open_low=False)
    relabel_steps: int = number(40, low=0, open_low=False)
    retained: int = number(64, low=1, open_low=False)
    forgotten: int = number(32, low=1, open_low=False)
    forget_weight: float = number(0.1, open_low=False)
    momentum: float = number(0.5, high=0.99, open_low=False)
    rate: float = number(2.0)
    rate_examples: int = number(256, low=1, open_low=False)

    def of(self, n_labels: int) -> Matching:
        """The numbers for some new labels, or for a removal, where there are 0 of them.

        More new labels get more steps, each with less weight, so that each label has the same influence. With few steps
        they would have so much weight that the rate is too small to repair the retained examples.
        """
        times = math.ceil(n_labels / (2 * self.forgotten))
        if not times:
            return self
        return replace(self, steps=times * self.relabel_steps, forget_weight=self.forget_weight / times)


@dataclass(frozen=True)
class WithPredictions(Batch):
    """A batch with the predictions that the edited model should make for it.

    Attributes:
        wanted: The predictions: logits ``(B, C)`` of a classifier, or ``(B, d)`` for other losses. If the batch cannot
            be divided, they have the shape that the loss has them in.
    """

    wanted: Tensor


Outputs = Callable[[Tensor, Batch], Tensor]
"""The predictions of a model, from parameters and a batch."""


def predicted(objective: Objective, outputs: Outputs, change: Tensor) -> Callable[[Batch], WithPredictions]:
    """A function that adds to a batch what its predictions would be after a small change: ``f(θ) + J(θ) v``.

    Args:
        objective: An open objective.
        outputs: The predictions ``f``.
        change: The change ``v`` of all parameters, ``(p,)``.
    """

    def with_predictions(batch: Batch) -> WithPredictions:
        at, derivative = output_derivative(outputs, objective.theta, batch, change)
        wanted = at + derivative
        # A batch that is divided needs one row for each example.
        by_row = batch.divisible and not wanted.numel() % batch.size
        wanted = wanted.reshape(batch.size, -1) if by_row else wanted
        return WithPredictions(batch.data, batch.ids, batch.size, wanted, divisible=batch.divisible)

    return with_predictions


def to_predicted(objective: Objective, outputs: Outputs, *, classifies: bool) -> OutputLoss:
    """The distance of the predictions for batches :class:`WithPredictions` to those that are wanted, as a loss.

    For logits it is the Huber loss, with a threshold of 1, as the mean over the classes. For other predictions it is
    :func:`_quadratic`, which is the loss itself for a squared error.
    """
    if classifies:
        return OutputLoss(outputs, _huber)

    def distance(out: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, WithPredictions)
        with torch.no_grad():
            trained = outputs(objective.theta, batch)
        return _quadratic(objective, batch, trained, out - batch.wanted.to(out).view_as(out))

    return OutputLoss(outputs, distance)


def _huber(logits: Tensor, batch: Batch) -> Tensor:
    assert isinstance(batch, WithPredictions)
    return F.huber_loss(logits, batch.wanted.to(logits), reduction="sum") / logits.shape[1]


def _quadratic(objective: Objective, batch: Batch, at: Tensor, difference: Tensor) -> Tensor:
    """``dᵀHd/2`` for a difference ``d`` of predictions, with the second derivative ``H`` of the loss at ``at``."""
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        loss = objective.loss_sum_at(objective.theta, batch)(point)
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        if not slope.requires_grad:  # the loss is linear in its predictions
            return 0.0 * difference.sum()
        # Its result is linear in the difference, and differentiable in it.
        (curved,) = torch.autograd.grad(slope, point, difference, create_graph=True, materialize_grads=True)
        return (curved * difference).sum() / 2


def match(
    objective: Objective,
    start: Tensor,
    positions: Tensor,
    forget: Rounds,
    retained: Rounds,
    scale: Tensor,
    largest: float,
    weight: float,
    numbers: Matching,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Gradient descent with momentum on the loss of retained examples and the distance of predictions to wanted ones.

    Args:
        objective: An open objective.
        start: The parameters at which it starts, ``(p,)``.
        positions: The parameters that it may change, ``(k,)``.
        forget: The forget examples, and the distance of their predictions to those that are wanted.
        retained: Retained examples, and their loss.
        scale: A factor for the gradient of each entry, ``(k,)``: the reciprocal of the damping.
        largest: The largest eigenvalue of the curvature of what is minimised, in coordinates that are divided by the
            root of ``scale``.
        weight: The weight of the forget examples in each step.
        numbers: The numbers of steps, and their rate.
        on_step: Called after each step.

    Returns:
        The parameters ``(p,)`` at the end.
    """
    theta, moving = start.clone(), torch.zeros_like(scale)
    for step in range(numbers.steps):
        try:
            gradient = retained.gradient(objective, theta)[positions]
            if weight:
                gradient = gradient + weight * forget.gradient(objective, theta)[positions]
        except NonFiniteError:  # it diverges, which the measurement of the result shows
            break
        moving = numbers.momentum * moving + scale * gradient
        rate = numbers.rate * (1 - numbers.momentum) / largest * (1 + math.cos(math.pi * step / numbers.steps)) / 2
        theta[positions] -= rate * moving
        on_step()
    return theta


class Rounds:
    """Examples that are used in turn, a few at a time, and again from the start after the last ones.

    Args:
        examples: The examples.
        count: The largest number of examples at a time.
        loss_sum: The function whose gradient is taken, as its sum over a batch.
        budget: The memory for their batches.
        seed: The seed of their order.
        transform: Applied to each batch.
    """

    def __init__(
        self,
        examples: Examples,
        count: int,
        loss_sum: Callable[[Tensor, Batch], Tensor],
        budget: MemoryBudget,
        seed: int,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        n = len(examples)
        # Parts of nearly equal size: a last part of one example would count as much as the others.
        parts = max(1, -(-n // count)) if examples.divisible or examples.dataset is not None else 1
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self._positions = order.tensor_split(parts)
        self._examples, self._loss_sum, self._budget, self._transform = examples, loss_sum, budget, transform
        self._parts: dict[int, Examples] = {}
        self._turn = 0

    def __len__(self) -> int:
        """The number of turns after which all examples have been used."""
        return len(self._positions)

    def gradient(self, objective: Objective, theta: Tensor) -> Tensor:
        """The gradient ``(p,)`` of the mean over the next examples, at parameters ``(p,)``."""
        turn = self._turn % len(self._positions)
        self._turn += 1
        if turn not in self._parts:
            whole = len(self._positions) == 1
            part = self._examples if whole else self._examples.subset(self._positions[turn].sort().values)
            part = part if self._transform is None else part.map(self._transform)
            self._parts[turn] = self._budget.hold(part)
        return objective.gradient(self._parts[turn], theta, self._loss_sum)
