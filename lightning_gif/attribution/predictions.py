"""What the model predicts for the examples of a query, and which of their tokens its loss depends on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..data.examples import Examples
from ..data.names import Vocabulary, tokens_of
from ..data.streams import Stream
from ..errors import GIFError
from ..objective.labels import predicted_labels
from ..objective.objective import Objective
from ..objective.outputs import predictions
from ..objective.tokens import token_effects
from .record import MOST_QUERIES

__all__ = ["first_predictions", "first_tokens", "labels_at"]


def first_predictions(objective: Objective, query: Examples, most: int = MOST_QUERIES) -> Tensor | None:
    """What the model predicts for the examples of :func:`~.report.first_shown`, at the present weights.

    Returns:
        The probabilities ``(n, C)`` of the classes of a classifier, or the output ``(n, 1)`` of a model that has one
        number for each example; ``None`` if there are other outputs, or if they are not known.
    """
    first = next(query.batches())
    batch = first.slice(0, most) if first.divisible else first
    try:
        if objective.measures != "loss":  # a module's own measurement may take batches that its loss does not
            objective.check(query.subset(torch.arange(min(most, batch.size))), "query")
        with torch.no_grad():
            if objective.n_classes(query) is not None:
                found = objective.logits(objective.theta, batch).double().softmax(1).cpu()
            else:
                found = predictions(objective.loss, objective.theta, batch).double()
                found = found if found.shape[1] == 1 else found[:0]
    except GIFError:  # the loss is not computed from predictions that are known
        return None
    return found[:most] if len(found) == batch.size and bool(torch.isfinite(found).all()) else None


def first_tokens(
    objective: Objective, query: Examples, vocabulary: Vocabulary | None, most: int = MOST_QUERIES
) -> list[list[tuple[str, float]]]:
    """The tokens of the examples of :func:`~.report.first_shown`, each with its effect on the loss of the example.

    See :class:`~lightning_gif.objective.tokens.TokenEffects`. Empty if the module embeds no tokens, or if the query has
    a measurement of its own.
    """
    first = next(query.batches())
    if objective.measures != "loss" or not first.divisible:
        return []
    listed = []
    for one in token_effects(objective, first.slice(0, most)) or ():
        names = tokens_of(vocabulary, one.ids.tolist())
        if vocabulary is None:  # an id says little without its position
            names = [f"{name} at position {position}" for position, name in enumerate(names)]
        listed.append(list(zip(names, one.effects.tolist(), strict=True)))
    return listed


def labels_at(objective: Objective, train: Examples, indices: Collection[int]) -> dict[int, int]:
    """The predicted labels of training examples, by dataset index. Empty if the model is not known to predict labels.

    Args:
        objective: The open objective.
        train: The training examples.
        indices: The dataset indices.
    """
    if isinstance(train.dataset, Stream):  # to read a few of its examples takes a whole pass
        return {}
    few = train.subset(torch.isin(train.ids, torch.tensor(sorted(indices))).nonzero().squeeze(1))
    found = predicted_labels(objective, few, objective.theta) if len(few) else None
    return {} if found is None else dict(zip(few.ids.tolist(), found.tolist(), strict=True))
