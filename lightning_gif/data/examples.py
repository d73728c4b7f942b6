"""Examples that are read in a stable order, with stable dataset indices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, default_collate

from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import BatchError, GIFWarning, TrainingDataError
from .batch import Batch, joined
from .loaders import check_loader, sampled_ids
from .reading import Reader
from .streams import Stream
from .structure import describe, equal_tensors

__all__ = ["Examples", "warn_if_random"]


_SUBSET_NOTE = (
    " These are positions in a Subset. For indices of the dataset below it, pass a loader: DataLoader(Subset(dataset,"
    " indices), 64)."
)


def _unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Examples:
    """Examples that can be read any number of times, always in the same order and the same batches.

    In a distributed run every process knows the same examples and can read all of them. :meth:`batches` reads all
    examples. :meth:`local_batches` and :meth:`strided_batches` read a part of them on each process, so the results of
    all processes have to be combined.

    Attributes:
        dataset: A map-style dataset, whose items are collated. ``None`` if the examples exist in memory only.
        ids: Dataset indices ``(n,)`` of these examples, in reading order.
        batch_size: The number of examples in each batch except the last.
        collate: Turns a list of items into a batch.
        prepare: Converts a collated batch to the structure, device and dtype that the model takes.
        reader: Reads batches of the dataset; ``None`` without a dataset.
        in_memory: The prepared batches, if they are held in memory.
        processes: The process group.
        in_memory_shard: The positions at which ``in_memory`` starts and stops, if it holds this process's shard only.
        transform: Applied to each prepared batch that is read, see :meth:`map`.
        divisible: Whether a batch has one row for each example, see :class:`~.batch.Batch`.
    """

    dataset: Any
    ids: Tensor
    batch_size: int
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[Any], Any]
    reader: Reader | None = None
    in_memory: tuple[Batch, ...] | None = None
    processes: ProcessGroup = SINGLE_PROCESS
    in_memory_shard: tuple[int, int] | None = None
    transform: Callable[[Batch], Batch] = _unchanged
    divisible: bool = True

    @classmethod
    def from_loader(
        cls,
        loader: Any,
        prepare: Callable[[Any], Any],
        *,
        batch_size: int,
        most: int | None = None,
        seed: int = 0,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> Examples:
        """The examples that a loader draws from, in dataset order. The loader itself is never iterated.

        Args:
            loader: A ``DataLoader`` over a map-style dataset, or over an iterable dataset whose rows have ids.
            prepare: See the class.
            batch_size: See the class.
            most: Keep only the first ``most`` examples.
            seed: The seed of random augmentation, see :class:`~.reading.Reader`.
            processes: See the class.

        Raises:
            TrainingDataError: If the loader has no stable order or no examples.
        """
        loader = check_loader(loader)
        dataset: Any = loader.dataset
        is_stream = isinstance(dataset, IterableDataset)
        dataset = Stream(dataset) if is_stream else dataset
        ids = (dataset.ids if is_stream else sampled_ids(loader))[:most]
        if not len(ids):
            raise TrainingDataError("The loader's dataset has no examples.")
        options = {
            name: getattr(loader, name)
            for name in ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout", "persistent_workers")
            if not is_stream  # each worker would read the whole stream
        }
        reader = Reader(dataset, loader.collate_fn, options, seed)
        return cls(dataset, ids, batch_size, loader.collate_fn, prepare, reader, processes=processes)

    @classmethod
    def from_batch(
        cls,
        data: Any,
        prepare: Callable[[Any], Any],
        *,
        batch_size: int,
        processes: ProcessGroup = SINGLE_PROCESS,
        divisible: bool = True,
    ) -> Examples:
        """The examples of one batch, which is the same on all processes. Their ids are their positions in the batch."""
        whole = replace(Batch.of(prepare(data)), divisible=divisible)
        size = batch_size if divisible else whole.size
        pieces = [whole.slice(start, start + size) for start in range(0, whole.size, size)]
        return cls(
            None,
            whole.ids,
            batch_size,
            list,
            lambda data: data,
            in_memory=tuple(pieces),
            processes=processes,
            divisible=divisible,
        )

    @classmethod
    def absent(
        cls,
        ids: Tensor,
        size: int | None,
        prepare: Callable[[Any], Any],
        *,
        batch_size: int,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> Examples:
        """Examples that are known by their dataset indices ``(n,)`` only. To read one is an error.

        Args:
            ids: See the class.
            size: The length of the dataset; ``None`` if it has none.
            prepare: See the class.
            batch_size: See the class.
            processes: See the class.
        """
        dataset = _Absent(int(ids.max()) + 1 if size is None else size)
        reader = Reader(dataset, default_collate, {}, 0)
        return cls(dataset, ids, batch_size, default_collate, prepare, reader, processes=processes)

    @property
    def are_absent(self) -> bool:
        """Whether the examples cannot be read, see :meth:`absent`."""
        return isinstance(self.dataset, _Absent)

    def __len__(self) -> int:
        return len(self.ids)

    # ----------------------------------------------------------------------------------------------------------------
    # Labels
    # ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> Tensor | None:
        """The label of each example, ``(n,)`` on the CPU, in order; ``None`` if the targets are not labels.

        Takes one pass over the examples, unless the labels are known from an earlier pass over these examples or over
        a larger set. All processes of a distributed run have to call it together.
        """
        labels: list[Tensor | None] = []
        for batch in self.local_batches():
            labels.append(_classes_on_cpu(batch))
            if labels[-1] is None:
                break
        return self._gather_classes(labels)

    def _gather_classes(self, local: list[Tensor | None]) -> Tensor | None:
        """The labels of all examples, from the labels of each local batch."""
        parts = self.processes.gather(local)
        if any(labels is None for part in parts for labels in part):
            return None
        return torch.cat([labels for part in parts for labels in part])  # type: ignore[misc]

    def learn_classes(self, local: list[Tensor | None]) -> None:
        """Notes the labels from a pass over all :meth:`local_batches`, so that :attr:`classes` takes no other pass.

        All processes of a distributed run have to call it together.

        Args:
            local: The labels ``(B,)`` of each local batch; ``None`` for a batch without labels.
        """
        vars(self)["classes"] = self._gather_classes([None if one is None else one.cpu() for one in local])

    @property
    def class_or_zero(self) -> Tensor:
        """The label of each example, ``(n,)``; 0 for all if the targets are not labels."""
        return torch.zeros(len(self), dtype=torch.long) if self.classes is None else self.classes

    def has_none_of(self, labels: Tensor) -> bool:
        """Whether all examples have a label, and no label is among ``labels`` ``(c,)``.

        If the labels are not known, examples are read until one decides the answer.
        """
        if "classes" in vars(self):
            return self.classes is not None and not bool(torch.isin(self.classes, labels).any())
        seen: list[Tensor | None] = []
        decided = False
        for batch in self.local_batches():
            classes = _classes_on_cpu(batch)
            seen.append(classes)
            decided = classes is None or bool(torch.isin(classes, labels).any())
            if decided:
                break
        if any(self.processes.gather(decided)):
            return False
        self.learn_classes(seen)  # every example was read
        return True

    def _with_classes_of(self, other: Examples, chosen: Tensor) -> Examples:
        """Copies the known labels, if any, from a larger set to these examples, a subset of it.

        Args:
            other: The larger set.
            chosen: The subset: positions ``(n,)`` in ``other``, or a mask.

        Returns:
            These examples.
        """
        if "classes" in vars(other):
            vars(self)["classes"] = None if other.classes is None else other.classes[chosen]
        return self

    # ----------------------------------------------------------------------------------------------------------------
    # Reading
    # ----------------------------------------------------------------------------------------------------------------

    def batches(self, within: int | None = None) -> Iterator[Batch]:
        """The examples as prepared batches, in order.

        Args:
            within: No batch that is read has examples of two parts of so many examples. So it is the same whether all
                parts are read, or some.
        """
        if self.in_memory is not None and self.in_memory_shard is None:
            yield from self.in_memory
        else:
            parts = (self.ids,) if within is None else self.ids.split(within)
            yield from self._read([ids for part in parts for ids in part.split(self.batch_size)])

    @property
    def shard(self) -> tuple[int, int]:
        """The positions at which the shard of this process starts and stops."""
        return self.in_memory_shard or self.processes.shard(len(self))

    def local_batches(self) -> Iterator[Batch]:
        """This process's shard of the examples as batches, in order. The shards of all processes partition them."""
        if self.processes.size == 1:
            yield from self.batches()
        elif self.in_memory is None:
            start, stop = self.shard
            yield from self._read(self.ids[start:stop].split(self.batch_size) if start < stop else ())
        else:
            for batch, start, stop in self._local_pieces():
                yield batch.slice(start, stop)

    @property
    def n_local_batches(self) -> int:
        """The number of batches that :meth:`local_batches` yields."""
        if self.in_memory is not None:
            return len(list(self._local_pieces()))
        start, stop = self.shard
        return -(-(stop - start) // self.batch_size)

    def _local_pieces(self) -> Iterator[tuple[Batch, int, int]]:
        """Each batch in memory that has examples of this process's shard, and where they start and stop in it."""
        start, stop = self.shard
        position = start if self.in_memory_shard else 0
        for batch in self.in_memory or ():
            low, high = max(start - position, 0), min(stop - position, batch.size)
            if low < high:
                yield batch, low, high
            position += batch.size

    def strided_batches(self) -> Iterator[Batch]:
        """Every ``world_size``-th batch, unchanged: for computations that depend on batch composition (BatchNorm)."""
        if self.processes.size == 1:
            yield from self.batches()
        elif self.in_memory is not None and self.in_memory_shard is None:
            yield from self.in_memory[self.processes.rank :: self.processes.size]
        else:
            yield from self._read(self.ids.split(self.batch_size)[self.processes.rank :: self.processes.size])

    def all_gather(self, values: list[Tensor]) -> Tensor:
        """The values that all processes computed, ``(n, …)``, in the order of the examples.

        Args:
            values: One tensor ``(B, …)`` for each batch of :meth:`local_batches`, with one row for each example.
        """
        if self.processes.size == 1:
            return torch.cat(values)
        parts = self.processes.gather([value.detach().cpu() for value in values])
        return torch.cat([value for part in parts for value in part])

    def _read(self, groups: Sequence[Tensor]) -> Iterator[Batch]:
        """Batches of the dataset with the given ids, ``(B,)`` each."""
        assert self.reader is not None  # without a dataset, all examples are in memory
        for ids, data in zip(groups, self.reader.read([group.tolist() for group in groups]), strict=True):
            yield self.transform(Batch(self.prepare(data), ids, len(ids), divisible=self.divisible))

    def close(self) -> None:
        """Ends worker processes that were kept between passes. A later pass starts them anew."""
        if self.reader is not None:
            self.reader.close()

    # ----------------------------------------------------------------------------------------------------------------
    # Other examples from these
    # ----------------------------------------------------------------------------------------------------------------

    def subset(self, positions: Tensor) -> Examples:
        """The examples at the given positions ``(m,)`` (not dataset indices), in the given order.

        They are read from the dataset. Examples that exist in memory only keep their present order.
        """
        if self.dataset is not None:
            chosen = replace(self, ids=self.ids[positions], in_memory=None, in_memory_shard=None)
            return chosen._with_classes_of(self, positions)
        return self._subset_in_memory(positions)

    def _subset_in_memory(self, positions: Tensor) -> Examples:
        wanted = torch.zeros(len(self), dtype=torch.bool)
        wanted[positions] = True
        start = 0 if self.in_memory_shard is None else self.in_memory_shard[0]
        shard = None
        if self.in_memory_shard is not None:
            shard = int(wanted[: self.in_memory_shard[0]].sum()), int(wanted[: self.in_memory_shard[1]].sum())
        pieces = []
        for batch in self.batches() if self.in_memory_shard is None else self.in_memory or ():
            here = wanted[start : start + batch.size].nonzero().squeeze(1)
            start += batch.size
            if len(here):
                pieces.append(batch.take(here))
        in_memory = tuple(joined(pieces, self.batch_size))
        chosen = replace(self, ids=self.ids[wanted], in_memory=in_memory, in_memory_shard=shard)
        return chosen._with_classes_of(self, wanted)

    def with_ids(self, ids: Sequence[int]) -> Examples:
        """The examples with the given dataset indices, in the given order.

        Raises:
            TrainingDataError: If no index is given, one is given twice, or one is not among the examples.
        """
        wanted = torch.as_tensor([int(index) for index in ids], dtype=torch.long)
        missing = wanted[~torch.isin(wanted, self.ids)].tolist()
        if len(wanted.unique()) < len(wanted):
            raise TrainingDataError(f"Some of the {len(wanted)} dataset indices are given twice; give each once.")
        if not len(wanted):
            raise TrainingDataError("No dataset index was given. Give one or more.")
        if missing:
            raise TrainingDataError(
                f"{len(missing)} of the {len(wanted)} given dataset indices belong to no training example:"
                f" {missing[:5]}{' …' if len(missing) > 5 else ''}. Give indices that the training loader draws, from"
                f" {int(self.ids.min())} to {int(self.ids.max())}.{_SUBSET_NOTE * isinstance(self.dataset, Subset)}"
            )
        return self.subset(self.positions_of(wanted))

    def positions_of(self, ids: Tensor) -> Tensor:
        """The positions ``(m,)`` of the examples with the given dataset indices ``(m,)``, which must be among them."""
        order = self.ids.argsort()
        return order[torch.searchsorted(self.ids[order], ids)]

    def where(self, predicate: Callable[[Any], Any]) -> Examples:
        """The examples for which a function is true.

        Args:
            predicate: From a prepared batch of B examples to a bool tensor, array or list ``(B,)``.

        Raises:
            BatchError: If the function fails or returns anything else.
            TrainingDataError: If it is true for no example.
        """
        masks, classes = list[Tensor](), list[Tensor | None]()
        for batch in self.local_batches():
            classes.append(_classes_on_cpu(batch))
            masks.append(_mask(predicate, batch))
        if "classes" not in vars(self):
            vars(self)["classes"] = self._gather_classes(classes)
        positions = self.all_gather(masks).nonzero().squeeze(1)
        if not len(positions):
            labels = [] if self.classes is None else self.classes.unique().tolist()
            shown = f"{', '.join(map(str, labels[:20]))}{' …' if len(labels) > 20 else ''}"
            raise TrainingDataError(
                f"The function that selects examples is true for none of the {len(self)} training examples."
                f"{f' Their labels are {shown}.' if labels else ''} It gets a batch as the training loader yields it:"
                " check where the label stands in the batch, and the value that it is compared with."
            )
        return self.subset(positions)

    def sample(self, count: int | None, seed: int) -> Examples:
        """``count`` examples, drawn without replacement and kept in order; all if ``None`` or if there are fewer."""
        if count is None or count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self._select(drawn.sort().values)

    def round_robin(self, count: int) -> list[Examples]:
        """Assigns the examples in turn to ``count`` groups, or to as many as there are examples if that is less."""
        return [self._select(torch.arange(start, len(self), count)) for start in range(min(count, len(self)))]

    def _select(self, positions: Tensor) -> Examples:
        """The examples at sorted positions ``(m,)``, from memory if they are held there."""
        from_memory = self.in_memory is not None and (self.divisible or self.dataset is None)
        return self._subset_in_memory(positions) if from_memory else self.subset(positions)

    def map(self, function: Callable[[Batch], Batch]) -> Examples:
        """The same examples with each prepared batch passed through a function.

        The function must keep the examples of a batch and their order. It is applied at once to batches held in memory,
        and to other batches whenever they are read.
        """
        transform = self.transform
        held = None if self.in_memory is None else tuple(map(function, self.in_memory))
        return replace(self, transform=lambda batch: function(transform(batch)), in_memory=held)

    def cached(self, most: float = math.inf) -> Examples:
        """The same examples, held in memory if their prepared batches take no more than ``most`` bytes on each process.

        Each process holds its own shard. If one shard is too large, no process holds any.
        """
        if self.in_memory is not None:
            return self
        held, size = [], 0
        for batch in self.local_batches():
            size += batch.nbytes
            if size > most:
                break
            held.append(batch)
        if any(self.processes.gather(size > most)):
            return self
        shard = None if self.processes.size == 1 else self.shard
        cached = replace(self, in_memory=tuple(held), in_memory_shard=shard)
        return cached._with_classes_of(self, torch.arange(len(self)))


class _Absent:
    """A dataset whose items are not at hand."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        raise TrainingDataError(
            "The training data are not at hand, so no example can be read. Give training examples by their dataset"
            " indices, or pass a `dataloader=` over the training data."
        )


def warn_if_random(examples: Examples) -> bool:
    """Warns if the first example differs when it is read twice, as with random augmentation.

    Returns:
        Whether it differs.
    """
    if examples.in_memory is not None:
        return False
    indices = examples.ids[:2].tolist()  # a collate function may need several examples
    first, second = (examples.collate([examples.dataset[index] for index in indices]) for _ in range(2))
    same = equal_tensors(first, second)
    if not same:
        warnings.warn(
            "The training dataset returns different values each time an example is read (random augmentation?). The"
            " global generators are seeded before each batch, so one fixed draw is used, unless the dataset has a"
            " generator of its own. For results that do not depend on the draw, pass a `dataloader=` without"
            " augmentation.",
            GIFWarning,
            stacklevel=2,
        )
    return not same


def _classes_on_cpu(batch: Batch) -> Tensor | None:
    return None if batch.classes is None else batch.classes.cpu()


def _mask(predicate: Callable[[Any], Any], batch: Batch) -> Tensor:
    """The truth values ``(B,)`` that a user's function returns for a batch."""
    try:
        mask = predicate(batch.data)
        mask = np.array(mask) if isinstance(mask, np.ndarray) else mask  # tensors have no negative strides
        mask = torch.as_tensor(mask).cpu() if isinstance(mask, (Tensor, list, tuple, np.ndarray)) else mask
    except Exception as error:
        raise BatchError(
            f"The function that selects examples failed, or returned no truth values: {type(error).__name__}: {error}."
            f" It was called with a whole batch: {describe(batch.data)}."
        ) from error
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch.size,):
        raise BatchError(
            "The function that selects examples must return one truth value for each example of a batch, a bool tensor"
            f" of shape [{batch.size}]; it returned {describe(mask)} for the batch {describe(batch.data)}."
        )
    return mask
