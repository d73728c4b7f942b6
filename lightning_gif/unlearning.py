"""From the examples to be forgotten to an edit of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from ._compat import rank_zero_warn
from .curvature import METHODS, Hessian, Submatrix
from .data import Examples, class_targets, locate, relabelled
from .errors import ConfigurationError, GIFWarning, NonFiniteError, ObjectiveError, TrainingDataError
from .objective import Objective
from .parameters import Edit, Targets
from .reports.unlearning import Change, UnlearnReport
from .settings import Settings
from .steps import Goal, Point, forget_class, minimise_risk, restore

__all__ = ["Step", "check_step", "unlearn"]

Step = Literal["search", "natural"] | float


def check_step(step: Step) -> None:
    """Raises a :class:`~lightning_gif.errors.ConfigurationError` unless ``step`` is a known name or a finite number."""
    if step in ("search", "natural"):
        return
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not math.isfinite(step):
        raise ConfigurationError(f"`step` must be 'search', 'natural' or a finite number, got {step!r}.")


def unlearn(
    objective: Objective,
    train: Examples,
    forget: Examples,
    settings: Settings,
    choose_targets: Callable[[], Targets],
    *,
    relabel: Tensor | int | Callable[[Any], Tensor] | None = None,
    retain: Examples | None = None,
    step: Step = "search",
) -> UnlearnReport:
    """Plans the edit after which the model behaves as if it had not seen some examples, or had seen other labels.

    With ``U`` the ``m`` examples and ``n − m`` others retained, the weighted gradient is ``g = m/(n−m) ∇ℓ̄(U)`` for
    removal and ``g = m/(n−m) ∇[ℓ̄(U, old) − ℓ̄(U, new)]`` for relabelling (GIF, arXiv 2312.05586, section 3). The method
    turns it into a change ``x`` of the targets, and a step ``s`` is chosen: ``θ[S] ← θ[S] + s·x``. Nothing is written
    to the model here.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        forget: The ``m`` examples in question, with the labels they were trained with.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all of them.
        relabel: New targets, see :func:`~lightning_gif.data.relabelled`; ``None`` removes the examples.
        retain: The retained examples; by default all of ``train`` that are not found in ``forget``.
        step: ``"search"``, ``"natural"`` (1), or a number.

    Raises:
        BatchError: If the examples are not structured as training batches are.
        TrainingDataError: If nothing would be retained.
        ObjectiveError: If the loss of the examples does not depend on the targets.
        NonFiniteError: If a loss, a gradient, a product or a new weight is not finite.
        ConvergenceError: See :meth:`~lightning_gif.settings.Settings.solve`.
    """
    start = time.perf_counter()
    notes: list[str] = []
    objective.check(forget, train, "forget")
    corrected = None if relabel is None else relabelled(forget, relabel)
    if corrected is not None:
        objective.check(corrected, train, "relabelled")

    found = locate(forget, train)
    retained = _retained(train, forget, found, notes) if retain is None else retain
    objective.check(retained.sample(1, settings.seed), train, "retain")
    sample = retained.sample(settings.curvature_examples, settings.seed).held()

    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    positions = targets.flat(objective.space).to(objective.device)
    forget_gradient = objective.gradient(forget)
    corrected_gradient = None if corrected is None else objective.gradient(corrected)
    share = len(forget) / len(retained)
    gradient = share * (forget_gradient if corrected_gradient is None else forget_gradient - corrected_gradient)
    if not gradient[positions].any():
        raise ObjectiveError(
            "The loss of the forget examples does not depend on the target parameters: its gradient on all of them is"
            " exactly zero. Use targets='batch', a larger ratio, or method='if'."
        )

    with objective.progress("Hessian products") as bar:
        hessian = Hessian(objective.loss_sum, objective.theta, sample, on_product=bar.update)
        change, solution = method.edit(hessian, positions, gradient, settings.solve)
        curvature = float(change @ Submatrix(hessian, positions, positions).matvec(change))
    if not change.any():
        raise ObjectiveError(
            "The solve found no change of the target parameters that would answer the removal: the retained loss has no"
            " curvature along them. Use other targets, a larger ratio, or method='if'."
        )

    goal = _goal(forget, corrected, sample)
    guessing = _loss_of_guessing(forget, sample)

    # Removal and correction are judged by the same losses; those of a large forget set are taken on a sample of it.
    judged = [e if e is None else _judged(e, settings) for e in (forget, corrected)]
    judged_forget, judged_corrected = judged[0], judged[1]
    assert judged_forget is not None

    retain_gradient = objective.gradient(sample)
    slope = float((retain_gradient + share * forget_gradient)[positions] @ change)

    def moved(size: float, repair: float = 0.0) -> Tensor:
        total = size * change if not repair else size * change + repair * second
        return objective.theta.index_add(0, positions, total)

    def measure(size: float, repair: float = 0.0) -> Point:
        theta = moved(size, repair)
        losses = objective.all_losses(judged_forget, theta).double()
        retain_loss = objective.mean_loss(sample, theta)
        risk = retain_loss - size * slope
        if judged_corrected is not None:
            risk = (retain_loss + share * objective.mean_loss(judged_corrected, theta)) / (1 + share)
        forgotten = float((losses >= guessing).double().mean()) if guessing is not None else math.nan
        return Point(size, repair, float(losses.mean()), retain_loss, risk, forgotten)

    size, path = _choose(step, goal, guessing, measure, notes)
    repair, second, repair_solve = 0.0, torch.zeros_like(change), None
    if step == "search" and goal is Goal.CLASS and size:
        # A step that forgets a class is far from the natural one, where the local model of the retained risk no longer
        # holds. At the new weights it is solved anew, for the gradient that the retained risk has there.
        with objective.progress("Hessian products, at the new weights") as bar:
            there = moved(size)
            hessian = Hessian(objective.loss_sum, there, sample, on_product=bar.update)
            second, again = method.edit(hessian, positions, -objective.gradient(sample, there), settings.solve)
        best, measured = restore(measure, next(point for point in path if point.step == size))
        path += measured
        size, repair = best.step, best.repair
        repair_solve = again.summary()
    total = moved(size, repair)[positions] - objective.theta[positions]
    edit = Edit.plan(objective.module, targets, objective.space, total)
    edited = objective.theta.clone()
    edited[positions] = edit.flat_new(objective.space).to(edited)

    retain_slope = retain_gradient[positions] @ change
    report = UnlearnReport(
        edit=edit,
        goal=goal,
        step=size,
        repair=repair,
        forget=_change(objective, judged_forget, edited, size * forget_gradient[positions] @ change),
        retain=_change(objective, sample, edited, size * retain_slope + size**2 * curvature / 2),
        relabelled=None
        if judged_corrected is None or corrected_gradient is None
        else _change(objective, judged_corrected, edited, size * corrected_gradient[positions] @ change),
        n_forget=len(forget),
        n_found=len(found),
        n_retain=len(retained),
        n_parameters=objective.space.size,
        path=path,
        solve=solution.summary(),
        repair_solve=repair_solve,
        residuals=solution.residuals,
        settings=asdict(settings),
        notes=notes,
        seconds=time.perf_counter() - start,
    )
    for name, after in (("forget", report.forget.after), ("retain", report.retain.after)):
        if not math.isfinite(after):
            raise NonFiniteError(
                f"At step {size:.3g} the {name} loss would be {after}. Nothing was changed. Choose a smaller `step`, or"
                " 'search'."
            )
    return report


def _retained(train: Examples, forget: Examples, found: Tensor, notes: list[str]) -> Examples:
    """The training examples that are not to be forgotten."""
    if len(found) < len(forget):
        notes.append(
            f"{len(forget) - len(found)} of the {len(forget)} forget examples were not found in the training data, by"
            " dataset index or by content. If the model was trained on them in another form (random augmentation), pass"
            " the data to keep as `retain`, or they count as retained."
        )
        rank_zero_warn(notes[-1], category=GIFWarning)
    keep = torch.ones(len(train), dtype=torch.bool)
    keep[found] = False
    if not keep.any():
        raise TrainingDataError("All training examples are to be forgotten; nothing would be retained. Train anew.")
    return train.at(keep.nonzero().squeeze(1))


def _judged(examples: Examples, settings: Settings) -> Examples:
    return (
        examples if examples.cached is not None else examples.sample(settings.curvature_examples, settings.seed).held()
    )


def _goal(forget: Examples, corrected: Examples | None, retained: Examples) -> Goal:
    if corrected is not None:
        return Goal.LABELS
    forgotten, kept = set(_classes(forget)), set(_classes(retained))
    return Goal.CLASS if forgotten and kept and not forgotten & kept else Goal.EXAMPLES


def _classes(examples: Examples) -> Iterator[int]:
    """The classes of examples, batch by batch; nothing where they have none."""
    for batch in examples.batches():
        classes = class_targets(batch.data)
        if classes is not None:
            yield from classes.unique().tolist()


def _loss_of_guessing(forget: Examples, retained: Examples) -> float | None:
    """The cross-entropy of guessing among the classes in the data, or ``None`` where there are no classes."""
    classes = {*_classes(forget), *_classes(retained)}
    return math.log(len(classes)) if len(classes) > 1 else None


def _choose(
    step: Step, goal: Goal, guessing: float | None, measure: Callable[[float], Point], notes: list[str]
) -> tuple[float, list[Point]]:
    if step != "search":
        size = 1.0 if step == "natural" else float(step)
        return size, [measure(0.0), measure(size)]
    if goal is Goal.CLASS and guessing is not None:
        size, path, forgotten = forget_class(measure, guessing)
        if not forgotten:
            notes.append(
                "The search stopped before the class was forgotten: a larger step would raise the retained loss too"
                " far. Try targets='batch', another selector, or a larger ratio; or give `step` a number."
            )
            rank_zero_warn(notes[-1], category=GIFWarning)
        return size, path
    size, path = minimise_risk(measure, near_natural=goal is Goal.EXAMPLES)
    if size == 0.0:
        notes.append("The search found no step that lowers the risk on the data to keep; the edit changes nothing.")
        rank_zero_warn(notes[-1], category=GIFWarning)
    return size, path


def _change(objective: Objective, examples: Examples, edited: Tensor, predicted: Tensor | float) -> Change:
    before = objective.mean_loss(examples)
    return Change(before=before, after=objective.mean_loss(examples, edited), predicted=before + float(predicted))
