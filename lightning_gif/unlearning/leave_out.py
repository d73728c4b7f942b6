"""The change that other training data would have made, and the match of its predictions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.ekfac import inverse_root
from ..curvature.products import output_derivative
from ..curvature.solve import describe, max_iter, open_curvature, rtol, solve, warn_unconverged
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import NonFiniteError
from ..objective.objective import Objective
from ..solvers import LinearOperator, Solution
from ..solvers.operators import Combination, Scaled, Submatrix, Transformed, scatter
from ..solvers.power_iteration import largest_eigenvalue
from .matching import Matching, Rounds, match, predicted, to_predicted
from .relabelling import LinearisedLoss, minimise
from .task import Task

__all__ = ["POWER_STEPS", "LeaveOutStep", "match_predictions", "predicted_losses", "solve_step"]

# The number of products that estimate a largest eigenvalue. They start at the gradient of the edit.
POWER_STEPS = 4


@dataclass(frozen=True)
class LeaveOutStep:
    """The change of the targets for training without the forget examples, or with their new labels.

    Attributes:
        change: The change ``x``, ``(k,)``.
        solution: The solution of the solve, with the mean of ``D`` as its damping.
        products: How the products with ``G`` were computed.
    """

    change: Tensor
    solution: Solution
    products: dict[str, Any]


def solve_step(
    task: Task, settings: Settings, numbers: Matching, positions: Tensor, on_product: Callable[[], Any]
) -> LeaveOutStep:
    """Solves for the change by conjugate gradients, with EK-FAC as the preconditioner if the module allows it.

    Without the forget examples, the change solves ``(G + D) x = g``. For new labels see :mod:`.relabelling`.

    Args:
        task: The data of the edit.
        settings: Its settings.
        numbers: The tuned numbers.
        positions: The targets, ``(k,)``.
        on_product: Called for each product with ``G``.
    """
    objective, gradient = task.objective, task.leave_out_gradient(numbers.earlier_share)[positions]
    kept = task.budget.for_curvatures(settings, 1)
    curvature = open_curvature(kept, objective, task.retain_fit, on_product=on_product)
    matrix = Submatrix(curvature, positions, positions)
    damping = _damping(task, settings, positions)
    if damping is None:
        least = torch.finfo(gradient.dtype).tiny
        damping = torch.full_like(
            gradient, max(numbers.unknown_damping * largest_eigenvalue(matrix, gradient, POWER_STEPS), least)
        )
    fitted_on = task.budget.sample(task.retain_fit, numbers.preconditioner_examples, settings.seed)
    root = _preconditioner(task.objective, fitted_on, settings.seed, damping, positions)
    system, free = Transformed(matrix, damping, root), replace(settings, damping=0.0)
    if task.relabelled is None:
        (solution,) = solve(free, system, root(gradient))
    else:
        solution = _solve_relabelled(task, free, positions, system, root)
    change = root(solution.x)
    curvature.warn_if_zero()
    return LeaveOutStep(
        change=change,
        solution=replace(solution, damping=float(damping.mean())),
        products=describe(settings, curvature),
    )


def _solve_relabelled(
    task: Task,
    settings: Settings,
    positions: Tensor,
    system: LinearOperator,
    root: Callable[[Tensor], Tensor],
) -> Solution:
    """The minimum for training with new labels, in coordinates of the preconditioner, see :func:`.minimise`."""
    assert task.relabelled is not None
    size = len(task.objective.theta)
    solution = minimise(
        system,
        task.forget_gradient,
        LinearisedLoss(task.objective, task.relabelled),
        task.forget_weight,
        lambda vector: scatter(root(vector), positions, size),
        lambda vector: root(vector[positions]),
        rtol=rtol(settings),
        max_iter=max_iter(settings),
    )
    warn_unconverged(settings, [solution], is_newton=True)
    return solution


def _damping(task: Task, settings: Settings, positions: Tensor) -> Tensor | None:
    """The damping of each target, ``(k,)``; ``None`` if none is given and the training was not recorded."""
    like = task.objective.theta
    if settings.damping is not None:
        return torch.full_like(like[positions], max(float(settings.damping), torch.finfo(like.dtype).tiny))
    found = task.training.damping(task.objective.space, like, decay=not settings.weight_decay)
    return None if found is None else found[positions]


def _preconditioner(
    objective: Objective, examples: Examples, seed: int, damping: Tensor, positions: Tensor
) -> Callable[[Tensor], Tensor]:
    """A symmetric map ``(k,) → (k,)`` that makes the condition number of ``G + D`` smaller.

    Args:
        objective: An open objective.
        examples: The examples that EK-FAC is fitted on. They may be few, since the solve corrects it.
        seed: The seed of random vectors.
        damping: The damping of each target, ``(k,)``.
        positions: The targets, ``(k,)``.
    """
    whole = torch.full_like(objective.theta, float(damping.mean()))
    whole[positions] = damping
    root = inverse_root(objective, examples, whole, seed)
    if root is None:
        return lambda vector: vector * damping.rsqrt()

    def on_targets(vector: Tensor) -> Tensor:
        return root(scatter(vector, positions, len(whole)))[positions]

    return on_targets


def predicted_losses(task: Task, positions: Tensor, change: Tensor) -> dict[str, float]:
    """The mean losses after a change ``(k,)`` of the targets, if predictions were linear in the parameters, by name."""
    objective = task.objective
    direction = scatter(change, positions, len(objective.theta))

    def loss_sum(theta: Tensor, batch: Batch) -> Tensor:
        out, derivative = output_derivative(objective.outputs, theta, batch, direction)
        return objective.loss_sum_at(theta, batch)(out + derivative)

    parts = {"forget": task.forget_eval, "retain": task.retain_eval, "relabelled": task.relabelled}
    return {
        name: objective.mean(examples, loss_sum, objective.theta)
        for name, examples in parts.items()
        if examples is not None
    }


def match_predictions(
    task: Task,
    settings: Settings,
    numbers: Matching,
    positions: Tensor,
    change: Tensor,
    damping: float,
    on_step: Callable[[], Any],
) -> tuple[Tensor, Solution]:
    """A further change, after which the predictions on the forget examples are those that a first one predicts.

    Meanwhile, the retained examples are trained on further, which repairs what the first change did to them.

    Args:
        task: The data of the edit.
        settings: Its settings.
        numbers: The tuned numbers.
        positions: The targets, ``(k,)``.
        change: The first change, ``(k,)``.
        damping: The damping of its solve, if the training was not recorded.
        on_step: Called after each step.

    Returns:
        The further change ``(k,)``, and a solution with the number of steps.
    """
    started, objective, budget, seed = time.perf_counter(), task.objective, task.budget, settings.seed
    classifies = task.n_classes is not None
    outputs = objective.logits if classifies else objective.outputs
    direction = scatter(change, positions, len(objective.theta))
    start, wanted = objective.theta + direction, predicted(objective, outputs, direction)
    aimed_at = task.forget if task.relabelled is None else task.relabelled
    known = _damping(task, settings, positions)
    scale = 1 / (torch.full_like(change, damping) if known is None else known)
    to_forget = to_predicted(objective, outputs, classifies=classifies)

    forget = Rounds(aimed_at, numbers.forgotten, to_forget.loss_sum, budget, seed, wanted)
    weight = numbers.forget_weight * len(forget)
    # The rate of the steps follows from the curvature at their start, which is larger than before.
    few = budget.sample(task.retain_fit, numbers.rate_examples, seed)
    aimed = aimed_at.sample(max(numbers.rate_examples // 4, 1), seed).map(wanted)
    kept = budget.for_curvatures(settings, 2)
    both = Combination(
        (1.0, open_curvature(kept, objective, few, start, weight_decay=0.0)),
        (weight, open_curvature(kept, objective, aimed, start, losses=to_forget, weight_decay=0.0)),
    )
    matrix = Scaled(Submatrix(both, positions, positions), scale.sqrt(), rows=True)
    try:
        largest = largest_eigenvalue(matrix, scale.sqrt() * task.influence_gradient[positions], POWER_STEPS)
    except NonFiniteError:  # the first change has gone too far, which its measurement shows
        largest = 0.0
    if not largest:
        numbers = replace(numbers, steps=0)
    retained = task.retained.sample(max(numbers.steps * numbers.retained, 1), seed)
    end = match(
        objective,
        start,
        positions,
        forget,
        Rounds(retained, numbers.retained, (objective.loss.together() or objective.loss).loss_sum, budget, seed),
        scale,
        largest,
        weight,
        numbers,
        on_step,
    )
    found = (end - start)[positions]
    done = Solution.direct(found, damping, time.perf_counter() - started, solver="match")
    return found, replace(done, iterations=numbers.steps)
