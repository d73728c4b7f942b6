"""The memory that a computation needs at its peak, counted by the tensors that its operations make."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory"]


class PeakMemory(TorchDispatchMode):
    """A context that counts the bytes of new tensors while they live, and remembers the largest sum.

    Tensors from before the context do not count, and memory that an operation uses inside itself does not either.
    Sparse tensors, the parts of tensor subclasses, and what other threads make are left out, too.

    Attributes:
        live: The bytes of the tensors that were made in the context and are alive.
        peak: The largest value of ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        old = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in old:
                self._count(tensor)
        self.peak = max(self.peak, self.live)
        return made

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key is None or key in self._known:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.live -= size


def _key(tensor: Tensor) -> int | None:
    """A number that tensors of the same storage share; ``None`` for a tensor without one, such as a sparse one."""
    if tensor.layout is not torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)
