"""The request of an edit, and the data that the edit is decided on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.sampling import curvature_sample
from ..data.batch import Batch
from ..data.examples import Examples
from ..data.identity import locate
from ..data.targets import find_targets
from ..errors import BatchError, TrainingDataError
from ..objective.objective import Objective
from ..reporting.notes import warn_and_note
from ..selection.training_length import TrainingLength
from .budget import MemoryBudget
from .checked import CheckedNumbers, number
from .risk import OutputLoss, cross_entropy

__all__ = [
    "Request",
    "SampleSizes",
    "Scales",
    "Task",
    "all_but",
    "check_new_labels",
    "retained_examples",
    "without_forgotten",
]


@dataclass(frozen=True)
class SampleSizes(CheckedNumbers):
    """The numbers of examples that an edit uses.

    Attributes:
        evaluation: The largest number of examples of each kind that a trial is measured on.
        descent_curvature: The number of retained examples from which the curvature for a descent direction is computed.
            The gradient uses more examples. Fewer suffice for the curvature, because trials decide on the step size
            (Byrd et al., *SIAM Journal on Optimization* 21, 2011).
        min_compared: The losses of forget and unseen examples are compared only if there are this many of each kind.
    """

    evaluation: int = number(1024, low=2, open_low=False)
    descent_curvature: int = number(256, low=1, open_low=False)
    min_compared: int = number(20, low=1, open_low=False)


def check_new_labels(relabelled: Examples, n_classes: int) -> None:
    """Checks that all new labels are classes that the model predicts.

    Raises:
        BatchError: If a new label is negative, or ``n_classes`` or larger.
    """
    for batch in relabelled.local_batches():
        new = find_targets(batch.data)
        wrong = None if new is None else new[(new < 0) | (new >= n_classes)]
        if wrong is not None and wrong.numel():
            raise BatchError(
                f"`relabel` has the label {wrong[0].item()}, but the model predicts {n_classes} classes: 0 to"
                f" {n_classes - 1}."
            )


@dataclass(frozen=True)
class Request:
    """What an edit is asked to do. It has all examples, before samples are drawn.

    Attributes:
        objective: An open objective.
        settings: Method, solver and their parameters.
        forget: The forget examples, with the labels they were trained with.
        relabelled: The forget examples with their new labels; ``None`` for removal.
        retained: The retained examples.
        others: All training examples that are not forget examples, even if the user gave fewer as retained.
        unseen: Examples that the model was not trained on; ``None`` if there are none.
        forget_weight: ``m/(n−m)``: the weight of the forget examples relative to the retained ones.
        n_classes: The number of classes that the model predicts; ``None`` if its predictions are not known.
        training: How far the optimizers of the training could move each parameter; empty if this is not known.
        earlier: Snapshots: parameters and buffers by name of the model during training, by epoch. New labels use none.
    """

    objective: Objective
    settings: Settings
    forget: Examples
    relabelled: Examples | None
    retained: Examples
    others: Examples
    unseen: Examples | None
    forget_weight: float
    n_classes: int | None
    training: TrainingLength = field(default_factory=TrainingLength)
    earlier: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scales:
    """The quantities that the limits of an edit are shares of.

    Attributes:
        forget_weight: ``m/(n−m)``.
        n_classes: The number of classes that the model predicts; ``None`` if its predictions are not known.
        loss_per_nat: Returns the value of one nat of cross-entropy in the unit of the loss.
        unseen_loss: Returns the mean loss of the unseen examples; ``None`` if there are none.
    """

    forget_weight: float
    n_classes: int | None
    loss_per_nat: Callable[[], float]
    unseen_loss: Callable[[], float] | None

    def chance_loss(self, share: float) -> float:
        """A share of the chance loss, ``log C``, in the unit of the loss; 0 if predictions are not known."""
        return share * math.log(self.n_classes) * self.loss_per_nat() if self.n_classes else 0.0


@dataclass(frozen=True)
class Task:
    """The data that an edit is decided on, with samples of it, and the gradients at the trained weights.

    Attributes:
        objective: An open objective.
        settings: Method, solver and their parameters.
        forget: All forget examples.
        forget_eval: The forget examples that trials are measured on.
        relabelled: All forget examples with their new labels; ``None`` for removal.
        relabelled_eval: The relabelled examples that trials are measured on; ``None`` for removal.
        retain_fit: The retained examples that solves see.
        retain_eval: The retained examples that trials are measured on. They are not in ``retain_fit``, if there are
            enough others.
        unseen: Examples that the model was not trained on; ``None`` if there are too few, or if the goal needs none.
        forget_weight: ``m/(n−m)``: the weight of the forget examples relative to the retained ones.
        n_classes: The number of classes that the model predicts; ``None`` if its predictions are not known.
        forgotten_classes: A mask ``(C,)`` over the predicted classes, true for the classes to remove; ``None`` if the
            goal does not depend on predictions, or if they are not known.
        sizes: The numbers of examples to draw.
        budget: The memory that the edit may keep.
        retained: All retained examples.
        training: How far the optimizers of the training could move each parameter; empty if this is not known.
        earlier: Snapshots: parameters and buffers by name of the model during training, by epoch.
    """

    objective: Objective
    settings: Settings
    forget: Examples
    forget_eval: Examples
    relabelled: Examples | None
    relabelled_eval: Examples | None
    retain_fit: Examples
    retain_eval: Examples
    unseen: Examples | None
    forget_weight: float
    n_classes: int | None
    forgotten_classes: Tensor | None
    sizes: SampleSizes
    budget: MemoryBudget
    retained: Examples
    training: TrainingLength
    earlier: dict[int, Mapping[str, Tensor]]

    @classmethod
    def prepare(
        cls,
        request: Request,
        sizes: SampleSizes,
        *,
        n_fit: int | None,
        compares_with_unseen: bool,
        aims_at_unseen: bool,
        forgotten_classes: Tensor | None,
        notes: list[str],
    ) -> Task:
        """Draws the samples for a request.

        Args:
            request: The request.
            sizes: The numbers of examples to draw.
            n_fit: The number of retained examples that solves see; ``None`` for all.
            compares_with_unseen: Whether the goal compares forget with unseen examples.
            aims_at_unseen: Whether this comparison decides how far the edit goes.
            forgotten_classes: See the class.
            notes: The notes of the report, which may be extended.

        Raises:
            NonFiniteError: If the loss of an unseen example is not finite.
        """
        objective, settings = request.objective, request.settings
        budget, seed = MemoryBudget.of(settings, objective), settings.seed
        n_eval = sizes.evaluation if n_fit is None else min(n_fit, sizes.evaluation)
        fit = curvature_sample(objective, request.retained, n_fit, settings.curvature_sampling, seed)
        # A solve lowers the loss of the examples that it sees more than the loss of other examples. So trials are
        # measured on other examples.
        taken = torch.isin(request.retained.ids, fit.ids).nonzero().squeeze(1)
        left = len(request.retained) - len(taken)
        others = all_but(request.retained, taken) if left and left >= min(len(fit), n_eval) // 2 else fit

        forget_eval = request.forget.sample(n_eval, seed)
        unseen = None
        if request.unseen is not None and compares_with_unseen:
            if min(len(request.forget), len(request.unseen)) >= sizes.min_compared:
                unseen = budget.hold(request.unseen.sample(n_fit, seed))
                objective.check(unseen, "unseen")
            else:
                decides = (
                    " So only the influence direction and the loss of the retained examples decide how far the edit"
                    " goes."
                )
                notes.append(
                    "The losses of forget and unseen examples are not compared, because there are fewer than"
                    f" {sizes.min_compared} of one kind.{decides * aims_at_unseen}"
                )
        relabelled = request.relabelled
        return cls(
            objective=objective,
            settings=settings,
            forget=request.forget,
            forget_eval=budget.hold(forget_eval),
            relabelled=relabelled,
            relabelled_eval=None if relabelled is None else relabelled.sample(n_eval, seed),
            retain_fit=budget.hold(fit),
            retain_eval=budget.hold(others.sample(n_eval, seed)),
            unseen=unseen,
            forget_weight=request.forget_weight,
            n_classes=request.n_classes,
            forgotten_classes=forgotten_classes,
            sizes=sizes,
            budget=budget,
            retained=request.retained,
            training=request.training,
            earlier=request.earlier if relabelled is None else {},  # measured for removals only
        )

    @property
    def measured(self) -> dict[str, Examples]:
        """The examples on which a report measures the edit, by name."""
        parts = {
            "forget": self.forget_eval,
            "retain": self.retain_eval,
            "relabelled": self.relabelled,
            "unseen": self.unseen,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @cached_property
    def forget_gradient(self) -> Tensor:
        """The gradient ``(p,)`` of the mean loss of the forget examples with their old labels."""
        return self.objective.gradient(self.forget)

    def leave_out_gradient(self, share: float) -> Tensor:
        """The gradient ``(p,)`` of the mean loss of all training examples, minus that of the retained ones.

        It is ``(m/n) (∇F − ∇R)``, where ``F`` and ``R`` are the mean losses of the forget and of the retained examples,
        and ``R`` is estimated on the examples of the curvature. At the minimum of the loss of all examples it equals
        :attr:`influence_gradient`. Before the minimum, ``∇F`` and ``∇R`` have a part in common. Training without the
        forget examples would follow this part as well, so it cancels. A share of the result is taken at
        :attr:`earlier` states, if there are any: memorized examples have hardly any gradient at the end, but had a
        large one before. For new labels, this is :attr:`influence_gradient`.

        Args:
            share: The share of the mean over earlier states.
        """
        if self.relabelled is not None:
            return self.influence_gradient
        objective = self.objective
        found = self.forget_gradient - objective.gradient(self.retain_fit)
        if self.earlier and share:
            total = torch.zeros_like(found)
            for state in self.earlier.values():
                with objective.at_state(objective.model_state(state)):
                    total += objective.gradient(self.forget) - objective.gradient(self.retain_fit)
            found = torch.lerp(found, total / len(self.earlier), share)
        return self.forget_weight / (1 + self.forget_weight) * found

    @cached_property
    def relabelled_gradient(self) -> Tensor | None:
        """The gradient ``(p,)`` of their mean loss with the new labels; ``None`` for removal."""
        return None if self.relabelled is None else self.objective.gradient(self.relabelled)

    @cached_property
    def retain_gradient(self) -> Tensor:
        """The gradient ``(p,)`` of the mean loss of the retained examples that trials are measured on."""
        return self.objective.gradient(self.retain_eval)

    @property
    def given_gradient(self) -> Tensor:
        """The gradient ``(p,)`` of the forget examples; for new labels, the difference between old and new ones."""
        new = self.relabelled_gradient
        return self.forget_gradient if new is None else self.forget_gradient - new

    @cached_property
    def influence_gradient(self) -> Tensor:
        """The gradient ``g`` ``(p,)`` of the influence direction, see :func:`~.unlearn.unlearn`."""
        # Removing examples does not reduce weight decay. So the gradient of each example includes the decay's gradient.
        decay = self.settings.weight_decay * self.objective.theta
        old, new = self.forget_gradient, self.relabelled_gradient
        return self.forget_weight * (old + decay if new is None else old - new)

    def loss_per_nat(self, retain_loss: float) -> float:
        """The value of one nat of cross-entropy in the unit of the loss, from the retained examples; at most 1.

        The loss may be cross-entropy times a factor below 1. If it is larger than cross-entropy, for example because it
        has other terms, 1 is returned.

        Args:
            retain_loss: The mean loss of the retained examples at the trained weights.
        """
        objective = self.objective

        def entropy(logits: Tensor, batch: Batch) -> Tensor:
            known = batch.classes is not None  # a batch may have targets that are not labels, such as -100
            return cross_entropy(logits, batch) if known else logits.new_zeros(())

        loss = OutputLoss(objective.logits, entropy)
        mean_entropy = objective.mean(self.retain_eval, loss.loss_sum, objective.theta)
        return retain_loss / mean_entropy if 0 < retain_loss < mean_entropy else 1.0

    def scales(self, retain_loss: float) -> Scales:
        """The scales of the edit's limits.

        Args:
            retain_loss: The mean loss of the retained examples at the trained weights.
        """
        objective, unseen = self.objective, self.unseen
        return Scales(
            forget_weight=self.forget_weight,
            n_classes=self.n_classes,
            loss_per_nat=lambda: self.loss_per_nat(retain_loss),
            unseen_loss=None if unseen is None else lambda: objective.mean_loss(unseen),
        )


def all_but(examples: Examples, positions: Tensor) -> Examples:
    """The examples except those at the given positions ``(r,)``."""
    keep = torch.ones(len(examples), dtype=torch.bool)
    keep[positions] = False
    return examples.subset(keep.nonzero().squeeze(1))


def retained_examples(train: Examples, forget: Examples, found: Tensor, notes: list[str]) -> Examples:
    """The training examples that are not forget examples.

    Args:
        train: All training examples.
        forget: The forget examples.
        found: The positions ``(r,)`` of the forget examples in ``train``.
        notes: The notes of the report, which may be extended.

    Raises:
        TrainingDataError: If no training example is a forget example, or if all are.
    """
    if not len(found):
        raise TrainingDataError(
            f"None of the {len(forget)} forget examples is in the training data, by dataset index or by content. Either"
            " the model was not trained on them, or they have other labels there, or the training data are augmented at"
            " random, or padded to other lengths. Then give dataset indices, or a DataLoader over a Subset of the"
            " training set, or pass the data to keep as `retain`."
        )
    if len(found) > len(forget):
        notes.append(
            f"The training data hold {len(found)} copies of the {len(forget)} forget examples; all of them are"
            " forgotten."
        )
    if len(found) < len(forget):
        warn_and_note(
            notes,
            f"{len(forget) - len(found)} of the {len(forget)} forget examples were not found in the training data, by"
            " dataset index or by content. If the training data are augmented at random, they may still be among the"
            " retained data. Then give a DataLoader over a Subset of the training set, or pass the data to keep as"
            " `retain`.",
        )
    if len(found) == len(train):
        raise TrainingDataError(
            "All training examples are to be forgotten; nothing would be retained. Train a new model instead."
        )
    return all_but(train, found)


def without_forgotten(retain: Examples, forget: Examples, notes: list[str]) -> Examples:
    """The examples given as ``retain``, without the forget examples.

    Args:
        retain: The examples given as ``retain``.
        forget: The forget examples.
        notes: The notes of the report, which may be extended.

    Raises:
        TrainingDataError: If no example is left.
    """
    both = locate(forget, retain)
    if len(both):
        warn_and_note(
            notes, f"{len(both)} of the examples given as `retain` are forget examples; they are not retained."
        )
    if len(both) == len(retain):
        raise TrainingDataError("All examples given as `retain` are forget examples; nothing would be retained.")
    return all_but(retain, both) if len(both) else retain
