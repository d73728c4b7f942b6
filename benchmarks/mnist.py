"""Data in the format of MNIST, TinyNet of the GIF paper's scripts, a ResNet, and two small networks for attribution."""

from __future__ import annotations

import gzip
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def read_idx(path: Path) -> Tensor:
    """Reads a gzipped idx file of unsigned bytes, the format of MNIST."""
    with gzip.open(path) as file:
        content = bytearray(file.read())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)


def load(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """The training and test images ``(n, 1, 28, 28)`` in [0, 1] with labels, from a folder with the four idx files."""
    splits = []
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None].float() / 255
        splits.append(TensorDataset(images, read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long()))
    return splits[0], splits[1]


class TinyNet(pl.LightningModule):
    """Four stride-2 convolutions (32, 64, 128, 256 channels) and a linear layer: 398 090 parameters."""

    def __init__(self, lr: float = 1e-3, *, decay: bool = False) -> None:
        super().__init__()
        self.net = self.build()
        self.lr, self.decay = lr, decay

    @staticmethod
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 2 * 2, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        if not self.decay:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Block(nn.Module):
    """A residual block: two convolutions with BatchNorm and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


class ResNet(TinyNet):
    """Three residual blocks of 16, 32 and 64 channels on 14 × 14 positions: 77 754 parameters."""

    @staticmethod
    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )


class MLP(TinyNet):
    """A multilayer perceptron with 128 and 64 hidden neurons: 109 386 parameters."""

    @staticmethod
    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        )


class CNN(TinyNet):
    """Two stride-2 convolutions (16 and 32 channels), each with BatchNorm, and a linear layer: 20 586 parameters."""

    @staticmethod
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1568, 10))


NETS: dict[str, Callable[..., TinyNet]] = {
    "tinynet": TinyNet,
    "resnet": partial(ResNet, lr=2e-3),
    "mlp": MLP,
    "cnn": CNN,
}


def fit(
    data: Any,
    callbacks: list[Any],
    *,
    epochs: int,
    seed: int = 0,
    net: str = "tinynet",
    decay: bool = False,
    batch_size: int = 128,
    accelerator: str = "cpu",
) -> tuple[pl.Trainer, TinyNet]:
    """Trains a network. Returns the trainer and the network. The learning rate is constant, or decays to zero."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    pl.seed_everything(seed, verbose=False)
    model = NETS[net](decay=decay)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(data, batch_size, shuffle=True))
    return trainer, model


@torch.no_grad()
def logits(model: nn.Module, data: TensorDataset) -> Tensor:
    """The logits ``(n, 10)`` in evaluation mode, in the order of the data."""
    return torch.cat([model.eval()(part) for part in data.tensors[0].split(1000)])


def accuracy(model: nn.Module, data: TensorDataset, chosen: Tensor) -> float:
    """The accuracy on the chosen examples, given as a mask ``(n,)``."""
    part = TensorDataset(*(tensor[chosen] for tensor in data.tensors))
    return float((logits(model, part).argmax(1) == part.tensors[1]).double().mean())
