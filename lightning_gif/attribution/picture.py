"""The picture of an influence report: what was asked, how the model reads it, and which examples moved it."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reporting.charts import LOWERS, NEUTRAL, RAISES, draw_bars, draw_no_axes, named, percent, positions_of_ends
from ..reporting.previews import Shown, empty_figure, show
from .ends import End, ends_of, measured, owner
from .groups import Groups, group_scores
from .record import InfluenceRecord
from .uncertainty import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw", "draw_shares", "headline", "is_mean", "reading", "strongest_tokens", "sums_by_class"]


# Examples in each row by default, examples of a query that is their mean, classes, predicted classes, and tokens.
_MOST_DRAWN, _MOST_ASKED, _MOST_CLASSES, _MOST_PREDICTED, _MOST_TOKENS = 8, 4, 12, 5, 8

# Inches.
_WIDTH, _LEAST_WIDTH, _TOP, _LOW, _ROW, _LINE, _MARGIN = 1.25, 9.0, 2.5, 0.9, 1.75, 0.36, 0.9

# The lengths of the lines of a text: of the query, and of other examples.
_QUERY_TEXT, _TEXT = 38, 84


def draw(record: InfluenceRecord, query: int = 0, k: int | None = None, *, distribution: bool = False) -> Figure:
    """Draws what was asked, how the model reads it, and which examples moved it; see :meth:`InfluenceReport.plot`.

    Raises:
        ConfigurationError: If there is no such query, or ``k`` is not a whole number of at least 1.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    record.check_query(query)
    count = record.check_k(k, min(record.k, _MOST_DRAWN))
    ends = ends_of(record, count)
    shown = [[record.shown(index) for index in end.indices[query].tolist()] for end in ends.values()]
    asked, sums = _asked(record, query), sums_by_class(record, query)
    as_pictures = any(one.image is not None for one in (*(record.queries[i] for i in asked), *shown[0], *shown[1]))
    row = _ROW if as_pictures else _LINE * count
    bars = sums is not None or record.tokens or (record.predictions is not None and record.predictions.shape[1] > 1)
    heights = [_TOP if bars or as_pictures else _LOW] * bool(asked or sums) + [row + 0.3] * 2 + [_TOP] * distribution
    width = max(_WIDTH * count, _LEAST_WIDTH) if as_pictures else _LEAST_WIDTH + 1
    drawn = empty_figure(width, sum(heights) + _MARGIN)
    drawn.suptitle(headline(record, query), fontsize=13, fontweight="bold", parse_math=False)
    drawn.supxlabel(_explanation(record), fontsize=8)
    parts = iter(drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if asked or sums:
        _draw_top(next(parts), record, query, asked, sums)
    for (name, end), examples in zip(ends.items(), shown, strict=True):
        part = next(parts)
        part.suptitle(_heading(record, name), fontsize=10, x=0.01, ha="left")
        (_draw_pictures if as_pictures else _draw_list)(part, record, query, end, examples)
    if distribution:
        _draw_distribution(next(parts), record, query)
    return drawn


# --------------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------------


def headline(record: InfluenceRecord, query: int) -> str:
    """What was asked, in a few words: ``"Label 5, read as 9 (99.6 %)"``."""
    if record.is_self_influence:
        return "Self-influence: what the model had to memorize"
    queries = len(record.scores)
    which = f"Query {query} of {queries}: " if queries > 1 else ""
    if is_mean(record):
        return f"Query: the mean {measured(record)} of several examples"
    read = reading(record, query) if query < len(record.queries) else ""
    return which + read if read else which.removesuffix(": ") or "Query"


def reading(record: InfluenceRecord, query: int) -> str:
    """The label of a shown example of the query, and what the model predicts; empty if neither is known."""
    names, label = record.context.class_names, record.queries[query].label
    found = None if record.predictions is None else record.predictions[query]
    is_class = found is not None and len(found) > 1
    parts = []
    if label is not None:
        parts.append(f"{'label' if is_class or not isinstance(label, float) else 'target'} {named(label, names)}")
    if found is not None and is_class:
        best = int(found.argmax())
        parts.append(f"read as {named(best, names)} ({percent(float(found[best]))})")
    elif found is not None:
        parts.append(f"model output {float(found):.4g}")
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def _heading(record: InfluenceRecord, name: str) -> str:
    what = measured(record)
    return {
        "proponents": f"Proponents: without one of them, the query's {what} would be higher",
        "opponents": f"Opponents: without one of them, the query's {what} would be lower",
        "highest": "Highest scores: the model had to memorize these",
        "lowest": "Lowest scores: the model learned these from the others",
    }[name]


def _explanation(record: InfluenceRecord) -> str:
    removed = "left out of this run" if record.is_through_training else "removed"
    text = f"Score: the predicted change of {owner(record)} {measured(record)} if the training example were {removed}."
    if record.standard_errors is not None:
        text += f" ±: {LEVEL * 100:.0f} % interval. ?: the interval contains 0."
    return text


# --------------------------------------------------------------------------------------------------------------------
# The query, what the model predicts, and the sums by class
# --------------------------------------------------------------------------------------------------------------------


def sums_by_class(record: InfluenceRecord, query: int) -> Groups | None:
    """The sums of the scores of a query by label; ``None`` if labels are not known, or not all scores were kept."""
    if record.labels is None:
        return None
    return group_scores(record.labels.tolist(), record.scores[query], "")


def is_mean(record: InfluenceRecord) -> bool:
    """Whether the only query is the mean over several examples."""
    # The first batch, of which examples are shown, may have one example only.
    return len(record.scores) == 1 and record.settings.get("query_size", len(record.queries)) > 1


def _asked(record: InfluenceRecord, query: int) -> list[int]:
    """The positions of the examples of a query that are drawn."""
    if is_mean(record):
        return list(range(min(len(record.queries), _MOST_ASKED)))
    return [query] if query < len(record.queries) else []


def _draw_top(part: SubFigure, record: InfluenceRecord, query: int, asked: list[int], sums: Groups | None) -> None:
    is_class = record.predictions is not None and record.predictions.shape[1] > 1
    alone = not is_mean(record)
    predicted = bool(asked) and alone and is_class
    tokens = bool(asked) and alone and asked[0] < len(record.tokens)
    ratios = [1.0] * len(asked) + [1.1] * tokens + [1.4] * predicted + [2.2] * (sums is not None)
    axes = iter(part.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])
    for position in asked:
        _draw_query(next(axes), record, position, alone=alone)
    if tokens:
        _draw_tokens(next(axes), record, query)
    if predicted:
        _draw_predictions(next(axes), record, query)
    if sums is not None:
        _draw_sums(next(axes), record, query if predicted else None, sums)


def _draw_query(axes: Axes, record: InfluenceRecord, position: int, *, alone: bool) -> None:
    shown = record.queries[position]
    title = "The query" if alone else textwrap.fill(reading(record, position), 18)
    if shown.image is not None:
        show(axes, shown, title)
        return
    draw_no_axes(axes)
    axes.set_title(title, fontsize=9, parse_math=False)
    lines = textwrap.fill(shown.text, _QUERY_TEXT if alone else 18)
    axes.text(0.5, 0.95, lines, ha="center", va="top", fontsize=7, parse_math=False, transform=axes.transAxes)


def _draw_predictions(axes: Axes, record: InfluenceRecord, query: int) -> None:
    """Draws the probabilities of the classes that the model finds most likely, and of the label."""
    assert record.predictions is not None
    found, label = record.predictions[query], record.queries[query].label
    best = found.argsort(descending=True, stable=True)[:_MOST_PREDICTED].tolist()
    if isinstance(label, int) and 0 <= label < len(found) and label not in best:
        best[-1] = label
    values = [float(found[one]) for one in best]
    colors = [RAISES if one == label else LOWERS if one == best[0] else NEUTRAL for one in best]
    names = [_class_name(record, one, None, label) for one in best]
    draw_bars(axes, names, values, [percent(value) for value in values], colors)
    axes.set_xlim(0.0, 1.35)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("How the model reads it", fontsize=9)


def strongest_tokens(record: InfluenceRecord, query: int) -> list[tuple[str, float]]:
    """The tokens of a shown query that its loss depends on most, the highest effect first."""
    tokens = record.tokens[query] if query < len(record.tokens) else []
    strongest = sorted(tokens, key=lambda one: -abs(one[1]))[:_MOST_TOKENS]
    return sorted((one for one in strongest if one[1]), key=lambda one: -one[1])


def _draw_tokens(axes: Axes, record: InfluenceRecord, query: int) -> None:
    """Draws the tokens that the loss of the query depends on most."""
    shown = strongest_tokens(record, query)
    values = [effect for _, effect in shown]
    colors = [RAISES if effect > 0 else LOWERS for effect in values]
    draw_bars(
        axes, [named(token) for token, _ in shown], values, [f"{effect:+.2g}" for effect in values], colors, margin=0.45
    )
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Its loss without a token", fontsize=9)


def _draw_sums(axes: Axes, record: InfluenceRecord, query: int | None, sums: Groups) -> None:
    """Draws the sum, or for self-influence the mean, of the scores of each class, the highest at the top."""
    label = predicted = None
    if query is not None and record.predictions is not None:
        label, predicted = record.queries[query].label, int(record.predictions[query].argmax())
    values = (sums.means if record.is_self_influence else sums.totals).tolist()
    order = sorted(range(len(values)), key=lambda one: -values[one])
    shown = [None if one is None else order[one] for one in positions_of_ends(len(order), _MOST_CLASSES)]
    left_out = len(order) - len(shown) + 1
    names = [f"… {left_out} more" if i is None else _class_name(record, sums.names[i], predicted, label) for i in shown]
    draw_bars(
        axes,
        names,
        [None if i is None else values[i] for i in shown],
        ["" if i is None else f"{values[i]:+.2g}" for i in shown],
        [RAISES if i is not None and values[i] > 0 else LOWERS for i in shown],
    )
    what = "Mean score by class" if record.is_self_influence else "Scores added up by class"
    axes.set_title(what, fontsize=9)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))


def _class_name(record: InfluenceRecord, one: int, predicted: int | None, label: object) -> str:
    marks = ["label"] * (one == label) + ["read as"] * (one == predicted)
    return named(one, record.context.class_names) + (f" ({', '.join(marks)})" if marks else "")


# --------------------------------------------------------------------------------------------------------------------
# Training examples
# --------------------------------------------------------------------------------------------------------------------


def _labelled(record: InfluenceRecord, index: int, shown: Shown) -> str:
    """The dataset index and the label of a training example: ``"#12 label 5"``, or ``"#12 cat"``."""
    if shown.label is None:
        return f"#{index}"
    name = named(shown.label, record.context.class_names)
    if isinstance(shown.label, float):
        return f"#{index} target {name}"
    return f"#{index} {name if name != str(shown.label) or isinstance(shown.label, str) else f'label {name}'}"


def _draw_pictures(part: SubFigure, record: InfluenceRecord, query: int, end: End, examples: list[Shown]) -> None:
    axes = part.subplots(1, len(examples), squeeze=False)[0]
    parts = zip(
        axes, end.indices[query].tolist(), end.scores[query].tolist(), end.amounts(query), examples, strict=True
    )
    for axis, index, score, amount, shown in parts:
        show(axis, shown, f"{_labelled(record, index, shown)}\n{amount}")
        axis.spines[:].set_color(RAISES if score > 0 else LOWERS)
        axis.spines[:].set_linewidth(1.5)


def _draw_list(part: SubFigure, record: InfluenceRecord, query: int, end: End, examples: list[Shown]) -> None:
    """Draws examples that have no picture as lines of text."""
    axes = part.subplots()
    axes.set_axis_off()
    parts = zip(end.indices[query].tolist(), end.scores[query].tolist(), end.amounts(query), examples, strict=True)
    for position, (index, score, amount, shown) in enumerate(parts):
        height = 1 - (position + 0.5) / len(examples)
        lines = "\n".join(textwrap.wrap(shown.text, _TEXT, max_lines=2, placeholder=" …"))
        color = RAISES if score > 0 else LOWERS
        for place, text, shade in (
            (0.0, amount, color),
            (0.15, _labelled(record, index, shown), None),
            (0.4, lines, None),
        ):
            axes.text(
                place, height, text, va="center", fontsize=8, color=shade, parse_math=False, transform=axes.transAxes
            )


# --------------------------------------------------------------------------------------------------------------------
# The distribution of all scores
# --------------------------------------------------------------------------------------------------------------------


def _draw_distribution(part: SubFigure, record: InfluenceRecord, query: int) -> None:
    histogram, shares = part.subplots(1, 2)
    _draw_histogram(histogram, record, query)
    if record.n_kept is None:
        draw_shares(shares, record.scores[query].abs())
    else:
        shares.set_axis_off()  # with `keep`, the sum over all scores is not known
    for axis in (histogram, shares):
        axis.tick_params(which="both", labelsize=7)


def _draw_histogram(axes: Axes, record: InfluenceRecord, query: int) -> None:
    axes.hist(record.scores[query].numpy(), bins=80, log=True)
    axes.axvline(0.0, color="grey", linestyle=":")
    which = "All scores" if record.n_kept is None else f"The {record.n_kept} strongest scores of each end"
    axes.set_title(which, fontsize=9)
    axes.set_ylabel("training examples", fontsize=8)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))  # scores of large datasets are small


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
    axes.set_title(f"{many} ({100 * half / count:.3g} %) carr{'y' if half > 1 else 'ies'} half", fontsize=9)
    axes.axhline(0.5, color="grey", linestyle=":")
