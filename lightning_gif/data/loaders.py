"""The dataset indices that a DataLoader draws, determined without iterating it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ..errors import GIFWarning, TrainingDataError

__all__ = ["check_loader", "sampled_ids"]


def check_loader(loader: Any) -> DataLoader[Any]:
    """Returns the loader if its examples have a stable index.

    Raises:
        TrainingDataError: If it is not a ``DataLoader`` over single examples.
    """
    if isinstance(loader, (Mapping, list, tuple)) or type(loader).__name__ == "CombinedLoader":
        raise TrainingDataError(
            f"Expected a torch DataLoader, got several in a {type(loader).__name__}. An example is a part of each of"
            " their batches. Pass `dataloader=` with one DataLoader whose batches have the structure that training_step"
            f" takes: DataLoader({_stacked(loader)}, batch_size), with StackDataset from torch.utils.data."
        )
    if not isinstance(loader, DataLoader):
        raise TrainingDataError(
            f"Expected a torch DataLoader, got {type(loader).__name__}. Instead of a custom loader, pass a DataLoader"
            " over the training set as `dataloader=`."
        )
    if not hasattr(type(loader.dataset), "__getitem__") and not isinstance(loader.dataset, IterableDataset):
        raise TrainingDataError(
            f"The loader's dataset is a {type(loader.dataset).__name__}, which has no `__getitem__`, so its examples"
            " cannot be read by index. Pass a DataLoader over a map-style dataset as `dataloader=`."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise TrainingDataError(
            "The loader has batch_size=None, so each item of its dataset is a batch of unknown size. Pass a DataLoader"
            " over single examples as `dataloader=`."
        )
    return loader


def sampled_ids(loader: DataLoader[Any]) -> Tensor:
    """The dataset indices that a loader draws, sorted. Its sampler is inspected, not iterated.

    Raises:
        TrainingDataError: If the dataset has no length.
    """
    sampler: Any = loader.sampler
    if isinstance(loader.batch_sampler, BatchSampler):
        sampler = loader.batch_sampler.sampler
    elif loader.batch_sampler is not None:
        sampler = loader.batch_sampler
    # In a distributed run Lightning wraps the sampler in a DistributedSamplerWrapper; this unwraps it.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(sampler.indices, dtype=torch.long).sort().values
    if isinstance(sampler, Sequence) and sampler is not loader.batch_sampler:
        return torch.as_tensor([int(index) for index in sampler], dtype=torch.long).sort().values
    if not isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        warnings.warn(
            f"The loader draws with a {type(sampler).__name__}: each example of its dataset counts once, however"
            " often it is drawn. If some examples are never drawn, pass a loader without them as `dataloader=`.",
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


def _stacked(loaders: Any) -> str:
    """The code of a dataset whose items have the structure of the batches of several loaders."""
    loaders = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    if isinstance(loaders, Mapping):
        return f"StackDataset({', '.join(f'{name}={name}_dataset' for name in loaders)})"
    return f"StackDataset({', '.join(f'dataset_{index}' for index in range(len(loaders)))})"
