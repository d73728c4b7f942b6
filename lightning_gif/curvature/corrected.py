"""EK-FAC corrected by exact products: iterative solvers with EK-FAC as the preconditioner.

ASTRA (arXiv 2507.14740) corrects EK-FAC by a preconditioned stochastic iteration. This is its deterministic form, on a
fixed sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..config import Settings
from ..data.examples import Examples
from ..objective.objective import Objective
from ..solvers import SOLVERS, Solution
from ..solvers.operators import Transformed
from .by_solver import from_layers, solved_together
from .ekfac import EKFACInverse, require_layers
from .inverse import INVERSES, InverseCurvature
from .methods import Method
from .products import Linearise
from .sampling import kept_sample
from .solve import describe, max_iter, open_curvature, solve
from .streaming import Curvature

__all__ = ["ITERATIONS", "CorrectedEKFAC", "LissaEKFAC", "LsmrEKFAC"]

# The number of iterations without `max_iter` and `rtol`. The scores of benchmarks/README.md, "Scores with the exact
# matrix", were measured with it. Least squares take the square of it, since their condition number is the square: see
# "EK-FAC corrected by products" there.
ITERATIONS = 6

# The default damping of a layer as a multiple of that of EK-FAC. benchmarks/README.md, "Scores with the exact matrix".
DAMPING_MULTIPLE = 10.0

# The number of queries for which the faster kind of products is chosen.
_QUERIES = 4


@INVERSES.register("ekfac_cg")
class CorrectedEKFAC(InverseCurvature):
    """``(G + D)⁻¹`` with the exact Gauss–Newton matrix ``G`` of a sample. ``D`` is ten times the damping of EK-FAC.

    Conjugate gradients solve ``R(G + D)R y = Rq``, where ``R`` is the root of the EK-FAC inverse, and ``x = Ry``. If
    EK-FAC were exact, one iteration would do. One product with ``G`` for each iteration and query corrects it where it
    is not.

    Attributes:
        iteration: The solver that iterates.

    Args:
        settings: The settings.
        curvature: The exact matrix ``G``, ``(p, p)``.
        ekfac: EK-FAC for the same examples.
        block_size: The number of gradients that are solved together.
    """

    name = "ekfac_cg"
    iteration: ClassVar[str] = "cg"

    def __init__(self, settings: Settings, curvature: Curvature, ekfac: EKFACInverse, block_size: int) -> None:
        self.damping, self.block_size = ekfac.damping, block_size
        self._curvature, self._ekfac = curvature, ekfac
        self._dampings = ekfac.dampings().to(curvature.device, curvature.dtype)
        self._settings = self._of_solve(settings)

    @classmethod
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
        layers = require_layers(objective, settings, method)
        examples = kept_sample(objective, train, settings)
        ekfac = EKFACInverse.of(objective, layers, examples, settings, on_product, DAMPING_MULTIPLE)
        linearise = cls.linearise(objective, settings, len(examples))
        # Weight decay is a part of the damping already.
        curvature = open_curvature(
            settings, objective, examples, weight_decay=0.0, linearise=linearise, on_product=on_product
        )
        together = solved_together(objective, settings, takes_columns=True)
        return cls(settings, curvature, ekfac, together)

    @classmethod
    def linearise(cls, objective: Objective, settings: Settings, n: int) -> Linearise | None:
        """How the curvature of a batch is computed for products over ``n`` examples; ``None`` if by passes."""
        return from_layers(objective, settings, n, _QUERIES * (settings.max_iter or ITERATIONS))

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        if cls._takes_least_squares():  # which may take more products than iterations say
            return None
        return 2 * n_batches + cls.corrections(settings, n_queries)

    @classmethod
    def corrections(cls, settings: Settings, n_queries: int) -> int:
        iterations = max_iter(cls._of_solve(settings))
        # Least squares take two products for an iteration, one before them, and two to check the solution.
        return n_queries * (2 * iterations + 3 if cls._takes_least_squares() else iterations)

    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        root = self._ekfac.root

        def transform(vectors: Tensor) -> Tensor:
            return root(vectors.T if vectors.ndim > 1 else vectors[None]).T.view_as(vectors)

        operator = Transformed(self._curvature, self._dampings, transform, takes_columns=True)
        found = solve(self._settings, operator, root(gradients).T)
        ihvps = root(torch.stack([one.x for one in found]))
        return ihvps, [
            replace(one, x=row, solver=self.name, damping=self.damping) for one, row in zip(found, ihvps, strict=True)
        ]

    @property
    def kind(self) -> str:
        return self.name

    def summary(self) -> dict[str, Any]:
        """How EK-FAC and the products were computed."""
        self._curvature.warn_if_zero()
        return {**self._ekfac.summary(), **describe(self._settings, self._curvature)}

    @classmethod
    def _takes_least_squares(cls) -> bool:
        return not SOLVERS[cls.iteration].requires_symmetric_psd

    @classmethod
    def _of_solve(cls, settings: Settings) -> Settings:
        """The settings of the iterations."""
        default = ITERATIONS**2 if cls._takes_least_squares() else ITERATIONS
        iterations = settings.max_iter or (default if settings.rtol is None else None)
        return replace(settings, solver=cls.iteration, damping=0.0, max_iter=iterations)


@INVERSES.register("ekfac_lsmr")
class LsmrEKFAC(CorrectedEKFAC):
    """The same system as :class:`CorrectedEKFAC`, solved by LSMR: two products for each iteration."""

    name = "ekfac_lsmr"
    iteration = "lsmr"


@INVERSES.register("ekfac_lissa")
class LissaEKFAC(CorrectedEKFAC):
    """The same system as :class:`CorrectedEKFAC`, solved by :func:`~lightning_gif.solvers.lissa`.

    That takes two products for each iteration. Its first 20 iterations are CGLS.
    """

    name = "ekfac_lissa"
    iteration = "lissa"
