"""SHA-256 digests of tensors and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Fingerprint", "differences", "digest", "raw"]


Fingerprint = dict[str, str]
"""Everything on which a result depends, by name: digests, or plain values as text."""


def raw(tensor: Tensor, rows: int = 1) -> Tensor:
    """The bytes of a tensor, ``(rows, bytes of a row)``, on the CPU."""
    value = tensor.detach().cpu().contiguous()
    if value.numel() == 1:  # it counts as contiguous with any strides, but view(torch.uint8) checks the strides
        value = value.clone(memory_format=torch.contiguous_format)
    return value.view(-1).view(torch.uint8).view(rows, -1)


def digest(
    values: Mapping[str, Tensor], record: object = None, *, whole: Callable[[Tensor], Tensor] | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the given tensors; equal only for bit-equal values.

    Args:
        values: The tensors.
        record: Plain values for JSON that the digest covers, too. The order of keys matters.
        whole: Returns a tensor with all its entries, if tensors may be sharded. It is called for one after the other.
    """
    state = hashlib.sha256()
    for name in sorted(values):
        value = values[name] if whole is None else whole(values[name])
        state.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        state.update(raw(value).numpy().data)
    if record is not None:
        state.update(json.dumps(record).encode())
    return state.hexdigest()


def differences(stored: object, expected: Mapping[str, object]) -> str:
    """The names of the expected values that differ in ``stored``, as text; empty if none does.

    Raises:
        ValueError: If ``stored`` is not a mapping.
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"expected a mapping from names to values, got a {type(stored).__name__}")
    return ", ".join(name for name, value in expected.items() if stored.get(name) != value)
