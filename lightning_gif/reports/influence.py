"""What ``trainer.influence`` gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import Examples, map_tensors
from ..parameters import Targets
from ..solvers import Solution
from .loggers import log_scalars, log_table
from .pictures import figure, image_of, label_of, show_item

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["InfluenceReport", "Ranking"]


class Ranking(NamedTuple):
    """The ends of a ranking of training examples.

    Attributes:
        indices: Dataset indices, ``(n_queries, k)``, strongest first.
        scores: Their scores, ``(n_queries, k)``.
    """

    indices: Tensor
    scores: Tensor


@dataclass
class InfluenceReport:
    """A score for every training example and query.

    A score is the predicted change of the query's measurement (by default its mean loss), in that measurement's own
    unit, if this training example were removed. Positive: removing it raises the query's loss, so the example is a
    *proponent* of what the model does there. Negative: removing it lowers the loss, an *opponent*.

    Attributes:
        scores: ``(n_queries, n_train)``, float64; one query unless ``per_example=True``.
        indices: The dataset index of each column, ``(n_train,)``.
        solutions: How each query's solve went, ``n_queries`` of them.
        targets: The target parameters that the scores are about.
        k: How many proponents and opponents are shown and logged.
        dataset: The training dataset, for looking at examples.
        queries: Up to eight of the query's examples as items, prepared, on the CPU.
        settings: Method, solver and their parameters.
        seconds: Wall time of the whole call.
    """

    scores: Tensor = field(repr=False)
    indices: Tensor = field(repr=False)
    solutions: list[Solution]
    targets: Targets
    k: int
    dataset: Any = field(repr=False)
    queries: list[Any] = field(repr=False)
    settings: dict[str, Any]
    seconds: float
    loggers: Sequence[Any] = field(default=(), repr=False)
    global_step: int = field(default=0, repr=False)

    @property
    def solution(self) -> Solution:
        """How the solve went; with several queries the one with the largest residual."""
        return max(self.solutions, key=lambda solution: solution.residual)

    def proponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the highest scores: without them the query's loss would be higher."""
        return self._top(k, largest=True)

    def opponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the lowest scores: without them the query's loss would be lower."""
        return self._top(k, largest=False)

    def _top(self, k: int | None, *, largest: bool) -> Ranking:
        count = min(self.k if k is None else k, self.scores.shape[1])
        if count < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        found = self.scores.topk(count, dim=1, largest=largest)
        return Ranking(self.indices[found.indices], found.values)

    def to_dataframe(self) -> pandas.DataFrame:
        """All scores as a table with columns ``query``, ``index`` (of the dataset) and ``score``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_dataframe() needs pandas: pip install pandas.") from error
        queries, examples = self.scores.shape
        return pandas.DataFrame(
            {
                "query": torch.arange(queries).repeat_interleave(examples).numpy(),
                "index": self.indices.repeat(queries).numpy(),
                "score": self.scores.flatten().numpy(),
            }
        )

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers and strings."""
        return {
            "n_queries": self.scores.shape[0],
            "n_train": self.scores.shape[1],
            "n_targets": self.targets.count,
            "score_max": float(self.scores.max()),
            "score_min": float(self.scores.min()),
            "seconds": self.seconds,
            **{f"solve_{name}": value for name, value in self.solution.summary().items()},
        }

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str = "gif/influence") -> None:
        """Logs the report: numbers to every logger; to W&B also tables of the ranking and of the solve's curve.

        Args:
            loggers: Lightning loggers; by default those of the trainer that was asked.
            prefix: Start of every key.
        """
        loggers = list(self.loggers if loggers is None else loggers)
        log_scalars(loggers, self.summary(), prefix=prefix, step=self.global_step)
        if any(hasattr(logger, "log_table") for logger in loggers):
            columns = ["query", "kind", "rank", "index", "score", "target", "example"]
            log_table(loggers, f"{prefix}/examples", columns, list(self._rows()))
            curve = list(enumerate(self.solution.residuals))
            log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], curve)

    def _rows(self) -> Iterable[list[Any]]:
        for kind, ranking in (("proponent", self.proponents()), ("opponent", self.opponents())):
            for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
                for rank, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1):
                    item = self.dataset[index]
                    yield [query, kind, rank, index, score, label_of(item), image_of(item)]

    def plot(self, query: int = 0, k: int | None = None) -> Figure:
        """The query's strongest proponents and opponents, and the histogram of all scores.

        Args:
            query: Which query.
            k: How many of each; by default up to 8.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        count = min(k or min(self.k, 8), self.scores.shape[1])
        made, axes = figure(3, count + 1, width=1.3 * (count + 1), height=5.2)
        for row, (kind, ranking) in enumerate(
            (("proponents", self.proponents(count)), ("opponents", self.opponents(count)))
        ):
            if self.scores.shape[0] == 1:
                shown, what = self.queries[0], "query" if len(self.queries) == 1 else "query (first)"
            else:
                shown, what = (self.queries[query] if query < len(self.queries) else None), f"query {query}"
            first = axes[row][0]
            if shown is not None and row == 0:
                show_item(first, shown, f"{what}\ntarget {label_of(shown)}")
            else:
                first.set_axis_off()
            first.text(-0.1, 0.5, kind, rotation=90, va="center", ha="right", transform=first.transAxes)
            for position in range(count):
                index, score = int(ranking.indices[query, position]), float(ranking.scores[query, position])
                item = self.dataset[index]
                show_item(axes[row][position + 1], item, f"#{index}: {label_of(item)}\n{score:+.2g}")
        grid = axes[2][0].get_gridspec()
        for axis in axes[2]:
            axis.remove()
        histogram = made.add_subplot(grid[2, :])
        histogram.hist(self.scores[query].numpy(), bins=80, log=True)
        histogram.set_xlabel("score: predicted change of the query's loss if the example were removed")
        histogram.set_ylabel("examples")
        return made

    def __str__(self) -> str:
        queries, examples = self.scores.shape
        solution = self.solution
        lines = [
            f"Influence of {examples} training examples on {queries} quer{'y' if queries == 1 else 'ies'}"
            f" ({self.settings['method']}, {self.targets.count} target parameters; {solution.solver}"
            f" {solution.status} after {solution.iterations} steps, residual {solution.residual:.1e};"
            f" {self.seconds:.1f} s)",
            "score = predicted change of the query's loss if the example were removed",
        ]
        for kind, ranking in (("proponents", self.proponents()), ("opponents", self.opponents())):
            first = zip(ranking.indices[0].tolist(), ranking.scores[0].tolist(), strict=True)
            lines.append(f"{kind}: " + ", ".join(f"{index} ({score:+.2g})" for index, score in first))
        return "\n".join(lines)


def first_items(query: Examples, most: int = 8) -> list[Any]:
    """Up to ``most`` of a query's examples on the CPU, without their batch dimension."""
    batch = next(query.batches())

    def item(position: int) -> Any:
        return map_tensors(batch.data, lambda tensor: tensor[position].detach().cpu() if tensor.ndim else tensor)

    return [item(position) for position in range(min(most, batch.size))]
