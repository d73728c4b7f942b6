"""LiSSA for the normal equations of GIF: the recursion of the GIF paper, and an accelerated one."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearOperator, SolveOptions, solver
from .krylov import ConjugateGradients
from .run import Run, different_products
from .solution import Solution
from .vectors import columns, norms

__all__ = ["lissa", "plain_lissa"]

# The recursion needs a scale of at least σ_max. This margin covers rounding.
_SCALE_MARGIN = 1.02

# The scale is estimated until the relative uncertainty of σ_max² is this small, for at least 4 and at most 20
# iterations. With fewer, the estimate can seem certain before the leading direction has appeared.
_SCALE_RTOL, _SCALE_MIN_ITER, _SCALE_MAX_ITER = 0.02, 4, 20

# The accelerated recursion starts after this many CGLS iterations. They resolve large, separate singular values, such
# as one for each class. These would slow the recursion down by hundreds of iterations.
_KRYLOV_STEPS = 20

# The solve counts as diverged if the residual is this many times its smallest value, or a singular value this many
# times the estimate. Neither oscillation of the recursion nor a poor estimate reaches this factor.
_DIVERGED = 1e3


@solver("lissa")
def lissa(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` by an accelerated form of the modified LiSSA recursion of GIF.

    The recursion of the GIF paper (arXiv 2312.05586, algorithm 1) is ``x_{j+1} = x_j + (v − T x_j)`` with
    ``T = (AᵀA + λ²)/c²`` and ``v = Aᵀg/c²``, which is Landweber iteration. Its error after ``j`` iterations is
    proportional to ``1/j``. Weighted steps with momentum improve this to ``1/j²`` for the same two products in each
    iteration, as in Brakhage's ν-method (ν = 1; Engl, Hanke and Neubauer, *Regularization of Inverse Problems*, 1996,
    section 6.3). The momentum is reset when it points uphill (O'Donoghue and Candès 2015). This gives a linear rate
    without knowledge of the smallest singular value. ``T`` is positive semi-definite for any signs of the eigenvalues
    of the Hessian. So both recursions converge on non-convex networks for ``c ≥ √(σ_max² + λ²)``.

    ``c`` is estimated by the Lanczos process that starts at ``Aᵀg``. The recursion stays in the Krylov space of this
    start, so other singular values do not matter. The same products minimise the objective over this space: the first
    20 iterations are CGLS, and the recursion continues from there. Each iteration also gives a Rayleigh quotient at no
    cost. If it shows a larger singular value, ``c`` is increased and the momentum restarts from the best iterate.

    Fewer iterations regularise: directions with singular values well below ``σ_max / max_iter`` hardly change. So
    ``max_iter`` limits how far the solve follows directions in which the loss is nearly flat. Each iteration costs one
    product with ``A`` and one with ``Aᵀ``.

    Returns:
        The iterate with the smallest residual as a :class:`~lightning_gif.solvers.Solution`; a list for columns.

    Raises:
        NonFiniteError: If a product or an iterate is not finite.
        ConvergenceError: If the residual grows to a thousand times its smallest value, or a singular value is a
            thousand times the estimate: ``A`` does not act like a fixed matrix (a random or shuffled loss).
    """
    run = Run("lissa", operator, rhs, options)
    return _iterate(run, accelerate=True)


@solver("plain_lissa")
def plain_lissa(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` by the recursion of the GIF paper, see :func:`lissa`.

    It starts at zero (or ``start``). If :func:`lissa` needs ``k`` iterations, it needs about ``k²``. It raises the same
    errors. The iterations that estimate the scale do not count towards ``max_iter``.
    """
    run = Run("plain_lissa", operator, rhs, options)
    return _iterate(run, accelerate=False)


def _iterate(run: Run, *, accelerate: bool) -> Solution | list[Solution]:
    krylov = ConjugateGradients(run)
    sigma = bound = torch.zeros(len(run.active), dtype=torch.float64)
    settled = torch.zeros(len(run.active), dtype=torch.bool)  # each column by itself, whatever is solved with it
    for step in range(_SCALE_MAX_ITER):
        if not run.running:
            break
        krylov.step()
        estimate, above = krylov.sigma()
        sigma, bound = torch.where(settled, sigma, estimate), torch.where(settled, bound, above)
        settled |= krylov.stuck
        if accelerate:
            keep = run.record(krylov.x, krylov.difference, krylov.normal, stuck=krylov.stuck)
            krylov.keep(keep)
            sigma, bound, settled = columns(keep, sigma, bound, settled)
        if step + 1 >= (_KRYLOV_STEPS if accelerate else _SCALE_MIN_ITER):
            settled |= bound**2 - sigma**2 <= _SCALE_RTOL * sigma**2
        if bool(settled.all()):
            break
    if accelerate:
        x, difference, normal = krylov.x, krylov.difference, krylov.normal
    else:
        x, difference, normal = run.x, run.difference, run.normal

    begun = run.iterations
    damped = run.damping**2
    scale = (_SCALE_MARGIN * bound) ** 2 + damped
    rounding = 100 * torch.finfo(x.dtype).eps * norms(run.rhs)
    last_step = torch.zeros_like(x)
    steps = torch.zeros(len(run.active), dtype=torch.float64)  # iterations since the momentum was reset
    while run.running:
        steps = steps + 1
        momentum, weight = _nu_method(steps) if accelerate else (torch.zeros_like(steps), torch.ones_like(steps))
        last_step = momentum.to(x) * last_step + (weight / scale).to(x) * normal
        x = x + last_step
        previous, difference = difference, run.rhs - run.matvec(x)
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
            difference = run.rhs - run.matvec(x)
            normal = run.rmatvec(difference) - damped * x
        steps = torch.where(too_small | uphill, 0.0, steps)
    run.verify(carried=begun)
    return run.solutions()


def _check_progress(run: Run, seen: Tensor, sigma: Tensor) -> None:
    grown = float(run.growth().max())
    if grown > _DIVERGED or bool((seen > _DIVERGED * sigma).any()):
        raise different_products(
            f"after {run.iterations} steps the residual is {grown:.3g} times its smallest value; sigma_max was"
            f" estimated as {float(sigma.max()):.3g}"
        )


def _nu_method(j: Tensor, nu: float = 1.0) -> tuple[Tensor, Tensor]:
    """The momentum and the weight in iteration ``j ≥ 1`` of Brakhage's ν-method."""
    momentum = ((j - 1) * (2 * j - 3) * (2 * j + 2 * nu - 1)) / (
        (j + 2 * nu - 1) * (2 * j + 4 * nu - 1) * (2 * j + 2 * nu - 3)
    )
    return momentum, 4 * ((2 * j + 2 * nu - 1) * (j + nu - 1)) / ((j + 2 * nu - 1) * (2 * j + 4 * nu - 1))
