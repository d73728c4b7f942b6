"""Logging of reports. What a logger gets depends on its methods.

The exceptions are histograms and pictures of W&B, which are objects of its package: only its own runs get them.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .._compat import rank_zero_warn
from ..errors import GIFWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_eigenvalues", "log_figure", "log_histogram", "log_scalars", "log_table", "log_text", "running"]


_SMALLEST_SHOWN = 64

_BINS = 64


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
    for logger in loggers:
        logger.log_metrics(numbers, step=step)
        _write_out(logger)


def log_table(loggers: Iterable[Any], key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Logs a table to the loggers that have ``log_table``, such as ``WandbLogger``. Arrays become images for W&B.

    No step is passed, because W&B has its own counter and rejects a step below an earlier one.

    Args:
        loggers: Lightning loggers.
        key: The name of the table.
        columns: The names of the columns.
        rows: The rows, with one value for each column. They are not computed if no logger supports tables.
    """
    takers = [logger for logger in loggers if hasattr(logger, "log_table")]
    table = [list(row) for row in rows] if takers else []
    for logger in takers:
        data = [[_picture(value) for value in row] for row in table] if _is_wandb(logger) else table
        logger.log_table(key=key, columns=list(columns), data=[list(row) for row in data])


def log_histogram(loggers: Iterable[Any], key: str, values: Tensor, *, step: int) -> None:
    """Logs a histogram of ``values`` to W&B, and to the loggers that have a writer with ``add_histogram``."""
    for logger in loggers:
        if _is_wandb(logger):
            import wandb  # the user has it loaded

            counts = np.histogram(values.numpy(), bins=_BINS)
            logger.log_metrics({key: wandb.Histogram(np_histogram=counts)})
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


def log_eigenvalues(loggers: Iterable[Any], prefix: str, curvature: Mapping[str, Any]) -> None:
    """Logs the extreme eigenvalues, if they were computed, to the loggers that have ``log_table``."""
    rows = [
        [end, rank, value]
        for end in ("largest", "smallest")
        for rank, value in enumerate(curvature.get(end, ()), start=1)
    ]
    if rows:
        log_table(loggers, f"{prefix}/eigenvalues", ["end", "rank", "eigenvalue"], rows)


def _picture(value: Any) -> Any:
    """A picture of W&B in place of an array; any other value as it is."""
    if hasattr(value, "__array_interface__"):
        import wandb  # a logger with log_table is W&B's, so wandb is installed

        factor = -(-_SMALLEST_SHOWN // min(value.shape[:2]))  # tables do not enlarge small images
        return wandb.Image(value.repeat(factor, axis=0).repeat(factor, axis=1))
    return value


def _is_wandb(logger: Any) -> bool:
    """Whether a logger logs to a run of W&B, which takes W&B's own objects. It is not imported for that."""
    run = type(getattr(logger, "experiment", None))
    return any(base.__module__.partition(".")[0] == "wandb" for base in run.__mro__)


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
