"""The preconditioner: the scale of each entry in a solve of few iterations."""

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
    """The tuned numbers of the preconditioner: the scale of each entry in a solve.

    Attributes:
        groups: The number of groups of examples from which the gradient second moment is estimated.
        floor: Added to the gradient second moment, as a share of its mean over the target parameters.
        exponent: The scale of an entry has the factor ``(gradient second moment)^(−exponent)``. The preconditioner of
            Martens (ICML 2010) corresponds to 3/8.
    """

    groups: int = number(8, low=1, open_low=False)
    floor: float = number(1e-2)
    exponent: float = number(0.25, high=1.0)


def gradient_second_moment(
    objective: Objective, examples: Examples, losses: Losses, theta: Tensor, groups: int
) -> Tensor:
    """An estimate of the mean square of the gradients of single examples, by entry, ``(p,)``.

    The examples are assigned to a few groups. The estimate is the mean over groups of the squared mean gradient, times
    the size of the group. Its expectation is the gradient second moment if the gradients of examples are independent
    with mean zero; a non-zero mean increases it. It costs one pass over ``examples``.

    Args:
        objective: An open objective.
        examples: The examples, in memory.
        losses: The function whose gradients are taken.
        theta: Parameters ``(p,)``.
        groups: The number of groups. At most half as many groups as examples are used.
    """
    parts = examples.round_robin(min(groups, max(len(examples) // 2, 1)))
    total = torch.zeros_like(theta)
    for part in parts:
        total += len(part) * objective.gradient(part, theta, losses.loss_sum).square()
    return total / len(parts)


def preconditioner(
    objective: Objective, positions: Tensor, second_moment: Tensor | None, numbers: Preconditioner
) -> Tensor:
    """The scale ``d`` of each entry in a solve, ``(p,)``: the solver computes ``y``, and the change is ``x = d y``.

    The scale has two factors. The first is the root mean square of the parameter tensor that the entry belongs to,
    relative to that of all entries, and at least 1. A solve of few iterations changes entries with large gradients
    most. In networks with normalisation these are the smallest weights. The first factor compensates for this.

    The second factor is a power of the entry's gradient second moment, as in the preconditioner of Martens (ICML 2010),
    section 4.7.

    Args:
        objective: An open objective.
        positions: The target parameters ``(k,)``.
        second_moment: See :func:`gradient_second_moment`. If it is ``None`` or zero, the second factor is 1.
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
