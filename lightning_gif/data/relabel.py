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
    """The same examples with new targets, held in memory.

    Args:
        examples: ``n`` examples.
        targets: The new targets: a tensor, array or list ``(n, …)`` in the order of ``examples``, one label for all
            examples, or a function from a batch to its new targets.

    Raises:
        BatchError: If there is not one target for each example, or a target does not have the shape or dtype of the old
            one.
    """
    targets = _numbers(targets)
    if isinstance(targets, Tensor) and targets.ndim and len(targets) != len(examples):
        raise BatchError(
            f"`relabel` has {len(targets)} targets for {len(examples)} examples. Give one target for each example: in"
            " the order of the batch or the indices, or in dataset order for a loader or a function."
        )
    changed, start = [], 0
    if not examples.divisible:  # one example in each batch, so that parts of them can be taken from memory
        examples = replace(examples, batch_size=1)
    for batch in examples.batches():
        if isinstance(targets, Tensor):
            new: Tensor | int = targets[start : start + batch.size] if targets.ndim else targets
        else:
            new = _numbers(targets(batch.data)) if callable(targets) else targets
        changed.append(replace(batch, data=replace_targets(batch.data, new)))
        start += batch.size
    # dataset=None, because the dataset has the old targets.
    return replace(examples, dataset=None, in_memory=tuple(changed), in_memory_shard=None)


def _numbers(targets: Any) -> Any:
    """Converts lists, NumPy arrays and NumPy numbers to tensors; returns anything else unchanged."""
    if not isinstance(targets, (list, tuple, np.ndarray, np.generic)) or isinstance(targets, np.bool_):
        return targets
    try:
        return torch.as_tensor(np.array(targets))  # a copy: tensors have no negative strides
    except (TypeError, ValueError) as error:
        raise BatchError(
            f"`relabel` must have numbers as targets, equally many for each example, got {targets!r:.200}."
        ) from error
