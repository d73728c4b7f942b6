"""Groups of models by the margins of the same examples: the base class of metrics that compare them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import UnlearningMetric, described, joined, log_odds, log_probabilities, targets_of
from .order import twice_in_order

__all__ = ["EnsembleMetric", "Stratum", "auroc_of", "by_memorization", "margins", "margins_of"]

# Margins beyond this are clipped. The probability of the true label is then 0 or 1 up to 4e-44.
_LARGEST_MARGIN = 100.0


def margins(logits: Tensor, target: Tensor) -> Tensor:
    r"""The margin of the true label of each example: the logarithm of its odds,

    .. math::
        m = z_c - \log \sum_{k \ne c} e^{z_k} = \log \frac{p_c}{1 - p_c}

    with the logits :math:`z` and the true label :math:`c` (Carlini et al., arXiv 2112.03570). Unlike probabilities,
    margins are roughly normally distributed over models. Unlike losses, they distinguish examples that are fitted well.

    Args:
        logits: Logits or log-probabilities, ``(N, C)``.
        target: The true labels, ``(N,)``.

    Returns:
        The margins, ``(N,)`` in float64.

    Raises:
        ConfigurationError: If an input does not have the expected shape, type or range.

    Example:
        A probability of ¾ has odds of 3:

        >>> import torch
        >>> from lightning_gif.metrics import margins
        >>> margins(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([0, 1])).exp().round(decimals=4)
        tensor([3., 1.], dtype=torch.float64)
    """
    logs = log_probabilities("logits", logits, from_logits=True)
    return log_odds(logs, targets_of(target, logits).long())


class Stratum(NamedTuple):
    """Examples of similar memorization.

    Attributes:
        low: The smallest memorization of its examples.
        high: The largest memorization of its examples.
        examples: How many examples it has.
        mean: The mean of their values.
    """

    low: float
    high: float
    examples: int
    mean: float


def by_memorization(values: Tensor, memorization: Tensor, bins: int = 3) -> list[Stratum]:
    """The means of a value over examples that a training memorizes little, and over those that it memorizes much.

    A mean over all forget examples can hide that the memorized ones were not forgotten, because most examples are
    hardly memorized at all (Zhao et al., arXiv 2406.01257).

    Args:
        values: One value for each example, ``(N,)``, such as ``metric.per_example()``.
        memorization: The memorization of each example, ``(N,)``: the mean margin of models that were trained with it,
            minus the mean margin of models that were trained without it.
        bins: The number of strata. They have the same number of examples, or one more.

    Returns:
        The strata, from the least memorized to the most.

    Raises:
        ConfigurationError: If the inputs are not finite numbers for the same examples, or there are fewer examples
            than strata.

    Example:
        >>> import torch
        >>> from lightning_gif.metrics import by_memorization
        >>> trained, retrained = torch.tensor([[5.0, 2.0, 9.0, 1.0]]), torch.tensor([[4.0, 2.0, 1.0, -4.0]])
        >>> memorization = trained.mean(0) - retrained.mean(0)
        >>> for stratum in by_memorization(torch.tensor([0.1, 0.3, 2.0, 1.0]), memorization, bins=2):
        ...     print(f"{stratum.low} to {stratum.high}: {stratum.mean:.1f}")
        0.0 to 1.0: 0.2
        5.0 to 8.0: 1.5
    """
    for name, given in (("values", values), ("memorization", memorization)):
        if not isinstance(given, Tensor) or given.ndim != 1 or given.is_complex() or not given.isfinite().all():
            has = " with NaN or infinite entries" if isinstance(given, Tensor) and given.ndim == 1 else ""
            raise ConfigurationError(
                f"`{name}` is {described(given)}{has}; expected one finite number for each example, (N,). Average over"
                " models first, and leave out examples without a value."
            )
    if len(values) != len(memorization):
        raise ConfigurationError(
            f"`values` has {len(values)} entries and `memorization` {len(memorization)}; expected both for the same"
            " examples, in the same order."
        )
    if not isinstance(bins, int) or isinstance(bins, bool) or not 1 <= bins <= len(values):
        raise ConfigurationError(
            f"`bins` is {bins!r}; expected a whole number from 1 to the number of examples, which is {len(values)}."
        )
    order = memorization.argsort(stable=True)
    return [
        Stratum(
            low=memorization[rows[0]].item(),
            high=memorization[rows[-1]].item(),
            examples=len(rows),
            mean=values[rows].double().mean().item(),
        )
        for rows in order.tensor_split(bins)
    ]


class EnsembleMetric(UnlearningMetric):
    """The base class of the metrics of groups of models, each with the margins of its models for the same examples.

    Margins are kept flat, because torchmetrics gathers a vector from a process without models. The number of models
    shows whether the margins of all processes have the same number of examples.

    Attributes:
        groups: The names of the groups, which are the arguments of ``update`` and the list states.
        needed: How many models the metric needs of each group; below, it is NaN.
        optional: The groups that it does not need.
    """

    groups: tuple[str, ...] = ("unlearned", "retrained")
    needed: int = 1
    optional: tuple[str, ...] = ()

    models: Tensor
    examples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for group in self.groups:
            self.add_state(group, [], dist_reduce_fx="cat")
        self.add_state("models", torch.zeros(len(self.groups), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="max")

    def per_example(self) -> Tensor:
        """The value of each example, ``(examples,)``, such as for :func:`by_memorization`.

        In a distributed run it takes the models of all processes, so call it on all of them. It is empty while the
        metric is NaN.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._per_example().float() if self._complete() else torch.empty(0, device=self.device)

    def _per_example(self) -> Tensor:
        raise NotImplementedError

    def _add(self, **given: Tensor | None) -> Tensor:
        """Adds margins to groups, all or none, and returns how many models each group got."""
        checked = {group: margins_of(group, values) for group, values in given.items() if values is not None}
        if not checked:
            raise ConfigurationError(
                f"There are no margins; give those of one or more groups: {', '.join(f'{group}=' for group in given)}."
            )
        known = int(self.examples)
        for group, values in checked.items():
            if not values.shape[1]:
                raise ConfigurationError(f"`{group}` has no examples; expected the margins of at least one.")
            known = known or values.shape[1]
            if values.shape[1] != known:
                raise ConfigurationError(
                    f"`{group}` has {values.shape[1]} examples, but other margins have {known}; expected the margins"
                    " of all models for the same examples, in the same order. To start with other examples, call"
                    " `reset()`, or use one metric for each set of examples."
                )
        for group, values in checked.items():
            getattr(self, group).append(values.flatten())
        added = torch.tensor([len(checked[group]) if group in checked else 0 for group in self.groups])
        self.models = self.models + added.to(self.models.device)
        self.examples = torch.full_like(self.examples, known)
        return added

    def _complete(self) -> bool:
        """Whether each needed group has enough models."""
        counts = dict(zip(self.groups, self.models.tolist(), strict=True))
        return all(count >= self.needed for group, count in counts.items() if group not in self.optional)

    def _group(self, name: str) -> Tensor:
        """The margins of a group, ``(models, examples)`` in float64."""
        values, models = joined(getattr(self, name)), int(self.models[self.groups.index(name)])
        if values.numel() != models * int(self.examples):
            raise ConfigurationError(
                f"The `{name}` margins of the processes, or of the merged metrics, have different numbers of examples;"
                " expected the margins of all models for the same examples: divide models among processes, not"
                " examples."
            )
        return values.double().reshape(models, int(self.examples))

    def _nan(self) -> Tensor:
        return torch.tensor(math.nan, device=self.device)


def margins_of(name: str, given: Tensor) -> Tensor:
    """Checks margins, and returns them as ``(models, examples)``, clipped.

    They are in float32: torchmetrics gathers float32 from a process without models, and all processes need the same
    dtype.
    """
    if not isinstance(given, Tensor) or given.ndim not in (1, 2) or not given.is_floating_point():
        raise ConfigurationError(
            f"`{name}` is {described(given)}; expected margins, floating-point (models, examples), or (examples,) for"
            " one model. `margins(logits, target)` computes them; stack those of several models."
        )
    if given.isnan().any():
        raise ConfigurationError(f"`{name}` has NaN; check the models, or leave out those with NaN.")
    return torch.atleast_2d(given.detach().float().clamp(-_LARGEST_MARGIN, _LARGEST_MARGIN))


def auroc_of(low: Tensor, high: Tensor) -> Tensor:
    """The probability that a value of ``high`` is larger than one of ``low``, where ties count half; in float64."""
    return twice_in_order(low, high).double() / (2 * len(low) * len(high))
