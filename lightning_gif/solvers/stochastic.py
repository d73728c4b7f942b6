"""LiSSA as it was first proposed: a fresh batch of examples at each step."""

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

_SCALE_DRAWS, _SCALE_STEPS, _SCALE_MARGIN = 3, 4, 1.1

# A step that is this many times the longest of the first ones comes from an iterate that runs away.
_FIRST_STEPS, _RUNS_AWAY = 10, 1e3


@solver("stochastic_lissa", requires_draws=True)
def stochastic_lissa(
    operator: LinearOperator, rhs: Tensor, options: SolveOptions, *, repeats: int = 1
) -> Solution | list[Solution]:
    """Solves ``min_x ‖B x − b‖² + λ²‖x‖²`` by steps over random batches, for operators that can draw them.

    LiSSA (Agarwal, Bullins and Hazan, JMLR 18, 2017) with the normal equations of GIF: a step is
    ``x ← x + (B₁ᵀ(b − B₂ x) − λ²x)/c²``, where ``B₁`` and ``B₂`` are taken over *independent* batches. With one batch
    for both factors the expectation would be ``E[BᵢᵀBᵢ] = BᵀB`` plus the variance of ``Bᵢ``, and the solve would go to
    the wrong place however long it ran. ``c²`` is taken from the Lanczos process on a few draws, so batches of very
    different curvature can make it diverge, which is an error.
    Iterates are averaged over the second half of the steps (Polyak and Juditsky 1992), and over ``repeats`` independent
    runs, which takes out the noise that single steps cannot. The residual is measured with the whole operator, before
    the first step and after the last. So this pays where there are many examples and a rough answer does.

    Args:
        operator: ``B``, ``(rows, cols)``, with a method ``draw(seed)`` that gives the same over a random batch.
        rhs: ``b``, ``(rows,)``, or several as columns ``(rows, q)``.
        damping: ``λ ≥ 0``, in the unit of ``B``'s singular values.
        rtol: Relative normal-equation residual that counts as converged.
        max_iter: Steps of each run.
        seed: Of the batches.
        start: First iterate, ``(cols,)`` or ``(cols, q)``; zero by default.
        discrepancy: As converged counts ``‖B x − b‖ ≤ discrepancy·‖b‖`` as well.
        repeats: Independent runs whose results are averaged. To choose it from the callback, register
            ``functools.partial(stochastic_lissa, repeats=4)`` under a name of your own.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, or a list for columns, with the residual at the start and the end
        only. Its products went through one batch each; :attr:`~lightning_gif.solvers.Solution.examples` tells the cost.

    Raises:
        ConfigurationError: If the operator cannot draw.
        ConvergenceError: If the batches show no curvature, or the steps diverge.
        NonFiniteError: If a product or an iterate is not finite.
    """
    draw: Any = operator.draw  # type: ignore[attr-defined]  # it is declared to be required
    run = Run("stochastic_lissa", operator, rhs, replace(options, max_iter=1))
    max_iter, damping = options.max_iter, options.damping
    if run.running:
        generator = torch.Generator().manual_seed(options.seed)

        def fresh() -> LinearOperator:
            return draw(int(torch.randint(2**62, (), generator=generator)))

        sigma = max(_sigma(fresh(), run.b) for _ in range(_SCALE_DRAWS))
        if sigma == 0.0:
            raise ConvergenceError(
                "Three random batches showed no curvature at all along the right-hand side, though all examples"
                " together do. Use a larger `batch_size`, or solver='lissa'."
            )
        run.saw(torch.full((len(run.active),), sigma, dtype=torch.float64))
        scale = (_SCALE_MARGIN * sigma) ** 2 + damping**2
        total = torch.zeros_like(run.x)
        counted, longest = 0, 0.0
        for _ in range(repeats):
            x = run.x
            for step in range(max_iter):
                first, second = fresh(), fresh()
                change = (first.rmatvec(run.b - second.matvec(x)) - damping**2 * x) / scale
                require_finite(change, f"Step {step + 1} of the solve (stochastic_lissa)")
                x = x + change
                longest = max(longest, float(norms(change).max())) if step < _FIRST_STEPS else longest
                _check_length(float(norms(change).max()), longest, step)
                if step >= max_iter // 2:
                    total += x
                    counted += 1
        x = total / counted
        difference = run.b - run.matvec(x)
        normal = run.rmatvec(difference) - damping**2 * x
        if bool((norms(normal) > norms(run.normal)).any()):
            raise _too_noisy(f"after {max_iter} steps the residual is larger than before the first")
        run.record(x, difference, normal)
    return run.solutions(iterations=max_iter * repeats)


def _check_length(length: float, longest: float, step: int) -> None:
    if not length <= _RUNS_AWAY * longest:
        raise _too_noisy(f"step {step + 1} is {length / longest if longest else length:.3g} times as long as the first")


def _too_noisy(what: str) -> ConvergenceError:
    return ConvergenceError(
        f"The stochastic solve diverged: {what}. Batches differ too much in their curvature. Use a larger `batch_size`,"
        " a `damping` above 0, or solver='lissa'."
    )


def _sigma(operator: LinearOperator, rhs: Tensor) -> float:
    """A safe value above the largest singular value of a draw that the right-hand sides ``(rows, q)`` can meet."""
    run = Run("stochastic_lissa", operator, rhs, SolveOptions(rtol=0.0, max_iter=_SCALE_STEPS))
    if not run.running:
        return 0.0
    krylov = ConjugateGradients(run)
    for _ in range(_SCALE_STEPS):
        krylov.step()
    return float(krylov.sigma()[1].max())
