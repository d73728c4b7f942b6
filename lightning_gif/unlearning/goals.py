"""The goals of an edit. Each is a class: its risk, its limits, how memorization is measured, and the words for it.

A new goal is a subclass of :class:`Goal` and one call of ``GOALS.register``. Nothing else asks which goal an edit has.
The effect of each number is in ``benchmarks/README.md``, "What the tuned numbers of an edit move". Comments beside a
number name the section that is about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.memory import bytes_to_keep
from ..curvature.products import Losses
from ..registry import Registry
from ..reporting.notes import warn_and_note
from .checked import CheckedNumbers, number
from .memorization import MembershipAUROC, Memorization, PredictedShare, count_as, count_wrong
from .protocol import GoalName, Limits, Trial
from .risk import (
    OutputLoss,
    QuantileMatchingLoss,
    RiskTerm,
    Unlikelihood,
    UnlikelihoodBound,
    cross_entropy,
    teacher,
    teacher_loss,
)
from .task import Request, Scales, Task

__all__ = ["GOALS", "ClassRemoval", "ExampleRemoval", "Goal", "LabelCorrection", "choose_goal"]


# By how much of itself a loss may rise before the report warns of it.
NOTABLE_INCREASE = 0.1


@dataclass(frozen=True)
class Goal(CheckedNumbers):
    """The goal of an edit. Its fields are the goal's tuned numbers.

    Attributes:
        name: The name of the goal in reports and files.
        compares_with_unseen: Whether forget examples are compared with unseen ones.
        influence_first: Whether ``"relinearise"`` starts along the influence direction. Also whether a search along
            it takes the natural step if rounding hides the change of the risk.
        smallest_step: Whether ``"search"`` takes the smallest step that reaches the target memorization, and not the
            one of least risk.
        bounded_risk: Whether the risk has a lower bound.
        pursues_target: Whether steps that gain little are followed by others up to the target memorization.
        scales_by_gradients: Whether solves are scaled by the gradient second moment.
        far_memorization: Above this memorization, descent directions are solved by the method of the edit instead of
            Newton steps.
        far_curvature_share: The share of the examples that gives the curvature above ``far_memorization``.
        first_damping: If the risk is convex: the damping of the first least-squares solve, as a share of ``‖Bᵀb‖/‖b‖``.
        max_step_size: The largest step size along the influence direction; that of the line search if that is smaller.
        warns_of_shortfall: Whether :meth:`shortfall` is also a warning, not only a note in the report.
        curvature_examples: The number of retained examples that solves see with ``curvature_examples="auto"``.
    """

    name: ClassVar[str]
    compares_with_unseen: ClassVar[bool] = False
    influence_first: ClassVar[bool] = False
    smallest_step: ClassVar[bool] = False
    bounded_risk: ClassVar[bool] = True
    pursues_target: ClassVar[bool] = True
    scales_by_gradients: ClassVar[bool] = False
    warns_of_shortfall: ClassVar[bool] = True
    far_memorization = math.inf
    far_curvature_share = 1.0
    first_damping = 0.0
    max_step_size = math.inf

    # "Scores that predict retraining": 512 examples are worse, and all of them no better.
    curvature_examples: int = number(2048, low=1, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether a request has this goal; goals that were registered later are asked first.

        Args:
            request: What is asked.
            notes: Of the report.
        """
        raise NotImplementedError

    def sample_size(self, settings: Settings) -> int | None:
        """How many retained examples solves see; ``None`` for all."""
        chosen = settings.curvature_examples
        return self.curvature_examples if isinstance(chosen, str) else chosen

    def forgotten_classes(self, request: Request) -> Tensor | None:
        """A mask ``(C,)`` over the predicted classes; ``None`` if the goal does not depend on predictions."""
        return None

    def risk(self, task: Task) -> list[RiskTerm]:
        """The terms of the risk. The first is that of the retained examples."""
        raise NotImplementedError

    def memorization(self, task: Task) -> Memorization:
        """How :attr:`~lightning_gif.unlearning.protocol.Trial.memorization` is measured."""
        raise NotImplementedError

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """How far the edit should go, and what it may cost.

        Args:
            start: The trained model.
            scales: What budgets are relative to.
        """
        raise NotImplementedError

    def is_convex(self, task: Task) -> bool:
        """Whether the risk is convex in the outputs, so that its GGN matrix has no negative eigenvalues."""
        return False

    def is_negligible(self, risk: float) -> bool:
        """Whether so small a risk is not worth another solve, once the target memorization is reached."""
        return False

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether a step that gained little, the first one in a row, may be followed by another at the target.

        Args:
            accepted: The trial that the step led to; ``None`` if it was rejected.
            at_target: Whether the target memorization is reached.
        """
        return False

    def shortfall(self, before: Trial, chosen: Trial, target: float | None) -> str | None:
        """What the user should know of an edit that did not reach its target; ``None`` if there is nothing to say.

        Args:
            before: The trained model.
            chosen: The edit.
            target: The target memorization.
        """
        return None

    def tolerated_increase(self, retain_loss: float, gained: float, scales: Scales) -> float:
        """By how much the retained loss may rise before the report warns of it.

        Args:
            retain_loss: The retained loss before.
            gained: By how much the edit lowered the loss of the corrected examples.
            scales: What budgets are relative to.
        """
        return math.inf

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """What memorization is, for a plot or a line of text."""
        raise NotImplementedError

    @classmethod
    def memorization_unit(cls) -> str:
        """The unit of memorization, for the axis of a plot."""
        return "share of the forget examples"

    @classmethod
    def memorization_text(cls, before: float, after: float, n_unseen: int) -> str:
        """The line of a report about memorization before and after an edit."""
        return f"{cls.memorization_title(n_unseen)}: {100 * before:.1f} % -> {100 * after:.1f} %"


GOALS: Registry[type[Goal]] = Registry("goal")
"""All goals by name; the last one that applies to a request is its goal."""


@GOALS.register("examples")
@dataclass(frozen=True)
class ExampleRemoval(Goal):
    """Other examples of the same labels are retained, or the model's predictions are not known.

    The risk is the loss of the retained data, which retraining would minimise. Training does not end in an exact
    minimum, and even a minimum has a gradient on a sample of the data. So the gradient of the loss of *all* data at the
    trained weights is subtracted (the baseline gradient). The edit then answers the change of the data, and neither
    continues training nor fits the sample.

    With unseen examples, each forget example has a target loss ``t``: that of the unseen example of its class and rank.
    A model retrained without a memorized example would have a larger loss on it. Forget examples with a loss ``ℓ``
    below ``t`` add ``(t − ℓ)²/(2σ)`` to the risk. Here ``σ`` is the root mean square of ``t − ℓ`` over them.

    Attributes:
        target_memorization: A membership AUROC of one half: the losses do not separate the examples.
        memorized_weight: The weight of a forget example in the second term, beside a retained one.
        memorized_share: Forget examples with ``t − ℓ`` below this share of the root mean square are left out: most of
            them were not memorized.
        retain_budget: The largest increase of the retained loss, as a share of its distance to the unseen loss, at
            which the other examples would be forgotten as well. Without unseen examples it is a share of the retained
            loss, and at least ``m/(n−m)``: if a large share of the data is removed, weight decay weighs more, and even
            the best weights cost that. A limit is needed since the risk, less its baseline, may have no lower bound.
        min_retain_budget: An increase by this share of the retained loss, or of the chance loss, never ends an edit.
        max_step_size: The largest step size along the influence direction.
    """

    name = GoalName.EXAMPLES
    compares_with_unseen = True
    influence_first = True
    bounded_risk = False
    pursues_target = False
    warns_of_shortfall = False

    target_memorization = 0.5

    memorized_weight: float = number(8.0)
    memorized_share: float = number(0.05, open_low=False)
    retain_budget: float = number(0.1, open_low=False)
    min_retain_budget: float = number(0.01, open_low=False)
    max_step_size: float = number(4.0, low=1.0, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Always."""
        return True

    def risk(self, task: Task) -> list[RiskTerm]:
        """The retained loss less its baseline gradient, and the distance of the memorized losses to unseen ones."""
        objective, weight = task.objective, task.forget_weight
        n_curvature = task.sizes.descent_curvature
        # The gradient that training left in the risk on all data, as the two samples of the retained data show it.
        rest = weight * task.forget_gradient + (1 + weight) * task.settings.weight_decay * objective.theta
        baseline_fit = baseline_eval = task.retain_gradient + rest
        if task.retain_eval is not task.retain_fit:
            baseline_fit = objective.gradient(task.retain_fit) + rest
        retained = RiskTerm(
            1.0,
            task.retain_fit,
            task.retain_eval,
            n_curvature,
            objective,
            baseline_fit=baseline_fit,
            baseline_eval=baseline_eval,
        )
        return [retained, *self._memorized(task, n_curvature)]

    def _memorized(self, task: Task, n_curvature: int) -> list[RiskTerm]:
        """The term of the forget examples with smaller losses than the unseen ones of their rank, if there are any."""
        objective, settings = task.objective, task.settings
        if task.unseen is None:
            return []
        losses, unseen = objective.all_losses(task.forget), objective.all_losses(task.unseen)
        own, others = (part.class_or_zero.to(losses.device) for part in (task.forget, task.unseen))
        groups = {
            int(label): (losses[own == label].sort().values, unseen[others == label].sort().values)
            for label in own.unique()
            if (others == label).any()
        }
        lacking = (QuantileMatchingLoss(objective, groups).targets(losses, own) - losses).clamp_min(0)
        short = (lacking > self.memorized_share * lacking.square().mean().sqrt()).nonzero().squeeze(1)
        if not len(short):
            return []
        matching = QuantileMatchingLoss(objective, groups, float(lacking[short].square().mean().sqrt()))
        memorized = task.forget.subset(short.cpu()).sample(self.sample_size(settings), settings.seed)
        memorized = memorized.cached(bytes_to_keep(settings, objective) / 4)
        weight = self.memorized_weight * task.forget_weight * len(short) / len(task.forget)
        return [RiskTerm(weight, memorized, memorized, n_curvature, OutputLoss(objective.losses, matching.sum))]

    def memorization(self, task: Task) -> Memorization:
        """The membership AUROC against unseen examples; not known without any."""
        if task.unseen is None:
            return None
        return MembershipAUROC(task.objective, task.forget_eval, task.unseen)

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """An AUROC of one half at a tenth of the way to the unseen loss, or no target at a tenth of the loss itself."""
        if scales.unseen_loss is not None and not math.isnan(start.memorization):
            # Nothing is forgotten at no cost at all, even where unseen losses are no larger.
            least = self.min_retain_budget * abs(start.retain_loss)
            budget = max(self.retain_budget * (scales.unseen_loss() - start.retain_loss), least)
            return Limits(self.target_memorization, start.retain_loss + budget)
        least = scales.chance_loss(self.min_retain_budget)
        share = max(self.retain_budget, scales.forget_weight)
        return Limits(None, start.retain_loss + max(share * abs(start.retain_loss), least))

    def shortfall(self, before: Trial, chosen: Trial, target: float | None) -> str | None:
        """That losses separate the examples from unseen ones as well as before."""
        if target is None or not chosen.is_edit or not before.memorization > target:
            return None
        if abs(chosen.memorization - target) < abs(before.memorization - target):
            return None
        return (
            "The losses of the examples separate them from unseen ones as well as before, or better (AUROC"
            f" {before.memorization:.3f} -> {chosen.memorization:.3f}). Undo the edit if that is not worth it."
        )

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The membership AUROC."""
        return f"membership AUROC against {n_unseen} unseen examples"

    @classmethod
    def memorization_unit(cls) -> str:
        """The AUROC, and what it is if nothing is remembered."""
        return "AUROC (0.5 = indistinguishable)"

    @classmethod
    def memorization_text(cls, before: float, after: float, n_unseen: int) -> str:
        """The AUROC before and after, and what it is if nothing is remembered."""
        return f"{cls.memorization_title(n_unseen)}: {before:.3f} -> {after:.3f} (0.5 = indistinguishable)"


@GOALS.register("class")
@dataclass(frozen=True)
class ClassRemoval(Goal):
    """The forget examples are all examples of their classes, and these classes should no longer be predicted.

    On the retained examples, Bayes' rule gives the expected predictions: those of the trained model once the forgotten
    classes are ruled out, see :func:`~lightning_gif.unlearning.risk.teacher`. The risk has two terms. The first is the
    mean of ``KL(expected ‖ predicted)`` over the retained examples. It can become zero without a fit to the labels of a
    sample. The second, with a weight, is the mean of ``−log(1 − p)`` over the forget examples, with ``p`` the
    probability of the forgotten classes.

    Attributes:
        target_memorization: The share of the class that may still be predicted as it.
        unlikelihood_weight: The weight of the mean over the forget examples.
        retain_budget: The largest increase of the retained loss, as a share of the chance loss.
        far_memorization: Above this memorization, log-odds are far from their target, and the second term uses the
            curvature of a bound.
        far_curvature_share: Such early steps need not be accurate, and use fewer examples for the curvature.
        negligible_risk: A risk in nats below the difference between retrained models.
        curvature_examples: The number of retained examples that solves see; fewer than for other goals.
    """

    name = GoalName.CLASS
    smallest_step = True

    target_memorization: float = number(0.005, high=1.0)
    unlikelihood_weight: float = number(0.2)
    retain_budget: float = number(0.05, open_low=False)
    far_memorization: float = number(0.5, high=1.0)
    # "Every class forgotten", the list of choices: saved a ninth of the time on TinyNet, and nothing on the ResNet.
    far_curvature_share: float = number(0.5, high=1.0)
    # The same list: with 1024 instead of 2048 examples it saved a fifth of the time, and cost 0.02 to 0.06 points.
    negligible_risk: float = number(0.004, open_low=False)
    curvature_examples: int = number(1024, low=1, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether no other training example has a label of the forget examples, and predictions are known."""
        labels = request.forget.classes
        if request.relabelled is not None or labels is None or not request.others.has_none_of(labels):
            return False
        if request.n_classes is None or request.objective.n_classes(request.others) != request.n_classes:
            warn_and_note(
                notes,
                "All examples of a class are to be forgotten, but the model's predictions are not known: its loss does"
                " not call F.cross_entropy (or F.nll_loss) with one row of logits for each example and the labels of"
                " the batch. The examples are removed like single examples, and may still be predicted as their class.",
            )
            return False
        return True

    def forgotten_classes(self, request: Request) -> Tensor | None:
        """The classes of the forget examples."""
        assert request.n_classes is not None  # see :meth:`applies`
        assert request.forget.classes is not None
        mask = torch.zeros(request.n_classes, dtype=torch.bool, device=request.objective.device)
        mask[request.forget.classes.unique().long()] = True
        return mask

    def risk(self, task: Task) -> list[RiskTerm]:
        """The divergence on retained examples, and the unlikelihood of the forget ones."""
        assert task.forgotten_classes is not None
        n_curvature = task.sizes.descent_curvature
        logits, classes = task.objective.logits, task.forgotten_classes
        forgotten = RiskTerm(
            self.unlikelihood_weight,
            task.forget_eval,
            task.forget_eval,
            math.ceil(task.sizes.forget_share * n_curvature),
            OutputLoss(logits, Unlikelihood(classes)),
            OutputLoss(logits, UnlikelihoodBound(classes)),
        )
        return [_keep_predictions(task, classes, n_curvature), forgotten]

    def memorization(self, task: Task) -> Memorization:
        """The share that is predicted as one of the forgotten classes."""
        assert task.forgotten_classes is not None
        return PredictedShare(task.objective, task.forget_eval, count_as(task.forgotten_classes))

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """Next to none of the class, at a share of the chance loss."""
        return Limits(self.target_memorization, start.retain_loss + scales.chance_loss(self.retain_budget))

    def is_negligible(self, risk: float) -> bool:
        """Whether the risk is below what retrained models differ by."""
        return risk < self.negligible_risk

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether the step was rejected or cut short.

        The curvature of a class that is predicted for certain can point anywhere, which the next solve bounds. A Newton
        step that was cut short had too little damping, of which the next one has more.
        """
        return accepted is None or accepted.step_sizes[-1] < 1

    def shortfall(self, before: Trial, chosen: Trial, target: float | None) -> str | None:
        """That more than the target share is still predicted as the class."""
        if target is None or chosen.memorization <= target:
            return None
        return (
            f"{100 * chosen.memorization:.1f} % of the class are still predicted as it. A further step would raise the"
            " retained loss too much, was not found, or was not requested. Try targets='batch', another selector, a"
            " larger ratio, or another `step`."
        )

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The share that is still predicted."""
        return "still predicted as the class"


@GOALS.register("labels")
@dataclass(frozen=True)
class LabelCorrection(Goal):
    """The forget examples get new labels.

    The risk is ``KL(expected ‖ predicted)`` over the retained examples plus the cross-entropy of the corrected
    examples. The expected predictions are those of the trained model. If predictions are not known, the risk is the
    loss of both kinds of examples with equal weights, which retraining would minimise. No baseline gradient is
    subtracted: the risk of a model that is not convex would then have no minimum.

    Attributes:
        target_memorization: The share of labels that may stay uncorrected once steps gain little. The report warns if
            more of them do.
        corrected_weight: The weight of a corrected example relative to a retained one. Some of the retained predictions
            were learned from the wrong labels, and work against the correction.
        retain_budget: The report warns of an increase of the retained loss by more than this share of the chance loss,
            and more than a tenth of itself.
        far_memorization: While more than this share of the labels is wrong, steps are damped least-squares solutions.
        first_damping: The relative damping of these steps. The GGN matrix is nearly zero on wrong labels that are
            predicted with certainty. Without damping, nearly all first steps of small networks raised the risk.
    """

    name = GoalName.LABELS
    # "A backdoor repaired", the row of eight iterations a solve and entries scaled by the size of their gradients.
    scales_by_gradients = True

    target_memorization: float = number(0.2, high=1.0)
    corrected_weight: float = number(8.0)
    retain_budget: float = number(0.05, open_low=False)
    far_memorization: float = number(0.25, high=1.0)
    # "A backdoor repaired": 0.1 and 0.3 change the mean of six draws by less than draws differ.
    first_damping: float = number(0.2)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether there are new labels."""
        return request.relabelled is not None

    def forgotten_classes(self, request: Request) -> Tensor | None:
        """None of the predicted classes, if predictions are known."""
        if request.n_classes is None:
            return None
        return torch.zeros(request.n_classes, dtype=torch.bool, device=request.objective.device)

    def risk(self, task: Task) -> list[RiskTerm]:
        """The divergence on retained examples and the cross-entropy of corrected ones, or the loss of both."""
        assert task.relabelled is not None  # see :meth:`applies`
        assert task.relabelled_eval is not None
        objective, n_curvature = task.objective, task.sizes.descent_curvature
        weight, losses = task.forget_weight, cast(Losses, objective)
        if task.forgotten_classes is None:
            kept = RiskTerm(1.0, task.retain_fit, task.retain_eval, n_curvature, objective)
        else:
            kept = _keep_predictions(task, task.forgotten_classes, n_curvature)
            weight, losses = self.corrected_weight * weight, OutputLoss(objective.logits, cross_entropy)
        return [kept, RiskTerm(weight, task.relabelled, task.relabelled_eval, n_curvature, losses)]

    def memorization(self, task: Task) -> Memorization:
        """The share that is not predicted as its new label; not known if predictions are not."""
        if task.forgotten_classes is None or task.relabelled_eval is None:
            return None
        return PredictedShare(task.objective, task.relabelled_eval, count_wrong)

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """A fifth of the labels; the retained loss is in the risk, and has no limit of its own."""
        return Limits(None if scales.n_classes is None else self.target_memorization, math.inf)

    def is_convex(self, task: Task) -> bool:
        """Whether predictions are known: the divergence and the cross-entropy are convex in the logits."""
        return task.forgotten_classes is not None

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether the step was accepted, or is needed: the first change is another kind of step than those after it."""
        return accepted is not None or not at_target

    def shortfall(self, before: Trial, chosen: Trial, target: float | None) -> str | None:
        """That too many labels are left as they were."""
        if target is None or not chosen.is_edit or not chosen.memorization > target:
            return None
        return (
            f"{100 * chosen.memorization:.1f} % of the corrected examples are not predicted as their new label. Compare"
            " the retained losses as well, and undo the edit if it is not worth the cost."
        )

    def tolerated_increase(self, retain_loss: float, gained: float, scales: Scales) -> float:
        """A tenth of the loss, what the corrected examples gained for it, or a share of the chance loss."""
        chance = scales.chance_loss(self.retain_budget)
        own = NOTABLE_INCREASE * abs(retain_loss)
        return max(own, NOTABLE_INCREASE * scales.forget_weight * gained, chance)

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The share that is not yet corrected."""
        return "not predicted as the new label"


def _keep_predictions(task: Task, forgotten_classes: Tensor, n_curvature: int) -> RiskTerm:
    """The divergence of the retained predictions from the trained model's, once the forgotten classes are ruled out."""
    with_teacher = teacher(task.objective, forgotten_classes)
    fit = task.retain_fit.map(with_teacher)
    measured = fit if task.retain_eval is task.retain_fit else task.retain_eval.map(with_teacher)
    return RiskTerm(1.0, fit, measured, n_curvature, teacher_loss(task.objective))


def choose_goal(request: Request, tuned: Iterable[Goal], notes: list[str]) -> Goal:
    """The goal of a request, with its tuned numbers.

    Args:
        request: What is asked.
        tuned: Goals with other numbers than their defaults.
        notes: Of the report.
    """
    for kind in reversed(list(GOALS.values())):
        if kind.applies(request, notes):
            return next((goal for goal in tuned if type(goal) is kind), kind())
    raise AssertionError("the first goal applies to all requests")
