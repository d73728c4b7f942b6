"""Both ends of the ranking of a query, as texts and pictures of a report show them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .record import InfluenceRecord
from .uncertainty import Intervals

__all__ = ["End", "ends_of", "measured", "owner"]


class End(NamedTuple):
    """One end of the ranking of each query, strongest first.

    Attributes:
        indices: Dataset indices, ``(n_queries, k)``.
        scores: Their scores.
        intervals: The intervals of the scores; ``None`` if there are none.
    """

    indices: Tensor
    scores: Tensor
    intervals: Intervals | None

    @classmethod
    def of(cls, record: InfluenceRecord, k: int | None = None, *, largest: bool) -> End:
        """The examples with the highest or the lowest scores; arguments as for ``record.proponents``."""
        columns = record.columns_of_end(k, largest=largest)
        indices, scores = record.at_columns(columns)
        errors = record.standard_errors
        return cls(indices, scores, None if errors is None else record.intervals_of(scores, errors.gather(1, columns)))

    def amounts(self, query: int, *, brackets: bool = False) -> list[str]:
        """The scores of a query as text: ``"+0.0021 ± 0.0004"``, with a mark if the interval contains 0."""
        scores = self.scores[query].tolist()
        if self.intervals is None:
            texts, marks = [f"{score:+.2g}" for score in scores], [""] * len(scores)
        else:
            halves = (self.intervals.high - self.intervals.low)[query].div(2).tolist()
            texts = [f"{score:+.2g} ± {half:.2g}" for score, half in zip(scores, halves, strict=True)]
            marks = ["?" if uncertain else "" for uncertain in self.intervals.hold_zero[query].tolist()]
        return [f"({text}){mark}" if brackets else f"{text}{mark}" for text, mark in zip(texts, marks, strict=True)]


def ends_of(record: InfluenceRecord, k: int | None = None) -> dict[str, End]:
    """Both ends of the ranking by name. Self-influence has no query, so its ends are no proponents and opponents."""
    names = ("highest", "lowest") if record.is_self_influence else ("proponents", "opponents")
    ends = (End.of(record, k, largest=largest) for largest in (True, False))
    return dict(zip(names, ends, strict=True))


def owner(record: InfluenceRecord) -> str:
    """Whose measurement the scores are about."""
    return "its own" if record.is_self_influence else "the query's"


def measured(record: InfluenceRecord) -> str:
    """The name of what a query measures: "measurement" if the module defines one, else "loss"."""
    return "measurement" if record.settings.get("measures") == "influence_measurement" else "loss"
