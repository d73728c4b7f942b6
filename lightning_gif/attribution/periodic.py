"""Influence reports during ``fit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._compat import rank_zero_warn
from ..errors import GIFError, GIFWarning, RankError
from ..reporting.contents import Contents, Table, section_of
from ..reporting.loggers import log_to_each
from .report import InfluenceReport

__all__ = ["HISTORY_COLUMNS", "PeriodicReports"]

HISTORY_COLUMNS = ["epoch", "name", "query", "kind", "rank", "index", "score"]


class PeriodicReports:
    """The influence reports of a fit. A report that fails does not end the fit.

    Attributes:
        last: The last report, or ``None``.
        history: The proponents and opponents of all reports, as rows with the columns :data:`HISTORY_COLUMNS`.
        active: Whether the current fit computes reports; false after a failed check or an unexpected error.
    """

    def __init__(self) -> None:
        self.last: InfluenceReport | None = None
        self.history: list[list[Any]] = []
        self.active = True

    def start(self, check: Callable[[], None]) -> None:
        """Starts the reports of a fit. If their check fails, it warns, and there are none in this fit.

        Args:
            check: Checks the query and the training data.

        Raises:
            RankError: If the processes are out of step, or one has ended.
        """
        self.active = True
        try:
            with self.guard("before training"):
                check()
        except (GIFError, OSError) as error:
            _raise_if_out_of_step(error)
            self.active = False
            rank_zero_warn(
                f"No influence reports in this fit, which goes on unchanged: {error} Correct `query`, the training"
                " loader or `report_options`, or omit `report_every_n_epochs`.",
                category=GIFWarning,
            )

    def make(self, epoch: int, ask: Callable[[], InfluenceReport]) -> bool:
        """Computes the report of an epoch and adds it to the history. If that fails, it warns.

        Args:
            epoch: The epoch that has ended.
            ask: Computes the report.

        Returns:
            Whether there is a new report.

        Raises:
            RankError: If the processes are out of step, or one has ended.
        """
        if not self.active:
            return False
        before, when = self.last, f"at the end of epoch {epoch}"
        try:
            with self.guard(when):
                self._add(epoch, ask())
        except (GIFError, OSError) as error:
            _raise_if_out_of_step(error)
            rank_zero_warn(f"No influence report {when}: {error}", category=GIFWarning)
        return self.last is not before

    def _add(self, epoch: int, report: InfluenceReport) -> None:
        self.last = report
        for kind, ranking in (("proponent", report.proponents()), ("opponent", report.opponents())):
            for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
                ranked = enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1)
                self.history += [[epoch, report.name, query, kind, rank, i, score] for rank, (i, score) in ranked]

    def log_history(self, loggers: Iterable[Any], step: int) -> None:
        """Logs the history as a table, ``gif_influence/history``, with the name of the query if it has one.

        Args:
            loggers: Lightning loggers.
            step: The number of the trainer's optimizer steps.
        """
        name = None if self.last is None else self.last.name
        table = Table(HISTORY_COLUMNS, self.history)
        log_to_each(loggers, lambda: Contents(section_of("gif_influence", name), step, tables={"history": table}))

    @contextlib.contextmanager
    def guard(self, when: str) -> Iterator[None]:
        """A block in which an unexpected error of any process ends the reports of this fit, with a warning.

        Args:
            when: When the block runs, for the warning.

        Raises:
            GIFError: If the block raises it, and it does not report an unexpected error of another process.
            OSError: If the block raises it.
        """
        try:
            yield
        except Exception as error:
            if _is_expected(error):
                raise
            self.active = False
            rank_zero_warn(
                f"No influence report {when}, and none later in this fit: {type(error).__name__}:"
                f" {str(error).rstrip('.')}. Training goes on unchanged. Call `trainer.influence(query)` to see where"
                " the error comes from.",
                category=GIFWarning,
            )


def _raise_if_out_of_step(error: Exception) -> None:
    """Raises an error after which the processes cannot go on together; the caller handles all others."""
    if isinstance(error, RankError) and error.raised_elsewhere is None:
        raise error


def _is_expected(error: Exception) -> bool:
    """Whether an error is a ``GIFError`` or ``OSError``; for an error of another process, whether that one is."""
    elsewhere = error.raised_elsewhere if isinstance(error, RankError) else None
    return issubclass(elsewhere or type(error), (GIFError, OSError))
