"""Training data in a stable order with stable ids."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import BatchError, GIFWarning, TrainingDataError
from .batch import Batch
from .structure import describe, map_tensors, sequences, tensors

__all__ = ["Examples"]


@dataclass(frozen=True)
class Examples:
    """Examples that can be read again and again, always in the same order and the same batches.

    Where several processes share out the work, all of them know the same examples and each can read all of them. A pass
    by :meth:`local_batches` or :meth:`strided_batches` goes over the part of this process, and what it finds has to be
    put together with what the others find; one by :meth:`batches` goes over all of them.

    Attributes:
        dataset: Map-style; its items are collated.
        ids: Dataset indices ``(n,)`` of these examples, in reading order.
        batch_size: Examples in each batch but the last.
        collate: Joins a list of items to a batch.
        prepare: Brings a batch to where and how the model takes it.
        loader_options: Options of the user's loader that are kept: workers and how they start.
        seed: Set on the global generators before each pass, so that random augmentation repeats itself.
        in_memory: The prepared batches if they are held in memory.
        processes: The processes.
        in_memory_shard: If ``in_memory`` are only the batches of this process's part: at which positions that starts
            and stops.
    """

    dataset: Any
    ids: Tensor
    batch_size: int
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[Any], Any]
    loader_options: Mapping[str, Any]
    seed: int = 0
    in_memory: tuple[Batch, ...] | None = None
    processes: ProcessGroup = SINGLE_PROCESS
    in_memory_shard: tuple[int, int] | None = None

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
            loader: A ``DataLoader`` over a map-style dataset.
            prepare: See the class.
            batch_size: See the class.
            most: Keep only the first so many.
            seed: See the class.
            processes: See the class.

        Raises:
            TrainingDataError: If the order of its examples cannot be made stable, or there are none.
        """
        if not isinstance(loader, DataLoader):
            raise TrainingDataError(
                f"Expected a torch DataLoader, got {type(loader).__name__}. With several loaders, or one of your own"
                " making, pass a DataLoader over the training set as `dataloader=`."
            )
        dataset: Dataset[Any] = loader.dataset
        if isinstance(dataset, IterableDataset):
            raise TrainingDataError(
                f"{type(dataset).__name__} is an IterableDataset: its examples have no stable index. Pass a DataLoader"
                " over a map-style dataset as `dataloader=`."
            )
        if loader.batch_sampler is None:
            raise TrainingDataError(
                "The loader has batch_size=None, so what an item of its dataset holds is a batch of unknown size. Pass"
                " a DataLoader over single examples as `dataloader=`."
            )
        ids = _sampled_ids(loader)[:most]
        if not len(ids):
            raise TrainingDataError("The loader's dataset has no examples.")
        options = {
            name: getattr(loader, name)
            for name in ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout")
        }
        return cls(dataset, ids, batch_size, loader.collate_fn, prepare, options, seed, processes=processes)

    @classmethod
    def from_batch(
        cls, data: Any, prepare: Callable[[Any], Any], *, batch_size: int, processes: ProcessGroup = SINGLE_PROCESS
    ) -> Examples:
        """The examples of one batch in hand, the same on all processes; their ids are their positions in it."""
        prepared = prepare(data)
        whole = Batch.of(prepared)
        pieces = [whole.slice(start, start + batch_size) for start in range(0, whole.size, batch_size)]
        return cls(
            None, whole.ids, batch_size, list, lambda data: data, {}, in_memory=tuple(pieces), processes=processes
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def classes(self) -> Tensor | None:
        """The label of each example, ``(n,)`` on the CPU, in order; ``None`` where the targets are no labels.

        It takes one pass over the examples, unless another pass has seen the labels, or those of a larger set are
        known. Where several processes share out the work, all must ask.
        """
        found: list[Tensor | None] = []
        for batch in self.local_batches():
            found.append(None if batch.classes is None else batch.classes.cpu())
            if batch.classes is None:
                break
        return self._all_classes(found)

    def _all_classes(self, found: list[Tensor | None]) -> Tensor | None:
        """The labels of all examples from those of this process's batches."""
        parts = self.processes.gather(found)
        if any(classes is None for part in parts for classes in part):
            return None
        return torch.cat([classes for part in parts for classes in part])  # type: ignore[misc]

    @property
    def class_or_zero(self) -> Tensor:
        """The label of each example, ``(n,)``; 0 for all where the targets are no labels."""
        return torch.zeros(len(self), dtype=torch.long) if self.classes is None else self.classes

    def has_none_of(self, labels: Tensor) -> bool:
        """Whether all examples have a label, and none of them one of ``labels`` ``(c,)``.

        Unless the labels are known, examples are read up to the first that decides it.
        """
        if "classes" in vars(self):
            return self.classes is not None and not bool(torch.isin(self.classes, labels).any())
        found: list[Tensor | None] = []
        for batch in self.local_batches():
            found.append(None if batch.classes is None else batch.classes.cpu())
            if found[-1] is None or torch.isin(found[-1], labels).any():
                break
        decided = bool(found) and (found[-1] is None or bool(torch.isin(found[-1], labels).any()))
        if any(self.processes.gather(decided)):
            return False
        vars(self)["classes"] = self._all_classes(found)  # all of them were read
        return True

    def _with_classes_of(self, other: Examples, chosen: Tensor) -> Examples:
        """These examples, which are some of ``other``, with their labels where those are known there.

        Args:
            other: The larger set.
            chosen: Which of it: positions ``(n,)`` or a mask.
        """
        if "classes" in vars(other):
            vars(self)["classes"] = None if other.classes is None else other.classes[chosen]
        return self

    def batches(self) -> Iterator[Batch]:
        """The examples as prepared batches, in order."""
        if self.in_memory is not None and self.in_memory_shard is None:
            yield from self.in_memory
        else:
            yield from self._read(self.ids.split(self.batch_size))

    @property
    def shard(self) -> tuple[int, int]:
        """At which positions the part of this process starts and stops."""
        return self.in_memory_shard or self.processes.shard(len(self))

    def local_batches(self) -> Iterator[Batch]:
        """This process's part of the examples, in order, as batches of its own; all parts cover each example once."""
        if self.processes.size == 1:
            yield from self.batches()
        elif self.in_memory is None:
            start, stop = self.shard
            yield from self._read(self.ids[start:stop].split(self.batch_size) if start < stop else ())
        else:
            for batch, start, stop in self._pieces():
                yield batch.slice(start, stop)

    @property
    def n_local_batches(self) -> int:
        """How many batches :meth:`local_batches` gives."""
        if self.in_memory is not None:
            return len(list(self._pieces()))
        start, stop = self.shard
        return -(-(stop - start) // self.batch_size)

    def _pieces(self) -> Iterator[tuple[Batch, int, int]]:
        """Batches in memory with examples of this process, and from where to where these are."""
        start, stop = self.shard
        position = start if self.in_memory_shard else 0
        for batch in self.in_memory or ():
            low, high = max(start - position, 0), min(stop - position, batch.size)
            if low < high:
                yield batch, low, high
            position += batch.size

    def strided_batches(self) -> Iterator[Batch]:
        """This process's part of :meth:`batches`, as they are: for what depends on which examples are in a batch."""
        if self.processes.size == 1:
            yield from self.batches()
        elif self.in_memory is not None and self.in_memory_shard is None:
            yield from self.in_memory[self.processes.rank :: self.processes.size]
        else:
            yield from self._read(self.ids.split(self.batch_size)[self.processes.rank :: self.processes.size])

    def all_gather(self, values: list[Tensor]) -> Tensor:
        """What all processes have found for the examples, ``(n, …)``, in their order.

        Args:
            values: For each batch of :meth:`local_batches` a value for each of its examples, ``(B, …)``.
        """
        if self.processes.size == 1:
            return torch.cat(values)
        parts = self.processes.gather([value.detach().cpu() for value in values])
        return torch.cat([value for part in parts for value in part])

    def _read(self, groups: Sequence[Tensor]) -> Iterator[Batch]:
        """Batches of the dataset, of ids ``(B,)`` each."""
        _seed_global_generators(self.seed)
        loader = DataLoader(
            self.dataset,
            batch_sampler=[group.tolist() for group in groups],
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
            **self.loader_options,
        )
        for ids, data in zip(groups, loader, strict=True):
            yield Batch(self.prepare(data), ids, len(ids))

    def subset(self, positions: Tensor) -> Examples:
        """The examples at the given positions ``(m,)`` (not dataset indices), in the order given; read anew.

        Examples that are only held in memory are given in the order they are held in.
        """
        if self.dataset is not None:
            chosen = replace(self, ids=self.ids[positions], in_memory=None, in_memory_shard=None)
            return chosen._with_classes_of(self, positions)
        return self._in_memory(positions)

    def _in_memory(self, positions: Tensor) -> Examples:
        wanted = torch.zeros(len(self), dtype=torch.bool)
        wanted[positions] = True
        start = 0 if self.in_memory_shard is None else self.in_memory_shard[0]
        part = None
        if self.in_memory_shard is not None:
            part = int(wanted[: self.in_memory_shard[0]].sum()), int(wanted[: self.in_memory_shard[1]].sum())
        pieces = []
        for batch in self.batches() if self.in_memory_shard is None else self.in_memory or ():
            here = wanted[start : start + batch.size].nonzero().squeeze(1)
            start += batch.size
            if len(here):
                pieces.append(batch.take(here))
        in_memory = tuple(_joined(pieces, self.batch_size))
        return replace(self, ids=self.ids[wanted], in_memory=in_memory, in_memory_shard=part)._with_classes_of(
            self, wanted
        )

    def with_ids(self, ids: Sequence[int]) -> Examples:
        """Those with the given dataset indices, in the order given.

        Raises:
            TrainingDataError: If there are none, one comes twice, or an index is not among them.
        """
        wanted = torch.as_tensor([int(index) for index in ids], dtype=torch.long)
        missing = wanted[~torch.isin(wanted, self.ids)].tolist()
        if len(wanted.unique()) < len(wanted):
            raise TrainingDataError(f"Some of the {len(wanted)} dataset indices are given twice; give each once.")
        if not len(wanted):
            raise TrainingDataError("There are no examples to look for: no dataset index was given. Give one or more.")
        if missing:
            raise TrainingDataError(
                f"{len(missing)} of the {len(wanted)} dataset indices given belong to no training example:"
                f" {missing[:5]}{' …' if len(missing) > 5 else ''}. Give"
                f" such as the training loader draws, {int(self.ids.min())} to {int(self.ids.max())}."
            )
        order = self.ids.argsort()
        return self.subset(order[torch.searchsorted(self.ids[order], wanted)])

    def where(self, predicate: Callable[[Any], Any]) -> Examples:
        """Those that a function of a prepared batch is true for.

        Args:
            predicate: From a batch of B examples to B truth values.

        Raises:
            BatchError: If it fails, or returns anything else.
            TrainingDataError: If it is true for none.
        """
        found, classes = list[Tensor](), list[Tensor | None]()
        for batch in self.local_batches():
            classes.append(None if batch.classes is None else batch.classes.cpu())
            try:
                mask = predicate(batch.data)
                mask = np.array(mask) if isinstance(mask, np.ndarray) else mask  # tensors have no negative strides
                mask = torch.as_tensor(mask).cpu() if isinstance(mask, (Tensor, list, tuple, np.ndarray)) else mask
            except Exception as error:
                raise BatchError(
                    f"The function that says which examples are meant failed, or returned no truth values:"
                    f" {type(error).__name__}: {error}. It is asked about whole batches, as {describe(batch.data)}."
                ) from error
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch.size,):
                raise BatchError(
                    f"The function that says which examples are meant must return one truth value for each example of a"
                    f" batch, a bool tensor of shape [{batch.size}]; it returned {describe(mask)}."
                )
            found.append(mask)
        if "classes" not in vars(self):
            vars(self)["classes"] = self._all_classes(classes)
        positions = self.all_gather(found).nonzero().squeeze(1)
        if not len(positions):
            raise TrainingDataError(
                f"The function that says which examples are meant is true for none of the {len(self)} training"
                " examples."
            )
        return self.subset(positions)

    def sample(self, count: int | None, seed: int) -> Examples:
        """``count`` of the examples, drawn without replacement and kept in order; all for ``None`` or if fewer."""
        if count is None or count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self._select(drawn.sort().values)

    def round_robin(self, count: int) -> list[Examples]:
        """Groups of the examples, to which they are given in turn: so many, or one for each if these are fewer."""
        return [self._select(torch.arange(start, len(self), count)) for start in range(min(count, len(self)))]

    def _select(self, positions: Tensor) -> Examples:
        """The examples at sorted positions ``(m,)``, from memory where they are held there."""
        return self.subset(positions) if self.in_memory is None else self._in_memory(positions)

    def map(self, function: Callable[[Any], Any]) -> Examples:
        """The same examples with what a function makes of each prepared batch in its place.

        Of batches held in memory it is made once, now, and of others whenever they are read.
        """
        made = None
        if self.in_memory is not None:
            made = tuple(replace(batch, data=function(batch.data)) for batch in self.in_memory)
        return replace(self, prepare=lambda data: function(self.prepare(data)), in_memory=made)

    def cached(self, most: float = math.inf) -> Examples:
        """The same examples with their prepared batches held in memory, if they take no more than ``most`` bytes.

        Each process holds its own part.
        """
        if self.in_memory is not None:
            return self
        pieces, size = [], 0
        for batch in self.local_batches():
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch.data))
            if size > most:
                break
            pieces.append(batch)
        if any(self.processes.gather(size > most)):  # all hold their parts, or none
            return self
        held = replace(self, in_memory=tuple(pieces), in_memory_shard=None if self.processes.size == 1 else self.shard)
        return held._with_classes_of(self, torch.arange(len(self)))

    def warn_if_random(self) -> bool:
        """Warns if an item of the dataset is not the same twice, as under random augmentation, and says whether."""
        if self.in_memory is not None:
            return False
        index = int(self.ids[0])
        first, second = (self.collate([self.dataset[index]]) for _ in range(2))
        same = all(
            torch.equal(a, b) or (bool((a.isnan() == b.isnan()).all()) and torch.equal(a.nan_to_num(), b.nan_to_num()))
            for a, b in zip(tensors(first), tensors(second), strict=True)
        )
        if not same:
            warnings.warn(
                "The training dataset returns something else each time an example is read (random augmentation?). One"
                " fixed draw is used; pass a `dataloader=` without augmentation for results that do not depend on it.",
                GIFWarning,
                stacklevel=2,
            )
        return not same


def _joined(pieces: list[Batch], most: int) -> Iterator[Batch]:
    """Batches of up to ``most`` examples made of smaller ones, since one large pass costs less than many small ones."""
    waiting: list[Batch] = []
    for piece in pieces:
        alike = not waiting or _can_join(waiting[0], piece)
        if waiting and (not alike or sum(batch.size for batch in waiting) + piece.size > most):
            yield _join(waiting)
            waiting = []
        waiting.append(piece)
    if waiting:
        yield _join(waiting)


def _can_join(one: Batch, other: Batch) -> bool:
    """Whether all their tensors are alike but for the number of examples; padding can differ from batch to batch."""

    def form(batch: Batch) -> tuple[list[torch.Size], int]:
        return [part.shape[1:] for part in tensors(batch.data)], len(sequences(batch.data, batch.size))

    return form(one) == form(other)


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(tensors(batch.data) for batch in batches), strict=True)
    texts = zip(*(sequences(batch.data, batch.size) for batch in batches), strict=True)

    def joined(items: Any) -> Any:
        return type(items)(item for part in next(texts) for item in part)

    data = map_tensors(
        batches[0].data,
        lambda tensor: torch.cat(next(columns)) if tensor.ndim else (next(columns), tensor)[1],
        joined,
        batches[0].size,
    )
    return Batch(data, torch.cat([batch.ids for batch in batches]), sum(batch.size for batch in batches))


def _sampled_ids(loader: DataLoader[Any]) -> Tensor:
    """Which dataset indices a loader draws, sorted; its sampler is asked, not iterated."""
    sampler: Any = loader.sampler
    if isinstance(loader.batch_sampler, BatchSampler):
        sampler = loader.batch_sampler.sampler
    elif loader.batch_sampler is not None:
        sampler = loader.batch_sampler
    # Under several processes Lightning wraps any sampler into a distributed one, of which this is a part.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(sampler.indices, dtype=torch.long).sort().values
    if isinstance(sampler, Sequence) and sampler is not loader.batch_sampler:
        return torch.as_tensor([int(index) for index in sampler], dtype=torch.long).sort().values
    if not isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        warnings.warn(
            f"The loader draws by {type(sampler).__name__}: each example of its dataset is counted once, however often"
            " that draws it. Pass `dataloader=` with a plain loader to say otherwise.",
            GIFWarning,
            stacklevel=2,
        )
    try:
        size = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise TrainingDataError(
            f"{type(loader.dataset).__name__} has no length, so its examples cannot be numbered. Define `__len__`."
        ) from None
    return torch.arange(size)


def _seed_global_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy
    except ModuleNotFoundError:
        return
    numpy.random.seed(seed)  # noqa: NPY002
