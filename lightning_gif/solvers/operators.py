"""Operators built from other operators: submatrices, scaled entries, weighted sums, and damping.

An operator that is known to be positive semi-definite has a true attribute ``positive_semidefinite``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import LinearOperator

__all__ = ["Combination", "Scaled", "Shifted", "Submatrix", "Transformed", "damped_system", "is_positive_semidefinite"]


def is_positive_semidefinite(operator: LinearOperator) -> bool:
    """Whether an operator is declared symmetric and positive semi-definite; false without a declaration."""
    return bool(getattr(operator, "positive_semidefinite", False))


def damped_system(operator: LinearOperator, damping: float) -> tuple[LinearOperator, float]:
    """The least-squares problem ``min_x ‖A x − g‖² + ρ²‖x‖²`` for an operator with damping ``λ``.

    If the operator is declared symmetric positive semi-definite, ``C``, then ``A = C + λ`` and ``ρ = 0``, so that the
    problem is ``(C + λ) x = g``. Other operators cannot be shifted: they may be rectangular, or have an eigenvalue
    ``−λ``, which would become zero. For them ``A`` is the operator itself and ``ρ = λ``, so that an eigenvalue or
    singular value ``c`` counts as ``√(c² + λ²)``.

    Args:
        operator: A matrix ``(rows, cols)``.
        damping: The damping ``λ ≥ 0``.

    Returns:
        ``A`` and ``ρ``.
    """
    if damping and is_positive_semidefinite(operator):
        return Shifted(operator, damping), 0.0
    return operator, damping


class _View:
    """Base class of operators whose products are computed, and counted, by another operator."""

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
    def positive_semidefinite(self) -> bool:
        """Whether the curvature is positive semi-definite, and rows and columns are the same."""
        rows, cols = self._rows, self._cols
        same = rows is cols or (rows is not None and cols is not None and torch.equal(rows, cols))
        return same and is_positive_semidefinite(self._operator)

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
    """``A diag(d)``, or ``diag(d) A diag(d)``: an operator with scaled columns, and optionally scaled rows.

    Args:
        operator: The matrix ``A``, ``(rows, cols)``.
        units: The scale ``d``, ``(cols,)``.
        rows: Whether to scale the rows, too; ``A`` must then be square.
    """

    def __init__(self, operator: LinearOperator, units: Tensor, *, rows: bool = False) -> None:
        super().__init__(operator)
        self._units, self._rows, self.shape = units, rows, operator.shape

    @property
    def positive_semidefinite(self) -> bool:
        """Whether the operator is positive semi-definite, and its rows are scaled, too."""
        return self._rows and is_positive_semidefinite(self._operator)

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
        """The curvature over a random batch with the same scale, see :meth:`Curvature.draw`."""
        return Scaled(self._operator.draw(seed), self._units, rows=self._rows)  # type: ignore[attr-defined]


class Transformed(_View):
    """``W (A + diag(d)) W`` with a symmetric map ``W``, such as the root of an approximate inverse of ``A + diag(d)``.

    Args:
        operator: The symmetric matrix ``A``, ``(n, n)``.
        diagonal: ``d``, ``(n,)``.
        transform: ``W``, from ``(n,)`` to ``(n,)``.
        takes_columns: Whether ``transform`` takes columns ``(n, q)``, too.
    """

    def __init__(
        self,
        operator: LinearOperator,
        diagonal: Tensor,
        transform: Callable[[Tensor], Tensor],
        *,
        takes_columns: bool = False,
    ) -> None:
        super().__init__(operator)
        self._diagonal, self._transform, self._takes_columns = diagonal, transform, takes_columns
        self.shape = operator.shape

    @property
    def positive_semidefinite(self) -> bool:
        """Whether ``A`` is positive semi-definite."""
        return is_positive_semidefinite(self._operator)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(n,) → (n,)``, or ``(n, q) → (n, q)``."""
        inner = self._columns(vectors)
        diagonal = self._diagonal if inner.ndim == 1 else self._diagonal[:, None]
        return self._columns(self._operator.matvec(inner) + diagonal * inner)

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """As :meth:`matvec`, since the matrix is symmetric."""
        return self.matvec(vectors)

    def _columns(self, vectors: Tensor) -> Tensor:
        if vectors.ndim == 1 or self._takes_columns:
            return self._transform(vectors)
        return torch.stack([self._transform(column) for column in vectors.T], dim=1)


class Shifted(_View):
    """``C + λ``: a symmetric operator with all eigenvalues larger by the damping.

    Args:
        operator: ``C``, ``(n, n)``, symmetric.
        shift: ``λ ≥ 0``.
    """

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        super().__init__(operator)
        self._shift, self.shape = shift, operator.shape

    @property
    def positive_semidefinite(self) -> bool:
        """Whether ``C`` is positive semi-definite."""
        return is_positive_semidefinite(self._operator)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(n,) → (n,)``, or ``(n, q) → (n, q)``."""
        return self._operator.matvec(vectors) + self._shift * vectors

    rmatvec = matvec

    def draw(self, seed: int) -> Shifted:
        """The curvature over a random batch with the same shift, see :meth:`Curvature.draw`."""
        return Shifted(self._operator.draw(seed), self._shift)  # type: ignore[attr-defined]


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
    def positive_semidefinite(self) -> bool:
        """Whether all terms are positive semi-definite, and no weight is negative."""
        return all(weight >= 0 and is_positive_semidefinite(operator) for weight, operator in self._terms)

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
        """The same sum with each curvature over a random batch, see :meth:`Curvature.draw`."""
        return Combination(*((weight, operator.draw(seed)) for weight, operator in self._terms))  # type: ignore[attr-defined]


def scatter(vectors: Tensor, positions: Tensor | None, size: int) -> Tensor:
    """Vectors ``(size, …)`` with the entries of ``vectors`` at ``positions`` and zeros elsewhere."""
    if positions is None:
        return vectors
    return vectors.new_zeros(size, *vectors.shape[1:]).index_copy(0, positions, vectors)
