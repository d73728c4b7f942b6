"""Small operations on vectors that are stored as columns, and checks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError, NonFiniteError

__all__ = ["check_shape", "columns", "norms", "require_finite"]


def norms(matrix: Tensor) -> Tensor:
    """The norms of the columns, accumulated in float64: ``(rows, a) → (a,)``, or ``(rows,) → ()``."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)


def columns(keep: Tensor | None, *matrices: Tensor) -> tuple[Tensor, ...]:
    """The columns of matrices ``(…, a)`` that a mask ``keep`` ``(a,)`` selects; all columns for ``None``."""
    return matrices if keep is None else tuple(matrix[..., keep.to(matrix.device)] for matrix in matrices)


def check_shape(what: str, matrix: Tensor, rows: int) -> None:
    """Checks the shape ``(rows, q)`` of a matrix.

    Raises:
        ConfigurationError: If it has another shape. ``what`` is its name in the message.
    """
    if matrix.ndim != 2 or matrix.shape[0] != rows:
        raise ConfigurationError(
            f"The {what} of a solve must have the shape ({rows},) or ({rows}, q), got {list(matrix.shape)}."
        )


def require_finite(vector: Tensor, what: str) -> None:
    """Checks that all values are finite.

    Raises:
        NonFiniteError: If a value is NaN or infinite. ``what`` is the name of the vector in the message.
    """
    if not torch.isfinite(vector).all():
        bad = int((~torch.isfinite(vector)).sum())
        raise NonFiniteError(
            f"{what} has {bad} non-finite value(s) of {vector.numel()}. The weights are unchanged. Look for NaN in"
            " the data or the loss; on a model trained in low precision, a `damping` above 0 can help."
        )
