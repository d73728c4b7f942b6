"""The power iteration, which estimates the largest eigenvalue of a matrix by a few products."""

from __future__ import annotations

from torch import Tensor

from .base import LinearOperator
from .vectors import norms, require_finite

__all__ = ["largest_eigenvalue"]


def largest_eigenvalue(operator: LinearOperator, start: Tensor, iterations: int) -> float:
    """A lower estimate of the largest eigenvalue of a symmetric matrix by power iteration; 0 if a product is zero.

    Args:
        operator: The matrix, ``(n, n)``.
        start: The vector ``(n,)`` to start from.
        iterations: The number of products.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    vector, eigenvalue = start, 0.0
    for _ in range(iterations):
        length = float(norms(vector))
        if not length:
            return 0.0
        vector = operator.matvec(vector / length)
        require_finite(vector, "The product of the curvature with a vector")
        eigenvalue = float(norms(vector))
    return eigenvalue
