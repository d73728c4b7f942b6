"""What a solver gives: the minimiser and how the solve went."""

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
    """How a solve ended. Outcomes that give no usable numbers (divergence, NaN) are errors, not a status.

    ``CONVERGED``: the normal-equation residual passed ``rtol``.
    ``DISCREPANCY``: ``‖B x − b‖ ≤ discrepancy·‖b‖``, which was asked for as enough.
    ``MAX_ITER``: the steps ran out.
    ``INDEFINITE``: a Newton step met a direction without positive curvature, and ends before it.
    ``STALLED``: rounding (or the noise of a stochastic operator) keeps the residual above ``rtol``.
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
    """The minimiser of ``‖B x − b‖² + λ²‖x‖²`` as far as it was found, and what happened on the way.

    Attributes:
        x: The solution, ``(cols,)``.
        status: :class:`Status`.
        solver: The solver's registered name, or ``truncated_newton``.
        iterations: Steps taken.
        hvps: Hessian-vector products spent, those for the scale included.
        examples: Examples that these products went through.
        residual: Relative normal-equation residual ``‖Bᵀ(b − B x) − λ²x‖ / ‖Bᵀb‖`` of ``x``; 0 at the minimiser.
            Of a Newton step ``‖b − (C + λ)x‖ / ‖b‖``.
        unexplained: ``‖B x − b‖ / ‖b‖``: the share of ``b`` that no ``x`` found so far accounts for.
        sigma_max: Largest singular value of ``B`` that the solve has seen: an estimate from below.
        rtol: The residual that counts as converged.
        damping: ``λ``; where ``B + λ`` is what is solved with (``cg``, ``nystrom``, a Newton step) that.
        seconds: Wall time, of all right-hand sides that were solved together.
        peak_memory: The most bytes that the process had needed when the solve ended: allocated on the GPU, or resident
            on the CPU; ``None`` where the system does not tell.
        residuals: The relative normal-equation residual after each number of steps, from 0 on, ``iterations + 1``
            values; of a stochastic solve at its start and end.
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

    @property
    def converged(self) -> bool:
        """Whether the solve got as far as it was asked to: the residual passed ``rtol``, or the discrepancy."""
        return self.status in (Status.CONVERGED, Status.DISCREPANCY)

    def summary(self) -> dict[str, float | int | str]:
        """The diagnostics as plain numbers and strings, for logs and records."""
        found: dict[str, float | int | str] = {
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
        return found if self.peak_memory is None else {**found, "peak_memory": self.peak_memory}

    def record(self) -> dict[str, Any]:
        """All but ``x`` in plain values, for :meth:`of_record`."""
        return {**self.summary(), "residuals": self.residuals}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Solution:
        """From what :meth:`record` gave; ``x`` is empty.

        Raises:
            TypeError: If it gave something else; ``ValueError`` for an unknown status.
        """
        values = restored_fields(cls, {"peak_memory": None, **record}, without=("x",))
        return cls(x=torch.empty(0), **values)
