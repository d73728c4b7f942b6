"""Retraining on random subsets: how they are drawn, and how the losses of the retrained models are kept in a folder."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._compat import is_lightning_module, isolate_rng, rank_zero_info
from ..data.examples import Examples
from ..data.structure import describe
from ..errors import ConfigurationError
from ..storage.artifact import Format, read_file, write_file
from ..storage.atomic import replace_file
from ..storage.digests import Fingerprint, differences, digest
from ..storage.schema import read
from .groups import Grouping, group_numbers, values_of

if TYPE_CHECKING:
    from .._compat import LightningModule

__all__ = ["LossStore", "Retrain", "Subsets", "Training", "retrain_all"]


Retrain = Callable[[list[int], int], "LightningModule"]
"""A function ``(indices, seed)`` that trains a new model on the training examples with these dataset indices."""

_MANIFEST, _VERSION = "manifest.json", 1

_FORMAT = Format(
    "lightning-gif retraining",
    versions=(1,),
    what="a file with the losses of a retrained model",
    remedy="Delete it: this retraining is repeated.",
)


@dataclass(frozen=True)
class Training:
    """One retraining: on one subset, with one seed.

    Attributes:
        subset: The number of the subset.
        repetition: The number of the retraining on this subset.
        seed: The seed.
    """

    subset: int
    repetition: int
    seed: int

    def __str__(self) -> str:
        return f"subset {self.subset} and seed {self.seed}"


@dataclass(frozen=True)
class Subsets:
    """Random subsets of the training examples, on which models are retrained.

    Each subset and each seed is drawn independently of the number of subsets and seeds. So a call for more of them
    continues a call for fewer.

    Attributes:
        ids: The dataset indices of all ``n`` training examples.
        members: The number of the group of each example, ``(n,)``.
        removed: Which examples each subset leaves out, ``(n_subsets, n)`` bool.
        seed: The seed of the draws.
    """

    ids: Tensor
    members: Tensor
    removed: Tensor
    seed: int

    @classmethod
    def draw(cls, train: Examples, count: int, share: float, seed: int, groups: Grouping | None = None) -> Subsets:
        """Draws subsets.

        Args:
            train: The training examples.
            count: The number of subsets.
            share: The share of the examples, or of the groups, that each subset keeps.
            seed: The seed.
            groups: How examples are grouped, see :data:`~lightning_gif.attribution.groups.Grouping`. Each group is kept
                or left out as a whole. By default each example is a group of its own.

        Raises:
            ConfigurationError: If there are fewer than two groups, or not one value for each example.
        """
        members = torch.arange(len(train)) if groups is None else _groups_of(train, groups)
        n_groups = int(members.max()) + 1
        if n_groups < 2:
            raise ConfigurationError(
                f"A subset leaves out some of the {'training examples' if groups is None else '`groups`'}, but there is"
                " only one. Give data or groups with at least two."
            )
        n_removed = min(max(round((1 - share) * n_groups), 1), n_groups - 1)
        removed = torch.zeros(count, len(train), dtype=torch.bool)
        for number, row in enumerate(removed):
            generator = torch.Generator().manual_seed(_mixed(seed, number))
            row[:] = torch.isin(members, torch.randperm(n_groups, generator=generator)[:n_removed])
        return cls(train.ids, members, removed, seed)

    def retained(self, subset: int) -> list[int]:
        """The dataset indices of a subset, in the order of the dataset."""
        return self.ids[~self.removed[subset]].tolist()

    def trainings(self, n_seeds: int) -> Iterator[Training]:
        """Yields all retrainings: first each subset with one seed, then with a second one, and so on."""
        for repetition in range(n_seeds):
            for subset in range(len(self.removed)):
                yield Training(subset, repetition, _mixed(self.seed, subset, repetition))


def _groups_of(train: Examples, groups: Grouping) -> Tensor:
    """The number of the group of each example, ``(n,)``."""
    dataset: Any = train.dataset
    if callable(groups):
        with isolate_rng():
            return group_numbers([groups(dataset[index]) for index in train.ids.tolist()])[0]
    return group_numbers(values_of(groups, train.ids, len(dataset) if hasattr(dataset, "__len__") else None))[0]


def _mixed(*numbers: int) -> int:
    """A seed below 2³², which every library accepts, from several numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


@dataclass(frozen=True)
class LossStore:
    """The losses of the retrained models in a folder, one file for each, written atomically.

    Attributes:
        folder: The folder.
        n_queries: The number of losses in each file.
    """

    folder: Path
    n_queries: int

    @classmethod
    def open(cls, folder: Path, n_queries: int, fingerprint: Fingerprint) -> LossStore:
        """Opens a new store, or the one that an earlier call left in the folder.

        Args:
            folder: The folder. It is created if it does not exist.
            n_queries: The number of queries.
            fingerprint: Digests and values of everything that the losses depend on.

        Raises:
            ConfigurationError: If the folder is a file, holds other files, or losses of other weights, queries, subsets
                or data. It is left unchanged.
        """
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"Losses are written to a folder, but {str(folder)!r} is a file. Give another path as `folder`."
            )
        path = folder / _MANIFEST
        manifest = {"format": _VERSION, "n_queries": n_queries, **fingerprint}
        if not folder.exists() or all(one.name.startswith(f".{_MANIFEST}.") for one in folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(manifest, indent=1).encode())
        try:
            other = differences(read(path), manifest)
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{folder} is not empty, but does not hold the losses of an earlier call. Give another folder."
            ) from None
        if other:
            raise ConfigurationError(
                f"The losses in {folder} are from another call, which differs in: {other}. This call cannot resume"
                " from them. Give another folder, or delete this one."
            )
        return cls(folder, n_queries)

    def load_all(self, trainings: Iterable[Training]) -> dict[Training, Tensor]:
        """The losses of those retrained models that were written already."""
        stored = ((training, self.load(training)) for training in trainings)
        return {training: losses for training, losses in stored if losses is not None}

    def load(self, training: Training) -> Tensor | None:
        """The losses ``(n_queries,)`` of a retrained model; ``None`` if they were not written yet.

        Raises:
            ConfigurationError: If the file is damaged, or is of another retraining.
        """
        path = self._path(training)
        if not path.exists():
            return None

        def check(record: Any, shapes: dict[str, list[int]]) -> None:
            if record != vars(training) or shapes != {"losses": [self.n_queries]}:
                raise ValueError(f"it is of another retraining: {record}, {shapes}")

        return read_file(path, _FORMAT, check).tensors["losses"]

    def save(self, training: Training, losses: Tensor) -> None:
        """Writes the losses ``(n_queries,)`` of a retrained model."""
        write_file(self._path(training), _FORMAT, vars(training), {"losses": losses})

    def _path(self, training: Training) -> Path:
        return self.folder / f"subset-{training.subset:03}-{training.repetition:02}.safetensors"


def retrain_all(
    subsets: Subsets,
    n_seeds: int,
    retrain: Retrain,
    scored: LightningModule,
    measure: Callable[[LightningModule, Training], Tensor],
    store: LossStore | None,
) -> tuple[Tensor, int]:
    """Retrains on all subsets with all seeds. What a store has is not repeated.

    Args:
        subsets: The subsets.
        n_seeds: The number of models for each subset.
        retrain: The function that trains.
        scored: The original model, which the function must not change.
        measure: Returns the losses ``(n_queries,)`` of a retrained model.
        store: The losses of earlier models, to which those of new models are added; or ``None``.

    Returns:
        The losses ``(n_subsets, n_seeds, n_queries)``, and the number of models that were trained.
    """
    trainings = list(subsets.trainings(n_seeds))
    found = {} if store is None else store.load_all(trainings)
    missing = [training for training in trainings if training not in found]
    begin = time.perf_counter()
    for done, training in enumerate(missing):
        left = (time.perf_counter() - begin) / max(done, 1) * (len(missing) - done)
        rank_zero_info(
            f"Retraining {len(trainings) - len(missing) + done + 1} of {len(trainings)}"
            + (f", about {left:.0f} s left" if done else "")
        )
        losses = measure(_retrained(retrain, subsets.retained(training.subset), training, scored), training)
        if store is not None:
            store.save(training, losses)
        found[training] = losses
    rows = torch.stack([found[training] for training in trainings])
    return rows.view(n_seeds, len(subsets.removed), -1).transpose(0, 1).contiguous(), len(missing)


def _retrained(retrain: Retrain, indices: list[int], training: Training, scored: LightningModule) -> LightningModule:
    """The model that the user's function trains on a subset.

    The global random generators are seeded before the function runs, and restored afterwards.

    Args:
        retrain: The function.
        indices: The dataset indices of the subset.
        training: The retraining.
        scored: The original model, which the function must not change.

    Raises:
        ConfigurationError: If the function returns no new LightningModule, or changes the original model.
    """
    before = _marks(scored)
    with isolate_rng():
        random.seed(training.seed)
        np.random.seed(training.seed)  # noqa: NPY002 - users may draw from the global generator
        torch.manual_seed(training.seed)
        found = retrain(indices, training.seed)
    found = getattr(found, "_orig_mod", found)  # a compiled module
    advice = "Build a new model inside of `retrain`, train it with a new Trainer, and return it."
    if not is_lightning_module(found):
        raise ConfigurationError(
            f"`retrain` must return the LightningModule that it trained, got {describe(found)}. {advice}"
        )
    if found is scored or _marks(scored) != before:
        raise ConfigurationError(
            "`retrain` has trained the original model, whose scores are tested, instead of a new one. Load the weights"
            f" of the original model from a checkpoint. {advice}"
        )
    return found


def _marks(module: LightningModule) -> str:
    """A digest of all parameters and buffers of a module."""
    return digest({**dict(module.named_parameters()), **dict(module.named_buffers())})
