"""The interface between scores and the damped inverse of the curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from ..config import Settings
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..registry import Registry
from ..solvers import Solution
from .methods import Method

__all__ = ["INVERSES", "InverseCurvature"]


class InverseCurvature(ABC):
    """The damped inverse of the curvature at an objective's present parameters.

    To add one, register a subclass in :data:`INVERSES` under the solver name that chooses it. With several processes,
    all of them make the same calls; only the function that :meth:`quadratic` returns is called by each process for its
    own examples.

    Attributes:
        damping: ``λ`` as given or measured, for the report.
        block_size: The number of gradients to pass to :meth:`ihvp` at once; ``None`` for all of them.
    """

    damping: float
    block_size: int | None

    @classmethod
    @abstractmethod
    def fit(
        cls,
        objective: Objective,
        train: Examples,
        settings: Settings,
        method: Method,
        positions: Tensor,
        *,
        on_product: Callable[[], Any] = lambda: None,
    ) -> Self:
        """Samples the training examples, opens their curvature, and measures the damping where none was given.

        Args:
            objective: An open objective.
            train: The training examples.
            settings: Curvature, solver and their parameters.
            method: Which rows and columns of the curvature are inverted.
            positions: The target parameters ``S``, ``(k,)``.
            on_product: Called at each product of the curvature with a vector, to show progress.

        Raises:
            NonFiniteError: If a product is not finite.
        """

    @abstractmethod
    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        """The iHVPs of query gradients: vectors ``w`` with ``wᵀg = q[S]ᵀ x(g)``, see :meth:`Method.query`.

        Warns of solves that did not converge.

        Args:
            gradients: ``(q, p)``.

        Returns:
            The iHVPs ``(q, p)``, and the solution of each solve.

        Raises:
            ObjectiveError: If a gradient is zero on all target parameters.
            ConvergenceError: If a solve diverged, or did not converge and ``unconverged="raise"``.
            NonFiniteError: If a solve met a non-finite number.
        """

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """The quadratic form ``g ↦ g[S]ᵀ(C[S, S] + λ)⁻¹g[S]``, ``(m, p) → (m,)``, which takes no further products.

        Raises:
            ConfigurationError: If this inverse has no such form, or not with this curvature or damping.
        """
        raise ConfigurationError(
            f"{type(self).__name__} has no quadratic form, which self-influence needs. Use another solver, or"
            " leave `solver` out."
        )

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of this inverse in a report."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """How the curvature was computed, in plain values for a report.

        Warns if all products with the curvature were exactly zero.
        """


INVERSES: Registry[type[InverseCurvature]] = Registry("inverse curvature")
"""Inverses by the name of the solver that chooses them; any other solver is run by
:class:`~lightning_gif.curvature.by_solver.SolverInverse`."""
