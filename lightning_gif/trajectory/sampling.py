"""Notes the dataset indices that a fit draws, and random numbers of its items, without a change of its loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .marks import Generators

__all__ = ["Drawn", "DrawnIndices"]


_CPU = torch.device("cpu")


class Drawn(NamedTuple):
    """A batch that a loader has drawn.

    Attributes:
        ids: The dataset indices ``(B,)`` of its examples.
        generators: The states of the random generators before its items were read, if numbers may have been drawn since
            then; else empty.
    """

    ids: Tensor
    generators: dict[str, Tensor]


class DrawnIndices:
    """The dataset indices of the batches of a training loader, in the order in which they are drawn.

    Workers of a loader draw ahead. So the indices of each batch are kept until the batch is :meth:`next`. Without
    workers, the states of the random generators before its items are read are kept, too.
    """

    def __init__(self) -> None:
        self._drawn: list[Any] = []
        self._place = 0
        self._iterators: list[tuple[Any, Any]] = []  # those of persistent workers, each with its own sampler

    @contextlib.contextmanager
    def around(self, loaders: list[Any]) -> Iterator[None]:
        """The block in which an iterator over the loaders is created: it draws from a sampler that takes notes."""
        self._drawn, self._place = [], 0
        loader = loaders[0] if len(loaders) == 1 else None
        own = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or own is None:
            yield
            return
        existing = getattr(loader, "_iterator", None)
        if existing is not None and isinstance(existing._index_sampler, _Noting):
            existing._index_sampler.notes = self._drawn  # it is reset, and goes on with its sampler
            yield
            return
        members = vars(loader)
        # `DataLoader` refuses a plain assignment.
        members["batch_sampler"] = _Noting(own, self._drawn, reads=loader.num_workers == 0)
        if existing is not None:
            existing._index_sampler = members["batch_sampler"]
        try:
            yield
        finally:
            members["batch_sampler"] = own
        if getattr(loader, "_iterator", None) is not None:
            self._iterators.append((loader._iterator, own))

    def next(self, now: Generators) -> Drawn | None:
        """The next batch; ``None`` if its indices are not known. ``now`` are the present states of the generators."""
        if self._place >= len(self._drawn):
            return None
        (indices, before), self._drawn[self._place] = self._drawn[self._place], None
        self._place += 1
        try:
            ids = torch.as_tensor([int(index) for index in indices], dtype=torch.int64)
        except (TypeError, ValueError):  # a sampler may draw keys of any kind
            return None
        if before is None:
            return Drawn(ids, {})
        following = self._drawn[self._place] if self._place < len(self._drawn) else None
        after = now if following is None else following[1]
        return Drawn(ids, before.tensors() if before.differ(after) else {})

    def end(self) -> None:
        """Puts back the samplers of iterators that outlive the fit."""
        for iterator, own in self._iterators:
            iterator._index_sampler = own
        self._iterators = []


class _Noting:
    """A batch sampler that draws from another one, and notes what is drawn."""

    def __init__(self, own: Any, notes: list[Any], *, reads: bool) -> None:
        self._own = own
        self.notes = notes
        self._reads = reads

    def __iter__(self) -> _Drawing:
        return _Drawing(iter(self._own), self.notes, self._reads)

    def __len__(self) -> int:
        return len(self._own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Drawing:
    def __init__(self, drawn: Iterator[Any], notes: list[Any], reads: bool) -> None:
        self._drawn = drawn
        self._notes = notes
        self._reads = reads  # whether the items of a batch are read in this process, as soon as it is drawn

    def __iter__(self) -> _Drawing:
        return self

    def __next__(self) -> Any:
        batch = next(self._drawn)
        self._notes.append((list(batch), Generators.now(_CPU) if self._reads else None))
        return batch
