"""Examples as people look at them, and figures of reports. matplotlib is loaded only when a figure is asked for."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.structure import tensors
from ..data.targets import TARGET_KEYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Shown", "figure", "image_of", "label_of", "show", "text_of"]


_SMALLEST_IMAGE, _LARGEST_IMAGE = 6, 512

_MOST_VALUES = 12

_LONGEST_TEXT = 200


@dataclass(frozen=True, eq=False)
class Shown:
    """How an example is shown, without the example itself: what plots and tables read, and what a saved report keeps.

    Attributes:
        label: Its target as a plain number or string; ``None`` where it has no single one.
        image: ``(H, W)`` or ``(H, W, 3)`` uint8, if it is an image; see :func:`image_of`.
        text: What it holds in words; see :func:`text_of`.
    """

    label: Any | None
    image: Any | None
    text: str

    @classmethod
    def of(cls, item: Any) -> Shown:
        """How an item of a dataset is shown. What it has as arrays is shown as the tensors that collating makes."""
        item = _as_tensors(item)
        return cls(label_of(item), image_of(item), text_of(item))

    @property
    def look(self) -> Any:
        """The image where there is one, else the text."""
        return self.text if self.image is None else self.image


def image_of(item: Any) -> Any | None:
    """The first tensor of a dataset's item as an image array, ``(H, W)`` or ``(H, W, 3)`` uint8, if it is one.

    An image is ``(H, W)``, ``(1, H, W)``, ``(3, H, W)`` or ``(H, W, 3)``, each side at least 6. Values are stretched to
    their range, and what is larger than 512 a side is made smaller: it is looked at beside many others.
    """
    found = next((tensor for tensor in tensors(item) if tensor.ndim >= 2), None)
    if found is None or not found.numel() or found.is_complex():
        return None
    image = found.detach().cpu().float().nan_to_num()
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.movedim(0, -1).squeeze(-1)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3) or min(image.shape[:2]) < _SMALLEST_IMAGE:
        return None
    factor = math.ceil(max(image.shape[:2]) / _LARGEST_IMAGE)
    if factor > 1:
        planes = image.reshape(*image.shape[:2], -1).movedim(-1, 0)
        smaller = F.avg_pool2d(planes, [min(factor, side) for side in planes.shape[1:]])
        image = smaller.movedim(0, -1).reshape(*smaller.shape[1:], *image.shape[2:])
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8).numpy()


def label_of(item: Any) -> Any | None:
    """The target of a dataset's item as a plain number or string, if it has a single one.

    What JSON has no number for (NaN, complex numbers, decimals, dates) is a string.
    """
    target = _split(item)[1]
    if isinstance(target, Tensor):
        target = target.item() if target.numel() == 1 else None
    elif hasattr(target, "item"):  # of NumPy
        target = target.item() if target.size == 1 else None
    elif not isinstance(target, (str, Number)):
        target = None
    plain = isinstance(target, (str, int)) or (isinstance(target, float) and math.isfinite(target))
    return target if plain or target is None else str(target)


def text_of(item: Any) -> str:
    """What a dataset's item holds besides its label, in words; what is long is cut short.

    Of an item with text in it, the text alone: what a tokenizer made of it, or its length, tells a reader nothing more.
    Of any other the numbers, rounded.
    """
    inputs = item if label_of(item) is None else _split(item)[0]
    texts = list(_texts(inputs))
    if len(texts) == 1:
        words = texts[0][1]
    elif texts:
        words = "; ".join(f"{name}: {text}" if name else text for name, text in texts)
    else:
        words = _words(inputs)
    return textwrap.shorten(words, _LONGEST_TEXT, placeholder=" …")


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


def show(axes: Axes, example: Shown, title: str) -> None:
    """Draws an example: its image where it has one, else what it holds in words."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, parse_math=False)
    if example.image is not None:
        axes.imshow(example.image, cmap="gray")
    else:
        axes.text(0.5, 0.5, textwrap.fill(example.text, 18), ha="center", va="center", fontsize=6, parse_math=False)


def _split(item: Any) -> tuple[Any, Any]:
    """A dataset's item as its inputs and its target, ``None`` where its structure does not tell."""
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        return {name: value for name, value in item.items() if name != key}, None if key is None else item[key]
    if isinstance(item, (list, tuple)) and len(item) >= 2:
        return (item[0] if len(item) == 2 else list(item[:-1])), item[-1]
    return item, None


def _as_tensors(data: Any) -> Any:
    """The same item with tensors in the place of arrays of numbers, also those that PIL holds.

    Unlike ``default_convert`` it takes any array there is: a dataset with a collate function of its own may hold them.
    """
    if isinstance(data, Mapping):
        return {name: _as_tensors(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_as_tensors(value) for value in data]
    if hasattr(data, "__array_interface__"):
        array = np.array(data)  # a copy, which a tensor can share also where the array runs backwards
        if array.ndim and array.dtype.kind in "biuf" and array.dtype.isnative and array.itemsize <= 8:
            return torch.from_numpy(array)
    return data


def _texts(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The strings of an item, each with the name it is found under, if any."""
    if isinstance(data, str):
        yield name, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, str(key))
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _texts(value, name)


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
