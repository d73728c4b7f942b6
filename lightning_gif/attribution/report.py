"""The report of ``trainer.influence`` and ``trainer.self_influence``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._compat import isolate_rng
from .._moved import renamed
from ..data.examples import Examples
from ..data.structure import map_tensors
from ..distributed import ProcessGroup
from ..errors import ConfigurationError
from ..reporting.context import ContextAttribute
from ..reporting.previews import Shown, label_of
from ..storage.artifact import REMEDY, read_folder, write_folder
from ..storage.schema import parse_errors_name
from . import display
from .groups import Grouping, Groups, group_scores, import_pandas, values_of
from .record import MOST_QUERIES, InfluenceRecord

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["InfluenceReport", "first_shown"]


_FORMAT = "lightning-gif influence 2"


class InfluenceReport(InfluenceRecord):
    """A score for every training example and query.

    The scores, and how they were computed, are the fields of
    :class:`~lightning_gif.attribution.record.InfluenceRecord`.

    Attributes:
        loggers: Where :meth:`log` logs to by default: the loggers of the trainer.
        global_step: The trainer's optimizer steps at the time of the call.
        processes: The processes that have the report. The first one writes files.
    """

    loggers = ContextAttribute[Sequence[Any]]()
    global_step = ContextAttribute[int]()
    processes = ContextAttribute[ProcessGroup]()

    ranks = renamed("InfluenceReport.ranks", "processes")

    def by_group(self, groups: Grouping | None = None, query: int | None = None) -> Groups:
        """The effect of removing whole groups of training examples on a query: the sums of their scores.

        A sum is of first order: it assumes that the effects of the examples of a group add up, as they do while the
        group is a small part of the data. For a large group it is mostly too small: without ``m`` of ``n`` examples
        each of the others weighs more, which alone makes the effect ``(n−1)/(n−m)`` times as large (see also Koh et
        al., arXiv 1905.13289). It can be too large if the curvature is another one without the group. The order of
        groups is more reliable than the numbers. For ``trainer.self_influence``, where each score is about another
        loss, compare the means: groups with large ones are memorized more.

        Args:
            groups: One value for each item of the training dataset (a list, array, tensor or column of a table), looked
                up by *dataset index*, also where only a part of the dataset was scored; or a mapping from dataset
                indices to values; or a function from an item of the dataset to its group. By default the label of each
                item.
            query: Which query; by default the mean of all.

        Returns:
            The groups, ranked by their sums: the strongest proponents first.

        Raises:
            ConfigurationError: If there is no such query, not all scores were kept, a column has another length than
                the dataset or no value for some of the scored examples, or items must be read and there is no dataset
                or no label in them.
        """
        if query is not None:
            self.check_query(query)
        if self.n_kept is not None:
            raise ConfigurationError(
                f"The report kept only the {self.n_kept} strongest scores of each end, too few for the sums of whole"
                " groups. Ask again without `keep`."
            )
        if groups is None:
            names = self._read(label_of)
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
        scores = self.scores.mean(0) if query is None else self.scores[query]
        if self.is_self_influence:
            return group_scores(
                names, scores, "mean = predicted change of an example's own loss if it were removed, total = their sum"
            )
        queries = len(self.scores)
        whose = (
            f"query {query}" if query is not None else f"the mean of {queries} queries" if queries > 1 else "the query"
        )
        meaning = f"total = sum of scores: to first order, the effect of removing the whole group on {whose}"
        return group_scores(names, scores, meaning)

    def _read(self, function: Any) -> list[Any]:
        """The values of a function of each item of the dataset that was scored."""
        if self.dataset is None:
            raise ConfigurationError(
                "The report was loaded without its dataset, so its items cannot be read. Give load() the `dataset`, or"
                " `groups` as one value for each dataset index."
            )
        with isolate_rng():  # random augmentation draws from the generators that training goes on with
            return [function(self.dataset[index]) for index in self.indices.tolist()]

    def to_dataframe(self) -> pandas.DataFrame:
        """All scores that were kept as a table with columns ``query``, ``index`` (of the dataset) and ``score``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        queries, examples = self.scores.shape
        return import_pandas().DataFrame(
            {
                "query": torch.arange(queries).repeat_interleave(examples).numpy(),
                "index": self.indices.expand(queries, -1).flatten().numpy(),
                "score": self.scores.flatten().numpy(),
            }
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into a folder; an old report is replaced only by a whole new one.

        ``report.json`` has the settings, the diagnostics of the solves, labels and texts in plain words and numbers.
        ``scores.safetensors`` has the scores, their dataset indices, the target parameters and the pictures of the
        examples that are shown: those of the query, and up to ``k`` proponents and opponents of each of the first eight
        queries. The training data and the solution vectors are not kept.

        Of several processes the first one writes, and the others do not wait for it: call
        ``trainer.strategy.barrier()`` before they read it.

        Args:
            folder: Where to. Missing folders above it are made.

        Raises:
            ConfigurationError: If there is a file, or a folder with anything but a report in it; it is left alone.
        """
        if self.processes.rank == 0:
            write_folder(folder, _FORMAT, *self.to_record())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dataset: Any = None) -> InfluenceReport:
        """Reads what :meth:`save` wrote. Nothing is unpickled, and no path that the files hold is followed.

        Args:
            folder: The folder.
            dataset: The training dataset (that of the loader), to look at more examples than were kept, or to
                group scores by what is in them.

        Returns:
            The same report, except for ``loggers`` and the solutions' ``x``, which are empty.

        Raises:
            ConfigurationError: If the folder holds something else, another version, or files that are damaged, were
                edited or do not belong together; or if ``dataset`` is too short to be the one that was scored.
            FileNotFoundError: If there is no such folder.
        """
        record, tensors = read_folder(folder, _FORMAT)
        with parse_errors_name(folder, REMEDY):
            report = cls.from_record(record, tensors)
            str(report), report.summary()  # a report that cannot be printed is damaged
        last = int(report.indices.max())
        if hasattr(dataset, "__len__") and len(dataset) <= last:
            raise ConfigurationError(
                f"`dataset` has {len(dataset)} items, but the report scores dataset indices up to {last}. Give the"
                " dataset of the training loader."
            )
        report.dataset = dataset
        return report

    # ----------------------------------------------------------------------------------------------------------------
    # Looking at it
    # ----------------------------------------------------------------------------------------------------------------

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str = "gif/influence") -> None:
        """Logs the report, to each logger what it can take. A W&B run that is finished is left alone, with a warning.

        The keys are the same in each call:

        - every logger: the numbers of :meth:`summary` as ``gif/influence/NAME``;
        - with tables (W&B): ``…/examples``, up to the first eight queries with their proponents and opponents: label,
          score, and picture or values of each; ``…/scores``, the histogram of the scores; ``…/solve``, the relative
          residual after each iteration (of the solve with the largest one); ``…/eigenvalues``, if these were asked for;
        - with a writer of figures, histograms and texts (TensorBoard): ``…/plot``, the figure of the first query, if
          matplotlib is installed; ``…/scores``, the histogram of the scores; ``…/report``, the report as it is printed.

        Args:
            loggers: Lightning loggers; by default those of the trainer.
            prefix: Start of every key.
        """
        display.log(self, self.loggers if loggers is None else loggers, prefix)

    def plot(self, query: int = 0, k: int | None = None) -> Figure:
        """Draws the strongest proponents and opponents of a query, the histogram of its scores, and how concentrated
        they are: which share of their sum the strongest examples have.

        Args:
            query: Which query.
            k: How many of each; by default up to 8.

        Raises:
            ConfigurationError: If there is no such query, or ``k`` is not a whole number of at least 1.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return display.draw(self, query, k)

    def __repr__(self) -> str:
        return display.short_text(self)

    def __str__(self) -> str:
        return display.text(self)


def first_shown(query: Examples, most: int = MOST_QUERIES) -> list[Shown]:
    """How up to ``most`` of a query's examples are shown."""
    batch = next(query.batches())

    def item(position: int) -> Any:
        return map_tensors(
            batch.data,
            lambda tensor: tensor[position] if tensor.ndim else tensor,
            lambda texts: texts[position],
            batch.size,
        )

    return [Shown.of(item(position)) for position in range(min(most, batch.size))]
