"""The linear datamodeling score (LDS): how well scores predict the losses of retrained models.

Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023 (arXiv 2303.14186), definition 2.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["bootstrap_interval", "noise_ceiling", "spearman"]


# The numbers that the bootstrap ranks at a time.
_AT_A_TIME = 2**21


def spearman(one: Tensor, other: Tensor, dim: int = -2) -> Tensor:
    """Spearman's correlation along a dimension; 0 where one of the two is constant.

    Equal values have the mean of their ranks.

    Args:
        one: Values, by default ``(…, n_subsets, n_queries)``.
        other: Values of a shape that can be broadcast to that of ``one``.
        dim: The dimension of the subsets.

    Returns:
        The correlations, by default ``(…, n_queries)``, in float64.
    """
    first, second = (_centred(_ranks(values.double().movedim(dim, -1))) for values in (one, other))
    scale = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return (first * second).sum(-1) / torch.where(scale > 0, scale, 1)


def _ranks(values: Tensor) -> Tensor:
    """The ranks along the last dimension, from 0 on."""
    values = values.contiguous()
    in_order = values.sort(-1).values
    lowest, above = (torch.searchsorted(in_order, values, side=side) for side in ("left", "right"))
    return (lowest + above - 1).double() / 2


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def bootstrap_interval(
    predicted: Tensor, measured: Tensor, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """An interval of the LDS by a bootstrap. Each draw takes subsets and queries with replacement.

    A draw has some subsets twice, which lowers its correlations. So the percentiles of the draws are moved by the
    difference of the LDS from the mean of the draws.

    Args:
        predicted: The predicted changes ``(n_subsets, n_queries)``.
        measured: The measured changes, of the same shape.
        draws: The number of draws.
        level: The share of the draws inside the interval.
        seed: The seed of the draws.
    """
    generator, (subsets, queries) = torch.Generator().manual_seed(seed), predicted.shape
    found = []
    for part in torch.arange(draws).split(max(_AT_A_TIME // predicted.numel(), 1)):
        chosen = torch.randint(subsets, (len(part), subsets), generator=generator)
        asked = torch.randint(queries, (len(part), queries), generator=generator)
        found.append(spearman(predicted[chosen], measured[chosen]).gather(1, asked).mean(1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    drawn = torch.cat(found)
    shift = spearman(predicted, measured).mean() - drawn.mean()
    low, high = (drawn.quantile(ends) + shift).clamp(-1, 1).tolist()
    return low, high


def noise_ceiling(losses: Tensor) -> float | None:
    """The LDS that predictions of the expected losses would have; ``None`` if there is only one seed.

    Training is random, so even these do not predict the measured losses exactly. The losses of two seeds correlate by
    ``r``, on average over pairs and queries. By the formula of Spearman and Brown, the mean over ``k`` seeds has the
    reliability ``k·r / (1 + (k − 1)·r)``. The ceiling is its square root.

    Args:
        losses: The losses ``(n_subsets, n_seeds, n_queries)``.
    """
    count = losses.shape[1]
    if count == 1:
        return None
    pairs = [spearman(losses[:, one], losses[:, other]).mean() for one, other in combinations(range(count), 2)]
    agreement = max(float(torch.stack(pairs).mean()), 0.0)
    return (count * agreement / (1 + (count - 1) * agreement)) ** 0.5
