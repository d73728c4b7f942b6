"""From a query batch to a score for every training example."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .curvature import METHODS
from .data import Examples
from .objective import Objective
from .parameters import Targets
from .reports.influence import InfluenceReport, first_items
from .sampling import curvature_sample
from .settings import Settings
from .solvers import LinearOperator
from .solvers.base import norms

__all__ = ["influence"]

# Queries that are solved together share the passes that are not kept, but each takes some vectors of the model's size.
_MOST_TOGETHER, _VECTORS = 16, 12

# Damping as a share of the typical curvature: see benchmarks/README.md.
_DAMPING = 3e-3


def influence(
    objective: Objective,
    train: Examples,
    query: Examples,
    settings: Settings,
    choose_targets: Callable[[], Targets],
    *,
    per_example: bool = False,
    k: int = 10,
) -> InfluenceReport:
    """Scores every training example for a query.

    The score of example ``i`` is ``(1/(n−1)) · qᵀ x(∇ℓ(zᵢ))``: what removing ``i`` would do to the query's mean
    measurement, to first order, where ``q`` is the query's gradient on the targets and ``x(g)`` the change of the
    targets that a method gives for a gradient ``g`` (GIF, arXiv 2312.05586, equation 6). ``x`` is linear in ``g``, so
    one solve for its adjoint gives ``w`` with ``wᵀ∇ℓ(zᵢ) = qᵀ x(∇ℓ(zᵢ))``, and one pass over the training set gives all
    of these inner products.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        query: The query's examples.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all of them.
        per_example: One query for each example instead of one for their mean.
        k: How many proponents and opponents the report shows.

    Raises:
        BatchError: If the query is not structured as training batches are.
        NonFiniteError: If a loss, gradient or product is not finite.
        ObjectiveError: If the query does not depend on the targets.
        ConfigurationError: For ``method="sif"``, which has no scores for single examples.
        ConvergenceError: See :meth:`~lightning_gif.settings.Settings.solve`.
    """
    start = time.perf_counter()
    objective.check(query, "query", measured=True)
    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    positions = targets.flat(objective.space).to(objective.device)
    examples = curvature_sample(
        objective, train, settings.curvature_examples, settings.curvature_sampling, settings.seed
    )
    examples = examples.held(settings.bytes_to_keep(objective.device))
    with objective.progress("Hessian products") as bar:
        curvature = settings.open_curvature(objective, examples, on_product=bar.update)
        if settings.damping is None:
            settings = replace(settings, damping=_DAMPING * _typical_curvature(objective, curvature, examples))
        gradients = objective.query_gradients(query, per_example=per_example)
        together = int(settings.bytes_to_keep(objective.device) // (_VECTORS * gradients[0].nbytes))
        together = min(max(together, 1), _MOST_TOGETHER)
        if settings.solver == "nystrom":  # whose sketch costs the same for all
            together = len(gradients)
        blocks = [method.query(curvature, positions, block, settings.solve) for block in gradients.split(together)]
        directions = torch.cat([found for found, _ in blocks])
        solutions = [solution for _, found in blocks for solution in found]
        description = settings.describe(curvature)
    del curvature, blocks  # and the passes that it kept

    scores = []
    with objective.progress("Scoring training examples", len(train)) as bar:
        for batch in train.batches():
            scores.append(objective.directional_derivatives(batch.data, directions).cpu())
            bar.update(batch.size)
    # Weight decay does not become less where one example is removed, so each example's loss carries its share.
    decay = settings.weight_decay * (directions @ objective.theta).double().cpu()
    return InfluenceReport(
        scores=(torch.cat(scores, dim=1).double() + decay[:, None]) / max(len(train) - 1, 1),
        indices=train.ids,
        solutions=solutions,
        curvature=description,
        targets=targets,
        k=k,
        dataset=train.dataset,
        queries=first_items(query),
        settings=asdict(settings),
        seconds=time.perf_counter() - start,
    )


def _typical_curvature(objective: Objective, curvature: LinearOperator, examples: Examples) -> float:
    """``‖C v‖/‖v‖`` for the gradient ``v`` of the losses of examples with random signs.

    Where gradients spread as the curvature does, as in a net that was trained by likelihood, it is near ``tr C²/tr C``:
    the mean of the eigenvalues, each with itself as the weight. It is in their unit, whatever the scale of the loss.
    """
    signs = (torch.randint(0, 2, (len(examples),), generator=torch.Generator().manual_seed(0)) * 2 - 1).split(
        [batch.size for batch in examples.batches()]
    )
    remaining = iter(signs)

    def signed(theta: Tensor, data: Any) -> Tensor:
        losses = objective.losses(theta, data)
        return (next(remaining).to(losses) * losses).sum()

    vector = objective.gradient(examples, loss_sum=signed)
    length = float(norms(vector))
    return float(norms(curvature.matvec(vector / length))) if length else 0.0
