"""The highest and lowest scores, computed block by block, so that not all scores have to be in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .uncertainty import Agreement

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


class _End(NamedTuple):
    """One end of the ranking of the examples so far, strongest first.

    Attributes:
        positions: The positions of the examples, ``(n_queries, k)``.
        scores: Their scores.
        errors: The standard errors of the scores; ``None`` if there are none.
    """

    positions: Tensor
    scores: Tensor
    errors: Tensor | None

    def add(self, positions: Tensor, scores: Tensor, errors: Tensor | None, k: int, *, largest: bool) -> _End:
        """The ``k`` strongest of these examples and ``b`` others. Equal scores are ordered by position.

        Args:
            positions: The positions of the other examples, ``(b,)``.
            scores: Their scores, ``(n_queries, b)``.
            errors: Their standard errors; ``None`` if there are none.
            k: The number of examples to keep.
            largest: Whether the highest scores count as the strongest; otherwise the lowest do.
        """
        all_positions = torch.cat([self.positions, positions.expand(len(scores), -1)], dim=1)
        values = torch.cat([self.scores, scores.to(self.scores)], dim=1)
        order = all_positions.argsort(dim=1)
        best = values.gather(1, order).sort(dim=1, descending=largest, stable=True).indices[:, :k]
        best = order.gather(1, best)
        return _End(
            all_positions.gather(1, best),
            values.gather(1, best),
            None if errors is None or self.errors is None else torch.cat([self.errors, errors], dim=1).gather(1, best),
        )

    @classmethod
    def empty(cls, queries: int, *, with_errors: bool) -> _End:
        """An end without examples."""
        none = torch.empty(queries, 0, dtype=torch.float64)
        return cls(none.long(), none, none if with_errors else None)


def strongest(scores: Tensor, indices: Tensor, k: int, *, largest: bool) -> Ranking:
    """The ``k`` highest or lowest scores of each query. Equal scores are in the order of ``indices``.

    Args:
        scores: The scores ``(n_queries, n)``. They are read once, in order, because they may be a view of a file.
        indices: Dataset indices ``(n,)``.
        k: The number of scores to return for each query.
        largest: Whether to return the highest scores; otherwise the lowest.
    """
    end, columns = _End.empty(len(scores), with_errors=False), max(_BLOCK // len(scores), k)
    for positions in torch.arange(len(indices)).split(columns):
        end = end.add(positions, scores[:, positions[0] : positions[-1] + 1], None, k, largest=largest)
    return Ranking(indices[end.positions], end.scores)


class Strongest:
    """Takes scores block by block, in any order, and keeps the ``k`` highest and the ``k`` lowest of each query.

    Args:
        queries: The number of queries.
        indices: Dataset indices ``(n,)`` of all examples that will be scored.
        k: The number of scores to keep at each end.
        with_errors: Whether scores have standard errors.

    Attributes:
        agreement: The agreement of the states on all scores, if they have standard errors.
    """

    def __init__(self, queries: int, indices: Tensor, k: int, *, with_errors: bool = False) -> None:
        self.agreement = Agreement(queries)
        self._indices, self._k = indices, k
        self._highest = self._lowest = _End.empty(queries, with_errors=with_errors)

    def write(self, start: int, block: Tensor, errors: Tensor | None = None) -> None:
        """Adds the scores ``(n_queries, b)``, and their standard errors, of the examples from position ``start`` on."""
        if errors is not None:
            self.agreement.add(block, errors)
        positions = torch.arange(start, start + block.shape[1])
        self._highest = self._highest.add(positions, block, errors, self._k, largest=True)
        self._lowest = self._lowest.add(positions, block, errors, self._k, largest=False)

    def both(self) -> tuple[Tensor, Tensor]:
        """Scores and dataset indices, ``(n_queries, 2k)`` each, in descending order: the highest, then the lowest."""
        positions = torch.cat([self._highest.positions, self._lowest.positions.flip(1)], dim=1)
        return torch.cat([self._highest.scores, self._lowest.scores.flip(1)], dim=1), self._indices[positions]

    @property
    def standard_errors(self) -> Tensor | None:
        """The standard errors of the scores of :meth:`both`; ``None`` if they have none."""
        highest, lowest = self._highest.errors, self._lowest.errors
        return None if highest is None or lowest is None else torch.cat([highest, lowest.flip(1)], dim=1)
