"""How much of the examples a model still remembers: shares of predictions, and the membership AUROC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, GIFMixin, attach
from lightning_gif.unlearning import GOALS, ExampleRemoval, SampleSizes, Tuning
from lightning_gif.unlearning.memorization import PredictedShare, count_wrong

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer


def test_the_memorization_of_examples_is_the_membership_auroc() -> None:
    """Within each class, averaged over the forgotten examples; ties count half."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1.0], [1.0], [5.0], [0.0]])

    class Loss(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return batch[0][:, 0] + 1e-3 * self.net.weight.square().sum() * (batch[1] + 1)

    y = torch.tensor([0, 0, 1, 0, 0, 1, 0, 1])
    trainer, module, trained = make_trainer(), Loss(nn.Linear(1, 1)), TensorDataset(x[:5], y[:5])
    attach(trainer, module, train_dataloaders=loader(trained), callback=GIFCallback(ratio=1.0))
    report = trainer.unlearn(
        [0, 1, 2],
        unseen=DataLoader(TensorDataset(x[4:], y[4:]), 2),
        selector=["*"],
        step="natural",
        dry_run=True,
        tuning=Tuning(sample_sizes=SampleSizes(min_compared=1)),
    )
    # Class 0: losses 0 and 1 against 1 and 5: 1 and 3/4. Class 1: 2 against 1 and 0: 0.
    assert report.memorization[0] == pytest.approx((1 + 0.75 + 0) / 3)


def test_the_share_of_labels_not_predicted_as_corrected_is_reported() -> None:
    trainer, module, dataset = fitted(max_epochs=20)
    x, new = dataset.tensors[0][:8], (dataset.tensors[1][:8] + 1) % 3

    def wrong() -> float:
        return float((module.eval()(x).argmax(1) != new).double().mean())

    before = wrong()
    report = trainer.unlearn(batch_of(dataset, slice(0, 8)), relabel=new)
    assert report.memorization == (before, wrong())
    assert f"not predicted as the new label: {100 * before:.1f} % -> {100 * wrong():.1f} %" in str(report)


def test_a_goal_may_count_predictions_beside_a_risk_of_losses() -> None:
    """The losses of a term that is no function of the logits are not mistaken for one."""

    @dataclass(frozen=True)
    class Counted(ExampleRemoval):
        def memorization(self, task: Any) -> PredictedShare:
            return PredictedShare(task.objective, task.forget_eval, count_wrong)

    trainer, module, data = fitted()
    options: dict[str, Any] = {"step": 0.5, "dry_run": True, "unseen": loader(blobs(24, seed=7))}
    plain = trainer.unlearn(list(range(20)), **options)
    GOALS.register("counted")(Counted)
    try:
        counted = trainer.unlearn(list(range(20)), **options)
    finally:
        del GOALS._items["counted"]
    assert counted.goal == "counted"
    assert [trial.risk for trial in counted.trials] == [trial.risk for trial in plain.trials]
    x, y = batch_of(data, slice(0, 20))
    assert counted.memorization[0] == pytest.approx(float((module(x).argmax(1) != y).double().mean()))
