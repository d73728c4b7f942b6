"""Which tokens of a training text its score comes from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..data.examples import Examples
from ..data.names import Vocabulary, tokens_of
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..objective.token_losses import token_derivatives
from .record import MOST_QUERIES, TokenScores

__all__ = ["token_scores"]


def token_scores(
    objective: Objective,
    scored: Examples,
    n_train: int,
    indices: Collection[int],
    directions: Sequence[tuple[ModelState, Tensor]],
    vocabulary: Vocabulary | None,
) -> dict[int, TokenScores]:
    """The scores of the tokens of some training texts, by dataset index.

    The score of token ``t`` of example ``i`` is ``(1/(n−1)) · wᵀ∇ℓᵢₜ``. Here ``ℓᵢₜ`` is the part of the example's loss
    that is about this token, and ``w`` is the iHVP of the query. Scores are averaged over states, as those of examples.

    Args:
        objective: An open objective.
        scored: The training examples that were scored.
        n_train: The number ``n`` of all training examples.
        indices: The dataset indices of the texts.
        directions: The iHVPs ``(q, p)`` at each state. The first eight queries count.
        vocabulary: The tokens of texts by their ids; ``None`` shows ids.

    Raises:
        ObjectiveError: If the loss of an example has no parts for several tokens.
    """
    found = {}
    for index, position in zip(indices, scored.positions_of(torch.tensor(list(indices))).tolist(), strict=True):
        batch = next(scored.subset(torch.tensor([position])).batches())
        total, ids = torch.zeros(()), torch.zeros(0)
        for state, ihvps in directions:
            with objective.at_state(state):
                part = token_derivatives(objective, batch, ihvps[:MOST_QUERIES])
            total, ids = total + part.values / (len(directions) * max(n_train - 1, 1)), part.ids
        named = tokens_of(vocabulary, ids.tolist())
        names = [name if one >= 0 else f"token {at}" for at, (name, one) in enumerate(zip(named, ids, strict=True))]
        found[index] = list(zip(names, total.T.tolist(), strict=True))
    return found
