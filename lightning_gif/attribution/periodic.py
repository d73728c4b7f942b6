"""Influence reports that are made during ``fit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .._compat import rank_zero_warn
from ..errors import GIFError, GIFWarning, RankError
from .report import InfluenceReport

__all__ = ["HISTORY_COLUMNS", "PeriodicReports"]

HISTORY_COLUMNS = ["epoch", "query", "kind", "rank", "index", "score"]


class PeriodicReports:
    """The reports of a fit: the last one, and the strongest examples of all of them. No report ends a fit.

    Attributes:
        last: The last report, or ``None``.
        history: The proponents and opponents of all reports: rows of :data:`HISTORY_COLUMNS`.
        active: Whether the current fit makes reports: no unexpected error has ended them.
    """

    def __init__(self) -> None:
        self.last: InfluenceReport | None = None
        self.history: list[list[Any]] = []
        self.active = True

    def make(self, epoch: int, ask: Callable[[], InfluenceReport]) -> bool:
        """Makes the report of an epoch and adds it to the history; if that fails, warns.

        Args:
            epoch: The epoch that has ended.
            ask: Returns the report.

        Returns:
            Whether there is a new report.

        Raises:
            RankError: The processes are out of step, or one has ended.
        """
        if not self.active:
            return False
        before, when = self.last, f"at the end of epoch {epoch}"
        try:
            with self.guard(when):
                self._add(epoch, ask())
        except (GIFError, OSError) as error:
            if isinstance(error, RankError) and error.raised_elsewhere is None:
                raise
            rank_zero_warn(f"No influence report {when}: {error}", category=GIFWarning)
        return self.last is not before

    def _add(self, epoch: int, report: InfluenceReport) -> None:
        self.last = report
        for kind, ranking in (("proponent", report.proponents()), ("opponent", report.opponents())):
            for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
                ranked = enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1)
                self.history += [[epoch, query, kind, rank, index, score] for rank, (index, score) in ranked]

    @contextlib.contextmanager
    def guard(self, when: str) -> Iterator[None]:
        """If an unexpected error is raised inside the block, in any of the processes, the reports of this fit end.

        Args:
            when: At what moment the block runs, for the warning.

        Raises:
            GIFError: As raised inside the block, unless it stands for an unexpected error of another process.
            OSError: As raised inside the block.
        """
        try:
            yield
        except Exception as error:
            if _is_expected(error):
                raise
            self.active = False
            rank_zero_warn(
                f"No influence report {when}, and none later in this fit: {type(error).__name__}: {error}. Training"
                " goes on unchanged. Call `trainer.influence(query)` to see where the error comes from.",
                category=GIFWarning,
            )


def _is_expected(error: Exception) -> bool:
    """Whether an error is one of this package or of a file, here or in the process that raised it."""
    elsewhere = error.raised_elsewhere if isinstance(error, RankError) else None
    return issubclass(elsewhere or type(error), (GIFError, OSError))
