"""Training with the callback is bit for bit the training without it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gif import GIFCallback

from ..conftest import Classifier, batch_of, blobs, loader, make_trainer, weights
from ..doubles import Busy, Do, TwoOptimizers, differences, quick, rng, statistics_of


class Conv(Classifier):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Unflatten(1, (1, 6)),
                nn.Conv1d(1, 4, 3),
                nn.BatchNorm1d(4),
                nn.ReLU(inplace=True),
                nn.Dropout(0.2),
                nn.Flatten(),
                nn.Linear(16, 3),
            )
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("make", [Busy, Conv])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"val_check_interval": 2, "num_sanity_val_steps": 1},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulation", "clipping", "validation", "bf16-mixed"],
)
def test_training_is_bit_identical_with_the_callback(make: Any, options: dict[str, Any]) -> None:
    def run(callback: GIFCallback | None) -> tuple[Any, ...]:
        torch.manual_seed(1)
        module = make()
        trainer = make_trainer(callback, **options)
        trainer.fit(module, loader(blobs()), loader(blobs(16, seed=1), shuffle=False))
        return weights(module), trainer.optimizers[0].state_dict(), rng(), trainer.callback_metrics.get("loss")

    assert differences(run(None), run(quick())) == []


def test_training_with_several_optimizers_is_bit_identical_with_the_callback() -> None:
    def run(callback: GIFCallback | None) -> Any:
        torch.manual_seed(1)
        module = TwoOptimizers()
        make_trainer(callback).fit(module, loader(blobs()))
        return weights(module), rng()

    assert differences(run(None), run(quick())) == []


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(
    ("hook", "targets"),
    [
        ("on_train_epoch_end", "cached"),
        ("on_validation_epoch_end", "batch"),
        ("on_train_batch_end", "batch"),
        ("on_after_backward", "batch"),
        ("on_before_optimizer_step", "batch"),
    ],
)
def test_calls_inside_hooks_do_not_change_the_training(hook: str, targets: str) -> None:
    batch = batch_of(blobs(), slice(4))

    def ask(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.influence(batch, targets=targets)
        trainer.unlearn(batch, dry_run=True, step="natural")

    def run(function: Any) -> tuple[Any, ...]:
        callback = quick()
        torch.manual_seed(1)
        module = Busy()
        do = Do(hook, function)
        trainer = make_trainer(callback, val_check_interval=2, num_sanity_val_steps=0)
        trainer.callbacks.append(do)
        trainer.fit(module, loader(blobs()), loader(blobs(16, seed=1)))
        assert do.called
        return (
            weights(module),
            trainer.optimizers[0].state_dict(),
            rng(),
            dict(trainer.callback_metrics),
            statistics_of(callback),
            dict(callback.targets),
        )

    assert differences(run(lambda *args: None), run(ask)) == []


def test_a_call_in_the_middle_of_an_epoch_leaves_persistent_workers_alone() -> None:
    batch = batch_of(blobs(), slice(4))
    data = loader(blobs(), batch_size=8, num_workers=1, persistent_workers=True)
    trainer = make_trainer(quick(), max_epochs=2, num_sanity_val_steps=0, val_check_interval=3)
    trainer.callbacks.append(Do("on_validation_end", lambda t, m: t.influence(batch, targets="batch")))
    batches = Do("on_train_batch_end", lambda t, m: None)
    trainer.callbacks.append(batches)
    trainer.fit(Classifier(), data, loader(blobs(16, seed=1)))
    assert batches.called == 12


def test_an_exception_in_training_leaves_no_hooks_behind() -> None:
    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    module = Classifier()
    trainer = make_trainer(quick())
    trainer.callbacks.append(Do("on_train_batch_end", fail))
    with pytest.raises(KeyError, match="on purpose"):
        trainer.fit(module, loader(blobs()))
    assert not any(submodule._forward_hooks for submodule in module.modules())


def test_the_hooks_are_there_in_training_and_gone_after() -> None:
    seen: list[int] = []
    trainer = make_trainer(quick())
    trainer.callbacks.append(
        Do("on_train_batch_end", lambda t, m: seen.append(sum(len(s._forward_hooks) for s in m.modules())))
    )
    module = Classifier()
    trainer.fit(module, loader(blobs()))
    assert set(seen) == {2}
    assert not any(submodule._forward_hooks for submodule in module.modules())
