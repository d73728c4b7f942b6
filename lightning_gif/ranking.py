"""The ends of a ranking, found block by block: the scores need never be in memory all at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ranking", "Strongest", "strongest"]

_BLOCK = 2**16


class Ranking(NamedTuple):
    """The ends of a ranking of training examples.

    Attributes:
        indices: Dataset indices, ``(n_queries, k)``, strongest first.
        scores: Their scores, ``(n_queries, k)``.
    """

    indices: Tensor
    scores: Tensor

    def add(self, indices: Tensor, scores: Tensor, k: int, *, largest: bool) -> Ranking:
        """The ``k`` strongest of these and of ``b`` more, ``(b,)`` and ``(n_queries, b)``; equal ones in that order."""
        ids = torch.cat([self.indices, indices.expand(len(scores), -1)], dim=1)
        values = torch.cat([self.scores, scores.to(self.scores)], dim=1)
        best = values.sort(dim=1, descending=largest, stable=True).indices[:, :k]
        return Ranking(ids.gather(1, best), values.gather(1, best))

    @classmethod
    def empty(cls, queries: int) -> Ranking:
        """A ranking of nothing."""
        return cls(torch.empty(queries, 0, dtype=torch.int64), torch.empty(queries, 0, dtype=torch.float64))


def strongest(scores: Tensor, indices: Tensor, k: int, *, largest: bool) -> Ranking:
    """The ``k`` highest or lowest scores of each query, equal ones in the order of ``indices``.

    Args:
        scores: ``(n_queries, n)``; a view of a file is read once, from its beginning to its end.
        indices: Dataset indices ``(n,)``.
        k: How many.
        largest: The highest rather than the lowest.
    """
    found = Ranking.empty(len(scores))
    columns = max(_BLOCK // len(scores), k)
    for start in range(0, len(indices), columns):
        stop = start + columns
        found = found.add(indices[start:stop], scores[:, start:stop], k, largest=largest)
    return found


class Strongest:
    """Takes scores block by block and keeps the ``k`` highest and the ``k`` lowest of each query.

    Attributes:
        proponents: The highest of those seen so far.
        opponents: The lowest.
    """

    def __init__(self, queries: int, indices: Tensor, k: int) -> None:
        self._indices, self._k = indices, k
        self.proponents = self.opponents = Ranking.empty(queries)

    def missing(self, start: int, stop: int) -> bool:
        """Whether scores of these positions are still wanted: always, each is given once."""
        return True

    def write(self, start: int, block: Tensor) -> None:
        """Takes the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        ids = self._indices[start : start + block.shape[1]]
        self.proponents = self.proponents.add(ids, block, self._k, largest=True)
        self.opponents = self.opponents.add(ids, block, self._k, largest=False)

    def both(self) -> tuple[Tensor, Tensor]:
        """Scores and dataset indices, ``(n_queries, 2k)`` each: the highest, falling, and then the lowest, falling."""
        lowest = Ranking(*(part.flip(1) for part in self.opponents))
        return torch.cat([self.proponents.scores, lowest.scores], 1), torch.cat(
            [self.proponents.indices, lowest.indices], 1
        )
