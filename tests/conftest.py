"""Code that the tests share: small models with every kind of layer, and trainers that print and write nothing."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback

from .cpu_times import CpuTimes

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning's launchers give torch all cores, which other workers use

# Checkpoints must be read without unpickling. Lightning has an option for this from version 2.6 on.
_told = "weights_only" in inspect.signature(pl.Trainer.fit).parameters
WEIGHTS_ONLY: dict[str, Any] = {"weights_only": True} if _told else {}

SEED = int(os.environ.get("TEST_SEED", "0"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTimes())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark ``mostly_slow(n)``, all but ``n`` parameters are slow. Those are evenly spaced."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("mostly_slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in tests.values():
        share = min(group[0].get_closest_marker("mostly_slow").args[0] / len(group), 1)
        for number, item in enumerate(group):
            if number and int(number * share) == int((number - 1) * share):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Enables interrupts, which a shell ignores in background jobs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Modules draw the same data at import, in whatever order they are collected."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(SEED)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Fixtures that several tests share are the same, whichever test runs first."""
    if fixturedef.scope != "function":
        torch.manual_seed(SEED)
    return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state, and warnings of Lightning about small data sets are silent."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning.*")
        yield


FSDP2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this version of PyTorch does not run on the CPU"
)


class Classifier(pl.LightningModule):
    """A module of a user, without any code for this package."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.net = net if net is not None else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def blobs(n: int = 48, features: int = 6, classes: int = 3, seed: int = 0) -> TensorDataset:
    """Labelled points around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(100)) * 1.5
    return TensorDataset(centres[y] + torch.randn(n, features, generator=generator), y)


def loader(dataset: Any, batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, **{"shuffle": True, **options})


def batch_of(dataset: TensorDataset, indices: Any) -> tuple[Tensor, ...]:
    return tuple(tensor[indices] for tensor in dataset.tensors)


def make_trainer(callback: GIFCallback | None = None, **options: Any) -> pl.Trainer:
    """A trainer that prints and writes nothing by default."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[] if callback is None else [callback], **{**defaults, **options})


def fitted(
    module: pl.LightningModule | None = None,
    dataset: TensorDataset | None = None,
    callback: GIFCallback | None = None,
    **options: Any,
) -> tuple[pl.Trainer, pl.LightningModule, TensorDataset]:
    """A trainer with the callback after a short fit."""
    module = Classifier() if module is None else module
    dataset = blobs() if dataset is None else dataset
    callback = GIFCallback(ratio=0.5, unconverged="ignore") if callback is None else callback
    trainer = make_trainer(callback, **options)
    trainer.fit(module, loader(dataset))
    return trainer, module, dataset


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
