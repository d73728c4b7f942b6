"""Examples as people look at them, and figures of reports. matplotlib is loaded only when a figure is asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import TARGET_KEYS, tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "image_of", "label_of", "show_item", "text_of"]

_SMALLEST_IMAGE = 6
_MOST_VALUES = 12
_LONGEST_TEXT = 200


def image_of(item: Any) -> Any | None:
    """The first tensor of a dataset's item as an image array, ``(H, W)`` or ``(H, W, 3)`` uint8, if it is one.

    An image is ``(H, W)``, ``(1, H, W)``, ``(3, H, W)`` or ``(H, W, 3)``, each side at least 6. Values are stretched to
    their range.
    """
    found = next((tensor for tensor in tensors(item) if tensor.ndim >= 2), None)
    if found is None or not found.numel() or found.is_complex():
        return None
    image = found.detach().cpu().float().nan_to_num()
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.movedim(0, -1).squeeze(-1)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3) or min(image.shape[:2]) < _SMALLEST_IMAGE:
        return None
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8).numpy()


def label_of(item: Any) -> Any | None:
    """The target of a dataset's item as a plain number or string, if it has a single one."""
    target = _split(item)[1]
    if isinstance(target, Tensor):
        return target.item() if target.numel() == 1 else None
    if hasattr(target, "item"):  # of NumPy
        return target.item() if target.size == 1 else None
    return target if isinstance(target, (str, Number)) else None


def text_of(item: Any) -> str:
    """What a dataset's item holds besides its label, in words: numbers rounded, what is long cut short."""
    inputs = item if label_of(item) is None else _split(item)[0]
    return textwrap.shorten(_words(inputs), _LONGEST_TEXT, placeholder=" …")


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
        axes.text(0.5, 0.5, textwrap.fill(text_of(item), 18), ha="center", va="center", fontsize=6)


def _split(item: Any) -> tuple[Any, Any]:
    """A dataset's item as its inputs and its target, ``None`` where its structure does not tell."""
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        return {name: value for name, value in item.items() if name != key}, None if key is None else item[key]
    if isinstance(item, (list, tuple)) and len(item) >= 2:
        return (item[0] if len(item) == 2 else list(item[:-1])), item[-1]
    return item, None


def _words(data: Any) -> str:
    if isinstance(data, Tensor):
        values = data.detach().cpu().flatten()[:_MOST_VALUES].tolist()
        shown = ", ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        return shown if data.numel() <= _MOST_VALUES else f"{shown}, … {list(data.shape)}"
    if isinstance(data, Mapping):
        return "; ".join(f"{name}: {_words(value)}" for name, value in data.items())
    if isinstance(data, (list, tuple)):
        return ", ".join(_words(value) for value in data)
    return str(data)
