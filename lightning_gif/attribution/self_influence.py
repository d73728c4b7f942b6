"""Each training example scored for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.by_solver import inverse_for_self_influence
from ..curvature.methods import METHODS
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..parameters import Targets
from ..reporting.context import CallContext
from .influence import require_finite_scores, warn_without_gradients
from .report import InfluenceReport

__all__ = ["self_influence"]


def self_influence(
    objective: Objective,
    train: Examples,
    settings: Settings,
    choose_targets: Callable[[], Targets],
    *,
    among: Examples | None = None,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    k: int = 10,
    context: CallContext | None = None,
) -> InfluenceReport:
    """Scores each training example for itself: what removing it would do to its own loss.

    The score is ``(1/(n−1)) · gᵢᵀ(C + λ)⁻¹gᵢ`` with ``gᵢ = ∇ℓ(zᵢ)``, on the target parameters if there are some. It is
    large for memorized examples, such as wrong labels (Koh and Liang, ICML 2017, section 5.4; Feldman and Zhang,
    NeurIPS 2020). With up to 1024 parameters the scores are exact: the matrix ``C`` is formed. With more, a low-rank
    sketch takes its place (:func:`~lightning_gif.solvers.low_rank`). Directions that the sketch misses count with the
    damping alone, so that scores are overestimated, by the less the smaller the curvature there is beside the damping.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        settings: Curvature, damping and their parameters; ``max_iter`` is the rank of the sketch.
        choose_targets: Called for the target parameters, unless scores are over all parameters.
        among: The training examples to score; by default all.
        states: Earlier states of the module by epoch. Scores are the mean over these and the present weights; each
            state has its own curvature and damping.
        k: How many proponents and opponents the report shows.
        context: What the report knows of the trainer.

    Raises:
        NonFiniteError: If a loss, gradient or product is not finite.
        ConfigurationError: For another method than ``"if"`` and ``"fif"``; with a sketch, for a curvature with negative
            eigenvalues or without damping.
    """
    start = time.perf_counter()
    if settings.method not in ("if", "fif"):
        raise ConfigurationError(
            f"Self-influence takes method='if', on all parameters, or 'fif', on the targets, got {settings.method!r}."
            " Pass one of them to the call: trainer.self_influence(method='if')."
        )
    targets = METHODS[settings.method].targets(objective.space, choose_targets)
    scored = train if among is None else among
    model_states = [objective.model_state(), *map(objective.model_state, (states or {}).values())]
    scores, any_gradient = torch.zeros(1, len(scored), dtype=torch.float64), 0.0
    summaries = list[tuple[dict[str, Any], float]]()  # and the damping, of each state
    for state in model_states:
        with objective.at_state(state):
            quadratic, curvature, damping = _fit(objective, train, settings, targets)
            summaries.append((curvature, damping))
            values, gradients = _scores(objective, scored, settings.weight_decay, quadratic)
        scores += values / len(model_states) / max(len(train) - 1, 1)
        any_gradient += gradients
    warn_without_gradients(objective.processes.total(any_gradient))
    require_finite_scores(scores, scored.ids)
    curvature, damping = summaries[0]  # with the present weights
    return InfluenceReport(
        scores=scores,
        indices=scored.ids,
        n_train=len(scored),
        solutions=[],
        curvature=curvature,
        targets=targets,
        k=k,
        dataset=train.dataset,
        queries=[],
        settings={**asdict(replace(settings, damping=damping)), "snapshots": list(states or {})},
        seconds=time.perf_counter() - start,
        context=context or CallContext(),
    )


def _fit(
    objective: Objective, train: Examples, settings: Settings, targets: Targets
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], float]:
    """The quadratic form of the inverse curvature at the present weights, how it was computed, and its damping."""
    positions = targets.flat(objective.space).to(objective.device)
    method = METHODS[settings.method]
    with objective.progress("Hessian products") as bar:
        inverse_class = inverse_for_self_influence(settings, len(positions))
        inverse = inverse_class.fit(objective, train, settings, method, positions, on_product=bar.update)
        quadratic = inverse.quadratic()
        return quadratic, {**inverse.summary(), "inverse": inverse.kind}, inverse.damping


def _scores(
    objective: Objective, scored: Examples, weight_decay: float, quadratic: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The quadratic form of each example's gradient ``(n,)``, and how many blocks of these had one that is not zero.

    Weight decay does not become less if one example is removed, so that each example's loss carries its share.
    """
    values, any_gradient = [], 0.0
    with objective.progress("Scoring training examples", len(scored)) as bar:
        for batch in scored.local_batches():
            for gradients in objective.gradients(batch):
                any_gradient += float(gradients.any())
                values.append(quadratic(gradients + weight_decay * objective.theta).cpu())
            bar.update(batch.size * objective.processes.size)
    return scored.all_gather(values).double(), any_gradient
