"""The report of ``trainer.influence`` and ``trainer.self_influence``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._compat import isolate_rng, rank_zero_warn
from .._moved import renamed
from ..data.examples import Examples
from ..data.names import Vocabulary
from ..data.structure import map_tensors
from ..distributed import ProcessGroup
from ..errors import ConfigurationError, GIFWarning
from ..reporting.contents import section_of
from ..reporting.context import ContextAttribute
from ..reporting.loggers import log_to_each
from ..reporting.page import HtmlReport, Page
from ..reporting.previews import Shown, label_of, saved
from ..storage.artifact import REMEDY, read_folder, write_folder
from ..storage.schema import parse_errors_name
from . import curves, display, pages, picture
from .groups import Grouping, Groups, group_scores, values_of
from .logged import contents, prefix_of
from .record import MOST_QUERIES, InfluenceRecord
from .same_call import check_same_call
from .table import table_of
from .uncertainty import Spread, agreement_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["InfluenceReport", "first_shown"]


_FORMAT = "lightning-gif influence 2"


class InfluenceReport(InfluenceRecord, HtmlReport):
    """A score for every training example and query.

    The scores, and how they were computed, are the fields of
    :class:`~lightning_gif.attribution.record.InfluenceRecord`.

    Attributes:
        loggers: The loggers that :meth:`log` uses by default: those of the trainer.
        global_step: The number of the trainer's optimizer steps at the time of the call.
        processes: The process group. Each process has the report, and the first one writes files.
        class_names: The name of each class in pictures, in the order of the labels; ``None`` shows the labels.
    """

    loggers = ContextAttribute[Sequence[Any]]()
    global_step = ContextAttribute[int]()
    processes = ContextAttribute[ProcessGroup]()
    class_names = ContextAttribute[Sequence[str] | None]()

    ranks = renamed("InfluenceReport.ranks", "processes")

    def by_group(self, groups: Grouping | None = None, query: int | None = None) -> Groups:
        """Sums the scores of groups of training examples: the effect of removing each whole group on a query.

        A sum assumes that the effects of the examples add up. This holds to first order, for a group that is a small
        part of the data. For a large group the sum is mostly too small: without ``m`` of ``n`` examples each remaining
        example has more weight, which alone makes the effect ``(n−1)/(n−m)`` times as large (see also Koh et al., arXiv
        1905.13289). The sum can also be too large, because the curvature changes without the group. The order of the
        groups is more reliable than the numbers. Sums have no error bars, because the scores of a group vary together.

        In a report of ``trainer.self_influence`` each score is about another loss. There compare the means: groups with
        a larger mean are memorized more.

        Args:
            groups: The groups, in one of three forms. One value for each item of the training dataset (a list, array,
                tensor or column of a table), even if only a part of the dataset was scored: values are looked up by
                *dataset index*. A mapping from dataset indices to values. Or a function from an item of the dataset to
                its group. By default examples are grouped by label.
            query: The number of the query; by default the mean over all queries is taken.

        Returns:
            The groups, ranked by their sums, the strongest proponents first.

        Raises:
            ConfigurationError: If there is no such query or not all scores were kept; if ``groups`` has another length
                than the dataset, or no value for some scored examples; or if items must be read, but the report has no
                dataset or the items no label.
        """
        if query is not None:
            self.check_query(query)
        if self.n_kept is not None:
            raise ConfigurationError(
                f"The report kept only {self.n_kept} scores of each end of the ranking, but the sums of groups need all"
                " scores. Repeat the call without `keep`."
            )
        if groups is None:
            names = self._read(label_of) if self.labels is None else self.labels.tolist()
            if all(name is None for name in names):
                raise ConfigurationError(
                    "The items of the training dataset have no single label to group by. Give `groups`: one value for"
                    " each item of the dataset, or a function from an item to its group."
                )
        elif callable(groups):
            names = self._read(groups)
        else:
            size = len(self.dataset) if hasattr(self.dataset, "__len__") else None
            names = values_of(groups, self.indices, size)
        class_names = self.class_names if groups is None else None
        scores = self.scores.mean(0) if query is None else self.scores[query]
        if self.is_self_influence:
            meaning = "mean = predicted change of an example's own loss if it were removed, total = their sum"
            return group_scores(names, scores, meaning, class_names)
        queries = len(self.scores)
        on = f"query {query}" if query is not None else f"the mean of {queries} queries" if queries > 1 else "the query"
        meaning = f"total = sum of scores: to first order, the effect of removing the whole group on {on}"
        return group_scores(names, scores, meaning, class_names)

    def _by_index(self, groups: Grouping) -> dict[int, Any]:
        """The group of each scored training example, by dataset index."""
        indices = self.indices.unique()
        if callable(groups):
            values = self._read(groups, indices)
        else:
            values = values_of(groups, indices, len(self.dataset) if hasattr(self.dataset, "__len__") else None)
        return dict(zip(indices.tolist(), values, strict=True))

    def _labels_by_index(self) -> dict[int, Any] | None:
        """The label of each scored training example, by dataset index; ``None`` if they cannot be known."""
        if self.labels is not None:
            return dict(zip(self.indices.tolist(), self.labels.tolist(), strict=True))
        return None if self.dataset is None else self._by_index(label_of)

    def _read(self, function: Any, indices: Tensor | None = None) -> list[Any]:
        """The values of a function of items of the dataset, by default of all that were scored."""
        if self.dataset is None:
            raise ConfigurationError(
                "The report was loaded without its dataset, so its items cannot be read. Pass the `dataset` to load(),"
                " or give `groups` as one value for each dataset index."
            )
        with isolate_rng():  # random augmentation must not change the random numbers of training
            return [function(self.dataset[index]) for index in (self.indices if indices is None else indices).tolist()]

    def to_dataframe(self, groups: Grouping | None = None, *, labels: bool = True) -> pandas.DataFrame:
        """All kept scores as a table: one row for each query and training example.

        The columns are ``query``, ``index`` (the dataset index), ``score``, ``rank`` (1 for the highest score of the
        query) and ``kind``: ``"proponent"``, ``"opponent"``, or ``None`` for a score of 0. A report of self-influence
        has no ``kind``. There are more columns if their values are known:

        - ``label``, if ``labels`` of the report are known, or the report has its dataset and its items have labels.
        - ``group``, if ``groups`` are given.
        - ``loss``, the loss of the training example, if the call had ``losses=True``.
        - ``standard_error``, and the ends ``low`` and ``high`` of the 90 % interval, if there are standard errors.
        - ``innermost_index``, if the training loader draws from a ``Subset``: the index in the dataset below it.

        Args:
            groups: The groups of training examples, in one of the forms of :meth:`by_group`.
            labels: Whether to add the labels; ``True`` by default. If the report does not know them, each item of the
                dataset is read.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
            ConfigurationError: As in :meth:`by_group`, about ``groups``.
        """
        label = self._labels_by_index() if labels else None
        return table_of(self, label=label, group=None if groups is None else self._by_index(groups))

    def token_scores(self, index: int, query: int = 0) -> list[tuple[str, float]]:
        """The tokens of a training text, each with the part of the text's score that comes from it.

        Removing the loss of this token from training would change the query's loss by its score, to first order. The
        sum over all tokens is the score of the text (without the part of ``weight_decay``, if it was given).

        Args:
            index: The dataset index of one of the strongest proponents or opponents of the query.
            query: The number of the query, at most 7.

        Raises:
            ConfigurationError: If the call had no ``tokens=True``, or the example is none of the strongest ones.
        """
        self.check_query(query)
        if index not in self.train_tokens or query >= MOST_QUERIES:
            known = sorted(self.train_tokens)
            advice = "Pass a larger `k` to trainer.influence."
            if query >= MOST_QUERIES:
                advice = "Call trainer.influence with this query's example alone, and tokens=True."
            raise ConfigurationError(
                "The report has no scores of tokens. Call trainer.influence(batch, tokens=True)."
                if not known
                else f"The report has no token scores of example {index} for query {query}. It has those of the k"
                f" strongest proponents and opponents of the first {MOST_QUERIES} queries: {known[:10]}"
                f"{' …' if len(known) > 10 else ''}. {advice}"
            )
        return [(token, scores[query]) for token, scores in self.train_tokens[index]]

    # ----------------------------------------------------------------------------------------------------------------
    # Several fits
    # ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def mean(cls, reports: Sequence[InfluenceReport]) -> InfluenceReport:
        """The mean of reports on the same query and training examples, from fits that differ only by chance.

        Fit the same network several times with different seeds, and make the same call for each. The fits are
        independent, so their spread shows how much scores depend on chance. Standard errors are the standard deviation
        over the fits, divided by the square root of their number. The spread over the states of one fit is not used,
        because these are not independent.

        Args:
            reports: The reports of two or more fits. Their training examples may be in any order.

        Returns:
            A report with the settings, the curvature, the targets, the shown examples and the loggers of the first
            one. For each query it has the solve with the largest residual among the fits. Its ``predictions`` are the
            mean over the fits, and its ``seconds`` the sum.

        Raises:
            ConfigurationError: If there are fewer than two reports; if one is a mean itself, or was made with ``keep``;
                or if queries, training examples, measurements or settings differ.
        """
        reports = check_same_call(reports)
        first, *others = reports
        spread, order = Spread(), first.indices.argsort(stable=True)
        scores = torch.zeros_like(first.scores)
        for report in (first, *others):
            own = torch.empty_like(order).index_copy_(0, order, report.indices.argsort(stable=True))
            scores += report.scores[:, own] / len(reports)
            spread.add(report.scores[:, own])
        errors = spread.standard_errors(least=2)
        if any(torch.equal(report.scores, first.scores) for report in others):
            rank_zero_warn(
                "Several of the averaged reports have exactly the same scores, so the standard errors are too small."
                " Fit with different seeds, and average one report from each fit.",
                category=GIFWarning,
            )
        return cls(
            scores=scores,
            indices=first.indices,
            n_train=first.n_train,
            solutions=[
                max(of_query, key=lambda solution: solution.residual)
                for of_query in zip(*(report.solutions for report in reports), strict=True)
            ],
            curvature=first.curvature,
            targets=first.targets,
            k=first.k,
            dataset=next((report.dataset for report in reports if report.dataset is not None), None),
            queries=first.queries,
            labels=first.labels,
            predictions=_mean_predictions(reports),
            tokens=first.tokens,
            settings={**first.settings, "fits": len(reports)},
            seconds=sum(report.seconds for report in reports),
            standard_errors=errors,
            agreement=agreement_of(scores, errors, len(reports)),
            examples={index: shown for report in reversed(reports) for index, shown in report.examples.items()},
            context=first.context,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into a folder. An old report there is replaced when the new one is complete.

        ``report.json`` has the settings, the diagnostics of the solves, and the labels and texts of the shown examples.
        ``scores.safetensors`` has the scores, their dataset indices, the target parameters and the pictures of the
        shown examples. Shown are up to eight examples of the query, and up to ``k`` proponents and opponents of each of
        the first eight queries. The training data and the solution vectors are not saved.

        In a distributed run the first process writes, and the others do not wait for it. Call
        ``trainer.strategy.barrier()`` before another process reads the folder.

        Args:
            folder: The folder. It is created if it does not exist, with its parents.

        Raises:
            ConfigurationError: If ``folder`` is a file, or holds anything other than a report. It is left unchanged.
        """
        if self.processes.rank == 0:
            write_folder(folder, _FORMAT, *self.to_record())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dataset: Any = None) -> InfluenceReport:
        """Reads a report that :meth:`save` wrote. Nothing is unpickled, and no path in the files is followed.

        Args:
            folder: The folder.
            dataset: The dataset of the training loader. It is needed to show further examples, and to group scores by
                the label or a function of the items.

        Returns:
            The same report, except for ``loggers`` and the solutions' ``x``, which are empty.

        Raises:
            ConfigurationError: If the folder holds no report, or one of an unknown version; if files are damaged, were
                edited or do not belong together; or if ``dataset`` has another number of items than the scored one.
            FileNotFoundError: If there is no such folder.
        """
        record, tensors = read_folder(folder, _FORMAT)
        with parse_errors_name(folder, REMEDY):
            report = cls.from_record(record, tensors)
            str(report), report.summary()  # a report that cannot be printed is damaged
        size = report.settings.get("dataset_size")
        if size is not None and hasattr(dataset, "__len__") and len(dataset) != size:
            raise ConfigurationError(
                f"`dataset` has {len(dataset)} items, but that of the report has {size}. Give the dataset of the"
                " training loader. If that is a Subset, give the Subset and not the dataset below it."
            )
        last = int(report.indices.max())
        if hasattr(dataset, "__len__") and len(dataset) <= last:
            raise ConfigurationError(
                f"`dataset` has {len(dataset)} items, but the report scores dataset indices up to {last}. Give the"
                " dataset of the training loader."
            )
        report.dataset = dataset
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Logs, figures and text
    # ----------------------------------------------------------------------------------------------------------------

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str | None = None) -> None:
        """Logs the report. Each logger gets the parts that it supports, under keys that start with ``prefix``.

        The numbers are the highest and the lowest score, and the agreement. There are also the report as text, its
        figure, the table of examples, the sums by class, the histogram of the scores, the diagnostics, the settings,
        and the report as a file. The page on logging lists the keys.

        A logger that fails is named in a warning, and so is one whose W&B run is finished. The others get the report.

        Args:
            loggers: Lightning loggers; by default those of the trainer.
            prefix: The start of every key; by default ``gif_influence``, or ``gif_self_influence`` for a report of
                ``trainer.self_influence``, and the name of the call if it has one.
        """
        section = section_of(prefix_of(self), self.name) if prefix is None else prefix
        log_to_each(self.loggers if loggers is None else loggers, lambda: contents(self, section, self.save))

    def plot(
        self,
        query: int | str | os.PathLike[str] = 0,
        k: int | None = None,
        *,
        distribution: bool = False,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Draws what was asked, how the model reads it, and which training examples moved it.

        The picture has the query, the classes that the model finds most likely, the scores added up by class, and the
        strongest proponents and opponents: each with its dataset index, its label, and its score with its 90 % interval
        if there are standard errors. A query that is the mean over a batch is shown by its first examples. Examples
        that are no images are shown as text. The sums by class are left out with ``keep`` and if targets are not
        labels; of more than 12 classes, the six with the largest and the six with the smallest sums are drawn.

        Args:
            query: The number of the query. A path stands for ``path``, for the first query.
            k: The number of proponents and of opponents; by default up to 8.
            distribution: Whether to add two plots of all scores: their histogram, and how concentrated they are, that
                is, which share of the sum of all ``|score|`` the strongest examples have. The latter is left out with
                ``keep``. ``False`` by default.
            path: A file to save the plot to, such as ``"influence.png"``; the ending decides its format.

        Raises:
            ConfigurationError: If there is no such query, the ending of ``path`` is not known, or ``k`` is not a whole
                number of at least 1.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if isinstance(query, (str, os.PathLike)):
            path, query = query, 0
        return saved(picture.draw(self, query, k, distribution=distribution), path)

    def plot_by_epoch(
        self,
        query: int | str | os.PathLike[str] = 0,
        k: int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Draws in which epochs the strongest proponents and opponents acted, for a report with ``through="training"``.

        Each line is one training example: the parts of its score from the optimizer steps of each epoch, which are in
        ``by_epoch``.

        Args:
            query: The number of the query. A path stands for ``path``, for the first query.
            k: The number of proponents and of opponents; by default up to 3.
            path: A file to save the plot to; the ending decides its format.

        Raises:
            ConfigurationError: If the report has no parts by epoch; and as in :meth:`plot`.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if isinstance(query, (str, os.PathLike)):
            path, query = query, 0
        return saved(curves.draw(self, query, k), path)

    def page(self, *, whole: bool) -> Page:
        """The report as HTML: the first query, or with ``whole`` up to eight queries."""
        return pages.page_of(self, whole=whole)

    def __repr__(self) -> str:
        return display.short_text(self)

    def __str__(self) -> str:
        return display.text(self)


def first_shown(query: Examples, most: int = MOST_QUERIES, vocabulary: Vocabulary | None = None) -> list[Shown]:
    """Labels and pictures or texts of up to ``most`` examples of a query, all from its first batch.

    They come from the query's dataset if the rows of a batch are not its examples. A batch without a dataset then shows
    nothing.
    """
    batch = next(query.batches())

    def item(position: int) -> Any:
        if not batch.divisible:
            return () if query.dataset is None else query.dataset[int(batch.ids[position])]
        return map_tensors(
            batch.data,
            lambda tensor: tensor[position] if tensor.ndim else tensor,
            lambda texts: texts[position],
            batch.size,
        )

    return [Shown.of(item(position), vocabulary) for position in range(min(most, batch.size))]


def _mean_predictions(reports: Sequence[InfluenceReport]) -> Tensor | None:
    """The mean of the predictions on the shown queries; ``None`` if not all reports have them."""
    found = [report.predictions for report in reports if report.predictions is not None]
    return torch.stack(found).mean(0) if len(found) == len(reports) else None
