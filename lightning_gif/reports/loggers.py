"""How a logger gets a report: by what it can do, never by which package it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["log_scalars", "log_table"]


def log_scalars(loggers: Iterable[Any], values: Mapping[str, Any], *, prefix: str, step: int) -> None:
    """Gives every logger the numbers among ``values`` as ``prefix/name``; other values and NaN are left out."""
    numbers = {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    for logger in loggers:
        logger.log_metrics(numbers, step=step)


def log_table(loggers: Iterable[Any], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Gives a table to the loggers that take one (``WandbLogger.log_table``). Arrays become pictures.

    No step is passed: W&B orders by its own counter, and refuses a step below one it has seen.
    """
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key=key, columns=list(columns), data=[[_cell(value) for value in row] for row in rows])


def _cell(value: Any) -> Any:
    if hasattr(value, "__array_interface__"):
        import wandb  # only a logger that is W&B's gets here, so the user has it loaded

        return wandb.Image(value)
    return value
