"""Conjugate gradients for least squares."""

from __future__ import annotations

from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import ConjugateGradients
from .run import Run
from .solution import Solution

__all__ = ["cgls"]


@solver("cgls")
def cgls(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` by conjugate gradients on the normal equations.

    Each iteration costs one product with ``A`` and one with ``Aᵀ``. Each iterate minimises ``‖A x − g‖² + λ²‖x‖²`` over
    the Krylov space. Convergence is measured by the residual of the normal equations, which can rise between
    iterations. :func:`~lightning_gif.solvers.lsmr` minimises that residual instead.

    Returns:
        The iterate with the smallest residual as a :class:`~lightning_gif.solvers.Solution`; a list for columns.

    Raises:
        NonFiniteError: If a product is not finite.
        ConvergenceError: If ``A`` does not act like a fixed matrix (a random or shuffled loss).
    """
    run = Run("cgls", operator, rhs, options)
    iteration = ConjugateGradients(run)
    while run.running:
        iteration.step()
        iteration.keep(run.record(iteration.x, iteration.difference, iteration.normal, stuck=iteration.stuck))
    run.verify(carried=options.max_iter)
    return run.solutions()
