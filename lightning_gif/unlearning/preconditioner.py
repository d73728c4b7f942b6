"""The scale of each parameter in a solve of few iterations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.products import Losses
from ..data.examples import Examples
from ..objective.objective import Objective
from .checked import CheckedNumbers, number

__all__ = ["Preconditioner", "gradient_second_moment", "preconditioner"]


@dataclass(frozen=True)
class Preconditioner(CheckedNumbers):
    """The numbers of :func:`preconditioner`.

    Attributes:
        groups: Groups of examples that estimate the gradient second moment.
        floor: Added to the gradient second moment, as a share of its mean over the target parameters.
        exponent: Minus the power of the gradient second moment in the scale of an entry. Martens (ICML 2010) scales the
            curvature by the power 3/4 of the sum of squared gradients, which is 3/8 here.
    """

    groups: int = number(8, low=1, open_low=False)
    floor: float = number(1e-2)
    exponent: float = number(0.25, high=1.0)


def gradient_second_moment(
    objective: Objective, examples: Examples, losses: Losses, theta: Tensor, groups: int
) -> Tensor:
    """An estimate of the mean square of the gradients of single examples, by entry, ``(p,)``.

    The mean square of the mean gradients of a few groups, times the size of a group: its expectation is the second
    moment if the gradients of examples are independent with a small mean. The mean itself counts for more. It costs one
    pass over ``examples``.

    Args:
        objective: An open objective.
        examples: The examples, in memory.
        losses: The function whose gradients are meant.
        theta: Parameters ``(p,)``.
        groups: How many groups, at most half as many as there are examples.
    """
    parts = examples.round_robin(min(groups, max(len(examples) // 2, 1)))
    total = torch.zeros_like(theta)
    for part in parts:
        total += len(part) * objective.gradient(part, theta, losses.loss_sum).square()
    return total / len(parts)


def preconditioner(
    objective: Objective, positions: Tensor, second_moment: Tensor | None, numbers: Preconditioner
) -> Tensor:
    """The scale of each entry in a solve, ``(p,)``: the solve is for ``y`` in ``x = d y``.

    The first factor is the root mean square of the parameter that the entry belongs to, relative to that of all
    entries, and at least 1. A solve of few iterations changes most what has the largest gradients, which in networks
    with normalisation are the smallest weights; with this factor it is relative changes that count.

    The second factor is a power of the entry's gradient second moment, as in the preconditioner of Martens (ICML 2010),
    section 4.7.

    Args:
        objective: An open objective.
        positions: The target parameters ``(k,)``.
        second_moment: See :func:`gradient_second_moment`; ``None`` or zero leaves the second factor out.
        numbers: The floor and the exponent.
    """
    theta = objective.theta
    whole = theta.square().mean().sqrt()
    parts = objective.space.unflatten(theta).values()
    sizes = torch.cat([part.square().mean().sqrt().expand(part.numel()) for part in parts])
    relative = (sizes / whole).clamp_min(1.0) if whole > 0 else torch.ones_like(theta)
    if second_moment is None or not (mean := second_moment[positions].mean()) > 0:
        return relative
    scale = (second_moment / mean + numbers.floor).pow(-numbers.exponent)
    return relative * scale / scale[positions].square().mean().sqrt()
