"""Self-influence: the score of each training example for its own loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.by_solver import inverse_for_self_influence
from ..curvature.energy import gradient_share
from ..curvature.inverse import InverseCurvature
from ..curvature.methods import METHODS
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..parameters import Targets
from ..reporting.context import CallContext
from .influence import PRODUCTS, SCORES, SolveStage, require_finite_scores, warn_without_gradients
from .report import InfluenceReport
from .uncertainty import Spread, agreement_of

__all__ = ["self_influence"]


class _Fitted(NamedTuple):
    """The inverse of the curvature at a state of the model, and its quadratic form."""

    inverse: InverseCurvature
    quadratic: Callable[[Tensor], Tensor]

    def summary(self) -> dict[str, Any]:
        """How the curvature was computed, in plain values."""
        return {**self.inverse.summary(), "inverse": self.inverse.kind}


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
    """Scores each training example for itself: the change of its own loss if it were removed.

    The score is ``(1/(n−1)) · gᵢᵀ(C + λ)⁻¹gᵢ`` with ``gᵢ = ∇ℓ(zᵢ)``, restricted to the target parameters for
    ``method="fif"``. It is large for memorized examples, such as wrong labels (Koh and Liang, ICML 2017, section 5.4;
    Feldman and Zhang, NeurIPS 2020). If the curvature may have negative eigenvalues, such as the Hessian, each
    eigenvalue ``c`` counts as ``√(c² + λ²)`` instead of ``c + λ``. So no score is negative. The report's
    ``curvature["negative_eigenvalues"]`` is the number of negative ones.

    With up to 1024 parameters the matrix ``C`` is formed, and the scores are exact. With more parameters and
    ``solver="ekfac"``, ``C`` is the EK-FAC approximation. With any other solver, a low-rank
    sketch replaces ``C`` (:func:`~lightning_gif.solvers.low_rank`, or
    :func:`~lightning_gif.solvers.low_rank_eigenvectors` if there may be negative eigenvalues, which takes twice as many
    products). The sketch takes the curvature as 0 in directions that it misses, where only the damping remains. So
    scores are overestimated, but little if the curvature in these directions is small compared with the damping.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        settings: Curvature, damping and their parameters; ``max_iter`` is the rank of the sketch.
        choose_targets: Returns the target parameters. It is not called if scores are over all parameters.
        among: The training examples to score; by default all.
        states: Snapshots by epoch. Scores are the mean over the snapshots and the present weights. Each state has its
            own curvature and damping.
        k: How many proponents and opponents the report shows.
        context: The trainer's loggers, step count and process group, for the report.

    Raises:
        NonFiniteError: If a loss, gradient or product is not finite.
        ConfigurationError: If the method is not symmetric, as ``"if"`` and ``"fif"`` are; or, with a sketch, if there
            is no damping, or if a curvature that declares to be positive semi-definite has negative eigenvalues.
    """
    start = time.perf_counter()
    if not METHODS[settings.method].is_symmetric:
        suited = " or ".join(repr(name) for name, method in METHODS.items() if method.is_symmetric)
        raise ConfigurationError(
            f"Self-influence needs a method that inverts the curvature of the target parameters alone: {suited}, got"
            f" {settings.method!r}. Pass one of them to the call: trainer.self_influence(method='if')."
        )
    targets = METHODS[settings.method].targets(objective.space, choose_targets)
    scored = train if among is None else among
    model_states = [objective.model_state(), *map(objective.model_state, (states or {}).values())]
    scores, any_gradient, spread = torch.zeros(1, len(scored), dtype=torch.float64), 0.0, Spread()
    # How the curvature was computed, the damping and the gradient share, of each state.
    summaries = list[tuple[dict[str, Any], float, float | None]]()
    positions = targets.flat(objective.space).to(objective.device)
    objective.progress.expect(*_solving(settings, train, positions).with_scores(len(scored)) * len(model_states))
    for state in model_states:
        with objective.at_state(state):
            fitted = _fit(objective, train, settings, positions)
            values, gradients, share = _scores(objective, scored, settings.weight_decay, fitted, positions)
            summaries.append((fitted.summary(), fitted.inverse.damping, share))
        scores += values / len(model_states) / max(len(train) - 1, 1)
        spread.add(values[None] / max(len(train) - 1, 1))
        any_gradient += gradients
    warn_without_gradients(objective.processes.total(any_gradient))
    require_finite_scores(scores, scored.ids)
    curvature, damping, share = summaries[0]  # at the present weights
    errors = spread.standard_errors()
    return InfluenceReport(
        scores=scores,
        indices=scored.ids,
        n_train=len(scored),
        solutions=[],
        curvature=curvature,
        targets=targets,
        gradient_share=share,
        k=k,
        dataset=train.dataset,
        queries=[],
        labels=scored.classes,
        settings={
            **asdict(replace(settings, damping=damping)),
            "snapshots": list(states or {}),
            "losses": objective.loss.origin,
            "dataset_size": len(train.dataset) if hasattr(train.dataset, "__len__") else None,
        },
        seconds=time.perf_counter() - start,
        standard_errors=errors,
        agreement=agreement_of(scores, errors, len(model_states)),
        context=context or CallContext(),
    )


def _solving(settings: Settings, train: Examples, positions: Tensor) -> SolveStage:
    """The stage of the inverse at each state."""
    return SolveStage.of(inverse_for_self_influence(settings, len(positions)), settings, train, 0)


def _fit(objective: Objective, train: Examples, settings: Settings, positions: Tensor) -> _Fitted:
    """The inverse of the curvature at the present weights, with its quadratic form."""
    inverse_class, method = inverse_for_self_influence(settings, len(positions)), METHODS[settings.method]
    with objective.progress.stage(PRODUCTS, _solving(settings, train, positions).total) as update:
        inverse = inverse_class.fit(objective, train, settings, method, positions, on_product=update)
        return _Fitted(inverse, inverse.quadratic())


def _scores(
    objective: Objective,
    scored: Examples,
    weight_decay: float,
    fitted: _Fitted,
    positions: Tensor,
) -> tuple[Tensor, float, float | None]:
    """The quadratic form of each example's gradient, ``(n,)``; a number that is positive if a gradient is not zero; and
    the mean share of the gradients that the targets ``positions`` hold, ``None`` if no whole gradients were formed.

    Removing an example does not reduce weight decay. So each example's gradient includes the gradient of weight decay.
    """
    values, any_gradient, share = [], 0.0, 0.0
    inverse, quadratic = fitted
    whole = len(positions) == objective.space.size
    labels = list[Tensor | None]()
    with objective.progress.stage(SCORES, len(scored)) as update:
        for batch in scored.local_batches():
            labels.append(batch.classes)
            found = inverse.of_losses(objective, batch)
            if found is not None:
                any_gradient, share = any_gradient + float(found.any()), math.nan
                values.append(found.cpu())
            else:
                for gradients in objective.gradients(batch):
                    any_gradient += float(gradients.any())
                    share += 0.0 if whole else len(gradients) * gradient_share(gradients, positions)
                    values.append(quadratic(gradients + weight_decay * objective.theta).cpu())
            update(batch.size * objective.processes.size)
    scored.learn_classes(labels)
    share = 1.0 if whole else objective.processes.total(share) / len(scored)
    return scored.all_gather(values).double(), any_gradient, None if math.isnan(share) else share
