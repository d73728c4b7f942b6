"""The score of the NeurIPS 2023 competition on unlearning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import described
from .groups import EnsembleMetric

__all__ = ["ForgettingScore"]

# The constants of the competition's code (google-deepmind/unlearning_evaluation).
_DELTA, _LARGEST_EPSILON, _BUCKET_WIDTH = 1e-5, 50.0, 0.5
_PEAKED, _REACH = 0.01, 2.0


class ForgettingScore(EnsembleMetric):
    r"""The score of the NeurIPS 2023 competition on unlearning (Triantafillou et al., arXiv 2406.09073).

    For each forget example, attacks with one and with two thresholds on the margin try to tell unlearned from retrained
    models. From the false positive rate (FPR) and the false negative rate (FNR) of an attack follows a lower bound of
    the ε of (ε, δ)-unlearning, and the best attack counts,

    .. math::
        \varepsilon = \max \max\left(\log\frac{1 - \delta - \mathrm{FPR}}{\mathrm{FNR}},
        \log\frac{1 - \delta - \mathrm{FNR}}{\mathrm{FPR}}\right), \qquad \delta = 10^{-5}.

    An example gets 2 / 2ⁿ points, where n is the number of its bucket of ε: 1 for ε below ½, 2 for ε below 1, and so
    on. The forgetting score is the mean of the points,

    .. math::
        F = \frac1{|S|} \sum_{x \in S} 2 / 2^{n(x)}, \qquad
        \text{score} = F \cdot \frac{\mathrm{RA}_u}{\mathrm{RA}_r} \cdot \frac{\mathrm{TA}_u}{\mathrm{TA}_r}.

    RA and TA are the mean accuracies of the unlearned and retrained models on retained and on test examples. The metric
    is F, and the score if accuracies are given. **1 is best.** Published scores: 0.0001 for gradient ascent (NegGrad),
    0.046 for fine-tuning, 0.102 for the best entry.

    The details are those of the competition's code:

    - A threshold takes margins from it on for those of the group with the larger median. All thresholds between the
      smallest and the largest margin are tried.
    - Two thresholds take the margins between them for those of the group with the smaller range. The upper one is
      within 2 of the largest margin of that group, and their distance within 2 of its range.
    - If both rates of an attack are 0, ε is 50, which is the largest value. If one of them is 0, the attack does not
      count, since there are too few models for it. If no attack counts, ε is 0, which is also the smallest value.
    - If the range of a group is below 1 % of that of the other group, ε is 50.

    There is one difference: the code tries thresholds on a grid of width 0.01, and the metric tries all.

    With n models of each group, an ε below 50 is at most log(n - 1). So scores are comparable only for the same number
    of models. The competition had 512.

    As input to ``forward`` and ``update`` the metric accepts margins (see :func:`margins`) of one or more models, for
    the same forget examples in each call. Each group can be given in one call or in several, and may be ``None``:

    - ``unlearned`` (:class:`~torch.Tensor`): the unlearned models, ``(models, examples)``, or ``(examples,)`` for one.
    - ``retrained`` (:class:`~torch.Tensor`): models that were trained without the forget examples, in the same form.
    - ``unlearned_accuracy`` (:class:`~torch.Tensor`): optional, the accuracies of these unlearned models on retained
      and on test examples, between 0 and 1, ``(models, 2)``, or ``(2,)`` for one.
    - ``retrained_accuracy`` (:class:`~torch.Tensor`): those of these retrained models, in the same form.

    In a distributed run, each process adds other models, for all examples.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``score`` (:class:`~torch.Tensor`): a scalar from 0 up. NaN until each group has two models.

    ``per_example()`` returns the ε of each example.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input has NaN, or does not have the expected shape, type or range, or
            if the numbers of examples differ. From ``compute``, if only some models have accuracies.

    Example:
        No attack separates the margins of the first example, and one separates those of the second:

        >>> import torch
        >>> from lightning_gif.metrics import ForgettingScore
        >>> metric = ForgettingScore()
        >>> metric(torch.tensor([[1.0, 5.0], [2.0, 6.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
        tensor(0.5000)
        >>> metric.per_example()
        tensor([ 0., 50.])
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    needed = 2

    unlearned: list[Tensor]
    retrained: list[Tensor]
    accuracies: Tensor
    rated: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("accuracies", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rated", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        unlearned: Tensor | None = None,
        retrained: Tensor | None = None,
        unlearned_accuracy: Tensor | None = None,
        retrained_accuracy: Tensor | None = None,
    ) -> None:
        rated = [
            _accuracies_of(f"{name}_accuracy", given, name, values)
            for name, given, values in (
                ("unlearned", unlearned_accuracy, unlearned),
                ("retrained", retrained_accuracy, retrained),
            )
        ]
        self._add(unlearned=unlearned, retrained=retrained)
        sums = torch.stack([given.sum(0) for given in rated]).to(self.accuracies.device)
        self.accuracies = self.accuracies + sums
        self.rated = self.rated + torch.tensor([len(given) for given in rated]).to(self.rated.device)

    def _per_example(self) -> Tensor:
        pairs = zip(self._group("unlearned").T, self._group("retrained").T, strict=True)
        return torch.stack([_epsilon(unlearned, retrained) for unlearned, retrained in pairs])

    def _ratio(self) -> Tensor:
        """The product of the ratios of accuracies; 1 without accuracies."""
        if not self.rated.any():
            return torch.ones((), dtype=torch.float64, device=self.rated.device)
        for group, models, rated in zip(self.groups, self.models.tolist(), self.rated.tolist(), strict=True):
            if rated != models:
                raise ConfigurationError(
                    f"`{group}_accuracy` was given for {rated} of {models} {group} models; expected the accuracies of"
                    " all models, unlearned and retrained, or of none."
                )
        unlearned, retrained = self.accuracies / self.rated[:, None]
        return (unlearned / retrained).prod()

    def compute(self) -> Tensor:
        if not self._complete():
            return self._nan()
        buckets = (self._per_example() / _BUCKET_WIDTH).floor() + 1
        return ((2 / 2**buckets).mean() * self._ratio()).float()


def _accuracies_of(name: str, given: Tensor | None, group: str, values: Tensor | None) -> Tensor:
    """Checks the accuracies of models, and returns them as ``(models, 2)`` in float64; empty without any."""
    if given is None:
        return torch.empty(0, 2, dtype=torch.float64)
    if not isinstance(given, Tensor) or given.ndim not in (1, 2) or given.shape[-1] != 2:
        raise ConfigurationError(
            f"`{name}` is {described(given)}; expected the accuracies on retained and on test examples, (models, 2), or"
            " (2,) for one model."
        )
    if not ((given >= 0) & (given <= 1)).all():
        raise ConfigurationError(f"`{name}` has entries that are not between 0 and 1; divide percentages by 100.")
    given = torch.atleast_2d(given.detach().cpu().double())
    models = len(torch.atleast_2d(values)) if isinstance(values, Tensor) else 0
    if len(given) != models:
        raise ConfigurationError(
            f"`{name}` has {len(given)} models, but `{group}` has {models}; give the accuracies of the same models, in"
            " the same call."
        )
    return given


def _epsilon(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """The ε of an example, from its margins ``(models,)``; see :class:`ForgettingScore`."""
    unlearned, retrained = unlearned.sort().values, retrained.sort().values
    narrow, wide = sorted((unlearned, retrained), key=_range)
    if _range(narrow) < _PEAKED * _range(wide):
        return unlearned.new_tensor(_LARGEST_EPSILON)
    high, low = (retrained, unlearned) if retrained.quantile(0.5) > unlearned.quantile(0.5) else (unlearned, retrained)
    cuts = torch.cat([unlearned, retrained]).unique()
    # One threshold.
    missed, false = torch.searchsorted(high, cuts), len(low) - torch.searchsorted(low, cuts)
    best = _epsilon_of_rates(missed, len(high), false, len(low))
    # Two thresholds, with the margins from cuts[i] to cuts[j] between them.
    inside = _between(narrow, wide, cuts)
    missed, false = (
        torch.searchsorted(given, cuts, side="right")[None, :] - torch.searchsorted(given, cuts)[:, None]
        for given in (narrow, wide)
    )
    return torch.maximum(best, _epsilon_of_rates(len(narrow) - missed[inside], len(narrow), false[inside], len(wide)))


def _range(values: Tensor) -> float:
    return (values[-1] - values[0]).item()


def _between(narrow: Tensor, wide: Tensor, cuts: Tensor) -> Tensor:
    """Which ranges of margins, from ``cuts[i]`` to ``cuts[j]``, lie between two thresholds that are tried, ``(n, n)``.

    The upper threshold is below ``cuts[j + 1]``, and the lower one above ``cuts[i - 1]``.
    """
    end = cuts.new_tensor([math.inf])
    top, width = narrow[-1], narrow[-1] - narrow[0]
    upper = torch.maximum(cuts, top - _REACH), torch.minimum(torch.cat([cuts[1:], end]), top + _REACH)
    lower = torch.cat([-end, cuts[:-1]]), cuts
    least, most = (upper[0][None, :] - lower[1][:, None]), (upper[1][None, :] - lower[0][:, None])
    reached = (least <= width + _REACH) & (most > width - _REACH) & (upper[0] <= upper[1])[None, :]
    return reached.triu()


def _epsilon_of_rates(missed: Tensor, positives: int, false: Tensor, negatives: int) -> Tensor:
    """The largest ε of attacks, from the counts of their errors; 0 if none counts."""
    fnr, fpr = missed.double() / positives, false.double() / negatives
    separated, counted = (missed == 0) & (false == 0), (missed > 0) & (false > 0)
    bounds = torch.maximum(
        ((1 - _DELTA - fpr) / fnr).log().nan_to_num(0.0, neginf=0.0),
        ((1 - _DELTA - fnr) / fpr).log().nan_to_num(0.0, neginf=0.0),
    )
    values = torch.where(separated, _LARGEST_EPSILON, torch.where(counted, bounds, 0.0))
    return torch.cat([values, values.new_zeros(1)]).max().clamp(0.0, _LARGEST_EPSILON)
