"""The report of ``trainer.validate_influence``: how well scores predict the losses of retrained models."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..config import check_count
from ..data.examples import Examples
from ..data.identity import data_digest, fingerprints
from ..data.structure import describe
from ..errors import ConfigurationError, GIFWarning, NonFiniteError
from ..objective.objective import Objective
from ..parameters import state_digest
from ..reporting.contents import Contents, Table, numbers_of, section_of
from ..reporting.context import CallContext, ContextAttribute
from ..reporting.loggers import log_to_each
from ..reporting.page import HtmlReport, Page
from ..storage.artifact import REMEDY, read_folder, write_folder
from ..storage.digests import Fingerprint, digest
from ..storage.schema import parse_errors_name, restored
from .groups import Grouping
from .lds import bootstrap_interval, noise_ceiling, spearman
from .report import InfluenceReport
from .retraining import LossStore, Retrain, Subsets, Training, retrain_all

if TYPE_CHECKING:
    from .._compat import LightningModule

__all__ = ["Opened", "ValidationReport", "check_validation", "validate"]


# Two subsets have no rank correlation other than ±1.
_LEAST_SUBSETS = 3

# Queries in the table of a notebook.
_MOST_SHOWN = 20

_FORMAT = "lightning-gif validation 1"

# Fields that a file holds as plain values. The other fields are stored as tensors.
_PLAIN = {"share": float, "n_trained": int, "seconds": float, "settings": dict[str, Any]}

# Below this ceiling, more seeds are the first remedy: the losses differ more by the seed than by the subset.
_LOW_CEILING = 0.5


@dataclass(eq=False, repr=False)
class ValidationReport(HtmlReport):
    """How well scores predict retraining on random subsets of the training examples.

    For each subset and query there is a predicted and a measured change of the query's measurement (by default its
    loss). The predicted change is the sum of the scores of the examples that the subset leaves out. The measured one is
    the mean over the models that were retrained on the subset, minus the value of the original model, whose scores are
    tested. A positive change means that the query's loss is higher without these examples.

    Attributes:
        predicted: The predicted changes ``(n_subsets, n_queries)``.
        losses: The query's measurements of the retrained models, ``(n_subsets, n_seeds, n_queries)``.
        present: The query's measurements of the original model, ``(n_queries,)``.
        removed: Which training examples each subset leaves out, ``(n_subsets, n_train)`` bool.
        indices: The dataset index of each column of ``removed``, ``(n_train,)``.
        share: The share of the training examples, or of the groups, that each subset keeps.
        n_trained: How many models this call has trained. The losses of the others were already in ``folder``.
        seconds: The wall time of this call in seconds.
        settings: The settings of the scores.
        context: The trainer's loggers, step count and process group. Only ``global_step`` is saved.
        loggers: The loggers that :meth:`log` uses by default: those of the trainer.
        global_step: The number of the trainer's optimizer steps at the time of the call.
    """

    predicted: Tensor
    losses: Tensor
    present: Tensor
    removed: Tensor
    indices: Tensor
    share: float
    n_trained: int
    seconds: float
    settings: dict[str, Any]
    context: CallContext = field(default_factory=CallContext)

    loggers = ContextAttribute[Sequence[Any]]()
    global_step = ContextAttribute[int]()

    @property
    def n_retrainings(self) -> int:
        """The number of retrained models, over all subsets and seeds."""
        return self.losses.shape[0] * self.losses.shape[1]

    @property
    def measured(self) -> Tensor:
        """The measured changes ``(n_subsets, n_queries)``, averaged over the seeds."""
        return self.losses.mean(1) - self.present

    @cached_property
    def correlations(self) -> Tensor:
        """Spearman's correlation of predicted and measured changes over the subsets, for each query ``(n_queries,)``.

        It is 0 for a query for which one of the two is the same in all subsets.
        """
        return spearman(self.predicted, self.measured)

    @property
    def lds(self) -> float:
        """The linear datamodeling score, which is the mean of :attr:`correlations`.

        1: the scores order the subsets as retraining does. 0: they say nothing. −1: they order them the other way
        round.
        """
        return float(self.correlations.mean())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the LDS, by a bootstrap over subsets and queries.

        It does not include how scores vary between models that were trained with other seeds.
        """
        return bootstrap_interval(self.predicted, self.measured)

    @cached_property
    def noise_ceiling(self) -> float | None:
        """The LDS that perfect predictions of the expected losses would have; ``None`` if there is only one seed.

        It is below 1, because training is random. See :func:`~lightning_gif.attribution.lds.noise_ceiling`.
        """
        return noise_ceiling(self.losses)

    @property
    def verdict(self) -> str:
        """What the report says about the scores, and what to do if it says too little, in one line."""
        low, high = self.interval
        ceiling = self.noise_ceiling
        found = f"LDS {self.lds:.2f} ({low:.2f} to {high:.2f})"
        of = "" if ceiling is None else f", noise ceiling {ceiling:.2f}"
        if low > 0:
            return f"Scores predict retraining: {found}{of}."
        if high < 0:
            return (
                f"Scores predict the opposite of retraining: {found}{of}. Check that `retrain` trains on the given"
                " dataset indices, and not on the other examples."
            )
        subsets, seeds = self.losses.shape[:2]
        more = [f"more subsets (n_subsets={2 * subsets})"]
        if ceiling is None or ceiling < _LOW_CEILING:
            more.insert(0 if ceiling is not None else 1, f"more seeds (n_seeds={2 * seeds})")
        return (
            f"No evidence that scores predict retraining: {found}{of}, and the interval contains 0. Use"
            f" {' or '.join(more)}, or other scores, such as those of a fit with GIFCallback(snapshots=4)."
        )

    def summary(self) -> dict[str, Any]:
        """The report in plain numbers. ``noise_ceiling`` is left out if it is ``None``."""
        subsets, seeds, queries = self.losses.shape
        ceiling = self.noise_ceiling
        return {
            "n_queries": queries,
            "n_train": len(self.indices),
            "n_subsets": subsets,
            "n_seeds": seeds,
            "n_retrainings": self.n_retrainings,
            "share": self.share,
            "lds": self.lds,
            "lds_low": self.interval[0],
            "lds_high": self.interval[1],
            **({} if ceiling is None else {"noise_ceiling": ceiling}),
            "seconds": self.seconds,
        }

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str | None = None) -> None:
        """Logs the report. Each logger gets the parts that it supports, under keys that start with ``prefix``.

        The numbers are the LDS, its interval and the noise ceiling. There are also the report as text, the table
        ``queries`` with the correlation of each query, the diagnostics and the settings.

        A logger that fails is named in a warning, and so is one whose W&B run is finished. The others get the report.

        Args:
            loggers: Lightning loggers; by default those of the trainer.
            prefix: The start of every key; by default ``gif_validation``, and the name of the call if it has one.
        """
        section = section_of("gif_validation", self.settings.get("name")) if prefix is None else prefix
        log_to_each(self.loggers if loggers is None else loggers, lambda: self._contents(section))

    def _contents(self, section: str) -> Contents:
        drawn, others = numbers_of(self.summary(), ["lds", "lds_low", "lds_high", "noise_ceiling"])
        rows = [list(row) for row in enumerate(self.correlations.tolist())]
        return Contents(
            section,
            self.global_step,
            points=[drawn],
            settings=self.settings,
            diagnostics=others,
            text=str(self),
            tables={"queries": Table(["query", "correlation"], rows)},
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into a folder. An old report there is replaced when the new one is complete.

        Args:
            folder: The folder. It is created if it does not exist, with its parents.

        Raises:
            ConfigurationError: If ``folder`` is a file, or holds anything other than such a report.
        """
        record = {**{name: getattr(self, name) for name in _PLAIN}, "global_step": self.global_step}
        tensors = {name: getattr(self, name) for name in ("predicted", "losses", "present", "removed", "indices")}
        write_folder(folder, _FORMAT, record, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ValidationReport:
        """Reads a report that :meth:`save` wrote. Nothing is unpickled.

        Args:
            folder: The folder.

        Raises:
            ConfigurationError: If the folder holds no such report, or files are damaged or were edited.
            FileNotFoundError: If there is no such folder.
        """
        record, tensors = read_folder(folder, _FORMAT)
        with parse_errors_name(folder, REMEDY):
            plain: dict[str, Any] = {name: restored(kind, record[name], name) for name, kind in _PLAIN.items()}
            context = CallContext(global_step=restored(int, record["global_step"], "global_step"))
            report = cls(**{**plain, **tensors}, context=context)
            subsets, _, queries = report.losses.shape
            shapes = {
                "predicted": [subsets, queries],
                "present": [queries],
                "removed": [subsets, len(report.indices)],
            }
            for name, shape in shapes.items():
                if list(tensors[name].shape) != shape:
                    raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {shape}")
            str(report), report.summary()  # a report that cannot be printed is damaged
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Text
    # ----------------------------------------------------------------------------------------------------------------

    def page(self, *, whole: bool) -> Page:
        """The report as HTML, with the correlation of each query; of the first 20 queries unless ``whole``."""
        shown = self.correlations.tolist()[: None if whole else _MOST_SHOWN]
        rows = [[query, f"{value:+.2f}"] for query, value in enumerate(shown)]
        tables = {"Rank correlation of predicted and measured changes": Table(["query", "correlation"], rows)}
        return Page("Do scores predict retraining?", self.verdict, (), tables, details=str(self))

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"ValidationReport(LDS {self.lds:.2f} ({low:.2f} to {high:.2f}), {self.losses.shape[2]} queries,"
            f" {self.n_retrainings} retrainings)"
        )

    def __str__(self) -> str:
        subsets, seeds, queries = self.losses.shape
        (low, high), ceiling = self.interval, self.noise_ceiling
        ends = torch.quantile(self.correlations, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
        earlier = self.n_retrainings - self.n_trained
        resumed = f" ({earlier} of an earlier call)" if earlier else ""
        share = f"{100 * self.share:.3g} % of the data"
        limit = "unknown (n_seeds=2 or more measures it)" if ceiling is None else f"{ceiling:.3f}"
        lines = [
            f"Scores of {len(self.indices)} training examples for {_counted(queries, 'query', 'queries')}, compared"
            f" with {_counted(self.n_retrainings, 'retraining')}{resumed} on {subsets} random subsets with {share},"
            f" {_counted(seeds, 'seed')} each ({self.seconds:.1f} s)",
            f"LDS {self.lds:.3f}, 95 % interval {low:.3f} to {high:.3f}, noise ceiling {limit}",
            "correlation by query: lowest {:.2f}, median {:.2f}, highest {:.2f}".format(*ends),
            self.verdict,
        ]
        return "\n".join(lines)


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or f'{one}s'}"


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a call
# ----------------------------------------------------------------------------------------------------------------------


def check_validation(retrain: Any, n_subsets: Any, n_seeds: Any, share: Any) -> None:
    """Checks the arguments of ``trainer.validate_influence``.

    Raises:
        ConfigurationError: If one of them is invalid.
    """
    if not callable(retrain):
        raise ConfigurationError(
            "`retrain` must be a function (indices, seed) that trains a new model on the training examples with these"
            f" dataset indices and returns the LightningModule, got {describe(retrain)}."
        )
    check_count("n_subsets", n_subsets, least=_LEAST_SUBSETS)
    check_count("n_seeds", n_seeds)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ConfigurationError(
            f"`share` must be a number between 0 and 1, the share of the training examples that each subset keeps, got"
            f" {share!r}. 0.5 keeps half of them, 0.99 leaves out one in a hundred."
        )


class Opened(NamedTuple):
    """What a part of a validation works with.

    Attributes:
        objective: An open objective.
        train: The training examples.
        query: The query's examples.
    """

    objective: Objective
    train: Examples
    query: Examples


def validate(
    opened: Callable[[], AbstractContextManager[Opened]],
    report: InfluenceReport,
    retrain: Retrain,
    *,
    n_subsets: int,
    n_seeds: int,
    share: float,
    seed: int,
    groups: Grouping | None = None,
    folder: Path | None = None,
    context: CallContext | None = None,
) -> ValidationReport:
    """Retrains on random subsets, and compares the losses with the scores of a report.

    Args:
        opened: Opens the objective of the original model. It is closed while ``retrain`` runs, because an open
            objective changes the global state of PyTorch.
        report: The scores.
        retrain: See :data:`~lightning_gif.attribution.retraining.Retrain`.
        n_subsets, n_seeds, share, seed, groups: See :meth:`~lightning_gif.GIFCallback.validate_influence`.
        folder: A folder for the losses of the retrained models, or ``None``.
        context: The trainer's loggers and step count, for the report.

    Raises:
        ConfigurationError: If the report does not fit, ``folder`` holds other files, or ``retrain`` returns a module
            with other parameters.
        NonFiniteError: If a loss is not finite.
    """
    begin = time.perf_counter()
    with opened() as (objective, train, query):
        _check_report(report, train, query)
        per_example = len(report.scores) == len(query)
        subsets = Subsets.draw(train, n_subsets, share, seed, groups)
        predicted = subsets.removed.double() @ _scores_of(report, train).mT
        present = _measurements(objective, query, per_example, "the original model")
        store = None
        if folder is not None:
            mark = _fingerprint(objective, train, query, subsets, share=share, per_example=per_example)
            store = LossStore.open(folder, len(present), mark)
        scored = objective.module

    def measure(module: LightningModule, training: Training) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GIFWarning)  # the first opening has warned
            with opened() as (objective, _, query), objective.at_state(objective.state_of(module)):
                return _measurements(objective, query, per_example, f"the model of {training}")

    losses, n_trained = retrain_all(subsets, n_seeds, retrain, scored, measure, store)
    return ValidationReport(
        predicted=predicted,
        losses=losses,
        present=present,
        removed=subsets.removed,
        indices=subsets.ids,
        share=float(share),
        n_trained=n_trained,
        seconds=time.perf_counter() - begin,
        settings=report.settings,
        context=context or CallContext(),
    )


def _fingerprint(
    objective: Objective, train: Examples, query: Examples, subsets: Subsets, *, share: float, per_example: bool
) -> Fingerprint:
    """Digests and values of everything that the losses depend on, except ``retrain``.

    The number of subsets and of seeds is not among them, so that a call for more can resume.
    """
    return {
        "weights": state_digest(objective.module),
        "training data": data_digest(train),
        "queries": digest({}, [mark.hex() for mark in fingerprints(query)]),
        "per_example": str(per_example),
        "measurement": objective.measures,
        "double": str(objective.theta.dtype),
        "share": str(float(share)),
        "seed": str(subsets.seed),
        "groups": digest({"of each example": subsets.members}),
    }


def _check_report(report: Any, train: Examples, query: Examples) -> None:
    """Checks that a given report has all scores of the training examples for the query.

    Raises:
        ConfigurationError: If it is no such report.
    """
    if not isinstance(report, InfluenceReport) or report.is_self_influence:
        given = "one of trainer.self_influence" if isinstance(report, InfluenceReport) else describe(report)
        raise ConfigurationError(f"`report` must be a report of trainer.influence for the same query, got {given}.")
    if report.n_kept is not None:
        raise ConfigurationError(
            f"`report` kept only {report.n_kept} scores of each end of the ranking, but all scores are needed. Repeat"
            " trainer.influence without `keep`."
        )
    if not torch.equal(report.indices.sort().values, train.ids.sort().values):
        raise ConfigurationError(
            f"`report` has the scores of {len(report.indices)} training examples, but there are {len(train)}, or they"
            " have other dataset indices. Repeat trainer.influence with the same training data, and without `among`."
        )
    if len(report.scores) not in (1, len(query)):
        raise ConfigurationError(
            f"`report` has {len(report.scores)} queries, but the query has {len(query)} examples. Pass the batch of the"
            " report, and make the report with per_example=True, or without it for their mean."
        )


def _scores_of(report: InfluenceReport, train: Examples) -> Tensor:
    """The scores of a report in the order of the training examples, ``(n_queries, n)``."""
    return report.scores[:, report.indices.argsort()[train.ids.argsort().argsort()]]


def _measurements(objective: Objective, query: Examples, per_example: bool, model: str) -> Tensor:
    """What the query measures at the objective's present state, ``(n_queries,)`` in float64 on the CPU.

    Args:
        objective: The objective.
        query: The query's examples.
        per_example: Whether each example is a query of its own. Otherwise there is one value, their mean.
        model: The name of the model, for messages.

    Raises:
        NonFiniteError: If a value is not finite.
    """
    with torch.no_grad():
        parts = [objective.measurements(objective.theta, batch) for batch in query.local_batches()]
    values = query.all_gather(parts).double().cpu()
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            f"{int((~torch.isfinite(values)).sum())} of {len(values)} values of the query are not finite for {model}."
            " If its training has diverged, change `retrain`, for example to a lower learning rate."
        )
    return values if per_example else values.mean(0, keepdim=True)
