"""Notes that a user gets now and finds in the report."""

from __future__ import annotations

from .._compat import rank_zero_warn
from ..errors import GIFWarning


def warn_and_note(notes: list[str], text: str) -> None:
    """Says something now and in the report."""
    notes.append(text)
    rank_zero_warn(text, category=GIFWarning)
