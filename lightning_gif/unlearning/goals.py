"""The goals of an edit. Each goal is a class that defines its risk, its limits, its memorization and its report texts.

To add a goal, write a subclass of :class:`Goal` and register it with ``GOALS.register``. No other module depends on
which goal an edit has. The effect of each tuned number is measured in ``benchmarks/README.md``, section "What the tuned
numbers of an edit move". Comments here name the part of that section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.products import Losses
from ..curvature.sampling import CURVATURE_EXAMPLES
from ..errors import ConfigurationError
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
from .verdict import Evidence, Verdict, of_correction, of_membership, of_prediction, of_share

__all__ = ["GOALS", "ClassRemoval", "ExampleRemoval", "Goal", "LabelCorrection", "choose_goal"]


@dataclass(frozen=True)
class Goal(CheckedNumbers):
    """The goal of an edit. Its fields are the goal's tuned numbers.

    Attributes:
        name: The name of the goal in reports and files: that which it is registered under.
        strategy: The name of the strategy that an edit has by default, if the model and the settings allow it.
        compares_with_unseen: Whether the losses of forget examples are compared with those of unseen examples.
        influence_first: Whether ``"relinearise"`` starts along the influence direction. If so, a search along it takes
            the natural step if the predicted change of the risk is below rounding.
        smallest_step: Whether ``"search"`` takes the smallest step size that reaches the target memorization. Otherwise
            it takes the step size with the least risk.
        bounded_risk: Whether the risk has a lower bound.
        pursues_target: Whether ``"relinearise"`` goes on after steps that gain little, until memorization has reached
            its target.
        scales_by_gradients: Whether the gradient second moment is part of the preconditioner.
        far_memorization: Above this memorization, descent directions are solved with the method of the edit. Below it,
            all but the first are Newton steps.
        far_curvature_share: Above ``far_memorization``, the curvature is computed from this share of the examples.
        first_damping: If the risk is convex: the damping of the first solve for a descent direction, as a share of
            ``‖Aᵀg‖/‖g‖``, where ``A`` is the matrix and ``g`` the right-hand side of the least-squares problem.
        max_step_size: The largest step size along the influence direction. The line search may have a smaller limit.
        spares_unseen: Whether the loss of unseen examples should not rise, because none of them is to be forgotten.
        remedy: What to do about an edit that was not done, or in part.
        curvature_examples: The number of retained examples that solves see with ``curvature_examples="auto"``.
        descent_iterations: The largest number of iterations of a solve for a descent direction, if neither ``max_iter``
            nor ``rtol`` is given.
        notable_increase: The report warns if a loss that should not rise does so by more than this share of its value.
    """

    name: ClassVar[str]
    strategy: ClassVar[str] = "relinearise"
    compares_with_unseen: ClassVar[bool] = False
    influence_first: ClassVar[bool] = False
    smallest_step: ClassVar[bool] = False
    bounded_risk: ClassVar[bool] = True
    pursues_target: ClassVar[bool] = True
    scales_by_gradients: ClassVar[bool] = False
    remedy: ClassVar[str] = "Undo the edit if it is of no use to you, or try another `step`."
    spares_unseen: ClassVar[bool] = True
    far_memorization = math.inf
    far_curvature_share = 1.0
    first_damping = 0.0
    max_step_size = math.inf

    # "Scores that predict retraining": 512 examples are worse, and all examples are no better.
    curvature_examples: int = number(CURVATURE_EXAMPLES, low=1, open_low=False)
    # "What the settings of an edit buy", row `max_iter=5`.
    descent_iterations: int = number(5, low=1, open_low=False)
    notable_increase: float = number(0.1, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether a request has this goal. Goals that were registered later are tried first.

        Args:
            request: The request.
            notes: The notes of the report, which may be extended.
        """
        raise NotImplementedError

    def sample_size(self, settings: Settings) -> int | None:
        """The number of retained examples that solves see; ``None`` for all."""
        chosen = settings.curvature_examples
        return self.curvature_examples if isinstance(chosen, str) else chosen

    def forgotten_classes(self, request: Request) -> Tensor | None:
        """The classes to remove, as a mask ``(C,)``; ``None`` if the goal does not depend on predictions."""
        return None

    def risk(self, task: Task) -> list[RiskTerm]:
        """The terms of the risk. The first term is about the retained examples."""
        raise NotImplementedError

    def memorization(self, task: Task) -> Memorization | None:
        """The measurement of :attr:`~lightning_gif.unlearning.protocol.Trial.memorization`; ``None`` for none."""
        raise NotImplementedError

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """The target memorization and the maximal retained loss of the edit.

        Args:
            start: The trial of the trained model.
            scales: The scales of these limits.
        """
        raise NotImplementedError

    def is_convex(self, task: Task) -> bool:
        """Whether the risk is convex in the outputs, so that its GGN matrix has no negative eigenvalues."""
        return False

    def is_negligible(self, risk: float) -> bool:
        """Whether a risk is too small to justify another solve after the target memorization is reached."""
        return False

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether ``"relinearise"`` may go on after one step that gained little. After two in a row it may not.

        Args:
            accepted: The accepted trial of that step; ``None`` if the step was rejected.
            at_target: Whether the target memorization is reached.
        """
        return False

    def verdict(self, evidence: Evidence) -> Verdict | None:
        """Whether an edit worked; ``None`` if the goal has no measure of it.

        Args:
            evidence: The losses and predicted classes before and after the edit, and what was aimed at.
        """
        return None

    def costs(self, before: Mapping[str, float], after: Mapping[str, float], scales: Scales) -> list[str]:
        """The messages about losses that the edit raised more than the goal tolerates.

        Args:
            before: Mean losses at the trained weights, by name: ``"forget"``, ``"retain"``, and ``"relabelled"`` and
                ``"unseen"`` if there are such examples.
            after: Mean losses of the edited model.
            scales: The scales of the goal's limits.
        """
        return self._cost_to_unseen(before, after) if self.spares_unseen else []

    def _cost_to_unseen(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        if "unseen" not in after or after["unseen"] - before["unseen"] <= self.notable_increase * abs(before["unseen"]):
            return []
        return [
            f"The loss of the unseen examples rose from {before['unseen']:.4g} to {after['unseen']:.4g}: the model"
            " predicts worse than before. Undo the edit, or try step='search' or step='natural', which change less."
        ]

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The meaning of memorization in a few words, for a plot or a line of text."""
        raise NotImplementedError

    @classmethod
    def memorization_unit(cls) -> str:
        """The unit of memorization, for the axis of a plot."""
        return "share of the forget examples"

    @classmethod
    def memorization_text(cls, before: float, after: float, n_unseen: int) -> str:
        """The line of a report about memorization before and after an edit."""
        return f"{cls.memorization_title(n_unseen)}: {100 * before:.1f} % -> {100 * after:.1f} %"


class _Goals(Registry[type[Goal]]):
    """A registry that gives each class its name."""

    def register(self, name: str) -> Callable[[type[Goal]], type[Goal]]:
        """A decorator that registers a class of goals, and sets its :attr:`Goal.name`.

        Args:
            name: The name.

        Raises:
            ConfigurationError: If the name is taken, or the class is registered under another one.
        """

        def add(kind: type[Goal]) -> type[Goal]:
            if kind in self.values():
                raise ConfigurationError(
                    f"{kind.__name__} is registered already, as {str(kind.name)!r}; register a subclass as {name!r}."
                )
            Registry.register(self, str(name))(kind)
            kind.name = name
            return kind

        return add


GOALS = _Goals("goal")
"""All goals by name. A request has the goal that was registered last of those that apply to it."""


@GOALS.register(GoalName.EXAMPLES)
@dataclass(frozen=True)
class ExampleRemoval(Goal):
    """The goal where other examples of the same labels are retained, or the model's predictions are not known.

    The risk is the loss of the retained examples, which retraining would minimise. Training does not end in an exact
    minimum, and even a minimum has a gradient on a sample of the data. So the gradient of the loss of *all* data at the
    trained weights is subtracted (the baseline gradient). The edit then responds to the removal only. It does not
    continue training, and it does not fit the sample.

    With unseen examples, the risk has a second term. A model retrained without a memorized example would have a larger
    loss on it. So each forget example gets a target loss ``t``: the loss of the unseen example of its class with the
    same rank. Each forget example whose loss ``ℓ`` is below ``t`` adds ``(t − ℓ)²/(2σ)`` to the risk, where ``σ`` is
    the root mean square of ``t − ℓ`` over these examples at the trained weights.

    Attributes:
        target_memorization: A membership AUROC of 0.5: the losses do not separate forget and unseen examples.
        memorized_weight: The weight of a forget example in the second term, relative to a retained example.
        memorized_share: Forget examples with ``t − ℓ`` below this share of the root mean square are left out of the
            second term, because most of them were not memorized.
        retain_budget: The largest increase of the retained loss. With unseen examples it is a share of the difference
            between unseen and retained loss: an increase by the whole difference would forget the retained examples,
            too. Without unseen examples it is a share of the retained loss, and at least the share ``m/(n−m)``: if many
            examples are removed, weight decay has a larger weight, which costs about so much even at the best weights.
            A limit is needed because the risk, less its baseline, may have no lower bound.
        min_retain_budget: An increase by less than this share of the retained loss (with unseen examples) or of the
            chance loss (without) is always allowed.
        max_step_size: The largest step size along the influence direction.
    """

    strategy = "match"
    compares_with_unseen = True
    influence_first = True
    bounded_risk = False
    pursues_target = False
    remedy = "Retrain without these examples if they must be forgotten."

    target_memorization = 0.5

    memorized_weight: float = number(8.0)
    memorized_share: float = number(0.05, open_low=False)
    retain_budget: float = number(0.1, open_low=False)
    min_retain_budget: float = number(0.01, open_low=False)
    max_step_size: float = number(4.0, low=1.0, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """True for every request."""
        return True

    def risk(self, task: Task) -> list[RiskTerm]:
        """The retained loss less its baseline gradient, and the distance of memorized losses to their target losses."""
        objective, weight = task.objective, task.forget_weight
        n_curvature = task.sizes.descent_curvature
        # The gradient that training left on all data, estimated with each of the two samples of the retained data.
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
        """The term of the forget examples whose losses are below their target losses; empty if there are none."""
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
        memorized = task.budget.hold(memorized)
        weight = self.memorized_weight * task.forget_weight * len(short) / len(task.forget)
        return [RiskTerm(weight, memorized, memorized, n_curvature, OutputLoss(objective.losses, matching.sum))]

    def memorization(self, task: Task) -> Memorization | None:
        """The membership AUROC against unseen examples; ``None`` without unseen examples."""
        if task.unseen is None:
            return None
        return MembershipAUROC(task.objective, task.forget_eval, task.unseen)

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """With unseen examples the target is an AUROC of 0.5, else there is no target; see ``retain_budget``."""
        if scales.unseen_loss is not None and not math.isnan(start.memorization):
            # Even if the unseen loss is not larger than the retained loss, forgetting needs some budget.
            least = self.min_retain_budget * abs(start.retain_loss)
            budget = max(self.retain_budget * (scales.unseen_loss() - start.retain_loss), least)
            return Limits(self.target_memorization, start.retain_loss + budget)
        least = scales.chance_loss(self.min_retain_budget)
        share = max(self.retain_budget, scales.forget_weight)
        return Limits(None, start.retain_loss + max(share * abs(start.retain_loss), least))

    def verdict(self, evidence: Evidence) -> Verdict:
        """By the predicted loss if the edit aims at it, else the membership AUROC, else the change of the loss."""
        return of_prediction(evidence) if evidence.predicted else of_membership(evidence)

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The membership AUROC."""
        return f"membership AUROC against {n_unseen} unseen examples"

    @classmethod
    def memorization_unit(cls) -> str:
        """The AUROC, with the value that means that nothing is remembered."""
        return "AUROC (0.5 = indistinguishable)"

    @classmethod
    def memorization_text(cls, before: float, after: float, n_unseen: int) -> str:
        """The AUROC before and after, with the value that means that nothing is remembered."""
        return f"{cls.memorization_title(n_unseen)}: {before:.3f} -> {after:.3f} (0.5 = indistinguishable)"


@GOALS.register(GoalName.CLASS)
@dataclass(frozen=True)
class ClassRemoval(Goal):
    """The goal where the forget examples are all examples of their classes. The classes should not be predicted.

    The expected predictions for the retained examples are those of the trained model, with the forgotten classes ruled
    out by Bayes' rule, see :func:`~lightning_gif.unlearning.risk.teacher`. The risk has two terms. The first is the
    mean of ``KL(expected ‖ predicted)`` over the retained examples. It can reach zero without fitting the labels of a
    sample. The second term has a weight. It is the mean of ``−log(1 − p)`` over the forget examples, where ``p`` is the
    probability of the forgotten classes.

    Attributes:
        target_memorization: The share of the forget examples that may still be predicted as one of the classes.
        unlikelihood_weight: The weight of the second term.
        retain_budget: The largest increase of the retained loss, as a share of the chance loss.
        far_memorization: Above this memorization, log-odds are far from their target. Then the second term uses the
            curvature of a bound instead of its own.
        far_curvature_share: Above ``far_memorization``, the curvature is computed from this share of the examples,
            because steps far from the target need not be accurate.
        forget_share: The number of forget examples from which the curvature is computed, as a share of
            :attr:`SampleSizes.descent_curvature <lightning_gif.unlearning.SampleSizes>`.
        negligible_risk: A risk in nats that is smaller than the difference between retrained models.
        curvature_examples: The number of retained examples that solves see; fewer than for other goals.
    """

    smallest_step = True
    remedy = (
        "A further step would raise the retained loss too much, would not lower the risk, or was not requested. Try"
        " targets='batch', another selector, a larger ratio, or another `step`."
    )

    spares_unseen = False
    target_memorization: float = number(0.005, high=1.0)
    unlikelihood_weight: float = number(0.2)
    retain_budget: float = number(0.05, open_low=False)
    far_memorization: float = number(0.5, high=1.0)
    # "Every class forgotten", the list of choices: saved a ninth of the time on TinyNet, and nothing on the ResNet.
    far_curvature_share: float = number(0.5, high=1.0)
    forget_share: float = number(0.25, high=1.0)
    # The same list: together with 1024 instead of 2048 curvature examples this saved a fifth of the time, and cost 0.02
    # to 0.06 points.
    negligible_risk: float = number(0.004, open_low=False)
    curvature_examples: int = number(1024, low=1, open_low=False)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether no other training example has a label of the forget examples, and the predictions are known."""
        labels = request.forget.classes
        if request.relabelled is not None or labels is None or not request.others.has_none_of(labels):
            return False
        if request.n_classes is None or request.objective.n_classes(request.others) != request.n_classes:
            warn_and_note(
                notes,
                "All examples of a class are to be forgotten, but the model's predictions are not known: its loss does"
                " not call F.cross_entropy (or F.nll_loss) with one row of logits for each example and the labels of"
                " the batch. The goal is therefore example removal, and the examples may still be predicted as their"
                " class.",
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
        """The divergence on the retained examples, and the unlikelihood of the forget examples."""
        assert task.forgotten_classes is not None
        n_curvature = task.sizes.descent_curvature
        logits, classes = task.objective.logits, task.forgotten_classes
        forgotten = RiskTerm(
            self.unlikelihood_weight,
            task.forget_eval,
            task.forget_eval,
            math.ceil(self.forget_share * n_curvature),
            OutputLoss(logits, Unlikelihood(classes)),
            OutputLoss(logits, UnlikelihoodBound(classes)),
        )
        return [_keep_predictions(task, classes, n_curvature), forgotten]

    def memorization(self, task: Task) -> Memorization | None:
        """The share of the forget examples that are predicted as one of the forgotten classes."""
        assert task.forgotten_classes is not None
        return PredictedShare(task.objective, task.forget_eval, count_as(task.forgotten_classes))

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """The target share, and the retained loss plus a share of the chance loss."""
        return Limits(self.target_memorization, start.retain_loss + scales.chance_loss(self.retain_budget))

    def is_negligible(self, risk: float) -> bool:
        """Whether the risk is smaller than the difference between retrained models."""
        return risk < self.negligible_risk

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether the step was rejected or shortened, since the next solve can then do better.

        If the class is predicted with certainty, its curvature vanishes, and a step can be useless; the next solve uses
        the curvature of a bound. A shortened Newton step had too little damping; the next one has more.
        """
        return accepted is None or accepted.step_sizes[-1] < 1

    def verdict(self, evidence: Evidence) -> Verdict | None:
        """By the share of the forget examples that are still predicted as one of the classes."""
        forget = evidence.outcomes["forget"]
        if forget.labels is None or forget.predicted_before is None or forget.predicted_after is None:
            return None
        still = [torch.isin(one, forget.labels) for one in (forget.predicted_before, forget.predicted_after)]
        sentence = "{after} of {count} examples of the class are still predicted as it (before the edit: {before})."
        return of_share((still[0], still[1]), self.target_memorization, sentence, is_sample=True)

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The share that is still predicted as the class."""
        return "still predicted as the class"


@GOALS.register(GoalName.LABELS)
@dataclass(frozen=True)
class LabelCorrection(Goal):
    """The goal where the forget examples get new labels.

    ``"match"`` only reports the risk. Others lower it. It is the mean of ``KL(expected ‖ predicted)``
    over the retained examples, plus the weighted cross-entropy of the corrected examples. The expected predictions are
    those of the trained model. If predictions are not known, the risk is the loss of retained and corrected examples
    with equal weights, which retraining would minimise. No baseline gradient is subtracted, because the risk of a
    non-convex model might then have no minimum.

    Attributes:
        target_memorization: The share of the labels that may stay uncorrected if further steps gain little. Except for
            ``"match"``, the report has a warning if more labels stay uncorrected.
        corrected_weight: The weight of a corrected example relative to a retained one. It is above 1, because some of
            the retained predictions were learned from the wrong labels and oppose the correction.
        retain_budget: The report has a warning if the retained loss rises by more than this share of the chance loss.
            The increase must also be more than ``notable_increase`` of the loss, and more than that share of the
            decrease of the corrected loss, weighted by ``m/(n−m)``.
        far_memorization: While more than this share of the labels is wrong, descent directions are damped least-squares
            solutions.
        descent_iterations: More than for other goals.
        first_damping: The relative damping of these solutions. The GGN matrix is nearly zero on wrong labels that are
            predicted with certainty. Without damping, nearly all first steps of small networks raised the risk.
    """

    strategy = "match"
    # "A backdoor repaired", the row with eight iterations for each solve and entries scaled by their gradients.
    scales_by_gradients = True
    remedy = "Compare the retained loss before and after, and undo the edit if it is not worth the cost."

    target_memorization: float = number(0.2, high=1.0)
    corrected_weight: float = number(8.0)
    retain_budget: float = number(0.05, open_low=False)
    far_memorization: float = number(0.25, high=1.0)
    # "A backdoor repaired", the row with eight iterations for each solve.
    descent_iterations: int = number(8, low=1, open_low=False)
    # "A backdoor repaired": with 0.1 or 0.3 the mean of six draws changes by less than the draws differ.
    first_damping: float = number(0.2)

    @classmethod
    def applies(cls, request: Request, notes: list[str]) -> bool:
        """Whether there are new labels."""
        return request.relabelled is not None

    def forgotten_classes(self, request: Request) -> Tensor | None:
        """A mask without any class; ``None`` if predictions are not known."""
        if request.n_classes is None:
            return None
        return torch.zeros(request.n_classes, dtype=torch.bool, device=request.objective.device)

    def risk(self, task: Task) -> list[RiskTerm]:
        """The divergence on retained and the cross-entropy of corrected examples; without predictions, their losses."""
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

    def memorization(self, task: Task) -> Memorization | None:
        """The share of corrected examples not predicted as their new label; ``None`` if predictions are not known."""
        if task.forgotten_classes is None or task.relabelled_eval is None:
            return None
        return PredictedShare(task.objective, task.relabelled_eval, count_wrong)

    def limits(self, start: Trial, scales: Scales) -> Limits:
        """The target share. The retained loss has no limit, because the risk includes it."""
        return Limits(None if scales.n_classes is None else self.target_memorization, math.inf)

    def is_convex(self, task: Task) -> bool:
        """Whether predictions are known, since then the risk is convex in the logits."""
        return task.forgotten_classes is not None

    def outlasts_small_gain(self, accepted: Trial | None, at_target: bool) -> bool:
        """Whether the step was accepted or the target is not reached: later changes are solved in another way."""
        return accepted is not None or not at_target

    def verdict(self, evidence: Evidence) -> Verdict | None:
        """By the predicted loss if the edit aims at it, else by the share of new labels that are predicted."""
        if evidence.predicted:
            return of_prediction(evidence)
        corrected = evidence.outcomes["relabelled"]
        labels, before, after = corrected.labels, corrected.predicted_before, corrected.predicted_after
        if labels is None or before is None or after is None:
            return of_correction(evidence.outcomes)
        sentence = (
            "{after} of {count} corrected examples are not predicted as their new label (before the edit: {before})."
        )
        return of_share((before != labels, after != labels), self.target_memorization, sentence, is_sample=False)

    def costs(self, before: Mapping[str, float], after: Mapping[str, float], scales: Scales) -> list[str]:
        """The messages that the loss of the retained or of the corrected examples rose."""
        gained = before["relabelled"] - after["relabelled"]
        messages = []
        if after["retain"] - before["retain"] > self.tolerated_increase(before["retain"], gained, scales):
            messages.append(
                f"The retained loss rose from {before['retain']:.4g} to {after['retain']:.4g}. The new labels"
                " contradict what the model learned from the other examples. A model trained with the new labels would"
                " not learn all of them either. Check that they are right, and undo the edit if it is not worth the"
                " cost."
            )
        if -gained > self.notable_increase * abs(before["relabelled"]):
            messages.append(
                f"The loss of the corrected examples rose from {before['relabelled']:.4g} to"
                f" {after['relabelled']:.4g}: the edit lowered the loss of the retained examples instead. Either"
                " training had not converged, or there are too few corrected examples."
            )
        return messages or self._cost_to_unseen(before, after)

    def tolerated_increase(self, retain_loss: float, gained: float, scales: Scales) -> float:
        """The largest increase of the retained loss about which the report does not warn.

        It is the largest of a share of the loss, of the weighted gain, and of the chance loss.

        Args:
            retain_loss: The retained loss before the edit.
            gained: The decrease of the loss of the corrected examples.
            scales: The scales of the goal's limits.
        """
        chance = scales.chance_loss(self.retain_budget)
        own = self.notable_increase * abs(retain_loss)
        return max(own, self.notable_increase * scales.forget_weight * gained, chance)

    @classmethod
    def memorization_title(cls, n_unseen: int) -> str:
        """The share that is not predicted as the new label."""
        return "not predicted as the new label"


def _keep_predictions(task: Task, forgotten_classes: Tensor, n_curvature: int) -> RiskTerm:
    """The divergence of the retained predictions from the expected ones, see :class:`ClassRemoval`."""
    with_teacher = teacher(task.objective, forgotten_classes)
    fit = task.budget.map(task.retain_fit, with_teacher)
    measured = fit if task.retain_eval is task.retain_fit else task.budget.map(task.retain_eval, with_teacher)
    return RiskTerm(1.0, fit, measured, n_curvature, teacher_loss(task.objective))


def choose_goal(request: Request, tuned: Iterable[Goal], notes: list[str]) -> Goal:
    """The goal of a request, with its tuned numbers.

    Args:
        request: The request.
        tuned: Goals whose numbers differ from the defaults.
        notes: The notes of the report, which may be extended.
    """
    for kind in reversed(list(GOALS.values())):
        if kind.applies(request, notes):
            return next((goal for goal in tuned if type(goal) is kind), kind())
    raise AssertionError("the first goal applies to all requests")
