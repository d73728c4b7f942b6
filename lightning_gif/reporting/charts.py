"""The charts that pictures of reports share. They draw on the axes of matplotlib, and import nothing of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LOWERS", "NEUTRAL", "RAISES", "draw_bars", "draw_no_axes", "named", "positions_of_ends"]


# The colours of positive and negative scores, which people who see few colours can tell apart.
RAISES, LOWERS, NEUTRAL = "#2166ac", "#c0392b", "#8c8c8c"

_LONGEST_NAME = 24


def named(label: Any, class_names: Sequence[str] | None = None) -> str:
    """A label as text, short enough for a title: the name of its class if there is one, else the label itself."""
    if isinstance(label, int) and class_names is not None and 0 <= label < len(class_names):
        label = class_names[label]
    if isinstance(label, float):
        return f"{label:.4g}"
    return textwrap.shorten(label, _LONGEST_NAME, placeholder=" …") if isinstance(label, str) else str(label)


def positions_of_ends(count: int, most: int) -> list[int | None]:
    """The positions of up to ``most`` of ``count`` items: all, or those of both ends with ``None`` between them."""
    if count <= most:
        return list(range(count))
    half = most // 2
    return [*range(half), None, *range(count - half, count)]


def draw_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float | None], texts: Sequence[str], colors: Sequence[str]
) -> None:
    """Draws one horizontal bar for each name, the first one at the top, each with a text at its end.

    Args:
        axes: The axes.
        names: The names.
        values: The lengths of the bars; ``None`` draws no bar.
        texts: The text at the end of each bar.
        colors: The colour of each bar.
    """
    places = range(len(names))
    lengths = [0.0 if value is None else value for value in values]
    bars = axes.barh(list(places), lengths, color=list(colors), height=0.72)
    axes.bar_label(bars, list(texts), fontsize=7, padding=3)
    axes.set_yticks(list(places), list(names), fontsize=8)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.invert_yaxis()
    low, high = min(0.0, *lengths), max(0.0, *lengths)
    margin = 0.18 * (high - low) or 1.0  # room for the texts
    axes.set_xlim(low - margin * (low < 0), high + margin * (high > 0 or low == 0))
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_no_axes(axes: Axes) -> None:
    """Leaves the axes empty but for their title."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
