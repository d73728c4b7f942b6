"""What a record compares: checksums of batches, and the states of random generators."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.structure import tensors
from ..storage.digests import raw

__all__ = ["generators", "mark_of", "set_generators"]


# At most so many values of each tensor of a batch are read for its checksum.
_MOST = 4096


def mark_of(batch: Any) -> int:
    """A checksum of the shapes of a batch's tensors, and of up to 4096 values of each, spread evenly.

    Floating-point values are compared in float64, so that it does not depend on a conversion to a wider type.
    """
    mark = 0
    for tensor in tensors(batch):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(len(flat) // _MOST, 1)]
        some = some.double() if some.is_floating_point() else some
        mark = zlib.crc32(str(tuple(tensor.shape)).encode(), mark)
        mark = zlib.crc32(raw(some).numpy().data, mark) if len(some) else mark
    return mark


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the global random generators, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "more": torch.tensor([version, gauss is not None, gauss or 0.0, place, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets the global random generators to what :func:`generators` has returned."""
    version, has_spare, spare, place, has_gauss, cached = states["more"].tolist()
    torch.set_rng_state(states["torch"])
    random.setstate((int(version), tuple(states["python"].tolist()), spare if has_spare else None))
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))  # noqa: NPY002
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
