"""Metrics that compare one model with a reference, or with examples that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import (
    UnlearningMetric,
    joined,
    labels_of,
    log_odds,
    log_probabilities,
    mask_of,
    same_length,
    targets_of,
)
from .order import twice_in_order

__all__ = [
    "AccuracyGap",
    "JensenShannonDivergence",
    "MembershipInference",
    "PredictionAgreement",
    "RelabelF1",
    "RelearnTime",
    "RemovalF1",
]

# Replaces the logarithm of 0: its exponential is 0 in float64, and its product with 0 is not NaN.
_LOG_ZERO = -1e4


class _GroupsF1(UnlearningMetric):
    """The harmonic mean of the shares of good predictions in two groups of examples."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    good: Tensor
    seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("good", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def _count(self, first: Tensor, good: Tensor) -> None:
        """Counts a batch.

        Args:
            first: Whether each example is in the first group, ``(N,)`` bool.
            good: Whether its prediction is good, ``(N,)`` bool.
        """
        groups = torch.stack([first, ~first])
        self.good = self.good + (groups & good).sum(1)
        self.seen = self.seen + groups.sum(1)

    def compute(self) -> Tensor:
        first, second = self.good.float() / self.seen
        total = first + second
        return torch.where(total == 0, 0.0, 2 * first * second / total)


class RemovalF1(_GroupsF1):
    r"""How well classes were removed: they are no longer predicted, and other examples are predicted correctly.

    .. math::
        F_1 = \frac{2\,(1 - a_f)\,a_r}{(1 - a_f) + a_r}

    Here :math:`a_f` is the accuracy on the examples of all forgotten classes, and :math:`a_r` the accuracy on all other
    examples (Lyu et al., arXiv 2312.05586). An example of one forgotten class that is predicted as another forgotten
    class counts as forgotten.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits or probabilities ``(N, C)``, or predicted labels ``(N,)``.
    - ``target`` (:class:`~torch.Tensor`): the true labels ``(N,)``, also of examples of the forgotten classes.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``f1`` (:class:`~torch.Tensor`): a scalar between 0 and 1, and 1 is best. NaN until an example of a
      forgotten class and one of another class have been seen.

    Args:
        classes: The index of the forgotten class, or several indices.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``classes`` is empty or has anything but whole numbers from 0 up. From ``update``: if an
            input does not have the expected shape, type or range.

    Example:
        The accuracy on class 0 is 1/3, and on the other classes 1. The harmonic mean of 2/3 and 1 is 0.8:

        >>> import torch
        >>> from lightning_gif.metrics import RemovalF1
        >>> metric = RemovalF1(classes=0)
        >>> metric(torch.tensor([1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 2]))
        tensor(0.8000)
    """

    def __init__(self, classes: int | Iterable[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = _class_indices(classes)

    def update(self, preds: Tensor, target: Tensor) -> None:
        labels = labels_of("preds", preds)
        target = targets_of(target, preds)
        if preds.ndim == 2 and self.classes[-1] >= preds.shape[1]:
            raise ConfigurationError(
                f"`classes` has class {self.classes[-1]}, but `preds` has {preds.shape[1]} columns, for the"
                f" classes 0 to {preds.shape[1] - 1}; correct `classes`, or give the predictions for all classes."
            )
        forgotten = torch.isin(target, torch.tensor(self.classes, device=target.device))
        self._count(forgotten, (labels == target) ^ forgotten)


class RelabelF1(_GroupsF1):
    r"""How well labels were corrected: the new labels are predicted, and other examples are predicted correctly.

    .. math::
        F_1 = \frac{2\,a_n\,a_c}{a_n + a_c}

    Here :math:`a_n` is the share of the relabelled examples that are predicted as their new label, and :math:`a_c` the
    accuracy on the other, clean examples (Lyu et al., arXiv 2312.05586). For a backdoor, the relabelled examples are
    those with the trigger.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits or probabilities ``(N, C)``, or predicted labels ``(N,)``.
    - ``target`` (:class:`~torch.Tensor`): the correct labels ``(N,)``; for relabelled examples, the new labels.
    - ``relabelled`` (:class:`~torch.Tensor`): whether each example was relabelled, ``(N,)`` bool.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``f1`` (:class:`~torch.Tensor`): a scalar between 0 and 1, and 1 is best. NaN until a relabelled example and
      a clean one have been seen.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input does not have the expected shape, type or range.

    Example:
        One of two relabelled examples is predicted as its new label, and all clean examples are predicted correctly:

        >>> import torch
        >>> from lightning_gif.metrics import RelabelF1
        >>> metric = RelabelF1()
        >>> relabelled = torch.tensor([True, True, False, False])
        >>> metric(torch.tensor([1, 0, 2, 0]), torch.tensor([1, 1, 2, 0]), relabelled)
        tensor(0.6667)
    """

    def update(self, preds: Tensor, target: Tensor, relabelled: Tensor) -> None:
        labels = labels_of("preds", preds)
        target = targets_of(target, preds)
        self._count(mask_of("relabelled", relabelled, len(preds)), labels == target)


class AccuracyGap(UnlearningMetric):
    """The accuracy of a model minus the accuracy of a reference model, on the same examples, in percentage points.

    With a retrained model as the reference, the best value is 0 on every set of examples. Use one instance of the
    metric for each set. On the forget examples, a value above 0 means that the model still remembers them. A value
    below 0 means that it fails on them more often than the retrained model. On retained or test examples, a value below
    0 is the cost of unlearning.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits or probabilities ``(N, C)``, or predicted labels ``(N,)``.
    - ``reference`` (:class:`~torch.Tensor`): the predictions of the reference model, in either form.
    - ``target`` (:class:`~torch.Tensor`): the true labels ``(N,)``.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``gap`` (:class:`~torch.Tensor`): a scalar between -100 and 100, in percentage points. NaN before any example.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input does not have the expected shape, type or range.

    Example:
        The model predicts three of four labels correctly, and the reference model two:

        >>> import torch
        >>> from lightning_gif.metrics import AccuracyGap
        >>> gap = AccuracyGap()
        >>> gap(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1]))
        tensor(25.)
    """

    higher_is_better = None  # 0 is best
    plot_lower_bound = -100.0
    plot_upper_bound = 100.0

    difference: Tensor
    seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("difference", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, reference: Tensor, target: Tensor) -> None:
        labels, others = labels_of("preds", preds), labels_of("reference", reference)
        same_length(preds, reference)
        target = targets_of(target, preds)
        self.difference = self.difference + (labels == target).sum() - (others == target).sum()
        self.seen = self.seen + len(labels)

    def compute(self) -> Tensor:
        return 100 * self.difference.float() / self.seen


class PredictionAgreement(UnlearningMetric):
    """The share of examples for which two models predict the same label, correct or not.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits or probabilities ``(N, C)``, or predicted labels ``(N,)``.
    - ``reference`` (:class:`~torch.Tensor`): the predictions of another model, such as a retrained one, in either form.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``agreement`` (:class:`~torch.Tensor`): a scalar between 0 and 1, and 1 is best. NaN before any example.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input does not have the expected shape or type.

    Example:
        >>> import torch
        >>> from lightning_gif.metrics import PredictionAgreement
        >>> agreement = PredictionAgreement()
        >>> agreement(torch.tensor([[2.0, -1.0], [0.3, 0.1]]), torch.tensor([0, 1]))
        tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    same: Tensor
    seen: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("same", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, reference: Tensor) -> None:
        labels, others = labels_of("preds", preds), labels_of("reference", reference)
        same_length(preds, reference)
        self.same = self.same + (labels == others).sum()
        self.seen = self.seen + len(labels)

    def compute(self) -> Tensor:
        return self.same.float() / self.seen


class JensenShannonDivergence(UnlearningMetric):
    r"""The mean Jensen–Shannon divergence between the predicted distributions of two models,

    .. math::
        \mathrm{JSD}(p, q) = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m),
        \quad m = \tfrac12 (p + q)

    (Lin, 1991). It is symmetric, 0 for equal distributions, and ln 2 for distributions without a common class.
    Probabilities may be 0. Compare published numbers only if they use this definition: some implementations omit a
    factor ½, some compute KL(p ‖ q) alone, and some return the square root, which is a distance.

    Divergences and their sums are computed in float64 for all inputs. On a device without float64, keep the metric on
    the CPU and move its inputs there.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits, or probabilities with ``from_logits=False``, ``(N, C)``.
    - ``reference`` (:class:`~torch.Tensor`): the predictions of another model, such as a retrained one, in the same
      form.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``divergence`` (:class:`~torch.Tensor`): a scalar between 0 and ln 2, in nats, or in the unit of ``base``; 0 is
      best. NaN before any example.

    Args:
        from_logits: Whether the inputs are logits or log-probabilities (default). Otherwise they are probabilities.
            Small deviations of their sums from 1 are corrected.
        base: The base of the logarithm: e (default) for nats, 2 for bits. In bits, the divergence is between 0 and 1.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``base`` is not above 1. From ``update``: if the shapes differ, an input has NaN, or
            inputs that should be probabilities are not.

    Example:
        It is ¾ ln(4/3) for p = (½, ½) and q = (1, 0), and one bit for distributions without a common class:

        >>> import torch
        >>> from lightning_gif.metrics import JensenShannonDivergence
        >>> divergence = JensenShannonDivergence(from_logits=False)
        >>> divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.2158)
        >>> bits = JensenShannonDivergence(from_logits=False, base=2)
        >>> bits(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(1.)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    total: Tensor
    seen: Tensor

    def __init__(self, from_logits: bool = True, base: float = math.e, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(base, (int, float)) or not 1 < base < math.inf:
            raise ConfigurationError(f"`base` is {base!r}; expected a number above 1: math.e for nats, 2 for bits.")
        self.from_logits = from_logits
        self.base = base
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def plot_upper_bound(self) -> float:  # type: ignore[override] # depends on the base
        """The divergence of distributions without a common class."""
        return math.log(2) / math.log(self.base)

    def update(self, preds: Tensor, reference: Tensor) -> None:
        log_p = log_probabilities("preds", preds, self.from_logits).clamp_min(_LOG_ZERO)
        log_q = log_probabilities("reference", reference, self.from_logits).clamp_min(_LOG_ZERO)
        if log_p.shape != log_q.shape:
            raise ConfigurationError(
                f"`preds` has the shape {tuple(preds.shape)} and `reference` {tuple(reference.shape)}; expected the"
                " predictions of both models for the same examples and classes."
            )
        # In this form, m equals p and q bit for bit wherever p equals q.
        log_m = torch.maximum(log_p, log_q) + torch.log1p(torch.expm1(-(log_p - log_q).abs()) / 2)
        divergence = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1)
        self.total = self.total + divergence.clamp_min(0.0).sum()  # rounding can give -1e-17 for nearly equal ones
        self.seen = self.seen + len(divergence)

    def compute(self) -> Tensor:
        return (self.total / self.seen / math.log(self.base)).float()


class MembershipInference(UnlearningMetric):
    r"""How well an attacker can distinguish the forget examples from examples that the model never saw.

    The attacker computes one score for each example. Examples with a score above a threshold are taken for members of
    the training set. The metric is the area under the ROC curve of this attack. This is the probability that a random
    member has a higher score than a random non-member, where ties count half,

    .. math::
        \mathrm{AUROC} = P(s_+ > s_-) + \tfrac12 P(s_+ = s_-).

    The score is

    - ``"loss"``: minus the cross-entropy of the true label (Yeom et al., 2018), because members have a lower loss;
    - ``"confidence"``: the largest predicted probability (Salem et al., 2019), because it is higher for members.

    **The best value is that of a retrained model, which is near 0.5.** A value clearly above 0.5 means that the
    examples are still remembered. A value clearly below 0.5 also reveals them: the model is worse on them than on
    examples that it never saw (the "Streisand effect"). So neither higher nor lower is better.

    Draw the non-members from the same distribution as the members. If one class is to be forgotten, take test examples
    of that class. With test examples of all classes, the metric would measure how difficult the classes are. The attack
    is a simple one: even with a value near 0.5, a stronger attack may succeed.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds`` (:class:`~torch.Tensor`): logits, or probabilities with ``from_logits=False``, ``(N, C)``.
    - ``target`` (:class:`~torch.Tensor`): the true labels ``(N,)``; may be ``None`` for ``"confidence"``.
    - ``member`` (:class:`~torch.Tensor`): ``(N,)`` bool, true for the forget examples, false for examples that the
      model never saw.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``auroc`` (:class:`~torch.Tensor`): a scalar between 0 and 1. NaN until there are members and non-members.

    Args:
        score: The score of the attack: ``"loss"`` (default) or ``"confidence"``.
        from_logits: Whether the predictions are logits or log-probabilities (default). Otherwise they are
            probabilities.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``score`` is unknown. From ``update``: if an input has NaN, or does not have the expected
            shape, type or range.

    Example:
        The true label is predicted with .9 and .6 for members, .7 and .5 for others: three of four pairs are in order.

        >>> import torch
        >>> from lightning_gif.metrics import MembershipInference
        >>> attack = MembershipInference(score="loss", from_logits=False)
        >>> preds = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]])
        >>> attack(preds, torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, False]))
        tensor(0.7500)
    """

    higher_is_better = None  # 0.5 is best
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    members: list[Tensor]
    others: list[Tensor]

    def __init__(self, score: Literal["loss", "confidence"] = "loss", from_logits: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if score not in ("loss", "confidence"):
            raise ConfigurationError(f"`score` is {score!r}; expected 'loss' or 'confidence'.")
        self.score = score
        self.from_logits = from_logits
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("others", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor | None, member: Tensor) -> None:
        logs = log_probabilities("preds", preds, self.from_logits)
        member = mask_of("member", member, len(preds))
        if self.score == "confidence":
            scores = log_odds(logs, logs.argmax(1))
        elif target is None:
            raise ConfigurationError(
                "`target` is None, but score='loss' needs the true labels (N,); give them, or use score='confidence'."
            )
        else:
            scores = log_odds(logs, targets_of(target, preds).long())
        # torchmetrics gathers float32 from a process without examples, and all processes need the same dtype.
        scores = scores.detach().float()
        self.members.append(scores[member])
        self.others.append(scores[~member])

    def compute(self) -> Tensor:
        # Counts of pairs are exact. torchmetrics' ROC curve is not: it is in float32, and it passes scores outside
        # [0, 1] through a sigmoid, which can make different scores equal.
        members, others = joined(self.members), joined(self.others)
        return twice_in_order(others, members).float() / (2 * len(members) * len(others))


class RelearnTime(UnlearningMetric):
    """How many optimizer steps on the forget examples a model needs to learn them again.

    If a model relearns the examples much faster than a model that was retrained without them, it had not forgotten them
    (Golatkar et al., 2020; Tarun et al., 2023). The best value is that of the retrained model, with the same optimizer,
    learning rate and batches. A much higher value means that the model was damaged.

    Train on the forget examples with a plain loop. In each iteration, pass their loss or accuracy to the metric
    *before* the optimizer step. So value ``k``, counted from 0, is measured after ``k`` optimizer steps::

        metric = RelearnTime(target=loss_of_the_original_model, patience=3)
        for batch in itertools.islice(itertools.cycle(forget_loader), 1000):
            loss = loss_function(model(batch.x), batch.y)
            metric.update(loss)
            if metric.compute().isfinite():
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Work on a copy of the model. Values of small batches are noisy: raise ``patience``, or measure on all forget
    examples. In a distributed run, average the value over all processes and pass the same number on each. Otherwise the
    result is the time of the slowest process.

    As input to ``update`` the metric accepts:

    - ``value`` (:class:`~torch.Tensor` or float): the loss or the accuracy, a single number. NaN does not reach the
      target.

    Do not use ``forward``: its result refers to a single value, so it is always 0 or infinity.

    As output of ``compute`` the metric returns:

    - ``steps`` (:class:`~torch.Tensor`): a scalar, the number of steps after which the target was reached: 0 if the
      first value reaches it, and infinity if no value has reached it. NaN before any value.

    Args:
        target: The value to reach, usually the value of the model before unlearning, or a slightly worse one.
        mode: ``"min"`` (default) for a loss, which reaches the target from above. ``"max"`` for an accuracy, which
            reaches it from below.
        patience: How many values in a row must reach the target. The result is the step of the first of them. Raise
            ``patience`` for noisy values.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``target`` is not a finite number, ``mode`` is unknown or ``patience`` is below 1. From
            ``update``: if ``value`` is not a single number.

    Example:
        Gradient descent on w² with a rate of ¼ halves w at each step, so that 64 falls to 1 in three steps:

        >>> import torch
        >>> from lightning_gif.metrics import RelearnTime
        >>> metric = RelearnTime(target=1.0)
        >>> w = torch.tensor(8.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.25)
        >>> for _ in range(5):
        ...     loss = w**2
        ...     metric.update(loss)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better = None  # the value of a retrained model is best
    full_state_update = True  # the step of a value depends on the values before
    plot_lower_bound = 0.0

    steps: Tensor
    streak: Tensor
    reached: Tensor

    def __init__(self, target: float, mode: Literal["min", "max"] = "min", patience: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            self.target = float(target)
        except (TypeError, ValueError):
            self.target = math.nan
        if not math.isfinite(self.target):
            raise ConfigurationError(f"`target` is {target!r}; expected a finite number, such as the original loss.")
        if mode not in ("min", "max"):
            raise ConfigurationError(f"`mode` is {mode!r}; expected 'min' for a loss or 'max' for an accuracy.")
        if not isinstance(patience, int) or patience < 1:
            raise ConfigurationError(f"`patience` is {patience!r}; expected a whole number of values, at least 1.")
        self.mode = mode
        self.patience = patience
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("streak", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("reached", torch.tensor(math.inf, dtype=torch.float32), dist_reduce_fx="max")

    def update(self, value: Tensor | float) -> None:
        given = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        if given.numel() != 1 or given.is_complex():
            raise ConfigurationError(
                f"`value` is {given.dtype} of shape {tuple(given.shape)}; expected one number for each step: average"
                " the losses of a batch."
            )
        # In half precision the comparison would round the target.
        given = given.reshape(()).to(self.device, torch.promote_types(given.dtype, torch.float32))
        there = given <= self.target if self.mode == "min" else given >= self.target
        self.streak = torch.where(there, self.streak + 1, 0)
        first = (self.steps - (self.patience - 1)).float()
        self.reached = torch.where(self.reached.isinf() & (self.streak >= self.patience), first, self.reached)
        self.steps = self.steps + 1

    def compute(self) -> Tensor:
        return torch.where(self.steps > 0, self.reached, math.nan)


def _class_indices(classes: int | Iterable[int]) -> tuple[int, ...]:
    """One or more class indices as a sorted tuple without duplicates."""
    single = isinstance(classes, int) or getattr(classes, "ndim", None) == 0
    try:
        indices = torch.as_tensor([classes] if single else list(classes))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # something other than numbers
        indices = torch.empty(0)
    whole = indices.ndim == 1 and not indices.is_floating_point() and indices.dtype != torch.bool
    if not whole or not len(indices) or min(indices) < 0:
        raise ConfigurationError(
            f"`classes` is {classes!r}; expected the index of the forgotten class, or several indices, as whole numbers"
            " from 0 up: RemovalF1(classes=3) or RemovalF1(classes=[3, 5])."
        )
    return tuple(sorted(set(indices.tolist())))
