"""MNIST-like data and the net called TinyNet in the GIF paper's scripts, for the benchmarks."""

from __future__ import annotations

import gzip
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def read_idx(path: Path) -> Tensor:
    """One gzipped idx file of unsigned bytes, as MNIST is distributed."""
    with gzip.open(path) as file:
        content = bytearray(file.read())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)


def load(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images ``(n, 1, 28, 28)`` in [0, 1] with labels, from a folder of the four idx files."""
    splits = []
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None].float() / 255
        splits.append(TensorDataset(images, read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long()))
    return splits[0], splits[1]


class TinyNet(pl.LightningModule):
    """Four stride-2 convolutions (32, 64, 128, 256 channels) and a linear layer: 398 090 parameters."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 2 * 2, 10))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def fit(data: Any, callbacks: list[Any], *, epochs: int, seed: int = 0) -> tuple[pl.Trainer, TinyNet]:
    """A trained TinyNet and its trainer, which prints nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    pl.seed_everything(seed, verbose=False)
    model = TinyNet()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(data, 128, shuffle=True))
    return trainer, model


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, chosen: Tensor) -> float:
    """Share of the chosen examples, a mask ``(n,)``, that are classified right."""
    x, y = (tensor[chosen] for tensor in data.tensors)
    right = torch.cat([model.eval()(part).argmax(1) for part in x.split(1000)]) == y
    return float(right.double().mean())
