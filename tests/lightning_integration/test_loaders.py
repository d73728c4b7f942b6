"""Loaders and samplers: scores belong to the examples of the dataset, in whatever order training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_gif import TrainingDataError

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
