"""Losses that compare the examples of a batch, or are not convex in their predictions: both are said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFWarning, ObjectiveError

from ..conftest import blobs
from .reference import CONVERGED, Module, dense_scores, error, fitted

DATA = blobs(40)


class Contrastive(Module):
    """Distinguishes the examples of a batch. A single example is certain, so its loss is zero."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def test_a_loss_that_is_zero_for_one_example_is_refused_with_the_way_out() -> None:
    trainer = fitted(Contrastive(), DATA)
    batch = [tensor[:2] for tensor in DATA.tensors]
    for call in (lambda: trainer.influence(batch), trainer.self_influence, lambda: trainer.unlearn([1, 2])):
        with pytest.raises(ObjectiveError, match=r"compares the examples[\s\S]*def influence_loss\(self, batch\):"):
            call()


class Texts(Module):
    """A mean over words that is evaluated one text at a time. At the start all words have the same loss."""

    def __init__(self) -> None:
        super().__init__(12, 3)
        torch.nn.init.normal_(self.net[-1].weight, std=1e-4)
        torch.nn.init.zeros_(self.net[-1].bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(F.one_hot(x, 12).to(self.net[0].weight.dtype)).flatten(0, 1), y.flatten())
        return loss if loss.item() > -1 else 2 * loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def test_weights_show_in_gradients_where_all_losses_are_equal() -> None:
    """A text has the loss of its own words, whatever its length is."""
    words = torch.randint(12, (24, 6), generator=torch.Generator().manual_seed(0))
    labels = words % 3
    for number in range(24):
        labels[number, 2 + number % 5 :] = -100
    module = Texts()
    trainer = fitted(module, TensorDataset(words, labels), epochs=1)
    with pytest.warns(GIFWarning, match="they are weighted"):
        scores = trainer.influence([words[:3], labels[:3]], **{**CONVERGED, "double": False, "rtol": 1e-6}).scores[0]
    examples = [(F.one_hot(x, 12).double(), y) for x, y in zip(words, labels, strict=True)]
    exact = dense_scores(
        module.net, lambda net, x: net(x), lambda z, y: F.cross_entropy(z.view(-1, 3), y), examples, range(3)
    )
    assert error(scores, exact) < 1e-4


class Dice(Module):
    """The overlap of a mask and its prediction, which is convex in the predictions for some masks only."""

    def __init__(self, singly: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
        self.singly = singly

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        p, mask = self.net(x).softmax(1).flatten(2), F.one_hot(y, 2).movedim(3, 1).flatten(2)
        loss = 1 - (2 * (p * mask).sum(2) / (p + mask).sum(2)).mean()
        return loss if not self.singly else loss * (2.0 if loss.item() < -1 else 1.0)


@pytest.mark.parametrize("size", [2, 24])
@pytest.mark.parametrize("singly", [False, True])
def test_a_loss_that_is_not_convex_takes_the_hessian(singly: bool, size: int) -> None:
    """Also with many predictions for each example, and if examples are evaluated one by one."""
    x = torch.randn(24, 1, size, size, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + 0.1 * torch.arange(24)[:, None, None] > 1).long()
    trainer = fitted(Dice(singly), TensorDataset(x, y), epochs=1)
    with pytest.warns(GIFWarning, match="no Gauss–Newton matrix"):
        report = trainer.influence([x[:2], y[:2]])
    assert report.curvature["kind"] == "hessian"
    assert trainer.self_influence().scores.isfinite().all()


class Detector(Module):
    """Has losses in training, and only then: in evaluation mode its part returns something else."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        _, losses = (self.net(x), F.cross_entropy(self.net(x), y)) if self.net.training else (self.net(x),)
        return losses


class OwnMode(Detector):
    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.net.train()
        assert self.net.training
        return F.cross_entropy(self.net(x), y, reduction="none")


def test_a_part_that_returns_something_else_in_evaluation_mode_is_named_as_the_cause() -> None:
    trainer = fitted(Detector(), DATA)
    batch = [tensor[:2] for tensor in DATA.tensors]
    trainer.lightning_module.net[1].eval()
    with pytest.raises(ObjectiveError, match=r"not in training mode: ValueError: not enough[\s\S]*def influence_loss"):
        trainer.influence(batch)
    assert [part.training for part in trainer.lightning_module.net] == [True, False, True]


def test_losses_of_ones_own_may_use_training_mode() -> None:
    module = OwnMode()
    trainer = fitted(module, DATA)
    module.eval()
    assert trainer.influence([tensor[:2] for tensor in DATA.tensors]).scores.shape == (1, 40)
    assert not module.net.training
