"""From setup to a second fit: when the trainer's methods exist, with which strategies, and on which trainer."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lightning_gif
from lightning_gif import ConfigurationError, GIFCallback, attach

from ..conftest import FSDP2, Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..doubles import Recorder, differences, quick, rng
from ..line import Blobs


def test_the_methods_are_bound_in_setup_for_every_stage() -> None:
    callback = quick()
    trainer = make_trainer(callback)
    assert not hasattr(trainer, "influence")
    trainer.validate(Classifier(), loader(blobs()), verbose=False)
    for name in ("influence", "self_influence", "validate_influence", "unlearn"):
        assert inspect.signature(getattr(trainer, name)) == inspect.signature(getattr(callback, name))


def test_targets_are_resolved_by_name_after_configure_model() -> None:
    class Late(Classifier):
        def configure_model(self) -> None:
            if not len(self.net):
                self.net.extend([nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)])

    trainer, _, data = fitted(Late(nn.Sequential()), callback=quick())
    assert set(trainer.callbacks[0].targets) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert trainer.influence(batch_of(data, slice(4))).scores.abs().sum() > 0


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_train_in_child_processes_are_refused_in_setup(strategy: str) -> None:
    callback = quick()
    trainer = make_trainer(callback, strategy=strategy, devices=1)
    with pytest.raises(MisconfigurationException, match="child processes"):
        callback.setup(trainer, Classifier(), "fit")
    assert not hasattr(trainer, "influence")


def test_ddp_with_one_process_works() -> None:
    trainer, module, data = fitted(callback=quick(), strategy="ddp", devices=1, max_epochs=1)
    try:
        assert trainer.influence(batch_of(data, slice(4))).scores.shape == (1, 48)
        before = weights(module)
        trainer.unlearn(batch_of(data, slice(4)), step=0.5).undo()
        assert same_weights(before, weights(module))
    finally:
        torch.distributed.destroy_process_group()


def test_strategies_that_shard_parameters_in_a_way_of_their_own_are_refused() -> None:
    class FSDPStrategy(pl.strategies.ParallelStrategy):
        """Stands for a strategy that this machine cannot run."""

        strategy_name = "sharded"

        def model_to_device(self) -> None:
            pass

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

        def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return tensor

        def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return tensor

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            return obj

        def barrier(self, name: str | None = None) -> None:
            pass

    callback = quick()
    trainer = make_trainer(callback, strategy=FSDPStrategy(), devices=1)
    with pytest.raises(ConfigurationError, match=r"split the parameters.*Use ModelParallelStrategy.*single file"):
        callback.setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize("size", [2, "auto"])
def test_tensor_parallelism_is_refused_before_training(size: int | str) -> None:
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=size)  # type: ignore[arg-type]
    callback = quick()
    trainer = make_trainer(callback, strategy=strategy, devices=2, num_nodes=2)
    advice = r"over 2 processes \(tensor parallelism\).*data_parallel_size=4, tensor_parallel_size=1"
    with pytest.raises(ConfigurationError, match=advice):
        callback.setup(trainer, Classifier(), "fit")


class Sharding(Classifier):
    """A classifier that is sharded over the processes of its trainer, if these have a device mesh."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@FSDP2
def test_sharded_parameters_with_one_process_work_and_a_single_file_is_attached(tmp_path: Path) -> None:
    strategy = pl.strategies.ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    )
    try:
        trainer, module, data = fitted(Sharding(), callback=quick(), strategy=strategy, devices=1, max_epochs=1)
        few, options = batch_of(data, slice(4)), {"max_iter": 4, "damping": 0.1}
        scores = trainer.influence(few, **options).scores
        trainer.save_checkpoint(tmp_path / "single.ckpt")
        before = [parameter.full_tensor().clone() for parameter in module.parameters()]
        edit = trainer.unlearn(few, step=0.5)
        assert edit.edit.is_in(module)
        edit.undo()
        assert all(map(torch.equal, before, [parameter.full_tensor() for parameter in module.parameters()]))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    other = Sharding.load_from_checkpoint(tmp_path / "single.ckpt")
    alone = make_trainer(quick(), devices=1)
    attach(alone, other, train_dataloaders=loader(data))
    torch.testing.assert_close(alone.influence(few, **options).scores, scores, rtol=1e-4, atol=1e-7)


def test_two_callbacks_are_refused() -> None:
    trainer = make_trainer(quick())
    trainer.callbacks.append(quick(seed=1))
    with pytest.raises(MisconfigurationException, match="several GIFCallbacks"):
        trainer.fit(Classifier(), loader(blobs()))


def test_the_trainer_and_the_bound_methods_pickle() -> None:
    trainer, _, data = fitted(callback=quick())
    batch = batch_of(data, slice(4))
    expected = trainer.influence(batch).scores
    assert torch.equal(pickle.loads(pickle.dumps(trainer.influence))(batch).scores, expected)
    assert torch.equal(pickle.loads(pickle.dumps(trainer)).influence(batch).scores, expected)


def test_a_deep_copy_of_the_module_takes_and_returns_the_edit() -> None:
    trainer, module, data = fitted(callback=quick())
    before = weights(module)
    twin = copy.deepcopy(module)
    report = trainer.unlearn(batch_of(data, slice(4)), step=1.0)
    assert not same_weights(before, weights(module))
    report.apply(twin)
    assert same_weights(weights(twin), weights(module))
    report.undo(twin)
    assert same_weights(weights(twin), before)


def test_attach_refuses_what_is_no_trainer_or_no_module() -> None:
    for given, expected in (((nn.Linear(2, 2), Classifier()), "`trainer`"), ((make_trainer(), nn.ReLU()), "`model`")):
        with pytest.raises(ConfigurationError, match=rf"{expected} must be a .* of Lightning, got a torch\.nn\."):
            attach(*given, train_dataloaders=loader(blobs()))  # type: ignore[arg-type]


def test_attach_with_loaders_on_a_model_that_was_never_fitted() -> None:
    torch.manual_seed(0)
    module, trainer = Classifier(), make_trainer()
    callback = attach(trainer, module, train_dataloaders=loader(blobs()), callback=quick())
    assert trainer.callbacks.count(callback) == 1
    before = rng()
    assert trainer.influence(batch_of(blobs(), slice(4))).scores.shape == (1, 48)
    assert trainer.influence(batch_of(blobs(), slice(4)), targets="cached").scores.shape == (1, 48)
    assert differences(before, rng()) == []
    assert callback.targets is not None


def test_attach_with_a_datamodule_gives_the_same_scores() -> None:
    module = Classifier()
    one, other = make_trainer(), make_trainer()
    attach(one, module, train_dataloaders=loader(blobs()), callback=quick())
    batch = batch_of(blobs(), slice(4))
    expected = one.influence(batch).scores
    attach(other, module, datamodule=Blobs(), callback=quick())
    assert torch.equal(other.influence(batch).scores, expected)


def test_attach_uses_the_callback_that_the_trainer_has_and_takes_no_second_one() -> None:
    callback = quick()
    trainer = make_trainer(callback)
    assert attach(trainer, Classifier(), train_dataloaders=loader(blobs())) is callback
    with pytest.raises(ConfigurationError, match="several GIFCallbacks"):
        attach(trainer, Classifier(), train_dataloaders=loader(blobs()), callback=quick(seed=1))
    assert [c for c in trainer.callbacks if isinstance(c, GIFCallback)] == [callback]
    with pytest.raises(ConfigurationError, match="not both"):
        attach(trainer, Classifier(), train_dataloaders=loader(blobs()), datamodule=Blobs())


def test_a_model_can_be_fitted_after_attach() -> None:
    module, trainer = Classifier(), make_trainer()
    callback = attach(trainer, module, train_dataloaders=loader(blobs()), callback=quick())
    trainer.fit(module, loader(blobs()))
    assert callback.targets_epoch == 1


def test_the_module_comes_back_to_its_device_after_an_error() -> None:
    trainer, module, data = fitted(callback=quick())
    x, y = batch_of(data, slice(4))
    with pytest.raises(lightning_gif.NonFiniteError):
        trainer.influence((x * torch.nan, y))
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_a_second_fit_starts_its_own_statistics() -> None:
    callback = quick()
    trainer, module, _ = fitted(callback=callback, max_epochs=1)
    other = blobs(32, seed=5)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(other))
    assert callback.targets_epoch == 1
    assert all(int(counts.sum()) == 32 for counts in callback.neurons.output_counts.values())
    assert trainer.influence(batch_of(other, slice(4))).scores.shape == (1, 32)
    assert not any(submodule._forward_hooks for submodule in module.modules())


def test_a_second_trainer_takes_the_same_callback() -> None:
    callback = quick()
    fitted(callback=callback)
    trainer, _, data = fitted(callback=callback, dataset=blobs(24))
    assert trainer.influence(batch_of(data, slice(4))).scores.shape == (1, 24)


def test_fast_dev_run_works_is_capped_and_logs_nothing() -> None:
    logger = Recorder()
    trainer, _, data = fitted(dataset=blobs(), callback=quick(batch_size=8), fast_dev_run=2, logger=logger)
    report = trainer.influence(batch_of(data, slice(4)))
    assert report.scores.shape == (1, 16)
    trainer.unlearn(batch_of(data, slice(4))).undo()
    assert logger.steps == []


def test_no_entry_point_adds_the_callback_to_every_trainer() -> None:
    group = importlib.metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [point for point in group if point.value.startswith("lightning_gif")]
    assert not any(isinstance(callback, GIFCallback) for callback in make_trainer().callbacks)
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert "callbacks_factory" not in project.read_text()
