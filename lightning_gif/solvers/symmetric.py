"""Solvers for a symmetric matrix: one product a step, and a rate by its condition number instead of the square."""

from __future__ import annotations

from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import SymmetricConjugateGradients
from .solution import Solution

__all__ = ["cg", "truncated_newton"]


@solver("cg", requires_symmetric_psd=True, supports_start=False)
def cg(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``(C + λ) x = g`` for a symmetric positive semi-definite ``C`` by conjugate gradients.

    Each iteration costs one product, half of what a least-squares solver needs. ``C`` must be square (methods ``"if"``,
    ``"fif"`` and ``"pif"``) and have no negative eigenvalues (``curvature="ggn"`` of a convex loss). The solve ends
    before a direction of negative curvature, with the status ``INDEFINITE``. Stopping after a few iterations
    regularises like damping.

    There is no first iterate, because the first step would no longer show the curvature along ``g``.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, or a list for columns. Its ``residual`` and ``unexplained`` are both
        ``‖g − (C + λ)x‖/‖g‖``, by which convergence is judged.

    Raises:
        ConfigurationError: If the operator is not square, or for a ``start``.
        NonFiniteError: If a product is not finite.
    """
    return SymmetricConjugateGradients("cg", operator, rhs, options).solutions()


def truncated_newton(
    operator: LinearOperator, rhs: Tensor, *, damping: float, relative: float, rtol: float, max_iter: int
) -> tuple[Solution, float]:
    """Lowers ``½ xᵀ(C + λ)x − gᵀx`` by conjugate gradients, up to where ``C + λ`` has negative curvature.

    With ``−g`` the gradient of a function and ``C`` its second derivative, ``x`` is a step of a damped Newton method
    that stops early (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1; Martens, ICML 2010). It is a
    descent direction for any signs of the eigenvalues of ``C``. Each iteration costs one product, half of what a
    least-squares solver needs, and convergence depends on the condition number of ``C``, not on its square.

    Args:
        operator: ``C``, ``(n, n)``, symmetric.
        rhs: ``g``, ``(n,)``.
        damping: A part of ``λ``, in the unit of the eigenvalues of ``C``.
        relative: The other part, as a share of ``‖C g‖/‖g‖``, which the first iteration gives at no further cost.
        rtol: Relative residual ``‖g − (C + λ)x‖/‖g‖`` at which to stop.
        max_iter: The largest number of iterations.

    Returns:
        A :class:`~lightning_gif.solvers.Solution` and ``xᵀCx``, which costs no further product. Its ``unexplained`` and
        ``residual`` are both the relative residual.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """
    options = SolveOptions(damping=damping, rtol=rtol, max_iter=max_iter)
    iteration = SymmetricConjugateGradients("truncated_newton", operator, rhs, options, relative=relative)
    solution = iteration.solutions()
    assert isinstance(solution, Solution)  # of one vector
    return solution, iteration.curvature_along()[0]
