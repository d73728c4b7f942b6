"""The charts that pictures of reports share. They draw on the axes of matplotlib, and import nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LOWERS",
    "NEUTRAL",
    "RAISES",
    "draw_bars",
    "draw_groups",
    "draw_no_axes",
    "named",
    "percent",
    "positions_of_ends",
]


# The colours of positive and negative scores, which people who see few colours can tell apart.
RAISES, LOWERS, NEUTRAL = "#2166ac", "#c0392b", "#8c8c8c"

_LONGEST_NAME = 24


def named(label: Any, class_names: Sequence[str] | None = None) -> str:
    """A label as text, short enough for a title: the name of its class if there is one, else the label itself."""
    if isinstance(label, int) and class_names is not None and 0 <= label < len(class_names):
        label = class_names[label]
    if isinstance(label, float):
        return f"{label:.4g}"
    text = " ".join(str(label).split())
    half = _LONGEST_NAME // 2
    # Long names often differ at their ends.
    return text if len(text) <= _LONGEST_NAME else f"{text[:half].rstrip()} … {text[3 - half :].lstrip()}"


def positions_of_ends(count: int, most: int) -> list[int | None]:
    """The positions of up to ``most`` of ``count`` items: all, or those of both ends with ``None`` between them."""
    if count <= most:
        return list(range(count))
    half = most // 2
    return [*range(half), None, *range(count - half, count)]


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    texts: Sequence[str],
    colors: Sequence[str],
    *,
    margin: float = 0.18,
) -> None:
    """Draws one horizontal bar for each name, the first one at the top, each with a text at its end.

    Args:
        axes: The axes.
        names: The names.
        values: The lengths of the bars; ``None`` draws no bar.
        texts: The text at the end of each bar.
        colors: The colour of each bar.
        margin: The room for the texts, as a share of the longest extent of the bars.
    """
    places = range(len(names))
    lengths = [0.0 if value is None else value for value in values]
    bars = axes.barh(list(places), lengths, color=list(colors), height=0.72)
    axes.bar_label(bars, list(texts), fontsize=7, padding=3)
    _name_bars(axes, names)
    low, high = min(0.0, *lengths), max(0.0, *lengths)
    room = margin * (high - low) or 1.0
    axes.set_xlim(low - room * (low < 0), high + room * (high > 0 or low == 0))
    axes.xaxis.get_offset_text().set_fontsize(7)


def percent(share: float) -> str:
    """A share as a percentage that is not rounded up to 100 % or down to 0 %."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    digits = 1 if 0.001 <= share <= 0.999 else 2
    text = f"{100 * share:.{digits}f} %"
    return {"100.00 %": "> 99.99 %", "0.00 %": "< 0.01 %"}.get(text, text)


def draw_groups(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, tuple[Sequence[float | None], str]],
    text: Callable[[float], str],
) -> None:
    """Draws a group of horizontal bars for each name, the first one at the top: one bar for each series.

    Args:
        axes: The axes.
        names: The names.
        series: The values and the colour of each series, by its name in the legend; ``None`` draws no bar.
        text: The text at the end of a bar.
    """
    height = 0.8 / len(series)
    for number, (label, (values, color)) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * height for place in range(len(names))]
        lengths = [0.0 if value is None else value for value in values]
        bars = axes.barh(places, lengths, height * 0.92, color=color, label=label)
        axes.bar_label(bars, ["" if value is None else text(value) for value in values], fontsize=7, padding=2)
    _name_bars(axes, names)
    most = max((value for values, _ in series.values() for value in values if value is not None), default=0.0)
    least = min((value for values, _ in series.values() for value in values if value is not None), default=0.0)
    axes.set_xlim(min(1.2 * least, 0.0), max(1.2 * most, 0.0) or 1.0)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(series))


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Writes the names beside horizontal bars, from the top down, and removes the frame."""
    axes.set_yticks(list(range(len(names))), list(names), fontsize=8)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_no_axes(axes: Axes) -> None:
    """Leaves the axes empty but for their title."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
