"""The energy of a gradient, ``gᵀF⁻¹g``, by entry, and the share of it that target parameters hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import NonFiniteError, SelectionError
from ..objective.objective import Objective
from ..registry import Registry
from .ekfac import LEAST_DAMPING, EKFACInverse, kronecker_blocks, sum_of_squares
from .methods import METHODS
from .sampling import curvature_sample, sample_size

__all__ = ["ENERGIES", "GradientEnergy", "gradient_energies", "gradient_share"]

GradientEnergy = Callable[[Objective, Examples, Settings, Tensor], Tensor]
"""``(objective, training examples, settings, g (p,)) → F⁻¹g (p,)`` for a positive definite matrix ``F``."""

ENERGIES: Registry[GradientEnergy] = Registry("gradient energy")
"""All matrices ``F`` by name; a selector declares the name of the one that it ranks by."""


# The damping of a parameter tensor as a share of the mean of its diagonal.
RELATIVE_DAMPING = 0.3

# Options of solves, at the values that an inverse without solves takes.
_OF_SOLVES: dict[str, Any] = {"max_iter": None, "rtol": None, "discrepancy": 0.0, "eigenvalues": 0}


def gradient_energies(name: str, objective: Objective, train: Examples, settings: Settings, gradient: Tensor) -> Tensor:
    """The gradient energy of each entry, ``gⱼ(F⁻¹g)ⱼ``, ``(p,)``. The sum of all is ``gᵀF⁻¹g``.

    Args:
        name: The name of the matrix ``F`` in :data:`ENERGIES`.
        objective: An open objective.
        train: The training examples.
        settings: The settings. ``damping`` is for solves and is not used.
        gradient: The gradient ``g``, ``(p,)``.

    Raises:
        SelectionError: If the module has no such matrix.
        NonFiniteError: If an energy is not finite.
    """
    solved = ENERGIES[name](objective, train, settings, gradient)
    energies = gradient * solved
    if not torch.isfinite(energies).all():
        raise NonFiniteError(
            "The gradient energies of parameters are not finite: gradients are too large for float32 (try double=True),"
            " or those of all training examples are zero. Use another selector, such as 'highest_k_gradients'."
        )
    return energies


@ENERGIES.register("fisher_diagonal")
def by_fisher_diagonal(objective: Objective, train: Examples, settings: Settings, gradient: Tensor) -> Tensor:
    """Divides by the mean square of the gradients of single training examples, which is a diagonal Fisher matrix.

    The damping of each parameter tensor is 0.3 times the mean of its diagonal.
    """
    examples = curvature_sample(objective, train, sample_size(settings), settings.curvature_sampling, settings.seed)
    total = torch.zeros_like(gradient)
    with objective.progress.stage("Gradients of training examples", len(examples)) as update:
        for batch in examples.local_batches():
            _add_squares(objective, batch, total)
            update(batch.size * objective.processes.size)
    diagonal = objective.processes.sum(total) / len(examples)
    least = LEAST_DAMPING * float(diagonal.double().mean())
    for part in objective.space.unflatten(diagonal).values():
        part += RELATIVE_DAMPING * max(float(part.double().mean()), least) + settings.weight_decay
    return torch.where(gradient == 0, 0.0, gradient / diagonal)


def _add_squares(objective: Objective, batch: Batch, total: Tensor) -> None:
    """Adds the squares of the gradients of the losses of a batch to ``total`` ``(p,)``.

    The sum over examples is taken layer by layer if the module allows it. Then most gradients need not be formed.
    """
    layers, space = objective.layers, objective.space
    for part in [batch] if layers is None else layers.parts(batch):
        recorded = None if layers is None else layers.record_losses(part)
        if recorded is None or recorded.size != part.size:
            for rows in objective.gradients(part):
                total.add_(rows.square().sum(0))
            continue
        deltas, blocks = recorded.output_gradients(), kronecker_blocks((one.use for one in recorded.layers), space)
        for block in blocks:
            squares = sum_of_squares(block, recorded, deltas, space)
            block.write(squares[None], lambda name: space.of(name, total[None]))
        inside = {one.name for block in blocks for one in block.parts}
        for name, slot in space.slots.items():
            if name not in inside:
                space.of(name, total).add_(recorded.of_parameter(name, slot.size, deltas).square().sum(0))


@ENERGIES.register("ekfac")
def by_ekfac(objective: Objective, train: Examples, settings: Settings, gradient: Tensor) -> Tensor:
    """Multiplies by the inverse of :class:`~lightning_gif.curvature.ekfac.EKFACInverse` with its own damping.

    Raises:
        SelectionError: If the module does not use all its parameters in layers that are linear in them.
    """
    if objective.layers is None:
        raise SelectionError(
            "A selector with the energy of EK-FAC needs a module that uses all its parameters in layers that are linear"
            f" in them, for whole batches. {type(objective.module).__name__} does not; recurrent layers, for example,"
            " are not linear in theirs. Use selector='caps', which needs gradients only."
        )
    settings = replace(settings, solver=EKFACInverse.name, curvature="ggn", damping=None, **_OF_SOLVES)
    everything = torch.arange(objective.space.size, device=objective.device)
    inverse = EKFACInverse.fit(objective, train, settings, METHODS["if"], everything)
    return inverse.ihvp(gradient[None])[0][0]


def gradient_share(gradients: Tensor, positions: Tensor) -> float:
    """The share of the squared norm of gradients that target parameters hold, ``‖g[S]‖² / ‖g‖²``.

    Args:
        gradients: Gradients ``(q, p)``; the mean of their shares is returned. A gradient of zero has the share 0, if
            the targets are not all parameters.
        positions: The target parameters ``S``, ``(k,)``.
    """
    if len(positions) == gradients.shape[1]:
        return 1.0
    shares = []
    for gradient in gradients:
        gradient = gradient.double()
        total = float(gradient.square().sum())
        shares.append(float(gradient[positions].square().sum()) / total if total else 0.0)
    return sum(shares) / len(shares)
