"""How an influence report is printed, drawn and logged."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def shorten(label: Any) -> str:
    """A label as a title has room for it."""
    return textwrap.shorten(str(label), 24, placeholder=" …") if isinstance(label, str) else str(label)


def draw_shares(axes: Axes, sizes: Tensor) -> None:
    """Draws which share of the sum of ``sizes`` ``(n,)`` the largest so many of them have."""
    total, count = float(sizes.sum()), len(sizes)
    axes.set_xlabel("examples, those of the largest |score| first", fontsize=8)
    axes.set_ylabel("share of all |score|", fontsize=8)
    axes.set_ylim(0.0, 1.05)
    if not total:
        axes.text(0.5, 0.5, "all scores are 0", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        return
    shares = sizes.sort(descending=True).values.cumsum(0) / total
    half = min(int(torch.searchsorted(shares, 0.5)) + 1, count)
    places = torch.logspace(0, math.log10(count), 500).round().long().clamp(1, count).unique()  # enough for a line
    axes.semilogx(places.numpy(), shares[places - 1].numpy())
    axes.plot([half], [float(shares[half - 1])], "o", color="C1", markersize=5)
    many = f"{half} of {count} examples" if half > 1 else f"1 of {count} examples"
    axes.set_title(f"{many} ({100 * half / count:.3g} %) carr{'y' if half > 1 else 'ies'} half", fontsize=8)
    axes.axhline(0.5, color="grey", linestyle=":")
