"""Checkpoints: the targets and statistics that they hold, and runs that are resumed from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, GIFWarning, SelectionError, TrainingDataError

from ..conftest import WEIGHTS_ONLY, Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..doubles import Do, differences, quick, statistics_of
from ..line import Blobs


def test_validate_with_a_checkpoint_restores_the_targets(tmp_path: Path) -> None:
    batch = batch_of(blobs(), slice(4))
    trainer = make_trainer(quick())
    trainer.fit(Classifier(), datamodule=Blobs())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer.influence(batch, snapshots=False).scores  # those of a default callback are not restored

    callback = quick()
    fresh = make_trainer(callback)
    fresh.validate(Classifier(), datamodule=Blobs(), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    assert dict(callback.targets).keys() == dict(trainer.callbacks[0].targets).keys()
    assert callback.targets_epoch == 1
    assert torch.equal(fresh.influence(batch).scores, expected)

    bare = make_trainer(quick())
    bare.validate(Classifier(), loader(blobs()), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    with pytest.raises(TrainingDataError, match="dataloader="):
        bare.influence(batch)
    assert torch.equal(bare.influence(batch, dataloader=loader(blobs())).scores, expected)


def test_the_checkpoint_holds_tensors_and_primitives_only(tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=quick())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["lightning_gif"]["neurons"]["outputs"].keys() == {"net.0", "net.2"}
    events = {"number": 0, "in_weights": 0, "rows": []}
    state = {"targets_epoch": 1, "history": [], "events": events}
    assert saved["callbacks"][trainer.callbacks[0].state_key] == state
    trainer.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    assert "lightning_gif" not in torch.load(tmp_path / "b.ckpt", weights_only=True)


def test_the_state_in_a_checkpoint_does_not_move_with_training() -> None:
    callback, kept = quick(), []
    trainer = make_trainer(callback, max_epochs=1)

    def keep(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state = trainer._checkpoint_connector.dump_checkpoint()["lightning_gif"]
        kept.append((state, copy.deepcopy(state)))

    trainer.callbacks.append(Do("on_train_batch_end", keep))
    trainer.fit(Classifier(), loader(blobs()))
    for state, then in kept:
        assert differences(then, state) == []


def resumed(tmp_path: Path, name: str, make: Any, **options: Any) -> tuple[GIFCallback, Any]:
    callback, module = quick(), make()
    trainer = make_trainer(callback, max_epochs=2, **options)
    trainer.fit(module, repeating(), loader(blobs(16, seed=1)), ckpt_path=tmp_path / name, **WEIGHTS_ONLY)
    return callback, module


def repeating() -> DataLoader[Any]:
    """Three equal batches: Lightning starts a loader anew when it resumes in the middle of an epoch."""
    x, y = blobs(16).tensors
    return loader(TensorDataset(x.repeat(3, 1), y.repeat(3)), shuffle=False)


@pytest.mark.parametrize(
    ("every", "name"),
    [({"every_n_train_steps": 1}, "2.ckpt"), ({"every_n_train_steps": 1}, "4.ckpt"), ({"every_n_epochs": 1}, "3.ckpt")],
    ids=["first epoch", "second epoch", "between epochs"],
)
def test_a_resumed_run_has_the_targets_and_statistics_of_an_uninterrupted_one(
    tmp_path: Path, every: Any, name: str
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **every)
    callback = quick()
    torch.manual_seed(0)
    start = Classifier()
    module = copy.deepcopy(start)
    trainer = make_trainer(callback, max_epochs=2, enable_checkpointing=True)
    trainer.callbacks[:] = [callback, saving]
    trainer.fit(module, repeating(), loader(blobs(16, seed=1)))

    again, other = resumed(tmp_path, name, Classifier)
    assert same_weights(weights(module), weights(other))
    assert differences(statistics_of(callback), statistics_of(again)) == []
    assert differences(dict(callback.targets), dict(again.targets)) == []
    assert again.targets_epoch == callback.targets_epoch == 1


def test_a_checkpoint_of_validation_says_of_which_epoch_its_targets_are(tmp_path: Path) -> None:
    saving = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False, auto_insert_metric_name=False
    )
    callback = quick()
    trainer = make_trainer(callback, enable_checkpointing=True)
    trainer.callbacks[:] = [callback, saving]
    trainer.fit(Classifier(), loader(blobs()), loader(blobs(16, seed=1)))
    epochs = []
    for name in ("0.ckpt", "1.ckpt"):
        fresh = quick()
        make_trainer(fresh).validate(
            Classifier(), loader(blobs()), ckpt_path=tmp_path / name, **WEIGHTS_ONLY, verbose=False
        )
        epochs.append((fresh.targets_epoch, fresh.targets is None))
    assert epochs == [(None, True), (0, False)]


def test_a_run_resumed_from_a_checkpoint_of_validation_is_the_uninterrupted_one(tmp_path: Path) -> None:
    saving = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False, auto_insert_metric_name=False
    )
    callback, module = quick(), Classifier()
    torch.manual_seed(0)
    trainer = make_trainer(callback, max_epochs=2, enable_checkpointing=True)
    trainer.callbacks[:] = [callback, saving]
    trainer.fit(module, repeating(), loader(blobs(16, seed=1)))
    again, other = resumed(tmp_path, "3.ckpt", Classifier)
    assert same_weights(weights(module), weights(other))
    assert differences(statistics_of(callback), statistics_of(again)) == []
    assert differences(dict(callback.targets), dict(again.targets)) == []


def test_targets_of_another_selector_are_picked_anew_from_the_statistics(tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=quick(selector="highest_k_gradients"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    wanted, _, _ = fitted(callback=quick(selector="lowest_k_gradients"))
    other = quick(selector="lowest_k_gradients")
    with pytest.warns(GIFWarning, match="picked again"):
        make_trainer(other).validate(
            Classifier(), loader(blobs()), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False
        )
    assert differences(dict(wanted.callbacks[0].targets), dict(other.targets)) != []  # another training
    expected = trainer.callbacks[0].tracker.select(trainer.lightning_module, other.settings)
    assert differences(dict(expected), dict(other.targets)) == []


def test_a_checkpoint_whose_statistics_do_not_serve_the_selector_still_loads(tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=quick(selector="random", cache_neurons=False))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = quick()
    fresh = make_trainer(other)
    with pytest.warns(GIFWarning, match="cache_neurons"):
        fresh.validate(Classifier(), loader(blobs()), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    assert other.targets is None
    with pytest.raises(SelectionError, match="targets='batch'"):
        fresh.influence(batch_of(blobs(), slice(4)), targets="cached", dataloader=loader(blobs()))


def test_a_checkpoint_from_before_the_callback_still_loads(tmp_path: Path) -> None:
    module = Classifier()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(blobs()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = quick()
    make_trainer(callback, max_epochs=2).fit(module, loader(blobs()), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY)
    assert callback.targets_epoch == 1
