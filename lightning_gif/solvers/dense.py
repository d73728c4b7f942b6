"""The reference solver: the matrix itself, decomposed in double precision."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import SOLVERS, LinearOperator
from .run import check_shape, require_finite
from .solution import Solution, Status, peak_memory

__all__ = ["dense", "to_matrix"]

_MOST_ENTRIES = 50_000_000

# Columns that are multiplied together; they share the passes that do not depend on the vector.
_AT_ONCE = 64


def to_matrix(operator: LinearOperator) -> Tensor:
    """The matrix ``(rows, cols)`` of an operator, built in as few products as its shorter side has.

    Raises:
        ConfigurationError: If it would have more than 50 million entries.
        NonFiniteError: If it is not finite.
    """
    rows, cols = operator.shape
    if rows * cols > _MOST_ENTRIES:
        raise ConfigurationError(
            f"solver='dense' would build a matrix of {rows} x {cols}; it is meant for small nets and stops at"
            f" {_MOST_ENTRIES:,} entries. Use solver='lissa', or select fewer parameters."
        )
    identity = torch.eye(min(rows, cols), dtype=operator.dtype, device=operator.device)
    if cols <= rows:
        matrix = torch.cat([operator.matvec(some) for some in identity.split(_AT_ONCE, dim=1)], dim=1)
    else:
        matrix = torch.cat([operator.rmatvec(some) for some in identity.split(_AT_ONCE, dim=1)], dim=1).T
    require_finite(matrix, "The Hessian")
    return matrix


@SOLVERS.register("dense")
def dense(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    discrepancy: float = 0.0,
) -> Solution | list[Solution]:
    """Solves ``min_x ‖B x − b‖² + λ²‖x‖²`` through the singular values of the whole matrix, in float64.

    Singular values that the operator's own precision cannot tell from zero are dropped, so the result is the minimiser
    of least norm.

    Args:
        operator: ``B``, ``(rows, cols)``, at most 50 million entries.
        rhs: ``b``, ``(rows,)``, or several as columns ``(rows, q)``.
        damping: ``λ ≥ 0``.
        rtol: Relative normal-equation residual that counts as converged.
        max_iter: Unused, as are the following: there are no steps. They are part of every solver's signature.
        seed: Unused.
        start: Unused.
        discrepancy: Unused.

    Raises:
        ConfigurationError: If the matrix would be too large.
        NonFiniteError: If it, or the right-hand side, is not finite.
    """
    begin = time.perf_counter()
    products, examples = operator.products, operator.examples
    check_shape("right-hand side", rhs if rhs.ndim == 2 else rhs[:, None], operator.shape[0])
    require_finite(rhs, "The right-hand side of the solve")
    matrix = to_matrix(operator).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    sigma = float(values[0])
    keep = values > max(matrix.shape) * torch.finfo(operator.dtype).eps * sigma
    filtered = torch.where(keep, values / (values**2 + damping**2).clamp_min(torch.finfo(values.dtype).tiny), 0.0)

    count = 1 if rhs.ndim == 1 else rhs.shape[1]

    def solution(target: Tensor) -> Solution:
        x = right.T @ (filtered * (left.T @ target))
        normal = matrix.T @ target
        scale, norm = float(normal.norm()), float(target.norm())
        residual = float((normal - matrix.T @ (matrix @ x) - damping**2 * x).norm()) / scale if scale else 0.0
        return Solution(
            x=x.to(operator.dtype),
            status=Status.CONVERGED if residual <= rtol else Status.STALLED,
            solver="dense",
            iterations=1,
            hvps=round((operator.products - products) / count),
            examples=round((operator.examples - examples) / count),
            residual=residual,
            unexplained=float((target - matrix @ x).norm()) / norm if norm else 0.0,
            sigma_max=sigma,
            rtol=rtol,
            damping=float(damping),
            seconds=time.perf_counter() - begin,
            peak_memory=peak_memory(operator.device),
            residuals=[1.0 if scale else 0.0, residual],
        )

    if rhs.ndim == 1:
        return solution(rhs.double())
    return [solution(target.double()) for target in rhs.T]
