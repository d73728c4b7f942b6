"""The result of a solve: the solution and its diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..storage.schema import restored_fields

__all__ = ["Solution", "Status"]


class Status(str, Enum):
    """How a solve ended. Divergence and NaN raise errors instead.

    Attributes:
        CONVERGED: The residual reached ``rtol``.
        DISCREPANCY: ``‖A x − g‖ ≤ discrepancy·‖g‖`` was reached.
        MAX_ITER: The largest number of iterations was reached.
        INDEFINITE: Conjugate gradients met a direction without positive curvature, and ended before it.
        STALLED: Rounding (or the noise of a stochastic operator) keeps the residual above ``rtol``.
    """

    CONVERGED = "converged"
    DISCREPANCY = "discrepancy"
    MAX_ITER = "max_iter"
    INDEFINITE = "indefinite"
    STALLED = "stalled"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Solution:
    """The approximate solution of one linear system, with the diagnostics of its solve.

    Attributes:
        x: The solution, ``(cols,)``.
        status: How the solve ended, see :class:`Status`.
        solver: The registered name of the solver, or ``truncated_newton``.
        iterations: The number of iterations.
        hvps: The number of Hessian-vector products, including those that estimate ``sigma_max``.
        examples: The number of examples in all these products together.
        residual: The relative residual of ``x``, which measures convergence. It is 0 at the exact solution. For least
            squares it is that of the normal equations, ``‖Aᵀ(g − A x) − λ²x‖ / ‖Aᵀg‖``. If ``C`` is declared positive
            semi-definite, it is ``‖Aᵀ(g − A x)‖ / ‖Aᵀg‖`` with ``A = C + λ``. For ``cg``, ``nystrom`` and
            ``truncated_newton`` it is ``‖g − (C + λ)x‖ / ‖g‖``.
        unexplained: The unexplained share ``‖A x − g‖ / ‖g‖``, with the same ``A``.
        sigma_max: A lower estimate of the largest singular value of the matrix without damping.
        rtol: The residual that counts as converged.
        damping: The damping ``λ``, see :attr:`SolveOptions.damping <lightning_gif.solvers.SolveOptions>`.
        seconds: The wall time in seconds for all right-hand sides that were solved together.
        peak_memory: The peak memory of the process when the solve ended, in bytes: allocated on the GPU, or resident on
            the CPU; ``None`` if the system does not report it.
        residuals: The residual before the first and after each iteration, ``iterations + 1`` values; for ``nystrom``
            and ``stochastic_lissa`` at the start and the end only.
        max_iter: The largest number of iterations, or the rank of a sketch, that the solve was given; ``None`` if it
            had none, or is unknown.
    """

    x: Tensor = field(repr=False)
    status: Status
    solver: str
    iterations: int
    hvps: int
    examples: int
    residual: float
    unexplained: float
    sigma_max: float
    rtol: float
    damping: float
    seconds: float
    peak_memory: int | None
    residuals: list[float] = field(repr=False)
    max_iter: int | None = None

    @property
    def converged(self) -> bool:
        """Whether the residual reached ``rtol``, or the unexplained share the discrepancy."""
        return self.status in (Status.CONVERGED, Status.DISCREPANCY)

    def summary(self) -> dict[str, float | int | str]:
        """The diagnostics as plain numbers and strings, for logs and records."""
        summary: dict[str, float | int | str] = {
            "solver": self.solver,
            "status": str(self.status),
            "iterations": self.iterations,
            "hvps": self.hvps,
            "examples": self.examples,
            "residual": self.residual,
            "unexplained": self.unexplained,
            "sigma_max": self.sigma_max,
            "rtol": self.rtol,
            "damping": self.damping,
            "seconds": self.seconds,
        }
        optional = {"max_iter": self.max_iter, "peak_memory": self.peak_memory}
        return {**summary, **{name: value for name, value in optional.items() if value is not None}}

    @classmethod
    def direct(cls, x: Tensor, damping: float, seconds: float, *, solver: str = "direct") -> Solution:
        """The solution of an inverse that is applied directly, without iterations, products or a residual.

        Args:
            x: The solution, ``(cols,)``.
            damping: The damping ``λ``.
            seconds: Wall time.
            solver: The name of the inverse.
        """
        return cls(
            x=x,
            status=Status.CONVERGED,
            solver=solver,
            iterations=0,
            hvps=0,
            examples=0,
            residual=0.0,
            unexplained=0.0,
            sigma_max=0.0,
            rtol=0.0,
            damping=damping,
            seconds=seconds,
            peak_memory=None,
            residuals=[0.0],
        )

    def record(self) -> dict[str, Any]:
        """All fields except ``x`` as plain values, from which :meth:`of_record` restores them."""
        return {**self.summary(), "residuals": self.residuals}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Solution:
        """A solution from the result of :meth:`record`; its ``x`` is empty.

        Raises:
            TypeError: If a field is missing or has another type.
            ValueError: If the status is unknown.
        """
        values = restored_fields(cls, {"max_iter": None, "peak_memory": None, **record}, without=("x",))
        return cls(x=torch.empty(0), **values)
