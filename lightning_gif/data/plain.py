"""Batches as plain values and tensors, for files that are read without unpickling."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchError
from .batch import Batch
from .probe import Probe
from .structure import describe

__all__ = ["from_plain", "probe_from_plain", "probe_to_plain", "to_plain"]


def to_plain(data: Any, tensors: dict[str, Tensor], prefix: str) -> Any:
    """A batch as plain values for JSON; its tensors are added to ``tensors``.

    Args:
        data: Tensors, numbers, texts and ``None``, in lists, tuples and dictionaries with texts as keys. A
            ``UserDict``, as tokenizers return, becomes a dictionary.
        tensors: Gets the tensors by name.
        prefix: The beginning of their names.

    Raises:
        BatchError: If the batch has anything else.
    """
    if isinstance(data, Tensor):
        name = f"{prefix}{len(tensors)}"
        tensors[name] = data.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(data, (dict, UserDict)) and all(isinstance(key, str) for key in data):
        return {"dict": {key: to_plain(value, tensors, prefix) for key, value in data.items()}}
    if type(data) in (list, tuple):
        return {type(data).__name__: [to_plain(item, tensors, prefix) for item in data]}
    if data is None or type(data) in (bool, int, float, str):
        return {"value": data}
    raise BatchError(
        f"A batch of the training data has a part that cannot be written to a store: {describe(data)}. A store"
        " keeps a few training examples, so that losses are computed in the same way later. Collate examples to"
        " tensors, numbers and texts in lists, tuples and dictionaries."
    )


def from_plain(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The batch from the result of :func:`to_plain`.

    Raises:
        LookupError, TypeError, ValueError: If the record is not one.
    """
    ((kind, value),) = record.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: from_plain(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [from_plain(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    if kind != "value" or not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(f"a batch has no {kind!r}")
    return value


def probe_to_plain(probe: Probe) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The examples of a probe, the rows of its batches, as plain values and tensors."""
    tensors: dict[str, Tensor] = {}
    record = {
        name: {"ids": batch.ids.tolist(), "data": to_plain(batch.data, tensors, "probe ")}
        for name, batch in (("together", probe.together), ("many", probe.many))
    }
    return record, tensors


def probe_from_plain(record: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Probe:
    """The probe from the result of :func:`probe_to_plain`.

    Raises:
        LookupError, TypeError, ValueError: If the record is not one.
    """
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}

    def batch(plain: Mapping[str, Any]) -> Batch:
        ids = torch.tensor(plain["ids"], dtype=torch.long)
        return Batch(from_plain(plain["data"], moved), ids, len(ids))

    return Probe.of_rows(batch(record["together"]), batch(record["many"]))
