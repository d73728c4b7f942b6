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
    """Solves ``min_x ‖B x − b‖² + λ²‖x‖²`` by conjugate gradients on the normal equations.

    Of all methods that spend two products a step it makes ``‖B x − b‖`` smallest. The normal-equation residual, by
    which convergence is judged, wavers on the way; :func:`~lightning_gif.solvers.lsmr` makes that one smallest.

    Args:
        operator: ``B``, ``(rows, cols)``.
        rhs: ``b``, ``(rows,)``, or several as columns ``(rows, q)``.
        damping: ``λ ≥ 0``, in the unit of ``B``'s singular values.
        rtol: Relative normal-equation residual at which to stop.
        max_iter: Most steps; each costs one product with ``B`` and one with ``Bᵀ``.
        seed: Unused: nothing is drawn.
        start: First iterate, ``(cols,)`` or ``(cols, q)``; zero by default.
        discrepancy: Stop where ``‖B x − b‖ ≤ discrepancy·‖b‖``.

    Returns:
        The iterate with the smallest residual in a :class:`~lightning_gif.solvers.Solution`; a list for columns.

    Raises:
        NonFiniteError: If a product is not finite.
        ConvergenceError: If ``B`` does not act like a fixed matrix (a random or shuffled loss).
    """
    run = Run("cgls", operator, rhs, options)
    iteration = ConjugateGradients(run)
    while run.running:
        iteration.step()
        iteration.keep(run.record(iteration.x, iteration.difference, iteration.normal, stuck=iteration.stuck))
    run.verify(carried=options.max_iter)
    return run.solutions()
