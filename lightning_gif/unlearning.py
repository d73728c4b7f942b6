"""From the examples to be forgotten to an edit of the weights."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._compat import rank_zero_warn
from .curvature import METHODS, Combination, Curvature, Group, Losses, Method, Scaled, Solve, Submatrix
from .data import (
    Examples,
    class_targets,
    contents_digest,
    data_digest,
    example_classes,
    find_targets,
    fingerprints,
    locate,
    relabelled,
    strata,
)
from .digests import Fingerprint, digest
from .errors import BatchError, ConfigurationError, GIFWarning, NonFiniteError, ObjectiveError, TrainingDataError
from .journal import Journal
from .objective import Objective
from .parameters import Edit, Targets, state_digest
from .plain import restored_fields
from .reports.unlearning import Change, UnlearnReport
from .sampling import curvature_sample
from .settings import Settings
from .solvers import LinearOperator, Solution
from .steps import MOST_SOLVES, STRATEGIES, Goal, LocalModel, Point, Strategy

__all__ = ["Step", "check_step", "unlearn"]

Step = str | float | Strategy

# The share of a class that may still be predicted as it.
_CLASS_ENOUGH = 0.005

# A threshold on the loss that tells forgotten examples from unseen ones no better than a coin.
_EXAMPLES_ENOUGH = 0.5

# What a forgotten example weighs beside a retained one, where its loss should be that of an unseen one; and from what
# distance on, as a share of the root mean square of all, it is looked at: most were learned like any other.
_EXAMPLES_WEIGHT, _LEARNED_BY_HEART = 8.0, 0.05

# What the unlikelihood of a forgotten class weighs beside the divergence on the retained examples.
_CLASS_WEIGHT = 0.2

# Where more than this is remembered of a class, or of wrong labels, log-odds are far from where they should be.
_FAR = {Goal.CLASS: 0.5, Goal.LABELS: 0.25}

# A step of a class from there need not be as good as the last: this share of the examples for the curvature will do.
_FAR_SHARE = 0.5

# What a corrected example weighs where the retained ones have to keep their predictions. Some of these are still those
# that the wrong labels taught, and hold back what the right ones should undo.
_LABELS_WEIGHT = 8.0

# The share of labels that may be left as they were where a walk ends as steps gain little; a correction that leaves
# more is told to be a poor one.
_LABELS_ENOUGH = 0.2

# How many examples a step is measured on, at most, of each kind.
_MEASURED = 1024

# What forgetting may cost in retained loss: for a class a share of the loss of guessing; for single examples a tenth of
# the way to the loss of unseen ones, at which the others would be forgotten as well, or where there are none of itself,
# or m/(n−m) of it if that is more (the risk, of which a slope is subtracted, may have no lower end). A hundredth of
# itself, or of guessing, is no cost.
_CLASS_BUDGET, _EXAMPLES_BUDGET, _LEAST_BUDGET = 0.05, 0.1, 0.01

# By how much of itself a loss may be larger than it was before that is told.
_WORSE = 0.1

# Fewer examples are too few to tell how well a threshold on their loss tells them from unseen ones.
_FEWEST = 20

# A step that lowers the risk is measured before it is made, so that its curvature need not be known as closely as the
# slope: it is taken over a part of the slope's examples (Byrd et al., SIAM J. Optim. 21, 2011).
_CURVED_SHARE, _LEAST_CURVED = 0.125, 256

# The damping of the first Newton step, as a share of what the curvature makes of the slope; and by what factor it is
# less where this share of the predicted change of the risk came true (Levenberg and Marquardt). It grows as steps are
# cut short.
_DAMPING, _ADAPT, _GOOD = 3e-3, 3.0, 0.75

# The same of the least squares that the labels of a classifier are corrected by, for the size of the slope. Of wrong
# ones that are predicted for certain the Gauss–Newton matrix is next to nothing: on small nets nearly all first steps
# without damping raised the risk, and few with it. Where nothing of a step could be made, there is so many times more
# in the next.
_LABELS_DAMPING, _AFTER_NOTHING = 0.2, 128.0

# Where labels are corrected: how many groups of examples tell the mean square of an entry's gradients, what is added to
# that as a share of the mean over all entries, and the power of it that is in the unit of the entry (Martens: −3/8).
_GROUPS, _NO_GRADIENT, _POWER = 8, 1e-2, -0.25

# Where less than this of a Newton step could be made, or nothing, the damping grows as if it were this.
_SHORTEST = 2.0**-7

# As many of a class in question as this share of the retained examples give the curvature; of corrected ones, as many.
_FORGOTTEN_SHARE = 0.25


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
) -> UnlearnReport:
    """Plans the edit after which the model behaves as if it had not seen some examples, or had seen other labels.

    With ``U`` the ``m`` examples and ``n − m`` others retained, the weighted gradient is ``g = m/(n−m) ∇ℓ̄(U)`` for
    removal and ``g = m/(n−m) ∇[ℓ̄(U, old) − ℓ̄(U, new)]`` for relabelling (GIF, arXiv 2312.05586, section 3). The method
    turns it into a change ``x`` of the targets, or the slope of the risk that should become small. A strategy decides
    which, how far to go, and whether to solve anew at the weights that this leads to: see :mod:`lightning_gif.steps`.
    Nothing is written to the model here.

    Args:
        objective: An open objective.
        train: The ``n`` training examples.
        forget: The ``m`` examples in question, with the labels they were trained with.
        settings: Method, solver and their parameters.
        choose_targets: Called for the target parameters, unless the method changes all of them.
        relabel: New targets, see :func:`~lightning_gif.data.relabelled`; ``None`` removes the examples.
        retain: All examples that are retained; by default those of ``train`` that are not found in ``forget``.
        unseen: Examples like the training data that the model was not trained on.
        step: The name of a strategy or one itself, or a number: that multiple of the one change.
        refresh_statistics: Compute the running statistics of BatchNorm anew, over what is retained or corrected.
        solves_to: A folder for what is solved for, see :class:`~lightning_gif.journal.Journal`; by default it is lost
            where the call is interrupted.

    Raises:
        ConfigurationError: If ``solves_to`` holds something else, or solves of other weights, data or settings.
        BatchError: If the examples are not structured as training batches are.
        TrainingDataError: If nothing would be retained.
        ObjectiveError: If the loss of the examples does not depend on the targets.
        NonFiniteError: If a loss, a gradient, a product or a new weight is not finite.
        ConvergenceError: See :meth:`~lightning_gif.settings.Settings.solve`.
    """
    start = time.perf_counter()
    notes: list[str] = []
    objective.check(forget, "forget")
    corrected = None if relabel is None else relabelled(forget, relabel).agreed("new labels")
    if corrected is not None:
        classes = objective.n_classes(forget)
        if classes is not None and example_classes(forget) is not None:
            _check_classes(corrected, classes)
        objective.check(corrected, "relabelled")

    found = locate(forget, train)
    retained = _retained(train, forget, found, notes) if retain is None else _without(retain, forget, notes)
    members = max(len(forget), len(found))
    rest = retained if retain is None or not len(found) else _others(train, found)
    task = _Task.prepare(objective, forget, corrected, retained, rest, unseen, settings, members / len(retained), notes)
    objective.check(task.sample, "retain")

    method = METHODS[settings.method]
    targets = method.targets(objective.space, choose_targets)
    ranks = objective.ranks
    told: dict[str, str | None] = {"examples": contents_digest(forget), "train": data_digest(train)}
    told["relabelled"] = None if corrected is None else contents_digest(corrected)
    journal = None
    if solves_to is not None:
        mark = _fingerprint(objective, task, settings, targets, str(told["train"]))
        journal = Journal(solves_to, ranks.first(mark), ranks)
    walk = _Walk(objective, task, settings, method, targets.flat(objective.space).to(objective.device), journal)
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
    ranks.agree(
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
        _tell(walk, replace(chosen, remembered=remembered), notes)
        if task.goal is Goal.LABELS:
            _tell_cost(walk, before, after if solved_for is None else solved_for, notes)
        if step == "relinearise" and len(chosen.steps) == MOST_SOLVES and chosen.steps[-1]:
            notes.append(f"The risk still fell with the last of the {MOST_SOLVES} changes that are solved for at most.")
    if solved_for is not None:
        _tell_refreshed(solved_for, after, notes)
    changes = {name: Change(before[name], after[name], predicted[name]) for name in before}
    report = UnlearnReport(
        edit=edit,
        goal=task.goal,
        steps=list(chosen.steps) or [0.0],
        forget=changes["forget"],
        retain=changes["retain"],
        relabelled=changes.get("relabelled"),
        unseen=changes.get("unseen"),
        remembered=(walk.path[0].remembered, remembered),
        n_forget=len(forget),
        n_found=len(found),
        n_retain=len(retained),
        n_unseen=0 if task.unseen is None else len(task.unseen),
        n_parameters=objective.space.size,
        path=walk.path,
        solves=[solution.summary() for solution in walk.solutions],
        residuals=walk.solutions[0].residuals,
        curvature=walk.description,
        settings=asdict(settings),
        notes=notes,
        seconds=time.perf_counter() - start,
        data={"indices": train.ids[found].tolist(), **told},
    )
    return report


def _check_classes(corrected: Examples, classes: int) -> None:
    """Raises a :class:`~lightning_gif.errors.BatchError` for a new label that is none of the predicted classes."""
    for batch in corrected.mine():
        new = find_targets(batch.data)
        wrong = None if new is None else new[(new < 0) | (new >= classes)]
        if wrong is not None and wrong.numel():
            raise BatchError(
                f"`relabel` has the class {wrong[0].item()}, but the model predicts {classes}: 0 to {classes - 1}."
            )


def _fingerprint(objective: Objective, task: _Task, settings: Settings, targets: Targets, train: str) -> Fingerprint:
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


@dataclass(frozen=True)
class _Task:
    """What an edit is for and the data that it is decided on.

    Attributes:
        goal: See :class:`~lightning_gif.steps.Goal`.
        forget: The examples in question.
        judged: Those of them whose losses are looked at.
        corrected: Those in question with their new labels; ``None`` for removal.
        amended: Those of them that steps are measured on.
        sample: The retained examples that the curvature is taken over.
        check: The retained examples that steps are measured on: others, where there are enough.
        unseen: Examples that the model was not trained on; ``None`` where there are none, or the goal needs none.
        share: ``m/(n−m)``, the weight of the forgotten examples.
        gone: A mask ``(C,)`` over the classes that are predicted, true for those to be forgotten; ``None`` for single
            examples, and where it is not known what is predicted.
    """

    goal: Goal
    forget: Examples
    judged: Examples
    corrected: Examples | None
    amended: Examples | None
    sample: Examples
    check: Examples
    unseen: Examples | None
    share: float
    gone: Tensor | None

    @classmethod
    def prepare(
        cls,
        objective: Objective,
        forget: Examples,
        corrected: Examples | None,
        retained: Examples,
        rest: Examples,
        unseen: Examples | None,
        settings: Settings,
        share: float,
        notes: list[str],
    ) -> _Task:
        if corrected is None:
            goal, gone = _goal_of_removal(objective, forget, rest, notes)
        else:
            goal, predicted = Goal.LABELS, objective.n_classes(corrected)
            gone = None if predicted is None else torch.zeros(predicted, dtype=torch.bool, device=objective.device)
        memory, seed = settings.bytes_to_keep(objective) / 4, settings.seed
        count = settings.sample_size(without_a_class=goal is Goal.CLASS)
        measured = _MEASURED if count is None else min(count, _MEASURED)
        sample = curvature_sample(objective, retained, count, settings.curvature_sampling, seed)
        # A solve lowers the loss of the examples that it sees more than that of others like them, so steps are measured
        # on others.
        taken = torch.isin(retained.ids, sample.ids).nonzero().squeeze(1)
        left = len(retained) - len(taken)
        check = _others(retained, taken) if left and left >= min(len(sample), measured) // 2 else sample

        judged = forget.sample(measured, seed)
        compared = None
        if unseen is not None and goal is Goal.EXAMPLES:
            if min(len(forget), len(unseen)) >= _FEWEST:
                compared = unseen.sample(count, seed).held(memory)
                objective.check(compared, "unseen")
            else:
                notes.append(
                    f"Fewer than {_FEWEST} examples are too few to compare with unseen ones, or to compare others with:"
                    " how far to go is told by the theory and by the risk on what is retained."
                )
        return cls(
            goal=goal,
            forget=forget,
            judged=judged.held(memory),
            corrected=corrected,
            amended=None if corrected is None else corrected.sample(measured, seed),
            sample=sample.held(memory),
            check=check.sample(measured, seed).held(memory),
            unseen=compared,
            share=share,
            gone=gone,
        )


def _goal_of_removal(
    objective: Objective, forget: Examples, rest: Examples, notes: list[str]
) -> tuple[Goal, Tensor | None]:
    """What a removal is for, and a mask over the predicted classes, true for those to be forgotten.

    Args:
        objective: An open objective.
        forget: The examples in question.
        rest: All training examples that stay, whatever is given as retained.
        notes: Of the report.
    """
    gone, kept = example_classes(forget), example_classes(rest)
    if gone is None or kept is None or torch.isin(gone, kept).any():
        return Goal.EXAMPLES, None
    predicted = objective.n_classes(forget)
    if predicted is None or objective.n_classes(rest) != predicted:
        _warn(
            notes,
            "All examples of a class are to be forgotten, but it cannot be seen what the model predicts: its loss does"
            " not call F.cross_entropy (or F.nll_loss) with one row of logits for each example and the labels of the"
            " batch. They are removed as single examples are, and may still be predicted as their class.",
        )
        return Goal.EXAMPLES, None
    mask = torch.zeros(predicted, dtype=torch.bool, device=objective.device)
    mask[gone.unique().long()] = True
    return Goal.CLASS, mask


@dataclass(frozen=True)
class _Of:
    """A function of what a model gives for each example, as :class:`~lightning_gif.curvature.Losses`.

    Attributes:
        outputs: From parameters and a batch to that: the objective's logits ``(B, C)``, or its losses ``(B,)``.
        function: From that and the batch to the sum over its examples.
    """

    outputs: Callable[[Tensor, Any], Tensor]
    function: Callable[[Tensor, Any], Tensor]

    def loss_sum(self, theta: Tensor, data: Any) -> Tensor:
        return self.function(self.outputs(theta, data), data)

    def loss_sum_at(self, theta: Tensor, data: Any) -> Callable[[Tensor], Tensor]:
        return lambda outputs: self.function(outputs, data)


class _Expecting(NamedTuple):
    """A prepared batch, and what is to be predicted for its examples: probabilities ``(B, C)``."""

    data: Any
    expected: Tensor


@dataclass(frozen=True)
class _Ranked:
    """``(t − ℓ)²/(2σ)`` of a loss.

    ``t`` is the loss that an example should have: that of the unseen one of its class whose rank there is its own among
    the forgotten ones, with the trained weights (the transport of one distribution to the other that keeps the order).

    Attributes:
        objective: Whose losses.
        groups: By class, the losses of the forgotten examples and of the unseen ones with the trained weights, sorted.
        size: ``σ``.
    """

    objective: Objective
    groups: dict[int, tuple[Tensor, Tensor]]
    size: float = 1.0

    def wanted(self, losses: Tensor, classes: Tensor) -> Tensor:
        """``t`` ``(B,)`` for losses ``(B,)`` with the trained weights; these themselves where nothing is to compare."""
        found = losses.clone()
        for label, (forgotten, unseen) in self.groups.items():
            here = classes == label
            mine = losses[here]
            found[here] = torch.quantile(unseen, _rank(mine, forgotten))
        return found

    def sum(self, losses: Tensor, data: Any) -> Tensor:
        """Over a batch, whose losses ``(B,)`` are now these."""
        with torch.no_grad():
            trained = self.objective.losses(self.objective.theta, data)
            classes = class_targets(data)
            wanted = self.wanted(trained, torch.zeros_like(trained, dtype=torch.long) if classes is None else classes)
        return (wanted - losses).square().sum() / (2 * self.size)


def _rank(values: Tensor, among: Tensor) -> Tensor:
    """Where ``values`` stand among others ``(m,)``, sorted, from 0 to 1: of equal ones in the middle.

    In between it is linear: what is computed anew in other batches may differ by rounding, and still stand there.
    """
    levels, counts = among.unique_consecutive(return_counts=True)
    heights = (counts.cumsum(0) - counts / 2).to(values) / len(among)
    if len(levels) == 1:
        return heights.expand(len(values))
    above = torch.searchsorted(levels, values).clamp(1, len(levels) - 1)
    way = (values - levels[above - 1]) / (levels[above] - levels[above - 1])
    return torch.lerp(heights[above - 1], heights[above], way.clamp(0, 1))


@dataclass(frozen=True)
class _Term:
    """A part of the risk: the mean of a function of examples, less a slope in it that no edit should answer.

    Attributes:
        weight: In the risk.
        seen: The examples that solves see.
        measured: The examples that steps are measured on.
        curved: How many of those seen give the curvature, near the end of the walk.
        losses: The function; the training loss where it is the objective itself.
        bound: What has the curvature of a parabola above the function, for where that of its own leads nowhere.
        left_seen: The slope ``(p,)`` that is subtracted, over those seen.
        left_measured: The same over those measured.
    """

    weight: float
    seen: Examples
    measured: Examples
    curved: int
    losses: Losses
    bound: Losses | None = None
    left_seen: Tensor | None = None
    left_measured: Tensor | None = None


@dataclass(frozen=True)
class _Told:
    """What a journal keeps beside a change.

    Attributes:
        slope: Of the local model along the change.
        bend: Likewise.
        solution: The record of the solve.
        curvature: How its products were made.
        newton: Whether it was a Newton step.
        damping: That of Newton steps.
    """

    slope: float
    bend: float
    solution: dict[str, Any]
    curvature: dict[str, Any]
    newton: bool
    damping: float


class _Walk:
    """The weights on their way, see :class:`~lightning_gif.steps.Walk`.

    Args:
        objective: An open objective.
        task: What the way is for.
        settings: Method, solver and their parameters.
        method: The method that is named there.
        positions: The targets ``(k,)``.
        journal: Where changes are kept; ``None`` for nowhere.

    Raises:
        ObjectiveError: If the new labels are the old ones; from a solve, if the examples do not depend on the targets.
    """

    def __init__(
        self,
        objective: Objective,
        task: _Task,
        settings: Settings,
        method: Method,
        positions: Tensor,
        journal: Journal | None = None,
    ) -> None:
        self.goal, self.positions = task.goal, positions
        self.path: list[Point] = []
        self.solutions: list[Solution] = []
        self.description: dict[str, Any] = {}
        self._objective, self._task, self._settings, self._method = objective, task, settings, method
        self._journal = journal
        self._changes: list[Tensor] = []
        self._answer: tuple[int, LocalModel] | None = None  # which change it is
        self._damping = _DAMPING
        self._expected: tuple[Point, LocalModel] | None = None  # of a Newton step
        # The classes of the judged and of the unseen examples.
        self._strata = None if task.unseen is None else (strata(task.judged), strata(task.unseen))

        if task.corrected is not None and not self._gradient.any():
            raise ObjectiveError("The new labels are those that the examples have: there is nothing to correct.")
        self._terms = self._risk()
        self.enough, self.affordable = self._limits(self.measure())

    # Slopes of the loss at the trained weights, ``(p,)``, which not every way asks for.

    @cached_property
    def _old(self) -> Tensor:
        return self._objective.gradient(self._task.forget)

    @cached_property
    def _new(self) -> Tensor | None:
        return None if self._task.corrected is None else self._objective.gradient(self._task.corrected)

    @cached_property
    def _retain_slope(self) -> Tensor:
        return self._objective.gradient(self._task.check)

    @cached_property
    def _gradient(self) -> Tensor:
        """``g`` of the theory."""
        # Weight decay does not become less where fewer examples are in the mean, so each loss carries its share of it.
        decay = self._settings.weight_decay * self._objective.theta
        return self._task.share * (self._old + decay if self._new is None else self._old - self._new)

    def _risk(self) -> list[_Term]:
        """What the risk is made of, see :class:`~lightning_gif.steps.Goal`."""
        objective, task, settings = self._objective, self._task, self._settings
        curved = max(math.ceil(_CURVED_SHARE * len(task.sample)), _LEAST_CURVED)
        if task.gone is not None:
            seen = task.sample.mapped(self._expecting)
            measured = seen if task.check is task.sample else task.check.mapped(self._expecting)
            kept = _Term(1.0, seen, measured, curved, _Of(self._logits, self._divergence))
        elif task.goal is Goal.LABELS:
            kept = _Term(1.0, task.sample, task.check, curved, objective)
        else:
            # The slope that training left in the risk on all data, as the two samples of the retained data show it.
            left = task.share * self._old + (1 + task.share) * settings.weight_decay * objective.theta
            left_seen = left_measured = self._retain_slope + left
            if task.check is not task.sample:
                left_seen = objective.gradient(task.sample) + left
            kept = _Term(
                1.0, task.sample, task.check, curved, objective, left_seen=left_seen, left_measured=left_measured
            )
        if task.goal is Goal.CLASS:
            unlikely, bound = _Of(objective.logits, self._unlikelihood), _Of(objective.logits, self._bound)
            few = math.ceil(_FORGOTTEN_SHARE * curved)
            return [kept, _Term(_CLASS_WEIGHT, task.judged, task.judged, few, unlikely, bound)]
        if task.corrected is None or task.amended is None:
            return [kept, *self._learned_by_heart(curved)]
        if task.gone is None:
            return [kept, _Term(task.share, task.corrected, task.amended, curved, objective)]
        right = _Of(objective.logits, self._cross_entropy)
        return [kept, _Term(_LABELS_WEIGHT * task.share, task.corrected, task.amended, curved, right)]

    def _learned_by_heart(self, curved: int) -> list[_Term]:
        """What of the risk is about single examples whose loss is less than that of the unseen ones of their rank."""
        objective, task = self._objective, self._task
        if task.unseen is None or self._strata is None:
            return []
        losses, unseen = objective.all_losses(task.forget), objective.all_losses(task.unseen)
        mine, others = strata(task.forget).to(losses.device), self._strata[1].to(losses.device)
        groups = {
            int(label): (losses[mine == label].sort().values, unseen[others == label].sort().values)
            for label in mine.unique()
            if (others == label).any()
        }
        lacking = (_Ranked(objective, groups).wanted(losses, mine) - losses).clamp_min(0)
        short = (lacking > _LEARNED_BY_HEART * lacking.square().mean().sqrt()).nonzero().squeeze(1)
        if not len(short):
            return []
        ranked = _Ranked(objective, groups, float(lacking[short].square().mean().sqrt()))
        settings = self._settings
        these = task.forget.at(short.cpu()).sample(settings.sample_size(), settings.seed)
        these = these.held(settings.bytes_to_keep(objective) / 4)
        weight = _EXAMPLES_WEIGHT * task.share * len(short) / len(task.forget)
        return [_Term(weight, these, these, curved, _Of(objective.losses, ranked.sum))]

    @property
    def _decay(self) -> float:
        """That of the risk; where predictions are to stay, they stay as weight decay has left them."""
        return self._settings.weight_decay * sum(term.weight for term in self._terms if term.losses is self._objective)

    def _limits(self, start: Point) -> tuple[float | None, float]:
        task = self._task
        if task.goal is Goal.CLASS:
            return _CLASS_ENOUGH, start.retain_loss + self._guessing(len(self._gone), _CLASS_BUDGET)
        if task.goal is Goal.LABELS and task.gone is not None:
            return _LABELS_ENOUGH, math.inf
        if task.unseen is not None and not math.isnan(start.remembered):
            # Nothing is forgotten at no cost at all, even where unseen losses are no larger.
            least = _LEAST_BUDGET * abs(start.retain_loss)
            budget = max(_EXAMPLES_BUDGET * (self._objective.mean_loss(task.unseen) - start.retain_loss), least)
            return _EXAMPLES_ENOUGH, start.retain_loss + budget
        if task.goal is Goal.EXAMPLES:
            classes = self._objective.n_classes(task.judged)
            least = self._guessing(classes, _LEAST_BUDGET) if classes else 0.0
            # Without a large share of the data even what is best costs more than that: weight decay weighs more.
            share = max(_EXAMPLES_BUDGET, task.share)
            return None, start.retain_loss + max(share * abs(start.retain_loss), least)
        return None, math.inf

    def tolerated(self, retain: float, gained: float) -> float:
        """What corrected labels may cost in retained loss before it is told.

        Args:
            retain: The retained loss before.
            gained: By how much that of the corrected examples became less.
        """
        classes = 0.0 if self._task.gone is None else self._guessing(len(self._gone), _CLASS_BUDGET)
        return max(_WORSE * abs(retain), _WORSE * self._task.share * gained, classes)

    def _guessing(self, classes: int, share: float) -> float:
        """A share of the loss of guessing one of so many classes, in the unit of the loss."""
        return share * math.log(classes) * self._nat

    @cached_property
    def _nat(self) -> float:
        """What a nat of cross-entropy is in the unit of the loss, as the retained examples tell, and at most 1.

        A loss may be multiplied by anything; or have more to it than cross-entropy, and then is no measure.
        """
        objective = self._objective

        def cross_entropy(logits: Tensor, data: Any) -> Tensor:
            known = class_targets(data) is not None  # the loss may leave labels out that are none
            return self._cross_entropy(logits, data) if known else logits.new_zeros(())

        entropy = objective.mean(self._task.check, _Of(objective.logits, cross_entropy).loss_sum, objective.theta)
        loss = self.path[0].retain_loss
        return loss / entropy if 0 < loss < entropy else 1.0

    def moved(self, steps: tuple[float, ...]) -> Tensor:
        """The weights ``(p,)`` at a point."""
        if len(steps) > len(self._changes):
            raise ConfigurationError(
                f"{len(steps)} steps were given, but {len(self._changes)} changes were solved for (walk.answer and"
                " walk.descend)."
            )
        theta = self._objective.theta.clone()
        for size, change in zip(steps, self._changes, strict=False):
            theta.index_add_(0, self.positions, size * change)
        return theta

    def measure(self, *steps: float) -> Point:
        objective = self._objective
        theta = self.moved(steps)
        forget, retain, parts, remembered = self._looked_at(theta)
        risk = self._decay / 2 * float(theta @ theta)
        for term, value in zip(self._terms, parts, strict=True):
            left = 0.0 if term.left_measured is None else float(term.left_measured @ (theta - objective.theta))
            risk += term.weight * (value - left)
        point = Point(tuple(map(float, steps)), forget, retain, risk, remembered)
        self.path.append(point)
        if len(self.path) == 1 and not math.isfinite(risk):
            raise NonFiniteError(
                f"The risk at the trained weights is {risk}: a loss or a prediction is not finite, or too large for"
                " float32 (try double=True). Nothing was changed."
            )
        return point

    def _looked_at(self, theta: Tensor) -> tuple[float, float, list[float], float]:
        """The mean losses of the judged and of the retained examples, that of each term, and what is remembered."""
        objective, task = self._objective, self._task
        if task.gone is None:
            losses = objective.all_losses(task.judged, theta).double()
            retain = objective.mean_loss(task.check, theta)
            parts = []
            for term in self._terms:
                same = term.measured is task.check and term.losses is objective  # as what has just been looked at
                parts.append(retain if same else objective.mean(term.measured, term.losses.loss_sum, theta))
            return float(losses.mean()), retain, parts, self.remembered(theta, losses)
        # All of it is made of what one pass over each of the examples gives.
        retained = self._terms[0].measured
        asked: list[tuple[Examples, Callable[[Tensor, Any], Tensor] | None]] = [(task.judged, None), (retained, None)]
        asked += [(term.measured, term.losses.function) for term in self._terms if isinstance(term.losses, _Of)]
        asked.append(self._memory)
        sums = [0.0] * len(asked)
        with torch.no_grad():
            for examples in {id(these): these for these, _ in asked}.values():
                for batch in examples.mine():
                    data = batch.data.data if isinstance(batch.data, _Expecting) else batch.data
                    loss, logits = objective.loss_and_logits(theta, data)
                    for position, (these, function) in enumerate(asked):
                        if these is examples:
                            value = loss if function is None else function(logits, batch.data)
                            sums[position] += float(value) / len(these)
        sums = objective.ranks.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        return sums[0], sums[1], sums[2:-1], sums[-1]

    @property
    def _memory(self) -> tuple[Examples, Callable[[Tensor, Any], Tensor]]:
        """Which examples tell what is remembered of classes, and what of their logits does, summed over a batch."""
        task = self._task
        return (task.judged, self._predicted) if task.amended is None else (task.amended, self._wrong)

    def remembered(self, theta: Tensor, losses: Tensor | None = None) -> float:
        """See :class:`~lightning_gif.steps.Point`; the losses of the judged examples where they are known."""
        task = self._task
        if task.gone is not None:
            examples, function = self._memory
            return self._objective.mean(examples, _Of(self._objective.logits, function).loss_sum, theta)
        if task.unseen is None or self._strata is None:
            return math.nan
        losses = self._objective.all_losses(task.judged, theta).double() if losses is None else losses
        unseen = self._objective.all_losses(task.unseen, theta).double().cpu()
        told, pairs = 0.0, 0
        for label in self._strata[1].unique():
            mine, others = (part[of == label] for part, of in zip((losses.cpu(), unseen), self._strata, strict=True))
            if len(mine):
                others = others.sort().values
                above = len(others) - torch.searchsorted(others, mine, right=True)
                equal = torch.searchsorted(others, mine, right=True) - torch.searchsorted(others, mine)
                told += float((above + equal / 2).double().sum()) / len(others)
                pairs += len(mine)
        return told / pairs if pairs else math.nan

    def _predicted(self, logits: Tensor, data: Any) -> Tensor:
        """How many are predicted as one of the classes in question."""
        return self._gone[logits.argmax(1)].double().sum()

    def _wrong(self, logits: Tensor, data: Any) -> Tensor:
        """How many are predicted as another class than that of their label."""
        return (logits.argmax(1) != _labels(data)).double().sum()

    def _expecting(self, data: Any) -> _Expecting:
        """With what the trained model predicts, the classes in question ruled out."""
        with torch.no_grad():
            trained = self._objective.logits(self._objective.theta, data)
            return _Expecting(data, torch.where(self._gone, -math.inf, trained).softmax(1))

    def _logits(self, theta: Tensor, batch: _Expecting) -> Tensor:
        return self._objective.logits(theta, batch.data)

    # What the risk is made of where predictions are known, each summed over a batch.

    def _divergence(self, logits: Tensor, batch: _Expecting) -> Tensor:
        """``KL(expected ‖ p)``."""
        found = logits.log_softmax(1).masked_fill(batch.expected == 0, 0.0)  # the logits of a masked class are −∞
        return (torch.special.entr(batch.expected).neg() - batch.expected * found).sum()

    def _cross_entropy(self, logits: Tensor, data: Any) -> Tensor:
        """``−log p`` of the labels, whatever else the training loss does to it."""
        return F.cross_entropy(logits, _labels(data), reduction="sum")

    def _unlikelihood(self, logits: Tensor, data: Any) -> Tensor:
        """``−log(1 − p)`` with ``p`` the probability of the classes in question, from its log-odds."""
        return F.softplus(self._log_odds(logits)).sum()

    def _bound(self, logits: Tensor, data: Any) -> Tensor:
        """The quadratic part of the parabola that :func:`bound_curvature` is of, around the present log-odds."""
        log_odds = self._log_odds(logits)
        at = log_odds.detach()
        return (bound_curvature(at) / 2 * (log_odds - at).square()).sum()

    def _log_odds(self, logits: Tensor) -> Tensor:
        return logits[:, self._gone].logsumexp(1) - logits[:, ~self._gone].logsumexp(1)

    @property
    def _gone(self) -> Tensor:
        assert self._task.gone is not None  # else nothing is asked that is made of predictions
        return self._task.gone

    def _solved(self, asked: list[Any], solve: Callable[[], tuple[LocalModel, bool]]) -> tuple[LocalModel, bool]:
        """The local model along a further change, and whether that is a Newton step: solved for, or from the journal.

        Args:
            asked: What for, and at which point: steps along the changes before, which are part of the question.
            solve: Does it.
        """
        journal, position = self._journal, len(self._changes)
        if journal is None:
            return solve()
        start = self.path[0]  # where a loss that is another one shows, with the same weights and data
        seen = [f"{value:.4g}" for value in (start.forget_loss, start.retain_loss, start.risk)]
        asked = [*asked, *seen, digest({str(number): change for number, change in enumerate(self._changes)})]
        found = journal.recall(position, asked, len(self.positions))
        if found is None:
            model, newton = solve()
            solution = self.solutions[-1].record()
            told = _Told(model.slope, model.bend, solution, self.description, newton, self._damping)
            journal.keep(position, asked, self._changes[-1], asdict(told))
            return model, newton
        change, record = found
        with journal.damage_is_told(position):
            told = _Told(**restored_fields(_Told, record))
            recalled = Solution.of_record(told.solution)
            if not all(map(math.isfinite, (told.slope, told.bend, told.damping))) or told.damping <= 0:
                raise ValueError(f"it tells of slope {told.slope}, bend {told.bend} and damping {told.damping}")
        self._settings.judge([recalled])
        self.solutions.append(recalled)
        self._changes.append(change.to(self._objective.theta))
        self.description, self._damping = self.description or told.curvature, told.damping
        return LocalModel(told.slope, told.bend), told.newton

    def answer(self) -> LocalModel:
        model, _ = self._solved(["answer"], self._solve_answer)
        self._answer = len(self._changes) - 1, model
        return model

    def descend(self, at: Point) -> LocalModel:
        model, newton = self._solved(["descend", *at.steps], partial(self._solve_descent, at))
        self._expected = (at, model) if newton else None
        return model

    def _solve_answer(self) -> tuple[LocalModel, bool]:
        objective, task, settings = self._objective, self._task, self._settings
        with objective.progress("Hessian products") as bar:
            opened = partial(settings.open_curvature, objective, on_product=bar.update)
            curvature = opened(task.sample)
            new = None if task.amended is None else opened(task.amended, keep=False)
            group = Group(task.share / (1 + task.share), opened(task.judged, keep=False), new)
            bend = self._take(curvature, self._gradient, settings.solve, group)
            curvature.warn_if_zero()
            self.description = self.description or settings.describe(curvature)
        slope = self._decay * objective.theta
        for term in self._terms:
            of_term = objective.gradient(term.measured, loss_sum=term.losses.loss_sum)
            slope = slope + term.weight * (of_term if term.left_measured is None else of_term - term.left_measured)
        return LocalModel(float(slope[self.positions] @ self._changes[-1]), bend), False

    def _solve_descent(self, at: Point) -> tuple[LocalModel, bool]:
        objective, settings = self._objective, self._settings
        there = self.moved(at.steps)
        slope, curvatures = self._decay * there, list[tuple[float, Curvature]]()
        gradients = torch.zeros_like(slope) if self.goal is Goal.LABELS else None
        far, steps = at.remembered > _FAR.get(self.goal, math.inf), self._for_one_of_many
        with objective.progress("Hessian products, at the new weights") as bar:
            for term in self._terms:
                of_term = objective.gradient(term.seen, there, term.losses.loss_sum)
                slope = slope + term.weight * (of_term if term.left_seen is None else of_term - term.left_seen)
                curved = math.ceil(_FAR_SHARE * term.curved) if far and self.goal is Goal.CLASS else term.curved
                part = term.seen.sample(curved, settings.seed + len(self._changes))
                part = part.held(settings.bytes_to_keep(objective) / 4)
                losses = term.bound if term.bound is not None and self._changes and far else term.losses
                decay = 0.0 if curvatures else self._decay  # of the whole risk, in the first term, whose weight is 1
                curvature = steps.open_curvature(
                    objective, part, there, losses=losses, weight_decay=decay, on_product=bar.update
                )
                curvatures.append((term.weight, curvature))
                if gradients is not None:
                    gradients += term.weight * self._squares(part, there, term.losses)
            whole, units = Combination(*curvatures), self._units(gradients)
            newton = bool(self._changes) and not far
            if newton:
                bend = self._newton(whole, -slope, at, units)
            else:
                # What nothing came of is behind what leads here; the change of the theory was no step of these.
                behind = len(self._changes) - len(at.steps)
                behind -= self._answer is not None and self._answer[0] >= len(at.steps)
                relative = _LABELS_DAMPING * _AFTER_NOTHING**behind
                solve = partial(steps.solve_damped, relative) if self._convex else steps.solve
                bend = self._take(whole, -slope, solve, units=units)
            self.description = self.description or steps.describe(curvatures[0][1])
        return LocalModel(float(slope[self.positions] @ self._changes[-1]), bend), newton

    @property
    def _for_one_of_many(self) -> Settings:
        return self._settings.for_one_of_many(labels=self.goal is Goal.LABELS, convex=self._convex)

    @property
    def _convex(self) -> bool:
        """Whether labels are corrected and predictions are known: the risk is convex in these.

        Then its Gauss–Newton matrix has no negative eigenvalues.
        """
        return self.goal is Goal.LABELS and self._task.gone is not None

    def _squares(self, examples: Examples, theta: Tensor, losses: Losses) -> Tensor:
        """About the mean square of the gradients of single examples, ``(p,)``.

        It is that of the mean gradients of a few groups, times the size of these, and what is expected of it where the
        gradients of examples are independent and their mean is small; the mean counts for more. It costs one pass over
        what is held in memory.
        """
        groups = examples.dealt_out(min(_GROUPS, max(len(examples) // 2, 1)))
        total = torch.zeros_like(theta)
        for group in groups:
            total += len(group) * self._objective.gradient(group, theta, losses.loss_sum).square()
        return total / len(groups)

    def _units(self, gradients: Tensor | None) -> Tensor:
        """What a solve counts the change of an entry in, ``(p,)``.

        First there is the root mean square of the parameter that it belongs to in that of all, at least 1: a solve of a
        few steps moves most what has the largest gradients, which in a net with normalisation is what has the smallest
        weights, and in these units it is shares of the weights that are moved.

        Where labels are corrected that is multiplied by a power of the size of the entry's own gradients. Few steps get
        further so, as with the preconditioner of Martens (ICML 2010), section 4.7. A class that is predicted for
        certain has no gradients that would tell, and is forgotten in more steps with it than without.

        Args:
            gradients: The mean square of each entry's gradients, see :meth:`_squares`.
        """
        theta = self._objective.theta
        whole = theta.square().mean().sqrt()
        parts = self._objective.space.unflatten(theta).values()
        sizes = torch.cat([part.square().mean().sqrt().expand(part.numel()) for part in parts])
        shares = (sizes / whole).clamp_min(1.0) if whole > 0 else torch.ones_like(theta)
        if gradients is None or not (mean := gradients[self.positions].mean()) > 0:
            return shares
        scale = (gradients / mean + _NO_GRADIENT).pow(_POWER)
        return shares * scale / scale[self.positions].square().mean().sqrt()

    def _take(
        self,
        curvature: LinearOperator,
        gradient: Tensor,
        solve: Solve,
        group: Group | None = None,
        units: Tensor | None = None,
    ) -> float:
        """Solves for a change by the method, and says how the risk bends along it."""
        if not gradient[self.positions].any():
            raise ObjectiveError(
                "The loss of the forget examples, or the risk, does not depend on the target parameters: its gradient"
                " on all of them is exactly zero. Either there is nothing to forget or to correct, as what should be"
                " predicted is predicted for certain; or use targets='batch', a larger ratio, or method='if'."
            )
        change, solutions = self._method.edit(curvature, self.positions, gradient, solve, group, units)
        if not change.any():
            raise ObjectiveError(
                "The solve found no change of the target parameters that would answer the removal: the retained loss"
                " has no curvature along them. Use other targets, a larger ratio, or method='if'."
            )
        self._changes.append(change)
        self.solutions.append(max(solutions, key=lambda solution: solution.residual))
        return float(change @ Submatrix(curvature, self.positions, self.positions).matvec(change))

    def _newton(self, curvature: LinearOperator, gradient: Tensor, at: Point, units: Tensor) -> float:
        """Solves for a damped Newton step on the targets, and says how the risk bends along it."""
        if self._expected is not None:
            start, model = self._expected
            step = at.steps[-1] if len(at.steps) == len(self._changes) else 0.0
            if step < 1:
                self._damping /= max(step, _SHORTEST)
            elif step > 1 or at.risk - start.risk <= _GOOD * model.change(step):
                self._damping /= _ADAPT
        units = units[self.positions]
        matrix = Scaled(Submatrix(curvature, self.positions, self.positions), units, rows=True)
        solution, bend = self._for_one_of_many.newton(matrix, units * gradient[self.positions], self._damping)
        self._changes.append(units * solution.x)
        self.solutions.append(solution)
        return bend

    def losses(self, theta: Tensor) -> dict[str, float]:
        """The mean losses that a report tells, by name."""
        task = self._task
        parts = {"forget": task.judged, "retain": task.check, "relabelled": task.corrected, "unseen": task.unseen}
        return {name: self._objective.mean_loss(part, theta) for name, part in parts.items() if part is not None}

    def predicted(self, before: dict[str, float], chosen: Point) -> dict[str, float]:
        """What the theory makes of losses; NaN where it was not asked, or other changes were made as well."""
        found = dict.fromkeys(before, math.nan)
        if self._answer is None or any(step for i, step in enumerate(chosen.steps) if i != self._answer[0]):
            return found
        which, model = self._answer
        change, step = self._changes[which], chosen.steps[which] if which < len(chosen.steps) else 0.0
        bend = model.bend - self._settings.weight_decay * float(change @ change)  # of the loss alone
        slopes = {"forget": self._old, "retain": self._retain_slope, "relabelled": self._new}
        for name, slope in slopes.items():
            if slope is not None:
                along = step * float(slope[self.positions] @ change)
                found[name] = before[name] + along + (step**2 * bend / 2 if name == "retain" else 0.0)
        return found


def _labels(data: Any) -> Tensor:
    """The classes ``(B,)`` of a batch of a model that predicts some."""
    labels = class_targets(data)
    assert labels is not None  # else it would not be known what is predicted
    return labels.long()


def bound_curvature(log_odds: Tensor) -> Tensor:
    """The second derivative of the flattest parabola that touches ``−log(1 − p)`` and lies above it, elementwise.

    With ``z`` the log-odds of ``p`` where it touches, it is ``tanh(z/2)/(2z)`` (Jaakkola and Jordan, *Statistics and
    Computing* 10, 2000). Where ``p`` is close to one the function is a straight line in ``z`` and its own curvature
    vanishes; the parabola has its minimum near ``−|z|``.
    """
    size = log_odds.abs().clamp_min(1e-3)  # where it is 1/4, up to rounding
    return (size / 2).tanh() / (2 * size)


def _tell(walk: _Walk, chosen: Point, notes: list[str]) -> None:
    """Warns of a search that did not find what it was for."""
    share = f"{100 * chosen.remembered:.1f} %"
    if walk.goal is Goal.CLASS and walk.enough is not None and not chosen.remembered <= walk.enough:
        _warn(
            notes,
            f"{share} of the class are still predicted as it. More would have raised the retained loss too far, was not"
            " found, or was not asked for. Try targets='batch', another selector, a larger ratio, or another `step`.",
        )
    elif walk.goal is Goal.LABELS and walk.enough is not None and chosen.moved and chosen.remembered > walk.enough:
        _warn(
            notes,
            f"{share} of the corrected labels are not predicted as they should be. Look at the retained loss as well,"
            " and undo the edit if it is not worth it.",
        )
    elif walk.goal is Goal.EXAMPLES and chosen.moved and walk.enough is not None:
        before = walk.path[0]
        told_apart = before.remembered > walk.enough  # by smaller losses than those of unseen ones
        if told_apart and abs(chosen.remembered - walk.enough) >= abs(before.remembered - walk.enough):
            notes.append(
                "Their losses tell the examples from unseen ones as well as before, or better (AUROC"
                f" {before.remembered:.3f} -> {chosen.remembered:.3f}). Undo the edit if that is not worth it."
            )
    elif not chosen.moved:
        _warn(
            notes,
            "The search found no step that lowers the risk on the data that retraining would see; the edit changes"
            " nothing. step='natural' makes the step of the theory all the same.",
        )


def _tell_refreshed(old: dict[str, float], new: dict[str, float], notes: list[str]) -> None:
    """Warns of losses by name that are larger with the running statistics that were computed anew."""
    for name in ("retain", "relabelled"):
        if name in new and new[name] - old[name] > _WORSE * abs(old[name]):
            _warn(
                notes,
                f"The running statistics that were computed anew raise the {name} loss: {old[name]:.4g} without them,"
                f" {new[name]:.4g} with them. The edit was solved for with the old ones. Leave `refresh_statistics` out"
                " if that matters more.",
            )


def _tell_cost(walk: _Walk, before: dict[str, float], after: dict[str, float], notes: list[str]) -> None:
    """Warns where a search corrected labels at the cost of the others, or the others' at theirs; losses by name."""
    gained = before["relabelled"] - after["relabelled"]
    if after["retain"] - before["retain"] > walk.tolerated(before["retain"], gained):
        _warn(
            notes,
            f"The retained loss rose from {before['retain']:.4g} to {after['retain']:.4g}. The new labels are not what"
            " the other examples teach; a model that is trained with them would not follow all of them either. Make"
            " sure that they are right, and undo the edit if it is not worth it.",
        )
    if -gained > _WORSE * abs(before["relabelled"]):
        _warn(
            notes,
            f"The loss of the corrected examples rose from {before['relabelled']:.4g} to {after['relabelled']:.4g}: the"
            " risk fell by that of the retained ones. Training had not ended there, or they are too few.",
        )


def _others(examples: Examples, positions: Tensor) -> Examples:
    """The examples at all other positions."""
    keep = torch.ones(len(examples), dtype=torch.bool)
    keep[positions] = False
    return examples.at(keep.nonzero().squeeze(1))


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
    if len(found) == len(train):
        raise TrainingDataError("All training examples are to be forgotten; nothing would be retained. Train anew.")
    return _others(train, found)


def _without(retain: Examples, forget: Examples, notes: list[str]) -> Examples:
    """The given examples to keep, less those to be forgotten."""
    both = locate(forget, retain)
    if len(both):
        _warn(notes, f"{len(both)} of the examples given as `retain` are to be forgotten; they are not retained.")
    if len(both) == len(retain):
        raise TrainingDataError("All examples given as `retain` are to be forgotten; nothing would be retained.")
    return _others(retain, both) if len(both) else retain


def _warn(notes: list[str], text: str) -> None:
    """Says something now and in the report."""
    notes.append(text)
    rank_zero_warn(text, category=GIFWarning)
