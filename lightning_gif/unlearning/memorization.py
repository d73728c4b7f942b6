"""How much of the forget data a model still remembers, and the other numbers that make a trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.examples import Examples
from ..objective.objective import Objective
from .risk import OutputLoss, RiskTerm, labels_of
from .task import Task

__all__ = ["Measured", "MembershipAUROC", "Memorization", "PredictedShare", "count_wrong", "measure"]


@dataclass(frozen=True)
class PredictedShare:
    """The share of some examples whose predicted class fulfils a condition.

    Attributes:
        objective: An open objective of a classifier.
        examples: The examples.
        count: From logits ``(B, C)`` and the batch to the number of examples that fulfil it.
    """

    objective: Objective
    examples: Examples
    count: Callable[[Tensor, Batch], Tensor]

    def at(self, theta: Tensor) -> float:
        """The share at parameters ``(p,)``."""
        return self.objective.mean(self.examples, OutputLoss(self.objective.logits, self.count).loss_sum, theta)


def count_as(classes: Tensor) -> Callable[[Tensor, Batch], Tensor]:
    """Counts the examples that are predicted as one of some classes, a mask ``(C,)``."""

    def count(logits: Tensor, batch: Batch) -> Tensor:
        return classes[logits.argmax(1)].double().sum()

    return count


def count_wrong(logits: Tensor, batch: Batch) -> Tensor:
    """The number of examples of a batch that are not predicted as their label."""
    return (logits.argmax(1) != labels_of(batch)).double().sum()


@dataclass(frozen=True)
class MembershipAUROC:
    """How well a threshold on the loss separates forget examples from unseen ones of the same class; 0.5: not at all.

    The mean over the forget examples, each compared with the unseen ones of its class; ties count half. NaN if no
    unseen example has the class of a forget one.

    Attributes:
        objective: An open objective.
        forget: The forget examples that are compared.
        unseen: The unseen examples.
    """

    objective: Objective
    forget: Examples
    unseen: Examples

    def at(self, theta: Tensor) -> float:
        """The AUROC at parameters ``(p,)``."""
        return self.of_losses(self.objective.all_losses(self.forget, theta).double(), theta)

    def of_losses(self, losses: Tensor, theta: Tensor) -> float:
        """The same for known losses ``(m,)`` of the forget examples."""
        strata = self.forget.class_or_zero, self.unseen.class_or_zero
        unseen = self.objective.all_losses(self.unseen, theta).double().cpu()
        wins, compared = 0.0, 0
        for label in strata[1].unique():
            own, others = (part[of == label] for part, of in zip((losses.cpu(), unseen), strata, strict=True))
            if len(own):
                others = others.sort().values
                above = len(others) - torch.searchsorted(others, own, right=True)
                equal = torch.searchsorted(others, own, right=True) - torch.searchsorted(others, own)
                wins += float((above + equal / 2).double().sum()) / len(others)
                compared += len(own)
        return wins / compared if compared else math.nan


Memorization = PredictedShare | MembershipAUROC | None
"""How a goal measures memorization; ``None`` where it cannot be known."""


class Measured(NamedTuple):
    """What one look at a model gives.

    Attributes:
        forget_loss: Mean loss of the forget examples.
        retain_loss: Mean loss of the retained examples.
        terms: The mean of each risk term.
        memorization: See :class:`~lightning_gif.unlearning.protocol.Trial`.
    """

    forget_loss: float
    retain_loss: float
    terms: list[float]
    memorization: float


def measure(task: Task, terms: list[RiskTerm], memorization: Memorization, theta: Tensor) -> Measured:
    """Measures the model at parameters ``(p,)``.

    If all of them are functions of the logits, they come from one pass over each set of examples.
    """
    objective = task.objective
    of_logits = all(isinstance(term.losses, OutputLoss) and term.losses.outputs == objective.logits for term in terms)
    if of_logits and isinstance(memorization, PredictedShare):
        return _measure_at_once(task, terms, memorization, theta)
    losses = objective.all_losses(task.forget_eval, theta).double()
    retain = objective.mean_loss(task.retain_eval, theta)
    parts = []
    for term in terms:
        same = term.eval is task.retain_eval and term.losses is objective  # as has just been measured
        parts.append(retain if same else objective.mean(term.eval, term.losses.loss_sum, theta))
    if isinstance(memorization, MembershipAUROC):
        memorized = memorization.of_losses(losses, theta)
    else:
        memorized = math.nan if memorization is None else memorization.at(theta)
    return Measured(float(losses.mean()), retain, parts, memorized)


def _measure_at_once(task: Task, terms: list[RiskTerm], memorization: PredictedShare, theta: Tensor) -> Measured:
    objective, retained = task.objective, terms[0].eval
    wanted: list[tuple[Examples, Callable[[Tensor, Batch], Tensor] | None]] = [
        (task.forget_eval, None),
        (retained, None),
    ]
    wanted += [(term.eval, term.losses.function) for term in terms if isinstance(term.losses, OutputLoss)]
    wanted.append((memorization.examples, memorization.count))
    sums = [0.0] * len(wanted)
    with torch.no_grad():
        for examples in {id(part): part for part, _ in wanted}.values():
            for batch in examples.local_batches():
                loss, logits = objective.loss_and_logits(theta, batch)
                for position, (part, function) in enumerate(wanted):
                    if part is examples:
                        value = loss if function is None else function(logits, batch)
                        sums[position] += float(value) / len(part)
    sums = objective.processes.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
    return Measured(sums[0], sums[1], sums[2:-1], sums[-1])
