"""Inverses of the curvature: one solve for each gradient, a sketch for all of them, or the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from ..config import Settings
from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.memory import bytes_to_keep, check_fits
from ..objective.objective import Objective
from ..solvers import (
    SOLVERS,
    LinearOperator,
    Solution,
    Status,
    low_rank,
    low_rank_eigenvectors,
    to_matrix,
)
from ..solvers.operators import Submatrix, is_positive_semidefinite
from ..solvers.power_iteration import largest_eigenvalue
from ..solvers.vectors import norms
from .inverse import INVERSES, InverseCurvature
from .layer_products import layer_products, saves_time
from .methods import Method
from .products import CURVATURES, Linearise, jacobian_products
from .sampling import kept_sample
from .solve import describe, max_iter, open_curvature, solve, warn_indefinite
from .streaming import Curvature

__all__ = [
    "MOST_TOGETHER",
    "DenseInverse",
    "SketchInverse",
    "SolverInverse",
    "from_layers",
    "inverse_for_queries",
    "inverse_for_self_influence",
    "n_outputs",
    "solved_together",
]

# The damping of scores as a share of the largest eigenvalue, and the power iterations that estimate this eigenvalue.
# benchmarks/README.md, "Scores that predict retraining": on the MLP this damping is 0.061 (LDS 0.563; 0.577 at half of
# it, 0.545 at 0.1). The CNN is best with more (0.35 at 0.3, 0.29 at 0.03).
RELATIVE_DAMPING, POWER_ITERATIONS = 1e-3, 3

# Up to this number of parameters, self-influence forms the curvature matrix. This takes one product for each parameter,
# and at most 8 MiB.
DENSE_PARAMETERS = 1024

# An eigenvalue of this matrix is zero up to rounding if its size is below this multiple of the precision of products,
# times the largest eigenvalue and the root of the number of parameters: the norm of a matrix of rounding errors.
_ROUNDING = 10.0

# The largest number of right-hand sides in one solve, and how many vectors of the model's size each of them takes.
# Right-hand sides in one solve share the first passes that are not kept.
MOST_TOGETHER, _VECTORS = 16, 12

# The bytes of the vectors of right-hand sides that are solved together where their number must not depend on memory.
_COLUMN_BYTES = 2**30

# The number of matrices of the sketch's size that are in memory while it is computed: test vectors, their products, the
# shifted products, their half-factorised form, and the basis. Each step needs its matrix as a whole.
SKETCH_COPIES = 5

# A sketch is computed from the Jacobians of single examples if the model has at least so many parameters, since the
# time of smaller ones goes into calls; if the rank is at least so many times the number of outputs, since a product
# takes the time of about three backward passes, and a single example more than its share of a batch; if all Jacobians
# have at most so many bytes; and if a pass over an example takes more operations than its Jacobian has entries.
# benchmarks/README.md, "Self-influence of small data".
_JACOBIAN_PARAMETERS, _PASSES, _JACOBIAN_BYTES = 2**16, 4, 2**31


def inverse_for_queries(settings: Settings) -> type[InverseCurvature]:
    """The class of inverse for the iHVPs of queries: one that runs the solver, or the one registered by that name."""
    if settings.solver not in SOLVERS:
        return INVERSES[settings.solver]
    return SketchInverse if SOLVERS[settings.solver].is_sketch else SolverInverse


def inverse_for_self_influence(settings: Settings, size: int) -> type[InverseCurvature]:
    """The class of inverse for the quadratic form over ``size`` target parameters.

    If ``settings.solver`` is a solver, it is exact for few parameters, and a sketch otherwise. If it is an inverse, it
    is that inverse.
    """
    if settings.solver not in SOLVERS:
        return INVERSES[settings.solver]
    return DenseInverse if size <= DENSE_PARAMETERS else SketchInverse


def solved_together(objective: Objective, settings: Settings, *, takes_columns: bool) -> int:
    """The number of right-hand sides in one solve.

    Args:
        objective: An open objective.
        settings: The settings.
        takes_columns: Whether products take all of them at once. Then rounding depends on their number, which must not
            depend on the free memory. Otherwise it is the number whose vectors fit into that.
    """
    room = _COLUMN_BYTES if takes_columns else bytes_to_keep(settings, objective)
    return min(max(int(room // (_VECTORS * objective.theta.nbytes)), 1), MOST_TOGETHER)


def from_layers(objective: Objective, settings: Settings, n: int, products: int) -> Linearise | None:
    """The Gauss–Newton matrix from the Jacobians of layers; ``None`` for another matrix, or if that takes longer.

    Args:
        objective: An open objective.
        settings: The settings.
        n: The number of examples.
        products: The number of products with a vector.
    """
    if settings.curvature != "ggn" or not saves_time(objective, n, products):
        return None
    return layer_products(objective, CURVATURES["ggn"](objective))


def operations(objective: Objective, batch: Batch) -> int:
    """The number of floating-point operations of a pass over the first example of a batch.

    A product with its curvature takes about four times as many. A product with its Jacobian ``(d, p)`` and the
    transpose takes ``4dp``. A layer without shared weights has ``2p``, and a convolution many times more.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective.loss_sum(objective.theta, batch.slice(0, 1))
    return int(counter.get_total_flops())


def n_outputs(objective: Objective, batch: Batch) -> int:
    """The number of predictions for the first example of a batch."""
    with torch.no_grad():
        return objective.outputs(objective.theta, batch.slice(0, 1)).numel()


class SolverInverse(InverseCurvature):
    """Runs the solver of the settings for each block of gradients.

    Args:
        settings: The solver and its parameters.
        curvature: The curvature ``C``, ``(p, p)``.
        method: The method, which decides which rows and columns of ``C`` are inverted.
        positions: The target parameters ``S``, ``(k,)``.
        damping: The damping ``λ``.
        decay: Weight decay that is not in the curvature, and is added to the damping.
        block_size: The number of gradients that are solved together; ``None`` for all.
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
        self._decay, self._shift = decay, damping + decay
        self._measures_damping = settings.damping is None
        self._eigenvalues_summary: dict[str, Any] = {}
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
        examples = kept_sample(objective, train, settings)
        decay = settings.weight_decay if cls.decay_is_damping else 0.0
        inside = settings.weight_decay - decay
        linearise = cls.linearise(objective, settings, len(examples))
        curvature = open_curvature(
            settings, objective, examples, weight_decay=inside, linearise=linearise, on_product=on_product
        )
        damping = measured_damping(curvature, settings.seed) if settings.damping is None else settings.damping
        block_size = None
        if not SOLVERS[settings.solver].shares_products_across_rhs:
            block_size = solved_together(objective, settings, takes_columns=linearise is not None)
        return cls(settings, curvature, method, positions, damping, decay, block_size)

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        if not SOLVERS[settings.solver].requires_symmetric_psd:
            return None
        return _damping_products(settings) + n_queries * max_iter(settings)

    @classmethod
    def check(cls, objective: Objective, settings: Settings, method: Method, positions: Tensor) -> None:
        """Raises an error, before any work, if :meth:`fit` would fail with these arguments."""

    @classmethod
    def linearise(cls, objective: Objective, settings: Settings, n: int) -> Linearise | None:
        """How the curvature of a batch is computed for many products over ``n`` examples; ``None`` if by passes."""
        if SOLVERS[settings.solver].requires_draws:  # each product is over another batch
            return None
        return from_layers(objective, settings, n, max_iter(settings))

    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        return self._method.query(self._curvature, self._positions, gradients, self._solve)

    def _solve(self, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
        return solve(self._settings, operator, rhs)

    @property
    def kind(self) -> str:
        return self._settings.solver

    def summary(self) -> dict[str, Any]:
        self._curvature.warn_if_zero()
        return {**describe(self._settings, self._curvature), **self._eigenvalues_summary}

    def _sizes(self, eigenvalues: Tensor, semidefinite: bool) -> Tensor:
        """What eigenvalues ``c`` of the curvature count as: ``c + λ``, or ``√(c² + λ²)`` if some may be negative.

        Args:
            eigenvalues: The eigenvalues of ``C[S, S]``, ``(r,)``. Negative ones of a positive semi-definite matrix are
                rounding errors, and count as 0.
            semidefinite: Whether the matrix is positive semi-definite.
        """
        if semidefinite:
            return eigenvalues.clamp_min(0.0) + self._shift
        return torch.hypot(eigenvalues + self._decay, torch.full_like(eigenvalues, self.damping))

    def _rounding(self, eigenvalues: Tensor) -> float:
        """The size up to which eigenvalues ``(r,)`` of ``C[S, S]``, the largest among them, may be rounding errors."""
        precision = _ROUNDING * torch.finfo(self._curvature.dtype).eps * len(self._positions) ** 0.5
        return precision * float(eigenvalues.abs().max())

    @property
    def _on_targets(self) -> Submatrix:
        """``C[S, S]``."""
        return Submatrix(self._curvature, self._positions, self._positions)


class SketchInverse(SolverInverse):
    """Replaces the curvature by a sketch of rank ``max_iter``, which all gradients share.

    Its iHVPs are computed by the solver of the settings, which is a sketch wherever this class is chosen for them.

    In most directions weight decay is the only curvature, and the sketch misses them. So weight decay is added to the
    damping instead.
    """

    decay_is_damping = True

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        rank, kind = max_iter(settings), CURVATURES[settings.curvature]
        if n_queries:  # and one product for the residual
            return _damping_products(settings) + rank + 1
        semidefinite = CURVATURES.declared(kind, "positive_semidefinite")
        return _damping_products(settings) + (rank if semidefinite else 2 * rank)

    @classmethod
    def check(cls, objective: Objective, settings: Settings, method: Method, positions: Tensor) -> None:
        """Checks that the sketch fits into memory.

        Raises:
            ConfigurationError: If it does not.
        """
        size = len(positions) if method.cols == "targets" else objective.space.size
        rank = min(max_iter(settings), size)
        check_fits(
            settings,
            objective,
            SKETCH_COPIES * rank * size * objective.theta.itemsize,
            f"A sketch of rank {rank} of the curvature over {size} parameters",
            "Give a smaller `max_iter`, which is the rank of the sketch, or fewer parameters (targets='cached'). For"
            " the scores of a query, solver='cg' needs no sketch",
        )

    @classmethod
    def linearise(cls, objective: Objective, settings: Settings, n: int) -> Linearise | None:
        found = super().linearise(objective, settings, n)
        if found is None and cls.uses_jacobians(objective, settings, n):
            return jacobian_products(objective)
        return found

    @classmethod
    def uses_jacobians(cls, objective: Objective, settings: Settings, n: int) -> bool:
        """Whether products with the Jacobians are faster, as operation counts predict, and their size is limited."""
        probed, size = objective.probed, objective.space.size
        if settings.curvature != "ggn" or probed is None or not probed.divisible or size < _JACOBIAN_PARAMETERS:
            return False
        outputs = n_outputs(objective, probed)
        bytes_of_all = n * outputs * size * objective.theta.itemsize
        if _PASSES * outputs > max_iter(settings) or bytes_of_all > _JACOBIAN_BYTES:
            return False
        return operations(objective, probed) > outputs * size

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """See :meth:`InverseCurvature.quadratic`. Values are too large, because the sketch misses some curvature.

        If the curvature is exactly zero, so that no damping can be measured, all values are 0.
        """
        operator, rank = self._on_targets, self._settings.max_iter
        semidefinite = is_positive_semidefinite(operator)
        missed = float(self._sizes(torch.zeros(1, dtype=torch.float64), semidefinite))
        if not missed and self._measures_damping:
            return lambda gradients: gradients.new_zeros(len(gradients), dtype=torch.float64)
        if not missed:
            raise ConfigurationError(
                f"Self-influence on {operator.shape[0]} parameters is estimated with a sketch of the curvature, which"
                " needs a `damping` above 0. Omit `damping` to have it measured."
            )
        assert rank is not None  # set by defaults.for_influence
        if semidefinite:
            sketch = low_rank(operator, rank, seed=self._settings.seed)
            return lambda gradients: sketch.quadratic(gradients[:, self._positions], missed)
        basis, values = low_rank_eigenvectors(operator, rank, seed=self._settings.seed)
        self._eigenvalues_summary = {"negative_eigenvalues": int((values < -self._rounding(values)).sum())}
        beyond = 1 / self._sizes(values, semidefinite) - 1 / missed

        def form(gradients: Tensor) -> Tensor:
            rows = gradients[:, self._positions]
            return norms(rows.T).square() / missed + (rows @ basis).double().square() @ beyond

        return form

    @property
    def kind(self) -> str:
        return f"sketch of rank {self._settings.max_iter}"


class DenseInverse(SolverInverse):
    """Forms the matrix ``C[S, S]`` for the quadratic form. Its iHVPs are computed by the solver of the settings.

    Weight decay is added to the eigenvalues of the matrix.
    """

    decay_is_damping = True

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        return None  # one for each target parameter, of which there are few

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        """See :meth:`InverseCurvature.quadratic`; exact, in float64.

        Without damping, directions whose eigenvalue, with weight decay, is zero up to rounding are left out. Warns if
        the curvature is declared positive semi-definite but has a negative eigenvalue.

        Raises:
            ConvergenceError: Instead of this warning, with ``unconverged="raise"``.
        """
        operator = self._on_targets
        matrix = to_matrix(operator).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        rounding = self._rounding(values)
        negative = int((values < -rounding).sum())
        self._eigenvalues_summary = {"negative_eigenvalues": negative}
        semidefinite = is_positive_semidefinite(operator)
        if semidefinite and negative:
            semidefinite = False
            self._eigenvalues_summary["status"] = str(Status.INDEFINITE)
            warn_indefinite(self._settings, float(values[0]), float(values[-1]))
        sizes = self._sizes(values, semidefinite)
        kept = sizes > (0.0 if (self._shift if semidefinite else self.damping) else rounding)
        vectors, weights = vectors[:, kept], 1 / sizes[kept]
        return lambda gradients: (gradients[:, self._positions].double() @ vectors).square() @ weights

    @property
    def kind(self) -> str:
        return "exact"


def _damping_products(settings: Settings) -> int:
    """The number of products that :func:`measured_damping` takes; 0 if the damping is given."""
    return POWER_ITERATIONS if settings.damping is None else 0


def measured_damping(curvature: LinearOperator, seed: int) -> float:
    """The default damping of scores: a share of the largest eigenvalue, estimated by a few power iterations.

    Args:
        curvature: The curvature ``C``, ``(p, p)``.
        seed: The seed of the start vector.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    vector = torch.randn(curvature.shape[0], generator=torch.Generator().manual_seed(seed), dtype=curvature.dtype)
    return RELATIVE_DAMPING * largest_eigenvalue(curvature, vector.to(curvature.device), POWER_ITERATIONS)
