"""How a logger gets a report: by what it can do, never by which package it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["log_eigenvalues", "log_scalars", "log_table", "takes_tables"]

_SMALLEST_SHOWN = 64


def log_scalars(loggers: Iterable[Any], values: Mapping[str, Any], *, prefix: str, step: int) -> None:
    """Gives every logger the numbers among ``values`` as ``prefix/name``; other values and NaN are left out.

    Loggers write what they hold at the end of ``fit``, and reports are mostly made after it, so each logger is told to
    write at once.
    """
    numbers = {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    for logger in loggers:
        logger.log_metrics(numbers, step=step)
        if hasattr(logger, "save"):
            logger.save()
        flush = getattr(getattr(logger, "experiment", None), "flush", None)  # TensorBoard's writer keeps a queue
        if callable(flush):
            flush()


def takes_tables(logger: Any) -> bool:
    """Whether a logger has ``log_table``, as ``WandbLogger`` does."""
    return hasattr(logger, "log_table")


def log_table(loggers: Iterable[Any], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Gives a table to the loggers that take one. Arrays become pictures.

    No step is passed: W&B orders by its own counter, and refuses a step below one it has seen.
    """
    for logger in filter(takes_tables, loggers):
        logger.log_table(key=key, columns=list(columns), data=[[_cell(value) for value in row] for row in rows])


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
        import wandb  # only a logger that is W&B's gets here, so the user has it loaded

        factor = -(-_SMALLEST_SHOWN // min(value.shape[:2]))  # tables show a picture at its own size, or smaller
        return wandb.Image(value.repeat(factor, axis=0).repeat(factor, axis=1))
    return value
