"""What ``"auto"`` and ``None`` mean, and which names are known. Benchmarks are those of ``benchmarks/README.md``."""

from __future__ import annotations

from dataclasses import replace

from .config import AUTO, Settings
from .curvature import INVERSES
from .curvature.methods import METHODS
from .curvature.products import CURVATURES
from .curvature.sampling import SAMPLERS
from .errors import ConfigurationError
from .registry import nearest
from .selection import SELECTORS, check_selector, is_name
from .solvers import SOLVERS, cg, lsmr, nystrom

__all__ = [
    "check_names",
    "for_influence",
    "for_relinearised_step",
    "for_unlearning",
    "needs_no_cache",
]


# The solvers for least squares, for a symmetric curvature, and for many queries that share it. "Products to a
# residual": LSMR takes the fewest products. "Scores that predict retraining": the sketch (LDS 0.563, 13 products a
# query) is level with conjugate gradients for each query (0.556, 20 products).
LEAST_SQUARES, SYMMETRIC, SKETCH = lsmr.name, cg.name, nystrom.name

# Relative residual of the least squares of "gif" for scores. "What the tolerance buys for influence": LDS 0.071 at 1e-2
# and 21 products, 0.121 at 1e-3 and 78, 0.175 at 1e-4 and 376, which 200 iterations do not reach for two queries in
# five.
INFLUENCE_RTOL = 1e-3

# Iterations of conjugate gradients for scores. "Scores that predict retraining": LDS 0.386 at 5, 0.517 at 10, 0.556 at
# 20. More iterations follow the noise of the sample that the curvature is taken over.
INFLUENCE_ITERATIONS = 20

# Queries from which on they share a sketch: at 20 iterations each, these take more products than a sketch of rank 256.
SKETCH_QUERIES = 13

# The rank of that sketch, and the smallest `max_iter` that is taken for one. "Scores that predict retraining": LDS
# 0.563 at 512, 0.549 at 128, 0.507 at 64.
SKETCH_RANK, LEAST_SKETCH_RANK = 512, 64

# The rank of the sketch for self-influence. "Wrong labels found": AUC 0.972 on both networks at 64; 0.968 and 0.973 at
# 512, in seven times as long.
SELF_INFLUENCE_RANK = 64

# Iterations of a solve that is followed by others, at the weights to which it leads. "What the settings of an edit
# buy", row `max_iter=5`; for label correction "A backdoor repaired", row "eight iterations a solve".
RELINEARISED_ITERATIONS, RELINEARISED_ITERATIONS_OF_LABELS = 5, 8


def check_names(settings: Settings) -> Settings:
    """The same settings, once all names in them are known.

    Raises:
        ConfigurationError: For a name that is not registered, or a ``ratio`` that the selector does not take.
    """
    check_selector(settings.selector, settings.ratio)
    for registry, name in ((METHODS, settings.method), (CURVATURES, settings.curvature)):
        if name != AUTO:
            registry[name]
    solver = settings.solver
    if solver != AUTO and solver not in SOLVERS and solver not in INVERSES:
        raise ConfigurationError(f"Unknown solver {solver!r}. {nearest(str(solver), {*SOLVERS, *INVERSES})}")
    SAMPLERS[settings.curvature_sampling]
    return settings


def needs_no_cache(settings: Settings) -> bool:
    """Whether the target parameters are the same whatever was seen in training."""
    whole = settings.method != AUTO and not METHODS[settings.method].selects
    if whole or not is_name(settings.selector):
        return True
    return not SELECTORS.declared(SELECTORS[str(settings.selector)], "needs_statistics")


def for_unlearning(settings: Settings) -> Settings:
    """The settings of an edit: method and solver are chosen.

    Left open is what differs between the solves of an edit: the curvature and the number of iterations, see
    :func:`for_relinearised_step`, and the damping, which is 0 or measured by
    :func:`~lightning_gif.curvature.solve.solve_with_relative_damping`.

    Raises:
        ConfigurationError: For an inverse curvature that is no solver, which serves scores alone.
    """
    solver = _chosen(settings.solver, LEAST_SQUARES)
    if solver in INVERSES:
        raise ConfigurationError(
            f"solver={solver!r} is an inverse of the curvature, which serves scores only. An edit needs a solver:"
            f" {', '.join(SOLVERS)}. Pass one to the call: trainer.unlearn(…, solver={LEAST_SQUARES!r})."
        )
    return replace(settings, method=_chosen(settings.method, "gif"), solver=solver)


def for_relinearised_step(settings: Settings, *, labels: bool, convex: bool) -> Settings:
    """The settings of a solve that is followed by others, at the weights to which it leads.

    Args:
        settings: Those of the edit.
        labels: Whether labels are corrected.
        convex: Whether the loss is convex in the predictions, so that the Gauss–Newton matrix has no negative
            eigenvalues; it is then taken where the curvature is left open.
    """
    chosen = replace(settings, curvature=_chosen(settings.curvature, "ggn" if convex else "hessian"))
    iterations = RELINEARISED_ITERATIONS_OF_LABELS if labels else RELINEARISED_ITERATIONS
    return replace(chosen, max_iter=iterations) if settings.max_iter is None and settings.rtol is None else chosen


def for_influence(
    settings: Settings, *, ggn: bool, on_targets: bool, queries: int = 1, itself: bool = False
) -> Settings:
    """The settings of scores: all is chosen but the damping, where that is to be measured.

    The choice depends on the question alone, never on how much memory is free.

    Args:
        settings: As they were given.
        ggn: Whether the objective has a Gauss–Newton matrix.
        on_targets: Whether scores are restricted to target parameters.
        queries: The number of right-hand sides.
        itself: Whether each example is scored for itself.
    """
    method = _chosen(settings.method, "fif" if on_targets else "if")
    square = METHODS[method].is_square
    matrix = _chosen(settings.curvature, "ggn" if square and ggn else "hessian")
    rank = min(SKETCH_RANK, queries * INFLUENCE_ITERATIONS) if settings.max_iter is None else settings.max_iter
    asks_for_more = settings.rtol is not None or settings.discrepancy > 0  # than a sketch can give
    shared = queries >= SKETCH_QUERIES and rank >= LEAST_SKETCH_RANK and not asks_for_more
    symmetric = SKETCH if shared else SYMMETRIC
    semidefinite = square and CURVATURES.declared(CURVATURES[matrix], "positive_semidefinite")
    solver = _chosen(settings.solver, symmetric if semidefinite else LEAST_SQUARES)
    chosen = replace(settings, method=method, curvature=matrix, solver=solver)
    if not square:  # the plain least squares of GIF, until they converge
        tolerance = INFLUENCE_RTOL if settings.rtol is None else settings.rtol
        return replace(chosen, damping=0.0 if settings.damping is None else settings.damping, rtol=tolerance)
    if itself:  # by a sketch, whatever solves for queries
        return replace(chosen, max_iter=settings.max_iter or SELF_INFLUENCE_RANK)
    if settings.max_iter is not None or settings.rtol is not None or solver not in SOLVERS:
        return chosen
    if SOLVERS[solver].is_sketch:
        return replace(chosen, max_iter=rank)
    return replace(chosen, max_iter=INFLUENCE_ITERATIONS) if SOLVERS[solver].requires_symmetric_psd else chosen


def _chosen(name: str, default: str) -> str:
    return default if name == AUTO else name
