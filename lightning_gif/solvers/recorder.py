"""Steps before and after every solve: scale the right-hand sides, count products, and build solutions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LinearOperator, SolveOptions
from .solution import Solution, Status
from .vectors import check_shape, norms, require_finite

__all__ = ["Outcome", "SolveRecorder", "power_of_two", "unit_norm"]


def power_of_two(lengths: Tensor) -> Tensor:
    """A power of two near each length ``(q,)``. Division by it causes no rounding."""
    return torch.where(lengths > 0, 2.0 ** torch.frexp(lengths).exponent.double(), 1.0)


def unit_norm(lengths: Tensor) -> Tensor:
    """The lengths ``(q,)``, with 1 instead of 0. After division by them, norms of residuals are relative."""
    return torch.where(lengths > 0, lengths, 1.0)


@dataclass
class Outcome:
    """The result for one right-hand side. The other fields are as in :class:`~lightning_gif.solvers.Solution`.

    Attributes:
        x: The solution for the scaled right-hand side, ``(cols,)``.
        share: The number of products for this column, up to a factor common to all columns.
        damping: The damping ``λ``, if it differs from that of the options.
        max_iter: The largest number of iterations, if it differs from that of the options.
    """

    x: Tensor
    status: Status
    iterations: int
    residual: float
    unexplained: float
    sigma_max: float
    residuals: list[float]
    share: int = 1
    damping: float | None = None
    max_iter: int | None = None


class SolveRecorder:
    """Measures a solve, starting when it is created, and builds the solutions.

    Right-hand sides are scaled to about unit length, because squares of tiny gradients underflow in float32. Solutions
    are scaled back.

    Args:
        solver: The registered name of the solver.
        operator: The matrix ``A``, ``(rows, cols)``.
        rhs: The right-hand side ``g``, ``(rows,)``, or several as columns ``(rows, q)``.
        options: The options of the solve.
        unit: From the lengths ``(q,)`` of the right-hand sides to the numbers by which they are divided.

    Attributes:
        rhs: The scaled right-hand sides, ``(rows, q)``.

    Raises:
        ConfigurationError: If the shape of the right-hand side is wrong.
        NonFiniteError: If it is not finite.
    """

    def __init__(
        self,
        solver: str,
        operator: LinearOperator,
        rhs: Tensor,
        options: SolveOptions,
        unit: Callable[[Tensor], Tensor] = power_of_two,
    ) -> None:
        self._begin = time.perf_counter()
        self._before = operator.products, operator.examples
        self._solver, self._operator, self._options = solver, operator, options
        self._is_vector = rhs.ndim == 1
        matrix = rhs[:, None] if self._is_vector else rhs
        check_shape("right-hand side", matrix, operator.shape[0])
        require_finite(rhs, "The right-hand side of the solve")
        self.unit = unit(norms(matrix))
        self.rhs = (matrix / self.unit).to(rhs.dtype)

    def solutions(self, outcomes: Sequence[Outcome]) -> Solution | list[Solution]:
        """One solution for a vector, a list for columns.

        Args:
            outcomes: One for each right-hand side.
        """
        seconds, memory = time.perf_counter() - self._begin, _peak_memory(self._operator.device)
        products, examples = self._operator.products - self._before[0], self._operator.examples - self._before[1]
        total = max(sum(outcome.share for outcome in outcomes), 1)
        solutions = [
            Solution(
                x=(outcome.x.double() * unit).to(self._operator.dtype),
                status=outcome.status,
                solver=self._solver,
                iterations=outcome.iterations,
                hvps=round(products * outcome.share / total),
                examples=round(examples * outcome.share / total),
                residual=outcome.residual,
                unexplained=outcome.unexplained,
                sigma_max=outcome.sigma_max,
                rtol=self._options.rtol,
                damping=float(self._options.damping) if outcome.damping is None else outcome.damping,
                seconds=seconds,
                peak_memory=memory,
                residuals=outcome.residuals,
                max_iter=self._options.max_iter if outcome.max_iter is None else outcome.max_iter,
            )
            for outcome, unit in zip(outcomes, self.unit, strict=True)
        ]
        return solutions[0] if self._is_vector else solutions


def _peak_memory(device: torch.device) -> int | None:
    """The peak memory of this process so far in bytes; ``None`` if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
