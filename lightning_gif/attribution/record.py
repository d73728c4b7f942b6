"""The record of an influence report: the scores, what they were computed with, and how examples are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from .._compat import isolate_rng
from ..config import check_count
from ..errors import ConfigurationError
from ..parameters import Targets
from ..reporting.context import CallContext
from ..reporting.previews import Shown
from ..solvers import Solution
from ..storage.schema import restored
from .ranking import Ranking, strongest

__all__ = ["MOST_QUERIES", "InfluenceRecord"]


MOST_QUERIES = 8
"""How many queries are shown, printed and logged at most."""

# Fields that a file holds as they are, and ``global_step`` beside them. The others are tensors, or are made of them.
_PLAIN = {
    "curvature": dict[str, Any],
    "k": int,
    "n_train": int,
    "settings": dict[str, Any],
    "seconds": float,
}

_NOT_KEPT = Shown(None, None, "not kept with the report: give load() the dataset")


@dataclass(eq=False, repr=False)
class InfluenceRecord:
    """A score for every training example and query.

    A score is the predicted change of the query's measurement (by default its mean loss), in that measurement's own
    unit, if this training example were removed. Positive: removing it raises the query's loss, so the example is a
    *proponent* of what the model does there. Negative: removing it lowers the loss, an *opponent*.

    Attributes:
        scores: ``(n_queries, n_train)``, float64; one query unless ``per_example=True``. With ``keep`` only the
            strongest, ``(n_queries, 2·keep)``: the highest and then the lowest, falling.
        indices: The dataset index of each column, ``(n_train,)``; with ``keep`` of each score, ``(n_queries, 2·keep)``.
        n_train: The number of training examples that were scored.
        solutions: The diagnostics of each query's solve, ``n_queries`` of them; none for self-influence.
        curvature: How the products with the curvature were made, and the ends of its spectrum if ``eigenvalues`` were
            asked for.
        targets: The target parameters that the scores are restricted to.
        k: How many proponents and opponents are shown and logged.
        dataset: The training dataset, to look at examples; ``None`` in a report that was loaded without it.
        queries: How up to eight of the query's examples are shown.
        settings: The method, the solver and their parameters.
        seconds: Wall time of the whole call.
        examples: How training examples are shown, by dataset index; filled as they are looked at.
        context: What is known of the trainer. Only its ``global_step`` is saved.
    """

    scores: Tensor
    indices: Tensor
    n_train: int
    solutions: list[Solution]
    curvature: dict[str, Any]
    targets: Targets
    k: int
    dataset: Any
    queries: list[Shown]
    settings: dict[str, Any]
    seconds: float
    examples: dict[int, Shown] = field(default_factory=dict)
    context: CallContext = field(default_factory=CallContext)

    @property
    def solution(self) -> Solution | None:
        """The diagnostics of the solve; of several, of the one with the largest residual; ``None`` without any."""
        return max(self.solutions, key=lambda solution: solution.residual, default=None)

    @property
    def is_self_influence(self) -> bool:
        """Whether each example was scored for its own loss, by ``trainer.self_influence``, without a query."""
        return not self.solutions

    @property
    def n_kept(self) -> int | None:
        """How many scores of each end of the ranking there are; ``None`` if there are all."""
        return self.scores.shape[1] // 2 if self.indices.ndim == 2 else None

    def proponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the highest scores: without them the query's loss would be higher.

        Equal scores are ranked in the order of :attr:`indices`. With ``k`` above the number of training examples, all
        of them are ranked.

        Args:
            k: How many; by default the report's own ``k``.

        Raises:
            ConfigurationError: If ``k`` is not a whole number of at least 1, or more than were kept.
        """
        return self._top(k, largest=True)

    def opponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the lowest scores: without them the query's loss would be lower.

        See :meth:`proponents`.
        """
        return self._top(k, largest=False)

    def _top(self, k: int | None, *, largest: bool) -> Ranking:
        count = self.check_k(k, self.k)
        if self.n_kept is None:
            return strongest(self.scores, self.indices, count, largest=largest)
        ends = Ranking(self.indices, self.scores) if largest else Ranking(self.indices.flip(1), self.scores.flip(1))
        return Ranking(*(end[:, :count] for end in ends))

    def check_k(self, k: int | None, default: int) -> int:
        """How many examples to rank: ``k``, by default ``default``, and no more than there are.

        Raises:
            ConfigurationError: If ``k`` is not a whole number of at least 1, or more than were kept.
        """
        k = default if k is None else k
        check_count("k", k)
        if self.n_kept is not None and k > self.n_kept:
            raise ConfigurationError(
                f"The report kept the {self.n_kept} strongest scores of each end, not {k}. Ask again with keep={k},"
                " or without `keep` for all scores."
            )
        return min(k, self.n_train)

    def check_query(self, query: int) -> None:
        """Raises a :class:`~lightning_gif.errors.ConfigurationError` if there is no such query."""
        queries = self.scores.shape[0]
        if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < queries:
            raise ConfigurationError(f"`query` must be a whole number from 0 to {queries - 1}, got {query!r}.")

    def shown(self, index: int) -> Shown:
        """How a training example is shown: as it was the first time, even if its dataset augments at random."""
        if index not in self.examples:
            if self.dataset is None:
                return _NOT_KEPT
            with isolate_rng():
                self.examples[index] = Shown.of(self.dataset[index])
        return self.examples[index]

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers and strings."""
        return {
            "n_queries": self.scores.shape[0],
            "n_train": self.n_train,
            "n_targets": self.targets.count,
            "score_max": float(self.scores.max()),
            "score_min": float(self.scores.min()),
            "seconds": self.seconds,
            **{f"curvature_{name}": value for name, value in self.curvature.items() if not isinstance(value, list)},
            **{f"solve_{name}": value for name, value in (self.solution.summary() if self.solution else {}).items()},
        }

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds: plain values that JSON can hold, and tensors by name.

        Of the examples it holds how they are shown: those of the query, and up to ``k`` proponents and opponents of
        each of the first eight queries.
        """
        rankings = (self.proponents(), self.opponents())
        strong = {int(index) for ranking in rankings for index in ranking.indices[:MOST_QUERIES].flatten()}
        looks = {f"queries/{position}": example for position, example in enumerate(self.queries)}
        looks |= {
            f"examples/{index}": example for index in sorted(strong) if (example := self.shown(index)) is not _NOT_KEPT
        }
        tensors = {
            "scores": self.scores,
            "indices": self.indices,
            **{f"targets/{name}": _packed(entries) for name, entries in self.targets.items()},
            **{name: torch.as_tensor(example.image) for name, example in looks.items() if example.image is not None},
        }
        record = {
            **{name: getattr(self, name) for name in _PLAIN},
            "global_step": self.context.global_step,
            "solutions": [solution.record() for solution in self.solutions],
            "looks": {name: {"label": example.label, "text": example.text} for name, example in looks.items()},
        }
        return record, tensors

    @classmethod
    def from_record(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The report from what :meth:`to_record` returned, which anybody may have changed.

        Raises:
            ConfigurationError: If scores, indices and solves do not fit together.
            LookupError, TypeError, ValueError: If values are missing, or are not what they should be.
        """
        scores, indices = tensors["scores"], tensors["indices"]
        solutions = [Solution.of_record(stored) for stored in record["solutions"]]
        whole = scores.ndim == 2 and scores.numel() and scores.dtype == torch.float64 and indices.dtype == torch.int64
        solved = len(solutions) in (0, len(scores) if scores.ndim else 0)
        whole = whole and bool(torch.isfinite(scores).all())
        n_train = restored(int, record["n_train"], "n_train")
        kept = scores.ndim == 2 and indices.shape == scores.shape
        kept = kept and scores.shape[1] % 2 == 0 and n_train > scores.shape[1]
        fits = kept or (indices.shape == scores.shape[1:] and n_train == len(indices))
        if not whole or not fits or not solved or int(indices.min()) < 0:
            raise ConfigurationError(
                f"The parts of the report do not fit together: scores {list(scores.shape)} ({scores.dtype}), indices"
                f" {list(indices.shape)} ({indices.dtype}), {len(solutions)} solves; expected (n_queries, n_train) in"
                " float64, all finite, (n_train,) whole numbers of at least 0 (or both (n_queries, 2·keep), fewer than"
                " n_train), and n_queries or no solves. Copy the folder again from where it was saved."
            )
        looks = {
            name: Shown(
                restored(bool | int | float | str | None, stored["label"], f"the label of {name}"),
                _picture(name, tensors),
                restored(str, stored["text"], f"the text of {name}"),
            )
            for name, stored in record["looks"].items()
        }
        queries, examples = (
            {int(name.removeprefix(kind)): example for name, example in looks.items() if name.startswith(kind)}
            for kind in ("queries/", "examples/")
        )
        targets = {
            name.removeprefix("targets/"): _unpacked(bits)
            for name, bits in tensors.items()
            if name.startswith("targets/")
        }
        plain = {name: restored(kind, record[name], name) for name, kind in _PLAIN.items()}
        if plain["k"] < 1:
            raise ValueError(f"k is {plain['k']}, expected at least 1")
        return cls(
            scores=scores,
            indices=indices,
            solutions=solutions,
            targets=Targets(targets),
            dataset=None,
            queries=[queries[position] for position in range(len(queries))],
            examples=examples,
            context=CallContext(global_step=restored(int, record["global_step"], "global_step")),
            **plain,
        )


def _packed(entries: Tensor) -> Tensor:
    """Sorted flat indices as bits, ``(⌈(last + 1)/8⌉,)`` uint8: all of a parameter's entries take one bit each."""
    mask = torch.zeros(int(entries[-1]) + 1, dtype=torch.uint8)
    mask[entries] = 1
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy())).nonzero().squeeze(1)


def _picture(name: str, tensors: Mapping[str, Tensor]) -> Any | None:
    """The picture of an example in a file, if there is one."""
    if name not in tensors:
        return None
    image = tensors[name]
    if image.dtype != torch.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"the picture {name!r} is {image.dtype} {list(image.shape)}; expected uint8 (H, W) or (H, W, 3)"
        )
    return image.numpy()
