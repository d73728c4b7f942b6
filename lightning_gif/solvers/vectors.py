"""Small operations on columns of vectors, and checks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError, NonFiniteError

__all__ = ["check_shape", "columns", "norms", "require_finite"]


def norms(matrix: Tensor) -> Tensor:
    """The lengths of the columns, accumulated in float64: ``(rows, a) → (a,)``, or ``(rows,) → ()``."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)


def columns(keep: Tensor | None, *matrices: Tensor) -> tuple[Tensor, ...]:
    """The columns ``keep`` of some matrices ``(…, a)``; the matrices as they are for ``None``."""
    return matrices if keep is None else tuple(matrix[..., keep.to(matrix.device)] for matrix in matrices)


def check_shape(what: str, matrix: Tensor, rows: int) -> None:
    """Raises a :class:`~lightning_gif.errors.ConfigurationError` unless the columns have ``rows`` entries."""
    if matrix.ndim != 2 or matrix.shape[0] != rows:
        raise ConfigurationError(
            f"The {what} of a solve must have the shape ({rows},) or ({rows}, q), got {list(matrix.shape)}."
        )


def require_finite(vector: Tensor, what: str) -> None:
    """Raises a :class:`~lightning_gif.errors.NonFiniteError` that names ``what`` if ``vector`` has NaN or infinity."""
    if not torch.isfinite(vector).all():
        bad = int((~torch.isfinite(vector)).sum())
        raise NonFiniteError(
            f"{what} has {bad} non-finite value(s) of {vector.numel()}. The weights are unchanged. Look for NaN in"
            " the data or the loss; on a model trained in low precision, a `damping` above 0 can help."
        )
