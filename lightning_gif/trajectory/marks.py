"""What a record compares: checksums of batches, and the states of random generators."""

from __future__ import annotations

import ctypes
import random
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.structure import tensors

__all__ = ["Generators", "mark_of"]


# At most so many values of each tensor of a batch are read for its checksum.
_MOST = 1024

# The bytes of a Mersenne Twister in memory: 624 words and a position.
_TWISTER_BYTES = 625 * 4


def mark_of(batch: Any) -> int:
    """A checksum of the shapes of a batch's tensors, and of up to 1024 values of each, spread evenly.

    Floating-point values are compared in float64, so that it does not depend on a conversion to a wider type.
    """
    mark = 0
    for tensor in tensors(batch):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(len(flat) // _MOST, 1)].to("cpu", torch.float64 if flat.is_floating_point() else flat.dtype)
        mark = zlib.crc32(str(tuple(tensor.shape)).encode(), mark)
        mark = zlib.crc32(np.ascontiguousarray(some.numpy()).view(np.uint8).data, mark)
    return mark


class Generators(NamedTuple):
    """The states of the global random generators at one moment.

    Attributes:
        cpu: That of PyTorch on the CPU.
        cuda: That of PyTorch on the device; ``None`` if this is the CPU.
        python: That of the module ``random``.
        numpy: That of NumPy's global generator.
    """

    cpu: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def now(cls, device: torch.device) -> Generators:
        """The present states."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), _numpy_state())

    def differ(self, other: Generators) -> bool:
        """Whether a random number was drawn between two moments."""
        same = torch.equal(self.cpu, other.cpu) and self.python == other.python
        if self.cuda is not None and other.cuda is not None:
            same = same and torch.equal(self.cuda, other.cuda)
        one, two = self.numpy, other.numpy
        return not (same and (one is two or (one[2:] == two[2:] and np.array_equal(one[1], two[1]))))

    def tensors(self) -> dict[str, Tensor]:
        """The states as tensors by name."""
        version, words, spare = self.python
        _, keys, *place = self.numpy
        found = {
            "torch": self.cpu,
            "python": torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32)),
            "numpy": torch.from_numpy(np.array(keys, dtype=np.uint32).view(np.int32)),
            "more": torch.tensor([version, spare is not None, spare or 0.0, *place], dtype=torch.float64),
        }
        return found if self.cuda is None else {**found, "cuda": self.cuda}

    @staticmethod
    def set_to(states: dict[str, Tensor], device: torch.device) -> None:
        """Sets the generators to what :meth:`tensors` has returned."""
        version, has_spare, spare, place, has_gauss, cached = states["more"].tolist()
        torch.set_rng_state(states["torch"])
        random.setstate(
            (int(version), tuple(states["python"].numpy().view(np.uint32).tolist()), spare if has_spare else None)
        )
        keys = states["numpy"].numpy().view(np.uint32)
        np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))  # noqa: NPY002
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)


_last: tuple[bytes, tuple[Any, ...]] = b"", ()


def _numpy_state() -> tuple[Any, ...]:
    """The state of NumPy's global generator.

    Reading it takes as long as everything else that is recorded of a step. So the last one is returned if it is still
    in the memory of the generator, and no second value of a pair of normal ones is waiting there.
    """
    global _last
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # since NumPy 1.24
    known = isinstance(generator, np.random.MT19937)
    words = ctypes.string_at(generator.ctypes.state_address, _TWISTER_BYTES) if known else b""
    before, state = _last
    if not words or words != before or state[3]:
        state = tuple(np.random.get_state())  # noqa: NPY002
        _last = words, state
    return state
