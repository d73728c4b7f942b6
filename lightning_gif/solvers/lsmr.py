"""LSMR: least squares with the smallest normal-equation residual after each iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import ConjugateGradients
from .run import Run
from .solution import Solution
from .vectors import columns, norms

__all__ = ["lsmr"]


@solver("lsmr")
def lsmr(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` with the smallest normal-equation residual after each iteration.

    LSMR (Fong and Saunders, *SIAM Journal on Scientific Computing* 33, 2011) is MINRES on the normal equations. Its
    iterates are computed here by CGLS with minimal-residual smoothing (Zhou and Walker, *SIAM Journal on Scientific
    Computing* 15, 1994): each is the point with the smallest residual on the line from the last iterate to the new CGLS
    iterate. So the residual never grows.

    Each iteration costs one product with ``A`` and one with ``Aᵀ``.

    Returns:
        The iterate with the smallest residual as a :class:`~lightning_gif.solvers.Solution`; a list for columns.

    Raises:
        NonFiniteError: If a product is not finite.
        ConvergenceError: If ``A`` does not act like a fixed matrix (a random or shuffled loss).
    """
    run = Run("lsmr", operator, rhs, options)
    iteration = ConjugateGradients(run)
    x, difference, normal = run.x, run.difference, run.normal
    while run.running:
        iteration.step()
        change = iteration.normal - normal
        length = norms(change).square()
        share = torch.where(length > 0, -(normal * change).sum(0, dtype=torch.float64) / length, 0.0).to(x.dtype)
        x = x + share * (iteration.x - x)
        difference = difference + share * (iteration.difference - difference)
        normal = normal + share * change
        keep = run.record(x, difference, normal, stuck=iteration.stuck)
        iteration.keep(keep)
        x, difference, normal = columns(keep, x, difference, normal)
    run.verify(carried=options.max_iter)
    return run.solutions()
