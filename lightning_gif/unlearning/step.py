"""The argument ``step`` of an edit: how far it goes."""

from __future__ import annotations

import math
import numbers

from ..config import AUTO, Settings
from ..curvature.products import has_gauss_newton, require_gauss_newton
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..solvers import cg
from .goals import Goal
from .matching import Matching
from .strategies import STRATEGIES, Strategy
from .task import Request

__all__ = ["MATCH", "Step", "can_match", "check_step", "choose_step", "note_unknown_damping", "strategy_of"]


Step = str | float | Strategy
"""A strategy, its name, ``"auto"``, or a step size along the influence direction."""

MATCH = "match"
"""The name of the strategy that has settings of its own."""

_OTHERWISE = "relinearise"


def check_step(step: Step) -> None:
    """Checks ``step``.

    Raises:
        ConfigurationError: If ``step`` is not a strategy, the name of one, or a finite number.
    """
    if isinstance(step, str):
        if step != AUTO:
            STRATEGIES[step]
    elif not callable(step) and (
        isinstance(step, bool) or not isinstance(step, numbers.Real) or not math.isfinite(step)
    ):
        raise ConfigurationError(
            f"`step` must be one of {', '.join(map(repr, (AUTO, *STRATEGIES)))}, a finite number, or a function from an"
            f" EditProblem to one of its trials (see lightning_gif.unlearning), got {step!r}."
        )


def strategy_of(step: Step) -> Strategy:
    """The strategy of a ``step`` that is not a number."""
    return STRATEGIES[step] if isinstance(step, str) else step  # type: ignore[return-value]


def can_match(objective: Objective) -> bool:
    """Whether the losses are convex functions of predictions, and so have a Gauss–Newton matrix to match with."""
    probed = objective.probed
    return probed is not None and objective.is_convex and has_gauss_newton(objective, objective.theta, probed)


def choose_step(
    step: Step, goal: Goal, request: Request, matching: Settings | None, numbers: Matching, notes: list[str]
) -> tuple[Step, Settings]:
    """The step of an edit, and its settings.

    Args:
        step: The given step.
        goal: The goal of the edit.
        request: The request, with the settings for all strategies except ``"match"``.
        matching: The settings for ``"match"``; ``None`` if a setting excludes it.
        numbers: The tuned numbers of ``"match"``.
        notes: The notes of the report, which may be extended.

    Raises:
        ConfigurationError: If ``step="match"`` was given, but the goal or a setting excludes it.
        ObjectiveError: If ``step="match"`` was given, but there is no Gauss–Newton matrix.
    """
    step = MATCH if step is STRATEGIES[MATCH] else step
    objective, settings = request.objective, request.settings
    if matching is not None and request.relabelled is not None and not _can_relabel(matching):
        matching = None
    probed = objective.probed
    assert probed is not None  # since the structure of the training examples is known
    if step == MATCH:
        if goal.strategy != MATCH:
            raise ConfigurationError(
                "step='match' is for single examples that are removed or get new labels, but the goal of this edit is"
                f" {goal.name!r}. Use step='relinearise', or omit `step`."
            )
        if matching is None:
            raise ConfigurationError(
                "step='match' solves with the Gauss–Newton matrix on the parameters that change. Omit `method`,"
                " `curvature`, `solver` and `discrepancy`, or use method='if' or 'fif', curvature='ggn' and"
                " solver='cg'."
            )
        require_gauss_newton(objective, objective.theta, probed)
        return step, matching
    if step != AUTO:
        return step, settings
    if goal.strategy != MATCH:
        return goal.strategy, settings
    if matching is None:
        notes.append(
            "The settings exclude a match (step='match'), so the edit lowers the loss of the data instead"
            " (step='relinearise'), which is less exact. A match needs method='if' or 'fif', curvature='ggn' and"
            " solver='cg', and no `discrepancy` for new labels. Or omit these settings."
        )
        return _OTHERWISE, settings
    if not can_match(objective):
        notes.append(
            "The predictions that the losses are computed from are not recognised, or the loss is not convex in them."
            " So the edit could not aim at the predictions of a model trained without the examples, or with the new"
            " labels (step='match'). It lowers the loss of the data instead (step='relinearise'), which is less exact."
        )
        return _OTHERWISE, settings
    most = numbers.relabel_steps * numbers.forgotten
    if request.relabelled is not None and len(request.forget) > most:
        notes.append(
            f"There are {len(request.forget)} new labels. With more than {most}, a match takes long, so"
            " step='relinearise' is used. For a match, pass step='match'."
        )
        return _OTHERWISE, settings
    return MATCH, matching


def _can_relabel(settings: Settings) -> bool:
    """Whether the settings fit a solve for new labels, which is not linear, and so has a solver of its own."""
    return settings.solver == cg.name and not settings.discrepancy


def note_unknown_damping(request: Request, notes: list[str]) -> None:
    """Notes that the damping of ``"match"`` is a guess, if it is.

    Args:
        request: The request, with its settings.
        notes: The notes of the report, which may be extended.
    """
    objective = request.objective
    if request.settings.damping is None and request.training.damping(objective.space, objective.theta) is None:
        notes.append(
            f"The damping is a guess, a share of the curvature's largest eigenvalue, because {request.training.gap}."
            " For a better one, have the GIFCallback in a `fit` with SGD, Adam, AdamW or RMSprop, load a checkpoint of"
            " such a fit, or pass `damping`. For SGD that is weight decay plus (1 − momentum) / (sum of the learning"
            " rates of all steps)."
        )
