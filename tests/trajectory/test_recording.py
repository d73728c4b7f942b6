"""What a fit records: its bits and its loader are as without a record, and a record that is not whole says so."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_gif import (
    ConfigurationError,
    GIFCallback,
    GIFWarning,
    ObjectiveError,
    TrainingDataError,
    attach,
)
from lightning_gif.trajectory import recording
from lightning_gif.trajectory.record import Trajectory

from ..conftest import WEIGHTS_ONLY, Classifier, batch_of, blobs, loader, make_trainer, same_weights
from ..conftest import weights as weights_of
from ..doubles import Do


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def fit(
    folder: Path | str | None,
    module: pl.LightningModule | None = None,
    data: Any = None,
    more: tuple[pl.Callback, ...] = (),
    ckpt_path: Path | None = None,
    gif: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[pl.Trainer, pl.LightningModule]:
    """A trainer after a fit that is recorded in a folder, and its module."""
    torch.manual_seed(2)
    module = Classifier(net()) if module is None else module
    callback = GIFCallback(trajectory=None if folder is None else str(folder), **(gif or {}))
    trainer = make_trainer(callback, **options)
    trainer.callbacks += more
    given = {} if ckpt_path is None else {"ckpt_path": ckpt_path, **WEIGHTS_ONLY}
    trainer.fit(module, loader(blobs(50)) if data is None else data, **given)
    return trainer, module


def through(trainer: pl.Trainer, **options: Any) -> Tensor:
    return trainer.influence(batch_of(blobs(50), slice(3)), through="training", **options).scores


# --------------------------------------------------------------------------------------------------------------------
# The fit stays as it was
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_a_recorded_fit_has_the_same_bits_and_its_loader_is_as_before(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)  # with which Lightning itself sets `worker_init_fn`
    ends = []
    for folder in (None, tmp_path / "run"):
        data = loader(blobs(50), **options)
        before = {name: value for name, value in vars(data).items() if name != "_iterator"}
        trainer, module = fit(folder, data=data, max_epochs=3)
        after = {name: value for name, value in vars(data).items() if name != "_iterator"}
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
        assert type(trainer.fit_loop._combined_loader).__name__ == "CombinedLoader"
        assert "dataloader" not in vars(trainer.fit_loop._data_source)
        ends.append((weights_of(module), torch.get_rng_state()))
    assert same_weights(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    trajectory = Trajectory.open(tmp_path / "run")
    steps = trajectory.steps(0, 12)
    for epoch in range(3):
        ids = torch.cat([batch.ids for step in steps if step.epoch == epoch for batch in step.batches])
        assert torch.equal(ids.sort().values, torch.arange(50))
    report = trainer.influence(batch_of(blobs(50), slice(3)), through="training")
    assert report.settings["replay_difference"] == 0


def test_states_are_about_as_many_as_the_steps_between_two(tmp_path: Path) -> None:
    fit(tmp_path / "known", data=loader(blobs(50), batch_size=5), max_epochs=4)
    assert Trajectory.open(tmp_path / "known").states == [*range(0, 40, 6), 40]


@pytest.mark.slow
def test_states_are_thinned_if_the_length_of_the_run_is_not_known(tmp_path: Path) -> None:
    stop = Do("on_train_epoch_end", lambda trainer, module: setattr(trainer, "should_stop", trainer.current_epoch > 30))
    trainer, _ = fit(tmp_path / "run", data=loader(blobs(50), batch_size=5), more=(stop,), max_epochs=-1)
    trajectory = Trajectory.open(tmp_path / "run")
    assert trainer.global_step == 320
    assert trajectory.states == [*range(0, 320, 16), 320]
    assert torch.isfinite(through(trainer)).all()


def test_the_start_says_how_large_the_folder_gets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(tmp_path / "run", data=loader(blobs(50), batch_size=5), max_epochs=4)
    assert "is recorded in" in caplog.text
    assert "8 states will be stored, of 468 bytes each" in caplog.text


def test_an_error_in_recording_does_not_end_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights_of(fit(None)[1])

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer_of = fit
    monkeypatch.setattr(Trajectory, "add_steps", full)
    with pytest.warns(GIFWarning, match=r"not recorded any further.*No space left.*without `through` needs no record"):
        trainer, module = trainer_of(tmp_path / "run")
    assert same_weights(expected, weights_of(module))
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="before the end of the run"):
        through(trainer)
    assert torch.isfinite(trainer.influence(batch_of(blobs(50), slice(3))).scores).all()


class Other(Classifier):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(net())
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam])
def test_an_optimizer_that_cannot_be_replayed_is_named(kind: Any, tmp_path: Path) -> None:
    wrong = rf"{kind.__name__} cannot be replayed. Use one of torch.optim: SGD, Adam, AdamW. Or omit `trajectory`"
    with pytest.raises(ConfigurationError, match=wrong):
        fit(tmp_path / "run", Other(lambda parameters: kind(parameters, 0.01)))
    assert not (tmp_path / "run").exists()
    fit(None, Other(lambda parameters: kind(parameters, 0.01)))
    trainer, _ = fit(tmp_path / "run", Other(lambda parameters: torch.optim.AdamW(parameters, 0.01)))
    assert torch.isfinite(through(trainer)).all()


# --------------------------------------------------------------------------------------------------------------------
# Before the fit
# --------------------------------------------------------------------------------------------------------------------


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def influence_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"optimises manually.*Or omit `trajectory`"):
        fit(tmp_path / "run", Manual())
    trainer, _ = fit(None, Manual())
    assert torch.isfinite(trainer.influence(batch_of(blobs(50), slice(3))).scores).all()


def test_reduced_precision_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'bf16-mixed' rounds differently.*precision='32-true'"):
        fit(tmp_path / "run", precision="bf16-mixed")
    assert torch.isfinite(through(fit(tmp_path / "run", precision="32-true")[0])).all()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(folder)
    with pytest.raises(ConfigurationError, match=r"is not empty. Give another folder as `trajectory`, or delete this"):
        fit(folder)
    fit(tmp_path / "other")
    shutil.rmtree(folder)
    fit(folder)
    with pytest.raises(ConfigurationError, match="`trajectory` must be the path of a folder"):
        GIFCallback(trajectory=3)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint
# --------------------------------------------------------------------------------------------------------------------


def test_a_resumed_fit_continues_the_record(tmp_path: Path) -> None:
    """The scores are those of the run as a whole, also if steps after the checkpoint are made again."""
    folder, saved = tmp_path / "run", tmp_path / "saved"
    keep = ModelCheckpoint(saved, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    first, _ = fit(folder, Classifier(nn.Linear(6, 3)), loader(blobs(50), shuffle=False), (keep,), max_epochs=2)
    assert Trajectory.open(folder).run.end == 8
    plain = loader(blobs(50), shuffle=False)
    assert first.global_step == 8
    module = Classifier(nn.Linear(6, 3))
    trainer, module = fit(folder, module, plain, ckpt_path=saved / "step=5.ckpt", max_epochs=3)
    trajectory = Trajectory.open(folder)
    trajectory.check_whole()
    assert 5 in trajectory.states
    assert trajectory.run.end == trainer.global_step
    report = trainer.influence(batch_of(blobs(50), slice(3)), through="training")
    assert report.settings["replay_difference"] == 0
    assert report.settings["steps"] == trainer.global_step


def test_a_size_also_bounds_the_states_of_a_fit_that_goes_on(tmp_path: Path) -> None:
    folder, saved, layer = tmp_path / "run", tmp_path / "saved", nn.Linear(6, 3)
    size = sum(parameter.nbytes for parameter in layer.parameters())
    path = None
    for epochs in range(1, 6):
        keep = ModelCheckpoint(saved, filename=f"{epochs}")
        given = {"trajectory_size": 4.5 * size / 2**30}
        fit(folder, Classifier(nn.Linear(6, 3)), None, (keep,), path, given, max_epochs=epochs)
        path = saved / f"{epochs}.ckpt"
        trajectory = Trajectory.open(folder)
        assert 2 <= len(trajectory.states) <= 4
        trajectory.check_whole()


def test_a_large_size_stores_no_more_states(tmp_path: Path) -> None:
    fit(tmp_path / "run", gif={"trajectory_size": 1.0}, data=loader(blobs(50), batch_size=5), max_epochs=4)
    assert Trajectory.open(tmp_path / "run").states == [*range(0, 40, 6), 40]


def test_a_fit_that_goes_on_from_its_beginning_replaces_the_record(tmp_path: Path) -> None:
    folder, saved = tmp_path / "run", tmp_path / "first.ckpt"

    def save(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not saved.exists():
            trainer.save_checkpoint(saved)

    fit(folder, Classifier(nn.Linear(6, 3)), more=(Do("on_train_start", save),), max_epochs=3)
    trainer, _ = fit(folder, Classifier(nn.Linear(6, 3)), ckpt_path=saved, max_epochs=2)
    assert Trajectory.open(folder).run.end == trainer.global_step
    assert torch.isfinite(through(trainer)).all()


def test_other_settings_of_a_fit_that_goes_on_are_named(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", filename="last")
    fit(tmp_path / "run", more=(keep,))
    path = tmp_path / "saved" / "last.ckpt"
    with pytest.raises(
        ConfigurationError, match=r"had another clipping of gradients. Continue it with the settings of"
    ):
        fit(tmp_path / "run", ckpt_path=path, max_epochs=3, gradient_clip_val=1.0)
    trainer, _ = fit(tmp_path / "run", ckpt_path=path, max_epochs=3)
    assert torch.isfinite(through(trainer)).all()


def test_a_gap_before_a_checkpoint_is_named(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(tmp_path / "run", more=(keep,), max_epochs=1)
    fit(None, more=(keep,), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", max_epochs=2)
    with pytest.raises(ConfigurationError, match="ends at step 4, before the step 8 of the checkpoint"):
        fit(tmp_path / "run", ckpt_path=tmp_path / "saved" / "epoch=1.ckpt", max_epochs=3)
    fit(tmp_path / "run", ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", max_epochs=3)


def test_lightnings_older_average_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"StochasticWeightAveraging replaces.*Use Lightning's WeightAveraging"
    ):
        fit(tmp_path / "run", more=(StochasticWeightAveraging(1e-2),))


def test_a_fit_that_was_interrupted_says_how_to_finish_it(tmp_path: Path) -> None:
    folder, saved = tmp_path / "run", tmp_path / "saved"
    keep = ModelCheckpoint(saved, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    def fail(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("the machine has failed")

    with pytest.raises(RuntimeError, match="the machine has failed"):
        fit(folder, Classifier(nn.Linear(6, 3)), None, (keep, Do("on_train_batch_start", fail)), max_epochs=3)
    trainer = make_trainer(GIFCallback(trajectory=str(folder)))
    attach(trainer, Classifier(nn.Linear(6, 3)), train_dataloaders=loader(blobs(50)))
    with pytest.raises(ConfigurationError, match=r"before the end of the run.*ckpt_path=…"):
        through(trainer)
    trainer, _ = fit(folder, Classifier(nn.Linear(6, 3)), ckpt_path=saved / "step=6.ckpt", max_epochs=3)
    assert torch.isfinite(through(trainer)).all()


def test_a_resumed_fit_without_its_record_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", filename="last")
    fit(None, more=(keep,))
    with pytest.raises(ConfigurationError, match=r"record of its earlier steps is not in.*or omit `trajectory`"):
        fit(tmp_path / "run", ckpt_path=tmp_path / "saved" / "last.ckpt", max_epochs=3)
    fit(None, ckpt_path=tmp_path / "saved" / "last.ckpt", max_epochs=3)


def test_a_record_serves_in_a_later_session(tmp_path: Path) -> None:
    trainer, module = fit(tmp_path / "run")
    expected = through(trainer)
    later = make_trainer()
    callback = GIFCallback(trajectory=str(tmp_path / "run"))
    attach(later, module, train_dataloaders=loader(blobs(50)), callback=callback)
    assert torch.equal(through(later), expected)


# --------------------------------------------------------------------------------------------------------------------
# Records that cannot be replayed
# --------------------------------------------------------------------------------------------------------------------


def test_a_call_without_a_record_says_how_to_get_one(tmp_path: Path) -> None:
    trainer, _ = fit(None)
    with pytest.raises(ConfigurationError, match=r"needs the record of a run.*GIFCallback\(trajectory='folder'\)"):
        through(trainer)
    with pytest.raises(ConfigurationError, match=r"`through` must be 'training' or None"):
        trainer.influence(batch_of(blobs(50), slice(3)), through="run")
    trainer, _ = fit(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"`damping`, `snapshots`|`snapshots`, `damping`"):
        through(trainer, damping=0.1, snapshots=True)
    with pytest.raises(ConfigurationError, match=r"needs through=.training.. Pass both"):
        trainer.influence(batch_of(blobs(50), slice(3)), leave_outs=2)
    assert torch.isfinite(through(trainer, leave_outs=1)).all()


@pytest.mark.parametrize("name", ["run.json", "state-00000003.safetensors", "steps-00000000-00000010.safetensors"])
def test_damaged_and_missing_files_are_named(name: str, tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run", data=loader(blobs(50), batch_size=10))
    expected, path = through(trainer), tmp_path / "run" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"0" + content[len(content) // 2 + 1 :])
    if path.read_bytes() != content:
        with pytest.raises(ConfigurationError, match=f"{name}|run.json"):
            through(trainer)
    path.write_bytes(content[:-7])
    with pytest.raises(ConfigurationError, match=name):
        through(trainer)
    path.unlink()
    with pytest.raises(ConfigurationError, match=r"is missing|are missing|has no run.json|is incomplete") as error:
        through(trainer) if name[:5] != "state" else Trajectory.open(path.parent).state(3)
    assert "Copy the folder again" in str(error.value) or "give the folder of such a fit" in str(error.value)
    path.write_bytes(content)
    assert torch.equal(through(trainer), expected)


def test_files_of_another_run_are_noticed(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "one")
    fit(tmp_path / "two", Classifier(net(), lr=0.05))
    name = "state-00000003.safetensors"
    shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(ConfigurationError, match=f"{name}' is of another training run than run.json"):
        through(trainer)


def test_the_record_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    callback, trainer = GIFCallback(trajectory=str(tmp_path / "run")), make_trainer()
    attach(trainer, Classifier(), train_dataloaders=loader(blobs(50)), callback=callback)
    with pytest.raises(ConfigurationError, match="other trainable parameters than this Classifier"):
        through(trainer)
    attach(trainer, Classifier(net()), train_dataloaders=loader(blobs(50)), callback=callback)
    with pytest.raises(ConfigurationError, match="are not those at the end of the recorded run"):
        through(trainer)


def test_an_edit_is_noticed_and_undoing_it_helps(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run")
    expected = through(trainer)
    edit = trainer.unlearn([3], step="natural", max_iter=2)
    with pytest.raises(ConfigurationError, match=r"are not those at the end of the recorded run.*undo the edit"):
        through(trainer)
    edit.undo()
    assert torch.equal(through(trainer), expected)


def test_weights_that_another_callback_averages_are_noticed(tmp_path: Path) -> None:
    def average(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)

    trainer, _ = fit(tmp_path / "run", more=(Do("on_train_end", average),))
    with pytest.raises(ConfigurationError, match=r"an average of weights \(a callback for EMA or SWA\)"):
        through(trainer)


class Noisy(Dataset[Any]):
    """Draws other values each time."""

    def __init__(self, noise: float) -> None:
        self.data, self.noise = blobs(50), noise

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + self.noise * torch.randn(6), y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_random_augmentation_in_workers_is_noticed_and_is_replayed_without_them(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "workers", data=loader(Noisy(0.1), num_workers=1))
    with pytest.raises(TrainingDataError, match=r"is not the one of the run.*workers.*num_workers=0"):
        through(trainer)
    trainer, _ = fit(tmp_path / "run", data=loader(Noisy(0.1)))
    report = trainer.influence(batch_of(blobs(50), slice(3)), through="training")
    assert report.settings["replay_difference"] == 0
    assert torch.isfinite(report.scores).all()
    in_float64 = trainer.influence(batch_of(blobs(50), slice(3)), through="training", double=True)
    assert in_float64.settings["replay_difference"] < 1e-5
    trainer, _ = fit(tmp_path / "other", data=loader(Noisy(0.0), num_workers=1))
    assert torch.isfinite(through(trainer)).all()


def test_another_dataset_is_noticed(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run")
    with pytest.raises(TrainingDataError, match=r"has 40 items, but that of the recorded run had 50"):
        through(trainer, dataloader=loader(blobs(40)))
    with pytest.raises(TrainingDataError, match="the data have changed"):
        through(trainer, dataloader=loader(blobs(50, seed=1)))
    assert torch.equal(through(trainer, dataloader=loader(blobs(50))), through(trainer))


def test_a_change_of_the_weights_that_is_not_recorded_is_noticed(tmp_path: Path) -> None:
    def shrink(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)

    trainer, _ = fit(tmp_path / "run", more=(Do("on_train_batch_end", shrink),))
    with pytest.raises(ConfigurationError, match=r"does not follow the run.*Use the default influence"):
        through(trainer)
    assert torch.isfinite(trainer.influence(batch_of(blobs(50), slice(3))).scores).all()


class Contrasted(Classifier):
    """A loss that is no sum over examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.linalg.vector_norm(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))

    def influence_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


def test_a_loss_that_is_no_sum_over_examples_is_refused(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run", Contrasted())
    with pytest.raises(ObjectiveError, match="cannot be weighted by examples"):
        through(trainer)
    assert torch.isfinite(trainer.influence(batch_of(blobs(50), slice(3))).scores).all()


def test_an_iterable_dataset_is_not_recorded(tmp_path: Path) -> None:
    class Rows(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(blobs(50))

    with pytest.raises(ConfigurationError, match="needs a DataLoader that draws batches from a map-style dataset"):
        fit(tmp_path / "run", data=DataLoader(Rows(), 10))


def test_a_fit_that_unfreezes_parameters_ends_the_record(tmp_path: Path) -> None:
    module = Classifier(net())
    module.net[0].requires_grad_(False)

    def unfreeze(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            module.requires_grad_(True)

    with pytest.warns(GIFWarning, match="frozen or unfrozen during the fit"):
        trainer, _ = fit(tmp_path / "run", module, more=(Do("on_train_epoch_start", unfreeze),), max_epochs=3)
    with pytest.raises(ConfigurationError, match="before the end of the run"):
        through(trainer)


def test_parts_of_weights_are_refused(tmp_path: Path) -> None:
    class ModelParallelStrategy:
        pass

    class Several:
        world_size, strategy = 2, ModelParallelStrategy()

    with pytest.raises(ConfigurationError, match=r"hold parts of the weights.* Use strategy='ddp'"):
        recording._check_run(Several(), Classifier())  # type: ignore[arg-type]


def test_a_size_bounds_the_states_and_changes_no_score(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run", max_epochs=4)
    whole = Trajectory.open(tmp_path / "run")
    size = whole.state(whole.states[-1]).nbytes
    stop = Do("on_train_epoch_end", lambda trainer, module: setattr(trainer, "should_stop", trainer.current_epoch == 3))
    for most, epochs in ((2, 4), (3, 4), (4, -1)):
        folder = tmp_path / f"{most} {epochs}"
        gib = (most + 0.5) * size / 2**30
        small, _ = fit(folder, gif={"trajectory_size": gib}, max_epochs=epochs, more=(stop,))
        assert 2 <= len(Trajectory.open(folder).states) <= most
        assert torch.equal(through(small), through(trainer))


def test_a_size_that_is_too_small_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"needs at least 2 of them, but `trajectory_size` is") as error:
        fit(tmp_path / "run", gif={"trajectory_size": 1e-9})
    least = float(re.search(r"Give at least (\d\S*?)\. ", str(error.value))[1])  # type: ignore[index]
    trainer, _ = fit(tmp_path / "run", gif={"trajectory_size": least})
    assert torch.isfinite(through(trainer)).all()
    with pytest.raises(ConfigurationError, match=r"`trajectory_size` must be None or a number above 0 \(GiB\), got 0"):
        GIFCallback(trajectory="run", trajectory_size=0)


def test_a_run_in_float32_is_replayed_in_float64_too(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run", Classifier())
    report = trainer.influence(batch_of(blobs(50), slice(3)), through="training", double=True)
    assert 0 < report.settings["replay_difference"] < 1e-5
    assert "with weights that differ by" in str(report)
    assert torch.allclose(report.scores, through(trainer), atol=1e-3 * float(report.scores.abs().max()))


def test_a_replay_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = fit(tmp_path / "run")
    monkeypatch.setattr("lightning_gif.objective.memory.ALWAYS_IN_MEMORY", 0)
    with pytest.raises(
        ConfigurationError, match=r"A replay of the 3 optimizer steps.*Use the default influence.*`memory`"
    ):
        through(trainer, memory=1e-9)
    assert torch.isfinite(through(trainer, memory=0.1)).all()


def test_a_fit_without_steps_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "run", max_epochs=0)
    assert not (tmp_path / "run").exists()
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    fit(tmp_path / "run")
    assert Trajectory.open(tmp_path / "run").run.end == 8


def test_batches_of_unknown_indices_end_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.DrawnIndices, "next", lambda self, now: None)
    with pytest.warns(GIFWarning, match="the indices of its batches are not known"):
        fit(tmp_path / "run")


def test_a_subset_and_a_custom_sampler_are_recorded(tmp_path: Path) -> None:
    data = torch.utils.data.Subset(blobs(50), range(10, 40))
    batches = [[0, 3, 5], [3, 7, 29], [1, 2]]
    given: Any = DataLoader(data, batch_sampler=batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        trainer, _ = fit(tmp_path / "run", Classifier(), given)
        report = trainer.influence(batch_of(blobs(50), slice(3)), through="training")
    found = [batch.ids.tolist() for step in Trajectory.open(tmp_path / "run").steps(0, 3) for batch in step.batches]
    assert found == batches
    drawn = sorted({index for batch in batches for index in batch})
    assert report.scores[0].nonzero().squeeze(1).tolist() == drawn


def test_tensors_of_a_record_are_as_in_the_module(tmp_path: Path) -> None:
    trainer, module = fit(tmp_path / "run", Other(lambda parameters: torch.optim.Adam(parameters, 0.01)))
    state = Trajectory.open(tmp_path / "run").state(trainer.global_step)
    own = weights_of(module)
    assert all(torch.equal(value, own[name]) for name, value in {**state.weights, **state.others}.items())
    assert state.optimizer.keys() == state.weights.keys()
    assert all(float(of["step"]) == trainer.global_step for of in state.optimizer.values())
    assert isinstance(blobs(), TensorDataset)


@pytest.mark.parametrize("kind", ["SGD", "SGD with momentum", "Adam", "Adam with amsgrad"])
def test_the_size_of_a_stored_state_counts_what_the_optimizer_will_add(kind: str, tmp_path: Path) -> None:
    optimizers = {
        "SGD": lambda given: torch.optim.SGD(given, 0.1),
        "SGD with momentum": lambda given: torch.optim.SGD(given, 0.1, momentum=0.9),
        "Adam": lambda given: torch.optim.Adam(given, 0.1),
        "Adam with amsgrad": lambda given: torch.optim.Adam(given, 0.1, amsgrad=True),
    }
    sizes = []

    def note(trainer: Any, module: Any) -> None:
        sizes.append(trainer.callbacks[0].recorder._expected_bytes())

    module = Classifier()
    module.configure_optimizers = lambda: optimizers[kind](module.parameters())  # type: ignore[method-assign]
    trainer = make_trainer(GIFCallback(trajectory=str(tmp_path / "run")), max_epochs=1)
    trainer.callbacks.append(Do("on_train_epoch_start", note))
    trainer.callbacks.append(Do("on_train_epoch_end", note))
    trainer.fit(module, loader(blobs(20)))
    assert sizes[0] == pytest.approx(sizes[1], abs=8 * 4)  # the counts of steps
