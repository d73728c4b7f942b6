"""Stochastic LiSSA, which draws new batches of examples in each iteration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import LinearOperator, SolveOptions, solver
from .krylov import ConjugateGradients
from .run import Run
from .solution import Solution
from .vectors import norms, require_finite

__all__ = ["stochastic_lissa"]

# The scale is the largest singular value of this many draws, estimated by this many Lanczos steps for each, times a
# margin, because batches differ.
_SCALE_DRAWS, _SCALE_STEPS, _SCALE_MARGIN = 3, 4, 1.1

# The solve counts as diverged if a step is this many times as long as the longest of the first ten.
_FIRST_STEPS, _RUNS_AWAY = 10, 1e3


@solver("stochastic_lissa", requires_draws=True)
def stochastic_lissa(
    operator: LinearOperator, rhs: Tensor, options: SolveOptions, *, repeats: int = 1
) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` by iterations over random batches.

    This is LiSSA (Agarwal, Bullins and Hazan, JMLR 18, 2017) for the normal equations of GIF. A step is
    ``x ← x + (A₁ᵀ(g − A₂ x) − λ²x)/c²``, where ``A₁`` and ``A₂`` are taken over *independent* batches. With one batch
    for both factors the expectation would be ``E[AᵢᵀAᵢ] = AᵀA`` plus the variance of ``Aᵢ``, and the solve would
    converge to a wrong solution. ``c²`` is estimated by the Lanczos process on a few draws. If batches differ much in
    their curvature, the solve can diverge, which raises an error.

    Iterates are averaged over the second half of the iterations (Polyak and Juditsky 1992), and over ``repeats``
    independent runs, which reduces the noise. The residual is measured with the whole operator, before the first
    iteration and after the last. The solver is efficient if there are many examples and a rough solution suffices.

    Args:
        operator: The matrix ``A``, ``(rows, cols)``, with a method ``draw(seed)`` that returns ``A`` over a random
            batch.
        rhs: The right-hand side ``g``, ``(rows,)``, or several as columns ``(rows, q)``.
        options: ``max_iter`` is the number of iterations of each run. ``rtol`` and ``discrepancy`` do not end a run,
            but decide whether the result counts as converged.
        repeats: The number of independent runs, whose results are averaged. To set it from the callback, register
            ``functools.partial(stochastic_lissa, repeats=4)`` under a name of your own.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, or a list for columns, with the residual at the start and the end
        only. Most of its products use one batch only, so :attr:`~lightning_gif.solvers.Solution.examples` measures the
        cost, not ``hvps``.

    Raises:
        ConfigurationError: If the operator cannot draw batches.
        ConvergenceError: If the batches show no curvature, or the steps diverge.
        NonFiniteError: If a product or an iterate is not finite.
    """
    run = Run("stochastic_lissa", operator, rhs, replace(options, max_iter=1))
    draw: Any = run.operator.draw  # type: ignore[attr-defined]  # ``requires_draws`` ensures that it exists
    max_iter, damping = options.max_iter, run.damping
    if run.running:
        generator = torch.Generator().manual_seed(options.seed)

        def fresh() -> LinearOperator:
            return draw(int(torch.randint(2**62, (), generator=generator)))

        sigma = torch.stack([_sigma(fresh(), run.rhs) for _ in range(_SCALE_DRAWS)]).amax(0)
        if bool((sigma == 0.0).any()):
            raise ConvergenceError(
                "Three random batches have no curvature along the right-hand side, although all examples together have"
                " some. Use a larger `batch_size`, or solver='lissa'."
            )
        run.saw(sigma)
        scale = ((_SCALE_MARGIN * sigma) ** 2 + damping**2).to(run.x)
        total = torch.zeros_like(run.x)
        counted, longest = 0, norms(torch.zeros_like(run.x))
        for _ in range(repeats):
            x = run.x
            for step in range(max_iter):
                first, second = fresh(), fresh()
                change = (first.rmatvec(run.rhs - second.matvec(x)) - damping**2 * x) / scale
                require_finite(change, f"Step {step + 1} of the solve (stochastic_lissa)")
                x = x + change
                length = norms(change)
                longest = torch.maximum(longest, length) if step < _FIRST_STEPS else longest
                _check_length(length, longest, step)
                if step >= max_iter // 2:
                    total += x
                    counted += 1
        x = total / counted
        difference = run.rhs - run.matvec(x)
        normal = run.rmatvec(difference) - damping**2 * x
        if bool((norms(normal) > norms(run.normal)).any()):
            raise _too_noisy(f"after {max_iter} steps the residual is larger than before the first")
        run.record(x, difference, normal)
    return run.solutions(iterations=max_iter * repeats, max_iter=max_iter)


def _check_length(lengths: Tensor, longest: Tensor, step: int) -> None:
    if not bool((lengths <= _RUNS_AWAY * longest).all()):
        grown = float((lengths / longest.clamp_min(torch.finfo(longest.dtype).tiny)).max())
        raise _too_noisy(f"step {step + 1} is {grown:.3g} times as long as the first")


def _too_noisy(what: str) -> ConvergenceError:
    return ConvergenceError(
        f"The stochastic solve diverged: {what}. Batches differ too much in their curvature. Use a larger `batch_size`,"
        " a `damping` above 0, or solver='lissa'."
    )


def _sigma(operator: LinearOperator, rhs: Tensor) -> Tensor:
    """A safe upper estimate of the largest singular value of a draw for each right-hand side, ``(q,)``.

    Args:
        operator: The draw, ``(rows, cols)``.
        rhs: The right-hand sides, ``(rows, q)``.
    """
    run = Run("stochastic_lissa", operator, rhs, SolveOptions(rtol=0.0, max_iter=_SCALE_STEPS))
    sigma = torch.zeros(rhs.shape[1], dtype=torch.float64)
    if not run.running:
        return sigma
    krylov = ConjugateGradients(run)
    for _ in range(_SCALE_STEPS):
        krylov.step()
    sigma[run.active] = krylov.sigma()[1]
    return sigma
