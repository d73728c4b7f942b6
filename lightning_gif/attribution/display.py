"""How an influence report is printed, drawn and logged."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.streams import Stream
from ..reporting.loggers import log_eigenvalues, log_figure, log_histogram, log_scalars, log_table, log_text, running
from ..reporting.notes import describe_share, describe_solve
from ..reporting.previews import figure, show
from ..solvers import Status
from .ranking import Ranking
from .record import MOST_QUERIES, InfluenceRecord

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
    states = record.settings.get("snapshots") or ()
    averaged = f", the mean over {1 + len(states)} states of training" if states else ""
    lines = [
        f"Influence of {record.n_train} training examples on {on}{averaged}"
        f" ({record.settings['method']}, {record.targets.count} target parameters{_share(record)}{_solve(record)};"
        f" {record.seconds:.1f} s)",
        f"score = predicted change of {_owner(record)} {_measured(record)} if the example were removed; examples by"
        f" {_numbering(record)}",
    ]
    if "losses" in record.settings:
        lines.append(f"losses by {record.settings['losses']}")
    for query in range(min(queries, MOST_QUERIES)):
        for end, ranking in _rankings(record).items():
            pairs = zip(_names(record, ranking.indices[query]), ranking.scores[query].tolist(), strict=True)
            start = end if queries == 1 else f"query {query} {end}"
            lines.append(f"{start}: " + ", ".join(f"{name} ({score:+.2g})" for name, score in pairs))
    if queries > MOST_QUERIES:
        lines.append(f"and {queries - MOST_QUERIES} more queries, see proponents() and opponents()")
    return "\n".join(lines)


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
    for end, ranking, best in (
        ("proponent", record.proponents(1), torch.argmax),
        ("opponent", record.opponents(1), torch.argmin),
    ):
        query = int(best(ranking.scores))
        of = "" if queries == 1 else f" of query {query}"
        score = float(ranking.scores[query, 0])
        ends.append(f"strongest {end}{of} {int(ranking.indices[query, 0])} ({score:+.2g})")
    solved = f", {record.solution.solver} {record.solution.status}" if record.solution else ""
    size = f"{record.n_train} training examples for themselves" if record.is_self_influence else size
    return f"InfluenceReport({size}, {', '.join(ends)}, {record.settings['method']}{solved})"


def _counted(queries: int) -> str:
    return f"{queries} quer{'y' if queries == 1 else 'ies'}"


def _rankings(record: InfluenceRecord, k: int | None = None) -> dict[str, Ranking]:
    """Both ends of the ranking by name. Self-influence has no query, so its ends are no proponents and opponents."""
    names = ("highest", "lowest") if record.is_self_influence else ("proponents", "opponents")
    return dict(zip(names, (record.proponents(k), record.opponents(k)), strict=True))


def _owner(record: InfluenceRecord) -> str:
    return "its own" if record.is_self_influence else "the query's"


def log(record: InfluenceRecord, loggers: Iterable[Any], prefix: str) -> None:
    """Logs the report, see :meth:`InfluenceReport.log`."""
    loggers, step = running(loggers), record.context.global_step
    log_scalars(loggers, record.summary(), prefix=prefix, step=step)
    columns = ["query", "kind", "rank", "index", "score", "target", "example"]
    log_table(loggers, f"{prefix}/examples", columns, rows(record))
    if record.solution is not None:
        log_table(loggers, f"{prefix}/solve", ["iteration", "residual"], enumerate(record.solution.residuals))
    log_eigenvalues(loggers, prefix, record.curvature)
    every = max(record.scores.numel() // _IN_HISTOGRAM, 1)
    log_histogram(loggers, f"{prefix}/scores", record.scores[:, ::every], step=step)
    log_text(loggers, f"{prefix}/report", text(record), step=step)
    log_figure(loggers, f"{prefix}/plot", lambda: draw(record), step=step)


def rows(record: InfluenceRecord) -> Iterator[list[Any]]:
    """The rows of the table of examples: query, kind, rank, dataset index, score, target, and picture or text."""
    several = record.scores.shape[0] > 1
    for position, shown in enumerate(record.queries):
        yield [position if several else 0, "query", position + 1, None, None, shown.label, shown.look]
    for kind, ranking in (("proponent", record.proponents()), ("opponent", record.opponents())):
        for query, (indices, scores) in enumerate(zip(*ranking, strict=True)):
            if query == MOST_QUERIES:
                break
            for rank, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1):
                shown = record.shown(index)
                yield [query, kind, rank, index, score, shown.label, shown.look]


def draw(record: InfluenceRecord, query: int = 0, k: int | None = None) -> Figure:
    """Draws a query's strongest examples and two plots of its scores, see :meth:`InfluenceReport.plot`.

    Raises:
        ConfigurationError: If there is no such query, or ``k`` is not a whole number of at least 1.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    record.check_query(query)
    count = record.check_k(k, min(record.k, _MOST_DRAWN))
    drawn, axes = figure(3, count + 1, width=max(1.3 * (count + 1), 6.5), height=5.8)
    _draw_query(axes[0][0], record, query)
    axes[1][0].set_axis_off()
    for row, (end, ranking) in zip(axes, _rankings(record, count).items(), strict=False):
        row[1].set_ylabel(end)
        for axis, index, score in zip(row[1:], ranking.indices[query], ranking.scores[query], strict=True):
            shown = record.shown(int(index))
            label = "" if shown.label is None else f": {shorten(shown.label)}"
            show(axis, shown, f"#{int(index)}{label}\n{float(score):+.2g}")
    grid = axes[2][0].get_gridspec()
    for axis in axes[2]:
        axis.remove()
    halves = grid[2, :].subgridspec(1, 2)
    histogram, shares = drawn.add_subplot(halves[0]), drawn.add_subplot(halves[1])
    _draw_histogram(histogram, record, query)
    if record.n_kept is None:
        draw_shares(shares, record.scores[query].abs())
    else:
        shares.set_axis_off()  # with `keep`, the sum over all scores is not known
    for axis in (histogram, shares):
        axis.tick_params(which="both", labelsize=7)
    return drawn


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
    axes.set_title(f"{which}: change of {_owner(record)} {_measured(record)} without the example", fontsize=8)
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
