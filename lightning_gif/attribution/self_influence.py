"""Each training example scored for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.inverse import damped_curvature
from ..curvature.methods import METHODS
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..parameters import Targets
from ..reporting.context import CallContext
from ..solvers.operators import Submatrix
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

    That is ``(1/(n−1)) · gᵢᵀ(C + λ)⁻¹gᵢ`` with ``gᵢ = ∇ℓ(zᵢ)``, on the targets where there are some: large for what the
    model knows by heart, such as wrong labels (Koh and Liang, ICML 2017, section 5.4; Feldman and Zhang, NeurIPS 2020).
    With up to 1024 parameters ``C`` is formed, and the scores are exact. With more, a sketch of ``C`` takes its place
    (:func:`~lightning_gif.solvers.low_rank`): directions that it misses count with the damping alone, which
    overestimates the scores, by the less the smaller the curvature there is beside the damping.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        settings: Curvature, damping and their parameters; with ``max_iter`` the rank of the sketch.
        choose_targets: Called for the target parameters, unless all are looked at.
        among: Those of the training examples that are scored; by default all.
        states: Earlier states of the module by epoch: scores are the mean of those with the present weights and with
            each of these, of which each has its own curvature and damping.
        k: How many of either end the report shows.
        context: What the report knows of the trainer.

    Raises:
        NonFiniteError: If a loss, gradient or product is not finite.
        ConfigurationError: For another method than ``"if"`` and ``"fif"``, or, of a sketch, for a curvature with
            negative eigenvalues or no damping.
    """
    start = time.perf_counter()
    if settings.method not in ("if", "fif"):
        raise ConfigurationError(
            f"Self-influence takes method='if', on all parameters, or 'fif', on the targets, got {settings.method!r}."
            " Pass one of them to the call: trainer.self_influence(method='if')."
        )
    targets = METHODS[settings.method].targets(objective.space, choose_targets)
    positions = targets.flat(objective.space).to(objective.device)
    scored = train if among is None else among
    moments = [objective.model_state(), *map(objective.model_state, (states or {}).values())]
    scores, told = torch.zeros(1, len(scored), dtype=torch.float64), list[tuple[dict[str, Any], float]]()
    nonzero = 0.0  # whether some training example has a gradient
    for moment in moments:
        with objective.at_state(moment):
            with objective.progress("Hessian products") as bar:
                curvature, damping = damped_curvature(
                    objective, train, settings, 0.0, bar.update
                )  # weight decay counts as damping
                solved_for = Submatrix(curvature, positions, positions)
                quadratic = settings.quadratic(solved_for, damping + settings.weight_decay)
                curvature.warn_if_zero()
                inverse = settings.quadratic_kind(len(positions))
                told.append(({**settings.describe(curvature), "inverse": inverse}, damping))
            found = []
            with objective.progress("Scoring training examples", len(scored)) as bar:
                for batch in scored.local_batches():
                    for rows in objective.gradients(batch.data):
                        nonzero += float(rows.any())
                        whole = rows + settings.weight_decay * objective.theta
                        found.append(quadratic(whole[:, positions]).cpu())
                    bar.update(batch.size * objective.processes.size)
            scores += scored.all_gather(found).double() / len(moments) / max(len(train) - 1, 1)
    warn_without_gradients(objective.processes.total(nonzero))
    require_finite_scores(scores, scored.ids)
    description, damping = told[0]  # with the present weights
    return InfluenceReport(
        scores=scores,
        indices=scored.ids,
        n_train=len(scored),
        solutions=[],
        curvature=description,
        targets=targets,
        k=k,
        dataset=train.dataset,
        queries=[],
        settings={**asdict(replace(settings, damping=damping)), "snapshots": list(states or {})},
        seconds=time.perf_counter() - start,
        context=context or CallContext(),
    )
