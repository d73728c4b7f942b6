"""What a solver gets and what it gives: an operator and a right-hand side in, a :class:`Solution` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..registry import Registry

__all__ = ["SOLVERS", "LinearOperator", "Solution", "Solver", "Status", "largest_singular_value", "require_finite"]


class LinearOperator(Protocol):
    """A real matrix ``B`` of shape ``(rows, cols)`` that is only known by its products with vectors.

    Attributes:
        shape: ``(rows, cols)``.
        dtype: The dtype of the vectors that go in and out.
        device: Their device.
        products: How many Hessian-vector products were spent since the operator was made.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def products(self) -> int: ...

    def matvec(self, vector: Tensor) -> Tensor:
        """``B v``: ``(cols,) → (rows,)``."""

    def rmatvec(self, vector: Tensor) -> Tensor:
        """``Bᵀ v``: ``(rows,) → (cols,)``."""


class Status(str, Enum):
    """How a solve ended. Outcomes that give no usable numbers are errors, not a status."""

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    STALLED = "stalled"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Solution:
    """The minimiser of ``‖B x − b‖² + λ²‖x‖²`` as far as it was found, and what happened on the way.

    Attributes:
        x: The solution, ``(cols,)``.
        status: :class:`Status`.
        solver: The solver's registered name.
        iterations: Steps taken.
        hvps: Hessian-vector products spent, those for ``sigma_max`` included.
        residual: Relative normal-equation residual ``‖Bᵀ(b − B x) − λ²x‖ / ‖Bᵀb‖`` of ``x``; 0 at the minimiser.
        unexplained: ``‖B x − b‖ / ‖b‖``: the share of ``b`` that no ``x`` found so far accounts for.
        sigma_max: Estimate of the largest singular value of ``B``.
        rtol: The residual that counts as converged.
        seconds: Wall time.
        residuals: The relative normal-equation residual after each number of steps, from 0 on, ``iterations + 1``
            values.
    """

    x: Tensor = field(repr=False)
    status: Status
    solver: str
    iterations: int
    hvps: int
    residual: float
    unexplained: float
    sigma_max: float
    rtol: float
    seconds: float
    residuals: list[float] = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether the residual passed ``rtol``."""
        return self.status is Status.CONVERGED

    def summary(self) -> dict[str, float | int | str]:
        """The diagnostics as plain numbers and strings, for logs and records."""
        return {
            "solver": self.solver,
            "status": str(self.status),
            "iterations": self.iterations,
            "hvps": self.hvps,
            "residual": self.residual,
            "unexplained": self.unexplained,
            "sigma_max": self.sigma_max,
            "rtol": self.rtol,
            "seconds": self.seconds,
        }


Solver = Callable[..., Solution]
"""``solver(operator, rhs, *, damping, rtol, max_iter, seed) → Solution``, see :func:`~lightning_gif.solvers.lissa`."""

SOLVERS: Registry[Solver] = Registry("solver")
"""All solvers by name; :meth:`Registry.register` adds one."""


def require_finite(vector: Tensor, what: str) -> None:
    """Raises a :class:`~lightning_gif.errors.NonFiniteError` that names ``what`` if ``vector`` has NaN or infinity."""
    if not torch.isfinite(vector).all():
        bad = int((~torch.isfinite(vector)).sum())
        raise NonFiniteError(
            f"{what} has {bad} non-finite value(s) of {vector.numel()}. The weights are as they were. Look for NaN in"
            " the data or the loss; on a model trained in low precision, a `damping` above 0 can help."
        )


def largest_singular_value(
    operator: LinearOperator, *, seed: int = 0, rtol: float = 0.05, min_iter: int = 5, max_iter: int = 20
) -> tuple[float, float]:
    """An estimate of ``σ_max(B)`` from below, and a safe value above it.

    Power iteration on ``BᵀB`` from a random vector, whose iterates are combined by the Lanczos recurrence (Golub and
    Van Loan, *Matrix Computations*, section 10.1): the same two products a step give a far better estimate than the
    last iterate alone, and the residual of the Ritz value bounds what is missing. Stops when that is below ``rtol``.

    Args:
        operator: ``B``.
        seed: Of the random start vector.
        rtol: Relative uncertainty of ``σ_max²`` that ends the iteration.
        min_iter: Fewest steps: a start vector poor in the leading direction looks settled after one or two.
        max_iter: Most steps.

    Returns:
        The estimate, and the estimate plus its uncertainty; both 0 for a zero operator.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.shape[1], generator=generator, dtype=torch.float64)
    vector = (start / start.norm()).to(operator.device, operator.dtype)
    previous, beta = torch.zeros_like(vector), 0.0
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    ritz, uncertainty = 0.0, 0.0
    for step in range(min(max_iter, operator.shape[1])):
        image = operator.rmatvec(operator.matvec(vector))
        require_finite(image, "The product of the Hessian with a vector")
        diagonal.append(float(vector @ image))
        image = image - diagonal[-1] * vector - beta * previous
        beta = float(image.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            side = torch.tensor(off_diagonal, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        ritz, uncertainty = max(float(values[-1]), 0.0), beta * abs(float(vectors[-1, -1]))
        if (step + 1 >= min_iter and uncertainty <= rtol * ritz) or beta == 0.0:
            break
        off_diagonal.append(beta)
        previous, vector = vector, image / beta
    return ritz**0.5, (ritz + uncertainty) ** 0.5
