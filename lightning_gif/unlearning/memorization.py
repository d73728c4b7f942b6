"""The measurements of a trial: memorization, losses, and the terms of the risk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.examples import Examples
from ..metrics.order import twice_in_order
from ..objective.objective import Objective
from .risk import OutputLoss, RiskTerm, labels_of
from .task import Task

__all__ = ["Measured", "MembershipAUROC", "Memorization", "PredictedShare", "count_wrong", "measure"]


class Memorization(Protocol):
    """How a goal measures memorization. A subclass defines :meth:`at`; the others save passes over the examples."""

    def at(self, theta: Tensor) -> float:
        """The memorization at parameters ``(p,)``."""
        ...

    def of_losses(self, losses: Tensor, theta: Tensor) -> float:
        """The memorization at parameters ``(p,)``, given the losses ``(m,)`` of the forget examples there."""
        return self.at(theta)

    @property
    def counted(self) -> tuple[Examples, Callable[[Tensor, Batch], Tensor]] | None:
        """If memorization is a share of examples: these, and the function that counts them in logits of a batch."""
        return None


@dataclass(frozen=True)
class PredictedShare(Memorization):
    """The share of examples whose predicted class fulfils a condition.

    Attributes:
        objective: An open objective of a classifier.
        examples: The examples.
        count: From logits ``(B, C)`` and the batch to the number of examples that fulfil the condition.
    """

    objective: Objective
    examples: Examples
    count: Callable[[Tensor, Batch], Tensor]

    def at(self, theta: Tensor) -> float:
        """The share at parameters ``(p,)``."""
        return self.objective.mean(self.examples, OutputLoss(self.objective.logits, self.count).loss_sum, theta)

    @property
    def counted(self) -> tuple[Examples, Callable[[Tensor, Batch], Tensor]]:
        """The examples and the function."""
        return self.examples, self.count


def count_as(classes: Tensor) -> Callable[[Tensor, Batch], Tensor]:
    """A function that counts the examples that are predicted as one of ``classes``, a mask ``(C,)``."""

    def count(logits: Tensor, batch: Batch) -> Tensor:
        return classes[logits.argmax(1)].double().sum()

    return count


def count_wrong(logits: Tensor, batch: Batch) -> Tensor:
    """The number of examples of a batch that are not predicted as their label."""
    return (logits.argmax(1) != labels_of(batch)).double().sum()


@dataclass(frozen=True)
class MembershipAUROC(Memorization):
    """How well a threshold on the loss separates forget examples from unseen examples of the same class.

    Each forget example is compared with the unseen examples of its class. The AUROC is the mean share of unseen
    examples with a larger loss, where ties count half; 0.5 means that the losses do not separate the examples. Forget
    examples of a class without unseen examples are left out. NaN if none is left.

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
        """The AUROC at parameters ``(p,)``, given the losses ``(m,)`` of the forget examples there."""
        classes = self.forget.class_or_zero, self.unseen.class_or_zero
        unseen = self.objective.all_losses(self.unseen, theta).double().cpu()
        wins, compared = 0.0, 0
        for label in classes[1].unique():
            own, others = (part[of == label] for part, of in zip((losses.cpu(), unseen), classes, strict=True))
            if len(own):
                wins += float(twice_in_order(own, others)) / (2 * len(others))
                compared += len(own)
        return wins / compared if compared else math.nan


class Measured(NamedTuple):
    """The measurements of a model.

    Attributes:
        forget_loss: The mean loss of the forget examples.
        retain_loss: The mean loss of the retained examples.
        terms: The mean of each risk term.
        memorization: See :class:`~lightning_gif.unlearning.protocol.Trial`.
    """

    forget_loss: float
    retain_loss: float
    terms: list[float]
    memorization: float


def measure(task: Task, terms: list[RiskTerm], memorization: Memorization | None, theta: Tensor) -> Measured:
    """Measures the model at parameters ``(p,)``.

    If all measurements are functions of the logits, one pass over each set of examples gives all of them.

    Args:
        task: The data of the edit.
        terms: The terms of the risk.
        memorization: The measurement of memorization; ``None`` if it is not known.
        theta: The parameters.
    """
    objective = task.objective
    of_logits = all(isinstance(term.losses, OutputLoss) and term.losses.outputs == objective.logits for term in terms)
    counted = None if memorization is None else memorization.counted
    if of_logits and counted is not None:
        return _measure_at_once(task, terms, counted, theta)
    losses = objective.all_losses(task.forget_eval, theta).double()
    retain = objective.mean_loss(task.retain_eval, theta)
    parts = []
    for term in terms:
        same = term.eval is task.retain_eval and term.losses is objective  # then the term is ``retain``
        parts.append(retain if same else objective.mean(term.eval, term.losses.loss_sum, theta))
    memorized = math.nan if memorization is None else memorization.of_losses(losses, theta)
    return Measured(float(losses.mean()), retain, parts, memorized)


def _measure_at_once(
    task: Task, terms: list[RiskTerm], counted: tuple[Examples, Callable[[Tensor, Batch], Tensor]], theta: Tensor
) -> Measured:
    objective, retained = task.objective, terms[0].eval if terms else task.retain_eval
    wanted: list[tuple[Examples, Callable[[Tensor, Batch], Tensor] | None]] = [
        (task.forget_eval, None),
        (retained, None),
    ]
    wanted += [(term.eval, term.losses.function) for term in terms if isinstance(term.losses, OutputLoss)]
    wanted.append(counted)
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
