"""Loaders of other kinds than one DataLoader over all examples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset

from lightning_gif import GIFCallback, GIFWarning, TrainingDataError

from ..conftest import blobs, make_trainer
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error

FIRST, SECOND = blobs(24), blobs(24, seed=3)


class Pairs(Module):
    """Trains on batches of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self.net(one[0]), one[1]) + F.cross_entropy(self.net(other[0]), other[1])


def loaders(kind: str) -> Any:
    both = DataLoader(FIRST, 8), DataLoader(SECOND, 8)
    by_name = dict(zip(("a", "b"), both, strict=True))
    return {"dict": by_name, "list": list(both), "combined": CombinedLoader(by_name, "min_size")}[kind]


@pytest.mark.parametrize("kind", ["dict", "list", "combined"])
def test_several_loaders_are_refused_with_a_dataset_that_works(kind: str) -> None:
    module, trainer = Pairs(), make_trainer(GIFCallback(ratio=0.5, snapshots=0))
    trainer.fit(module, loaders(kind))
    stacked = StackDataset(FIRST, SECOND) if kind == "list" else StackDataset(a=FIRST, b=SECOND)
    named = r"StackDataset\(dataset_0, dataset_1\)" if kind == "list" else r"StackDataset\(a=a_dataset, b=b_dataset\)"
    query = next(iter(DataLoader(stacked, 1)))
    with pytest.raises(TrainingDataError, match=named):
        trainer.influence(query)
    scores = trainer.influence(query, dataloader=DataLoader(stacked, 8), **CONVERGED).scores[0]
    examples = [
        (torch.stack([x, u]).double(), torch.stack([y, v]))
        for x, y, u, v in zip(*FIRST.tensors, *SECOND.tensors, strict=True)
    ]
    exact = dense_scores(
        module.net,
        lambda net, x: net(x),
        lambda z, y: cross_entropy(z[:3], y[0]) + cross_entropy(z[3:], y[1]),
        examples,
        [0],
    )
    assert error(scores, exact) < 1e-5


class Plain(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("limit", [{"overfit_batches": 2}, {"limit_train_batches": 2}, {"limit_train_batches": 0.7}])
def test_the_first_batches_of_a_limited_training_are_the_training_examples(limit: dict[str, Any]) -> None:
    trainer = make_trainer(GIFCallback(ratio=0.5), **limit)
    trainer.fit(Plain(), DataLoader(FIRST, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        report = trainer.influence([tensor[:2] for tensor in FIRST.tensors], unconverged="ignore")
    assert report.indices.tolist() == list(range(16))


def test_limited_batches_that_are_shuffled_warn_unless_a_loader_is_given() -> None:
    trainer = make_trainer(GIFCallback(ratio=0.5), limit_train_batches=2)
    trainer.fit(Plain(), DataLoader(FIRST, 8, shuffle=True))
    query = [tensor[:2] for tensor in FIRST.tensors]
    with pytest.warns(GIFWarning, match="Pass `dataloader=`"):
        assert trainer.influence(query, unconverged="ignore").n_train == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        assert trainer.influence(query, dataloader=DataLoader(FIRST, 8), unconverged="ignore").n_train == 24
