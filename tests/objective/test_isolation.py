"""A call leaves the module, the trainer and the random generators as they were, also after an error."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import lightning_gif
from lightning_gif import GIFWarning

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..doubles import Busy, Do, busy_run, differences, quick, snapshot, untouched


@pytest.mark.parametrize("call", ["influence", "unlearn"])
@pytest.mark.parametrize("where", ["after fit", "in a hook"])
def test_a_call_leaves_everything_as_it_was(call: str, where: str) -> None:
    x, y = batch_of(blobs(), slice(4))
    options: dict[str, Any] = {"dry_run": True} if call == "unlearn" else {}
    done = []

    def ask(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        data = trainer.callbacks[0].loaders.train
        for targets in ("cached", "class", "batch"):
            with untouched(trainer, module, data):
                getattr(trainer, call)((x, y), targets=targets, **options)
        with untouched(trainer, module, data), pytest.raises(lightning_gif.NonFiniteError):
            getattr(trainer, call)((x * torch.nan, y), **options)
        with untouched(trainer, module, data), pytest.raises(lightning_gif.BatchError):
            getattr(trainer, call)({"x": x, "y": y}, **options)
        done.append(True)

    if where == "after fit":
        trainer, module, data = busy_run(quick())
        assert trainer.callbacks[0].loaders.train is data
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        module.train()
        module.net[4].eval()
        ask(trainer, module)
    else:
        trainer = make_trainer(quick(), max_epochs=1)
        trainer.callbacks.append(Do("on_train_epoch_end", ask))
        trainer.fit(Busy(), loader(blobs(), generator=torch.Generator().manual_seed(3)))
    assert done


def test_tensors_that_a_step_changes_in_place_are_restored() -> None:
    class Total(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.total = torch.zeros(())
            self.parts = [torch.zeros(())]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.total += loss.detach()
            self.parts[0] += 1
            return loss

    trainer, module, data = fitted(Total(), callback=quick())
    total, part = module.total, module.parts[0]
    with untouched(trainer, module, trainer.callbacks[0].loaders.train), pytest.warns(GIFWarning, match="vectorised"):
        trainer.influence(batch_of(data, slice(4)))
    assert module.total is total
    assert module.parts[0] is part


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_an_error_in_the_users_loss_restores_everything_too() -> None:
    trainer, module, data = busy_run(quick())
    original, evaluations = module.forward, itertools.count()

    def forward(x: Tensor) -> Tensor:
        if next(evaluations) > 3:
            raise ZeroDivisionError("on purpose")
        return original(x)

    module.forward = forward
    with untouched(trainer, module, data), pytest.raises(Exception, match="on purpose"):
        trainer.unlearn(batch_of(blobs(), slice(4)))


def test_unlearning_changes_the_targets_and_nothing_else() -> None:
    trainer, module, data = busy_run(quick())
    before = snapshot(trainer, module, data)
    report = trainer.unlearn(batch_of(blobs(), slice(4)), step=1.0)
    after = snapshot(trainer, module, data)
    changed = {name for name in before["weights"] if not torch.equal(before["weights"][name], after["weights"][name])}
    assert changed
    assert changed <= set(report.edit.indices)
    for name in changed:
        moved = (before["weights"][name] != after["weights"][name]).flatten().nonzero().squeeze(1)
        assert torch.isin(moved, report.edit.indices[name]).all()
    assert {place.split("/")[1] for place in differences(before, after)} == {"weights"}
    report.undo()
    assert differences(before, snapshot(trainer, module, data)) == []


def test_tensors_of_a_test_loop_can_be_queries() -> None:
    class Caching(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.cached = tuple(tensor[:4] * 1 for tensor in batch)

    trainer, module, data = fitted(Caching(), callback=quick())
    results: list[Any] = []

    def ask(trainer: pl.Trainer, module: Any) -> None:
        assert torch.is_inference_mode_enabled()
        assert module.cached[0].is_inference()
        with untouched(trainer, module, trainer.callbacks[0].loaders.train):
            results.append(trainer.influence(module.cached).scores)
            new = module.cached[1] * 0
            trainer.unlearn(module.cached, relabel=new, dry_run=True)
            trainer.unlearn(module.cached, step=1.0).undo()

    trainer.callbacks.append(Do("on_test_epoch_end", ask))
    trainer.test(module, loader(data, 48, shuffle=False), verbose=False)
    after = trainer.influence(tuple(tensor.clone() for tensor in module.cached)).scores
    assert torch.equal(results[0], after)
    assert torch.equal(trainer.influence(module.cached).scores, after)
