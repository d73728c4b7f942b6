"""The weights between the trained model and the edited one: solves and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Settings
from ..curvature.memory import bytes_to_keep
from ..curvature.methods import Group, Method, Solve
from ..curvature.products import Losses
from ..curvature.solve import (
    describe,
    newton,
    open_curvature,
    solve,
    solve_with_relative_damping,
    warn_unconverged,
)
from ..curvature.streaming import Curvature
from ..data.batch import Batch
from ..data.examples import Examples
from ..defaults import for_relinearised_step, sample_size
from ..errors import ConfigurationError, NonFiniteError, ObjectiveError
from ..objective.objective import Objective
from ..solvers import LinearOperator, Solution
from ..solvers.operators import Combination, Scaled, Submatrix
from ..storage.digests import digest
from ..storage.schema import restored_fields
from .journal import Journal
from .protocol import Goal, LocalModel, Point
from .risk import OutputLoss, QuantileMatchingLoss, RiskTerm, WithTeacher, bound_curvature, labels_of
from .task import Task

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

# What forgetting may cost in retained loss: for a class a share of the loss of guessing; for single examples a tenth of
# the way to the loss of unseen ones, at which the others would be forgotten as well, or where there are none of itself,
# or m/(n−m) of it if that is more (the risk, of which a slope is subtracted, may have no lower end). A hundredth of
# itself, or of guessing, is no cost.
_CLASS_BUDGET, _EXAMPLES_BUDGET, _LEAST_BUDGET = 0.05, 0.1, 0.01

# By how much of itself a loss may be larger than it was before that is told.
WORSE = 0.1

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


class ModelEditProblem:
    """The weights on their way, see :class:`~lightning_gif.unlearning.protocol.Walk`.

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
        task: Task,
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
        self._strata = None if task.unseen is None else (task.judged.class_or_zero, task.unseen.class_or_zero)

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

    def _risk(self) -> list[RiskTerm]:
        """What the risk is made of, see :class:`~lightning_gif.unlearning.protocol.Goal`."""
        objective, task, settings = self._objective, self._task, self._settings
        curved = max(math.ceil(_CURVED_SHARE * len(task.sample)), _LEAST_CURVED)
        if task.gone is not None:
            seen = task.sample.map(self._expecting)
            measured = seen if task.check is task.sample else task.check.map(self._expecting)
            kept = RiskTerm(1.0, seen, measured, curved, OutputLoss(objective.logits, self._divergence))
        elif task.goal is Goal.LABELS:
            kept = RiskTerm(1.0, task.sample, task.check, curved, objective)
        else:
            # The slope that training left in the risk on all data, as the two samples of the retained data show it.
            left = task.share * self._old + (1 + task.share) * settings.weight_decay * objective.theta
            left_seen = left_measured = self._retain_slope + left
            if task.check is not task.sample:
                left_seen = objective.gradient(task.sample) + left
            kept = RiskTerm(
                1.0, task.sample, task.check, curved, objective, left_seen=left_seen, left_measured=left_measured
            )
        if task.goal is Goal.CLASS:
            unlikely, bound = (
                OutputLoss(objective.logits, self._unlikelihood),
                OutputLoss(objective.logits, self._bound),
            )
            few = math.ceil(_FORGOTTEN_SHARE * curved)
            return [kept, RiskTerm(_CLASS_WEIGHT, task.judged, task.judged, few, unlikely, bound)]
        if task.corrected is None or task.amended is None:
            return [kept, *self._learned_by_heart(curved)]
        if task.gone is None:
            return [kept, RiskTerm(task.share, task.corrected, task.amended, curved, objective)]
        right = OutputLoss(objective.logits, self._cross_entropy)
        return [kept, RiskTerm(_LABELS_WEIGHT * task.share, task.corrected, task.amended, curved, right)]

    def _learned_by_heart(self, curved: int) -> list[RiskTerm]:
        """What of the risk is about single examples whose loss is less than that of the unseen ones of their rank."""
        objective, task = self._objective, self._task
        if task.unseen is None or self._strata is None:
            return []
        losses, unseen = objective.all_losses(task.forget), objective.all_losses(task.unseen)
        mine, others = task.forget.class_or_zero.to(losses.device), self._strata[1].to(losses.device)
        groups = {
            int(label): (losses[mine == label].sort().values, unseen[others == label].sort().values)
            for label in mine.unique()
            if (others == label).any()
        }
        lacking = (QuantileMatchingLoss(objective, groups).wanted(losses, mine) - losses).clamp_min(0)
        short = (lacking > _LEARNED_BY_HEART * lacking.square().mean().sqrt()).nonzero().squeeze(1)
        if not len(short):
            return []
        ranked = QuantileMatchingLoss(objective, groups, float(lacking[short].square().mean().sqrt()))
        settings = self._settings
        these = task.forget.subset(short.cpu()).sample(sample_size(settings), settings.seed)
        these = these.cached(bytes_to_keep(settings, objective) / 4)
        weight = _EXAMPLES_WEIGHT * task.share * len(short) / len(task.forget)
        return [RiskTerm(weight, these, these, curved, OutputLoss(objective.losses, ranked.sum))]

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
        return max(WORSE * abs(retain), WORSE * self._task.share * gained, classes)

    def _guessing(self, classes: int, share: float) -> float:
        """A share of the loss of guessing one of so many classes, in the unit of the loss."""
        return share * math.log(classes) * self._nat

    @cached_property
    def _nat(self) -> float:
        """What a nat of cross-entropy is in the unit of the loss, as the retained examples tell, and at most 1.

        A loss may be multiplied by anything; or have more to it than cross-entropy, and then is no measure.
        """
        objective = self._objective

        def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
            known = batch.classes is not None  # the loss may leave labels out that are none
            return self._cross_entropy(logits, batch) if known else logits.new_zeros(())

        entropy = objective.mean(
            self._task.check, OutputLoss(objective.logits, cross_entropy).loss_sum, objective.theta
        )
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
        asked: list[tuple[Examples, Callable[[Tensor, Batch], Tensor] | None]] = [(task.judged, None), (retained, None)]
        asked += [(term.measured, term.losses.function) for term in self._terms if isinstance(term.losses, OutputLoss)]
        asked.append(self._memory)
        sums = [0.0] * len(asked)
        with torch.no_grad():
            for examples in {id(these): these for these, _ in asked}.values():
                for batch in examples.local_batches():
                    loss, logits = objective.loss_and_logits(theta, batch)
                    for position, (these, function) in enumerate(asked):
                        if these is examples:
                            value = loss if function is None else function(logits, batch)
                            sums[position] += float(value) / len(these)
        sums = objective.processes.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        return sums[0], sums[1], sums[2:-1], sums[-1]

    @property
    def _memory(self) -> tuple[Examples, Callable[[Tensor, Batch], Tensor]]:
        """Which examples tell what is remembered of classes, and what of their logits does, summed over a batch."""
        task = self._task
        return (task.judged, self._predicted) if task.amended is None else (task.amended, self._wrong)

    def remembered(self, theta: Tensor, losses: Tensor | None = None) -> float:
        """See :class:`~.protocol.Point`; the losses of the judged examples where they are known."""
        task = self._task
        if task.gone is not None:
            examples, function = self._memory
            return self._objective.mean(examples, OutputLoss(self._objective.logits, function).loss_sum, theta)
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

    def _predicted(self, logits: Tensor, batch: Batch) -> Tensor:
        """How many are predicted as one of the classes in question."""
        return self._gone[logits.argmax(1)].double().sum()

    def _wrong(self, logits: Tensor, batch: Batch) -> Tensor:
        """How many are predicted as another class than that of their label."""
        return (logits.argmax(1) != labels_of(batch)).double().sum()

    def _expecting(self, batch: Batch) -> WithTeacher:
        """With what the trained model predicts, the classes in question ruled out."""
        with torch.no_grad():
            trained = self._objective.logits(self._objective.theta, batch)
            expected = torch.where(self._gone, -math.inf, trained).softmax(1)
            return WithTeacher(batch.data, batch.ids, batch.size, expected)

    # What the risk is made of where predictions are known, each summed over a batch.

    def _divergence(self, logits: Tensor, batch: Batch) -> Tensor:
        """``KL(expected ‖ p)``."""
        assert isinstance(batch, WithTeacher)
        found = logits.log_softmax(1).masked_fill(batch.expected == 0, 0.0)  # the logits of a masked class are −∞
        return (torch.special.entr(batch.expected).neg() - batch.expected * found).sum()

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """``−log p`` of the labels, whatever else the training loss does to it."""
        return F.cross_entropy(logits, labels_of(batch), reduction="sum")

    def _unlikelihood(self, logits: Tensor, batch: Batch) -> Tensor:
        """``−log(1 − p)`` with ``p`` the probability of the classes in question, from its log-odds."""
        return F.softplus(self._log_odds(logits)).sum()

    def _bound(self, logits: Tensor, batch: Batch) -> Tensor:
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
        with journal.parse_errors_name(position):
            told = _Told(**restored_fields(_Told, record))
            recalled = Solution.of_record(told.solution)
            if not all(map(math.isfinite, (told.slope, told.bend, told.damping))) or told.damping <= 0:
                raise ValueError(f"it tells of slope {told.slope}, bend {told.bend} and damping {told.damping}")
        warn_unconverged(self._settings, [recalled], is_newton=told.newton)
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
            opened = partial(open_curvature, settings, objective, on_product=bar.update)
            curvature = opened(task.sample)
            new = None if task.amended is None else opened(task.amended, keep=False)
            group = Group(task.share / (1 + task.share), opened(task.judged, keep=False), new)
            bend = self._take(curvature, self._gradient, partial(solve, settings), group)
            curvature.warn_if_zero()
            self.description = self.description or describe(settings, curvature)
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
        far, steps = at.remembered > _FAR.get(self.goal, math.inf), self._for_relinearised_step
        with objective.progress("Hessian products, at the new weights") as bar:
            for term in self._terms:
                of_term = objective.gradient(term.seen, there, term.losses.loss_sum)
                slope = slope + term.weight * (of_term if term.left_seen is None else of_term - term.left_seen)
                curved = math.ceil(_FAR_SHARE * term.curved) if far and self.goal is Goal.CLASS else term.curved
                part = term.seen.sample(curved, settings.seed + len(self._changes))
                part = part.cached(bytes_to_keep(settings, objective) / 4)
                losses = term.bound if term.bound is not None and self._changes and far else term.losses
                decay = 0.0 if curvatures else self._decay  # of the whole risk, in the first term, whose weight is 1
                curvature = open_curvature(
                    steps, objective, part, there, losses=losses, weight_decay=decay, on_product=bar.update
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
                solver = (
                    partial(solve_with_relative_damping, steps, relative) if self._convex else partial(solve, steps)
                )
                bend = self._take(whole, -slope, solver, units=units)
            self.description = self.description or describe(steps, curvatures[0][1])
        return LocalModel(float(slope[self.positions] @ self._changes[-1]), bend), newton

    @property
    def _for_relinearised_step(self) -> Settings:
        return for_relinearised_step(self._settings, labels=self.goal is Goal.LABELS, convex=self._convex)

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
        groups = examples.round_robin(min(_GROUPS, max(len(examples) // 2, 1)))
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
        solution, bend = newton(self._for_relinearised_step, matrix, units * gradient[self.positions], self._damping)
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
