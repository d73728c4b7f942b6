"""LiSSA for the GIF normal equations, with its scale estimated once and its steps accelerated."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import SOLVERS, LinearOperator, Solution, Status, largest_singular_value, require_finite

__all__ = ["lissa"]

# The recursion needs a scale at or above σ_max; this covers rounding.
_SCALE_MARGIN = 1.02

# A residual that is this many times the smallest one so far no longer comes from the recursion's own oscillation, and a
# singular value this many times the estimate not from a poor estimate.
_DIVERGED = 1e3

# Steps without a new smallest residual (and at least half of all steps), after which rounding, not the iteration,
# decides what the residual does.
_PATIENCE = 50


@SOLVERS.register("lissa")
def lissa(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
    accelerate: bool = True,
) -> Solution:
    """Solves ``min_x ‖B x − b‖² + λ²‖x‖²`` by the modified LiSSA recursion of GIF, accelerated.

    The paper's recursion (arXiv 2312.05586, algorithm 1) is ``x_{j+1} = x_j + (v − T x_j)`` with
    ``T = (BᵀB + λ²)/c²`` and ``v = Bᵀb/c²``: Landweber iteration, whose error at a given step goes with ``1/j``. The
    same two products a step give ``1/j²`` when the step is weighted and a share of the last step is added, as in
    Brakhage's ν-method (ν = 1; Engl, Hanke and Neubauer, *Regularization of Inverse Problems*, 1996, section 6.3). The
    momentum is dropped where it points uphill (O'Donoghue and Candès 2015), which makes the rate linear without knowing
    the smallest singular value.
    ``T`` is positive semi-definite whatever the signs of the Hessian's eigenvalues, so both converge on non-convex nets
    for ``c ≥ √(σ_max² + λ²)``. ``c`` is estimated once, by power iteration with the
    Lanczos recurrence, and the solve
    never starts over. Should the steps themselves meet a larger singular value than the estimate (each shows one, its
    Rayleigh quotient, for free), ``c`` is raised to it and the momentum begins anew from the best iterate.

    Fewer steps regularise: directions with singular values well below ``σ_max / max_iter`` are left alone. So
    ``max_iter`` bounds how far the solve follows directions in which the loss is nearly flat.

    Args:
        operator: ``B``, ``(rows, cols)``.
        rhs: ``b``, ``(rows,)``.
        damping: ``λ ≥ 0``, in the unit of ``B``'s singular values.
        rtol: Relative normal-equation residual at which to stop.
        max_iter: Most steps; each costs one product with ``B`` and one with ``Bᵀ``.
        seed: Of the power iteration's start vector.
        accelerate: ``False`` gives the paper's plain recursion.

    Returns:
        The iterate with the smallest residual, in a :class:`Solution`.

    Raises:
        NonFiniteError: If a product or an iterate is not finite.
        ConvergenceError: If the residual grows a thousandfold over its smallest value, or a step meets a singular value
            a thousand times the estimate: ``B`` does not act like a fixed matrix (a random or shuffled loss).
    """
    start = time.perf_counter()
    products = operator.products
    require_finite(rhs, "The right-hand side of the solve")
    sigma, bound = largest_singular_value(operator, seed=seed)
    x = torch.zeros(operator.shape[1], dtype=operator.dtype, device=operator.device)
    target = operator.rmatvec(rhs)
    require_finite(target, "The right-hand side of the solve")
    norm = float(target.norm())

    # The iterate with the smallest residual is returned: an accelerated residual is not monotone.
    best, smallest, since = (x, rhs, target), 1.0, 0
    residuals = [1.0]
    status = Status.MAX_ITER
    if norm == 0.0 or sigma == 0.0:  # b is orthogonal to everything B can reach: x = 0 is the minimiser
        status, smallest, residuals, max_iter = Status.CONVERGED, 0.0, [0.0], 0
    scale = (_SCALE_MARGIN * bound) ** 2 + damping**2
    rounding = 100 * torch.finfo(operator.dtype).eps * float(rhs.norm())

    difference, residual_vector, last_step = rhs, target, torch.zeros_like(x)
    j = iterations = 0
    while iterations < max_iter:
        iterations += 1
        j += 1
        momentum, weight = _nu_method(j) if accelerate else (0.0, 1.0)
        last_step = momentum * last_step + (weight / scale) * residual_vector
        x = x + last_step
        previous, difference = difference, rhs - operator.matvec(x)
        residual_vector = operator.rmatvec(difference) - damping**2 * x
        require_finite(residual_vector, f"LiSSA step {iterations}")
        residual = float(residual_vector.norm()) / norm
        residuals.append(residual)
        since += 1
        if residual < smallest:
            best, smallest, since = (x, difference, residual_vector), residual, 0
        if smallest <= rtol:
            status = Status.CONVERGED
            break
        if since >= max(_PATIENCE, iterations // 2):
            status = Status.STALLED
            break
        moved = float((difference - previous).norm())
        seen = moved / float(last_step.norm()) if moved > rounding else 0.0
        if residual > _DIVERGED * smallest or seen > _DIVERGED * bound:
            raise ConvergenceError(
                f"LiSSA diverged: after {iterations} steps the relative residual is {residual:.3g}, from"
                f" {smallest:.3g} at its smallest. sigma_max was estimated as {sigma:.3g}. Most often the loss is not"
                " the same function at every evaluation (random augmentation, dropout outside of nn.Dropout, BatchNorm"
                " in training mode)."
            )
        if seen**2 + damping**2 > scale:
            sigma = seen
            scale = (_SCALE_MARGIN * sigma) ** 2 + damping**2
            x, difference, residual_vector = best
            j = 0
        elif accelerate and float(residual_vector @ last_step) < 0:
            j = 0

    x, difference, _ = best
    rhs_norm = float(rhs.norm())
    return Solution(
        x=x,
        status=status,
        solver="lissa",
        iterations=iterations,
        hvps=operator.products - products,
        residual=smallest,
        unexplained=float(difference.norm()) / rhs_norm if rhs_norm else 0.0,
        sigma_max=sigma,
        rtol=rtol,
        seconds=time.perf_counter() - start,
        residuals=residuals,
    )


def _nu_method(j: int, nu: float = 1.0) -> tuple[float, float]:
    """Momentum and weight of step ``j ≥ 1`` of Brakhage's ν-method."""
    if j == 1:
        return 0.0, (4 * nu + 2) / (4 * nu + 1)
    momentum = ((j - 1) * (2 * j - 3) * (2 * j + 2 * nu - 1)) / (
        (j + 2 * nu - 1) * (2 * j + 4 * nu - 1) * (2 * j + 2 * nu - 3)
    )
    weight = 4 * ((2 * j + 2 * nu - 1) * (j + nu - 1)) / ((j + 2 * nu - 1) * (2 * j + 4 * nu - 1))
    return momentum, weight
