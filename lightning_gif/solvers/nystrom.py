"""A low-rank sketch of a symmetric operator, shared by any number of right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import LinearOperator, SolveOptions, solver
from .recorder import Outcome, SolveRecorder, unit_norm
from .solution import Solution, Status
from .vectors import norms, require_finite

__all__ = ["LowRank", "low_rank", "low_rank_eigenvectors", "nystrom"]

# The number of test vectors in one product, which limits the memory of the product.
_TOGETHER = 16


@dataclass(frozen=True)
class LowRank:
    """A low-rank approximation ``C ≈ U diag(s) Uᵀ``, which is positive semi-definite.

    Attributes:
        basis: The matrix ``U``, ``(n, r)``, with orthonormal columns.
        values: ``s ≥ 0``, ``(r,)``, descending: lower estimates of the largest eigenvalues of ``C``.
    """

    basis: Tensor
    values: Tensor

    def solve(self, rhs: Tensor, damping: float) -> Tensor:
        """``(U diag(s) Uᵀ + λ)⁻¹ B`` for columns ``(n, q)`` and ``λ > 0``."""
        return (rhs + self.basis @ (self._weights(damping)[:, None] * (self.basis.T @ rhs))) / damping

    def quadratic(self, rows: Tensor, damping: float) -> Tensor:
        """``gᵀ(U diag(s) Uᵀ + λ)⁻¹g`` for each row ``g`` of ``(m, n)``; ``(m,)``, float64."""
        inside = (rows @ self.basis).double().square() @ self._weights(damping).double()
        return (norms(rows.T).square() + inside) / damping

    def _weights(self, damping: float) -> Tensor:
        return -self.values / (self.values + damping)


def low_rank(operator: LinearOperator, rank: int, *, seed: int = 0) -> LowRank:
    """The randomised Nyström approximation of a symmetric positive semi-definite operator.

    For a random matrix ``Ω`` ``(n, r)`` with orthonormal columns, the sketch is ``(CΩ)(ΩᵀCΩ)⁺(CΩ)ᵀ``. A small shift
    makes its computation stable (Frangella, Tropp and Udell, *SIAM J. Matrix Anal. Appl.* 44, 2023, algorithm 2.1). The
    error, ``C`` minus the sketch, is positive semi-definite. It is small if the eigenvalues beyond the ``r``-th are
    small.

    Args:
        operator: The matrix ``C``, ``(n, n)``.
        rank: The rank ``r`` of the sketch: the number of products, and of vectors of length ``n`` that are kept.
        seed: The seed of ``Ω``.

    Raises:
        NonFiniteError: If a product is not finite.
        ConfigurationError: If the operator is far from positive semi-definite.
    """
    size, rank = operator.shape[0], min(rank, operator.shape[0])
    test, image = _images_of_test_vectors(operator, rank, seed)
    shift = torch.finfo(image.dtype).eps * float(torch.linalg.matrix_norm(image.double())) * size**0.5 / rank**0.5
    if not shift:
        return LowRank(test, torch.zeros(rank, dtype=image.dtype, device=image.device))
    shifted = image + shift * test
    core = (test.T @ shifted).double()
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if failed:
        raise ConfigurationError(
            "The sketch needs a curvature without negative eigenvalues, as curvature='ggn' has for convex losses. Use"
            " solver='lsmr', which takes any curvature. For self-influence, use curvature='hessian'."
        )
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(rank, dtype=factor.dtype, device=factor.device), upper=False
    )
    half = shifted @ inverse.T.to(shifted.dtype)
    # Eigenvectors of the small Gram matrix cost much less than singular vectors of the tall matrix.
    squares, vectors = torch.linalg.eigh((half.T @ half).double())
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > squares[0] * torch.finfo(image.dtype).eps ** (2 / 3)  # smaller ones are mostly rounding
    squares, vectors = squares[kept], vectors[:, kept]
    basis = half @ (vectors / squares.sqrt()).to(half.dtype)
    return LowRank(basis, (squares - shift).clamp_min(0).to(image.dtype))


def low_rank_eigenvectors(operator: LinearOperator, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A randomised low-rank approximation ``V diag(c) Vᵀ`` of a symmetric operator with eigenvalues of any sign.

    With ``Q`` ``(n, r)`` an orthonormal basis of ``CΩ`` and ``Ω`` ``(n, r)`` random, it is ``Q(QᵀCQ)Qᵀ`` (Halko,
    Martinsson and Tropp, *SIAM Review* 53, 2011, algorithms 4.1 and 5.3). The ``c`` are Ritz values: they are within
    the spectrum of ``C``, and close to its eigenvalues of largest size.

    Args:
        operator: ``C``, ``(n, n)``.
        rank: ``r``. It costs ``2r`` products, and memory for as many vectors of length ``n``.
        seed: The seed of ``Ω``.

    Returns:
        ``V``, ``(n, r)``, with orthonormal columns, and ``c``, ``(r,)``, ascending, float64.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    _, image = _images_of_test_vectors(operator, min(rank, operator.shape[0]), seed)
    basis = torch.linalg.qr(image)[0]
    core = (basis.T @ _products(operator, basis)).double()
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    return basis @ vectors.to(basis.dtype), values


def _images_of_test_vectors(operator: LinearOperator, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal random vectors ``Ω``, ``(n, r)``, and ``CΩ``."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(operator.shape[0], rank, generator=generator, dtype=operator.dtype).to(operator.device)
    test = torch.linalg.qr(test)[0]
    return test, _products(operator, test)


def _products(operator: LinearOperator, vectors: Tensor) -> Tensor:
    image = torch.cat([operator.matvec(part) for part in vectors.split(_TOGETHER, dim=1)], dim=1)
    require_finite(image, "The sketch of the curvature")
    return image


@solver(
    "nystrom",
    requires_symmetric_psd=True,
    requires_damping=True,
    shares_products_across_rhs=True,
    is_sketch=True,
    supports_start=False,
    supports_discrepancy=False,
    max_iter=128,
)
def nystrom(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``(C + λ) x = g`` with the sketch of :func:`low_rank` in place of ``C``.

    The sketch costs as many products for many right-hand sides as for one. In directions outside the sketch, the
    curvature counts as 0 and only the damping remains. So the damping must be positive, and should not be far below the
    smallest eigenvalue of the sketch.

    Args:
        operator: The symmetric positive semi-definite matrix ``C``, ``(n, n)``.
        rhs: The right-hand side ``g``, ``(n,)``, or several as columns ``(n, q)``.
        options: ``max_iter`` is the rank of the sketch, and the number of products for it. ``rtol`` does not end the
            solve, but decides whether the result counts as converged.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, or a list for columns. Both ``residual`` and ``unexplained`` are
        ``‖g − (C + λ)x‖/‖g‖`` for a random combination of all right-hand sides. Measuring it takes one more product.

    Raises:
        ConfigurationError: If the operator is not square or is far from positive semi-definite; if ``start`` or
            ``discrepancy`` is given; or if the damping is not positive.
        NonFiniteError: If a product is not finite.
    """
    recorder = SolveRecorder("nystrom", operator, rhs, options, unit_norm)
    b, damping = recorder.rhs, options.damping
    sketch = low_rank(operator, options.max_iter, seed=options.seed)
    x = sketch.solve(b, damping)
    signs = torch.randint(0, 2, (b.shape[1],), generator=torch.Generator().manual_seed(options.seed)) * 2 - 1
    signs = signs.to(b)
    combined = x @ signs
    residual = b @ signs - operator.matvec(combined) - damping * combined
    left = float(norms(residual) / norms(b @ signs).clamp_min(torch.finfo(torch.float64).tiny))
    return recorder.solutions(
        [
            Outcome(
                x=column,
                status=Status.CONVERGED if left <= options.rtol else Status.MAX_ITER,
                iterations=len(sketch.values),
                residual=left,
                unexplained=left,
                sigma_max=float(sketch.values.max()) if len(sketch.values) else 0.0,
                residuals=[1.0, left],
            )
            for column in x.T
        ]
    )
