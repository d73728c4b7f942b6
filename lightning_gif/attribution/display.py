"""How an influence report is printed, drawn and logged."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data.streams import Stream
from ..reporting.loggers import log_eigenvalues, log_figure, log_histogram, log_scalars, log_table, log_text, running
from ..reporting.notes import describe_share, describe_solve
from ..reporting.previews import figure, show
from ..solvers import Status
from .record import MOST_QUERIES, InfluenceRecord
from .uncertainty import LEVEL, Intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_shares", "log", "rows", "short_text", "shorten", "text"]


# The number of scores, evenly spaced, that a logged histogram is computed from. All scores would give the same picture.
_IN_HISTOGRAM = 2**22

# Examples in each row of a figure by default.
_MOST_DRAWN = 8


def text(record: InfluenceRecord) -> str:
    """The report as text, with the proponents and opponents of up to eight queries."""
    queries = record.scores.shape[0]
    on = "themselves" if record.is_self_influence else _counted(queries)
    if record.n_fits > 1:
        each = f" of {record.n_states} states each" if record.n_states > 1 else ""
        averaged = f", averaged over {record.n_fits} fits{each}"
    else:
        averaged = f", averaged over {record.n_states} states of training" if record.n_states > 1 else ""
    lines = [
        f"Influence of {record.n_train} training examples on {on}{averaged}"
        f" ({record.settings['method']}, {record.targets.count} target parameters{_share(record)}{_solve(record)};"
        f" {record.seconds:.1f} s)",
        f"score = predicted change of {_owner(record)} {_measured(record)} if the example were removed; examples by"
        f" {_numbering(record)}",
    ]
    if "losses" in record.settings:
        lines.append(f"losses by {record.settings['losses']}")
    ends, uncertain = _ends(record), False
    for query in range(min(queries, MOST_QUERIES)):
        for name, end in ends.items():
            amounts = end.amounts(query, brackets=True)
            uncertain |= any(amount.endswith("?") for amount in amounts)
            pairs = zip(_names(record, end.indices[query]), amounts, strict=True)
            start = name if queries == 1 else f"query {query} {name}"
            lines.append(f"{start}: " + ", ".join(f"{index} {amount}" for index, amount in pairs))
    if queries > MOST_QUERIES:
        lines.append(f"and {queries - MOST_QUERIES} more queries, see proponents() and opponents()")
    return "\n".join([*lines, *_error_notes(record, uncertain)])


def _error_notes(record: InfluenceRecord, uncertain: bool) -> Iterator[str]:
    """The lines on the error bars, or on how to get them.

    Args:
        record: The report.
        uncertain: Whether a shown score has an interval that contains 0.
    """
    if record.standard_errors is None:
        if record.n_states == 1 and not record.is_self_influence:
            yield (
                "scores of the present weights alone; averaged with a snapshot, which GIFCallback keeps in fit, they"
                " would predict retraining better"
            )
        if record.is_self_influence:
            yield (
                "no error bars: they need several fits (InfluenceReport.mean), or GIFCallback(snapshots=2) and then"
                " trainer.self_influence(snapshots=True)"
            )
        else:
            yield "no error bars: they need several fits (influence_over_fits), or one with GIFCallback(snapshots=2)"
        return
    averaged = f"{record.n_averaged} {'fits' if record.n_fits > 1 else 'states'}"
    source = averaged if record.n_fits > 1 else f"{averaged} of one fit (too narrow to cover other fits)"
    mark = "; ? = interval contains 0, sign uncertain" if uncertain else ""
    yield f"± = {LEVEL * 100:.0f} % interval from {source}{mark}"
    if record.agreement is not None:
        yield f"agreement of the {averaged}: {record.agreement:.2f} (1: the same scores, 0: nothing in common)"


def _share(record: InfluenceRecord) -> str:
    """Which share of the gradient the target parameters hold, if this is known and they are not all parameters."""
    held = describe_share(record.gradient_share)
    mean = " on average" if held and (record.is_self_influence or record.scores.shape[0] > 1) else ""
    return f"; {held}{mean}" if held else ""


def _numbering(record: InfluenceRecord) -> str:
    """What the indices of a report are."""
    if isinstance(record.dataset, Stream):
        return "the id of their row"
    below = record.innermost_indices()
    return "dataset index" if below is None else "index in the training Subset [and in the dataset below it]"


def _names(record: InfluenceRecord, indices: Tensor) -> list[str]:
    """Indices ``(k,)`` as text, each with the index in the dataset below a ``Subset`` in brackets."""
    below = record.innermost_indices(indices)
    if below is None:
        return [str(index) for index in indices.tolist()]
    return [f"{index} [{inner}]" for index, inner in zip(indices.tolist(), below.tolist(), strict=True)]


def _measured(record: InfluenceRecord) -> str:
    """The name of what a query measures: "measurement" if the module defines one, else "loss"."""
    return "measurement" if record.settings.get("measures") == "influence_measurement" else "loss"


def _solve(record: InfluenceRecord) -> str:
    solution = record.solution
    if solution is None:
        return f"; {record.curvature['inverse']}" if "inverse" in record.curvature else ""
    # Without `rtol` a solve takes a fixed number of iterations, so reaching `max_iter` is not a failure to converge.
    fixed = solution.status is Status.MAX_ITER and record.settings.get("rtol") is None
    status = None if fixed else solution.status
    return f"; {describe_solve(solution.solver, status, solution.iterations, solution.residual)}"


def short_text(record: InfluenceRecord) -> str:
    """The size of the report, the strongest proponent and the strongest opponent, in one line."""
    queries = record.scores.shape[0]
    size = f"{_counted(queries)} × {record.n_train} training examples"
    ends = []
    for name, end, best in (
        ("proponent", _End.of(record, 1, largest=True), torch.argmax),
        ("opponent", _End.of(record, 1, largest=False), torch.argmin),
    ):
        query = int(best(end.scores))
        of = "" if queries == 1 else f" of query {query}"
        (amount,) = end.amounts(query, brackets=True)
        ends.append(f"strongest {name}{of} {int(end.indices[query, 0])} {amount}")
    solved = f", {record.solution.solver} {record.solution.status}" if record.solution else ""
    size = f"{record.n_train} training examples for themselves" if record.is_self_influence else size
    return f"InfluenceReport({size}, {', '.join(ends)}, {record.settings['method']}{solved})"


def _counted(queries: int) -> str:
    return f"{queries} quer{'y' if queries == 1 else 'ies'}"


class _End(NamedTuple):
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
    def of(cls, record: InfluenceRecord, k: int | None = None, *, largest: bool) -> _End:
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


def _ends(record: InfluenceRecord, k: int | None = None) -> dict[str, _End]:
    """Both ends of the ranking by name. Self-influence has no query, so its ends are no proponents and opponents."""
    names = ("highest", "lowest") if record.is_self_influence else ("proponents", "opponents")
    ends = (_End.of(record, k, largest=largest) for largest in (True, False))
    return dict(zip(names, ends, strict=True))


def _owner(record: InfluenceRecord) -> str:
    return "its own" if record.is_self_influence else "the query's"


def log(record: InfluenceRecord, loggers: Iterable[Any], prefix: str) -> None:
    """Logs the report, see :meth:`InfluenceReport.log`."""
    loggers, step = running(loggers), record.context.global_step
    log_scalars(loggers, record.summary(), prefix=prefix, step=step)
    bounds = [] if record.standard_errors is None else ["low", "high"]
    columns = ["query", "kind", "rank", "index", "score", *bounds, "target", "example"]
    log_table(loggers, f"{prefix}/examples", columns, rows(record))
    if record.solution is not None:
        log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], enumerate(record.solution.residuals))
    log_eigenvalues(loggers, prefix, record.curvature)
    every = max(record.scores.numel() // _IN_HISTOGRAM, 1)
    log_histogram(loggers, f"{prefix}/scores", record.scores[:, ::every], step=step)
    log_text(loggers, f"{prefix}/report", text(record), step=step)
    log_figure(loggers, f"{prefix}/plot", lambda: draw(record), step=step)


def rows(record: InfluenceRecord) -> Iterator[list[Any]]:
    """The rows of the table of examples: query, kind, rank, dataset index, score, target, and picture or text.

    With standard errors, the ends of the interval follow the score.
    """
    several = record.scores.shape[0] > 1
    none = [] if record.standard_errors is None else [None, None]
    for position, shown in enumerate(record.queries):
        yield [position if several else 0, "query", position + 1, None, None, *none, shown.label, shown.look]
    for kind, largest in (("proponent", True), ("opponent", False)):
        end = _End.of(record, largest=largest)
        values = torch.stack([end.scores, *(end.intervals or ())], dim=2)
        for query, (indices, of_query) in enumerate(zip(end.indices, values, strict=True)):
            if query == MOST_QUERIES:
                break
            for rank, (index, numbers) in enumerate(zip(indices.tolist(), of_query.tolist(), strict=True), 1):
                shown = record.shown(index)
                yield [query, kind, rank, index, *numbers, shown.label, shown.look]


def draw(record: InfluenceRecord, query: int = 0, k: int | None = None) -> Figure:
    """Draws a query's strongest examples and plots of its scores, see :meth:`InfluenceReport.plot`.

    Raises:
        ConfigurationError: If there is no such query, or ``k`` is not a whole number of at least 1.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    record.check_query(query)
    count = record.check_k(k, min(record.k, _MOST_DRAWN))
    drawn, axes = figure(3, count + 1, width=max(1.3 * (count + 1), 6.5), height=5.8)
    _draw_query(axes[0][0], record, query)
    axes[1][0].set_axis_off()
    ends = _ends(record, count)
    for row, (name, end) in zip(axes, ends.items(), strict=False):
        row[1].set_ylabel(name)
        for axis, index, amount in zip(row[1:], end.indices[query].tolist(), end.amounts(query), strict=True):
            shown = record.shown(index)
            label = "" if shown.label is None else f": {shorten(shown.label)}"
            show(axis, shown, f"#{index}{label}\n{amount}")
    grid = axes[2][0].get_gridspec()
    for axis in axes[2]:
        axis.remove()
    parts = grid[2, :].subgridspec(1, 2 if record.standard_errors is None else 3)
    histogram, shares, *bars = (drawn.add_subplot(part) for part in parts)
    _draw_histogram(histogram, record, query)
    if record.n_kept is None:
        draw_shares(shares, record.scores[query].abs())
    else:
        shares.set_axis_off()  # with `keep`, the sum over all scores is not known
    for axis in bars:
        _draw_intervals(axis, list(ends.values()), query)
    for axis in (histogram, shares, *bars):
        axis.tick_params(which="both", labelsize=7)
    return drawn


def _draw_intervals(axes: Axes, ends: list[_End], query: int) -> None:
    """Draws the scores of the shown examples with their intervals, the highest at the top."""
    highest, lowest = ends
    assert highest.intervals is not None
    assert lowest.intervals is not None
    pairs = zip((*highest[:2], *highest.intervals), (*lowest[:2], *lowest.intervals), strict=True)
    indices, scores, low, high = (torch.cat([up[query], down[query].flip(0)]) for up, down in pairs)
    places = -torch.arange(len(scores))
    distances = torch.stack([scores - low, high - scores]).numpy()
    axes.errorbar(scores.numpy(), places.numpy(), xerr=distances, fmt=".", elinewidth=1, markersize=4)
    axes.axvline(0.0, color="grey", linestyle=":")
    axes.set_yticks(places.tolist(), [f"#{index}" for index in indices.tolist()])
    axes.set_title(f"{LEVEL * 100:.0f} % intervals", fontsize=8)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))


def _draw_query(axes: Axes, record: InfluenceRecord, query: int) -> None:
    queries = record.scores.shape[0]
    if query >= len(record.queries):
        axes.set_axis_off()
        return
    shown = record.queries[query]
    several = queries == 1 and len(record.queries) > 1
    what = "query, first of several" if several else "query" if queries == 1 else f"query {query}"
    show(axes, shown, what if shown.label is None else f"{what}\ntarget {shorten(shown.label)}")


def _draw_histogram(axes: Axes, record: InfluenceRecord, query: int) -> None:
    axes.hist(record.scores[query].numpy(), bins=80, log=True)
    axes.axvline(0.0, color="grey", linestyle=":")
    which = "scores" if record.n_kept is None else f"the {record.n_kept} strongest scores of each end"
    title = f"{which}: change of {_owner(record)} {_measured(record)} without the example"
    if record.standard_errors is not None:  # beside two other plots
        title = textwrap.fill(title, 40)
    axes.set_title(title, fontsize=8)
    axes.set_ylabel("examples", fontsize=8)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))  # scores of large datasets are small


def shorten(label: Any) -> str:
    """A label as text, shortened to fit into a title."""
    return textwrap.shorten(str(label), 24, placeholder=" …") if isinstance(label, str) else str(label)


def draw_shares(axes: Axes, sizes: Tensor) -> None:
    """Draws which share of the sum of ``sizes`` ``(n,)`` its ``m`` largest values have, as a function of ``m``."""
    total, count = float(sizes.sum()), len(sizes)
    axes.set_xlabel("number of examples, largest |score| first", fontsize=8)
    axes.set_ylabel("share of all |score|", fontsize=8)
    axes.set_ylim(0.0, 1.05)
    if not total:
        axes.text(0.5, 0.5, "all scores are 0", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        return
    shares = sizes.sort(descending=True).values.cumsum(0) / total
    half = min(int(torch.searchsorted(shares, 0.5)) + 1, count)
    places = (
        torch.logspace(0, math.log10(count), 500).round().long().clamp(1, count).unique()
    )  # 500 points suffice for a curve
    axes.semilogx(places.numpy(), shares[places - 1].numpy())
    axes.plot([half], [float(shares[half - 1])], "o", color="C1", markersize=5)
    many = f"{half} of {count} examples" if half > 1 else f"1 of {count} examples"
    axes.set_title(f"{many} ({100 * half / count:.3g} %) carr{'y' if half > 1 else 'ies'} half", fontsize=8)
    axes.axhline(0.5, color="grey", linestyle=":")
