"""What ``trainer.influence`` gives back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._compat import isolate_rng
from ..data.examples import Examples
from ..data.structure import map_tensors
from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import ConfigurationError
from ..parameters import Targets
from ..reporting.loggers import log_eigenvalues, log_figure, log_histogram, log_scalars, log_table, log_text, running
from ..reporting.previews import Shown, figure, label_of, show
from ..solvers import Solution, Status
from ..storage.artifact import REMEDY, read_folder, write_folder
from ..storage.schema import parse_errors_name, restored
from .groups import Grouping, Groups, group_scores, values_of
from .ranking import Ranking, strongest

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
from .display import draw_shares, shorten

__all__ = ["InfluenceReport", "first_shown"]


_FORMAT = "lightning-gif influence 2"

_MOST_QUERIES = 8

# What a file keeps of a report as it is; the rest is tensors, or made of them.
_PLAIN = {
    "curvature": dict[str, Any],
    "k": int,
    "n_train": int,
    "settings": dict[str, Any],
    "seconds": float,
    "global_step": int,
}

# A histogram of so many scores, evenly spaced, looks like that of all.
_IN_HISTOGRAM = 2**22

_NOT_KEPT = Shown(None, None, "not kept with the report: give load() the dataset")


@dataclass(eq=False, repr=False)
class InfluenceReport:
    """A score for every training example and query.

    A score is the predicted change of the query's measurement (by default its mean loss), in that measurement's own
    unit, if this training example were removed. Positive: removing it raises the query's loss, so the example is a
    *proponent* of what the model does there. Negative: removing it lowers the loss, an *opponent*.

    Attributes:
        scores: ``(n_queries, n_train)``, float64; one query unless ``per_example=True``. With ``keep`` only the
            strongest, ``(n_queries, 2·keep)``: the highest and then the lowest, falling.
        indices: The dataset index of each column, ``(n_train,)``; with ``keep`` of each score, ``(n_queries, 2·keep)``.
        n_train: How many training examples were scored.
        solutions: How each query's solve went, ``n_queries`` of them; none where each example was scored for itself.
        curvature: How the Hessian products were made, and the ends of the spectrum if ``eigenvalues`` were asked for.
        targets: The target parameters that the scores are about.
        k: How many proponents and opponents are shown and logged.
        dataset: The training dataset, for looking at examples; ``None`` in a report that was loaded without it.
        queries: How up to eight of the query's examples are shown.
        settings: Method, solver and their parameters.
        seconds: Wall time of the whole call.
        loggers: Where :meth:`log` logs to by default: those of the trainer that was asked.
        global_step: The trainer's optimizer steps when it was asked.
        examples: How training examples are shown that were shown before, by dataset index.
        processes: The processes that have this report, of which the first one writes it.
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
    loggers: Sequence[Any] = ()
    global_step: int = 0
    examples: dict[int, Shown] = field(default_factory=dict)
    processes: ProcessGroup = field(default=SINGLE_PROCESS, repr=False)

    @property
    def solution(self) -> Solution | None:
        """How the solve went; with several queries the one with the largest residual; ``None`` without any."""
        return max(self.solutions, key=lambda solution: solution.residual, default=None)

    @property
    def _of_themselves(self) -> bool:
        """Whether each example was scored for itself, by ``trainer.self_influence``: there is no query to solve for."""
        return not self.solutions

    @property
    def _kept(self) -> int | None:
        """How many scores of either end there are, where not all were kept."""
        return self.scores.shape[1] // 2 if self.indices.ndim == 2 else None

    @property
    def _ends(self) -> tuple[str, str]:
        """What the ends of the ranking are called: what an example does to itself is no vote for or against."""
        return ("highest", "lowest") if self._of_themselves else ("proponents", "opponents")

    @property
    def _whose(self) -> str:
        return "its own" if self._of_themselves else "the query's"

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
        count = self._checked(k, self.k)
        if self._kept is None:
            return strongest(self.scores, self.indices, count, largest=largest)
        ends = Ranking(self.indices, self.scores) if largest else Ranking(self.indices.flip(1), self.scores.flip(1))
        return Ranking(*(end[:, :count] for end in ends))

    def _checked(self, k: int | None, default: int) -> int:
        k = default if k is None else k
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigurationError(f"`k` must be a whole number of at least 1, got {k!r}.")
        if self._kept is not None and k > self._kept:
            raise ConfigurationError(
                f"The report kept the {self._kept} strongest of either end, not {k}. Ask again with keep={k}, or"
                " without `keep` for all scores."
            )
        return min(k, self.n_train)

    def _check_query(self, query: int) -> None:
        queries = self.scores.shape[0]
        if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < queries:
            raise ConfigurationError(f"`query` must be a whole number from 0 to {queries - 1}, got {query!r}.")

    def by_group(self, groups: Grouping | None = None, query: int | None = None) -> Groups:
        """What removing whole groups of training examples would do to a query: the sums of their scores.

        A sum is of first order: it takes the effects of a group's examples to add up, as they do while the group is a
        small part of the data. For a large one it mostly tells too little: without ``m`` of the ``n`` examples each of
        the others weighs more, which alone makes the change ``(n−1)/(n−m)`` times as large (see also Koh et al., arXiv
        1905.13289). Where the group is unlike the rest, so that the curvature is another without it, a sum may as well
        tell too much. The order of groups survives this better than the numbers do. Of ``trainer.self_influence``,
        where each score is about another loss, look at the means: which group does the model know by heart?

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
            self._check_query(query)
        if self._kept is not None:
            raise ConfigurationError(
                f"The report kept the {self._kept} strongest of either end alone, which say nothing of whole groups."
                " Ask again without `keep`."
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
        if self._of_themselves:
            return group_scores(
                names, scores, "mean = predicted change of an example's own loss if it were removed, total = their sum"
            )
        queries = len(self.scores)
        whose = (
            f"query {query}" if query is not None else f"the mean of {queries} queries" if queries > 1 else "the query"
        )
        meaning = f"total = sum of scores: to first order, what removing the whole group would do to {whose}"
        return group_scores(names, scores, meaning)

    def _read(self, function: Any) -> list[Any]:
        """A function of each item of the dataset that was scored."""
        if self.dataset is None:
            raise ConfigurationError(
                "The report was loaded without its dataset, so its items cannot be read. Give load() the `dataset`, or"
                " `groups` as one value for each dataset index."
            )
        with isolate_rng():  # random augmentation draws from the generators that training goes on with
            return [function(self.dataset[index]) for index in self.indices.tolist()]

    def _example(self, index: int) -> Shown:
        """How a training example is shown: always as it was the first time, if its dataset augments at random."""
        if index not in self.examples:
            if self.dataset is None:
                return _NOT_KEPT
            with isolate_rng():
                self.examples[index] = Shown.of(self.dataset[index])
        return self.examples[index]

    def to_dataframe(self) -> pandas.DataFrame:
        """All scores that were kept as a table with columns ``query``, ``index`` (of the dataset) and ``score``.

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
                "index": self.indices.expand(queries, -1).flatten().numpy(),
                "score": self.scores.flatten().numpy(),
            }
        )

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

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into a folder, with how the examples look that it shows: the query's, and up to ``k``
        proponents and opponents of each of the first eight queries. An old report is replaced only by a whole new one.
        Of several processes the first one writes, and the others do not wait for it: ``trainer.strategy.barrier()``
        before they read it.

        ``report.json`` has the settings, how the solves went, labels and texts in plain words and numbers;
        ``scores.safetensors`` the scores, their dataset indices, the targets and the pictures. The training data, and
        the solution vectors, are not kept.

        Args:
            folder: Where to. Folders above it that are missing are made.

        Raises:
            ConfigurationError: If there is a file, or a folder with anything but a report in it; it is left alone.
        """
        if self.processes.rank:
            return
        rankings = (self.proponents(), self.opponents())
        shown = {int(index) for ranking in rankings for index in ranking.indices[:_MOST_QUERIES].flatten()}
        looks = {f"queries/{position}": example for position, example in enumerate(self.queries)}
        looks |= {
            f"examples/{index}": example
            for index in sorted(shown)
            if (example := self._example(index)) is not _NOT_KEPT
        }
        tensors = {
            "scores": self.scores,
            "indices": self.indices,
            **{f"targets/{name}": _packed(entries) for name, entries in self.targets.items()},
            **{name: torch.as_tensor(example.image) for name, example in looks.items() if example.image is not None},
        }
        record = {
            **{name: getattr(self, name) for name in _PLAIN},
            "solutions": [solution.record() for solution in self.solutions],
            "looks": {name: {"label": example.label, "text": example.text} for name, example in looks.items()},
        }
        write_folder(folder, _FORMAT, record, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dataset: Any = None) -> InfluenceReport:
        """Reads what :meth:`save` wrote. Nothing is unpickled, and no path that the files hold is followed.

        Args:
            folder: The folder.
            dataset: The training dataset (that of the loader), to look at more examples than were kept, or to group
                scores by what is in them.

        Returns:
            The same report, but for ``loggers``, which are none, and the solutions' ``x``, which are empty.

        Raises:
            ConfigurationError: If the folder holds something else, another version, or files that are damaged, were
                edited or do not belong together; or if ``dataset`` is too short to be the one that was scored.
            FileNotFoundError: If there is no such folder.
        """
        record, tensors = read_folder(folder, _FORMAT)
        with parse_errors_name(folder, REMEDY):
            report = cls._from_record(record, tensors)
            str(report), report.summary()  # what cannot be told is no report
        last = int(report.indices.max())
        if hasattr(dataset, "__len__") and len(dataset) <= last:
            raise ConfigurationError(
                f"`dataset` has {len(dataset)} items, but the report scores dataset indices up to {last}. Give the"
                " dataset of the training loader."
            )
        report.dataset = dataset
        return report

    @classmethod
    def _from_record(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> InfluenceReport:
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
            **plain,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Looking at it
    # ----------------------------------------------------------------------------------------------------------------

    def log(self, loggers: Iterable[Any] | None = None, *, prefix: str = "gif/influence") -> None:
        """Logs the report, to each logger what it can take. A W&B run that is finished is left alone, with a warning.

        The keys are the same in each call:

        - every logger: the numbers of :meth:`summary` as ``gif/influence/NAME``;
        - with tables (W&B): ``…/examples``, up to the first eight queries with their proponents and opponents: label,
          score, and picture or values of each; ``…/scores``, the histogram of the scores; ``…/solve``, the residual
          after each step of the (worst) solve; ``…/eigenvalues``, where these were asked for;
        - with a writer of figures, histograms and texts (TensorBoard): ``…/plot``, the figure of the first query, if
          matplotlib is installed; ``…/scores``, the histogram of the scores; ``…/report``, the report as it is printed.

        Args:
            loggers: Lightning loggers; by default those of the trainer that was asked.
            prefix: Start of every key.
        """
        loggers = running(self.loggers if loggers is None else loggers)
        log_scalars(loggers, self.summary(), prefix=prefix, step=self.global_step)
        columns = ["query", "kind", "rank", "index", "score", "target", "example"]
        log_table(loggers, f"{prefix}/examples", columns, self._rows())
        if self.solution is not None:
            log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], enumerate(self.solution.residuals))
        log_eigenvalues(loggers, prefix, self.curvature)
        every = max(self.scores.numel() // _IN_HISTOGRAM, 1)
        log_histogram(loggers, f"{prefix}/scores", self.scores[:, ::every], step=self.global_step)
        log_text(loggers, f"{prefix}/report", str(self), step=self.global_step)
        log_figure(loggers, f"{prefix}/plot", self.plot, step=self.global_step)

    def _rows(self) -> Iterator[list[Any]]:
        several = self.scores.shape[0] > 1
        for position, shown in enumerate(self.queries):
            yield [position if several else 0, "query", position + 1, None, None, shown.label, shown.look]
        for kind, ranking in (("proponent", self.proponents()), ("opponent", self.opponents())):
            for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
                if query == _MOST_QUERIES:
                    break
                for rank, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1):
                    shown = self._example(index)
                    yield [query, kind, rank, index, score, shown.label, shown.look]

    def plot(self, query: int = 0, k: int | None = None) -> Figure:
        """The query's strongest proponents and opponents, the histogram of all scores, and how few examples carry them.

        Args:
            query: Which query.
            k: How many of each; by default up to 8.

        Raises:
            ConfigurationError: If there is no such query, or ``k`` is not a whole number of at least 1.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        self._check_query(query)
        queries = self.scores.shape[0]
        count = self._checked(k, min(self.k, 8))
        rankings = dict(zip(self._ends, (self.proponents(count), self.opponents(count)), strict=True))

        made, axes = figure(3, count + 1, width=max(1.3 * (count + 1), 6.5), height=5.8)
        beside, below, *_ = (row[0] for row in axes)
        below.set_axis_off()
        if query < len(self.queries):
            shown = self.queries[query]
            several = queries == 1 and len(self.queries) > 1
            what = "query, first of several" if several else "query" if queries == 1 else f"query {query}"
            show(beside, shown, what if shown.label is None else f"{what}\ntarget {shorten(shown.label)}")
        else:
            beside.set_axis_off()
        for row, (kind, ranking) in zip(axes, rankings.items(), strict=False):
            row[1].set_ylabel(kind)
            for axis, index, score in zip(row[1:], ranking.indices[query], ranking.scores[query], strict=True):
                shown = self._example(int(index))
                label = "" if shown.label is None else f": {shorten(shown.label)}"
                show(axis, shown, f"#{int(index)}{label}\n{float(score):+.2g}")
        grid = axes[2][0].get_gridspec()
        for axis in axes[2]:
            axis.remove()
        below = grid[2, :].subgridspec(1, 2)
        histogram, shares = made.add_subplot(below[0]), made.add_subplot(below[1])
        histogram.hist(self.scores[query].numpy(), bins=80, log=True)
        histogram.axvline(0.0, color="grey", linestyle=":")
        those = "scores" if self._kept is None else f"the strongest {self._kept} of either end"
        histogram.set_title(f"{those}: change of {self._whose} loss without the example", fontsize=8)
        histogram.set_ylabel("examples", fontsize=8)
        histogram.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))  # scores are small where data are many
        if self._kept is None:
            draw_shares(shares, self.scores[query].abs())
        else:
            shares.set_axis_off()  # what share of all these carry is not known
        for axis in (histogram, shares):
            axis.tick_params(which="both", labelsize=7)
        return made

    def __repr__(self) -> str:
        queries = self.scores.shape[0]
        size = f"{queries} quer{'y' if queries == 1 else 'ies'} × {self.n_train} training examples"
        ends = []
        for kind, ranking, best in (
            ("proponent", self.proponents(1), torch.argmax),
            ("opponent", self.opponents(1), torch.argmin),
        ):
            query = int(best(ranking.scores))
            of = "" if queries == 1 else f" of query {query}"
            score = float(ranking.scores[query, 0])
            ends.append(f"strongest {kind}{of} {int(ranking.indices[query, 0])} ({score:+.2g})")
        solved = f", {self.solution.solver} {self.solution.status}" if self.solution else ""
        size = f"{self.n_train} training examples for themselves" if self._of_themselves else size
        return f"InfluenceReport({size}, {', '.join(ends)}, {self.settings['method']}{solved})"

    def __str__(self) -> str:
        queries = self.scores.shape[0]
        on = "themselves" if self._of_themselves else f"{queries} quer{'y' if queries == 1 else 'ies'}"
        solved = f"; {self.curvature['inverse']}" if "inverse" in self.curvature else ""
        if (solution := self.solution) is not None:
            as_asked = solution.status is Status.MAX_ITER and self.settings.get("rtol") is None
            told = "" if as_asked else f" {solution.status}"
            solved = f"; {solution.solver}{told} after {solution.iterations} steps, residual {solution.residual:.1e}"
        states = self.settings.get("snapshots") or ()
        averaged = f", the mean over {1 + len(states)} states of training" if states else ""
        lines = [
            f"Influence of {self.n_train} training examples on {on}{averaged}"
            f" ({self.settings['method']}, {self.targets.count} target parameters{solved}; {self.seconds:.1f} s)",
            f"score = predicted change of {self._whose} loss if the example were removed, by dataset index",
        ]
        rankings = dict(zip(self._ends, (self.proponents(), self.opponents()), strict=True))
        for query in range(min(queries, _MOST_QUERIES)):
            for kind, ranking in rankings.items():
                pairs = zip(ranking.indices[query].tolist(), ranking.scores[query].tolist(), strict=True)
                start = kind if queries == 1 else f"query {query} {kind}"
                lines.append(f"{start}: " + ", ".join(f"{index} ({score:+.2g})" for index, score in pairs))
        if queries > _MOST_QUERIES:
            lines.append(f"and {queries - _MOST_QUERIES} more queries, in proponents() and opponents()")
        return "\n".join(lines)


def first_shown(query: Examples, most: int = _MOST_QUERIES) -> list[Shown]:
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


def _packed(entries: Tensor) -> Tensor:
    """Sorted flat indices as bits, ``(⌈(last + 1)/8⌉,)`` uint8: all of a parameter's entries take one bit each."""
    mask = torch.zeros(int(entries[-1]) + 1, dtype=torch.uint8)
    mask[entries] = 1
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy())).nonzero().squeeze(1)


def _picture(name: str, tensors: Mapping[str, Tensor]) -> Any | None:
    """The picture of an example in a file, if it has one."""
    if name not in tensors:
        return None
    image = tensors[name]
    if image.dtype != torch.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"the picture {name!r} is {image.dtype} {list(image.shape)}; expected uint8 (H, W) or (H, W, 3)"
        )
    return image.numpy()
