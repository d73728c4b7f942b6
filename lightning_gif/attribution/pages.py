"""An influence report as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..reporting.charts import named
from ..reporting.contents import Table
from ..reporting.page import Coloured, Page
from .display import text
from .ends import End, ends_of, measured, owner
from .picture import draw, headline, sums_by_class
from .record import MOST_QUERIES, InfluenceRecord

__all__ = ["page_of"]


def page_of(record: InfluenceRecord, *, whole: bool) -> Page:
    """The content of a report as HTML: of the first query, or of up to eight."""
    queries = range(min(len(record.scores), MOST_QUERIES) if whole else 1)
    lead = (
        f"{record.n_train} training examples were scored. A score is the predicted change of {owner(record)}"
        f" {measured(record)} if the training example were removed."
    )
    return Page(
        "Self-influence report" if record.is_self_influence else "Influence report",
        lead,
        [(headline(record, query), partial(draw, record, query)) for query in queries],
        dict(table for query in queries for table in _tables(record, query)),
        details=text(record),
    )


def _tables(record: InfluenceRecord, query: int) -> Iterator[tuple[str, Table]]:
    """The ends of the ranking of a query, and its sums by class, each with its heading."""
    of = f" of query {query}" if len(record.scores) > 1 else ""
    for name, end in ends_of(record).items():
        rows = list(_rows(record, end, query))
        columns = ["rank", "index", "label", "score", "example"]
        if not any(row[-1] for row in rows):  # all have pictures, which are above
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        yield name.capitalize() + of, Table(columns, rows)
    sums = sums_by_class(record, query)
    if sums is not None:
        names, means = record.context.class_names, record.is_self_influence
        values = (sums.means if means else sums.totals).tolist()
        rows = [
            [named(label, names), f"{value:+.3g}", count]
            for label, value, count in zip(sums.names, values, sums.counts.tolist(), strict=True)
        ]
        heading = f"{'Mean score' if means else 'Sum of scores'} by class{of}"
        yield heading, Table(["class", "score", "examples"], rows)


def _rows(record: InfluenceRecord, end: End, query: int) -> Iterator[list[object]]:
    for rank, (index, amount) in enumerate(zip(end.indices[query].tolist(), end.amounts(query), strict=True), 1):
        shown = record.shown(index)
        label = None if shown.label is None else named(shown.label, record.context.class_names)
        text: object = None if shown.image is not None else shown.text
        if index in record.train_tokens:
            tokens = [(token, scores[query]) for token, scores in record.train_tokens[index]]
            marked = any(token.startswith(("Ġ", "▁")) for token, _ in tokens)
            text = Coloured(tokens, "" if marked else " ")
        yield [rank, index, label, amount, text]
