"""Reads batches of items from a dataset, with the same random draws in each pass and in each process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

__all__ = ["Reader"]

# A prime: seeds of neighbouring batches have nothing in common.
_STRIDE = 1_000_003


class Reader:
    """Reads batches of a map-style dataset.

    Before each batch, the global random generators are seeded by its first index. So a dataset that augments at random
    draws the same values in each pass over the same batches, whichever process reads them. If the user's loader keeps
    its workers between epochs (``persistent_workers=True``), this reader keeps workers of its own between passes, until
    :meth:`close`. A pass of a single batch is read in the main process, without waiting for a worker.

    Args:
        dataset: The dataset.
        collate: Turns a list of items into a batch.
        options: Options of the user's loader: workers, how they start, and whether they persist.
        seed: The seed.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], options: Mapping[str, Any], seed: int
    ) -> None:
        self._items = _SeededItems(dataset, seed)
        self._collate = collate
        self._options = dict(options)
        self._batches = _Batches()
        self._kept: DataLoader[Any] | None = None
        self._is_reading = False

    def read(self, batches: Sequence[list[int]]) -> Iterator[Any]:
        """Yields the collated batches with the given indices, in order."""
        workers = min(self._options.get("num_workers", 0), len(batches)) if len(batches) > 1 else 0
        if not workers:
            yield from self._loader(batches, {})
        elif self._is_reading or not self._options.get("persistent_workers"):
            yield from self._loader(batches, {**self._options, "num_workers": workers, "persistent_workers": False})
        else:
            if self._kept is None:
                self._kept = self._loader(self._batches, self._options)
            self._batches.current, self._is_reading = batches, True
            try:
                yield from self._kept
            finally:
                self._is_reading = False

    def read_again(self, indices: list[int], set_generators: Callable[[], Any]) -> Any:
        """The collated batch with the given indices, read in this process with generators that a function sets."""
        set_generators()
        return self._collate(list(self._items.read(indices)))

    def close(self) -> None:
        """Ends the workers."""
        self._kept = None

    def _loader(self, batches: Any, options: Mapping[str, Any]) -> DataLoader[Any]:
        # A generator of its own, because a DataLoader draws a seed for its workers from it.
        generator = torch.Generator().manual_seed(0)
        items: Any = self._items
        return DataLoader(items, batch_sampler=batches, collate_fn=self._collate, generator=generator, **options)


class _Batches:
    """A batch sampler whose batches change between passes."""

    def __init__(self) -> None:
        self.current: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)


class _SeededItems:
    """The items of a dataset, a batch at a time; the generators are seeded before each batch."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> Sequence[Any]:
        seed = (self._seed * _STRIDE + indices[0]) % 2**32
        # torch.manual_seed would format a stack trace for every kind of accelerator that is not in use.
        torch.default_generator.manual_seed(seed)
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return self.read(indices)

    def read(self, indices: list[int]) -> Sequence[Any]:
        """The items, without a seed."""
        if getattr(self._dataset, "__getitems__", None):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]
