"""What an edit did to single examples: their losses and predicted classes before and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.examples import Examples
from ..metrics.order import twice_in_order
from ..objective.labels import predicted_labels
from ..objective.objective import Objective

__all__ = ["Outcome", "PairedChange", "auroc_change", "outcomes_at", "wilson_interval"]


# The half width of a 95 % interval in standard errors.
_NORMAL_95 = 1.96


@dataclass(frozen=True, eq=False)
class Outcome:
    """The losses and predicted classes of some examples before and after an edit.

    Attributes:
        labels: The label of each example, ``(n,)``; ``None`` if the targets are not labels.
        before: The losses before the edit, ``(n,)`` in float64.
        after: The losses after the edit, ``(n,)`` in float64.
        predicted_before: The predicted classes before the edit, ``(n,)``; ``None`` if the model's predictions are not
            known.
        predicted_after: The predicted classes after the edit, ``(n,)``; ``None`` likewise.
    """

    labels: Tensor | None
    before: Tensor
    after: Tensor
    predicted_before: Tensor | None
    predicted_after: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Outcome:
        """The outcome from the untrusted result of :meth:`tensors`.

        Raises:
            KeyError, ValueError: If tensors are missing, or do not fit together.
        """
        before, after = tensors["before"], tensors["after"]
        whole = {name: tensors.get(name) for name in ("labels", "predicted_before", "predicted_after")}
        fits = before.dtype == after.dtype == torch.float64 and before.ndim == 1 and before.shape == after.shape
        for value in whole.values():
            fits = fits and (value is None or (value.dtype == torch.int64 and value.shape == before.shape))
        if not fits or not len(before) or not set(tensors) <= {"before", "after", *whole}:
            raise ValueError("the outcomes are not one loss, and one whole number for a class, of each example")
        return cls(whole["labels"], before, after, whole["predicted_before"], whole["predicted_after"])

    @property
    def change(self) -> PairedChange:
        """The change of the mean loss, with its standard error."""
        return PairedChange.of(self.after - self.before)


@dataclass(frozen=True)
class PairedChange:
    """The mean of a change that is known for each of some examples.

    Attributes:
        mean: The mean change.
        standard_error: The standard deviation of the changes, divided by the square root of their number; NaN for a
            single example.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, changes: Tensor) -> PairedChange:
        """The mean of changes ``(n,)``."""
        count = len(changes)
        error = float(changes.double().std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(changes.double().mean()), error)

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval; NaN for a single example."""
        return _NORMAL_95 * self.standard_error

    @property
    def is_noise(self) -> bool:
        """Whether the 95 % interval contains 0; false for a single example, for which it is not known."""
        return abs(self.mean) <= self.half_width


def outcomes_at(
    objective: Objective, parts: Mapping[str, Examples], theta: Tensor
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The losses and the predicted classes ``(n,)`` of examples at parameters ``(p,)``, by the name of the examples.

    Args:
        objective: An open objective.
        parts: The examples by name.
        theta: The parameters.
    """
    return {
        name: (objective.all_losses(part, theta).double().cpu(), predicted_labels(objective, part, theta))
        for name, part in parts.items()
    }


def wilson_interval(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``count`` of ``of`` examples were seen (Wilson, *JASA* 22, 1927)."""
    share, square = count / of, _NORMAL_95**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = _NORMAL_95 / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def auroc_change(forget: Outcome, unseen: Outcome) -> tuple[PairedChange, PairedChange, PairedChange]:
    """The membership AUROC less 0.5 before and after an edit, and its change, each with its standard error.

    The standard errors are those of DeLong et al. (*Biometrics* 44, 1988): the AUROC is a mean over the forget and over
    the unseen examples, and both vary. Each forget example is compared with the unseen examples of its label. The
    values are NaN if there are none.
    """
    shares = [_shares(forget, unseen, when) for when in ("before", "after")]
    return (
        _auroc(*(part - 0.5 for part in shares[0])),
        _auroc(*(part - 0.5 for part in shares[1])),
        _auroc(*(after - before for before, after in zip(*shares, strict=True))),
    )


def _shares(forget: Outcome, unseen: Outcome, when: str) -> tuple[Tensor, Tensor]:
    """The share of pairs that each forget, and each unseen, example wins: the unseen one has the larger loss."""
    own, others = getattr(forget, when), getattr(unseen, when)
    labels = [
        torch.zeros(len(part.before), dtype=torch.long) if part.labels is None else part.labels
        for part in (forget, unseen)
    ]
    wins, lost = [], []
    for label in labels[0].unique():
        mine, other = own[labels[0] == label], others[labels[1] == label]
        if len(other):
            wins += [twice_in_order(one[None], other) / (2 * len(other)) for one in mine]
            lost += [twice_in_order(mine, one[None]) / (2 * len(mine)) for one in other]
    nothing = torch.full((1,), math.nan, dtype=torch.float64)
    return (torch.stack(wins).double(), torch.stack(lost).double()) if wins else (nothing, nothing)


def _auroc(wins: Tensor, lost: Tensor) -> PairedChange:
    errors = [PairedChange.of(part).standard_error for part in (wins, lost)]
    return PairedChange(float(wins.mean()), math.hypot(*errors))
