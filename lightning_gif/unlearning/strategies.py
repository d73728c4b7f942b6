"""Strategies: how far an edit goes, and whether it solves for further changes."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..registry import Registry, declares
from .problem import EditProblem
from .protocol import QuadraticModel, Trial

__all__ = ["STRATEGIES", "Strategy", "match", "natural", "relinearise", "search"]


Strategy = Callable[[EditProblem], Trial]
"""A function from an edit problem to one of the trials that it evaluated there."""

STRATEGIES: Registry[Strategy] = Registry(
    "`step` strategy", reports_shortfall=True, repeats_solves=False, predicts_losses=False, uses_risk=True
)
"""All strategies by name; :meth:`Registry.register` adds one.

A strategy can declare by :func:`~lightning_gif.registry.declares`:

- ``reports_shortfall``: whether an edit that misses its target or costs too much is reported (by default yes);
- ``repeats_solves``: whether it solves for up to :attr:`Relinearisation.max_solves` changes, so that the report says if
  this limit ended the edit (by default no);
- ``predicts_losses``: whether the report compares the loss of the forget examples with its prediction (by default no);
- ``uses_risk``: whether it uses the risk of trials (by default yes). If not, the risk is NaN, which saves time, and
  only :meth:`~EditProblem.leave_out` and :meth:`~EditProblem.match` give changes.
"""


@STRATEGIES.register("natural")
@declares(reports_shortfall=False)  # it takes the natural step, whatever comes of it
def natural(problem: EditProblem) -> Trial:
    """Takes step size 1 along the influence direction, whatever its effect."""
    problem.influence_direction()
    return problem.evaluate(1.0)


@STRATEGIES.register("search")
def search(problem: EditProblem) -> Trial:
    """Takes the best step size along the influence direction.

    For class removal this is the smallest step size that reaches the target memorization, else the one with the least
    risk.
    """
    return _best_along_influence(problem, problem.influence_direction())


@STRATEGIES.register("match")
@declares(predicts_losses=True, uses_risk=False)
def match(problem: EditProblem) -> Trial:
    """Makes the predictions on the forget examples those that theory predicts for training on other data.

    That is training without these examples, or with their new labels. The first change is the predicted change of the
    weights, and the second a short training towards the predictions. The second is omitted if the losses after the
    first are as predicted, as for a model that is linear in its parameters. A change that ends farther from the
    predicted losses than the trained model is not made. It needs a Gauss–Newton matrix.
    """
    problem.leave_out()
    stepped = problem.evaluate(1.0)
    if not _has_predicted_losses(problem, stepped):
        problem.match()
        problem.evaluate(1.0, 1.0)
    return _last_of_use(problem)


@STRATEGIES.register("relinearise")
@declares(repeats_solves=True)
def relinearise(problem: EditProblem) -> Trial:
    """Makes several changes that lower the risk. Each is solved at the weights after the previous one.

    A trust region accepts or rejects each step. Example removal first takes the best step size along the influence
    direction. It stops there if the risk changed as the quadratic model predicted, and memorization has reached its
    target or has none. For class removal and label correction the influence direction is too inaccurate, and is not
    computed.
    """
    goal, numbers = problem.goal, problem.tuning.relinearisation
    best, n_solves = problem.trials[0], 0
    if goal.influence_first:
        model, n_solves = problem.influence_direction(), 1
        best = _best_along_influence(problem, model)
        if problem.limits.are_reached(best) and _is_as_predicted(problem, best, model):
            return best
    stalled = False
    while n_solves < numbers.max_solves:
        accepted = _descend(problem, best, n_solves)
        n_solves += 1
        gained, best = (0.0, best) if accepted is None else (best.risk - accepted.risk, accepted)
        at_target = problem.limits.are_reached(best)
        if at_target and goal.is_negligible(best.risk):
            break
        if accepted is not None and gained >= numbers.min_gain * abs(best.risk):
            stalled = False
            continue
        may_continue = goal.outlasts_small_gain(accepted, at_target)
        if (at_target or accepted is None or not goal.pursues_target) and (stalled or not may_continue):
            break
        stalled = may_continue
    return best


def _descend(problem: EditProblem, start: Trial, n_solves: int) -> Trial | None:
    """Solves for a change at a trial, and returns the accepted trial along it; ``None`` if the step is rejected.

    Args:
        problem: The edit problem.
        start: The trial.
        n_solves: The number of earlier changes.
    """
    model = problem.descent_direction(start)
    before = start.step_sizes + (0.0,) * (n_solves - len(start.step_sizes))
    return problem.tuning.trust_region.accepted_step(
        lambda step_size: problem.evaluate(*before, step_size),
        start,
        model,
        problem.limits,
        bounded_risk=problem.goal.bounded_risk,
    )


def _has_predicted_losses(problem: EditProblem, trial: Trial) -> bool:
    """Whether the losses of a trial are those that the leave-out step predicts, up to a tolerance."""
    start, share = problem.trials[0], problem.tuning.matching.prediction_tolerance
    forget, retain = problem.predictions
    is_forgotten = abs(trial.forget_loss - forget) <= share * abs(forget - start.forget_loss)
    return is_forgotten and abs(trial.retain_loss - retain) <= share * abs(start.retain_loss)


def _last_of_use(problem: EditProblem) -> Trial:
    """The last trial whose losses are nearer to the predicted ones than those of the trained model, or else that model.

    A retained loss counts only as far as it is above the predicted one and that of the trained model.
    """
    forget, retain = problem.predictions
    most = max(retain, problem.trials[0].retain_loss)

    def error(trial: Trial) -> float:
        value = abs(trial.forget_loss - forget) + max(trial.retain_loss - most, 0.0)
        return value if math.isfinite(value) else math.inf

    trained, *edits = problem.trials
    return next((trial for trial in reversed(edits) if error(trial) < error(trained)), trained)


def _is_as_predicted(problem: EditProblem, trial: Trial, model: QuadraticModel) -> bool:
    """Whether a step along the influence direction changed the risk as predicted, or its size is zero."""
    numbers, start = problem.tuning.relinearisation, problem.trials[0]
    predicted = model.change(trial.step_size)
    error = abs(trial.risk - start.risk - predicted)
    tolerance = max(
        numbers.prediction_tolerance * abs(predicted), problem.tuning.line_search.rounding * abs(start.risk)
    )
    return not trial.is_edit or error <= tolerance


def _best_along_influence(problem: EditProblem, model: QuadraticModel) -> Trial:
    goal, line_search, start = problem.goal, problem.tuning.line_search, problem.trials[0]
    if goal.smallest_step:
        return line_search.smallest_that_forgets(problem.evaluate, start, problem.limits)
    hidden = abs(model.change(1.0)) <= line_search.rounding * abs(start.risk)
    if goal.influence_first and hidden:  # a search would follow rounding errors
        return problem.evaluate(1.0)
    return line_search.least_risk(problem.evaluate, start, problem.limits, goal.max_step_size)
