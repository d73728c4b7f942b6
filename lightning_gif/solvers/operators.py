"""Operators made of others: rows and columns, other units, and weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearOperator

__all__ = ["Combination", "Scaled", "Submatrix"]


class _View:
    """An operator that takes its products from another, and counts them there."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self.dtype, self.device = operator.dtype, operator.device

    @property
    def products(self) -> int:
        """The number of products of the underlying operator so far."""
        return self._operator.products

    @property
    def examples(self) -> int:
        """The number of examples that these products went through."""
        return self._operator.examples


class Submatrix(_View):
    """``C[rows, cols]`` of a symmetric operator ``C``, without forming it.

    Args:
        curvature: ``C``, ``(p, p)``, symmetric.
        rows: Sorted positions ``(r,)`` of the kept rows, or ``None`` for all.
        cols: Sorted positions ``(c,)`` of the kept columns, or ``None`` for all.
    """

    def __init__(self, curvature: LinearOperator, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__(curvature)
        self._rows, self._cols = rows, cols
        size = curvature.shape[0]
        self.shape = (size if rows is None else rows.numel(), size if cols is None else cols.numel())

    @property
    def T(self) -> Submatrix:
        """The transpose ``C[cols, rows]``."""
        return Submatrix(self._operator, self._cols, self._rows)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(c,) → (r,)``, or ``(c, q) → (r, q)``."""
        image = self._operator.matvec(scatter(vectors, self._cols, self._operator.shape[0]))
        return image if self._rows is None else image[self._rows]

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``(r,) → (c,)``, or ``(r, q) → (c, q)``."""
        return self.T.matvec(vectors)

    def draw(self, seed: int) -> Submatrix:
        """The same rows and columns of the curvature over a random batch, see :meth:`Curvature.draw`."""
        return Submatrix(self._operator.draw(seed), self._rows, self._cols)  # type: ignore[attr-defined]


class Scaled(_View):
    """``A diag(d)``, or ``diag(d) A diag(d)``: an operator with its columns, and optionally its rows, in other units.

    Args:
        operator: ``A``, ``(rows, cols)``.
        units: ``d``, ``(cols,)``.
        rows: Whether to scale the rows as well; ``A`` must then be square.
    """

    def __init__(self, operator: LinearOperator, units: Tensor, *, rows: bool = False) -> None:
        super().__init__(operator)
        self._units, self._rows, self.shape = units, rows, operator.shape

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(cols,) → (rows,)``, or ``(cols, q) → (rows, q)``."""
        image = self._operator.matvec(self._times_units(vectors))
        return self._times_units(image) if self._rows else image

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``(rows,) → (cols,)``, or ``(rows, q) → (cols, q)``."""
        return self._times_units(self._operator.rmatvec(self._times_units(vectors) if self._rows else vectors))

    def _times_units(self, vectors: Tensor) -> Tensor:
        return self._units * vectors if vectors.ndim == 1 else self._units[:, None] * vectors

    def draw(self, seed: int) -> Scaled:
        """The same units of the curvature over a random batch, see :meth:`Curvature.draw`."""
        return Scaled(self._operator.draw(seed), self._units, rows=self._rows)  # type: ignore[attr-defined]


class Combination:
    """``Σ wᵢ Cᵢ`` of symmetric operators ``(p, p)``.

    Args:
        terms: Pairs of a weight and an operator.
    """

    def __init__(self, *terms: tuple[float, LinearOperator]) -> None:
        self._terms = terms
        (_, first), *_ = terms
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device

    @property
    def products(self) -> int:
        """The number of products of all terms."""
        return sum(operator.products for _, operator in self._terms)

    @property
    def examples(self) -> int:
        """The number of examples that these products went through."""
        return sum(operator.examples for _, operator in self._terms)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(p,) → (p,)``, or ``(p, q) → (p, q)``."""
        images = [weight * operator.matvec(vectors) for weight, operator in self._terms]
        return torch.stack(images).sum(0)

    rmatvec = matvec

    def draw(self, seed: int) -> Combination:
        """The same sum of the curvatures over a random batch each, see :meth:`Curvature.draw`."""
        return Combination(*((weight, operator.draw(seed)) for weight, operator in self._terms))  # type: ignore[attr-defined]


def scatter(vectors: Tensor, positions: Tensor | None, size: int) -> Tensor:
    """Vectors ``(size, …)`` with the entries of ``vectors`` at ``positions`` and zeros elsewhere."""
    if positions is None:
        return vectors
    return vectors.new_zeros(size, *vectors.shape[1:]).index_copy(0, positions, vectors)
