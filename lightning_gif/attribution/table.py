"""The scores of a report as a table, with what is known about each training example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .groups import import_pandas
from .record import InfluenceRecord

if TYPE_CHECKING:
    import pandas

__all__ = ["table_of"]


def table_of(report: InfluenceRecord, **known: Mapping[int, Any] | None) -> pandas.DataFrame:
    """The table, see :meth:`~lightning_gif.InfluenceReport.to_dataframe`.

    Args:
        report: The scores.
        **known: Columns with a value for each dataset index; without values there is no column.
    """
    queries, columns = report.scores.shape
    indices = report.indices.expand(queries, -1)
    table: dict[str, Any] = {
        "query": torch.arange(queries).repeat_interleave(columns).numpy(),
        "index": indices.flatten().numpy(),
        "score": report.scores.flatten().numpy(),
        "rank": _ranks(report).flatten().numpy(),
    }
    if not report.is_self_influence:
        table["kind"] = [_kind(score) for score in report.scores.flatten().tolist()]
    for name, values_of in known.items():
        if values_of is not None and any(value is not None for value in values_of.values()):
            table[name] = [values_of[index] for index in indices.flatten().tolist()]
    if report.losses is not None:
        table["loss"] = report.losses.expand(queries, -1).flatten().numpy()
    if report.standard_errors is not None:
        low, high = report.intervals()
        ends = {"standard_error": report.standard_errors, "low": low, "high": high}
        table |= {name: values.flatten().numpy() for name, values in ends.items()}
    below = report.innermost_indices()
    if below is not None:
        table["innermost_index"] = below.expand(queries, -1).flatten().numpy()
    return import_pandas().DataFrame(table)


def _ranks(report: InfluenceRecord) -> Tensor:
    """The rank of each score among all training examples, of which 1 is the highest score."""
    queries, columns = report.scores.shape
    if report.n_kept is not None:  # the highest and the lowest scores, in descending order
        kept = report.n_kept
        ends = torch.cat([torch.arange(1, kept + 1), torch.arange(report.n_train - kept + 1, report.n_train + 1)])
        return ends.expand(queries, -1)
    order = report.scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(1, columns + 1).expand(queries, -1)
    return torch.empty_like(order).scatter(1, order, ranks)


def _kind(score: float) -> str | None:
    return "proponent" if score > 0 else "opponent" if score < 0 else None
