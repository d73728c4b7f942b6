"""The structure of a batch: its size, parts of it, and a description for messages."""

from __future__ import annotations

import copy
import io
import numbers
import operator
import pickle
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BatchError

__all__ = [
    "batch_size",
    "describe",
    "equal_tensors",
    "equal_values",
    "join",
    "leaves",
    "map_object",
    "map_tensors",
    "same_form",
    "same_structure",
    "sequences",
    "slice_batch",
    "take",
    "tensors",
    "with_items",
]


def map_tensors(
    data: Any,
    function: Callable[[Tensor], Any],
    sequence: Callable[[Any], Any] | None = None,
    size: int = 0,
    other: Callable[[Any], Any] | None = None,
) -> Any:
    """The same structure (tuples, lists, mappings, dataclasses, nested) with ``function`` applied to its tensors.

    Dictionaries of any class and dataclasses are copied, as Lightning does: their constructors do not run again.

    Args:
        data: A batch, or anything a collate function returns.
        function: Applied to each tensor, in a fixed order.
        sequence: Applied to lists and tuples of ``size`` items without a tensor at any depth, such as one string for
            each example. In other lists and tuples, each item is visited, such as each of two columns of strings.
        size: The number of examples.
        other: Applied to everything else that is no container.

    Raises:
        BatchError: If a mapping is no dictionary and cannot be built from one.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        mapped = {key: map_tensors(value, function, sequence, size, other) for key, value in data.items()}
        return mapped if type(data) is dict else with_items(data, mapped)
    if isinstance(data, (list, tuple)):
        if sequence is not None and _is_sequence(data, size):
            return sequence(data)
        items = [map_tensors(value, function, sequence, size, other) for value in data]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    if is_dataclass(data) and not isinstance(data, type):
        changed = copy.copy(data)
        for name, value in _fields(data).items():
            mapped = map_tensors(value, function, sequence, size, other)
            if name in getattr(changed, "__dict__", {}):  # checks of assigned values are for whole batches
                changed.__dict__[name] = mapped
            else:
                object.__setattr__(changed, name, mapped)  # works for frozen dataclasses, too
        return changed
    return data if other is None else other(data)


def map_object(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy of an object with ``function`` applied to the tensors in it, at any depth.

    The copy is made by ``pickle``, as for the workers of a loader. The object itself is returned if it cannot be
    pickled, or if ``function`` returns all its tensors unchanged.
    """
    if value is None or isinstance(value, (str, bytes, numbers.Number, np.ndarray, np.generic)):
        return value
    found: list[Tensor] = []

    class Writer(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            found.append(part)
            return len(found) - 1

    class Reader(pickle.Unpickler):
        def persistent_load(self, position: int) -> Any:
            return changed[position]

    file = io.BytesIO()
    try:
        Writer(file).dump(value)
    except Exception:  # classes raise what they like
        return value
    changed = [function(tensor) for tensor in found]
    file.seek(0)
    return value if all(map(operator.is_, changed, found)) else Reader(file).load()


def with_items(data: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the class of ``data`` with other values for its keys.

    Raises:
        BatchError: If it is no dictionary and cannot be built from one.
    """
    if isinstance(data, (dict, UserDict)):  # their copies do not share the items, which other mappings may
        changed = copy.copy(data)
        for key, value in items.items():
            changed[key] = value
        return changed
    try:
        return type(data)(items)  # type: ignore[call-arg]
    except TypeError as error:
        raise BatchError(
            f"A {type(data).__name__} cannot be built from a dictionary of its items: {error}. Collate examples to a"
            " dict, or accept one as the only argument of its constructor."
        ) from error


def _fields(data: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set."""
    return {field.name: getattr(data, field.name) for field in fields(data) if hasattr(data, field.name)}


def _items(data: Any) -> Iterable[Any]:
    """The items of a container in the order of :func:`map_tensors`; empty for anything else."""
    if isinstance(data, Mapping):
        return data.values()
    if isinstance(data, (list, tuple)):
        return data
    return _fields(data).values() if is_dataclass(data) and not isinstance(data, type) else ()


def _has_tensor(data: Any) -> bool:
    if isinstance(data, Mapping):
        return any(_has_tensor(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return any(_has_tensor(value) for value in data)
    return isinstance(data, Tensor) or (is_dataclass(data) and not isinstance(data, type))


def tensors(data: Any) -> list[Tensor]:
    """The tensors of a batch in the order of :func:`map_tensors`."""
    return [data] if isinstance(data, Tensor) else [tensor for item in _items(data) for tensor in tensors(item)]


def leaves(data: Any) -> list[Any]:
    """Everything in a batch that is no container."""
    items = list(_items(data))
    is_container = isinstance(data, (Mapping, list, tuple)) or (is_dataclass(data) and not isinstance(data, type))
    return [leaf for item in items for leaf in leaves(item)] if is_container else [data]


def sequences(data: Any, size: int) -> list[Sequence[Any]]:
    """The lists and tuples in a batch that hold one string, number or list for each of its ``size`` examples."""
    if _is_sequence(data, size):
        return [data]
    return [sequence for item in _items(data) for sequence in sequences(item, size)]


def _is_sequence(data: Any, size: int) -> bool:
    """Whether ``data`` is a list or tuple of ``size`` items without a tensor at any depth."""
    plain = isinstance(data, (list, tuple)) and not hasattr(data, "_fields")
    return plain and len(data) == size and not _has_tensor(data)


def batch_size(data: Any) -> int:
    """The number of examples in a batch: the size of the first dimension of all its tensors.

    Raises:
        BatchError: If no tensor has a dimension, if the sizes differ, or if there is no example.
    """
    sizes = {tensor.shape[0] for tensor in tensors(data) if tensor.ndim}
    if not sizes:
        raise BatchError(
            f"Expected a batch with at least one tensor of shape (B, …), got {describe(data)}. Pass other batches as a"
            " DataLoader over a map-style dataset, with the collate function of the training loader:"
            " DataLoader(Subset(dataset, indices), batch_size, collate_fn=…)."
        )
    if len(sizes) > 1:
        raise BatchError(
            f"The tensors of the batch disagree on the number of examples: {describe(data)}. The first dimension of"
            " each tensor must be the batch. If that is impossible, give the examples as a DataLoader, and define"
            " `influence_loss` (see GIFMixin)."
        )
    size = sizes.pop()
    if not size:
        raise BatchError(f"The batch is empty: {describe(data)}. Pass at least one example.")
    return size


def take(data: Any, rows: Tensor) -> Any:
    """The examples at positions ``rows`` ``(m,)`` of a batch, in its structure."""
    size = batch_size(data)
    return map_tensors(
        data,
        lambda tensor: tensor[rows.to(tensor.device)] if tensor.ndim else tensor,
        lambda items: type(items)(items[i] for i in rows.tolist()),
        size,
    )


def slice_batch(data: Any, start: int, stop: int) -> Any:
    """Examples ``start:stop`` of a batch, in its structure."""
    size = batch_size(data)
    return map_tensors(
        data,
        lambda tensor: tensor[start:stop] if tensor.ndim else tensor,
        lambda items: items[start:stop],
        size,
    )


def join(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Joins several batches of the same form (:func:`same_form`) into one, in the structure of the first.

    Args:
        parts: The batches, in order.
        sizes: The number of examples of each batch.
    """
    columns = zip(*(tensors(part) for part in parts), strict=True)
    texts = zip(*(sequences(part, size) for part, size in zip(parts, sizes, strict=True)), strict=True)
    return map_tensors(
        parts[0],
        lambda tensor: torch.cat(next(columns)) if tensor.ndim else (next(columns), tensor)[1],
        lambda items: type(items)(item for part in next(texts) for item in part),
        sizes[0],
    )


def same_form(one: Any, size: int, other: Any, other_size: int) -> bool:
    """Whether the tensors of two batches have the same shapes, except for the number of examples.

    Args:
        one: A batch.
        size: The number of examples in ``one``.
        other: Another batch.
        other_size: The number of examples in ``other``.
    """

    def form(data: Any, count: int) -> tuple[list[torch.Size], int]:
        return [part.shape[1:] for part in tensors(data)], len(sequences(data, count))

    return form(one, size) == form(other, other_size)


def equal_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values; NaN equals NaN."""
    if torch.equal(one, other):
        return True
    same = one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan())
    return same and torch.equal(one.nan_to_num(), other.nan_to_num())


def equal_tensors(one: Any, other: Any) -> bool:
    """Whether the tensors of two structures have the same values, see :func:`equal_values`."""
    return all(equal_values(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def describe(data: Any) -> str:
    """The structure of a batch in words, for error messages."""
    if isinstance(data, Tensor):
        return f"{str(data.dtype).removeprefix('torch.')}{list(data.shape)}"
    if isinstance(data, np.ndarray):
        return f"a NumPy array {data.dtype}{list(data.shape)}, convert it with torch.as_tensor"
    if isinstance(data, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in data.items()) + "}"
    if isinstance(data, (list, tuple)):
        if not _has_tensor(data) and not any(isinstance(value, np.ndarray) for value in data):
            shown = [f"{value!r}" for value in data[:3] if isinstance(value, numbers.Number)]
            few = f" ({', '.join(shown)}{', …' if len(data) > 3 else ''})" if shown else ""
            return f"{type(data).__name__} of {len(data)} value{'' if len(data) == 1 else 's'}{few}"
        inner = ", ".join(describe(value) for value in data)
        return f"[{inner}]" if isinstance(data, list) else f"({inner})"
    return type(data).__name__


def same_structure(one: Any, other: Any) -> bool:
    """Whether two batches have the same containers, with tensors of the same number of dimensions in the same places.

    Lists and tuples count as the same, because collate functions of different versions return one or the other.
    """
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return (
            isinstance(one, Mapping)
            and isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(same_structure(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if not _has_tensor(one) and not _has_tensor(other):
            return True
        return len(one) == len(other) and all(map(same_structure, one, other))
    return type(one) is type(other)
