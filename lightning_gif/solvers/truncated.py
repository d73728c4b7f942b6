"""Truncated conjugate gradients: a Newton step for a symmetric operator, of either sign, at one product a step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .base import LinearOperator, Solution, Status, check_shape, norms, peak_memory, require_finite

__all__ = ["truncated_newton"]


def truncated_newton(
    operator: LinearOperator, rhs: Tensor, *, damping: float, relative: float, rtol: float, max_iter: int
) -> tuple[Solution, float]:
    """Lowers ``½ xᵀ(C + λ)x − bᵀx`` by conjugate gradients, up to where ``C + λ`` curves the wrong way.

    With ``−b`` the slope of a function and ``C`` its second derivative, ``x`` is a step of a damped Newton method that
    stops early (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1; Martens, ICML 2010): a direction
    along which the function falls, whatever the signs of ``C``'s eigenvalues. A step costs one product, half of what
    one of the least-squares solvers costs, and the iteration sees the condition number of ``C``, not its square.

    Args:
        operator: ``C``, ``(n, n)``, symmetric.
        rhs: ``b``, ``(n,)``.
        damping: A part of ``λ``, in the unit of ``C``'s eigenvalues.
        relative: The other part, as a share of ``‖C b‖/‖b‖``, which the first step finds at no further cost.
        rtol: Relative residual ``‖b − (C + λ)x‖/‖b‖`` at which to stop.
        max_iter: Most steps.

    Returns:
        A :class:`~lightning_gif.solvers.Solution`, whose ``unexplained`` and ``residual`` are both the relative
        residual, and ``xᵀCx``, which no further product is needed for.

    Raises:
        NonFiniteError: If the right-hand side or a product is not finite.
    """
    begin = time.perf_counter()
    before = operator.products, operator.examples
    check_shape("right-hand side", rhs[:, None], operator.shape[0])
    require_finite(rhs, "The right-hand side of the solve")
    # To unit length: squares of tiny gradients vanish in float32.
    unit = float(norms(rhs)) or 1.0
    residual = direction = rhs / unit
    x, squared, shift, largest = torch.zeros_like(rhs), float(norms(residual)) ** 2, damping, 0.0
    residuals, status = [squared**0.5], Status.MAX_ITER if squared else Status.CONVERGED
    for step in range(max_iter if squared else 0):
        image = operator.matvec(direction)
        require_finite(image, f"Step {step + 1} of the solve (truncated_newton)")
        if not step:
            shift += relative * float(norms(image))
        image = image + shift * direction
        length = float(norms(direction)) ** 2
        curvature = float(torch.dot(direction.double(), image.double()))
        largest = max(largest, abs(curvature / length - shift))
        if curvature <= torch.finfo(rhs.dtype).eps * largest * length:
            status = Status.INDEFINITE
            if not step:  # steepest descent, by what a curvature of the other sign would allow at least
                size = max(float(norms(image)), torch.finfo(rhs.dtype).tiny) if image.any() else 1.0
                x, residual = direction / size, residual - image / size
            break
        alpha = squared / curvature
        x, residual = x + alpha * direction, residual - alpha * image
        last, squared = squared, float(norms(residual)) ** 2
        direction = residual + squared / last * direction
        residuals.append(squared**0.5)
        if residuals[-1] <= rtol:
            status = Status.CONVERGED
            break
    if status is Status.CONVERGED and squared:  # what a recurrence carries along drifts away from what is true
        residual = rhs / unit - operator.matvec(x) - shift * x
        status = Status.CONVERGED if float(norms(residual)) <= 1.01 * rtol else Status.STALLED
    left = float(norms(residual))
    bend = float(torch.dot(x.double(), (rhs / unit - residual).double())) - shift * float(norms(x)) ** 2
    solution = Solution(
        x=unit * x,
        status=status,
        solver="truncated_newton",
        iterations=len(residuals) - 1,
        hvps=operator.products - before[0],
        examples=operator.examples - before[1],
        residual=left,
        unexplained=left,
        sigma_max=largest,
        rtol=rtol,
        seconds=time.perf_counter() - begin,
        peak_memory=peak_memory(operator.device),
        residuals=residuals,
    )
    return solution, unit**2 * bend
