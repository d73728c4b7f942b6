"""From the examples to be forgotten to an edit of the weights."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Settings
from ..curvature.methods import METHODS
from ..data.examples import Examples
from ..data.identity import check_same_everywhere, contents_digest, data_digest, fingerprints, locate
from ..data.relabel import relabelled
from ..edit import Edit
from ..errors import ConfigurationError, NonFiniteError
from ..objective.objective import Objective
from ..parameters import Targets, state_digest
from ..storage.digests import Fingerprint, digest
from .advice import warn_cost, warn_refreshed_statistics, warn_unfinished
from .journal import Journal
from .problem import ModelEditProblem
from .protocol import Goal
from .record import Change, EditContext
from .report import UnlearnReport
from .strategies import MOST_SOLVES, STRATEGIES, Strategy
from .task import Task, all_but, check_new_labels, retained_examples, without_forgotten

__all__ = ["Step", "check_step", "unlearn"]


Step = str | float | Strategy


def check_step(step: Step) -> None:
    """Raises a :class:`~lightning_gif.errors.ConfigurationError` unless ``step`` can be made."""
    if isinstance(step, str):
        STRATEGIES[step]
    elif not callable(step) and (
        isinstance(step, bool) or not isinstance(step, numbers.Real) or not math.isfinite(step)
    ):
        raise ConfigurationError(
            f"`step` must be one of {', '.join(map(repr, STRATEGIES))}, a finite number, or a function from a walk to a"
            f" point (see lightning_gif.steps), got {step!r}."
        )


def unlearn(
    objective: Objective,
    train: Examples,
    forget: Examples,
    settings: Settings,
    choose_targets: Callable[[], Targets],
    *,
    relabel: Tensor | int | Callable[[Any], Tensor] | None = None,
    retain: Examples | None = None,
    unseen: Examples | None = None,
    step: Step = "relinearise",
    refresh_statistics: bool = False,
    solves_to: Path | None = None,
    context: EditContext | None = None,
) -> UnlearnReport:
    """Plans the edit after which the model behaves as if it had not seen some examples, or had seen other labels.

    With ``U`` the ``m`` examples and ``n − m`` others retained, the weighted gradient is ``g = m/(n−m) ∇ℓ̄(U)`` for
    removal and ``g = m/(n−m) ∇[ℓ̄(U, old) − ℓ̄(U, new)]`` for relabelling (GIF, arXiv 2312.05586, section 3). The method
    turns it into a change ``x`` of the targets, or the slope of the risk that should become small. A strategy decides
    which, how far to go, and whether to solve anew at the weights that this leads to: see
    :mod:`lightning_gif.unlearning.strategies`. Nothing is written to the model here.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        forget: The ``m`` examples in question, with the labels they were trained with.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all of them.
        relabel: New targets, see :func:`~lightning_gif.data.relabel.relabelled`; ``None`` removes the examples.
        retain: All examples that are retained; by default those of ``train`` that are not found in ``forget``.
        unseen: Examples like the training data that the model was not trained on.
        step: The name of a strategy or one itself, or a number: that multiple of the one change.
        refresh_statistics: Compute the running statistics of BatchNorm anew, over what is retained or corrected.
        solves_to: A folder for what is solved for, see :class:`~lightning_gif.unlearning.journal.Journal`; by default
            it is lost where the call is interrupted.
        context: What the report knows of the trainer.

    Raises:
        ConfigurationError: If ``solves_to`` holds something else, or solves of other weights, data or settings.
        BatchError: If the examples are not structured as training batches are.
        TrainingDataError: If nothing would be retained.
        ObjectiveError: If the loss of the examples does not depend on the targets.
        NonFiniteError: If a loss, a gradient, a product or a new weight is not finite.
        ConvergenceError: See :func:`~lightning_gif.curvature.solve.solve`.
    """
    start = time.perf_counter()
    notes: list[str] = []
    objective.check(forget, "forget")
    corrected = None if relabel is None else check_same_everywhere(relabelled(forget, relabel), "new labels")
    if corrected is not None:
        classes = objective.n_classes(forget)
        if classes is not None and forget.classes is not None:
            check_new_labels(corrected, classes)
        objective.check(corrected, "relabelled")

    found = locate(forget, train)
    retained = (
        retained_examples(train, forget, found, notes) if retain is None else without_forgotten(retain, forget, notes)
    )
    members = max(len(forget), len(found))
    rest = retained if retain is None or not len(found) else all_but(train, found)
    task = Task.prepare(objective, forget, corrected, retained, rest, unseen, settings, members / len(retained), notes)
    objective.check(task.sample, "retain")

    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    processes = objective.processes
    told: dict[str, str | None] = {"examples": contents_digest(forget), "train": data_digest(train)}
    told["relabelled"] = None if corrected is None else contents_digest(corrected)
    journal = None
    if solves_to is not None:
        mark = _fingerprint(objective, task, settings, targets, str(told["train"]))
        journal = Journal(solves_to, processes.broadcast(mark), processes)
    walk = ModelEditProblem(
        objective, task, settings, method, targets.flat(objective.space).to(objective.device), journal
    )
    if isinstance(step, numbers.Real):
        walk.answer()
        chosen = walk.measure(float(step))
    else:
        chosen = (STRATEGIES[step] if isinstance(step, str) else step)(walk)  # type: ignore[operator]
        if not any(chosen is point for point in walk.path) or not walk.solutions:
            raise ConfigurationError(
                f"The strategy must solve for a change (walk.answer or walk.descend) and return one of the points that"
                f" it measured (walk.measure), got {chosen!r} after {len(walk.solutions)} solves."
            )
    if journal is not None and journal.recalled:
        notes.append(f"Changes that were found in {str(solves_to)!r}: {journal.recalled} of {len(walk.solutions)}.")

    moved = walk.moved(chosen.steps)
    before, remembered = walk.losses(objective.theta), chosen.remembered
    predicted = walk.predicted(before, chosen)
    solved_for = None
    if refresh_statistics:
        solved_for = walk.losses(moved)
        kept = [retained] if corrected is None else [retained, corrected]
        objective.statistics = objective.refreshed_statistics(moved, *kept)
        remembered = walk.remembered(moved)
    change = moved[walk.positions] - objective.theta[walk.positions]
    edit = Edit.plan(objective.module, targets, objective.space, change, objective.statistics)
    processes.assert_equal(
        digest({**{f"new/{name}": value for name, value in edit.new.items()}, **edit.indices}),
        "edit",
        "They computed other weights, though from the same sums: run on machines of one kind, with as many threads each"
        " (OMP_NUM_THREADS). Nothing was changed.",
    )
    edited = objective.theta.clone()
    edited[walk.positions] = edit.flat_new(objective.space).to(edited)
    after = walk.losses(edited)
    for name in ("forget", "retain"):
        if not math.isfinite(after[name]):
            raise NonFiniteError(
                f"At step {chosen.step:.3g} the {name} loss would be {after[name]}. Nothing was changed. Choose a"
                " smaller `step`, or 'search'."
            )
    if step != "natural" and not isinstance(step, numbers.Real):
        warn_unfinished(walk, replace(chosen, remembered=remembered), notes)
        if task.goal is Goal.LABELS:
            warn_cost(walk, before, after if solved_for is None else solved_for, notes)
        if step == "relinearise" and len(chosen.steps) == MOST_SOLVES and chosen.steps[-1]:
            notes.append(f"The risk still fell with the last of the {MOST_SOLVES} changes that are solved for at most.")
    if solved_for is not None:
        warn_refreshed_statistics(solved_for, after, notes)
    if context is not None and context.has_optimizer and any(chosen.steps):
        notes.append(
            "The optimizer's state (momentum, averages) is not part of the edit and still remembers the forgotten data:"
            " start a new optimizer before you train on."
        )
    changes = {name: Change(before[name], after[name], predicted[name]) for name in before}
    report = UnlearnReport(
        edit=edit,
        goal=task.goal,
        step_sizes=list(chosen.steps) or [0.0],
        forget=changes["forget"],
        retain=changes["retain"],
        relabelled=changes.get("relabelled"),
        unseen=changes.get("unseen"),
        memorization=(walk.path[0].remembered, remembered),
        n_forget=len(forget),
        n_found=len(found),
        n_retain=len(retained),
        n_unseen=0 if task.unseen is None else len(task.unseen),
        n_parameters=objective.space.size,
        trials=walk.path,
        solves=[solution.summary() for solution in walk.solutions],
        residuals=walk.solutions[0].residuals,
        curvature=walk.description,
        settings=asdict(settings),
        notes=notes,
        seconds=time.perf_counter() - start,
        data={"indices": train.ids[found].tolist(), **told},
        context=context or EditContext(),
    )
    return report


def _fingerprint(objective: Objective, task: Task, settings: Settings, targets: Targets, train: str) -> Fingerprint:
    """What the solves of a walk depend on, but the strategy: that is seen in what it asks for."""

    def of(*parts: Examples | None) -> str:
        # Where samples are drawn by position, order counts.
        marks = [None if part is None else [mark.hex() for mark in fingerprints(part)] for part in parts]
        return digest({str(i): part.ids for i, part in enumerate(parts) if part is not None}, marks)

    return {
        "weights": digest({"theta": objective.theta}, state_digest(objective.module)),
        "training data": train,
        "the examples to be forgotten, in their order": of(task.forget, task.judged),
        "new labels": of(task.corrected, task.amended),
        "retained examples": digest({}, [of(task.sample, task.check), task.share]),
        "unseen examples": of(task.unseen),
        "goal": task.goal.value,
        "target parameters": digest(dict(targets)),
        **settings.fingerprint(),
    }
