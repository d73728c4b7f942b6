"""Losses that are given to the callback, for modules whose code cannot be changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning, ObjectiveError
from lightning_gif._compat import LightningCLI

from ..conftest import make_trainer
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error

N = 24
X, Y = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
DATA = TensorDataset(X, Y)


class ByHand(Module):
    """A module that optimises manually, so that its step gives no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        optimizer.step()


class WithLosses(Module):
    """A module with losses of its own, of another size than those of its step."""

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def influence_loss(self, batch: Any) -> Tensor:
        return 2 * F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


def losses(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module.net(x), y, reduction="none")


@pytest.mark.parametrize("module", [ByHand, WithLosses])
def test_the_scores_are_those_of_the_given_losses(module: type[Module]) -> None:
    one = module()
    trainer = make_trainer(GIFCallback(influence_loss=losses, snapshots=0), max_epochs=3)
    trainer.fit(one, DataLoader(DATA, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        report = trainer.influence([X[:4], Y[:4]], **CONVERGED)
    exact = dense_scores(one, lambda m, x: m.net(x[None].double()), cross_entropy, list(DATA), range(4))
    assert error(report.scores[0], exact) < 1e-5
    assert report.settings["losses"] == "influence_loss"


def test_an_edit_with_given_losses_can_be_undone() -> None:
    one = ByHand()
    trainer = make_trainer(GIFCallback(influence_loss=losses, ratio=0.5, snapshots=0), max_epochs=3)
    trainer.fit(one, DataLoader(DATA, 8))
    before = [p.detach().clone() for p in one.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        report = trainer.unlearn([0, 3, 6])
    assert report.forget.after > report.forget.before
    report.undo()
    assert all(torch.equal(p, old) for p, old in zip(one.parameters(), before, strict=True))


def test_the_module_stays_without_the_given_losses() -> None:
    one = ByHand()
    trainer = make_trainer(GIFCallback(influence_loss=losses), max_epochs=1)
    trainer.fit(one, DataLoader(DATA, 8))
    trainer.influence([X[:4], Y[:4]])
    assert not hasattr(one, "influence_loss")


def test_an_error_of_manual_optimization_names_the_argument() -> None:
    trainer = make_trainer(GIFCallback(), max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"GIFCallback\(influence_loss="):
        trainer.fit(ByHand(), DataLoader(DATA, 8))


def test_a_given_loss_of_the_whole_batch_is_an_error() -> None:
    trainer = make_trainer(GIFCallback(influence_loss=lambda module, batch: losses(module, batch).mean()), max_epochs=1)
    trainer.fit(ByHand(), DataLoader(DATA, 8))
    with pytest.raises(ObjectiveError, match=r"`influence_loss` must return one value for each example.*'none'"):
        trainer.influence([X[:4], Y[:4]])


@pytest.mark.parametrize("given", ["a name", lambda batch: batch, 3])
def test_what_cannot_be_called_with_a_module_and_a_batch_is_an_error(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be a function \(module, batch\) -> \(B,\)"):
        GIFCallback(influence_loss=given)


def test_a_configuration_file_can_name_the_function() -> None:
    arguments = [
        "--trainer.callbacks=lightning_gif.GIFCallback",
        "--trainer.callbacks.influence_loss=tests.field.test_given_losses.losses",
        "--trainer.logger=false",
    ]
    cli = LightningCLI(ByHand, run=False, args=arguments, save_config_callback=None)
    (callback,) = [one for one in cli.trainer.callbacks if isinstance(one, GIFCallback)]
    assert callback.influence_loss is losses
