"""The meaning of ``"auto"`` and ``None`` in settings, and the check of names.

Comments name the section of ``benchmarks/README.md`` in which a default was measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .config import AUTO, RATIO, SELECTOR, Settings
from .curvature import INVERSES
from .curvature.corrected import ITERATIONS, CorrectedEKFAC
from .curvature.ekfac import EKFACInverse
from .curvature.energy import ENERGIES
from .curvature.methods import METHODS
from .curvature.products import CURVATURES
from .curvature.sampling import SAMPLERS
from .errors import ConfigurationError
from .registry import nearest
from .selection import SELECTORS, check_selector, energy_of, is_name
from .solvers import SOLVERS, cg, lsmr, nystrom

__all__ = [
    "check_names",
    "for_influence",
    "for_matching",
    "for_store",
    "for_unlearning",
    "needs_no_cache",
]


# The solvers for least squares, for a symmetric curvature, and for many queries that share a sketch. "Products to a
# residual": LSMR takes the fewest products. "Scores that predict retraining": the sketch (LDS 0.563, 13 products for
# each query) is as good as conjugate gradients for each query (0.556, 20 products).
LEAST_SQUARES, SYMMETRIC, SKETCH = lsmr.name, cg.name, nystrom.name

# The inverses for models with many parameters, all in layers: EK-FAC; and EK-FAC corrected by products with the
# Gauss–Newton matrix, where they take few operations. "Scores with the exact matrix": with the products, scores predict
# retraining better on eight of ten tasks, by 0.04 to 0.19, and worse by less than 0.01 on the two others.
LAYERS, EXACT = EKFACInverse.name, CorrectedEKFAC.name

# The largest number of operations for the products of all queries at one state of training. They take about half a
# minute on one core of a laptop: 92 queries of a perceptron with 110 000 parameters, 4 of a network with 400 000.
_EXACT_OPERATIONS = 1.2e12

# A product for one example takes about four times the operations of its loss.
_PRODUCT = 4

# The `rtol` of the least-squares solves of "gif" for scores. "What the tolerance buys for influence": LDS 0.071 at 1e-2
# and 21 products, 0.121 at 1e-3 and 78, 0.175 at 1e-4 and 376. For two queries in five, 200 iterations do not reach
# 1e-4.
INFLUENCE_RTOL = 1e-3

# The iterations of conjugate gradients for scores. "Scores that predict retraining": LDS 0.386 at 5, 0.517 at 10, 0.556
# at 20. More iterations fit the noise of the sample over which the curvature is taken.
INFLUENCE_ITERATIONS = 20

# From this number of queries on, a sketch is used: with 20 iterations for each query, 13 queries take more products
# than a sketch of rank 256.
SKETCH_QUERIES = 13

# The rank of this sketch, and the smallest `max_iter` with which a sketch is used. "Scores that predict retraining":
# LDS 0.563 at 512, 0.549 at 128, 0.507 at 64.
SKETCH_RANK, LEAST_SKETCH_RANK = 512, 64

# The rank of the sketch for self-influence. "Wrong labels found": AUC 0.972 on both networks at 64; 0.968 and 0.973 at
# 512, in seven times as long.
SELF_INFLUENCE_RANK = 64


def check_names(settings: Settings) -> Settings:
    """Checks all names in settings, and returns the settings.

    Raises:
        ConfigurationError: If a name is not registered, or the selector does not accept ``ratio``.
    """
    check_selector(settings.selector, settings.ratio)
    energy = energy_of(settings.selector)
    if energy is not None:
        ENERGIES[energy]
    for registry, name in ((METHODS, settings.method), (CURVATURES, settings.curvature)):
        if name != AUTO:
            registry[name]
    solver = settings.solver
    if solver != AUTO and solver not in SOLVERS and solver not in INVERSES:
        raise ConfigurationError(f"Unknown solver {solver!r}. {nearest(str(solver), {*SOLVERS, *INVERSES})}")
    SAMPLERS[settings.curvature_sampling]
    return settings


def needs_no_cache(settings: Settings) -> bool:
    """Whether the target parameters do not depend on statistics from training."""
    whole = settings.method != AUTO and not METHODS[settings.method].selects
    if whole or not is_name(settings.selector):
        return True
    return not SELECTORS.declared(SELECTORS[str(settings.selector)], "statistics")


def for_unlearning(settings: Settings) -> Settings:
    """The settings of an edit, with the method and the solver chosen.

    Other settings can differ between the solves of an edit, and are chosen later: the number of iterations by the goal,
    the damping is 0, or measured by :func:`~lightning_gif.curvature.solve.solve_with_relative_damping`.

    Raises:
        ConfigurationError: If ``solver`` is an inverse for scores only, and not a solver.
    """
    solver = _chosen(settings.solver, LEAST_SQUARES)
    if solver in INVERSES:
        raise ConfigurationError(
            f"solver={solver!r} is for scores only. An edit needs a solver: {', '.join(SOLVERS)}. Pass one to the call:"
            f" trainer.unlearn(…, solver={LEAST_SQUARES!r})."
        )
    return replace(settings, method=_chosen(settings.method, "gif"), solver=solver)


def for_matching(settings: Settings, *, selects: bool) -> Settings | None:
    """The settings of an edit by ``step="match"``; ``None`` if a setting excludes it.

    Args:
        settings: The settings that the call requested.
        selects: Whether the call selects target parameters. If it does, or the settings have another selector or ratio
            than the default ones, an edit without a given method changes targets only. Otherwise it changes all.
    """
    whole = not selects and settings.selector == SELECTOR and settings.ratio == RATIO
    method = _chosen(settings.method, "if" if whole else "fif")
    curvature = _chosen(settings.curvature, "ggn")
    solver = _chosen(settings.solver, SYMMETRIC)
    symmetric = METHODS[method].is_symmetric and CURVATURES.declared(CURVATURES[curvature], "positive_semidefinite")
    # The damping is a part of the matrix, and the matrix is that of a fixed sample.
    if not symmetric or solver not in SOLVERS or SOLVERS[solver].requires_damping or SOLVERS[solver].requires_draws:
        return None
    return replace(settings, method=method, curvature=curvature, solver=solver)


def for_influence(
    settings: Settings,
    *,
    ggn: bool,
    on_targets: bool,
    queries: int = 1,
    itself: bool = False,
    layers: bool = False,
    operations: float = math.inf,
) -> Settings:
    """The settings of scores, with everything chosen except a damping that has to be measured.

    The choice depends on the arguments alone, never on the free memory.

    Args:
        settings: The settings that the call requested.
        ggn: Whether the objective has a Gauss–Newton matrix.
        on_targets: Whether scores are restricted to target parameters.
        queries: The number of queries.
        itself: Whether each example is scored for its own loss.
        layers: Whether the parameters are many, and all in layers that are linear in them.
        operations: The number of operations of the losses of all examples that the curvature is taken over.
    """
    method = _chosen(settings.method, "fif" if on_targets else "if")
    square = METHODS[method].is_square
    matrix = _chosen(settings.curvature, "ggn" if square and ggn else "hessian")
    rank = min(SKETCH_RANK, queries * INFLUENCE_ITERATIONS) if settings.max_iter is None else settings.max_iter
    to_tolerance = settings.rtol is not None or settings.discrepancy > 0  # a sketch cannot solve to a tolerance
    # What only products with the curvature can give has been requested.
    iterates = to_tolerance or settings.max_iter is not None or settings.eigenvalues > 0
    shared = queries >= SKETCH_QUERIES and rank >= LEAST_SKETCH_RANK and not to_tolerance
    symmetric = SKETCH if shared else SYMMETRIC
    semidefinite = square and CURVATURES.declared(CURVATURES[matrix], "positive_semidefinite")
    if settings.solver == AUTO and matrix == "ggn" and layers and not iterates and METHODS[method].cols == "all":
        products = queries * ITERATIONS * _PRODUCT * operations
        is_exact = not itself and products <= _EXACT_OPERATIONS
        return replace(settings, method=method, curvature=matrix, solver=EXACT if is_exact else LAYERS)
    solver = _chosen(settings.solver, symmetric if semidefinite else LEAST_SQUARES)
    chosen = replace(settings, method=method, curvature=matrix, solver=solver)
    if not square:  # least squares without damping, as in GIF, until convergence
        tolerance = INFLUENCE_RTOL if settings.rtol is None else settings.rtol
        return replace(chosen, damping=0.0 if settings.damping is None else settings.damping, rtol=tolerance)
    if itself and solver in SOLVERS:  # self-influence uses a sketch, not the solver for queries
        return replace(chosen, max_iter=settings.max_iter or SELF_INFLUENCE_RANK)
    if settings.max_iter is not None or settings.rtol is not None or solver not in SOLVERS:
        return chosen
    if SOLVERS[solver].is_sketch:
        return replace(chosen, max_iter=rank)
    return replace(chosen, max_iter=INFLUENCE_ITERATIONS) if SOLVERS[solver].requires_symmetric_psd else chosen


def for_store(settings: Settings) -> Settings:
    """The settings of a store of gradients.

    Raises:
        ConfigurationError: If they ask for what EK-FAC, which a store needs, does not have.
    """
    needed = {"method": "if", "curvature": "ggn", "solver": LAYERS}
    for name, value in needed.items():
        given = getattr(settings, name)
        if given not in (AUTO, value):
            raise ConfigurationError(
                f"A store of gradients needs {name}={value!r}, got {given!r}. Omit `{name}`, or pass"
                f" trainer.store_gradients(…, {name}={value!r})."
            )
    given = [f"`{name}`" for name in ("max_iter", "rtol", "discrepancy", "eigenvalues") if getattr(settings, name)]
    if given:
        raise ConfigurationError(
            f"A store of gradients takes no {', '.join(given)}, because EK-FAC does not iterate and forms no products"
            " with the curvature. Omit them."
        )
    return replace(settings, method="if", curvature="ggn", solver=LAYERS)


def _chosen(name: str, default: str) -> str:
    return default if name == AUTO else name
