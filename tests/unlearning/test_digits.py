"""Class removal on real data: a trained network forgets each of the ten digits in turn."""

from __future__ import annotations

import copy
import statistics

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_gif import GIFCallback

from ..conftest import make_trainer, same_weights, weights

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from digits import DigitsModel, digits, logits


@pytest.mark.slow
def test_each_digit_can_be_forgotten_without_the_others() -> None:
    train, test = digits()
    pl.seed_everything(0)
    module = DigitsModel()
    trainer = make_trainer(GIFCallback(), max_epochs=15)
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    truth = test.tensors[1]
    original = copy.deepcopy(module)
    before_predicted = logits(original, test).argmax(1)
    untouched = weights(module)

    lost, forgotten = [], []
    for digit in range(10):
        members = (train.tensors[1] == digit).nonzero().squeeze(1).tolist()
        report = trainer.unlearn(DataLoader(Subset(train, members), 64))
        predicted = logits(module, test).argmax(1)
        others = truth != digit
        forgotten.append(float((predicted[~others] == digit).double().mean()))
        lost.append(
            float((before_predicted[others] == truth[others]).double().mean())
            - float((predicted[others] == truth[others]).double().mean())
        )
        report.undo()
        assert same_weights(untouched, weights(module))

    assert max(forgotten) <= 0.02, forgotten
    assert max(lost) <= 0.02, lost
    assert statistics.median(lost) <= 0.01, lost
    torch.testing.assert_close(logits(module, test), logits(original, test), rtol=0, atol=0)
