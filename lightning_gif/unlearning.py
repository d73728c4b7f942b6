"""From the examples to be forgotten to an edit of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ._compat import rank_zero_warn
from .curvature import METHODS, Group, Submatrix
from .data import Examples, class_targets, locate, relabelled
from .errors import ConfigurationError, GIFWarning, NonFiniteError, ObjectiveError, TrainingDataError
from .objective import Objective
from .parameters import Edit, Targets
from .reports.unlearning import Change, UnlearnReport
from .sampling import curvature_sample
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
    objective.check(forget, "forget")
    corrected = None if relabel is None else relabelled(forget, relabel)
    if corrected is not None:
        objective.check(corrected, "relabelled")

    found = locate(forget, train)
    retained = _retained(train, forget, found, notes) if retain is None else _without(retain, forget, notes)
    memory = settings.bytes_to_keep(objective.device)
    sample = curvature_sample(
        objective, retained, settings.curvature_examples, settings.curvature_sampling, settings.seed
    ).held(memory)
    objective.check(sample, "retain")

    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    positions = targets.flat(objective.space).to(objective.device)
    forget_gradient = objective.gradient(forget)
    corrected_gradient = None if corrected is None else objective.gradient(corrected)
    members = max(len(forget), len(found))
    share = members / len(retained)
    # Weight decay does not become less where fewer examples are in the mean, so each example's loss carries its share.
    decay = settings.weight_decay * objective.theta
    gradient = share * (forget_gradient + decay if corrected_gradient is None else forget_gradient - corrected_gradient)
    if not gradient[positions].any():
        raise ObjectiveError(
            "The loss of the forget examples does not depend on the target parameters: its gradient on all of them is"
            " exactly zero. Use targets='batch', a larger ratio, or method='if'."
        )

    # The losses of a large set to be removed are judged on a sample of it; corrected examples are in memory anyway.
    judged = (
        forget if corrected is not None or forget.cached else forget.sample(settings.curvature_examples, settings.seed)
    )
    judged = judged.held(memory)

    with objective.progress("Hessian products") as bar:
        opened = partial(settings.open_curvature, objective, on_product=bar.update)
        curvature = opened(sample)
        old, new = opened(judged, keep=False), None if corrected is None else opened(corrected, keep=False)
        group = Group(members / (members + len(retained)), old, new)
        change, solutions = method.edit(curvature, positions, gradient, settings.solve, group)
        bend = float(change @ Submatrix(curvature, positions, positions).matvec(change))
        description = settings.describe(curvature)
    del curvature, group, old, new  # and the passes that they kept
    if not change.any():
        raise ObjectiveError(
            "The solve found no change of the target parameters that would answer the removal: the retained loss has no"
            " curvature along them. Use other targets, a larger ratio, or method='if'."
        )

    forgotten_classes = _classes(forget)
    kept_classes = _classes(retained) if forgotten_classes else set()
    goal = _goal(forgotten_classes, kept_classes, relabelled=corrected is not None)
    classes = len(forgotten_classes | kept_classes)
    guessing = math.log(classes) if classes > 1 else None

    retain_gradient = objective.gradient(sample)
    slope = float((retain_gradient + decay + share * (forget_gradient + decay))[positions] @ change)

    repair, second, repair_solve = 0.0, torch.zeros_like(change), None

    def moved(size: float, repair: float = 0.0) -> Tensor:
        return objective.theta.index_add(0, positions, size * change + repair * second)

    def measure(size: float, repair: float = 0.0) -> Point:
        theta = moved(size, repair)
        losses = objective.all_losses(judged, theta).double()
        retain_loss = objective.mean_loss(sample, theta)
        risk = retain_loss - size * slope
        if corrected is not None:
            risk = (risk + share * objective.mean_loss(corrected, theta)) / (1 + share)
        risk += settings.weight_decay / 2 * float(theta @ theta)
        forgotten = float((losses >= guessing).double().mean()) if guessing is not None else math.nan
        return Point(size, repair, float(losses.mean()), retain_loss, risk, forgotten)

    size, path, forgotten = _choose(step, goal, guessing, measure, notes)
    if forgotten:
        # A step that forgets a class is far from the natural one, where the local model of the retained risk no longer
        # holds. At the new weights it is solved anew, for the gradient that the retained risk has there.
        with objective.progress("Hessian products, at the new weights") as bar:
            there = moved(size)
            slope_there = objective.gradient(sample, there) + settings.weight_decay * there
            again = settings.open_curvature(objective, sample, there, on_product=bar.update)
            # A repair is measured before it is made, so it may be as good as it gets.
            solve = settings.override({"unconverged": "ignore"}).solve
            second, (repaired, *_) = method.edit(again, positions, -slope_there, solve)
        best, measured = restore(measure, next(point for point in path if point.step == size))
        path += measured
        size, repair = best.step, best.repair
        repair_solve = repaired.summary()
        if not repaired.converged:
            notes.append(f"The second solve, for the repair, ended as {str(repaired.status)!r}.")
    total = moved(size, repair)[positions] - objective.theta[positions]
    edit = Edit.plan(objective.module, targets, objective.space, total)
    edited = objective.theta.clone()
    edited[positions] = edit.flat_new(objective.space).to(edited)

    retain_slope = retain_gradient[positions] @ change
    bend -= settings.weight_decay * float(change @ change)  # the loss alone
    solution = max(solutions, key=lambda solution: solution.residual)
    report = UnlearnReport(
        edit=edit,
        goal=goal,
        step=size,
        repair=repair,
        forget=_change(objective, judged, edited, size * forget_gradient[positions] @ change),
        retain=_change(objective, sample, edited, size * retain_slope + size**2 * bend / 2),
        relabelled=None
        if corrected is None or corrected_gradient is None
        else _change(objective, corrected, edited, size * corrected_gradient[positions] @ change),
        n_forget=len(forget),
        n_found=len(found),
        n_retain=len(retained),
        n_parameters=objective.space.size,
        path=path,
        solve=solution.summary(),
        repair_solve=repair_solve,
        residuals=solution.residuals,
        curvature=description,
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
    if not len(found):
        raise TrainingDataError(
            f"None of the {len(forget)} examples to be forgotten is in the training data, by dataset index or by"
            " content: the model was not trained on them, or in another form (random augmentation). In that case give a"
            " DataLoader over a Subset of the training set, or the data to keep as `retain`."
        )
    if len(found) > len(forget):
        notes.append(
            f"The training data hold {len(found)} copies of the {len(forget)} forget examples; all of them are"
            " forgotten."
        )
    if len(found) < len(forget):
        _warn(
            notes,
            f"{len(forget) - len(found)} of the {len(forget)} forget examples were not found in the training data, by"
            " dataset index or by content. If the model was trained on them in another form (random augmentation),"
            " these forms are still among the data to keep: give a DataLoader over a Subset of the training set, or the"
            " data to keep as `retain`.",
        )
    keep = torch.ones(len(train), dtype=torch.bool)
    keep[found] = False
    if not keep.any():
        raise TrainingDataError("All training examples are to be forgotten; nothing would be retained. Train anew.")
    return train.at(keep.nonzero().squeeze(1))


def _without(retain: Examples, forget: Examples, notes: list[str]) -> Examples:
    """The given examples to keep, less those to be forgotten."""
    both = locate(forget, retain)
    if len(both):
        _warn(notes, f"{len(both)} of the examples given as `retain` are to be forgotten; they are not retained.")
    keep = torch.ones(len(retain), dtype=torch.bool)
    keep[both] = False
    if not keep.any():
        raise TrainingDataError("All examples given as `retain` are to be forgotten; nothing would be retained.")
    return retain.at(keep.nonzero().squeeze(1)) if len(both) else retain


def _warn(notes: list[str], text: str) -> None:
    """Says something now and in the report."""
    notes.append(text)
    rank_zero_warn(text, category=GIFWarning)


def _classes(examples: Examples) -> set[int]:
    """The classes of examples; none where they have no classes."""
    found: set[int] = set()
    for batch in examples.batches():
        classes = class_targets(batch.data)
        if classes is not None:
            found.update(classes.unique().tolist())
    return found


def _goal(forgotten: set[int], kept: set[int], *, relabelled: bool) -> Goal:
    if relabelled:
        return Goal.LABELS
    return Goal.CLASS if forgotten and kept and not forgotten & kept else Goal.EXAMPLES


def _choose(
    step: Step, goal: Goal, guessing: float | None, measure: Callable[[float], Point], notes: list[str]
) -> tuple[float, list[Point], bool]:
    """The step, what was measured on the way, and whether a class was searched for and is forgotten there."""
    if step != "search":
        size = 1.0 if step == "natural" else float(step)
        return size, [measure(0.0), measure(size)], False
    if goal is Goal.CLASS and guessing is not None:
        size, path, forgotten = forget_class(measure, guessing)
        if not forgotten:
            _warn(
                notes,
                "The search stopped before the class was forgotten: a larger step would raise the retained loss too"
                " far. Try targets='batch', another selector, or a larger ratio; or give `step` a number.",
            )
        elif path[0].forgotten == 1.0:
            _warn(
                notes,
                "The losses of the class are above that of guessing before any step, so the search cannot tell when it"
                " is forgotten (is the loss a cross-entropy?). The natural step was made; or give `step` a number.",
            )
        return size, path, forgotten
    size, path = minimise_risk(measure, near_natural=goal is Goal.EXAMPLES)
    if size == 0.0:
        _warn(
            notes,
            "The search found no step that lowers the risk on the data that retraining would see; the edit changes"
            " nothing. step='natural' makes the step of the theory all the same.",
        )
    return size, path, False


def _change(objective: Objective, examples: Examples, edited: Tensor, predicted: Tensor | float) -> Change:
    before = objective.mean_loss(examples)
    return Change(before=before, after=objective.mean_loss(examples, edited), predicted=before + float(predicted))
