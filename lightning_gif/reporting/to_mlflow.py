"""Logging to MLflow. Texts, figures, tables and files become artifacts of the run."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .contents import Contents
from .page import Page
from .pictures import has_pictures, plain

__all__ = ["log", "takes"]

_BINS = 64


def takes(logger: Any) -> bool:
    """Whether a logger is Lightning's ``MLFlowLogger``. Neither it nor MLflow is imported for that."""
    return any(base.__name__ == "MLFlowLogger" for base in type(logger).__mro__)


def log(logger: Any, contents: Contents) -> None:
    """Logs a report to the run of a logger.

    Settings are an artifact and not parameters of the run, because MLflow does not let a parameter change.

    Args:
        logger: An ``MLFlowLogger``.
        contents: The report.
    """
    client, run, section = logger.experiment, logger.run_id, contents.section
    for point in contents.points:
        finite = {f"{section}/{name}": float(value) for name, value in point.items() if math.isfinite(value)}
        logger.log_metrics(finite, step=contents.step)
    at = contents.points[-1].get(contents.axis, contents.step) if contents.points else contents.step
    folder = f"{section}/{contents.axis}-{int(at)}"
    for name, text in contents.state.items():
        client.set_tag(run, f"{section}/{name}", text)
    if contents.settings:
        client.log_dict(run, _jsonable(contents.settings), f"{folder}/settings.json")
    if contents.text is not None:
        client.log_text(run, contents.text, f"{folder}/report.txt")
    for name, table in contents.all_tables().items():
        columns = {column: [plain(row[i]) for row in table.rows] for i, column in enumerate(table.columns)}
        client.log_dict(run, _jsonable(columns), f"{folder}/{name}.json")
        if has_pictures(table):
            client.log_text(run, Page(name, tables={"": table}).document(), f"{folder}/{name}.html")
    for name, values in contents.histograms.items():
        counts, edges = np.histogram(values.numpy(), bins=_BINS)
        client.log_dict(run, {"counts": counts.tolist(), "edges": edges.tolist()}, f"{folder}/{name}.json")
    if contents.draw is not None and importlib.util.find_spec("matplotlib") is not None:
        client.log_figure(run, contents.draw(), f"{folder}/plot.png")
    if contents.files is not None:
        with tempfile.TemporaryDirectory() as temporary:
            contents.files.write(Path(temporary) / contents.files.name)
            client.log_artifacts(run, temporary, folder)


def _jsonable(value: Any) -> Any:
    """Plain values in place of others, such as names that are members of an enumeration."""
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
