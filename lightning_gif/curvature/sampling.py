"""Samplers, which draw the examples over which the curvature is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import Settings
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.memory import bytes_to_keep
from ..objective.objective import Objective
from ..objective.outputs import features, predictions
from ..registry import Registry

__all__ = ["CURVATURE_EXAMPLES", "SAMPLERS", "Sampler", "curvature_sample", "kept_sample", "sample_size"]


# The number of examples over which the curvature is taken. benchmarks/README.md, "Scores that predict retraining":
# `curvature_examples=512` costs 0.031 of LDS; all examples gain 0.007, which is noise.
CURVATURE_EXAMPLES = 2048

Sampler = Callable[[Objective, Examples, int, torch.Generator], Tensor]
"""``(objective, n examples, m, generator) →`` the positions ``(m,)`` of the drawn examples, without repetition."""

SAMPLERS: Registry[Sampler] = Registry("curvature sampling")
"""All samplers by name; :meth:`Registry.register` adds one."""


def sample_size(settings: Settings) -> int | None:
    """The largest number of examples over which the curvature is taken; ``None`` for all."""
    chosen = settings.curvature_examples
    return CURVATURE_EXAMPLES if isinstance(chosen, str) else chosen


def curvature_sample(objective: Objective, examples: Examples, count: int | None, how: str, seed: int) -> Examples:
    """A sample of the examples, in their order.

    Args:
        objective: An open objective.
        examples: The examples to draw from.
        count: The size of the sample. All examples are taken if it is ``None`` or larger than their number.
        how: The name of a sampler.
        seed: The seed of the draw.
    """
    if count is None or count >= len(examples):
        return examples
    drawn = SAMPLERS[how](objective, examples, count, torch.Generator().manual_seed(seed))
    return examples.subset(drawn.sort().values)


def kept_sample(objective: Objective, train: Examples, settings: Settings) -> Examples:
    """The training examples over which the settings take the curvature, kept in memory if they fit."""
    sample = curvature_sample(objective, train, sample_size(settings), settings.curvature_sampling, settings.seed)
    return sample.cached(bytes_to_keep(settings, objective))


@SAMPLERS.register("random")
def uniformly(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws uniformly at random."""
    return torch.randperm(len(examples), generator=generator)[:count]


@SAMPLERS.register("balanced")
def balanced(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws the same number of examples of each class, so that rare classes have the same weight.

    If a class has too few examples, all of them are drawn, and more of the other classes.

    Raises:
        ConfigurationError: If the targets are not labels.
    """
    classes = examples.classes
    if classes is None:
        raise ConfigurationError(
            "curvature_sampling='balanced' needs targets that are labels (whole numbers, one for each example). Use"
            " curvature_sampling='random'."
        )
    order = torch.randperm(len(examples), generator=generator)
    shuffled = classes[order]
    turn = torch.empty_like(shuffled)  # for each example, the number of earlier examples of its class
    for label in shuffled.unique():
        of_class = shuffled == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.sort(stable=True).indices[:count]]


@SAMPLERS.register("features")
def by_features(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws a sample in which the features of each class are distributed as among all examples.

    Features are the inputs of the last Linear layer. The idea is from Koh et al. (arXiv 2510.26776). The examples of a
    class are drawn evenly along the distance of their features from the mean of the class.

    Raises:
        ConfigurationError: If the module has no Linear layer whose input has one row for each example.
    """
    values = examples.all_gather(
        [features(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(values, examples.class_or_zero, count, generator)


@SAMPLERS.register("logits")
def by_logits(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws a sample in which the predictions for each class are distributed as among all examples.

    The idea is from Koh et al. (arXiv 2510.26776). The examples of a class are drawn evenly along the distance of their
    predictions from the mean of the class.

    Raises:
        ConfigurationError: If the predictions do not have one row for each example.
        ObjectiveError: If the loss is not computed by a loss function of PyTorch.
    """
    values = examples.all_gather(
        [predictions(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(values, examples.class_or_zero, count, generator)


def _representative(values: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws evenly along the distance of values ``(n, …)`` from the mean of their class.

    The examples are ordered by class, and within a class by that distance. From a random start, every ``n/m``-th
    example is drawn (systematic sampling; Cochran, *Sampling Techniques*, 1977, chapter 8). Each example has the same
    probability, so the estimate of the curvature is unbiased. Each draw has the true shares of the classes, and of
    typical and untypical examples of a class. So the estimate has a smaller variance than with independent draws.
    """
    distances = torch.empty(len(values), dtype=torch.float64)
    for label in classes.unique():
        of_class = classes == label
        members = values[of_class].double()
        distances[of_class] = (members - members.mean(0)).norm(dim=1)
    order = distances.sort(stable=True).indices
    order = order[classes[order].sort(stable=True).indices]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    positions = ((torch.arange(count, dtype=torch.float64) + start) * (len(values) / count)).floor().long()
    return order[positions.clamp_max(len(values) - 1)]
