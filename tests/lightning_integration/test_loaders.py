"""Loaders and samplers: scores belong to the examples of the dataset, in whatever order training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset, random_split

from lightning_gif import TrainingDataError, attach
from lightning_gif.distributed import ProcessGroup

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..doubles import quick


def test_the_train_loader_is_kept_when_test_makes_the_trainer_forget_it() -> None:
    trainer, module, data = fitted(callback=quick())
    expected = trainer.influence(batch_of(data, slice(4))).scores
    trainer.test(module, loader(blobs(16, seed=1), shuffle=False), verbose=False)
    assert trainer.train_dataloader is None
    assert torch.equal(trainer.influence(batch_of(data, slice(4))).scores, expected)


def test_shuffling_does_not_move_scores_to_other_indices() -> None:
    data = blobs()
    trainer, _, _ = fitted(dataset=data, callback=quick())
    batch = batch_of(data, slice(4))
    expected = trainer.influence(batch, dataloader=DataLoader(data, 48, shuffle=False))
    shuffled = trainer.influence(batch)
    assert torch.equal(shuffled.indices, torch.arange(48))
    assert torch.allclose(shuffled.scores, expected.scores)

    order = torch.randperm(48, generator=torch.Generator().manual_seed(9))
    permuted = trainer.influence(batch, dataloader=loader(TensorDataset(*batch_of(data, order))))
    assert torch.allclose(permuted.scores, expected.scores[:, order], rtol=1e-3, atol=1e-6)


def test_a_subset_sampler_gives_the_indices_of_the_dataset() -> None:
    data = blobs()
    chosen = [40, 3, 17, 30, 5, 21]
    trainer = make_trainer(quick())
    trainer.fit(Classifier(), DataLoader(data, 3, sampler=SubsetRandomSampler(chosen)))
    report = trainer.influence(batch_of(data, slice(4)))
    assert report.indices.tolist() == sorted(chosen)
    subset = trainer.influence(batch_of(data, slice(4)), dataloader=loader(Subset(data, sorted(chosen))))
    assert torch.allclose(report.scores, subset.scores)


def test_an_iterable_dataset_trains_but_is_refused_for_influence() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(blobs())

    trainer = make_trainer(quick())
    trainer.fit(Classifier(), DataLoader(Stream(), 16))
    batch = batch_of(blobs(), slice(4))
    with pytest.raises(TrainingDataError, match=r"Stream is an IterableDataset.*dataloader="):
        trainer.influence(batch)
    assert trainer.influence(batch, dataloader=loader(blobs())).scores.shape == (1, 48)


class Split(pl.LightningDataModule):
    """Splits its data anew at each setup."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def prepare_data(self) -> None:
        self.stages.append("prepared")

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.train, self.test = random_split(blobs(60), [48, 12])

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.train)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(self.test, shuffle=False)


def test_a_datamodule_is_set_up_once_for_each_stage() -> None:
    trainer, data = make_trainer(), Split()
    callback = attach(trainer, Classifier(), datamodule=data, callback=quick())
    indices = trainer.influence(batch_of(blobs(), slice(4))).n_train
    processes = ProcessGroup.of(trainer)
    train = callback.loaders.find(trainer, "train_dataloader", processes)
    assert len(train.dataset) == indices == 48
    assert train.dataset is data.train
    assert data.stages == ["prepared", "fit"]
    assert callback.loaders.find(trainer, "val_dataloader", processes) is None
    assert len(callback.loaders.find(trainer, "test_dataloader", processes).dataset) == 12
    assert data.stages == ["prepared", "fit", "prepared", "test"]
    attach(trainer, Classifier(), datamodule=Split(), callback=callback)
    callback.loaders.find(trainer, "train_dataloader", processes)
    assert trainer.datamodule.stages == ["prepared", "fit"]
    attach(trainer, Classifier(), datamodule=Split(), callback=callback)
    callback.loaders.find(trainer, "test_dataloader", processes)
    assert trainer.datamodule.stages == ["prepared", "fit", "prepared", "test"]  # so that a random split is that of fit


def test_the_data_are_those_of_the_datamodule_or_else_of_the_module() -> None:
    class WithData(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(blobs(30))

    class Nothing(pl.LightningDataModule):
        pass

    data = pl.LightningDataModule.from_datasets(blobs(42), batch_size=8)
    for datamodule, size in ((data, 42), (Nothing(), 30), (None, 30)):
        trainer = make_trainer()
        attach(trainer, WithData(), datamodule=datamodule, callback=quick())
        assert trainer.influence(batch_of(blobs(), slice(4))).n_train == size
    trainer = make_trainer()
    attach(trainer, Classifier(), datamodule=Nothing(), callback=quick())
    with pytest.raises(TrainingDataError, match="There is no training data"):
        trainer.influence(batch_of(blobs(), slice(4)))


def test_batches_are_prepared_as_the_loop_does() -> None:
    class Preparing(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    trainer, module, data = fitted(Preparing(), callback=quick())
    x, y = batch_of(data, slice(4))
    with torch.no_grad():
        expected = F.cross_entropy(module((x + 1) * 2), y)
    report = trainer.unlearn((x, y), step=0.0, dry_run=True)
    assert report.forget.before == pytest.approx(float(expected), rel=1e-5)
