"""How a logger gets a report: by what it can do, never by which package it came from."""

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
    """The loggers without those whose run is finished, each of which is warned about.

    A finished W&B run refuses what it is given, and starting another one is not for a report to decide.
    """
    found = []
    for logger in loggers:
        run = getattr(logger, "experiment", None)
        # W&B has no public name for it; under another one its refusal would be raised, or warned of by the callback. A
        # dummy experiment has every attribute, but none that is True.
        if getattr(run, "_is_finished", False) is True:
            rank_zero_warn(
                f"{type(logger).__name__} did not take the report: its run {getattr(run, 'id', '')} is finished, and no"
                " new one is started. Ask before the run is finished, or log it to another: report.log([logger]) with a"
                " logger whose run goes on.",
                category=GIFWarning,
            )
        else:
            found.append(logger)
    return found


def log_scalars(loggers: Iterable[Any], values: Mapping[str, Any], *, prefix: str, step: int) -> None:
    """Gives every logger the numbers among ``values`` as ``prefix/name``; other values and NaN are left out.

    As all of these functions do, it tells each logger to write at once: loggers write what they hold at the end of
    ``fit``, and reports are mostly made after it.
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
    """Gives a table to the loggers that have ``log_table``, as ``WandbLogger`` does. Arrays become pictures.

    No step is passed: W&B orders by its own counter, and refuses a step below one it has seen.

    Args:
        loggers: Lightning loggers.
        key: Its name.
        columns: The names of the columns.
        rows: A value for each column; not looked at where no logger takes them.
    """
    takers = [logger for logger in loggers if _takes_tables(logger)]
    table = [list(row) for row in rows] if takers else []
    for logger in takers:
        logger.log_table(key=key, columns=list(columns), data=[[_cell(value) for value in row] for row in table])


def log_histogram(loggers: Iterable[Any], key: str, values: Tensor, *, step: int) -> None:
    """Gives all ``values`` as a histogram to the loggers that take tables or whose writer takes histograms."""
    for logger in loggers:
        if _takes_tables(logger):
            import wandb  # only a logger that is W&B's gets here, so the user has it loaded

            counts = np.histogram(values.numpy(), bins=_BINS)
            logger.log_metrics({key: wandb.Histogram(np_histogram=counts)})
    for logger, add_histogram in _writers(loggers, "add_histogram"):
        add_histogram(key, values, step)
        _write_out(logger)


def log_text(loggers: Iterable[Any], key: str, text: str, *, step: int) -> None:
    """Gives a text, line by line as it is, to the loggers whose writer takes Markdown, as TensorBoard's does."""
    for logger, add_text in _writers(loggers, "add_text"):
        add_text(key, textwrap.indent(text, "    "), step)  # four spaces: Markdown keeps the lines
        _write_out(logger)


def log_figure(loggers: Iterable[Any], key: str, draw: Callable[[], Figure], *, step: int) -> None:
    """Gives a figure to the loggers whose writer takes one, as TensorBoard's does. Drawn only where it is taken.

    Without matplotlib nothing is drawn: a report is logged without being asked for, and should not need it.
    """
    takers = list(_writers(loggers, "add_figure"))
    if takers and importlib.util.find_spec("matplotlib") is not None:
        made = draw()
        for logger, add_figure in takers:
            add_figure(key, made, step)
            _write_out(logger)


def log_eigenvalues(loggers: Iterable[Any], prefix: str, curvature: Mapping[str, Any]) -> None:
    """Gives the ends of the spectrum to the loggers that take tables, where they were asked for."""
    rows = [
        [end, rank, value]
        for end in ("largest", "smallest")
        for rank, value in enumerate(curvature.get(end, ()), start=1)
    ]
    if rows:
        log_table(loggers, f"{prefix}/eigenvalues", ["end", "rank", "eigenvalue"], rows)


def _cell(value: Any) -> Any:
    if hasattr(value, "__array_interface__"):
        import wandb  # as above

        factor = -(-_SMALLEST_SHOWN // min(value.shape[:2]))  # tables show a picture at its own size, or smaller
        return wandb.Image(value.repeat(factor, axis=0).repeat(factor, axis=1))
    return value


def _takes_tables(logger: Any) -> bool:
    return hasattr(logger, "log_table")


def _writers(loggers: Iterable[Any], method: str) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The loggers whose experiment has a method, each with it."""
    for logger in loggers:
        found = getattr(getattr(logger, "experiment", None), method, None)
        if callable(found):
            yield logger, found


def _write_out(logger: Any) -> None:
    if hasattr(logger, "save"):
        logger.save()
    flush = getattr(getattr(logger, "experiment", None), "flush", None)  # TensorBoard's writer keeps a queue
    if callable(flush):
        flush()
