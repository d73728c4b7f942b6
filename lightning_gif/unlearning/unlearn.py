"""Unlearning: computes an edit of the weights for forget examples."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attribution.report import first_shown
from ..config import AUTO, Settings
from ..curvature.energy import gradient_share
from ..curvature.methods import METHODS
from ..data.examples import Examples
from ..data.identity import check_same_everywhere, contents_digest, data_digest, fingerprints, innermost, locate
from ..data.relabel import relabelled
from ..edit import Edit
from ..errors import ConfigurationError, GIFError, NonFiniteError
from ..objective.objective import Objective
from ..parameters import Targets, state_digest
from ..selection.training_length import TrainingLength
from ..storage.digests import Fingerprint, digest
from .advice import note_cheaper_retraining, warn_cost, warn_refreshed_statistics, warn_unfinished
from .goals import Goal, choose_goal
from .journal import Journal
from .logged import Forgotten
from .outcomes import Outcome, outcomes_at
from .problem import EditProblem
from .protocol import Trial
from .record import Change, EditContext
from .report import UnlearnReport
from .step import MATCH, Step, choose_step, note_unknown_damping, strategy_of
from .strategies import STRATEGIES, Strategy
from .task import Request, Task, all_but, check_new_labels, retained_examples, without_forgotten
from .tuning import Tuning
from .verdict import Evidence, Verdict

__all__ = ["check_tuning", "unlearn"]


# How many pairs of indices a note shows.
_SHOWN_INDICES = 5


def check_tuning(tuning: Tuning | None) -> None:
    """Checks ``tuning``.

    Raises:
        ConfigurationError: If ``tuning`` is not a :class:`Tuning` or ``None``.
    """
    if tuning is not None and not isinstance(tuning, Tuning):
        raise ConfigurationError(
            "`tuning` must be a lightning_gif.unlearning.Tuning, such as"
            f" Tuning(trust_region=TrustRegion(max_halvings=4)), or None for the defaults, got {tuning!r}."
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
    why_not_unseen: str = "",
    step: Step = AUTO,
    matching: Settings | None = None,
    training: TrainingLength | None = None,
    snapshots: Mapping[int, Mapping[str, Tensor]] | None = None,
    refresh_statistics: bool = False,
    solves_to: Path | None = None,
    tuning: Tuning | None = None,
    context: EditContext | None = None,
) -> UnlearnReport:
    """Computes an edit after which the model behaves as if trained without some examples, or with other labels.

    Let ``U`` be the ``m`` forget examples, with ``n − m`` examples retained. The gradient of the influence direction is
    ``g = m/(n−m) ∇ℓ̄(U)`` for removal and ``g = m/(n−m) ∇[ℓ̄(U, old) − ℓ̄(U, new)]`` for relabelling (GIF, arXiv
    2312.05586, section 3). The method turns ``g``, or the gradient of the risk, into a change ``x`` of the targets. A
    strategy decides on the changes and their step sizes, and may solve again at the new weights, see
    :mod:`lightning_gif.unlearning.strategies`. The model is not changed here.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        forget: The ``m`` forget examples, with their labels in training.
        settings: Method, solver and their parameters.
        choose_targets: Returns the target parameters. It is not called if the method changes all parameters.
        relabel: New targets, see :func:`~lightning_gif.data.relabel.relabelled`; ``None`` removes the examples.
        retain: All retained examples; by default the examples of ``train`` that are not forget examples.
        unseen: Examples like the training data that the model was not trained on.
        why_not_unseen: Why the validation data do not serve as such, for a note if the goal would use them.
        step: A strategy, its name, or a number, which is a step size along the influence direction. ``"auto"`` is the
            :attr:`~.goals.Goal.strategy` of the goal, or ``"relinearise"`` if the model or the settings exclude it.
        matching: The settings for the strategy ``"match"``; ``None`` if the settings exclude it.
        training: How far the optimizers of the training could move each parameter; ``None`` if this is not known.
        snapshots: Parameters and buffers by name of the model during training, by epoch. The
            leave-out step uses them.
        refresh_statistics: Recompute the running statistics of BatchNorm over retained and corrected examples.
        solves_to: A folder for the changes, see :class:`~lightning_gif.unlearning.journal.Journal`. By default they are
            not stored, and lost if the call is interrupted.
        tuning: The tuned numbers; ``None`` for the defaults.
        context: The trainer, the model and the audit log, for the report.

    Raises:
        ConfigurationError: If ``solves_to`` holds other files, or solves of other weights, data or settings; if the
            strategy does not return one of its trials.
        BatchError: If the forget or retained examples do not have the structure of the training batches.
        TrainingDataError: If nothing would be retained.
        ObjectiveError: If the loss of the examples does not depend on the targets.
        NonFiniteError: If a loss, a gradient, a product or a new weight is not finite.
        ConvergenceError: See :func:`~lightning_gif.curvature.solve.solve`.
    """
    start = time.perf_counter()
    notes: list[str] = []
    tuning = Tuning() if tuning is None else tuning
    found, request = _make_request(objective, train, forget, settings, relabel, retain, unseen, training, notes)
    goal = choose_goal(request, tuning.goals, notes)
    step, settings = choose_step(step, goal, request, matching, tuning.matching, notes)
    request = replace(request, settings=settings, earlier=dict(snapshots or {}))
    task = _draw_samples(request, goal, tuning, step, why_not_unseen, notes)
    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    data = _describe_data(train, found, request, notes)
    journal = _open_journal(solves_to, task, goal, tuning, targets, str(data["train"]))
    positions = targets.flat(objective.space).to(objective.device)
    strategy = None if isinstance(step, numbers.Real) else strategy_of(step)
    uses_risk = strategy is None or bool(STRATEGIES.declared(strategy, "uses_risk"))
    problem = EditProblem(goal, task, tuning, method, positions, journal, uses_risk=uses_risk)
    chosen = _run_strategy(problem, step)
    if journal is not None and journal.recalled:
        notes.append(f"Solves recalled from {str(solves_to)!r}: {journal.recalled} of {len(problem.solutions)}.")

    context = EditContext() if context is None else context
    is_logged = any(objective.processes.gather(bool(context.loggers)))  # loggers may be in one process only
    forgotten = Forgotten(objective, train, found[: None if is_logged else 0])
    outcome = _realise(problem, task, request, targets, chosen, refresh_statistics)
    verdict = _judge(problem, outcome, strategy)
    _advise(problem, task, outcome, strategy, verdict, notes)
    if outcome.unrefreshed is not None:
        warn_refreshed_statistics(goal, outcome.unrefreshed, outcome.after, notes)
    context.shown = first_shown(request.forget, vocabulary=context.vocabulary)
    context.forgotten = forgotten.rows(data, problem.weights_at(chosen.step_sizes))
    if context.has_optimizer and chosen.is_edit:
        notes.append(
            "The optimizer's state (momentum, averages) is not part of the edit and still depends on the forgotten"
            " data. Create a new optimizer before you train further."
        )
    seconds = time.perf_counter() - start
    note_cheaper_retraining(*objective.processes.broadcast((seconds, task.training.seconds)), notes)
    return _report(problem, task, request, tuning, outcome, verdict, data, notes, seconds, context)


def _open_journal(
    folder: Path | None, task: Task, goal: Goal, tuning: Tuning, targets: Targets, train: str
) -> Journal | None:
    """The journal of the changes in a folder; ``None`` without a folder.

    Args:
        folder: The folder.
        task: The data of the edit.
        goal: The goal.
        tuning: The tuned numbers.
        targets: The target parameters.
        train: A digest of the training data.
    """
    if folder is None:
        return None
    processes = task.objective.processes
    return Journal(folder, processes.broadcast(_fingerprint(task, goal, tuning, targets, train)), processes)


def _make_request(
    objective: Objective,
    train: Examples,
    forget: Examples,
    settings: Settings,
    relabel: Tensor | int | Callable[[Any], Tensor] | None,
    retain: Examples | None,
    unseen: Examples | None,
    training: TrainingLength | None,
    notes: list[str],
) -> tuple[Tensor, Request]:
    """The positions ``(r,)`` of the forget examples in ``train``, and the request; see :func:`unlearn`."""
    objective.check(forget, "forget")
    n_classes = objective.n_classes(forget)
    corrected = None if relabel is None else check_same_everywhere(relabelled(forget, relabel), "new labels")
    if corrected is not None:
        if n_classes is not None and forget.classes is not None:
            check_new_labels(corrected, n_classes)
        objective.check(corrected, "relabelled")
        n_classes = objective.n_classes(corrected) if n_classes is None else n_classes

    found = locate(forget, train)
    retained = (
        retained_examples(train, forget, found, notes) if retain is None else without_forgotten(retain, forget, notes)
    )
    members = max(len(forget), len(found))
    return found, Request(
        objective=objective,
        settings=settings,
        forget=forget,
        relabelled=corrected,
        retained=retained,
        others=retained if retain is None or not len(found) else all_but(train, found),
        unseen=unseen,
        forget_weight=members / len(retained),
        n_classes=n_classes,
        training=TrainingLength() if training is None else training,
    )


def _describe_data(train: Examples, found: Tensor, request: Request, notes: list[str]) -> dict[str, Any]:
    """Indices and digests of the data, see :attr:`~lightning_gif.unlearning.record.EditRecord.data`.

    If there are indices of two datasets, a note shows some of both.
    """
    corrected, indices = request.relabelled, train.ids[found]
    dataset, below = innermost(train.dataset, indices)
    if dataset is not train.dataset:
        pairs = zip(indices.tolist(), below.tolist(), strict=True)
        shown = ", ".join(f"{index} is {inner} there" for index, inner in itertools.islice(pairs, _SHOWN_INDICES))
        notes.append(
            "The training loader draws from a Subset, and dataset indices are positions in it. This report also has the"
            f" indices in the dataset below the Subset: {shown}{' …' if len(indices) > _SHOWN_INDICES else ''}."
        )
    return {
        "indices": indices.tolist(),
        "innermost_indices": None if dataset is train.dataset else below.tolist(),
        "examples": contents_digest(request.forget),
        "train": data_digest(train),
        "relabelled": None if corrected is None else contents_digest(corrected),
    }


def _draw_samples(
    request: Request, goal: Goal, tuning: Tuning, step: Step, why_not_unseen: str, notes: list[str]
) -> Task:
    """The task of a request with a goal."""
    if goal.compares_with_unseen and why_not_unseen:
        notes.append(
            f"The validation data of `fit` are not used as unseen examples: {why_not_unseen.rstrip('.')}. Pass a loader"
            " as `unseen`, or unseen=False."
        )
    n_fit, sizes = goal.sample_size(request.settings), tuning.sample_sizes
    if step == MATCH:
        note_unknown_damping(request, notes)
        sizes = replace(sizes, evaluation=min(sizes.evaluation, tuning.matching.evaluation))
        if isinstance(request.settings.curvature_examples, str):
            # "Random examples removed": with 600 for 5500 forget examples, the edit spoiled the model.
            n_fit = max(tuning.matching.curvature_examples, len(request.forget))
    task = Task.prepare(
        request,
        sizes,
        n_fit=n_fit,
        compares_with_unseen=goal.compares_with_unseen,
        aims_at_unseen=step != MATCH,
        forgotten_classes=goal.forgotten_classes(request),
        notes=notes,
    )
    request.objective.check(task.retain_fit, "retain")
    return task


def _run_strategy(problem: EditProblem, step: Step) -> Trial:
    """The trial that a strategy, or a number, chooses.

    Raises:
        ConfigurationError: If the trial was not evaluated, or no change was computed.
    """
    if isinstance(step, numbers.Real):
        problem.influence_direction()
        return problem.evaluate(float(step))
    chosen = strategy_of(step)(problem)
    if not any(chosen is trial for trial in problem.trials) or not problem.solutions:
        raise ConfigurationError(
            "The strategy must solve for a change (such as problem.influence_direction or problem.leave_out) and return"
            f" one of the trials that it evaluated (problem.evaluate), got {chosen!r} after {len(problem.solutions)}"
            " solves."
        )
    return chosen


@dataclass(frozen=True)
class _Outcome:
    """An edit and its effect.

    Attributes:
        edit: The edit.
        chosen: The trial that it realises.
        memorization: The memorization of the trial; with recomputed running statistics, if there are any.
        before: Mean losses at the trained weights, by name.
        after: Mean losses of the edited model.
        outcomes: The losses and predicted classes of single examples, before and after, by the name of the examples.
        unrefreshed: Mean losses of the edited model with the old running statistics; ``None`` if they are kept.
    """

    edit: Edit
    chosen: Trial
    memorization: float
    before: dict[str, float]
    after: dict[str, float]
    outcomes: dict[str, Outcome]
    unrefreshed: dict[str, float] | None


def _realise(
    problem: EditProblem, task: Task, request: Request, targets: Targets, chosen: Trial, refresh_statistics: bool
) -> _Outcome:
    """The edit that realises a trial. Its losses are measured with the weights in the dtype of the model.

    Raises:
        NonFiniteError: If the forget or the retained loss would not be finite.
        RankError: If the processes computed different weights.
    """
    objective, positions = task.objective, problem.positions
    theta = problem.weights_at(chosen.step_sizes)
    parts = _measured(problem, task, request)
    before, memorization = outcomes_at(objective, parts, objective.theta), chosen.memorization
    unrefreshed = None
    if refresh_statistics:
        unrefreshed = {name: objective.mean_loss(part, theta) for name, part in task.measured.items()}
        kept = [request.retained] if request.relabelled is None else [request.retained, request.relabelled]
        objective.statistics = objective.refreshed_statistics(theta, *kept)
        memorization = problem.memorization_at(theta)
    change = theta[positions] - objective.theta[positions]
    edit = Edit.plan(objective.module, targets, objective.space, change, objective.statistics)
    objective.processes.assert_equal(
        digest({**{f"new/{name}": value for name, value in edit.new.items()}, **edit.indices}),
        "edit",
        "The processes computed different weights from the same sums. Run on machines of one kind, with the same number"
        " of threads (OMP_NUM_THREADS). Nothing was changed.",
    )
    edited = objective.theta.clone()
    edited[positions] = edit.flat_new(objective.space).to(edited)
    after = outcomes_at(objective, parts, edited)
    means = [{name: float(at[name][0].mean()) for name in task.measured} for at in (before, after)]
    for name in ("forget", "retain"):
        if not math.isfinite(means[1][name]):
            raise NonFiniteError(
                f"At step size {chosen.step_size:.3g} the {name} loss would be {means[1][name]}. Nothing was changed."
                " Choose a smaller `step`, or 'search'."
            )
    outcomes = {
        name: Outcome(part.classes, before[name][0], after[name][0], before[name][1], after[name][1])
        for name, part in parts.items()
    }
    first, last = means
    return _Outcome(edit, chosen, memorization, first, last, outcomes, unrefreshed)


def _measured(problem: EditProblem, task: Task, request: Request) -> dict[str, Examples]:
    """The examples on which the edit is measured, by name.

    If the goal does not compare forget with unseen examples, unseen ones are only for pictures: they show what the edit
    did to examples that the model was not trained on. They are left out if their losses cannot be computed.
    """
    parts = task.measured
    if request.unseen is not None and not problem.goal.compares_with_unseen:
        unseen = request.unseen.sample(task.sizes.evaluation, task.settings.seed)
        with contextlib.suppress(GIFError):
            task.objective.check(unseen, "unseen")
            parts["unseen"] = unseen
    return parts


def _judge(problem: EditProblem, outcome: _Outcome, strategy: Strategy | None) -> Verdict | None:
    """Whether the edit worked, by the goal's measure.

    Args:
        problem: The edit problem.
        outcome: The edit and its effect.
        strategy: The strategy; ``None`` for a given step size.
    """
    predicted = {}
    if strategy is not None and STRATEGIES.declared(strategy, "predicts_losses"):
        predicted = problem.predicted_losses(outcome.before, outcome.chosen)
    evidence = Evidence(outcome.outcomes, predicted)
    return problem.goal.verdict(evidence)


def _advise(
    problem: EditProblem,
    task: Task,
    outcome: _Outcome,
    strategy: Strategy | None,
    verdict: Verdict | None,
    notes: list[str],
) -> None:
    """Warns if a strategy missed its target or cost too much, and notes if more solves would have lowered the risk."""
    if strategy is None or not STRATEGIES.declared(strategy, "reports_shortfall"):
        return
    goal, start, chosen = problem.goal, problem.trials[0], outcome.chosen
    warn_unfinished(goal, verdict, notes, is_edit=chosen.is_edit)
    after = outcome.after if outcome.unrefreshed is None else outcome.unrefreshed
    warn_cost(goal, task.scales(start.retain_loss), outcome.before, after, notes)
    max_solves = problem.tuning.relinearisation.max_solves
    repeats_solves = STRATEGIES.declared(strategy, "repeats_solves")
    if repeats_solves and len(chosen.step_sizes) == max_solves and chosen.step_sizes[-1]:
        notes.append(
            f"The last change still lowered the risk, but the edit stopped at the limit of {max_solves} changes"
            " (`max_solves`)."
        )


def _report(
    problem: EditProblem,
    task: Task,
    request: Request,
    tuning: Tuning,
    outcome: _Outcome,
    verdict: Verdict | None,
    data: dict[str, Any],
    notes: list[str],
    seconds: float,
    context: EditContext,
) -> UnlearnReport:
    """The report of an edit, see :class:`~lightning_gif.unlearning.report.UnlearnReport`."""
    predicted = problem.predicted_losses(outcome.before, outcome.chosen)
    changes = {name: Change(outcome.before[name], outcome.after[name], predicted[name]) for name in outcome.before}
    return UnlearnReport(
        edit=outcome.edit,
        goal=problem.goal.name,
        step_sizes=list(outcome.chosen.step_sizes) or [0.0],
        forget=changes["forget"],
        retain=changes["retain"],
        relabelled=changes.get("relabelled"),
        unseen=changes.get("unseen"),
        memorization=(problem.trials[0].memorization, outcome.memorization),
        n_forget=len(request.forget),
        n_found=len(data["indices"]),
        n_retain=len(request.retained),
        n_unseen=0 if task.unseen is None else len(task.unseen),
        n_parameters=task.objective.space.size,
        gradient_share=gradient_share(task.given_gradient[None], problem.positions),
        verdict="" if verdict is None else str(verdict),
        outcomes=outcome.outcomes,
        trials=problem.trials,
        solves=[{**solution.summary(), **used} for solution, used in zip(problem.solutions, problem.used, strict=True)],
        residuals=problem.solutions[0].residuals,
        curvature=problem.description,
        settings={
            **asdict(task.settings),
            "losses": task.objective.loss.origin,
            "snapshots": problem.snapshots,
            "tuning": tuning.record(problem.goal),
        },
        notes=notes,
        seconds=seconds,
        data=data,
        context=context,
    )


def _fingerprint(task: Task, goal: Goal, tuning: Tuning, targets: Targets, train: str) -> Fingerprint:
    """Digests and values of everything that the changes depend on, except the strategy.

    The requests of the strategy are stored with each change.

    Args:
        task: The data of the edit.
        goal: The goal of the edit.
        tuning: All other tuned numbers.
        targets: The target parameters.
        train: The digest of the training data.
    """

    def of(*parts: Examples | None) -> str:
        # The order of the examples matters, because samples are drawn by position.
        marks = [None if part is None else [mark.hex() for mark in fingerprints(part)] for part in parts]
        return digest({str(i): part.ids for i, part in enumerate(parts) if part is not None}, marks)

    damping = task.training.damping(task.objective.space, task.objective.theta)
    return {
        "weights": digest({"theta": task.objective.theta}, state_digest(task.objective.module)),
        "training data": train,
        "the examples to be forgotten, in their order": of(task.forget, task.forget_eval),
        "new labels": of(task.relabelled, task.relabelled_eval),
        "retained examples": digest(
            {"all": task.retained.ids}, [of(task.retain_fit, task.retain_eval), task.forget_weight]
        ),
        "unseen examples": of(task.unseen),
        "goal": str(goal.name),
        "target parameters": digest(dict(targets)),
        "damping of the training": digest({} if damping is None else {"damping": damping}),
        "snapshots": digest(
            {f"{epoch} {name}": value for epoch, state in task.earlier.items() for name, value in state.items()}
        ),
        **tuning.fingerprint(goal),
        **task.settings.fingerprint(),
    }
