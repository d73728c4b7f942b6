"""Whether examples are the same: by dataset index, by content, and on all processes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..distributed import SINGLE_PROCESS
from ..storage.digests import raw
from .examples import Examples
from .structure import sequences, tensors

__all__ = [
    "check_same_everywhere",
    "contents_digest",
    "data_digest",
    "fingerprints",
    "innermost",
    "locate",
    "shares_examples",
]


# How many examples are hashed to identify a dataset by content. Reading all examples can take an hour.
_DIGESTED = 64

# How many examples are compared between processes.
_COMPARED = 8


def fingerprints(examples: Examples) -> list[bytes]:
    """A hash of each example. Two examples have the same hash if their prepared tensors and texts are equal."""
    hashes: list[bytes] = []
    for batch in examples.local_batches():
        if batch.size > 1 and any(tensor.ndim and tensor.shape[0] != batch.size for tensor in tensors(batch.data)):
            # A tensor without one row for each example: only reading single examples shows what belongs to each.
            return fingerprints(replace(examples, batch_size=1, in_memory=None))
        texts = sequences(batch.data, batch.size)
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
            hashes.append(state.digest())
    return [mark for part in examples.processes.gather(hashes) for mark in part]


def contents_digest(examples: Examples) -> str:
    """SHA-256 of the :func:`fingerprints` of all examples, independent of their order."""
    return hashlib.sha256(b"".join(sorted(fingerprints(examples)))).hexdigest()


def data_digest(examples: Examples) -> str:
    """SHA-256 of the dataset indices of all examples, in order, and of the contents of a few examples."""
    some = examples.subset(torch.linspace(0, len(examples) - 1, min(len(examples), _DIGESTED)).long().unique())
    state = hashlib.sha256(examples.ids.numpy().data)
    for mark in fingerprints(some):
        state.update(mark)
    return state.hexdigest()


def locate(forget: Examples, train: Examples) -> Tensor:
    """Positions ``(r,)`` in ``train`` of the examples that are also in ``forget``.

    Examples are compared by dataset index if both sets are over one dataset or ``Subset`` views of it, else by content.
    """
    (dataset, ids), (train_dataset, train_ids) = root(forget), root(train)
    if dataset is not None and dataset is train_dataset:
        return torch.isin(train_ids, ids).nonzero().squeeze(1)
    wanted = set(fingerprints(forget))
    return torch.tensor([i for i, mark in enumerate(fingerprints(train)) if mark in wanted], dtype=torch.long)


def root(examples: Examples) -> tuple[Any, Tensor]:
    """The dataset below all ``Subset`` views, and the indices ``(n,)`` of the examples in that dataset."""
    return innermost(examples.dataset, examples.ids)


def innermost(dataset: Any, indices: Tensor) -> tuple[Any, Tensor]:
    """The dataset below all nested ``Subset`` views, and indices ``(…)`` of the outermost view as indices of it."""
    while isinstance(dataset, Subset):
        indices = torch.as_tensor(dataset.indices, dtype=torch.long)[indices]
        dataset = dataset.dataset
    return dataset, indices


def shares_examples(one: Examples, other: Examples) -> bool:
    """Whether two sets are over one dataset, or ``Subset`` views of it, and have a dataset index in common."""
    (dataset, ids), (other_dataset, other_ids) = root(one), root(other)
    return dataset is not None and dataset is other_dataset and bool(torch.isin(ids, other_ids).any())


def check_same_everywhere(examples: Examples, what: str) -> Examples:
    """Checks that all processes hold the same examples.

    All dataset indices are compared, and the contents of a few examples if reading them is deterministic.

    Args:
        examples: The examples.
        what: Their name in the error message.

    Returns:
        ``examples``.

    Raises:
        ConfigurationError: If the processes hold different examples.
    """
    if examples.processes.size > 1:
        own = replace(examples, processes=SINGLE_PROCESS, in_memory_shard=None)
        some = own
        if examples.dataset is not None:
            some = own.subset(torch.linspace(0, len(examples) - 1, min(len(examples), _COMPARED)).long().unique())
        marks = fingerprints(some)
        if any(examples.processes.gather(fingerprints(some) != marks)):  # reading is random
            marks = []
        examples.processes.assert_equal(
            [examples.ids.tolist(), marks],
            what,
            "Give all processes the same batch, the same indices, or a loader over the same dataset. Do not give each"
            " process the part that it trains on.",
        )
    return examples
