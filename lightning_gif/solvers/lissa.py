"""LiSSA for the GIF normal equations: the paper's recursion, and the same accelerated."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import ConjugateGradients
from .run import Run, different_products
from .solution import Solution
from .vectors import columns, norms

__all__ = ["lissa", "plain_lissa"]

# The recursion needs a scale at or above σ_max; this covers rounding.
_SCALE_MARGIN = 1.02

# The scale counts as known when σ_max² is certain to this share, after at least 4 steps: fewer can look settled before
# the leading direction has come up.
_SCALE_RTOL, _SCALE_MIN_ITER, _SCALE_MAX_ITER = 0.02, 4, 20

# The accelerated recursion takes all of these steps: what they leave is flat and spread out, which is what it is for;
# separate singular values, as those of the classes, would hold it up for hundreds of steps.
_KRYLOV_STEPS = 20

# A residual that is this many times the smallest one so far no longer comes from the recursion's own oscillation, and a
# singular value this many times the estimate not from a poor estimate.
_DIVERGED = 1e3


@solver("lissa")
def lissa(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖B x − b‖² + λ²‖x‖²`` by the modified LiSSA recursion of GIF, accelerated.

    The paper's recursion (arXiv 2312.05586, algorithm 1) is ``x_{j+1} = x_j + (v − T x_j)`` with
    ``T = (BᵀB + λ²)/c²`` and ``v = Bᵀb/c²``: Landweber iteration, whose error at a given step goes with ``1/j``. The
    same two products a step give ``1/j²`` when the step is weighted and a share of the last step is added, as in
    Brakhage's ν-method (ν = 1; Engl, Hanke and Neubauer, *Regularization of Inverse Problems*, 1996, section 6.3). The
    momentum is dropped where it points uphill (O'Donoghue and Candès 2015), which makes the rate linear without knowing
    the smallest singular value.
    ``T`` is positive semi-definite whatever the signs of the Hessian's eigenvalues, so both converge on non-convex nets
    for ``c ≥ √(σ_max² + λ²)``.

    ``c`` is found once, by the Lanczos process started at ``Bᵀb``, and the solve never starts over. The recursion stays
    in the Krylov space of that start, so a singular value that it does not show cannot be met; and the same products
    minimise over that space, so the recursion sets out from this minimiser, 20 steps on: up to there the iterates are
    those of CGLS. Should its own steps meet a larger singular value all the same (each shows one, its Rayleigh
    quotient, for free), ``c`` is raised to it and the momentum begins anew from the best iterate.

    Fewer steps regularise: directions with singular values well below ``σ_max / max_iter`` are left alone. So
    ``max_iter`` bounds how far the solve follows directions in which the loss is nearly flat.

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
        NonFiniteError: If a product or an iterate is not finite.
        ConvergenceError: If the residual grows a thousandfold over its smallest value, or a step meets a singular value
            a thousand times the estimate: ``B`` does not act like a fixed matrix (a random or shuffled loss).
    """
    run = Run("lissa", operator, rhs, options)
    return _iterate(run, accelerate=True)


@solver("plain_lissa")
def plain_lissa(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """The recursion of the paper as it stands, at a scale that is found once.

    It starts at zero (or ``start``), and takes the number of steps that :func:`lissa` takes, squared. Arguments and
    errors are those of :func:`lissa`; the steps that find the scale do not count towards ``max_iter``.
    """
    run = Run("plain_lissa", operator, rhs, options)
    return _iterate(run, accelerate=False)


def _iterate(run: Run, *, accelerate: bool) -> Solution | list[Solution]:
    krylov = ConjugateGradients(run)
    sigma = bound = torch.zeros(len(run.active), dtype=torch.float64)
    for step in range(_SCALE_MAX_ITER):
        if not run.running:
            break
        krylov.step()
        sigma, bound = krylov.sigma()
        if accelerate:
            keep = run.record(krylov.x, krylov.difference, krylov.normal, stuck=krylov.stuck)
            krylov.keep(keep)
            sigma, bound = columns(keep, sigma, bound)
        known = bound**2 - sigma**2 <= _SCALE_RTOL * sigma**2
        least = _KRYLOV_STEPS if accelerate else _SCALE_MIN_ITER
        if bool(krylov.stuck.all()) or (step + 1 >= least and bool(known.all())):
            break
    if accelerate:
        x, difference, normal = krylov.x, krylov.difference, krylov.normal
    else:
        x, difference, normal = run.x, run.difference, run.normal

    begun = run.iterations
    damped = run.damping**2
    scale = (_SCALE_MARGIN * bound) ** 2 + damped
    rounding = 100 * torch.finfo(x.dtype).eps * norms(run.b)
    last_step = torch.zeros_like(x)
    steps = torch.zeros(len(run.active), dtype=torch.float64)  # since the momentum began
    while run.running:
        steps = steps + 1
        momentum, weight = _nu_method(steps) if accelerate else (torch.zeros_like(steps), torch.ones_like(steps))
        last_step = momentum.to(x) * last_step + (weight / scale).to(x) * normal
        x = x + last_step
        previous, difference = difference, run.b - run.matvec(x)
        normal = run.rmatvec(difference) - damped * x
        keep = run.record(x, difference, normal)

        moved = norms(difference - previous)
        seen = torch.where(moved > rounding, moved / norms(last_step), 0.0).cpu()
        uphill = ((normal * last_step).sum(0, dtype=torch.float64) < 0).cpu()
        x, difference, normal, last_step, rounding = columns(keep, x, difference, normal, last_step, rounding)
        seen, uphill, scale, sigma, steps = columns(keep, seen, uphill, scale, sigma, steps)
        if not run.running:
            break
        _check_progress(run, seen, sigma)

        too_small = (seen**2 + damped > scale) & (seen > sigma)
        if too_small.any():
            sigma = torch.where(too_small, seen, sigma)
            run.saw(sigma)
            scale = torch.where(too_small, (_SCALE_MARGIN * sigma) ** 2 + damped, scale)
            x = torch.where(too_small.to(x.device), run.best(), x)
            difference = run.b - run.matvec(x)
            normal = run.rmatvec(difference) - damped * x
        steps = torch.where(too_small | uphill, 0.0, steps)
    run.verify(carried=begun)
    return run.solutions()


def _check_progress(run: Run, seen: Tensor, sigma: Tensor) -> None:
    grown = float(run.growth().max())
    if grown > _DIVERGED or bool((seen > _DIVERGED * sigma).any()):
        raise different_products(
            f"after {run.iterations} steps the residual is {grown:.3g} times what it was at its smallest; sigma_max was"
            f" estimated as {float(sigma.max()):.3g}"
        )


def _nu_method(j: Tensor, nu: float = 1.0) -> tuple[Tensor, Tensor]:
    """Momentum and weight of step ``j ≥ 1`` of Brakhage's ν-method."""
    momentum = ((j - 1) * (2 * j - 3) * (2 * j + 2 * nu - 1)) / (
        (j + 2 * nu - 1) * (2 * j + 4 * nu - 1) * (2 * j + 2 * nu - 3)
    )
    return momentum, 4 * ((2 * j + 2 * nu - 1) * (j + nu - 1)) / ((j + 2 * nu - 1) * (2 * j + 4 * nu - 1))
