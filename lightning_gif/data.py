"""Batches as examples: their size, their targets, and training data in a stable order with stable ids."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import numbers
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

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
    Subset,
    SubsetRandomSampler,
)

from .digests import raw
from .errors import BatchError, GIFWarning, TrainingDataError
from .ranks import ALONE, Ranks

__all__ = [
    "TARGET_KEYS",
    "Batch",
    "Examples",
    "batch_size",
    "class_targets",
    "contents_digest",
    "data_digest",
    "describe",
    "example_classes",
    "find_targets",
    "locate",
    "map_tensors",
    "relabelled",
    "replace_targets",
    "same_structure",
    "slice_batch",
    "strata",
    "take",
    "tensors",
]

TARGET_KEYS = ("label", "labels", "target", "targets", "y")


_MOST_CLASSES = 10_000

# Of how many examples the contents count where data is to be recognised: all of them may not fit into an hour.
_DIGESTED = 64

# How many examples of a dataset tell whether all processes have the same.
_COMPARED = 8


class Batch(NamedTuple):
    """One batch as the model gets it, with the ids of its examples ``(B,)`` and their number ``B``."""

    data: Any
    ids: Tensor
    size: int


# --------------------------------------------------------------------------------------------------------------------
# The structure of a batch
# --------------------------------------------------------------------------------------------------------------------


def map_tensors(
    data: Any, function: Callable[[Tensor], Any], sequence: Callable[[Any], Any] | None = None, size: int = 0
) -> Any:
    """The same structure (tuples, lists, mappings, dataclasses, nested) with ``function`` applied to its tensors.

    Args:
        data: A batch, or anything a collate function returns.
        function: Applied to each tensor, in a fixed order.
        sequence: Applied to lists and tuples of ``size`` items that hold no tensor at any depth: strings, numbers or
            lists of them, one an example. Those of another length are looked into, as a pair of columns of strings.
        size: The number of examples.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        mapped = {key: map_tensors(value, function, sequence, size) for key, value in data.items()}
        return mapped if type(data) is dict else type(data)(mapped)  # type: ignore[call-arg]
    if isinstance(data, (list, tuple)):
        if sequence is not None and _is_sequence(data, size):
            return sequence(data)
        items = [map_tensors(value, function, sequence, size) for value in data]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    if is_dataclass(data) and not isinstance(data, type):
        changes = {name: map_tensors(value, function, sequence, size) for name, value in _fields(data).items()}
        if _is_made_of_its_fields(data):
            return replace(data, **changes)
        changed = copy.copy(data)
        for name, value in changes.items():
            object.__setattr__(changed, name, value)  # frozen ones, too
        return changed
    return data


def _is_made_of_its_fields(data: Any) -> bool:
    """Whether a dataclass can be made anew from its fields: not where its constructor takes more (an ``InitVar``)."""
    return inspect.signature(type(data)).parameters.keys() == {field.name for field in fields(data) if field.init}


def _fields(data: Any) -> dict[str, Any]:
    """The fields of a dataclass that it is made of; all of them where it cannot be made anew."""
    whole = not _is_made_of_its_fields(data)
    return {field.name: getattr(data, field.name) for field in fields(data) if whole or field.init}


def _items(data: Any) -> Iterable[Any]:
    """What a container holds, in the order of :func:`map_tensors`, which is not rebuilt; of anything else nothing."""
    if isinstance(data, Mapping):
        return data.values()
    if isinstance(data, (list, tuple)):
        return data
    return _fields(data).values() if is_dataclass(data) and not isinstance(data, type) else ()


def _has_tensor(data: Any) -> bool:
    if isinstance(data, Mapping):
        return any(_has_tensor(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return any(_has_tensor(value) for value in data)
    return isinstance(data, Tensor) or (is_dataclass(data) and not isinstance(data, type))


def tensors(data: Any) -> list[Tensor]:
    """The tensors of a batch in the order of :func:`map_tensors`."""
    return [data] if isinstance(data, Tensor) else [tensor for item in _items(data) for tensor in tensors(item)]


def _sequences(data: Any, size: int) -> list[Sequence[Any]]:
    """The lists and tuples of a batch of ``size`` examples that hold one string, number or list for each."""
    if _is_sequence(data, size):
        return [data]
    return [sequence for item in _items(data) for sequence in _sequences(item, size)]


def _is_sequence(data: Any, size: int) -> bool:
    """Whether something holds one string, number or list of them for each of ``size`` examples, and no tensor."""
    plain = isinstance(data, (list, tuple)) and not hasattr(data, "_fields")
    return plain and len(data) == size and not _has_tensor(data)


def batch_size(data: Any) -> int:
    """The number of examples in a batch: the first dimension that all its tensors share.

    Raises:
        BatchError: If there is no tensor with a dimension, if they disagree, or if there is no example.
    """
    sizes = {tensor.shape[0] for tensor in tensors(data) if tensor.ndim}
    if not sizes:
        raise BatchError(f"Expected a batch with at least one tensor of shape (B, …), got {describe(data)}.")
    if len(sizes) > 1:
        raise BatchError(
            f"The tensors of the batch disagree on the number of examples: {describe(data)}. The first dimension of"
            " each tensor must be the batch; where that cannot be, give the examples as a DataLoader, and define"
            " `influence_loss` (see GIFMixin)."
        )
    size = sizes.pop()
    if not size:
        raise BatchError(f"The batch is empty: {describe(data)}. Pass at least one example.")
    return size


def take(data: Any, rows: Tensor) -> Any:
    """The examples at positions ``rows`` ``(m,)`` of a batch, in its structure."""
    size = batch_size(data)
    return map_tensors(
        data,
        lambda tensor: tensor[rows.to(tensor.device)] if tensor.ndim else tensor,
        lambda items: type(items)(items[i] for i in rows.tolist()),
        size,
    )


def slice_batch(data: Any, start: int, stop: int) -> Any:
    """Examples ``start:stop`` of a batch, in its structure."""
    size = batch_size(data)
    return map_tensors(
        data,
        lambda tensor: tensor[start:stop] if tensor.ndim else tensor,
        lambda items: items[start:stop],
        size,
    )


def describe(data: Any) -> str:
    """The structure of a batch in words, for error messages."""
    if isinstance(data, Tensor):
        return f"{str(data.dtype).removeprefix('torch.')}{list(data.shape)}"
    if isinstance(data, np.ndarray):
        return f"a NumPy array {data.dtype}{list(data.shape)}, of which torch.as_tensor makes a tensor"
    if isinstance(data, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in data.items()) + "}"
    if isinstance(data, (list, tuple)):
        if not _has_tensor(data) and not any(isinstance(value, np.ndarray) for value in data):
            told = [f"{value!r}" for value in data[:3] if isinstance(value, numbers.Number)]
            few = f" ({', '.join(told)}{', …' if len(data) > 3 else ''})" if told else ""
            return f"{type(data).__name__} of {len(data)} value{'' if len(data) == 1 else 's'}{few}"
        inner = ", ".join(describe(value) for value in data)
        return f"[{inner}]" if isinstance(data, list) else f"({inner})"
    return type(data).__name__


def same_structure(one: Any, other: Any) -> bool:
    """Whether two batches have the same containers, and tensors of as many dimensions in the same places.

    Lists and tuples count as the same: collate functions of different versions return one or the other.
    """
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return (
            isinstance(one, Mapping)
            and isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(same_structure(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if not _has_tensor(one) and not _has_tensor(other):
            return True
        return len(one) == len(other) and all(map(same_structure, one, other))
    return type(one) is type(other)


# --------------------------------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------------------------------


def _target_key(data: Any) -> Any:
    """Where a batch keeps its targets: the last item of a tuple or list, or a key named like a target; else None."""
    if isinstance(data, Mapping):
        return next((key for key in TARGET_KEYS if isinstance(data.get(key), Tensor)), None)
    if isinstance(data, (list, tuple)) and len(data) >= 2 and isinstance(data[-1], Tensor):
        return len(data) - 1
    return None


def find_targets(data: Any) -> Tensor | None:
    """The targets ``(B, …)`` of a batch where its structure tells them, else ``None``."""
    key = _target_key(data)
    return None if key is None else data[key]


def class_targets(data: Any) -> Tensor | None:
    """The class of each example, ``(B,)`` integers ≥ 0, where the batch has such targets; else ``None``.

    Integers of 10 000 and more are taken for ids, counts or times, not for classes.
    """
    found = find_targets(data)
    if found is None or found.dtype.is_floating_point or found.dtype in (torch.bool, torch.complex64):
        return None
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or not found.numel() or not 0 <= int(found.min()) <= int(found.max()) < _MOST_CLASSES:
        return None
    return found.long()


def example_classes(examples: Examples) -> Tensor | None:
    """The class of each example, ``(n,)`` on the CPU, in order; ``None`` where the targets are no classes."""
    found = []
    for batch in examples.mine():
        classes = class_targets(batch.data)
        found.append(classes if classes is None else classes.cpu())
        if classes is None:
            break
    parts = examples.ranks.gather(found)
    if any(classes is None for part in parts for classes in part):
        return None
    return torch.cat([classes for part in parts for classes in part])  # type: ignore[misc]


def strata(examples: Examples) -> Tensor:
    """The class of each example, ``(n,)``; one for all where the targets are no classes."""
    classes = example_classes(examples)
    return torch.zeros(len(examples), dtype=torch.long) if classes is None else classes


def replace_targets(data: Any, targets: Tensor | int) -> Any:
    """The batch with other targets.

    Args:
        data: A batch whose targets are its last item or under a key such as ``"label"`` or ``"target"``.
        targets: New targets in the shape of the old ones, or one class for all examples.

    Raises:
        BatchError: If the batch's targets cannot be found, or the new ones have another shape.
    """
    key = _target_key(data)
    if key is None:
        raise BatchError(
            f"Cannot tell where this batch keeps its targets: {describe(data)}. Relabelling needs (inputs, …, targets)"
            f" or a mapping with one of the keys {', '.join(TARGET_KEYS)}."
        )
    old = data[key]
    if isinstance(targets, bool) or not isinstance(targets, (Tensor, int, float)):
        raise BatchError(
            "`relabel` must be a tensor or list of new targets, one class for all, or a function from a batch to its"
            f" new targets, got {targets!r}."
        )
    given = torch.as_tensor(targets)
    if given.ndim and given.shape != old.shape:
        raise BatchError(
            f"`relabel` has shape {list(given.shape)}, but the targets of the batch have {list(old.shape)}. Give one"
            " new target for each example, in the order of the batch."
        )
    if not torch.can_cast(given.dtype, old.dtype):
        raise BatchError(
            f"`relabel` has the dtype of {describe(given)} (got {targets!r}), but the targets of the batch are"
            f" {describe(old)}: they would be rounded."
        )
    new = given.to(old.device, old.dtype).expand_as(old).clone()
    if isinstance(data, Mapping):
        changed = {**data, key: new}
        return changed if type(data) is dict else type(data)(changed)  # type: ignore[call-arg]
    items = [*data[:-1], new]
    return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)


# --------------------------------------------------------------------------------------------------------------------
# Examples in a stable order
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Examples that can be read again and again, always in the same order and the same batches.

    Where several processes share out the work, all of them know the same examples and each can read all of them. A pass
    by :meth:`mine` or :meth:`dealt` goes over the part of this process, and what it finds has to be put together with
    what the others find; one by :meth:`batches` goes over all of them.

    Attributes:
        dataset: Map-style; its items are collated.
        ids: Dataset indices ``(n,)`` of these examples, in reading order.
        batch_size: Examples in each batch but the last.
        collate: Joins a list of items to a batch.
        prepare: Brings a batch to where and how the model takes it.
        loader_options: Options of the user's loader that are kept: workers and how they start.
        seed: Set on the global generators before each pass, so that random augmentation repeats itself.
        cached: The prepared batches if they are held in memory.
        ranks: The processes.
        held_part: If ``cached`` are only the batches of this process's part: at which positions that starts and stops.
    """

    dataset: Any
    ids: Tensor
    batch_size: int
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[Any], Any]
    loader_options: Mapping[str, Any]
    seed: int = 0
    cached: tuple[Batch, ...] | None = None
    ranks: Ranks = ALONE
    held_part: tuple[int, int] | None = None

    @classmethod
    def from_loader(
        cls,
        loader: Any,
        prepare: Callable[[Any], Any],
        *,
        batch_size: int,
        most: int | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> Examples:
        """The examples that a loader draws from, in dataset order. The loader itself is never iterated.

        Args:
            loader: A ``DataLoader`` over a map-style dataset.
            prepare: See the class.
            batch_size: See the class.
            most: Keep only the first so many.
            seed: See the class.
            ranks: See the class.

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
        return cls(dataset, ids, batch_size, loader.collate_fn, prepare, options, seed, ranks=ranks)

    @classmethod
    def from_batch(cls, data: Any, prepare: Callable[[Any], Any], *, batch_size: int, ranks: Ranks = ALONE) -> Examples:
        """The examples of one batch in hand, the same on all processes; their ids are their positions in it."""
        prepared = prepare(data)
        return replace(_in_memory(prepared, batch_size), ranks=ranks)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self) -> Iterator[Batch]:
        """The examples as prepared batches, in order."""
        if self.cached is not None and self.held_part is None:
            yield from self.cached
        else:
            yield from self._read(self.ids.split(self.batch_size))

    @property
    def part(self) -> tuple[int, int]:
        """At which positions the part of this process starts and stops."""
        return self.held_part or self.ranks.part(len(self))

    def mine(self) -> Iterator[Batch]:
        """This process's part of the examples, in order, as batches of its own; all parts cover each example once."""
        if self.ranks.size == 1:
            yield from self.batches()
        elif self.cached is None:
            start, stop = self.part
            yield from self._read(self.ids[start:stop].split(self.batch_size) if start < stop else ())
        else:
            for batch, start, stop in self._pieces():
                whole = stop - start == batch.size
                data = batch.data if whole else slice_batch(batch.data, start, stop)
                yield Batch(data, batch.ids[start:stop], stop - start)

    @property
    def n_mine(self) -> int:
        """How many batches :meth:`mine` gives."""
        if self.cached is not None:
            return len(list(self._pieces()))
        start, stop = self.part
        return -(-(stop - start) // self.batch_size)

    def _pieces(self) -> Iterator[tuple[Batch, int, int]]:
        """Batches in memory with examples of this process, and from where to where these are."""
        start, stop = self.part
        position = start if self.held_part else 0
        for batch in self.cached or ():
            low, high = max(start - position, 0), min(stop - position, batch.size)
            if low < high:
                yield batch, low, high
            position += batch.size

    def dealt(self) -> Iterator[Batch]:
        """This process's part of :meth:`batches`, as they are: for what depends on which examples are in a batch."""
        if self.ranks.size == 1:
            yield from self.batches()
        elif self.cached is not None and self.held_part is None:
            yield from self.cached[self.ranks.rank :: self.ranks.size]
        else:
            yield from self._read(self.ids.split(self.batch_size)[self.ranks.rank :: self.ranks.size])

    def gathered(self, values: list[Tensor]) -> Tensor:
        """What all processes have found for the examples, ``(n, …)``, in their order.

        Args:
            values: For each batch of :meth:`mine` a value for each of its examples, ``(B, …)``.
        """
        if self.ranks.size == 1:
            return torch.cat(values)
        parts = self.ranks.gather([value.detach().cpu() for value in values])
        return torch.cat([value for part in parts for value in part])

    def agreed(self, what: str) -> Examples:
        """These, once it is sure that all processes have the same: by index, and by content where it stays the same.

        Args:
            what: What they are, for the message.

        Raises:
            ConfigurationError: If they have not.
        """
        if self.ranks.size > 1:
            own = replace(self, ranks=ALONE, held_part=None)
            some = own
            if self.dataset is not None:
                some = own.at(torch.linspace(0, len(self) - 1, min(len(self), _COMPARED)).long().unique())
            marks = fingerprints(some)
            if any(self.ranks.gather(fingerprints(some) != marks)):  # it is random
                marks = []
            self.ranks.agree(
                [self.ids.tolist(), marks],
                what,
                "Each process reads the whole of the data and does its part: give all of them the same batch, the same"
                " indices, or a loader over the same dataset, not the part that a process trains on.",
            )
        return self

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

    def at(self, positions: Tensor) -> Examples:
        """The examples at the given positions ``(m,)`` (not dataset indices), in the order given; read anew.

        Examples that are only held in memory are given in the order they are held in.
        """
        if self.dataset is not None:
            return replace(self, ids=self.ids[positions], cached=None, held_part=None)
        return self._in_memory(positions)

    def _in_memory(self, positions: Tensor) -> Examples:
        wanted = torch.zeros(len(self), dtype=torch.bool)
        wanted[positions] = True
        start = 0 if self.held_part is None else self.held_part[0]
        part = None
        if self.held_part is not None:
            part = int(wanted[: self.held_part[0]].sum()), int(wanted[: self.held_part[1]].sum())
        pieces = []
        for batch in self.batches() if self.held_part is None else self.cached or ():
            here = wanted[start : start + batch.size].nonzero().squeeze(1)
            start += batch.size
            if len(here):
                pieces.append(Batch(take(batch.data, here), batch.ids[here], len(here)))
        cached = tuple(_joined(pieces, self.batch_size))
        return replace(self, ids=self.ids[wanted], cached=cached, held_part=part)

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
        return self.at(order[torch.searchsorted(self.ids[order], wanted)])

    def shares(self, other: Examples) -> bool:
        """Whether some are among others by dataset index: over the same dataset, or a ``Subset`` of it."""
        (dataset, ids), (other_dataset, other_ids) = _root(self), _root(other)
        return dataset is not None and dataset is other_dataset and bool(torch.isin(ids, other_ids).any())

    def where(self, predicate: Callable[[Any], Any]) -> Examples:
        """Those that a function of a prepared batch is true for.

        Args:
            predicate: From a batch of B examples to B truth values.

        Raises:
            BatchError: If it fails, or returns anything else.
            TrainingDataError: If it is true for none.
        """
        found = []
        for batch in self.mine():
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
        positions = self.gathered(found).nonzero().squeeze(1)
        if not len(positions):
            raise TrainingDataError(
                f"The function that says which examples are meant is true for none of the {len(self)} training"
                " examples."
            )
        return self.at(positions)

    def sample(self, count: int | None, seed: int) -> Examples:
        """``count`` of the examples, drawn without replacement and kept in order; all for ``None`` or if fewer."""
        if count is None or count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self._some(drawn.sort().values)

    def dealt_out(self, count: int) -> list[Examples]:
        """Groups of the examples, to which they are given in turn: so many, or one for each if these are fewer."""
        return [self._some(torch.arange(start, len(self), count)) for start in range(min(count, len(self)))]

    def _some(self, positions: Tensor) -> Examples:
        """The examples at sorted positions ``(m,)``, from memory where they are held there."""
        return self.at(positions) if self.cached is None else self._in_memory(positions)

    def mapped(self, function: Callable[[Any], Any]) -> Examples:
        """The same examples with what a function makes of each prepared batch in its place.

        Of batches held in memory it is made once, now, and of others whenever they are read.
        """
        made = None
        if self.cached is not None:
            made = tuple(batch._replace(data=function(batch.data)) for batch in self.cached)
        return replace(self, prepare=lambda data: function(self.prepare(data)), cached=made)

    def held(self, most: float = math.inf) -> Examples:
        """The same examples with their prepared batches held in memory, if they take no more than ``most`` bytes.

        Each process holds its own part.
        """
        if self.cached is not None:
            return self
        pieces, size = [], 0
        for batch in self.mine():
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch.data))
            if size > most:
                break
            pieces.append(batch)
        if any(self.ranks.gather(size > most)):  # all hold their parts, or none
            return self
        return replace(self, cached=tuple(pieces), held_part=None if self.ranks.size == 1 else self.part)

    def warn_if_random(self) -> bool:
        """Warns if an item of the dataset is not the same twice, as under random augmentation, and says whether."""
        if self.cached is not None:
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


def _in_memory(prepared: Any, size_of_batches: int) -> Examples:
    """Examples of a batch that is in memory and prepared."""
    size = batch_size(prepared)
    ids = torch.arange(size)
    pieces = []
    for start in range(0, size, size_of_batches):
        stop = min(start + size_of_batches, size)
        data = prepared if stop - start == size else slice_batch(prepared, start, stop)
        pieces.append(Batch(data, ids[start:stop], stop - start))
    return Examples(None, ids, size_of_batches, list, lambda batch: batch, {}, cached=tuple(pieces))


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
        return [part.shape[1:] for part in tensors(batch.data)], len(_sequences(batch.data, batch.size))

    return form(one) == form(other)


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(tensors(batch.data) for batch in batches), strict=True)
    texts = zip(*(_sequences(batch.data, batch.size) for batch in batches), strict=True)

    def joined(items: Any) -> Any:
        return type(items)(item for part in next(texts) for item in part)

    data = map_tensors(
        batches[0].data,
        lambda tensor: torch.cat(next(columns)) if tensor.ndim else (next(columns), tensor)[1],
        joined,
        batches[0].size,
    )
    return Batch(data, torch.cat([batch.ids for batch in batches]), sum(batch.size for batch in batches))


def relabelled(examples: Examples, targets: Tensor | int | Callable[[Any], Tensor]) -> Examples:
    """The same examples, held in memory, with other targets.

    Args:
        examples: ``n`` examples.
        targets: ``(n, …)`` in the order of ``examples``, a tensor, an array or a list; or one class for all; or a
            function from a batch to its new targets.
    """
    targets = _numbers(targets)
    if isinstance(targets, Tensor) and targets.ndim and len(targets) != len(examples):
        raise BatchError(
            f"`relabel` has {len(targets)} targets for {len(examples)} examples. Give one for each, in the order of the"
            " batch or of the indices, or of the dataset for a loader or a function."
        )
    changed, start = [], 0
    for batch in examples.batches():
        if isinstance(targets, Tensor):
            new: Tensor | int = targets[start : start + batch.size] if targets.ndim else targets
        else:
            new = _numbers(targets(batch.data)) if callable(targets) else targets
        changed.append(batch._replace(data=replace_targets(batch.data, new)))
        start += batch.size
    return replace(examples, dataset=None, cached=tuple(changed), held_part=None)  # the dataset has the old targets


def _numbers(targets: Any) -> Any:
    """Lists, and arrays and numbers of NumPy, as tensors; anything else as it is."""
    if not isinstance(targets, (list, tuple, np.ndarray, np.generic)) or isinstance(targets, np.bool_):
        return targets
    try:
        return torch.as_tensor(np.array(targets))  # a copy: tensors have no negative strides
    except (TypeError, ValueError) as error:
        raise BatchError(f"`relabel` must be numbers, as many for each example, got {targets!r:.200}.") from error


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


# --------------------------------------------------------------------------------------------------------------------
# Which training examples are these?
# --------------------------------------------------------------------------------------------------------------------


def fingerprints(examples: Examples) -> list[bytes]:
    """A hash of each example: equal for examples whose tensors and texts are equal bit by bit after preparation."""
    found: list[bytes] = []
    for batch in examples.mine():
        if batch.size > 1 and any(tensor.ndim and tensor.shape[0] != batch.size for tensor in tensors(batch.data)):
            return fingerprints(replace(examples, batch_size=1, cached=None))  # what is whose shows one by one only
        texts = _sequences(batch.data, batch.size)
        parts = [tensor for tensor in tensors(batch.data) if tensor.ndim]
        rows = [raw(part, batch.size).numpy() for part in parts if part.numel()]
        heads = [f"{part.dtype}{tuple(part.shape[1:])}".encode() for part in parts]
        for position in range(batch.size):
            state = hashlib.blake2b(digest_size=16)
            for head in heads:
                state.update(head)
            for row in rows:
                state.update(row[position])
            for items in texts:
                state.update(repr(items[position]).encode())
            found.append(state.digest())
    return [mark for part in examples.ranks.gather(found) for mark in part]


def contents_digest(examples: Examples) -> str:
    """SHA-256 of the :func:`fingerprints` of all examples, whatever their order."""
    return hashlib.sha256(b"".join(sorted(fingerprints(examples)))).hexdigest()


def data_digest(examples: Examples) -> str:
    """SHA-256 of the ids of all examples in their order, and of the contents of some that are spread over them."""
    some = examples.at(torch.linspace(0, len(examples) - 1, min(len(examples), _DIGESTED)).long().unique())
    state = hashlib.sha256(examples.ids.numpy().data)
    for mark in fingerprints(some):
        state.update(mark)
    return state.hexdigest()


def locate(forget: Examples, train: Examples) -> Tensor:
    """Positions ``(r,)`` in ``train`` of the examples that are also in ``forget``.

    By dataset index where ``forget`` is over the same dataset or a ``Subset`` of it, else by content.
    """
    (dataset, ids), (train_dataset, train_ids) = _root(forget), _root(train)
    if dataset is not None and dataset is train_dataset:
        return torch.isin(train_ids, ids).nonzero().squeeze(1)
    wanted = set(fingerprints(forget))
    return torch.tensor([i for i, mark in enumerate(fingerprints(train)) if mark in wanted], dtype=torch.long)


def _root(examples: Examples) -> tuple[Any, Tensor]:
    """The dataset below all ``Subset`` views, and the examples' indices in it."""
    dataset, ids = examples.dataset, examples.ids
    while isinstance(dataset, Subset):
        ids = torch.as_tensor(dataset.indices, dtype=torch.long)[ids]
        dataset = dataset.dataset
    return dataset, ids
