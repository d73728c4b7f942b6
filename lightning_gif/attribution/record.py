"""The record of an influence report: the scores, how they were computed, and how examples are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from .._compat import isolate_rng
from ..config import check_count
from ..data.identity import innermost
from ..data.streams import Stream
from ..errors import ConfigurationError
from ..parameters import Targets
from ..reporting.context import CallContext
from ..reporting.previews import Shown
from ..solvers import Solution
from ..storage.schema import restored
from .leave_outs import LeaveOuts
from .ranking import Ranking, strongest
from .uncertainty import LEVEL, Intervals, check_level, t_quantile

__all__ = ["MOST_QUERIES", "InfluenceRecord", "TokenScores"]

TokenScores: TypeAlias = list[tuple[str, list[float]]]
"""The tokens of a text, each with its score for each query."""


MOST_QUERIES = 8
"""The largest number of queries that are shown, printed and logged."""

# Fields that a file holds as plain values. The other fields are stored as tensors or are converted first.
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

    A score is the predicted change of the query's measurement (by default its mean loss) if the training example were
    removed, in the unit of that measurement. A training example with a positive score is a *proponent*: removing it
    raises the query's loss. One with a negative score is an *opponent*: removing it lowers the query's loss.

    Attributes:
        scores: The scores ``(n_queries, n_train)`` in float64. There is one query unless ``per_example=True``. With
            ``keep``, only the ``keep`` highest and the ``keep`` lowest scores, ``(n_queries, 2·keep)`` in descending
            order.
        indices: The dataset index of each column of ``scores``, ``(n_train,)``. With ``keep``, the dataset index of
            each score, ``(n_queries, 2·keep)``. If the training loader draws from a ``Subset``, these are indices of
            the ``Subset``, and :meth:`innermost_indices` gives those of the dataset below it.
        n_train: The number of training examples that were scored.
        solutions: The diagnostics of the solves, one for each query; empty for self-influence and through training.
        curvature: How the curvature was computed, and its largest and smallest eigenvalues if ``eigenvalues`` was set.
        targets: The target parameters that the scores are restricted to.
        gradient_share: The share of the squared norm of the query's gradient that the target parameters hold: the mean
            over queries, or over training examples for self-influence; 1 if they are all parameters. ``None`` if the
            file or folder of an earlier version does not have it.
        k: How many proponents and opponents are shown and logged.
        dataset: The training dataset, to look at examples; ``None`` in a report that was loaded without it.
        queries: Labels and pictures or texts of up to eight examples of the query.
        settings: The method, the solver and their parameters.
        seconds: The wall time of the whole call in seconds.
        standard_errors: The standard error of each score, in the shape of ``scores``: the standard deviation over the
            averaged states or fits, divided by the square root of their number. ``None`` for fewer than three states of
            one fit.
        agreement: How well the averaged states or fits agree on the scores of a query, at most 1: their
            :class:`intraclass correlation <lightning_gif.attribution.uncertainty.Agreement>`, the mean over the
            queries. ``None`` for fewer than three states of one fit.
        labels: The label of each training example, in the order of the columns of ``scores``, ``(n_train,)``; ``None``
            if the targets are not labels, with ``keep``, or in the folder of an earlier version.
        losses: The loss of each training example at the present weights, in float64 and in the shape of
            :attr:`indices`; ``None`` unless the call had ``losses=True``.
        predictions: What the model predicts for :attr:`queries`, with its present weights: the probabilities
            ``(n_shown, C)`` of a classifier, or the output ``(n_shown, 1)`` of a model with one number for each
            example. ``None`` if there are other outputs, or if they are not known.
        tokens: For each of :attr:`queries`, if they are texts of tokens: each token, and the predicted change of the
            loss if its embedding were 0. It is positive if the loss would be higher without the token. Empty if the
            module embeds no tokens, or in the folder of an earlier version.
        train_tokens: For training texts by dataset index, if the call had ``tokens=True``: each token, and its score
            for each of the first eight queries. The sum over the tokens is the score of the text, without weight decay.
        by_epoch: With ``through="training"``, the part of each score that comes from the optimizer steps of each epoch,
            ``(n_queries, n_epochs, n_train)`` in float64; with ``keep``, only of the examples in the report. The parts
            add up to the score. ``None`` for other scores, and if the parts of all examples would take more than 128
            MiB.
        leave_outs: With ``through="training"`` and ``leave_outs``, what the scores predict for replays without some
            examples, and what these replays measured.
        examples: Labels and pictures or texts of training examples, by dataset index; filled on demand.
        context: The trainer's loggers, step count and process group, and the names of the classes. Only
            ``global_step`` and ``class_names`` are saved.
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
    gradient_share: float | None = None
    standard_errors: Tensor | None = None
    agreement: float | None = None
    labels: Tensor | None = None
    losses: Tensor | None = None
    predictions: Tensor | None = None
    tokens: list[list[tuple[str, float]]] = field(default_factory=list)
    train_tokens: dict[int, TokenScores] = field(default_factory=dict)
    by_epoch: Tensor | None = None
    leave_outs: LeaveOuts | None = None
    examples: dict[int, Shown] = field(default_factory=dict)
    context: CallContext = field(default_factory=CallContext)

    @property
    def name(self) -> str | None:
        """The name that the call gave to the query, see :meth:`~lightning_gif.GIFCallback.influence`."""
        return self.settings.get("name")

    @property
    def solution(self) -> Solution | None:
        """The diagnostics of the solve with the largest residual; ``None`` if there was no solve."""
        return max(self.solutions, key=lambda solution: solution.residual, default=None)

    def innermost_indices(self, indices: Tensor | None = None) -> Tensor | None:
        """The indices in the dataset below the ``Subset`` that the training loader draws from.

        Args:
            indices: Indices of the ``Subset``, of any shape; by default :attr:`indices`.

        Returns:
            The indices in the innermost dataset, in the same shape; ``None`` if the loader draws from no ``Subset``, or
            if the report was loaded without its dataset.
        """
        given = self.indices if indices is None else indices
        dataset, below = innermost(self.dataset, given)
        return None if dataset is self.dataset else below

    @property
    def is_self_influence(self) -> bool:
        """Whether each example was scored for its own loss, by ``trainer.self_influence``, without a query."""
        return not self.solutions and not self.is_through_training

    @property
    def is_through_training(self) -> bool:
        """Whether the scores are about the recorded run itself, by ``through="training"``."""
        return self.settings.get("through") == "training"

    @property
    def n_fits(self) -> int:
        """The number of fits over which scores are averaged, see :meth:`InfluenceReport.mean`; 1 for a single fit."""
        return self.settings.get("fits", 1)

    @property
    def n_states(self) -> int:
        """The number of states of each fit (the last one and the snapshots) over which scores are averaged."""
        return 1 + len(self.settings.get("snapshots") or ())

    @property
    def n_averaged(self) -> int:
        """The number of values behind each standard error (fits if there are several, else states of one fit)."""
        return self.n_fits if self.n_fits > 1 else self.n_states

    def intervals(self, level: float = LEVEL) -> Intervals:
        """An interval around each score, by Student's t: the score ± ``t`` standard errors.

        With several fits, the degrees of freedom of ``t`` are the number of fits minus one, and the interval is for the
        mean score over all possible fits. With one fit, they are the number of its states minus one. The states of one
        fit are not independent. So this interval shows how much scores change during training, and is too narrow to
        cover the scores of other fits.

        Args:
            level: The share of intervals that should contain the mean score, between 0 and 1.

        Returns:
            The lower and the upper ends, in the shape of :attr:`scores`.

        Raises:
            ConfigurationError: If scores have no standard errors, or ``level`` is not between 0 and 1.
        """
        return self.intervals_of(self.scores, self.standard_errors, level)

    def intervals_of(self, scores: Tensor, errors: Tensor | None, level: float = LEVEL) -> Intervals:
        """The intervals of some of the scores, see :meth:`intervals`.

        Args:
            scores: Scores of any shape.
            errors: Their standard errors.
            level: As for :meth:`intervals`.
        """
        check_level(level)
        if errors is None:
            raise ConfigurationError(
                "The scores have no standard errors, because they are from fewer than three states of one fit. Fit with"
                " GIFCallback(snapshots=2), and repeat the call (trainer.self_influence with snapshots=True); or"
                " average the reports of several fits: InfluenceReport.mean([report, …])."
            )
        half = t_quantile(level, self.n_averaged - 1) * errors
        return Intervals(scores - half, scores + half)

    @property
    def n_kept(self) -> int | None:
        """The argument ``keep``: how many scores of each end of the ranking there are; ``None`` if there are all."""
        return self.scores.shape[1] // 2 if self.indices.ndim == 2 else None

    def proponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the highest scores: without them the query's loss would be higher.

        Equal scores are ranked in the order of :attr:`indices`. If ``k`` is larger than the number of training
        examples, all of them are ranked.

        Args:
            k: The number of examples; by default the report's own ``k``.

        Returns:
            Dataset indices and scores, ``(n_queries, k)`` each, highest score first.

        Raises:
            ConfigurationError: If ``k`` is not a whole number of at least 1, or more scores than were kept.
        """
        return self._top(k, largest=True)

    def opponents(self, k: int | None = None) -> Ranking:
        """The ``k`` training examples with the lowest scores: without them the query's loss would be lower.

        Arguments, result and errors are as for :meth:`proponents`, with the lowest score first.
        """
        return self._top(k, largest=False)

    def _top(self, k: int | None, *, largest: bool) -> Ranking:
        return self.at_columns(self.columns_of_end(k, largest=largest))

    def at_columns(self, columns: Tensor) -> Ranking:
        """The dataset indices and the scores at some columns of :attr:`scores`, ``(n_queries, k)``."""
        indices = self.indices[columns] if self.n_kept is None else self.indices.gather(1, columns)
        return Ranking(indices, self.scores.gather(1, columns))

    def columns_of_end(self, k: int | None, *, largest: bool) -> Tensor:
        """The columns of :attr:`scores` with the ``k`` highest or lowest scores, ``(n_queries, k)``, strongest first.

        Arguments and errors are as for :meth:`proponents`.
        """
        count, (queries, width) = self.check_k(k, self.k), self.scores.shape
        if self.n_kept is None:
            return strongest(self.scores, torch.arange(width), count, largest=largest).indices
        columns = torch.arange(count) if largest else width - 1 - torch.arange(count)
        return columns.expand(queries, -1)

    def check_k(self, k: int | None, default: int) -> int:
        """The number of examples to rank: ``k``, or ``default`` for ``None``, limited to the number of examples.

        Raises:
            ConfigurationError: If ``k`` is not a whole number of at least 1, or more scores than were kept.
        """
        k = default if k is None else k
        check_count("k", k)
        if self.n_kept is not None and k > self.n_kept:
            raise ConfigurationError(
                f"The report kept {self.n_kept} scores of each end of the ranking, fewer than k={k}. Repeat the call"
                f" with keep={k}, or without `keep` for all scores."
            )
        return min(k, self.n_train)

    def check_query(self, query: int) -> None:
        """Checks the number of a query.

        Raises:
            ConfigurationError: If there is no such query.
        """
        queries = self.scores.shape[0]
        if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < queries:
            raise ConfigurationError(f"`query` must be a whole number from 0 to {queries - 1}, got {query!r}.")

    def shown(self, index: int) -> Shown:
        """The label and the picture or text of a training example.

        The item is read once. So it looks the same in every output, even if the dataset augments at random.
        """
        if index not in self.examples:
            if self.dataset is None:
                return _NOT_KEPT
            with isolate_rng():
                self.examples[index] = Shown.of(self.dataset[index], self.context.vocabulary)
        return self.examples[index]

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers and strings."""
        return {
            "n_queries": self.scores.shape[0],
            "n_train": self.n_train,
            "n_targets": self.targets.count,
            **({} if self.gradient_share is None else {"gradient_share": self.gradient_share}),
            "score_max": float(self.scores.max()),
            "score_min": float(self.scores.min()),
            "seconds": self.seconds,
            **({} if self.agreement is None else {"agreement": self.agreement}),
            **({} if self.leave_outs is None else self.leave_outs.summary()),
            **{f"curvature_{name}": value for name, value in self.curvature.items() if not isinstance(value, list)},
            **{f"solve_{name}": value for name, value in (self.solution.summary() if self.solution else {}).items()},
        }

    def read_shown(self, order: Tensor) -> None:
        """Reads all examples that the report shows, if the dataset is slow to read in any order but its own.

        Args:
            order: The indices ``(n,)`` of the training examples in the order of the dataset.
        """
        strong = self.strongest() if isinstance(self.dataset, Stream) else set()
        for index in filter(strong.__contains__, order.tolist()):
            self.shown(index)

    def strongest(self) -> set[int]:
        """The indices of the proponents and opponents of the queries that a report shows."""
        rankings = (self.proponents(), self.opponents())
        return {int(index) for ranking in rankings for index in ranking.indices[:MOST_QUERIES].flatten()}

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of a file: plain values for JSON, and tensors by name.

        It includes the label and the picture or text of the shown examples. These are up to eight examples of the
        query, and up to ``k`` proponents and opponents of each of the first eight queries.
        """
        looks = {f"queries/{position}": example for position, example in enumerate(self.queries)}
        looks |= {
            f"examples/{index}": example
            for index in sorted(self.strongest())
            if (example := self.shown(index)) is not _NOT_KEPT
        }
        tensors = {
            "scores": self.scores,
            "indices": self.indices,
            **({} if self.standard_errors is None else {"standard_errors": self.standard_errors}),
            **({} if self.labels is None else {"labels": self.labels}),
            **({} if self.losses is None else {"losses": self.losses}),
            **({} if self.predictions is None else {"predictions": self.predictions}),
            **({} if self.by_epoch is None else {"by_epoch": self.by_epoch}),
            **{f"targets/{name}": _packed(entries) for name, entries in self.targets.items()},
            **{name: torch.as_tensor(example.image) for name, example in looks.items() if example.image is not None},
        }
        record = {
            **{name: getattr(self, name) for name in _PLAIN},
            **({} if self.gradient_share is None else {"gradient_share": self.gradient_share}),
            **({} if self.agreement is None else {"agreement": self.agreement}),
            "global_step": self.context.global_step,
            **({"tokens": self.tokens} if self.tokens else {}),
            **({"train_tokens": {str(i): one for i, one in self.train_tokens.items()}} if self.train_tokens else {}),
            **({} if self.leave_outs is None else {"leave_outs": self.leave_outs.record()}),
            **({} if self.context.class_names is None else {"class_names": list(self.context.class_names)}),
            "solutions": [solution.record() for solution in self.solutions],
            "looks": {name: {"label": example.label, "text": example.text} for name, example in looks.items()},
        }
        return record, tensors

    @classmethod
    def from_record(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The report from the result of :meth:`to_record`. The values are checked, because files can be edited.

        Raises:
            ConfigurationError: If scores, indices and solves do not fit together.
            LookupError, TypeError, ValueError: If values are missing, or have another type or range.
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
                f" {list(indices.shape)} ({indices.dtype}), {len(solutions)} solves. Expected: scores (n_queries,"
                " n_train) in float64, all finite; indices (n_train,) in int64, at least 0 (or both (n_queries, 2·keep)"
                " with 2·keep < n_train); and n_queries or no solves. Copy the folder again from where it was saved."
            )
        errors = tensors.get("standard_errors")
        _check_errors(errors, scores)
        queries, examples = _looks(record["looks"], tensors)
        targets = {
            name.removeprefix("targets/"): _unpacked(bits)
            for name, bits in tensors.items()
            if name.startswith("targets/")
        }
        plain = {name: restored(kind, record[name], name) for name, kind in _PLAIN.items()}
        if plain["k"] < 1:
            raise ValueError(f"k is {plain['k']}, expected at least 1")
        report = cls(
            scores=scores,
            indices=indices,
            standard_errors=errors,
            agreement=restored(float | None, record.get("agreement"), "agreement"),
            solutions=solutions,
            targets=Targets(targets),
            dataset=None,
            queries=[queries[position] for position in range(len(queries))],
            gradient_share=restored(float | None, record.get("gradient_share"), "gradient_share"),
            examples=examples,
            labels=_labels(tensors, indices),
            losses=_losses(tensors, indices),
            predictions=_predictions(tensors, len(queries)),
            by_epoch=_by_epoch(tensors, scores),
            leave_outs=LeaveOuts.of_record(record["leave_outs"]) if "leave_outs" in record else None,
            tokens=restored(list[list[tuple[str, float]]], record.get("tokens", []), "tokens"),
            train_tokens={
                int(index): restored(TokenScores, one, f"the tokens of example {index}")
                for index, one in restored(dict[str, Any], record.get("train_tokens", {}), "train_tokens").items()
            },
            context=CallContext(
                global_step=restored(int, record["global_step"], "global_step"),
                class_names=restored(list[str] | None, record.get("class_names"), "class_names"),
            ),
            **plain,
        )
        restored(int, report.n_fits, "fits")
        if errors is not None and report.n_averaged < 2:
            raise ValueError("there are standard errors, but only one state of one fit")
        return report


def _check_errors(errors: Tensor | None, scores: Tensor) -> None:
    """Checks that standard errors in a file, if there are any, are those of the scores."""
    if errors is None:
        return
    fit = errors.shape == scores.shape and errors.dtype == torch.float64
    if not fit or not bool((torch.isfinite(errors) & (errors >= 0)).all()):
        raise ConfigurationError(
            f"The standard errors {list(errors.shape)} ({errors.dtype}) do not fit the scores {list(scores.shape)}."
            " Expected: one for each score, in float64, finite, and at least 0. Copy the folder again from where it was"
            " saved."
        )


def _looks(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[int, Shown], dict[int, Shown]]:
    """How the examples of the query, by position, and training examples, by dataset index, look in a file."""
    looks = {
        name: Shown(
            restored(bool | int | float | str | None, one["label"], f"the label of {name}"),
            _picture(name, tensors),
            restored(str, one["text"], f"the text of {name}"),
        )
        for name, one in stored.items()
    }
    queries, examples = (
        {int(name.removeprefix(kind)): look for name, look in looks.items() if name.startswith(kind)}
        for kind in ("queries/", "examples/")
    )
    return queries, examples


def _labels(tensors: Mapping[str, Tensor], indices: Tensor) -> Tensor | None:
    """The labels in a file, one for each of ``indices`` ``(n_train,)``; ``None`` if there are none."""
    labels = tensors.get("labels")
    fit = labels is None or (labels.dtype == torch.int64 and labels.shape == indices.shape and int(labels.min()) >= 0)
    if not fit:
        raise ValueError("the labels are not one whole number of at least 0 for each training example")
    return labels


def _losses(tensors: Mapping[str, Tensor], indices: Tensor) -> Tensor | None:
    """The losses in a file, one for each of ``indices``; ``None`` if there are none."""
    losses = tensors.get("losses")
    if losses is not None and (losses.dtype != torch.float64 or losses.shape != indices.shape):
        raise ValueError("the losses are not one number for each training example")
    return losses


def _predictions(tensors: Mapping[str, Tensor], queries: int) -> Tensor | None:
    """The predictions in a file, one row for each shown query; ``None`` if there are none."""
    found = tensors.get("predictions")
    fit = found is None or (found.ndim == 2 and len(found) == queries and found.dtype == torch.float64)
    if not fit or (found is not None and not bool(torch.isfinite(found).all())):
        raise ValueError("the predictions are not one row of finite numbers for each shown query")
    return found


def _by_epoch(tensors: Mapping[str, Tensor], scores: Tensor) -> Tensor | None:
    """The parts of the scores by epoch in a file; ``None`` if there are none."""
    parts = tensors.get("by_epoch")
    fit = parts is None or (parts.ndim == 3 and parts.dtype == torch.float64 and parts[:, 0].shape == scores.shape)
    if not fit or (parts is not None and not bool(torch.isfinite(parts).all())):
        raise ValueError("the parts of the scores by epoch are not finite numbers for each query, epoch and example")
    return parts


def _packed(entries: Tensor) -> Tensor:
    """Packs sorted flat indices into a bit mask, ``(⌈(last + 1)/8⌉,)`` uint8: one bit for each entry."""
    mask = torch.zeros(int(entries[-1]) + 1, dtype=torch.uint8)
    mask[entries] = 1
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy())).nonzero().squeeze(1)


def _picture(name: str, tensors: Mapping[str, Tensor]) -> Any | None:
    """The picture of an example in a file, ``(H, W)`` or ``(H, W, 3)`` uint8; ``None`` if there is none."""
    if name not in tensors:
        return None
    image = tensors[name]
    if image.dtype != torch.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"the picture {name!r} is {image.dtype} {list(image.shape)}; expected uint8 (H, W) or (H, W, 3)"
        )
    return image.numpy()
