"""Metrics that compare several unlearned models with several retrained ones, by the margins of examples.

Two trainings differ, even with the same data. Only several models show whether unlearned ones differ from retrained
ones by more than that. :func:`~lightning_gif.metrics.margins` turns the logits of a model into what the metrics take.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from .base import UnlearningMetric, described, joined, mask_of
from .groups import EnsembleMetric, auroc_of, margins_of

__all__ = ["KLOM", "RMIA", "LikelihoodRatioAttack", "RetrainingDistance"]

# Normal distributions that are fitted to margins have at least this standard deviation.
_SMALLEST_SPREAD = 0.01

# The number of bins of a histogram of margins, and what is added to the share of each bin (arXiv 2410.23232).
_BINS, _BIN_EPSILON = 20, 1e-5

# How many ways to split retrained models into halves are averaged, at most.
_MOST_SPLITS = 1000


class KLOM(EnsembleMetric):
    r"""The KL divergence of margins (KLOM; Georgiev et al., arXiv 2410.23232): unlearned from retrained models.

    For each example :math:`x`, it compares the distribution of the margin over unlearned models with that over
    retrained models,

    .. math::
        \mathrm{KLOM}(x) = \mathrm{KL}\bigl(m_{\text{unlearned}}(x) \,\|\, m_{\text{retrained}}(x)\bigr).

    The distributions are histograms with 20 bins of equal width, from the smallest margin of the example to the
    largest. 1e-5 is added to the share of each bin, and the shares are normalised. Margins are clipped to ±100. With
    ``estimate="gaussian"`` they are normal distributions with the means and variances of the margins,

    .. math::
        \mathrm{KL} = \log\frac{\sigma_r}{\sigma_u} + \frac{\sigma_u^2 + (\mu_u - \mu_r)^2}{2 \sigma_r^2} - \tfrac12 ,

    with standard deviations of at least 0.01. Use it if there are fewer than about 50 models.

    0 is best. With few models, the value is above 0 even if the unlearned models are as good as retrained ones.
    So compare it with the value of other retrained models, as many as the unlearned ones. Use one instance of the
    metric for each set of examples: forget, retained and unseen ones.

    As input to ``forward`` and ``update`` the metric accepts margins (see :func:`margins`) of one or more models, for
    the same examples in each call. Each group can be given in one call or in several, and may be ``None``:

    - ``unlearned`` (:class:`~torch.Tensor`): the unlearned models, ``(models, examples)``, or ``(examples,)`` for one.
    - ``retrained`` (:class:`~torch.Tensor`): models that were trained without the forget examples, in the same form.

    In a distributed run, each process adds other models, for all examples.

    As output of ``forward`` and ``compute`` the metric returns a dictionary:

    - ``percentile_95`` (:class:`~torch.Tensor`): the 95th percentile over examples, in nats.
    - ``mean`` (:class:`~torch.Tensor`): the mean over examples. Both are NaN until each group has a model (for normal
      distributions, two models).

    ``per_example()`` returns the divergence of each example.

    Args:
        estimate: ``"histogram"`` (default) or ``"gaussian"``.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``estimate`` is unknown. From ``update``: if an input has NaN, or does not have the
            expected shape or type, or if the numbers of examples differ.

    Example:
        The margins have the same variance, and means that differ by one standard deviation, so that the divergence of
        the normal distributions is ½:

        >>> import torch
        >>> from lightning_gif.metrics import KLOM
        >>> klom = KLOM(estimate="gaussian")
        >>> retrained = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> klom(retrained + 1, retrained)
        {'percentile_95': tensor(0.5000), 'mean': tensor(0.5000)}
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    unlearned: list[Tensor]
    retrained: list[Tensor]

    def __init__(self, estimate: Literal["histogram", "gaussian"] = "histogram", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if estimate not in ("histogram", "gaussian"):
            raise ConfigurationError(f"`estimate` is {estimate!r}; expected 'histogram' or 'gaussian'.")
        self.estimate = estimate
        self.needed = 2 if estimate == "gaussian" else 1

    def update(self, unlearned: Tensor | None = None, retrained: Tensor | None = None) -> None:
        self._add(unlearned=unlearned, retrained=retrained)

    def _per_example(self) -> Tensor:
        unlearned, retrained = self._group("unlearned"), self._group("retrained")
        if self.estimate == "histogram":
            return _histogram_divergence(unlearned, retrained)
        return _normal_divergence(unlearned, retrained)

    def compute(self) -> dict[str, Tensor]:
        if not self._complete():
            return {"percentile_95": self._nan(), "mean": self._nan()}
        values = self._per_example()
        return {"percentile_95": values.quantile(0.95).float(), "mean": values.mean().float()}


class LikelihoodRatioAttack(EnsembleMetric):
    r"""How well an attacker tells unlearned from retrained models, with a test for each example (U-LiRA).

    The attack of Hayes et al. (arXiv 2403.01218) knows for each forget example the distribution of its margin, over
    unlearned models and over retrained ones. Both are normal, with the mean and the variance of the margins of models
    that the attacker made (shadow models). For the margin :math:`m` of a model that the attacker did not make, its
    statistic is the log likelihood ratio

    .. math::
        \log \mathcal N(m; \mu_u, \sigma_u^2) - \log \mathcal N(m; \mu_r, \sigma_r^2).

    Each model is attacked in turn, and the others are the shadow models: the normal distribution of a model's own group
    is fitted without it (leave-one-out). So no separate models are needed. Variances have n - 1 in their denominator;
    standard deviations are at least 0.01.

    **The best value is 0.5: the models cannot be distinguished.** Give at least 8 models of each group, and about
    equally many. With 4, the AUROC of other retrained models is about 0.45. The groups must not share models. Otherwise
    a model is judged by a distribution that was fitted with it, and the AUROC falls below 0.5.

    As input to ``forward`` and ``update`` the metric accepts margins (see :func:`margins`) of one or more models, for
    the same forget examples in each call. Each group can be given in one call or in several, and may be ``None``:

    - ``unlearned`` (:class:`~torch.Tensor`): the unlearned models, ``(models, examples)``, or ``(examples,)`` for one.
    - ``retrained`` (:class:`~torch.Tensor`): models that were trained without the forget examples, in the same form.

    In a distributed run, each process adds other models, for all examples.

    As output of ``forward`` and ``compute`` the metric returns a dictionary:

    - ``auroc`` (:class:`~torch.Tensor`): the probability that the statistic of an unlearned model is higher than that
      of a retrained model, over all models and examples, where ties count half.
    - ``balanced_accuracy`` (:class:`~torch.Tensor`): the mean of the share of unlearned models with a statistic above
      0 and the share of retrained models with one below, where 0 counts half. Both are NaN until each group has three
      models.

    ``per_example()`` returns the AUROC of each example.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input has NaN, or does not have the expected shape or type, or if the
            numbers of examples differ.

    Example:
        >>> import torch
        >>> from lightning_gif.metrics import LikelihoodRatioAttack
        >>> retrained = torch.tensor([[0.0], [1.0], [2.0]])
        >>> attack = LikelihoodRatioAttack()
        >>> attack(retrained + 20, retrained)
        {'auroc': tensor(1.), 'balanced_accuracy': tensor(1.)}
    """

    higher_is_better = None  # 0.5 is best
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    needed = 3

    unlearned: list[Tensor]
    retrained: list[Tensor]

    def update(self, unlearned: Tensor | None = None, retrained: Tensor | None = None) -> None:
        self._add(unlearned=unlearned, retrained=retrained)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """The log likelihood ratios of the unlearned and of the retrained models, each ``(models, examples)``."""
        unlearned, retrained = self._group("unlearned"), self._group("retrained")
        return (
            _log_normal(unlearned, *_without_each(unlearned)) - _log_normal(unlearned, *_fit(retrained)),
            _log_normal(retrained, *_fit(unlearned)) - _log_normal(retrained, *_without_each(retrained)),
        )

    def _per_example(self) -> Tensor:
        unlearned, retrained = self._statistics()
        return torch.stack([auroc_of(low, high) for low, high in zip(retrained.T, unlearned.T, strict=True)])

    def compute(self) -> dict[str, Tensor]:
        if not self._complete():
            return {"auroc": self._nan(), "balanced_accuracy": self._nan()}
        unlearned, retrained = self._statistics()
        right = (1 + unlearned.sign()).mean() / 2 + (1 - retrained.sign()).mean() / 2
        return {
            "auroc": auroc_of(retrained.flatten(), unlearned.flatten()).float(),
            "balanced_accuracy": (right / 2).float(),
        }


class RMIA(UnlearningMetric):
    r"""Robust membership inference (RMIA; Zarifzadeh et al., arXiv 2312.03262): a strong attack with few models.

    The attacker tests whether the forget examples are still members of the training set, with one or few reference
    models. The score of an example :math:`x` is the share of population examples :math:`z` with

    .. math::
        \frac{p(x \mid \theta) / p(x)}{p(z \mid \theta) / p(z)} \ge \gamma .

    Here :math:`p(x \mid \theta)` is the probability of the true label by the attacked model, and :math:`p(x)` its mean
    over reference models. Good reference models are retrained without the forget examples, as the attacked model ought
    to be. The population are examples that were in no training. If none are given, the unseen examples are the
    population, and each of them is compared with the others. With n of them, the AUROC is then at most 1 - 1/(2n),
    because one of them has the highest score, too.

    The metric is the AUROC of the score: the probability that a forget example has a higher score than an unseen one,
    where ties count half. **The best value is 0.5**, and both sides of it reveal the forget examples, see
    :class:`MembershipInference`. Draw the unseen examples from the same distribution as the forget examples.

    As input to ``forward`` and ``update`` the metric accepts the margins (see :func:`margins`) of a batch of examples:

    - ``margins`` (:class:`~torch.Tensor`): those of the attacked model, ``(N,)``.
    - ``reference`` (:class:`~torch.Tensor`): those of the reference models, ``(models, N)``, or ``(N,)`` for one.
    - ``member`` (:class:`~torch.Tensor`): ``(N,)`` bool, true for forget examples, false for unseen ones; ``None`` for
      examples of the population, which the others are only compared with.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``auroc`` (:class:`~torch.Tensor`): a scalar between 0 and 1. NaN until there are forget examples and unseen ones
      (two, if they are the population).

    Args:
        gamma: The threshold γ of the ratio. With 1 (default), few examples have equal scores. The paper also uses 2.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``gamma`` is not a positive number. From ``update``: if an input has NaN, or does not
            have the expected shape or type.

    Example:
        The model is surer of two forget examples than the reference is, but less sure of two unseen ones:

        >>> import torch
        >>> from lightning_gif.metrics import RMIA
        >>> attack = RMIA()
        >>> attack.update(torch.tensor([0.3, -0.2]), torch.tensor([0.3, -0.2]))  # the population
        >>> margins, reference = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([1.0, -1.0, 1.5, 0.6])
        >>> attack.update(margins, reference, torch.tensor([True, True, False, False]))
        >>> attack.compute()
        tensor(1.)
    """

    higher_is_better = None  # 0.5 is best
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    members: list[Tensor]
    others: list[Tensor]
    population: list[Tensor]

    def __init__(self, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(gamma, (int, float)) or isinstance(gamma, bool) or not 0 < gamma < math.inf:
            raise ConfigurationError(f"`gamma` is {gamma!r}; expected a number above 0, such as 1 or 2.")
        self.gamma = gamma
        for group in ("members", "others", "population"):
            self.add_state(group, [], dist_reduce_fx="cat")

    def update(self, margins: Tensor, reference: Tensor, member: Tensor | None = None) -> None:
        if not isinstance(margins, Tensor) or margins.ndim != 1:
            raise ConfigurationError(
                f"`margins` is {described(margins)}; expected the margins of one model, floating-point (N,). To attack"
                " several models, use one metric for each."
            )
        own, others = margins_of("margins", margins)[0], margins_of("reference", reference)
        if others.shape[1] != len(own) or not len(others):
            raise ConfigurationError(
                f"`reference` has the shape {tuple(reference.shape)} for {len(own)} margins; expected those of one or"
                f" more models for the same examples, (models, {len(own)})."
            )
        means = F.logsigmoid(others.double()).logsumexp(0) - math.log(len(others))
        ratios = (F.logsigmoid(own.double()) - means).float()
        if member is None:
            self.population.append(ratios)
            return
        mask = mask_of("member", member, len(own))
        self.members.append(ratios[mask])
        self.others.append(ratios[~mask])

    def compute(self) -> Tensor:
        members, others, population = joined(self.members), joined(self.others), joined(self.population)
        among_others = not len(population)
        population = (others if among_others else population).double().sort().values
        itself = int(among_others and self.gamma <= 1)
        scores = [
            (torch.searchsorted(population, given.double() - math.log(self.gamma), side="right") - counted).double()
            / (len(population) - excluded)
            for given, counted, excluded in ((members, 0, 0), (others, itself, int(among_others)))
        ]
        if not len(members) or any(score.isnan().any() for score in scores):
            return torch.tensor(math.nan, device=self.device)
        return auroc_of(scores[1], scores[0]).float()


class RetrainingDistance(EnsembleMetric):
    r"""How far unlearned models are from retrained ones, relative to models that were not changed.

    The distance of a group of models is the mean over forget examples of the difference of mean margins,

    .. math::
        d(A) = \frac1{|S|} \sum_{x \in S} \bigl| \bar m_A(x) - \bar m_{\text{retrained}}(x) \bigr| .

    Since it is above 0 for retrained models too, the metric is

    .. math::
        \frac{d(\text{unlearned}) - d(\text{independent})}{d(\text{untouched}) - d(\text{independent})} .

    It is 0 if the unlearned models are as near to the retrained ones as independent retrainings are, and 1 if
    unlearning changed nothing. It can be below 0 by chance, and above 1 if unlearning went astray. It compares mean
    margins only, so it needs fewer models than :class:`KLOM`.

    Give as many ``independent`` models as unlearned ones. If none are given, their distance is estimated from the
    retrained models. These are split into halves of :math:`h_1` and :math:`h_2` models in all ways (1000 random ways,
    if there are more). The mean distance of the halves is multiplied by

    .. math::
        \sqrt{\left(\frac1{n_u} + \frac1{n_r}\right) \Big/ \left(\frac1{h_1} + \frac1{h_2}\right)} ,

    for :math:`n_u` unlearned and :math:`n_r` retrained models, since means of more models vary less. This is exact for
    normally distributed margins.

    As input to ``forward`` and ``update`` the metric accepts margins (see :func:`margins`) of one or more models, for
    the same forget examples in each call. Each group can be given in one call or in several, and may be ``None``. The
    shapes are ``(models, examples)``, or ``(examples,)`` for one model:

    - ``unlearned`` (:class:`~torch.Tensor`): the unlearned models.
    - ``retrained`` (:class:`~torch.Tensor`): models that were trained without the forget examples.
    - ``untouched`` (:class:`~torch.Tensor`): models that were trained with them, and not changed.
    - ``independent`` (:class:`~torch.Tensor`): optional, other models that were trained without them.

    In a distributed run, each process adds other models, for all examples.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``distance`` (:class:`~torch.Tensor`): a scalar. NaN until there are unlearned and untouched models, and retrained
      ones (two, if there are no independent ones). Also NaN if the untouched models are no farther from the retrained
      ones than independent retrainings are: then there was nothing to forget.

    ``per_example()`` returns the differences of the mean margins of the unlearned and the retrained models, without
    their sign.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: From ``update``, if an input has NaN, or does not have the expected shape or type, or if the
            numbers of examples differ.

    Example:
        Unlearning covers three quarters of the way from 5 to 1:

        >>> import torch
        >>> from lightning_gif.metrics import RetrainingDistance
        >>> metric = RetrainingDistance()
        >>> metric.update(untouched=torch.tensor([5.0]), unlearned=torch.tensor([2.0]))
        >>> metric.update(retrained=torch.tensor([1.0]), independent=torch.tensor([1.0]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = None  # 0 is best
    groups = ("unlearned", "retrained", "untouched", "independent")
    optional = ("independent",)

    unlearned: list[Tensor]
    retrained: list[Tensor]
    untouched: list[Tensor]
    independent: list[Tensor]

    def update(
        self,
        unlearned: Tensor | None = None,
        retrained: Tensor | None = None,
        untouched: Tensor | None = None,
        independent: Tensor | None = None,
    ) -> None:
        self._add(unlearned=unlearned, retrained=retrained, untouched=untouched, independent=independent)

    def _differences(self, group: str) -> Tensor:
        return (self._group(group).mean(0) - self._group("retrained").mean(0)).abs()

    def _per_example(self) -> Tensor:
        return self._differences("unlearned")

    def compute(self) -> Tensor:
        if not self._complete():
            return self._nan()
        if int(self.models[3]):
            independent = self._differences("independent").mean()
        elif int(self.models[1]) > 1:
            independent = _distance_of_halves(self._group("retrained"), int(self.models[0]))
        else:
            return self._nan()
        unlearned, untouched = (self._differences(group).mean() for group in ("unlearned", "untouched"))
        distance = (unlearned - independent) / (untouched - independent)
        return torch.where(untouched > independent, distance, math.nan).float()


def _histogram_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL divergences ``(examples,)`` of histograms of margins, each ``(models, examples)``."""
    both = torch.cat([first, second])
    low, high = both.amin(0), both.amax(0)
    width = torch.where(high > low, high - low, 1.0) / _BINS

    def logs(values: Tensor) -> Tensor:
        bins = ((values - low) / width).long().clamp(max=_BINS - 1)
        shares = F.one_hot(bins, _BINS).double().mean(0) + _BIN_EPSILON
        return (shares / shares.sum(1, keepdim=True)).log()

    p, q = logs(first), logs(second)
    return (p.exp() * (p - q)).sum(1)


def _fit(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each example, ``(examples,)``, of ``(models, examples)``."""
    return values.mean(0), values.var(0).clamp_min(_SMALLEST_SPREAD**2)


def _without_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances without the model of the row, ``(models, examples)``."""
    n = len(values)
    centred = values - values.mean(0)
    means = -centred / (n - 1)
    variances = ((centred**2).sum(0) - centred**2 - (n - 1) * means**2) / (n - 2)
    return values.mean(0) + means, variances.clamp_min(_SMALLEST_SPREAD**2)


def _log_normal(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The logarithm of a normal density, without a constant."""
    return -((values - mean) ** 2 / variance + variance.log()) / 2


def _normal_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL divergences ``(examples,)`` of normal distributions of margins, each ``(models, examples)``."""
    (mean, variance), (other_mean, other_variance) = _fit(first), _fit(second)
    ratio = variance / other_variance
    return (ratio - ratio.log() - 1 + (mean - other_mean) ** 2 / other_variance) / 2


def _distance_of_halves(retrained: Tensor, models: int) -> Tensor:
    """The distance of ``models`` other retrainings from all of these, ``(models, examples)``, estimated from halves."""
    n = len(retrained)
    half = n // 2
    if math.comb(n, half) <= _MOST_SPLITS:
        chosen = torch.tensor(list(itertools.combinations(range(n), half)))
    else:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(_MOST_SPLITS, n, generator=generator).argsort(1)[:, :half]
    first = torch.zeros(len(chosen), n).scatter(1, chosen, 1.0).to(retrained)
    differences = (first / half - (1 - first) / (n - half)) @ retrained
    scale = math.sqrt((1 / models + 1 / n) / (1 / half + 1 / (n - half)))
    return scale * differences.abs().mean()
