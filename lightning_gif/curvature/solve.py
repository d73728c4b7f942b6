"""Opens the curvature and runs the solver that the settings describe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from .._compat import rank_zero_warn
from ..config import AUTO, Settings
from ..data.examples import Examples
from ..errors import ConfigurationError, ConvergenceError, ConvergenceWarning
from ..objective.memory import bytes_to_keep
from ..objective.objective import Objective
from ..solvers import SOLVERS, LinearOperator, Solution, Status, lsmr, require_finite, spectrum, truncated_newton
from ..solvers.vectors import norms
from .products import CURVATURES, Linearise, Losses
from .streaming import Curvature

__all__ = [
    "describe",
    "max_iter",
    "newton",
    "open_curvature",
    "rtol",
    "solve",
    "solve_with_relative_damping",
    "warn_indefinite",
    "warn_unconverged",
]


# The largest number of iterations without an `rtol`, and with one. benchmarks/README.md, "What the settings of an edit
# buy": with 2 iterations a class is not forgotten. With 20, an edit takes three times as many products, for a retained
# loss of 0.065 instead of 0.067.
_ITERATIONS, _MOST_ITERATIONS = 10, 200

# A solve without an `rtol` ends at this residual, even before `max_iter`: below, float32 cannot distinguish a residual
# from rounding.
_LEAST_RTOL = 1e-4

_ADVICE = {
    Status.MAX_ITER: (
        "Directions of small curvature have not converged, which has a regularising effect. Raise `max_iter` or"
        " `damping`"
    ),
    Status.INDEFINITE: (
        "The solve ended because it met a direction without positive curvature, and may be far from a solution. Use"
        " solver='lsmr', which accepts any curvature, or curvature='ggn', or raise `damping`"
    ),
    Status.STALLED: "More iterations do not help, since rounding dominates: use double=True, or a `damping` above 0",
}
_SKETCH_ADVICE = (
    "The rank of the sketch is too small for these queries. Raise `max_iter`, which is the rank, or `damping`"
)


def open_curvature(
    settings: Settings,
    objective: Objective,
    examples: Examples,
    theta: Tensor | None = None,
    *,
    losses: Losses | None = None,
    weight_decay: float | None = None,
    keep: bool = True,
    linearise: Linearise | None = None,
    on_product: Callable[[], Any] = lambda: None,
) -> Curvature:
    """The curvature of the mean loss over examples.

    Args:
        settings: The kind of curvature, weight decay and memory.
        objective: An open objective.
        examples: The examples.
        theta: The parameters ``(p,)`` at which it is taken; by default the present ones.
        losses: The function whose curvature is taken; by default the objective's loss.
        weight_decay: The weight decay; by default that of the settings.
        keep: Whether first passes may be kept between products, within ``memory``.
        linearise: How the curvature of a batch is computed, if not as the kind of the settings says.
        on_product: Called for each product.
    """
    return Curvature(
        linearise or CURVATURES[_kind(settings)](losses or objective),
        objective.theta if theta is None else theta,
        examples,
        weight_decay=float(settings.weight_decay if weight_decay is None else weight_decay),
        memory=bytes_to_keep(settings, objective) if keep else 0.0,
        on_product=on_product,
    )


def describe(settings: Settings, curvature: Curvature) -> dict[str, Any]:
    """The kind of a curvature, and its counts of products and passes, as plain values for a report.

    If ``eigenvalues`` is set, its extreme eigenvalues are computed and added.
    """
    eigenvalues: dict[str, Any] = {}
    if settings.eigenvalues:
        eigenvalues = asdict(spectrum(curvature, settings.eigenvalues, seed=settings.seed))
    return {"kind": _kind(settings), **curvature.summary(), **eigenvalues}


def solve(settings: Settings, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
    """Runs the chosen solver.

    Args:
        settings: The solver and its parameters.
        operator: The matrix ``A``, ``(rows, cols)``.
        rhs: A right-hand side ``(rows,)``, or several as columns ``(rows, q)``.

    Returns:
        A solution for each right-hand side.

    Raises:
        ConvergenceError: If a solve did not converge and ``unconverged="raise"``, or if it diverged.
        NonFiniteError: If a solve met a non-finite number.
        ConfigurationError: If the solver does not support the matrix, or did not return a solution of the right shape
            for each right-hand side.
    """
    result = SOLVERS[settings.solver](
        operator,
        rhs,
        damping=float(settings.damping or 0.0),
        rtol=rtol(settings),
        max_iter=max_iter(settings),
        seed=settings.seed,
        discrepancy=settings.discrepancy,
    )
    solutions = result if isinstance(result, list) else [result]
    if not all(isinstance(solution, Solution) for solution in solutions):
        raise ConfigurationError(
            f"The solver {settings.solver!r} must return a lightning_gif.solvers.Solution, or a list of them, got"
            f" {type(result).__name__}. To build on an existing solver, call it and change its solution:"
            " dataclasses.replace(lightning_gif.solvers.lsmr(operator, rhs, **options), x=...)."
        )
    expected = (operator.shape[1],)
    if len(solutions) != (1 if rhs.ndim == 1 else rhs.shape[1]) or any(s.x.shape != expected for s in solutions):
        raise ConfigurationError(
            f"The solver {settings.solver!r} must return one solution of shape {expected} for each right-hand side, as"
            f" a list if there are several. The right-hand sides have shape {list(rhs.shape)}; the solutions have"
            f" shapes {[list(solution.x.shape) for solution in solutions]}."
        )
    for solution in solutions:
        require_finite(solution.x, f"The solution of {settings.solver!r}")
    warn_unconverged(settings, solutions)
    return solutions


def solve_with_relative_damping(
    settings: Settings, relative: float, operator: LinearOperator, rhs: Tensor
) -> list[Solution]:
    """:func:`solve` for one right-hand side, with a measured damping if the settings have none.

    Args:
        settings: The solver and its parameters.
        relative: The damping as a share of ``‖Aᵀg‖ / ‖g‖``. Measuring it takes one product.
        operator: The matrix ``A``, ``(rows, cols)``.
        rhs: The right-hand side ``g``, ``(rows,)``.

    Raises:
        ConvergenceError: See :func:`solve`.
        NonFiniteError: See :func:`solve`.
    """
    if settings.damping is not None:
        return solve(settings, operator, rhs)
    before, length = (operator.products, operator.examples), float(norms(rhs))
    scale = float(norms(operator.rmatvec(rhs))) / length if length else 0.0
    products, examples = operator.products - before[0], operator.examples - before[1]
    damping = relative * scale if math.isfinite(scale) else 0.0
    solutions = solve(replace(settings, damping=damping), operator, rhs)
    return [replace(one, hvps=one.hvps + products, examples=one.examples + examples) for one in solutions]


def newton(settings: Settings, operator: LinearOperator, rhs: Tensor, relative: float) -> tuple[Solution, float]:
    """A damped Newton step, see :func:`~lightning_gif.solvers.truncated_newton`.

    Args:
        settings: Its damping, tolerance and number of iterations.
        operator: The symmetric matrix ``C``, ``(n, n)``.
        rhs: The right-hand side ``g``, ``(n,)``.
        relative: Damping that is added, as a share of ``‖C g‖ / ‖g‖``.

    Returns:
        The solution ``x``, and ``xᵀCx``.

    Raises:
        ConvergenceError: See :func:`solve`.
        NonFiniteError: If the solve met a non-finite number.
    """
    solution, curvature = truncated_newton(
        operator,
        rhs,
        damping=float(settings.damping or 0.0),
        relative=relative,
        rtol=rtol(settings),
        max_iter=max_iter(settings),
    )
    warn_unconverged(settings, [solution], is_newton=True)
    return solution, curvature


def warn_unconverged(settings: Settings, solutions: list[Solution], *, is_newton: bool = False) -> None:
    """Warns if solves did not reach the given ``rtol``, or met negative curvature.

    Negative curvature ends a solve early, so it is reported even without an ``rtol``. So is a sketch with a residual of
    1 or more, which zero has as a solution. For Newton steps negative curvature is not
    reported: they end there by design (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1). The
    iterate before is a descent direction, and trials decide on its step size.

    Args:
        settings: The settings, with ``rtol`` and ``unconverged``.
        solutions: The solutions for one or several right-hand sides.
        is_newton: Whether the solutions are Newton steps.

    Raises:
        ConvergenceError: Instead of the warning, with ``unconverged="raise"``.
    """

    solver = SOLVERS.get(settings.solver)

    def falls_short(solution: Solution) -> bool:
        if solution.status is Status.INDEFINITE:
            return not is_newton
        if solver is not None and solver.is_sketch and solution.residual >= 1:  # zero has no larger one
            return True
        return settings.rtol is not None and not solution.converged

    short = [solution for solution in solutions if falls_short(solution)]
    if not short or settings.unconverged == "ignore":
        return
    worst = max(short, key=lambda solution: solution.residual)
    several = f" ({len(short)} of {len(solutions)} queries; this is the worst)" if len(solutions) > 1 else ""
    advice = _ADVICE[worst.status] if solver is None or not solver.is_sketch else _SKETCH_ADVICE
    if worst.status is Status.MAX_ITER and not is_newton and solver is not lsmr and advice is not _SKETCH_ADVICE:
        advice += f", or use solver={lsmr.name!r}"
    asked = "no rtol was given" if settings.rtol is None else f"rtol is {settings.rtol:g}"
    larger = "" if worst.status is Status.INDEFINITE else "a larger `rtol` or "
    message = (
        f"The {worst.solver} solve ended as {str(worst.status)!r} with a relative residual of {worst.residual:.2g}"
        f" after {worst.iterations} iterations ({worst.hvps} Hessian-vector products){several}; {asked}. {advice}, or"
        f" accept the solution by {larger}unconverged='ignore'."
    )
    _warn_or_raise(settings, message)


def warn_indefinite(settings: Settings, smallest: float, largest: float) -> None:
    """Warns that a curvature has a negative eigenvalue although it is declared positive semi-definite.

    Args:
        settings: The settings, with ``unconverged``.
        smallest: The smallest eigenvalue.
        largest: The largest one.

    Raises:
        ConvergenceError: Instead of the warning, with ``unconverged="raise"``.
    """
    if settings.unconverged == "ignore":
        return
    _warn_or_raise(
        settings,
        f"curvature={_kind(settings)!r} is declared positive semi-definite, but on the target parameters its"
        f" eigenvalues go from {smallest:.3g} to {largest:.3g}. So each eigenvalue c counts as √(c² + λ²), with the"
        " damping λ. Use curvature='hessian', which may have negative eigenvalues, or accept these scores by"
        " unconverged='ignore'.",
    )


def _warn_or_raise(settings: Settings, message: str) -> None:
    if settings.unconverged == "raise":
        raise ConvergenceError(message)
    rank_zero_warn(message, category=ConvergenceWarning)


def _kind(settings: Settings) -> str:
    """The name of the curvature; the Hessian if the setting is still ``"auto"``."""
    return "hessian" if settings.curvature == AUTO else settings.curvature


def max_iter(settings: Settings) -> int:
    """The largest number of iterations of a solve."""
    return settings.max_iter or (_ITERATIONS if settings.rtol is None else _MOST_ITERATIONS)


def rtol(settings: Settings) -> float:
    """The relative residual at which a solve ends."""
    return _LEAST_RTOL if settings.rtol is None else settings.rtol
