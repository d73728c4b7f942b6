"""What the callback promises where it meets Lightning: binding, isolation, training untouched, state, conventions."""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import inspect
import pickle
import random
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

import lightning_gif
from lightning_gif import (
    BatchError,
    ConfigurationError,
    GIFCallback,
    GIFMixin,
    GIFWarning,
    ObjectiveError,
    SelectionError,
    TrainingDataError,
    attach,
)
from lightning_gif.config import Overrides, Settings

from .conftest import WEIGHTS_ONLY, Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights

# --------------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------------


def quick(**options: Any) -> GIFCallback:
    """A callback whose solves are short: these tests are not about accuracy."""
    return GIFCallback(**{"ratio": 0.5, "unconverged": "ignore", "max_iter": 4, **options})


class Blobs(pl.LightningDataModule):
    """The data of these tests as a datamodule."""

    def __init__(self, n: int = 48) -> None:
        super().__init__()
        self.n = n

    def setup(self, stage: str) -> None:
        self.dataset = blobs(self.n)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.dataset)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(blobs(16, seed=1), shuffle=False)


class Do(pl.Callback):
    """Calls a function in one hook."""

    def __init__(self, hook: str, function: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        super().__init__()
        self.called = 0

        def run(trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            self.called += 1
            function(trainer, pl_module)

        setattr(self, hook, run)


class Recorder(Logger):
    """A logger that remembers the scalars it was given; ``tables`` makes it one that takes tables too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.steps if key in metrics]


class TableRecorder(Recorder):
    """The same with the method that W&B's logger has."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[Any]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables[key] = data


def rng() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()  # noqa: NPY002


def snapshot(trainer: pl.Trainer, module: pl.LightningModule, train_loader: Any) -> dict[str, Any]:
    """Everything a call must leave alone, as copies."""
    internal = {*vars(nn.Module()), "_trainer", "_fabric"}
    kinds = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
    logged = {kind: dict(getattr(trainer, kind)) for kind in kinds}  # first: reading them computes torchmetrics
    return {
        "weights": weights(module),
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "identity": {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "training": {n: m.training for n, m in module.named_modules()},
        "attributes": {
            name: copy.deepcopy({k: v for k, v in vars(m).items() if k not in internal and not callable(v)})
            for name, m in module.named_modules()
        },
        "instance methods": {
            name: sorted(k for k, v in vars(m).items() if k not in internal and callable(v))
            for name, m in module.named_modules()
        },
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in module.named_modules()
        },
        "rng": rng(),
        "metrics": logged,
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "loader": {k: copy.deepcopy(v) for k, v in vars(train_loader).items() if isinstance(v, (int, str, bool))},
        "generator": None if train_loader.generator is None else train_loader.generator.get_state(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures differ in a bit."""
    if isinstance(one, (Tensor, numpy.ndarray)):
        same = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        if same and isinstance(one, Tensor):
            same = one.device == other.device and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same and (isinstance(one, Tensor) or (one == other).all()) else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [f"{where}: keys {set(one) ^ set(other)}"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple, collections.deque)):
        if type(one) is not type(other) or len(one) != len(other):
            return [f"{where}: {one!r} became {other!r}"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, (int, float, str, bool, bytes, type(None), set)):
        return [] if one == other else [f"{where}: {one!r} became {other!r}"]
    return []


@contextlib.contextmanager
def untouched(trainer: pl.Trainer, module: pl.LightningModule, train_loader: Any) -> Iterator[None]:
    before = snapshot(trainer, module, train_loader)
    yield
    assert differences(before, snapshot(trainer, module, train_loader)) == []


def statistics_of(callback: GIFCallback) -> dict[str, Any]:
    return {"neurons": callback.neurons.state(), "gradients": callback.gradients.state()}


class Busy(Classifier):
    """Uses everything that a step may touch: BatchNorm, dropout, metrics, lists, counters, a frozen part."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Linear(6, 8),
                nn.BatchNorm1d(8),
                nn.ReLU(inplace=True),
                nn.Dropout(0.3),
                nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)),
                nn.Linear(8, 3),
            )
        )
        self.net[4].requires_grad_(False)
        self.accuracy = MulticlassAccuracy(3)
        self.several = MetricCollection({"a": MulticlassAccuracy(3), "p": MulticlassPrecision(3)})
        self.unregistered = {"accuracy": MulticlassAccuracy(3)}
        self.losses: list[Tensor] = []
        self.history: dict[str, Any] = {"batches": [], "last": collections.deque(maxlen=2)}
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)

    def on_train_epoch_start(self) -> None:
        self.net[4].eval()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.calls += 1
        self.last_loss = loss.detach()
        self.losses.append(loss.detach())
        self.history["batches"].append(batch_idx)
        self.history["last"].append(batch_idx)
        self.seen = self.seen + 1
        self.accuracy(logits, y)
        self.several.update(logits, y)
        self.unregistered["accuracy"].update(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        self.log("loss", loss)
        return {"loss": loss, "logits": logits.detach()}


def busy_run(callback: GIFCallback | None, **options: Any) -> tuple[pl.Trainer, Busy, DataLoader[Any]]:
    torch.manual_seed(1)
    module = Busy()
    trainer = make_trainer(callback, **options)
    data = loader(blobs(), generator=torch.Generator().manual_seed(3))
    trainer.fit(module, data, loader(blobs(16, seed=1), shuffle=False))
    return trainer, module, data


# --------------------------------------------------------------------------------------------------------------------
# Training is untouched
# --------------------------------------------------------------------------------------------------------------------


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


class TwoOptimizers(GIFMixin, Classifier):
    """Manual optimisation of two halves in turn, as adversarial nets are trained."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)))
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.steps += 1
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[1:].parameters(), 0.01)]

    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, reduction="none")


def test_training_with_several_optimizers_is_bit_identical_with_the_callback() -> None:
    def run(callback: GIFCallback | None) -> Any:
        torch.manual_seed(1)
        module = TwoOptimizers()
        make_trainer(callback).fit(module, loader(blobs()))
        return weights(module), rng()

    assert differences(run(None), run(quick())) == []


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


# --------------------------------------------------------------------------------------------------------------------
# Binding
# --------------------------------------------------------------------------------------------------------------------


def test_the_methods_are_bound_in_setup_for_every_stage() -> None:
    trainer = make_trainer(quick())
    assert not hasattr(trainer, "influence")
    trainer.validate(Classifier(), loader(blobs()), verbose=False)
    assert isinstance(trainer.influence, functools.partial)
    assert isinstance(trainer.unlearn, functools.partial)


def test_validate_with_a_checkpoint_restores_the_targets(tmp_path: Path) -> None:
    batch = batch_of(blobs(), slice(4))
    trainer = make_trainer(quick())
    trainer.fit(Classifier(), datamodule=Blobs())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer.influence(batch).scores

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


def test_strategies_that_shard_parameters_are_refused() -> None:
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
    with pytest.raises(ConfigurationError, match="split the parameters"):
        callback.setup(trainer, Classifier(), "fit")


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


def test_names_that_lightning_overwrites_on_callbacks_are_not_used() -> None:
    assert not {"log", "log_dict"} & set(dir(GIFCallback))


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


# --------------------------------------------------------------------------------------------------------------------
# After fit
# --------------------------------------------------------------------------------------------------------------------


def test_the_train_loader_is_kept_when_test_makes_the_trainer_forget_it() -> None:
    trainer, module, data = fitted(callback=quick())
    expected = trainer.influence(batch_of(data, slice(4))).scores
    trainer.test(module, loader(blobs(16, seed=1), shuffle=False), verbose=False)
    assert trainer.train_dataloader is None
    assert torch.equal(trainer.influence(batch_of(data, slice(4))).scores, expected)


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


class Indexed(torch.utils.data.Dataset[Any]):
    """Remembers which of its examples were read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def test_shuffling_does_not_move_scores_to_other_indices() -> None:
    data = blobs()
    trainer, _, _ = fitted(dataset=data, callback=quick())
    batch = batch_of(data, slice(4))
    expected = trainer.influence(batch, dataloader=DataLoader(data, 48, shuffle=False))
    shuffled = trainer.influence(batch)
    assert torch.equal(shuffled.indices, torch.arange(48))
    assert torch.allclose(shuffled.scores, expected.scores)

    order = torch.randperm(48, generator=torch.Generator().manual_seed(9))
    permuted = trainer.influence(batch, dataloader=loader(TensorDataset(*batch_of(data, order))))
    assert torch.allclose(permuted.scores, expected.scores[:, order], rtol=1e-3, atol=1e-6)


def test_a_subset_sampler_gives_the_indices_of_the_dataset() -> None:
    data = blobs()
    chosen = [40, 3, 17, 30, 5, 21]
    trainer = make_trainer(quick())
    trainer.fit(Classifier(), DataLoader(data, 3, sampler=SubsetRandomSampler(chosen)))
    report = trainer.influence(batch_of(data, slice(4)))
    assert report.indices.tolist() == sorted(chosen)
    subset = trainer.influence(batch_of(data, slice(4)), dataloader=loader(Subset(data, sorted(chosen))))
    assert torch.allclose(report.scores, subset.scores)


def test_an_iterable_dataset_trains_but_is_refused_for_influence() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(blobs())

    trainer = make_trainer(quick())
    trainer.fit(Classifier(), DataLoader(Stream(), 16))
    batch = batch_of(blobs(), slice(4))
    with pytest.raises(TrainingDataError, match=r"Stream is an IterableDataset.*dataloader="):
        trainer.influence(batch)
    assert trainer.influence(batch, dataloader=loader(blobs())).scores.shape == (1, 48)


# --------------------------------------------------------------------------------------------------------------------
# A loss outside of the loop
# --------------------------------------------------------------------------------------------------------------------


def step_tensor(self: Any, batch: Any, batch_idx: int) -> Any:
    return F.cross_entropy(self(batch[0]), batch[1])


def step_dict(self: Any, batch: Any, batch_idx: int) -> Any:
    return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "extra": "text"}


def step_without_index(self: Any, batch: Any) -> Any:
    return F.cross_entropy(self(batch[0]), batch[1])


def step_with_other_names(self: Any, examples: Any, i: int) -> Any:
    return F.cross_entropy(self(examples[0]), examples[1]) + 0 * i


def step_with_star(self: Any, *args: Any) -> Any:
    batch, batch_idx = args
    return F.cross_entropy(self(batch[0]), batch[1]) + 0 * batch_idx


def step_logging(self: Any, batch: Any, batch_idx: int) -> Any:
    loss = F.cross_entropy(self(batch[0]), batch[1])
    self.log("a", loss, prog_bar=True, on_step=True)
    self.log_dict({"b": loss, "c": loss.detach() * 2})
    return loss


def step_skipping(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx == 1 else F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "step",
    [step_dict, step_without_index, step_with_other_names, step_with_star, step_logging, step_skipping],
    ids=lambda step: step.__name__,
)
def test_every_form_of_training_step_gives_the_same_scores(step: Any) -> None:
    torch.manual_seed(0)
    net = Classifier().net
    batch = batch_of(blobs(), slice(4))

    def scores(function: Any) -> Tensor:
        module = type("Formed", (Classifier,), {"training_step": function})(copy.deepcopy(net))
        trainer = make_trainer(quick(), max_epochs=1)
        trainer.fit(module, loader(blobs()))
        module.net.load_state_dict(net.state_dict())
        return trainer.influence(batch, selector=["net.*"]).scores

    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        assert torch.equal(scores(step), scores(step_tensor))


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_step_that_returns_none_or_something_else_is_named() -> None:
    def wrong(self: Any, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    trainer, module, data = fitted(callback=quick())
    batch = batch_of(data, slice(4))
    for step, words in ((lambda batch, batch_idx: None, "does not depend"), (wrong.__get__(module), "scalar loss")):
        module.training_step = step
        with untouched(trainer, module, trainer.callbacks[0].loaders.train), pytest.raises(ObjectiveError, match=words):
            trainer.influence(batch)
        del module.training_step


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
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        if module.calls > calls + 3:
            raise ZeroDivisionError("on purpose")
        return original(x)

    calls = module.calls
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


def test_manual_optimisation_is_refused_without_a_loss_of_its_own() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    module = Manual()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"Manual optimises manually.*influence_loss"):
        make_trainer(quick()).fit(module, loader(blobs()))
    assert same_weights(before, weights(module))
    trainer = make_trainer(quick())
    trainer.validate(module, loader(blobs()), verbose=False)  # nothing is asked of training_step here
    with pytest.raises(ConfigurationError, match="influence_loss"):
        trainer.influence(batch_of(blobs(), slice(4)), targets="batch", dataloader=loader(blobs()))
    assert same_weights(before, weights(module))


def test_manual_optimisation_works_with_a_loss_of_its_own_and_never_steps() -> None:
    module = TwoOptimizers()
    trainer, _, data = fitted(module, callback=quick())
    steps, before = module.steps, weights(module)
    assert trainer.influence(batch_of(data, slice(4))).scores.abs().sum() > 0
    trainer.unlearn(batch_of(data, slice(4)), dry_run=True)
    assert module.steps == steps
    assert same_weights(before, weights(module))


def test_batches_are_prepared_as_the_loop_does() -> None:
    class Preparing(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    trainer, module, data = fitted(Preparing(), callback=quick())
    x, y = batch_of(data, slice(4))
    with torch.no_grad():
        expected = F.cross_entropy(module((x + 1) * 2), y)
    report = trainer.unlearn((x, y), step=0.0, dry_run=True)
    assert report.forget.before == pytest.approx(float(expected), rel=1e-5)


def test_tensors_of_a_test_loop_can_be_asked_about() -> None:
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


# --------------------------------------------------------------------------------------------------------------------
# Second derivatives
# --------------------------------------------------------------------------------------------------------------------


class Silent(Classifier):
    """Logs nothing: logging inside of a module that is compiled as a whole fails in Lightning itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["module", "submodule"])
def test_compiled_modules_give_the_same_scores(backend: str, part: str) -> None:
    torch.manual_seed(0)
    plain = Silent()
    compiled: Any = copy.deepcopy(plain)
    if part == "module":
        compiled = torch.compile(compiled, backend=backend)
    else:
        compiled.net = torch.compile(compiled.net, backend=backend)
    batch = batch_of(blobs(), slice(4))
    reports, callbacks = [], [quick(), quick()]
    for module, callback in zip((plain, compiled), callbacks, strict=True):
        torch.manual_seed(0)
        trainer = make_trainer(callback, max_epochs=1)
        trainer.fit(module, loader(blobs()))
        reports.append(trainer.influence(batch))
        before = weights(trainer.lightning_module)
        trainer.unlearn(batch, step=1.0).undo()
        assert same_weights(before, weights(trainer.lightning_module))
    assert torch.allclose(reports[0].scores, reports[1].scores, rtol=1e-3, atol=1e-6)
    sums = [sorted(float(value.sum()) for value in c.neurons.outputs.values()) for c in callbacks]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert len(callbacks[1].neurons.gradients) == 2


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x.view(-1, 3, 2))).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 3, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("net", [Encoder, Attention, Checkpointed])
def test_attention_and_checkpointing_have_second_derivatives(net: Any) -> None:
    trainer, module, data = fitted(Classifier(net()), callback=quick(curvature_examples=8), max_epochs=1)
    batch = batch_of(data, slice(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        scores = trainer.influence(batch).scores
        before = weights(module)
        report = trainer.unlearn(batch, step=1.0)
    assert scores.isfinite().all()
    assert scores.abs().sum() > 0
    assert report.retain.after == pytest.approx(report.retain.predicted, rel=0.2)
    report.undo()
    assert same_weights(before, weights(module))


def test_a_loss_of_its_own_works_with_checkpointing() -> None:
    class Own(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    trainer, module, data = fitted(Own(Checkpointed()), callback=quick(), max_epochs=1)
    batch = batch_of(data, slice(4))
    expected = trainer.influence(batch).scores
    module.net.forward = lambda x: module.net.head(module.net.first(x))
    assert torch.allclose(trainer.influence(batch).scores, expected, rtol=1e-3, atol=1e-6)


def test_layers_whose_forward_never_runs_are_left_out_of_a_ranking() -> None:
    trainer, _, _ = fitted(Classifier(Encoder()), callback=quick(), max_epochs=1)
    chosen = set(trainer.callbacks[0].targets)
    assert {"net.embed.weight", "net.layer.linear1.weight", "net.head.weight"} <= chosen
    assert not any("out_proj" in name for name in chosen)  # attention reads its weight, and never calls it


def test_checkpointing_does_not_count_its_second_forward_pass() -> None:
    plain = Checkpointed()
    plain.forward = lambda x: plain.head(plain.first(x))
    states = []
    for net in (plain, Checkpointed()):
        net.load_state_dict(plain.state_dict())
        callback = quick()
        torch.manual_seed(0)
        make_trainer(callback, max_epochs=1).fit(Classifier(net, lr=0.0), loader(blobs(), shuffle=False))
        states.append({kind: callback.neurons.mean(kind, "net.first.0") for kind in ("outputs", "gradients")})
    for kind in ("outputs", "gradients"):
        assert torch.allclose(states[0][kind], states[1][kind], rtol=1e-5), kind


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_modules_of_other_precision_work_and_keep_their_dtype(precision: str, dtype: torch.dtype) -> None:
    class Padding(Classifier):
        """Makes a tensor of the default dtype, as recurrent nets do for their first state."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x) + self.net[2](torch.zeros(len(x), 8)), y)

    trainer, module, data = fitted(Padding(), callback=quick(), precision=precision, max_epochs=1)
    assert module.net[0].weight.dtype == dtype
    batch = batch_of(data, slice(4))
    with untouched(trainer, module, trainer.callbacks[0].loaders.train):
        assert trainer.influence(batch).scores.isfinite().all()
        report = trainer.unlearn(batch, dry_run=True, step=4.0)
    before = weights(module)
    report.apply()
    assert not same_weights(before, weights(module))
    assert {value.dtype for value in weights(module).values()} == {dtype}
    report.undo()
    assert same_weights(before, weights(module))


def test_solves_run_outside_of_autocast() -> None:
    trainer, module, data = fitted(callback=quick(), precision="bf16-mixed", max_epochs=1)
    batch = batch_of(data, slice(4))
    other = make_trainer()
    attach(other, module, train_dataloaders=loader(data), callback=quick())
    selector = ["net.2.*"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = trainer.influence(batch, selector=selector).scores
    assert torch.equal(mixed, other.influence(batch, selector=selector).scores)


# --------------------------------------------------------------------------------------------------------------------
# Caching in training
# --------------------------------------------------------------------------------------------------------------------


def gradient_squares(module: Classifier, data: TensorDataset, size: int) -> Tensor:
    """The sum of squared gradients over batches, from the definition."""
    total = torch.zeros_like(module.net[0].weight)
    for start in range(0, len(data), size):
        x, y = batch_of(data, slice(start, start + size))
        total += torch.autograd.grad(F.cross_entropy(module(x), y), module.net[0].weight)[0].square()
    return total


@pytest.mark.parametrize(
    ("options", "size"), [({}, 16), ({"accumulate_grad_batches": 3}, 48), ({"gradient_clip_val": 1e-4}, 16)]
)
def test_gradients_are_gathered_once_a_step_and_before_clipping(options: dict[str, Any], size: int) -> None:
    callback, module = quick(), Classifier(lr=0.0)
    make_trainer(callback, max_epochs=1, **options).fit(module, loader(blobs(), shuffle=False))
    assert callback.gradients.steps["net.0.weight"] == 48 // size
    assert torch.allclose(
        callback.gradients.squares["net.0.weight"], gradient_squares(module, blobs(), size), rtol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-4}])
def test_neurons_are_gathered_by_class_as_gradients_of_single_losses(options: dict[str, Any]) -> None:
    callback, module, data = quick(), Classifier(lr=0.0), blobs()
    make_trainer(callback, max_epochs=1, **options).fit(module, loader(data))
    x, y = data.tensors
    hidden = module.net[0](x)
    loss = F.cross_entropy(module.net[1:](hidden), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    for c in range(3):
        assert torch.allclose(callback.neurons.mean("outputs", "net.0", [c]), hidden[y == c].mean(0), atol=1e-5)
        assert torch.allclose(callback.neurons.mean("gradients", "net.0", [c]), gradient[y == c].mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "accumulated", "gathered"),
    [(None, 1, range(12)), (64, 1, range(12)), (4, 1, [0, 2, 5, 7, 10]), (2, 2, [0, 1, 4, 5, 10, 11])],
)
def test_some_steps_of_an_epoch_are_gathered_from(steps: int | None, accumulated: int, gathered: Iterable[int]) -> None:
    """About so many; of one that takes several batches all of these."""
    callback, module, data = quick(cache_steps=steps), Classifier(lr=0.0), blobs()
    trainer = make_trainer(callback, max_epochs=1, accumulate_grad_batches=accumulated)
    trainer.fit(module, loader(data, 4, shuffle=False))
    seen = torch.cat([torch.arange(4 * batch, 4 * batch + 4) for batch in gathered])
    assert callback.gradients.steps["net.0.weight"] == len(seen) / 4 / accumulated
    assert callback.neurons.output_counts["net.0"].sum() == len(seen)
    hidden = module.net[0](data.tensors[0][seen])
    assert torch.allclose(callback.neurons.mean("outputs", "net.0"), hidden.mean(0), atol=1e-5)


def gathered_from(module: pl.LightningModule, batches: int, **options: Any) -> GIFCallback:
    callback = quick(cache_steps=16)
    make_trainer(callback, **{"max_epochs": 1, **options}).fit(module, loader(blobs(2 * batches), 2, shuffle=False))
    return callback


def test_what_is_gathered_has_no_period_that_training_may_have() -> None:
    class EveryFourth(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 4 == 3:
                super().training_step(batch, batch_idx)

    assert 2 <= gathered_from(EveryFourth(), 256).gradients.steps["net.0.weight"] <= 8
    classes = gathered_from(Classifier(lr=0.0), 256).neurons.output_counts["net.0"][1:]
    assert classes.max() <= 2 * classes.min()


def test_a_fit_of_so_many_steps_is_gathered_from_to_its_end() -> None:
    steps = gathered_from(Classifier(lr=0.0), 400, max_epochs=-1, max_steps=40).gradients.steps["net.0.weight"]
    assert 14 <= steps <= 18


def test_sums_are_kept_in_float32_under_mixed_precision() -> None:
    callback, data = quick(cache_steps=None), blobs(2400)
    module = Classifier(lr=0.0)
    make_trainer(callback, max_epochs=1, precision="bf16-mixed").fit(module, loader(data, 8))
    exact = module.net[0](data.tensors[0])
    for c in range(3):
        found = callback.neurons.mean("outputs", "net.0", [c])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact[data.tensors[1] == c].mean(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "all"])
def test_cache_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match="`cache_steps` must be None or a whole number"):
        GIFCallback(cache_steps=steps)


def test_with_several_optimizers_each_adds_its_own_parameters_once_a_step() -> None:
    callback = quick()
    fitted(TwoOptimizers(), callback=callback, max_epochs=1)
    assert set(callback.gradients.steps) == {name for name, _ in TwoOptimizers().named_parameters()}
    assert set(callback.gradients.steps.values()) == {3}


def test_non_finite_gradients_are_left_out() -> None:
    class Spiky(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    callback = quick()
    fitted(Spiky(), callback=callback, max_epochs=1)
    assert set(callback.gradients.steps.values()) == {2}
    assert all(square.isfinite().all() for square in callback.gradients.squares.values())
    assert all(value.isfinite().all() for value in callback.neurons.gradients.values())


def test_validation_and_sanity_checking_do_not_enter_the_statistics() -> None:
    states = []
    for options in ({"limit_val_batches": 0}, {"num_sanity_val_steps": 2, "val_check_interval": 1}):
        torch.manual_seed(0)
        callback = quick()
        train, val = (loader(data, shuffle=False) for data in (blobs(), blobs(16, seed=1)))
        make_trainer(callback, **options).fit(Classifier(), train, val)
        states.append((statistics_of(callback), dict(callback.targets)))
    assert differences(*states) == []


def test_targets_are_picked_although_validation_has_cleared_the_gradients() -> None:
    callback = quick(selector="largest_gradients")
    seen = []
    trainer = make_trainer(callback, max_epochs=1)
    trainer.callbacks.append(Do("on_train_epoch_end", lambda t, m: seen.append(m.net[0].weight.grad)))
    trainer.fit(Classifier(), loader(blobs()), loader(blobs(16, seed=1), shuffle=False))
    assert callback.targets is not None
    assert len(seen) == 1


def test_the_checkpoint_holds_tensors_and_primitives_only(tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=quick())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["lightning_gif"]["neurons"]["outputs"].keys() == {"net.0", "net.2"}
    assert saved["callbacks"][trainer.callbacks[0].state_key] == {"targets_epoch": 1, "history": []}
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


# --------------------------------------------------------------------------------------------------------------------
# Conventions
# --------------------------------------------------------------------------------------------------------------------


def test_fast_dev_run_works_is_capped_and_logs_nothing() -> None:
    logger = Recorder()
    trainer, _, data = fitted(dataset=blobs(), callback=quick(batch_size=8), fast_dev_run=2, logger=logger)
    report = trainer.influence(batch_of(data, slice(4)))
    assert report.scores.shape == (1, 16)
    trainer.unlearn(batch_of(data, slice(4))).undo()
    assert logger.steps == []


def test_loggers_get_the_choice_of_targets_with_its_overlap_from_the_second_epoch() -> None:
    logger = Recorder()
    trainer, module, _ = fitted(callback=quick(), logger=logger, max_epochs=3)
    targets = trainer.callbacks[0].targets
    counts = logger.values("gif/targets/count")
    assert len(counts) == 3
    assert counts[-1] == targets.count
    assert len(logger.values("gif/targets/jaccard")) == 2
    assert all(0 <= value <= 1 for value in logger.values("gif/targets/jaccard"))
    assert logger.values("gif/targets/share")[-1] == pytest.approx(
        targets.count / sum(p.numel() for p in module.parameters())
    )
    for name, entries in targets.items():
        assert logger.values(f"gif/targets/{name}")[-1] == len(entries)


def test_reports_go_to_all_loggers_with_the_step_and_tables_to_those_that_take_them() -> None:
    plain, tables = Recorder(), TableRecorder()
    trainer, _, data = fitted(callback=quick(), logger=[plain, tables])
    step = trainer.global_step
    trainer.influence(batch_of(data, slice(4)))
    trainer.unlearn(batch_of(data, slice(4)), dry_run=True)
    for logger in (plain, tables):
        # The histogram has no step of its own: W&B orders by its own counter, and refuses a step below one it has seen.
        scalars = [(s, metrics.keys() - {"gif/influence/scores"}) for s, metrics in logger.steps]
        assert {s for s, keys in scalars if any(key.startswith("gif/influence") for key in keys)} == {step}
        assert {s for s, metrics in logger.steps if any(key.startswith("gif/unlearn") for key in metrics)} == {step}
    assert set(tables.tables) == {
        "gif/influence/examples",
        "gif/influence/solve",
        "gif/unlearn/path",
        "gif/unlearn/solve",
    }


def test_nothing_is_logged_when_not_wanted() -> None:
    logger = Recorder()
    trainer, _, data = fitted(callback=quick(log_reports=False), logger=logger)
    trainer.influence(batch_of(data, slice(4)))
    assert not [key for _, metrics in logger.steps for key in metrics if key.startswith("gif/")]


@pytest.mark.parametrize("bar", [False, True])
def test_progress_is_shown_only_where_the_trainer_shows_it(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _, data = fitted(callback=quick(), enable_progress_bar=bar)
    capsys.readouterr()
    trainer.influence(batch_of(data, slice(4)))
    assert ("Hessian products" in capsys.readouterr().err) is bar


class Small(Classifier):
    """A module with arguments that a command line can give."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)))


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gif.GIFCallback
      init_args:
        selector: {selector}
        ratio: 0.25
        damping: 0.01
        curvature_examples: null
        unconverged: ignore
"""


def run_cli(tmp_path: Path, *args: str, selector: str = "lowest_k_outputs") -> LightningCLI:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(selector=selector))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LightningCLI(Small, Blobs, save_config_callback=None, args=["fit", "--config", str(config), *args])


@pytest.mark.parametrize(("written", "read"), [("lowest_k_outputs", "lowest_k_outputs"), ('["net.2.*"]', ["net.2.*"])])
def test_the_command_line_builds_the_callback_and_fits(tmp_path: Path, written: str, read: Any) -> None:
    cli = run_cli(tmp_path, selector=written)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, GIFCallback)]
    assert (callback.settings.selector, callback.settings.ratio) == (read, 0.25)
    assert callback.settings.curvature_examples is None
    assert cli.trainer.influence(batch_of(blobs(), slice(4))).scores.shape == (1, 48)


def test_print_config_serialises_every_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_cli(tmp_path, "--print_config")
    printed = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert "Unable to serialize" not in printed
    for name in list(inspect.signature(GIFCallback.__init__).parameters)[1:]:
        assert re.search(rf"\b{name}: ", printed), name


def test_the_command_line_refuses_a_bad_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as end:
        run_cli(tmp_path, selector="lowest_k_output")
    assert "lowest_k_outputs" in str(end.value) + capsys.readouterr().err


def test_the_options_have_the_same_names_types_and_defaults_wherever_they_are_listed() -> None:
    arguments = inspect.signature(GIFCallback).parameters
    settings = {field.name: field for field in dataclasses.fields(Settings)}
    assert set(settings) <= arguments.keys()
    assert list(settings) == list(Overrides.__annotations__)
    types, changes = typing.get_type_hints(GIFCallback.__init__), typing.get_type_hints(Overrides)
    for name, field in settings.items():
        if name != "selector":  # the command line needs list[str], where a call may take any sequence
            assert types[name] == changes[name], name
        assert field.default in (dataclasses.MISSING, arguments[name].default), name
        assert getattr(GIFCallback().settings, name) == arguments[name].default
    args = (GIFCallback.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    assert re.findall(r"^        (\w+): ", args, re.M) == list(arguments)
    page = (Path(__file__).parent.parent / "docs" / "choosing-a-method.md").read_text().partition("## All arguments")[2]
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(.+?)` \|", page, re.M)
    defaults = {name: ast.literal_eval(default) for names, default in listed for name in re.findall(r"\w+", names)}
    assert defaults == {name: argument.default for name, argument in arguments.items()}


def test_no_entry_point_adds_the_callback_to_every_trainer() -> None:
    group = importlib.metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [point for point in group if point.value.startswith("lightning_gif")]
    assert not any(isinstance(callback, GIFCallback) for callback in make_trainer().callbacks)
    project = Path(__file__).parent.parent / "pyproject.toml"
    assert "callbacks_factory" not in project.read_text()


def test_only_one_module_knows_the_names_of_lightnings_packages() -> None:
    package = Path(lightning_gif.__file__).parent
    pattern = re.compile(r"^\s*(?:from|import) (?:lightning|pytorch_lightning|lightning_fabric)\b", re.M)
    knowing = {str(path.relative_to(package)) for path in package.rglob("*.py") if pattern.search(path.read_text())}
    assert knowing == {"_compat.py"}
    assert GIFMixin.__mro__ == (GIFMixin, object)


def test_the_state_key_tells_callbacks_apart() -> None:
    assert quick().state_key != quick(selector="random").state_key
    assert quick().state_key == quick(max_iter=7).state_key


def test_errors_are_misconfigurations_to_lightning() -> None:
    with pytest.raises(MisconfigurationException):
        GIFCallback(ratio=2.0)


# ----------------------------------------------------------------------------------------------------------------------
# Reports in training
# ----------------------------------------------------------------------------------------------------------------------


class Tables(Recorder):
    """Takes tables as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], **kwargs: Any) -> None:
        self.tables[key] = [columns, *data]


def test_reports_in_training_change_nothing_and_tell_when_examples_start_to_matter() -> None:
    dataset, logger = blobs(), Tables()
    query = batch_of(dataset, slice(0, 3))
    reporting = GIFCallback(report_every_n_epochs=2, query=query, report_options={"k": 3})
    trained = []
    for callback in (GIFCallback(), reporting):
        torch.manual_seed(0)
        module = Classifier()
        make_trainer(callback, max_epochs=5, logger=logger).fit(module, loader(dataset))
        trained.append(weights(module))
    assert same_weights(*trained)
    columns, *rows = logger.tables["gif/influence/history"]
    assert columns == ["epoch", "query", "kind", "rank", "index", "score"]
    assert [row[0] for row in rows] == [1] * 6 + [3] * 6
    last = reporting.last_report
    assert last is not None
    assert [row[4] for row in rows[6:9]] == last.proponents().indices[0].tolist()
    assert len(logger.values("gif/influence/seconds")) == 2


def test_reports_go_on_with_a_checkpoint(tmp_path: Path) -> None:
    dataset = blobs()
    options: dict[str, Any] = {"report_every_n_epochs": 1, "query": batch_of(dataset, slice(0, 3))}
    trainer = make_trainer(GIFCallback(**options), max_epochs=2)
    trainer.fit(Classifier(), loader(dataset))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    logger = Tables()
    again = make_trainer(GIFCallback(**options), max_epochs=3, logger=logger)
    again.fit(Classifier(), loader(dataset), ckpt_path=tmp_path / "two.ckpt")
    assert sorted({row[0] for row in logger.tables["gif/influence/history"][1:]}) == [0, 1, 2]


def test_a_query_that_cannot_be_asked_ends_a_run_before_it_begins() -> None:
    callback = GIFCallback(report_every_n_epochs=5, query=torch.zeros(3, 6))
    trainer = make_trainer(callback, max_epochs=5)
    with pytest.raises(BatchError, match="query"):
        trainer.fit(Classifier(), loader(blobs()))
    assert trainer.global_step == 0


def test_a_report_that_fails_does_not_cost_the_run() -> None:
    dataset = blobs()
    callback = GIFCallback(
        report_every_n_epochs=1, query=batch_of(dataset, slice(0, 3)), report_options={"method": "sif"}
    )
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.warns(GIFWarning, match="No influence report at the end of epoch 0.*sif"):
        trainer.fit(Classifier(), loader(dataset))
    assert callback.last_report is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"report_every_n_epochs": 0, "query": 1}, "whole number of at least 1, got 0"),
        ({"report_every_n_epochs": 2}, "must be given together"),
        ({"query": [1]}, "must be given together"),
        ({"report_options": {"k": 3}}, "`report_every_n_epochs`"),
        ({"report_every_n_epochs": 1, "query": 1, "report_options": {"top": 3}}, "Unknown argument 'top'"),
    ],
)
def test_bad_arguments_of_reports_in_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GIFCallback(**arguments)
