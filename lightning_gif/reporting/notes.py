"""Notes, which are warnings that a report also has, and phrases that both kinds of reports use."""

from __future__ import annotations

from .._compat import rank_zero_warn
from ..errors import GIFWarning

__all__ = ["describe_solve", "warn_and_note"]


def warn_and_note(notes: list[str], text: str) -> None:
    """Warns, and adds the same text to the notes of a report."""
    notes.append(text)
    rank_zero_warn(text, category=GIFWarning)


def describe_solve(solver: str, status: object | None, iterations: int, residual: float | None) -> str:
    """The diagnostics of a solve in one phrase: ``"cg, converged, 20 iterations, residual 5.1e-01"``.

    Args:
        solver: The name of the solver.
        status: How the solve ended; ``None`` to omit it.
        iterations: The number of iterations.
        residual: The relative residual; ``None`` to omit it.
    """
    parts = [solver, *([] if status is None else [str(status)])]
    parts.append(f"{iterations} iteration{'' if iterations == 1 else 's'}")
    parts += [] if residual is None else [f"residual {residual:.1e}"]
    return ", ".join(parts)
