"""What several rooms test with: a module that uses all that a step may touch, and loggers that record."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lightning_gif import GIFCallback, GIFMixin

from .conftest import Classifier, blobs, loader, make_trainer, weights


def quick(**options: Any) -> GIFCallback:
    """A callback whose solves are short: these tests are not about accuracy."""
    return GIFCallback(**{"ratio": 0.5, "unconverged": "ignore", "max_iter": 4, **options})


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
    """A logger that records the scalars it is given."""

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
    """Takes tables as well, by the method that W&B's logger has."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], **kwargs: Any) -> None:
        self.tables[key] = [columns, *data]


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
