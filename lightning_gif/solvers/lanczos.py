"""The tridiagonal matrix of the Lanczos process. Its eigenvalues (Ritz values) estimate a spectrum.

Conjugate gradients compute this matrix, too, so :func:`largest_singular_value` costs no further product. Without
reorthogonalisation only its largest eigenvalue is reliable, because converged Ritz values repeat. :func:`quadrature`
keeps and reorthogonalises its vectors. It gives both ends of a spectrum and its density, for one product in each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .vectors import require_finite

__all__ = ["largest_singular_value", "quadrature"]


def largest_singular_value(alpha: Tensor, beta: Tensor, damping: float) -> tuple[float, float]:
    """A lower estimate of ``σ_max(A)``, and a safe upper one, from the coefficients of CGLS.

    The coefficients determine the Lanczos process for ``AᵀA + λ²`` that starts at the first residual (Golub and Van
    Loan, *Matrix Computations*, section 11.3.5). The lower estimate comes from the largest Ritz value. The upper one
    adds the norm of the residual of its Ritz vector: there is an eigenvalue within this distance.

    Args:
        alpha: Step lengths of CGLS, ``(steps,)``; only those before the first zero are used.
        beta: The factors of the old direction, ``(steps,)``.
        damping: The damping ``λ``.

    Returns:
        The lower and the upper estimate. Both are 0 if there is no step.
    """
    size = int((alpha > 0).long().cumprod(0).sum())
    if not size:
        return 0.0, 0.0
    a, b = alpha[:size], beta[:size]
    diagonal = 1 / a
    diagonal[1:] += b[:-1] / a[:-1]
    values, vectors = _eigh(diagonal, b[:-1].sqrt() / a[:-1])
    uncertainty = float(b[-1].sqrt() / a[-1] * vectors[-1, -1].abs())
    squared = float(values[-1]) - damping**2
    return max(squared, 0.0) ** 0.5, max(squared + uncertainty, 0.0) ** 0.5


def quadrature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature for the density of the eigenvalues of ``C``, weighted by a start vector.

    Args:
        product: The product with the symmetric matrix ``C``, ``(n,) → (n,)``.
        start: A unit vector, ``(n,)``.
        steps: The largest number of products, and of vectors that are kept.

    Returns:
        Ritz values, ascending, and their weights, which sum to 1; both ``(m,)`` in float64 with ``m ≤ steps``. There
        are fewer than ``steps`` if the Krylov space of the start vector has a smaller dimension.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    basis = [start]
    diagonal: list[float] = []
    side: list[float] = []
    for _ in range(steps):
        image = product(basis[-1])
        require_finite(image, "The product of the Hessian with a vector")
        diagonal.append(float(basis[-1] @ image))
        scale = float(image.norm())
        known = torch.stack(basis)
        for _ in range(2):  # twice, because cancellation makes the first result inaccurate
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        if length <= 100 * torch.finfo(image.dtype).eps * max(scale, max(map(abs, diagonal))):
            break  # the Krylov space is invariant
        side.append(length)
        basis.append(image / length)
    between = torch.tensor(side[: len(diagonal) - 1], dtype=torch.float64)
    values, vectors = _eigh(torch.tensor(diagonal, dtype=torch.float64), between)
    return values, vectors[0] ** 2


def _eigh(diagonal: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric tridiagonal matrix."""
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(side, 1) + torch.diag(side, -1))
    return values, vectors
