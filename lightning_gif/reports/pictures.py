"""Examples as people look at them, and figures of reports. matplotlib is loaded only when a figure is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import find_targets, tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "image_of", "label_of", "show_item"]

_SMALLEST_IMAGE = 6


def image_of(item: Any) -> Any | None:
    """The first tensor of a dataset's item as an image array, ``(H, W)`` or ``(H, W, 3)`` uint8, if it is one.

    An image is ``(H, W)``, ``(1, H, W)``, ``(3, H, W)``, each side at least 6. Values are stretched to their range.
    """
    found = next((tensor for tensor in tensors(item) if tensor.ndim >= 2), None)
    if found is None:
        return None
    image = found.detach().cpu().float()
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.movedim(0, -1).squeeze(-1)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3) or min(image.shape[:2]) < _SMALLEST_IMAGE:
        return None
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8).numpy()


def label_of(item: Any) -> Any | None:
    """The target of a dataset's item as a plain number or string, if it has a single one."""
    if isinstance(item, (list, tuple)) and len(item) >= 2 and isinstance(item[-1], (int, float, str)):
        return item[-1]
    target = find_targets(item)
    return target.item() if isinstance(target, Tensor) and target.numel() == 1 else None


def figure(rows: int, cols: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with a grid of axes, outside of pyplot's global state.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed, with how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib: pip install 'lightning-gif[examples]', or pip install matplotlib."
        ) from error
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, cols, squeeze=False)


def show_item(axes: Axes, item: Any, title: str) -> None:
    """Draws one dataset item: its image where it has one, else what it holds in words."""
    image = image_of(item)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    if image is not None:
        axes.imshow(image, cmap="gray")
    else:
        text = item if isinstance(item, str) else ", ".join(f"{tuple(tensor.shape)}" for tensor in tensors(item))
        axes.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=7)
