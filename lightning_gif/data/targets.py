"""The targets of a batch, and whether they are labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchError
from .structure import describe, with_items

__all__ = ["TARGET_KEYS", "class_targets", "find_targets", "one_hot_labels", "replace_targets"]


TARGET_KEYS = ("label", "labels", "target", "targets", "y")

_MOST_CLASSES = 10_000


def _target_key(data: Any) -> Any:
    """Where a batch has its targets; ``None`` if the structure does not show it.

    It is the index of the last tensor of a tuple or list, or the first of :data:`TARGET_KEYS` in a mapping or among the
    attributes of an object, as of a batch of graphs.
    """
    if isinstance(data, Mapping):
        return next((key for key in TARGET_KEYS if isinstance(data.get(key), Tensor)), None)
    if isinstance(data, (list, tuple)):
        of_tensors = [index for index, value in enumerate(data) if isinstance(value, Tensor)]
        return of_tensors[-1] if of_tensors and len(data) >= 2 else None
    if isinstance(data, (Tensor, str, bytes)):
        return None
    return next((key for key in TARGET_KEYS if isinstance(getattr(data, key, None), Tensor)), None)


def _at(data: Any, key: Any) -> Tensor:
    return data[key] if isinstance(data, (Mapping, list, tuple)) else getattr(data, key)


def find_targets(data: Any) -> Tensor | None:
    """The targets ``(B, …)`` of a batch; ``None`` if its structure does not show which tensor they are."""
    key = _target_key(data)
    return None if key is None else _at(data, key)


def class_targets(data: Any) -> Tensor | None:
    """The label of each example, ``(B,)`` integers ≥ 0; ``None`` if the targets of the batch are not labels.

    Labels are integers, or one-hot rows ``(B, C)``. If an integer is 10 000 or more, the targets are taken for ids,
    counts or times, not labels.
    """
    targets = find_targets(data)
    if targets is None or targets.is_complex() or not targets.numel():
        return None
    if targets.ndim == 2 and targets.shape[1] > 1:
        return one_hot_labels(targets)
    if targets.dtype.is_floating_point or targets.dtype is torch.bool:
        return None
    if targets.ndim == 2:
        targets = targets[:, 0]
    if targets.ndim != 1:
        return None
    if not 0 <= int(targets.min()) <= int(targets.max()) < _MOST_CLASSES:
        return None
    return targets.long()


def one_hot_labels(targets: Tensor) -> Tensor | None:
    """The positions ``(B,)`` of the ones in rows ``(B, C)`` with a single one and zeros; ``None`` for other rows."""
    ones = targets == 1
    single = (ones.sum(1) == 1).all() & (ones | (targets == 0)).all()
    return ones.long().argmax(1) if bool(single) else None


def replace_targets(data: Any, targets: Tensor | int) -> Any:
    """The batch with new targets.

    Args:
        data: A batch whose targets are its last tensor, or under a key or attribute of :data:`TARGET_KEYS`.
        targets: New targets in the shape of the old ones, or one label for all examples.

    Raises:
        BatchError: If the batch's structure does not show its targets, or the new ones have another shape or dtype.
    """
    key = _target_key(data)
    if key is None:
        raise BatchError(
            f"The structure of this batch does not show which tensor has the targets: {describe(data)}. Relabelling"
            f" needs (inputs, …, targets), or a mapping or object with one of the keys {', '.join(TARGET_KEYS)}."
        )
    old = _at(data, key)
    if isinstance(targets, bool) or not isinstance(targets, (Tensor, int, float)):
        raise BatchError(
            "`relabel` must be a tensor or list of new targets, one label for all examples, or a function from a batch"
            f" to its new targets, got {targets!r}."
        )
    given = torch.as_tensor(targets)
    if given.ndim and given.shape != old.shape:
        raise BatchError(
            f"`relabel` has shape {list(given.shape)}, but the targets of the batch have shape {list(old.shape)}. Give"
            " one new target for each example, in the order of the batch."
        )
    if not torch.can_cast(given.dtype, old.dtype):
        raise BatchError(
            f"`relabel` is {describe(given)} (got {targets!r}), but the targets of the batch are {describe(old)}. The"
            " new targets would be rounded. Give them in the dtype of the old ones."
        )
    new = given.to(old.device, old.dtype).expand_as(old).clone()
    if isinstance(data, Mapping):
        changed = {**data, key: new}
        return changed if type(data) is dict else with_items(data, changed)
    if isinstance(data, (list, tuple)):
        items = [new if index == key else value for index, value in enumerate(data)]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    changed = copy.copy(data)
    object.__setattr__(changed, key, new)  # frozen dataclasses, too
    return changed
