"""Predicted and measured changes of queries when examples are left out of a recorded run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..storage.schema import restored
from .lds import spearman

__all__ = ["LeaveOuts"]


# On the trainings of benchmarks/README.md, "Scores through training", the correlation without 5 % of the examples was
# 0.92 to 0.95 above the first smoothness, 0.24 to 0.66 between the two, and 0.19 to 0.37 below the second.
_SMOOTH, _ROUGH = 0.9, 0.5

# With fewer replays, a correlation says little.
_ENOUGH = 10


@dataclass(frozen=True)
class LeaveOuts:
    """Replays of a recorded run without some random training examples, and what the scores predict for them.

    Attributes:
        share: The share of the training examples that each replay leaves out.
        predicted: The sums of the scores of the examples that are left out, ``(n_queries, n_replays)`` in float64.
        measured: How much the query's measurement at the end of the replay differs from that of the run, in the same
            shape.
        smoothness: For each replay, how far the weights at its end go the same way in two steps: as the weight of the
            examples goes from 1 to 1/2, and from 1/2 to 0. It is 1 if all do, and 0 if as many do as do not. The
            weights of the model count by the size of their change (metasmoothness, arXiv 2503.13751, definition 2).
    """

    share: float
    predicted: Tensor
    measured: Tensor
    smoothness: list[float]

    @property
    def correlation(self) -> float | None:
        """Spearman's correlation of predicted and measured changes over the replays, averaged over the queries.

        ``None`` for fewer than three replays.
        """
        if self.measured.shape[1] < 3:
            return None
        return float(spearman(self.predicted, self.measured, dim=1).mean())

    @property
    def mean_smoothness(self) -> float:
        """The mean of :attr:`smoothness`."""
        return sum(self.smoothness) / len(self.smoothness)

    @property
    def verdict(self) -> str:
        """Whether scores predict the run, in words, and which correlation to expect of predicted and real changes."""
        smooth = self.mean_smoothness
        if smooth >= _SMOOTH:
            return "this run is smooth: the scores should predict it, with a correlation of about 0.9"
        if smooth >= _ROUGH:
            return "this run is smooth in part: the scores should predict it with a correlation of 0.2 to 0.7"
        return (
            "this run is not smooth: the scores do not predict it. Expect a correlation below 0.4, and use the"
            " default influence, without `through`"
        )

    def __str__(self) -> str:
        found = self.correlation
        few = ", which is uncertain with so few replays" if len(self.smoothness) < _ENOUGH else ""
        measured = "" if found is None else f", correlation of predicted and measured changes {found:.2f}{few}"
        count = len(self.smoothness)
        replays = f"{count} {'replay' if count == 1 else 'replays'} without {self.share:.0%} of the examples"
        return f"{self.verdict} (smoothness {self.mean_smoothness:.2f}{measured}; {replays})"

    def summary(self) -> dict[str, float]:
        """The test in plain numbers."""
        found = self.correlation
        return {"smoothness": self.mean_smoothness, **({} if found is None else {"leave_out_correlation": found})}

    def record(self) -> dict[str, Any]:
        """All fields as plain values."""
        changes = {"predicted": self.predicted.tolist(), "measured": self.measured.tolist()}
        return {"share": self.share, **changes, "smoothness": self.smoothness}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """The object of a :meth:`record`.

        Raises:
            LookupError, TypeError, ValueError: If it is no such record.
        """
        predicted, measured = (
            torch.tensor(restored(list[list[float]], record[name], name), dtype=torch.float64)
            for name in ("predicted", "measured")
        )
        smoothness = restored(list[float], record["smoothness"], "smoothness")
        if predicted.shape != measured.shape or predicted.shape[1:] != (len(smoothness),) or not smoothness:
            raise ValueError("the replays do not fit together")
        return cls(restored(float, record["share"], "share"), predicted, measured, smoothness)
