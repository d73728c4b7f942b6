"""Previews of examples, and figures of reports. matplotlib is imported only when a figure is drawn."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.names import Vocabulary, tokens_of
from ..data.structure import tensors
from ..data.targets import TARGET_KEYS
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Shown", "empty_figure", "figure", "image_of", "label_of", "show", "text_of"]


_SMALLEST_IMAGE, _LARGEST_IMAGE = 6, 512

_MOST_VALUES = 12

_LONGEST_TEXT = 200


@dataclass(frozen=True, eq=False)
class Shown:
    """The preview of an example for plots and tables. A saved report has it instead of the example.

    Attributes:
        label: The target as a plain number or string; ``None`` if there is no single target.
        image: The image, ``(H, W)`` or ``(H, W, 3)`` uint8; ``None`` if there is none. See :func:`image_of`.
        text: The contents as text; see :func:`text_of`.
    """

    label: Any | None
    image: Any | None
    text: str

    @classmethod
    def of(cls, item: Any, vocabulary: Vocabulary | None = None) -> Shown:
        """The preview of an item of a dataset. Arrays are converted to tensors, as in collating.

        Args:
            item: The item.
            vocabulary: The tokens of texts by their ids, if items have ids.
        """
        item = _as_tensors(item)
        return cls(label_of(item), image_of(item), text_of(item, vocabulary))

    @property
    def look(self) -> Any:
        """The image if there is one, else the text."""
        return self.text if self.image is None else self.image


def image_of(item: Any) -> Any | None:
    """The first tensor of a dataset's item as an image array, ``(H, W)`` or ``(H, W, 3)`` uint8.

    ``None`` unless its shape is ``(H, W)``, ``(1, H, W)``, ``(3, H, W)`` or ``(H, W, 3)`` with sides of at least 6.
    Values are rescaled to the range 0 to 255. Images with a side above 512 are reduced in size.
    """
    tensor = next((tensor for tensor in tensors(item) if tensor.ndim >= 2), None)
    if tensor is None or not tensor.numel() or tensor.is_complex():
        return None
    image = tensor.detach().cpu().float().nan_to_num()
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
    """The target of a dataset's item as a plain number or string; ``None`` if there is no single target.

    Values that are not JSON numbers (NaN, complex numbers, decimals, dates) become strings.
    """
    target = _split(item)[1]
    if isinstance(target, Tensor):
        target = target.item() if target.numel() == 1 else None
    elif hasattr(target, "item"):  # NumPy arrays and numbers
        target = target.item() if target.size == 1 else None
    elif not isinstance(target, (str, Number)):
        target = None
    plain = isinstance(target, (str, int)) or (isinstance(target, float) and math.isfinite(target))
    return target if plain or target is None else str(target)


def text_of(item: Any, vocabulary: Vocabulary | None = None) -> str:
    """The contents of a dataset's item without its label, as a text of limited length.

    If the item has strings, these are the text, without token ids or lengths. Otherwise, with a vocabulary, it is the
    tokens of the first whole numbers ``(L,)``, if there are any. Otherwise its rounded numbers are.
    """
    inputs = item if label_of(item) is None else _split(item)[0]
    if vocabulary is not None and not any(_texts(inputs)):
        ids = next((one for one in tensors(inputs) if one.ndim == 1 and _are_ids(one)), None)
        if ids is not None:
            words = " ".join(tokens_of(vocabulary, ids.tolist()))
            return textwrap.shorten(words, _LONGEST_TEXT, placeholder=" …")
    texts = list(_texts(inputs))
    if len(texts) == 1:
        words = texts[0][1]
    elif texts:
        words = "; ".join(f"{name}: {text}" if name else text for name, text in texts)
    else:
        words = _words(inputs)
    return textwrap.shorten(words, _LONGEST_TEXT, placeholder=" …")


def _are_ids(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, created without pyplot and its global state.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib: pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def figure(rows: int, cols: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """An :func:`empty_figure` with a grid of axes."""
    drawn = empty_figure(width, height)
    return drawn, drawn.subplots(rows, cols, squeeze=False)


def saved(drawn: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Saves a figure to a file, if a path is given, and returns it.

    Raises:
        ConfigurationError: If matplotlib knows no format of the name's ending.
    """
    if path is not None:
        try:
            drawn.savefig(path, dpi=150)
        except ValueError as error:
            raise ConfigurationError(
                f"The plot cannot be saved to {os.fspath(path)!r}: {error}. Give a name that ends in .png, .pdf or"
                " .svg."
            ) from error
    return drawn


def show(axes: Axes, example: Shown, title: str) -> None:
    """Draws the preview of an example: its image if there is one, else its text."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, parse_math=False)
    if example.image is not None:
        axes.imshow(example.image, cmap="gray")
    else:
        axes.text(0.5, 0.5, textwrap.fill(example.text, 18), ha="center", va="center", fontsize=6, parse_math=False)


def _split(item: Any) -> tuple[Any, Any]:
    """The inputs and the target of a dataset's item. The target is ``None`` if the structure does not show it."""
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        return {name: value for name, value in item.items() if name != key}, None if key is None else item[key]
    if isinstance(item, (list, tuple)) and len(item) >= 2:
        index = len(item) - 1
        while index > 0 and isinstance(item[index], (str, Mapping)):  # such as the name of a file
            index -= 1
        index = index or len(item) - 1
        others = [value for position, value in enumerate(item) if position != index]
        return (others[0] if len(others) == 1 else others), item[index]
    return item, None


def _as_tensors(data: Any) -> Any:
    """Converts arrays of numbers in an item, including PIL images, to tensors.

    Unlike ``default_convert`` it accepts arrays of any dtype, which a dataset with a custom collate function may have.
    Arrays without a corresponding tensor dtype stay as they are.
    """
    if isinstance(data, Mapping):
        return {name: _as_tensors(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_as_tensors(value) for value in data]
    if hasattr(data, "__array_interface__"):
        array = np.array(data)  # a copy, because tensors cannot share arrays with negative strides
        if array.ndim and array.dtype.kind in "biuf" and array.dtype.isnative and array.itemsize <= 8:
            return torch.from_numpy(array)
    return data


def _texts(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the key and the text of each string in an item. The key is an empty string if there is none."""
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
