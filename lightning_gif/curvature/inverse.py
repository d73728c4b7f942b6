"""The interface between scores and the damped inverse of the curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from typing_extensions import Self

from ..config import Settings
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..registry import Registry
from ..solvers import SOLVERS, Solution
from .methods import Method

__all__ = ["INVERSES", "InverseCurvature"]


Class = TypeVar("Class", bound="type[InverseCurvature]")


class InverseCurvature(ABC):
    """The damped inverse of the curvature at an objective's present parameters.

    To add one, register a subclass in :data:`INVERSES` under the name that users pass as ``solver=``. It serves scores
    only, because an edit solves for its changes. :meth:`Solution.direct <lightning_gif.solvers.Solution.direct>` builds
    the solutions of an inverse without iterations. In a distributed
    run all processes make the same calls. The only exception is the function that :meth:`quadratic` returns: each
    process calls it for its own examples.

    Attributes:
        damping: The given or measured damping ``λ``, for the report.
        block_size: The number of gradients to pass to :meth:`ihvp` at once; ``None`` for all of them.
    """

    damping: float
    block_size: int | None

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        """How often ``on_product`` of :meth:`fit` will be called, at most; ``None`` if this is not known.

        Args:
            settings: Curvature, solver and their parameters.
            n_batches: The number of batches of the sampled training examples.
            n_queries: The number of gradients that :meth:`ihvp` will get; 0 if :meth:`quadratic` is called instead.
        """
        return None

    @classmethod
    def corrections(cls, settings: Settings, n_queries: int) -> int | None:
        """How many products with the exact matrix correct EK-FAC; ``None`` for an inverse without EK-FAC.

        Args:
            settings: Curvature, solver and their parameters.
            n_queries: The number of gradients that :meth:`ihvp` will get.
        """
        return None

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
        """Samples the training examples, prepares their curvature, and measures the damping if none is given.

        Args:
            objective: An open objective.
            train: The training examples.
            settings: Curvature, solver and their parameters.
            method: The method, which decides which rows and columns of the curvature are inverted.
            positions: The target parameters ``S``, ``(k,)``.
            on_product: Called for each product of the curvature with a vector, to show progress.

        Raises:
            NonFiniteError: If a product is not finite.
        """

    @abstractmethod
    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        """The iHVPs of query gradients ``q``: vectors ``w`` with ``wᵀg = q[S]ᵀ x(g)``, see :meth:`Method.query`.

        Warns if a solve did not converge.

        Args:
            gradients: The gradients of the queries, ``(q, p)``.

        Returns:
            The iHVPs ``(q, p)``, and the solution of each solve.

        Raises:
            ObjectiveError: If a gradient is zero on all target parameters.
            ConvergenceError: If a solve diverged, or did not converge and ``unconverged="raise"``.
            NonFiniteError: If a solve met a non-finite number.
        """

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """The quadratic form ``g ↦ g[S]ᵀ(C[S, S] + λ)⁻¹g[S]`` for self-influence.

        If ``C[S, S]`` may have negative eigenvalues, each eigenvalue ``c`` counts as ``√(c² + λ²)`` instead.

        Returns:
            A function from gradients ``(m, p)`` to values ``(m,)``. It computes no further products with the curvature.

        Raises:
            ConfigurationError: If this inverse cannot compute it, or not with this curvature or damping.
        """
        raise ConfigurationError(
            f"{type(self).__name__} has no quadratic form, which self-influence needs. Use another solver, or"
            " omit `solver`."
        )

    def of_losses(self, objective: Objective, batch: Batch) -> Tensor | None:
        """:meth:`quadratic` of the gradient of each loss of a batch, ``(B,)``, if this needs no whole gradients.

        Args:
            objective: The objective, open.
            batch: The batch.

        Returns:
            The values; ``None`` if gradients have to be passed to :meth:`quadratic`.
        """
        return None

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of this inverse in a report."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """How the curvature was computed, in plain values for a report.

        Warns if all products with the curvature were exactly zero.
        """


class InverseRegistry(Registry[type[InverseCurvature]]):
    """Inverses by names that no solver has."""

    def register(self, name: str) -> Callable[[Class], Class]:
        """Decorator that adds a class of inverses under ``name``.

        Raises:
            ConfigurationError: If an inverse or a solver has this name.
        """
        if name in SOLVERS:
            raise ConfigurationError(f"{name!r} is the name of a solver; choose another name for the inverse.")
        return super().register(name)  # type: ignore[return-value]


INVERSES = InverseRegistry("inverse curvature")
"""Classes of inverses that are no solvers, by the value of ``solver=`` that chooses them. If that value is a solver,
:mod:`lightning_gif.curvature.by_solver` has the inverses that run it."""
