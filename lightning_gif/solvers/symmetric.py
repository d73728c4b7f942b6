"""Solvers for a symmetric matrix. An iteration costs one product; the rate depends on the condition number."""

from __future__ import annotations

from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import SymmetricConjugateGradients
from .solution import Solution

__all__ = ["cg", "truncated_newton"]


@solver("cg", requires_symmetric_psd=True, supports_start=False)
def cg(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``(C + λ) x = g`` for a symmetric positive semi-definite ``C`` by conjugate gradients.

    Each iteration costs one product, half as many as a least-squares solver needs. ``C`` must be square (methods
    ``"if"``, ``"fif"`` and ``"pif"``) and have no negative eigenvalues (``curvature="ggn"`` of a convex loss). If the
    solve meets a direction of negative curvature, it ends before it with the status ``INDEFINITE``. Stopping after a
    few iterations regularises like damping.

    The solve always starts at zero, because its first product must be with ``g``.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, or a list for columns. Its ``residual`` and ``unexplained`` are both
        ``‖g − (C + λ)x‖/‖g‖``, which measures convergence.

    Raises:
        ConfigurationError: If the operator is not square, or if ``start`` is given.
        NonFiniteError: If a product is not finite.
    """
    return SymmetricConjugateGradients("cg", operator, rhs, options).solutions()


def truncated_newton(
    operator: LinearOperator, rhs: Tensor, *, damping: float, relative: float, rtol: float, max_iter: int
) -> tuple[Solution, float]:
    """Minimises ``½ xᵀ(C + λ)x − gᵀx`` by conjugate gradients, which stop if ``C + λ`` has negative curvature.

    If ``−g`` is the gradient of a function and ``C`` its second derivative, ``x`` is a step of a truncated, damped
    Newton method (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1; Martens, ICML 2010). It is a
    descent direction for any signs of the eigenvalues of ``C``. Each iteration costs one product, half as many as a
    least-squares solver needs. The rate depends on the condition number of ``C``, not on its square.

    Args:
        operator: The symmetric matrix ``C``, ``(n, n)``.
        rhs: The right-hand side ``g``, ``(n,)``.
        damping: A part of ``λ``, in the unit of the eigenvalues of ``C``.
        relative: The other part of ``λ``, as a share of ``‖C g‖/‖g‖``. Measuring it takes no further product.
        rtol: The relative residual ``‖g − (C + λ)x‖/‖g‖`` at which to stop.
        max_iter: The largest number of iterations.

    Returns:
        The solution and ``xᵀCx``. The solution's ``unexplained`` and ``residual`` are both the relative residual.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """
    options = SolveOptions(damping=damping, rtol=rtol, max_iter=max_iter)
    iteration = SymmetricConjugateGradients("truncated_newton", operator, rhs, options, relative=relative)
    solution = iteration.solutions()
    assert isinstance(solution, Solution)  # of one vector
    return solution, iteration.curvature_along()[0]
