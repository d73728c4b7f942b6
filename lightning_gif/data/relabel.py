"""Examples with other targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BatchError
from .examples import Examples
from .targets import replace_targets

__all__ = ["relabelled"]


def relabelled(examples: Examples, targets: Tensor | int | Callable[[Any], Tensor]) -> Examples:
    """The same examples with other targets, held in memory.

    Args:
        examples: ``n`` examples.
        targets: ``(n, …)`` in the order of ``examples``, a tensor, an array or a list; or one label for all; or a
            function from a batch to its new targets.

    Raises:
        BatchError: If there is not one target for each example, or a target does not have the shape or dtype of the old
            one.
    """
    targets = _numbers(targets)
    if isinstance(targets, Tensor) and targets.ndim and len(targets) != len(examples):
        raise BatchError(
            f"`relabel` has {len(targets)} targets for {len(examples)} examples. Give one for each, in the order of the"
            " batch or of the indices, or of the dataset for a loader or a function."
        )
    changed, start = [], 0
    for batch in examples.batches():
        if isinstance(targets, Tensor):
            new: Tensor | int = targets[start : start + batch.size] if targets.ndim else targets
        else:
            new = _numbers(targets(batch.data)) if callable(targets) else targets
        changed.append(replace(batch, data=replace_targets(batch.data, new)))
        start += batch.size
    return replace(
        examples, dataset=None, in_memory=tuple(changed), in_memory_shard=None
    )  # the dataset has the old targets


def _numbers(targets: Any) -> Any:
    """Lists, NumPy arrays and NumPy numbers as tensors; anything else unchanged."""
    if not isinstance(targets, (list, tuple, np.ndarray, np.generic)) or isinstance(targets, np.bool_):
        return targets
    try:
        return torch.as_tensor(np.array(targets))  # a copy: tensors have no negative strides
    except (TypeError, ValueError) as error:
        raise BatchError(f"`relabel` must be numbers, equally many for each example, got {targets!r:.200}.") from error
