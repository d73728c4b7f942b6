"""Logging of reports. What a logger gets depends on its methods, and for W&B and MLflow on their own modules."""

from __future__ import annotations

import importlib.util
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._compat import rank_zero_warn
from ..errors import GIFWarning
from . import to_mlflow, to_wandb
from .contents import Contents
from .pictures import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figure", "log_histogram", "log_scalars", "log_table", "log_text", "log_to_each", "running"]


def log_to_each(loggers: Iterable[Any], contents: Callable[[], Contents]) -> None:
    """Logs a report to each logger. A logger that fails is named in one warning, and the others get the report.

    Args:
        loggers: Lightning loggers.
        contents: Makes the contents, at most once, and only if there is a logger.
    """
    made: list[Contents] = []
    for logger in loggers:
        try:
            if running([logger]):
                made = made or [contents()]
                _log(logger, made[0])
        except Exception as error:
            rank_zero_warn(
                f"{type(logger).__name__} failed to log the report, which is not lost: {type(error).__name__}: {error}."
                " To try again, call `report.log([logger])`.",
                category=GIFWarning,
            )


def _log(logger: Any, contents: Contents) -> None:
    if to_wandb.takes(logger):
        to_wandb.log(logger, contents)
    elif to_mlflow.takes(logger):
        to_mlflow.log(logger, contents)
    else:
        _log_parts(logger, contents)


def _log_parts(logger: Any, contents: Contents) -> None:
    """Logs the parts that a logger has methods for, from the one that most loggers take."""
    section, step, one = contents.section, contents.step, [logger]
    writes = bool(list(_writers(one, "add_text")))
    for point in contents.points:
        log_scalars(one, point, prefix=section, step=step)
    if not writes and not hasattr(logger, "log_table"):
        log_scalars(one, contents.diagnostics, prefix=f"{section}/diagnostics", step=step)
    if contents.settings and writes:
        log_text(one, f"{section}/settings", json.dumps(contents.settings, indent=1, default=str), step=step)
    elif contents.settings and hasattr(logger, "log_hyperparams"):
        logger.log_hyperparams({section: dict(contents.settings)})
        _write_out(logger)
    if contents.text is not None:
        log_text(one, f"{section}/report", contents.text, step=step)
    for name, text in contents.state.items():
        log_text(one, f"{section}/{name}", text, step=step)
    for name, table in contents.all_tables().items():
        log_table(one, f"{section}/{name}", table.columns, table.rows)
        for _, add_text in _writers(one, "add_text"):
            add_text(f"{section}/{name}", markdown(table), step)
            _write_out(logger)
    for name, values in contents.histograms.items():
        log_histogram(one, f"{section}/{name}", values, step=step)
    if contents.draw is not None:
        log_figure(one, f"{section}/plot", contents.draw, step=step)


def running(loggers: Iterable[Any]) -> list[Any]:
    """The loggers whose run is not finished. Warns about each of the others.

    A finished W&B run accepts no new values, and a report should not start another run.
    """
    unfinished = []
    for logger in loggers:
        run = getattr(logger, "experiment", None)
        # W&B has no public attribute for this. If it renames this one, W&B's own error is raised, or is a warning of
        # the callback. ``is True``, because a dummy experiment has every attribute.
        if getattr(run, "_is_finished", False) is True:
            rank_zero_warn(
                f"{type(logger).__name__} did not log the report: its run {getattr(run, 'id', '')} is finished, and no"
                " new one is started. Compute the report before the run is finished, or log it to an open run:"
                " report.log([logger]).",
                category=GIFWarning,
            )
        else:
            unfinished.append(logger)
    return unfinished


def log_scalars(loggers: Iterable[Any], values: Mapping[str, Any], *, prefix: str, step: int) -> None:
    """Logs the finite numbers among ``values`` to every logger, as ``prefix/name``. Other values are left out.

    Each logger is flushed. Loggers flush at the end of ``fit`` on their own, but most reports are logged later.
    """
    numbers = {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    if not numbers:
        return
    for logger in loggers:
        logger.log_metrics(numbers, step=step)
        _write_out(logger)


def log_table(loggers: Iterable[Any], key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Logs a table to the loggers that have ``log_table``. Pictures stay arrays.

    Args:
        loggers: Lightning loggers.
        key: The name of the table.
        columns: The names of the columns.
        rows: The rows, with one value for each column. They are not computed if no logger supports tables.
    """
    takers = [logger for logger in loggers if hasattr(logger, "log_table")]
    table = [list(row) for row in rows] if takers else []
    for logger in takers:
        logger.log_table(key=key, columns=list(columns), data=[list(row) for row in table])


def log_histogram(loggers: Iterable[Any], key: str, values: Tensor, *, step: int) -> None:
    """Logs a histogram of ``values`` to the loggers that have a writer with ``add_histogram``."""
    for logger, add_histogram in _writers(loggers, "add_histogram"):
        add_histogram(key, values, step)
        _write_out(logger)


def log_text(loggers: Iterable[Any], key: str, text: str, *, step: int) -> None:
    """Logs a text with its line breaks to loggers whose experiment has ``add_text``, such as TensorBoard."""
    for logger, add_text in _writers(loggers, "add_text"):
        add_text(key, textwrap.indent(text, "    "), step)  # Markdown keeps the line breaks of indented text
        _write_out(logger)


def log_figure(loggers: Iterable[Any], key: str, draw: Callable[[], Figure], *, step: int) -> None:
    """Logs a figure to loggers whose experiment has ``add_figure``, such as TensorBoard.

    The figure is drawn only if there is one of these loggers. Without matplotlib nothing is drawn, because reports are
    logged automatically and matplotlib is optional.
    """
    takers = list(_writers(loggers, "add_figure"))
    if takers and importlib.util.find_spec("matplotlib") is not None:
        drawn = draw()
        for logger, add_figure in takers:
            add_figure(key, drawn, step)
            _write_out(logger)


def _writers(loggers: Iterable[Any], method: str) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yields the loggers whose experiment has a method, each with this method."""
    for logger in loggers:
        write = getattr(getattr(logger, "experiment", None), method, None)
        if callable(write):
            yield logger, write


def _write_out(logger: Any) -> None:
    if hasattr(logger, "save"):
        logger.save()
    flush = getattr(getattr(logger, "experiment", None), "flush", None)  # TensorBoard's writer keeps a queue
    if callable(flush):
        flush()
