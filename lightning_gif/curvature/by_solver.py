"""Inverses of the curvature: one solve for each gradient, a sketch for all of them, or the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..config import Settings
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..solvers import SOLVERS, LinearOperator, Solution, low_rank, nystrom, require_finite, to_matrix
from ..solvers.operators import Submatrix
from ..solvers.vectors import norms
from .inverse import INVERSES, InverseCurvature
from .memory import bytes_to_keep, check_fits
from .methods import Method
from .sampling import curvature_sample, sample_size
from .solve import describe, max_iter, open_curvature, solve
from .streaming import Curvature

__all__ = ["DenseInverse", "SketchInverse", "SolverInverse", "inverse_for_queries", "inverse_for_self_influence"]

# Damping of scores as a share of the largest eigenvalue, and the power iterations that estimate that. "Scores that
# predict retraining": on the MLP this is 0.061 (LDS 0.563; 0.577 at half of it, 0.545 at 0.1), and the CNN is best with
# more (0.35 at 0.3, 0.29 at 0.03).
RELATIVE_DAMPING, POWER_ITERATIONS = 1e-3, 3

# Parameters up to which self-influence forms the curvature matrix, in as many products and at most 8 MiB.
DENSE_PARAMETERS = 1024

# Right-hand sides that are solved together share the first passes that are not kept, but each takes that many vectors
# of the model's size.
_MOST_TOGETHER, _VECTORS = 16, 12

# Matrices of the sketch's size that are in memory at once while it is computed: test vectors, their products, these
# shifted, their half-factorised form, and the basis. None of them can be computed in parts without the others.
_SKETCH_COPIES = 5


def inverse_for_queries(settings: Settings) -> type[InverseCurvature]:
    """The inverse that gives the iHVPs of queries: that of the solver's name, or a solve for each."""
    return INVERSES.get(settings.solver, SolverInverse)


def inverse_for_self_influence(settings: Settings, size: int) -> type[InverseCurvature]:
    """The inverse that gives the quadratic form over ``size`` target parameters.

    For solvers it is exact if the parameters are few, and a sketch otherwise. A name that is no solver has its own.
    """
    if settings.solver in SOLVERS and size <= DENSE_PARAMETERS:
        return DenseInverse
    return INVERSES.get(settings.solver, SketchInverse)


class SolverInverse(InverseCurvature):
    """Runs the solver of the settings for each block of gradients.

    Args:
        settings: The solver and its parameters.
        curvature: ``C``, ``(p, p)``, open.
        method: Which rows and columns of it are inverted.
        positions: The target parameters ``S``, ``(k,)``.
        damping: ``λ``.
        decay: Weight decay that is not in the curvature, and is added to the damping.
        block_size: How many gradients are right-hand sides of one solve.
    """

    decay_is_damping = False

    def __init__(
        self,
        settings: Settings,
        curvature: Curvature,
        method: Method,
        positions: Tensor,
        damping: float,
        decay: float,
        block_size: int | None,
    ) -> None:
        self.damping, self.block_size = damping, block_size
        self._shift = damping + decay
        self._settings = replace(settings, damping=self._shift)
        self._curvature, self._method, self._positions = curvature, method, positions

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
        cls.check(objective, settings, method, positions)
        size, sampler, seed = sample_size(settings), settings.curvature_sampling, settings.seed
        examples = curvature_sample(objective, train, size, sampler, seed)
        examples = examples.cached(bytes_to_keep(settings, objective))
        decay = settings.weight_decay if cls.decay_is_damping else 0.0
        inside = settings.weight_decay - decay
        curvature = open_curvature(settings, objective, examples, weight_decay=inside, on_product=on_product)
        damping = measured_damping(curvature, seed) if settings.damping is None else settings.damping
        block_size = None
        if not SOLVERS[settings.solver].shares_products_across_rhs:
            room = int(bytes_to_keep(settings, objective) // (_VECTORS * objective.theta.nbytes))
            block_size = min(max(room, 1), _MOST_TOGETHER)
        return cls(settings, curvature, method, positions, damping, decay, block_size)

    @classmethod
    def check(cls, objective: Objective, settings: Settings, method: Method, positions: Tensor) -> None:
        """Refuses what cannot be fitted, before any work; see :meth:`fit` for the arguments."""

    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        return self._method.query(self._curvature, self._positions, gradients, self._solve)

    def _solve(self, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
        return solve(self._settings, operator, rhs)

    @property
    def kind(self) -> str:
        return self._settings.solver

    def summary(self) -> dict[str, Any]:
        self._curvature.warn_if_zero()
        return describe(self._settings, self._curvature)

    @property
    def _on_targets(self) -> Submatrix:
        """``C[S, S]``."""
        return Submatrix(self._curvature, self._positions, self._positions)


@INVERSES.register(nystrom.name)
class SketchInverse(SolverInverse):
    """A sketch of rank ``max_iter`` in place of the curvature. All gradients share its products.

    The sketch misses most directions without curvature except weight decay, so weight decay counts as damping.
    """

    decay_is_damping = True

    @classmethod
    def check(cls, objective: Objective, settings: Settings, method: Method, positions: Tensor) -> None:
        """Raises a :class:`~lightning_gif.errors.ConfigurationError` if the sketch does not fit into memory."""
        size = len(positions) if method.cols == "targets" else objective.space.size
        rank = min(max_iter(settings), size)
        check_fits(
            settings,
            objective,
            _SKETCH_COPIES * rank * size * objective.theta.itemsize,
            f"A sketch of rank {rank} of the curvature over {size} parameters",
            "Give a smaller `max_iter`, which is the rank, or fewer parameters (targets='cached'); solver='cg' needs no"
            " sketch for the scores of a query",
        )

    def _solve(self, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
        return solve(replace(self._settings, solver=nystrom.name), operator, rhs)

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """See :meth:`InverseCurvature.quadratic`. The sketch misses some curvature, so the values are too large."""
        operator, shift, rank = self._on_targets, self._shift, self._settings.max_iter
        if not shift:
            raise ConfigurationError(
                f"Self-influence on {operator.shape[0]} parameters is estimated with a sketch of the curvature, which"
                " needs a `damping` above 0. Leave it out to have it measured."
            )
        assert rank is not None  # chosen by defaults.for_influence
        sketch = low_rank(operator, rank, seed=self._settings.seed)
        return lambda gradients: sketch.quadratic(gradients[:, self._positions], shift)

    @property
    def kind(self) -> str:
        return f"sketch of rank {self._settings.max_iter}"


class DenseInverse(SolverInverse):
    """Forms the matrix ``C[S, S] + λ`` for the quadratic form. iHVPs come from the chosen solver.

    Weight decay is added to the diagonal like damping.
    """

    decay_is_damping = True

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """See :meth:`InverseCurvature.quadratic`; exact, in float64."""
        matrix = to_matrix(self._on_targets).double()
        matrix.diagonal().add_(self._shift)
        factor = torch.linalg.lu_factor(matrix)

        def form(gradients: Tensor) -> Tensor:
            columns = gradients[:, self._positions].double().T
            return (columns * torch.linalg.lu_solve(*factor, columns)).sum(0)

        return form

    @property
    def kind(self) -> str:
        return "exact"


def measured_damping(curvature: LinearOperator, seed: int) -> float:
    """The default damping of scores: a share of the largest eigenvalue, estimated by a few power iterations.

    Args:
        curvature: ``C``, ``(p, p)``.
        seed: The seed of the start vector.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    vector = torch.randn(curvature.shape[0], generator=torch.Generator().manual_seed(seed), dtype=curvature.dtype)
    vector, eigenvalue = vector.to(curvature.device), 0.0
    for _ in range(POWER_ITERATIONS):
        length = float(norms(vector))
        if not length:
            return 0.0
        vector = curvature.matvec(vector / length)
        require_finite(vector, "The product of the curvature with a vector")
        eigenvalue = float(norms(vector))  # from below
    return RELATIVE_DAMPING * eigenvalue
