"""Tensors as bytes, and the SHA-256 that they are recognised by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Fingerprint", "differences", "digest", "raw"]


Fingerprint = dict[str, str]
"""What results depend on, by name: digests, or plain values in words."""


def raw(tensor: Tensor, rows: int = 1) -> Tensor:
    """The bytes of a tensor, ``(rows, bytes of a row)``, on the CPU."""
    value = tensor.detach().cpu().contiguous()
    if value.numel() == 1:  # which counts as contiguous whatever its strides, but not where its bytes are looked at
        value = value.clone(memory_format=torch.contiguous_format)
    return value.view(-1).view(torch.uint8).view(rows, -1)


def digest(values: Mapping[str, Tensor], record: object = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the given tensors; equal only for bit-equal values.

    Args:
        values: The tensors.
        record: What JSON can hold, kept beside them: a number in it that is another one is still JSON. Keys count in
            their order, layout does not.
    """
    state = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        state.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        state.update(raw(value).numpy().data)
    if record is not None:
        state.update(json.dumps(record).encode())
    return state.hexdigest()


def differences(found: object, expected: Mapping[str, object]) -> str:
    """The names of what is not found as it is expected; empty if all is.

    Raises:
        ValueError: If what was found has no names.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"a {type(found).__name__} is not what results depend on, by name")
    return ", ".join(name for name, value in expected.items() if found.get(name) != value)
