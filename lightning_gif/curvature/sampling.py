"""Which examples the curvature is taken over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..objective.outputs import features, predictions
from ..registry import Registry

__all__ = ["SAMPLERS", "Sampler", "curvature_sample"]


Sampler = Callable[[Objective, Examples, int, torch.Generator], Tensor]
"""``(objective, n examples, m, generator) →`` positions ``(m,)`` of those that are drawn, each once."""

SAMPLERS: Registry[Sampler] = Registry("curvature sampling")
"""All ways to draw the examples by name; :meth:`Registry.register` adds one."""


def curvature_sample(objective: Objective, examples: Examples, count: int | None, how: str, seed: int) -> Examples:
    """``count`` of the examples, in their order; all for ``None`` or if there are no more.

    Args:
        objective: An open objective.
        examples: To draw from.
        count: How many.
        how: The name of a sampler.
        seed: Of the draw.
    """
    if count is None or count >= len(examples):
        return examples
    drawn = SAMPLERS[how](objective, examples, count, torch.Generator().manual_seed(seed))
    return examples.subset(drawn.sort().values)


@SAMPLERS.register("random")
def uniformly(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Each example is as likely as any other."""
    return torch.randperm(len(examples), generator=generator)[:count]


@SAMPLERS.register("balanced")
def balanced(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """As many of each class, so that rare classes weigh as much as frequent ones; of small classes all."""
    classes = examples.classes
    if classes is None:
        raise ConfigurationError(
            "curvature_sampling='balanced' needs targets that are classes (whole numbers, one for each example). Use"
            " 'random'."
        )
    order = torch.randperm(len(examples), generator=generator)
    shuffled = classes[order]
    turn = torch.empty_like(shuffled)  # how many of its class came before each example
    for label in shuffled.unique():
        of_class = shuffled == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.sort(stable=True).indices[:count]]


@SAMPLERS.register("features")
def by_features(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Representative of how the examples of each class spread around the mean of what enters the last Linear layer.

    After the idea of Koh et al. (arXiv 2510.26776): see :func:`_representative`.
    """
    found = examples.all_gather(
        [features(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(found, examples.class_or_zero, count, generator)


@SAMPLERS.register("logits")
def by_logits(objective: Objective, examples: Examples, count: int, generator: torch.Generator) -> Tensor:
    """Representative of how the examples of each class spread around the mean of the model's predictions.

    After the idea of Koh et al. (arXiv 2510.26776): see :func:`_representative`.
    """
    found = examples.all_gather(
        [predictions(objective.loss, objective.theta, batch) for batch in examples.local_batches()]
    )
    return _representative(found, examples.class_or_zero, count, generator)


def _representative(found: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws evenly along the distance from the class's mean.

    Examples are put in a row, class by class and by distance within, and every ``n/m``-th is drawn from a random start
    (systematic sampling; Cochran, *Sampling Techniques*, 1977, chapter 8). Each example is as likely as any other, so
    the curvature is estimated without bias; but classes, and typical and untypical examples within each, come up in
    their true shares in every draw, so that it scatters less.
    """
    distances = torch.empty(len(found), dtype=torch.float64)
    for label in classes.unique():
        of_class = classes == label
        members = found[of_class].double()
        distances[of_class] = (members - members.mean(0)).norm(dim=1)
    order = distances.sort(stable=True).indices
    order = order[classes[order].sort(stable=True).indices]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = ((torch.arange(count, dtype=torch.float64) + start) * (len(found) / count)).floor().long()
    return order[places.clamp_max(len(found) - 1)]
