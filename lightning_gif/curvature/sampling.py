"""The samplers, which draw the examples that the curvature is taken over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import Settings
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..objective.outputs import features, predictions
from ..registry import Registry

__all__ = ["CURVATURE_EXAMPLES", "SAMPLERS", "Sampler", "curvature_sample", "sample_size"]


# Examples that give the curvature. "Scores that predict retraining": `curvature_examples=512` costs 0.031 of LDS, all
# examples gain 0.007, which is noise.
CURVATURE_EXAMPLES = 2048

Sampler = Callable[[Objective, Examples, int, torch.Generator], Tensor]
"""``(objective, n examples, m, generator) →`` the positions ``(m,)`` of the examples drawn, without repetition."""

SAMPLERS: Registry[Sampler] = Registry("curvature sampling")
"""All samplers by name; :meth:`Registry.register` adds one."""


def sample_size(settings: Settings) -> int | None:
    """The most examples that the curvature is taken over; ``None`` for all."""
    chosen = settings.curvature_examples
    return CURVATURE_EXAMPLES if isinstance(chosen, str) else chosen


def curvature_sample(objective: Objective, examples: Examples, count: int | None, how: str, seed: int) -> Examples:
    """A sample of the examples, in their order.

    Args:
        objective: An open objective.
        examples: The examples to draw from.
        count: The size of the sample; ``None``, or more than there are, for all of them.
        how: The name of a sampler.
        seed: The seed of the draw.
    """
    if count is None or count >= len(examples):
        return examples
    drawn = SAMPLERS[how](objective, examples, count, torch.Generator().manual_seed(seed))
    return examples.subset(drawn.sort().values)


@SAMPLERS.register("random")
def uniformly(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws uniformly: each example is as likely as any other."""
    return torch.randperm(len(examples), generator=generator)[:count]


@SAMPLERS.register("balanced")
def balanced(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws equally many examples of each class, so that rare classes weigh as much; all examples of small classes."""
    classes = examples.classes
    if classes is None:
        raise ConfigurationError(
            "curvature_sampling='balanced' needs targets that are classes (whole numbers, one for each example). Use"
            " 'random'."
        )
    order = torch.randperm(len(examples), generator=generator)
    shuffled = classes[order]
    turn = torch.empty_like(shuffled)  # how many of its class precede each example
    for label in shuffled.unique():
        of_class = shuffled == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.sort(stable=True).indices[:count]]


@SAMPLERS.register("features")
def by_features(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws a sample that represents how the features of each class, the input of the last Linear layer, spread.

    After the idea of Koh et al. (arXiv 2510.26776): see :func:`_representative`.
    """
    values = examples.all_gather(
        [features(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(values, examples.class_or_zero, count, generator)


@SAMPLERS.register("logits")
def by_logits(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Draws a sample that represents how the model's predictions for each class spread.

    After the idea of Koh et al. (arXiv 2510.26776): see :func:`_representative`.
    """
    values = examples.all_gather(
        [predictions(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(values, examples.class_or_zero, count, generator)


def _representative(values: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws evenly along the distance of values ``(n, …)`` from the mean of their class.

    The examples are ordered by class, and within a class by that distance; from a random start, every ``n/m``-th is
    drawn (systematic sampling; Cochran, *Sampling Techniques*, 1977, chapter 8). Each example is as likely as any
    other, so that the curvature is estimated without bias. Classes, and typical and untypical examples of each, have
    their true shares in every draw, so that the estimate has less variance than with independent draws.
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
