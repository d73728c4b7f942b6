"""Notes, which are warnings that a report also has, and phrases that both kinds of reports use."""

from __future__ import annotations

from .._compat import rank_zero_warn
from ..errors import GIFWarning

__all__ = ["describe_share", "describe_solve", "warn_and_note"]


def warn_and_note(notes: list[str], text: str) -> None:
    """Warns, and adds the same text to the notes of a report."""
    notes.append(text)
    rank_zero_warn(text, category=GIFWarning)


_ENDED = {
    "converged": "converged after {}",
    "discrepancy": "reached the discrepancy after {}",
    "max_iter": "not converged after {}",
    "stalled": "stalled after {}, before it converged",
    "indefinite": "ended after {} at a direction without positive curvature",
}
"""What a status means, by its value."""


def describe_solve(solver: str, status: str | None, iterations: int, residual: float | None) -> str:
    """The diagnostics of a solve in one phrase: ``"'cg' (converged after 20 iterations, residual 0.51)"``.

    Args:
        solver: The name of the solver.
        status: How the solve ended; ``None`` to omit it.
        iterations: The number of iterations; 0 for a solver that has none.
        residual: The relative residual; ``None`` to omit it.
    """
    if not iterations:
        return f"{solver!r} (needs no iterations)"
    count = f"{iterations} iteration{'' if iterations == 1 else 's'}"
    how = count if status is None else _ENDED[status].format(count)
    return f"{solver!r} ({how}{'' if residual is None else f', residual {residual:.2g}'})"


def describe_share(share: float | None) -> str:
    """The gradient share of target parameters in one phrase; empty if it is unknown, or if these are all parameters.

    Args:
        share: The share; ``None`` if it is unknown.
    """
    if share is None or share == 1.0:
        return ""
    return f"targets hold {100 * share:.{0 if share >= 0.1 else 1}f} % of the gradient"
