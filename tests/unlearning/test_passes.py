"""The number of passes of an edit over the training data: none for what is known already."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_gif import GIFCallback, attach
from lightning_gif.unlearning import Matching, Tuning

from ..conftest import Classifier, blobs, make_trainer

N, SAMPLE = 300, 24


class Counting(Dataset[Any]):
    """Labelled points that count how often each of them is read."""

    def __init__(self) -> None:
        self.points, self.reads = blobs(N), Counter[int]()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.points[index]

    @property
    def labels(self) -> Tensor:
        return self.points.tensors[1]

    def passes(self, indices: Tensor) -> int:
        """The number of times that all of these examples were read."""
        return min(self.reads[index] for index in indices.tolist())


@pytest.fixture
def counted() -> tuple[pl.Trainer, Counting]:
    """A trainer with a model that was trained elsewhere, before its first call."""
    dataset, module = Counting(), Classifier()
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    x, y = dataset.points.tensors
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    trainer = make_trainer(max_epochs=1)
    callback = GIFCallback(curvature_examples=SAMPLE, batch_size=16, unconverged="ignore")
    attach(trainer, module, train_dataloaders=DataLoader(dataset, 16), callback=callback)
    return trainer, dataset


def test_class_removal_takes_one_pass_over_the_retained_data(
    counted: tuple[pl.Trainer, Counting],
) -> None:
    trainer, dataset = counted
    report = trainer.unlearn(lambda batch: batch[1] == 1)
    assert report.goal.value == "class"
    assert dataset.passes((dataset.labels != 1).nonzero().squeeze(1)) == 1


def test_examples_given_by_index_are_removed_without_a_pass_over_the_retained_data(
    counted: tuple[pl.Trainer, Counting],
) -> None:
    trainer, dataset = counted
    few = Matching(curvature_examples=32, steps=4, retained=8)
    report = trainer.unlearn(list(range(9)), tuning=Tuning(matching=few))
    assert report.goal.value == "examples"
    assert dataset.passes(torch.arange(9, N)) == 0
    assert sum(count > 0 for index, count in dataset.reads.items() if index >= 9) < N // 2


def test_a_class_given_by_index_takes_one_pass_to_check_that_it_is_complete(
    counted: tuple[pl.Trainer, Counting],
) -> None:
    trainer, dataset = counted
    report = trainer.unlearn((dataset.labels == 1).nonzero().squeeze(1).tolist())
    assert report.goal.value == "class"
    assert dataset.passes((dataset.labels != 1).nonzero().squeeze(1)) == 1
