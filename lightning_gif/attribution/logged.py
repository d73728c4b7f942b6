"""What an influence report gives to loggers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reporting.contents import Contents, Files, Table, numbers_of
from .display import rows, text
from .groups import group_scores
from .picture import draw
from .record import InfluenceRecord

__all__ = ["contents", "prefix_of"]


# The number of scores, evenly spaced, that a logged histogram is computed from. All scores would give the same picture.
_IN_HISTOGRAM = 2**22

_DRAWN = ("score_max", "score_min", "agreement")


def prefix_of(record: InfluenceRecord) -> str:
    """The start of the keys of a report. Scores of self-influence are other numbers, so they have keys of their own."""
    return "gif_self_influence" if record.is_self_influence else "gif_influence"


def contents(record: InfluenceRecord, section: str, save: Callable[[Path], None]) -> Contents:
    """The contents of a report for loggers.

    Args:
        record: The report.
        section: The start of the keys.
        save: Writes the report into a folder.
    """
    drawn, others = numbers_of(record.summary(), _DRAWN)
    every = max(record.scores.numel() // _IN_HISTOGRAM, 1)
    groups = _by_class(record)
    return Contents(
        section,
        record.context.global_step,
        points=[drawn],
        settings=record.settings,
        diagnostics={**others, **_curves(record)},
        text=text(record),
        draw=lambda: draw(record),
        tables={"examples": _examples(record), **({} if groups is None else {"by_class": groups})},
        histograms={"scores": record.scores[:, ::every]},
        files=Files(
            "influence-report",
            "influence",
            record.scores.nbytes,
            save,
            {"name": record.name, "global_step": record.context.global_step, "epoch": record.context.epoch},
        ),
    )


def _curves(record: InfluenceRecord) -> dict[str, float]:
    """The residual after each iteration of the solve, and the extreme eigenvalues if they were computed."""
    residuals = [] if record.solution is None else list(record.solution.residuals)
    found = {f"residual_after_{iteration}": value for iteration, value in enumerate(residuals)}
    for end in ("largest", "smallest"):
        found |= {f"{end}_eigenvalue_{rank}": value for rank, value in enumerate(record.curvature.get(end, ()), 1)}
    return found


def _examples(record: InfluenceRecord) -> Table:
    """The queries with their proponents and opponents."""
    bounds = [] if record.standard_errors is None else ["low", "high"]
    columns = ["epoch", "name", "query", "kind", "rank", "index", "score", *bounds, "target", "predicted", "example"]
    asked, table = _read_as(record), []
    for row in rows(record):
        kind, rank, index = row[1:4]
        predicted = asked[rank - 1] if kind == "query" else record.context.predicted.get(index)
        table.append([record.context.epoch, record.name, *row[:-1], predicted, row[-1]])
    return Table(columns, table)


def _read_as(record: InfluenceRecord) -> list[Any]:
    """What the model predicts for each shown query: a label, or a number; ``None`` if it is not known."""
    found = record.predictions
    if found is None:
        return [None] * len(record.queries)
    return found[:, 0].tolist() if found.shape[1] == 1 else found.argmax(1).tolist()


def _by_class(record: InfluenceRecord) -> Table | None:
    """The sums of the scores of each class, averaged over the queries; ``None`` if they are not known."""
    if record.labels is None:
        return None
    groups = group_scores(record.labels.tolist(), record.scores.mean(0), "", record.context.class_names)
    columns = groups.totals.tolist(), groups.counts.tolist(), groups.means.tolist()
    body = [list(row) for row in zip(groups.shown_names, *columns, strict=True)]
    return Table(["class", "total", "examples", "mean"], body, bars=("class", "total"))
