"""The reference solver: the dense matrix, decomposed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import LinearOperator, SolveOptions, solver
from .operators import damped_system
from .recorder import Outcome, SolveRecorder
from .solution import Solution, Status
from .vectors import require_finite

__all__ = ["dense", "to_matrix"]

# A matrix with this many entries takes 0.4 GB in float64, and its decomposition several times as much.
_MOST_ENTRIES = 50_000_000

# The number of columns in one product. They share the passes that do not depend on the vector.
_AT_ONCE = 64


def to_matrix(operator: LinearOperator) -> Tensor:
    """The dense matrix ``(rows, cols)`` of an operator, from ``min(rows, cols)`` products.

    Raises:
        ConfigurationError: If the matrix would have more than 50 million entries.
        NonFiniteError: If the matrix is not finite.
    """
    rows, cols = operator.shape
    if rows * cols > _MOST_ENTRIES:
        raise ConfigurationError(
            f"solver='dense' would build a matrix of {rows} x {cols} entries. It is for small networks, and allows at"
            f" most {_MOST_ENTRIES:,} entries. Use solver='lissa', or select fewer parameters."
        )
    identity = torch.eye(min(rows, cols), dtype=operator.dtype, device=operator.device)
    if cols <= rows:
        matrix = torch.cat([operator.matvec(some) for some in identity.split(_AT_ONCE, dim=1)], dim=1)
    else:
        matrix = torch.cat([operator.rmatvec(some) for some in identity.split(_AT_ONCE, dim=1)], dim=1).T
    require_finite(matrix, "The Hessian")
    return matrix


@solver("dense", supports_start=False, supports_discrepancy=False)
def dense(operator: LinearOperator, rhs: Tensor, options: SolveOptions) -> Solution | list[Solution]:
    """Solves ``min_x ‖A x − g‖² + λ²‖x‖²`` by the singular value decomposition of the dense matrix, in float64.

    Singular values that are zero up to rounding in the operator's precision are dropped. So without damping the result
    is the minimiser with the smallest norm. There are no iterations: ``rtol`` only decides whether the status is
    ``CONVERGED``.

    Raises:
        ConfigurationError: If the matrix would have more than 50 million entries.
        NonFiniteError: If the matrix or the right-hand side is not finite.
    """
    recorder = SolveRecorder("dense", operator, rhs, options)
    system, ridge = damped_system(operator, options.damping)
    matrix = to_matrix(system).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    sigma = float(values[0])
    keep = values > max(matrix.shape) * torch.finfo(operator.dtype).eps * sigma
    filtered = torch.where(keep, values / (values**2 + ridge**2).clamp_min(torch.finfo(values.dtype).tiny), 0.0)

    def outcome(target: Tensor) -> Outcome:
        x = right.T @ (filtered * (left.T @ target))
        normal = matrix.T @ target
        scale, norm = float(normal.norm()), float(target.norm())
        residual = float((normal - matrix.T @ (matrix @ x) - ridge**2 * x).norm()) / scale if scale else 0.0
        return Outcome(
            x=x,
            status=Status.CONVERGED if residual <= options.rtol else Status.STALLED,
            iterations=1,
            residual=residual,
            unexplained=float((target - matrix @ x).norm()) / norm if norm else 0.0,
            sigma_max=max(sigma - (options.damping - ridge), 0.0),
            residuals=[1.0 if scale else 0.0, residual],
        )

    return recorder.solutions([outcome(target.double()) for target in recorder.rhs.T])
