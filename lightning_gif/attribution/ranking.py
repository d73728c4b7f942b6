"""The highest and lowest scores, computed block by block, so that not all scores have to be in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ranking", "Strongest", "strongest"]


_BLOCK = 2**16


class Ranking(NamedTuple):
    """The training examples with the highest, or the lowest, scores of each query.

    Attributes:
        indices: Dataset indices, ``(n_queries, k)``, strongest first.
        scores: Their scores, ``(n_queries, k)``.
    """

    indices: Tensor
    scores: Tensor

    def add(self, positions: Tensor, scores: Tensor, k: int, *, largest: bool) -> Ranking:
        """The ``k`` strongest of the ranked examples and ``b`` others. Equal scores are ordered by position.

        For use with positions in place of dataset indices.

        Args:
            positions: The positions of the other examples, ``(b,)``.
            scores: Their scores, ``(n_queries, b)``.
            k: The number of examples to keep.
            largest: Whether the highest scores count as the strongest; otherwise the lowest do.
        """
        all_positions = torch.cat([self.indices, positions.expand(len(scores), -1)], dim=1)
        values = torch.cat([self.scores, scores.to(self.scores)], dim=1)
        order = all_positions.argsort(dim=1)
        all_positions, values = all_positions.gather(1, order), values.gather(1, order)
        best = values.sort(dim=1, descending=largest, stable=True).indices[:, :k]
        return Ranking(all_positions.gather(1, best), values.gather(1, best))

    @classmethod
    def empty(cls, queries: int) -> Ranking:
        """A ranking without examples."""
        return cls(torch.empty(queries, 0, dtype=torch.int64), torch.empty(queries, 0, dtype=torch.float64))


def strongest(scores: Tensor, indices: Tensor, k: int, *, largest: bool) -> Ranking:
    """The ``k`` highest or lowest scores of each query. Equal scores are in the order of ``indices``.

    Args:
        scores: The scores ``(n_queries, n)``. They are read once, in order, because they may be a view of a file.
        indices: Dataset indices ``(n,)``.
        k: The number of scores to return for each query.
        largest: Whether to return the highest scores; otherwise the lowest.
    """
    ranking, columns = Ranking.empty(len(scores)), max(_BLOCK // len(scores), k)
    for positions in torch.arange(len(indices)).split(columns):
        ranking = ranking.add(positions, scores[:, positions[0] : positions[-1] + 1], k, largest=largest)
    return Ranking(indices[ranking.indices], ranking.scores)


class Strongest:
    """Takes scores block by block, in any order, and keeps the ``k`` highest and the ``k`` lowest of each query.

    Args:
        queries: The number of queries.
        indices: Dataset indices ``(n,)`` of all examples that will be scored.
        k: The number of scores to keep at each end.
    """

    def __init__(self, queries: int, indices: Tensor, k: int) -> None:
        self._indices, self._k = indices, k
        self._highest = self._lowest = Ranking.empty(queries)

    def write(self, start: int, block: Tensor) -> None:
        """Adds the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        positions = torch.arange(start, start + block.shape[1])
        self._highest = self._highest.add(positions, block, self._k, largest=True)
        self._lowest = self._lowest.add(positions, block, self._k, largest=False)

    def both(self) -> tuple[Tensor, Tensor]:
        """Scores and dataset indices, ``(n_queries, 2k)`` each, in descending order: the highest, then the lowest."""
        positions = torch.cat([self._highest.indices, self._lowest.indices.flip(1)], dim=1)
        return torch.cat([self._highest.scores, self._lowest.scores.flip(1)], dim=1), self._indices[positions]
