"""Code that the examples share: scikit-learn's 8x8 digits, a small convolutional network, options and loggers."""

from __future__ import annotations

import logging
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
SPLIT_SEED = 0  # the split is part of the data: --seed changes the training only


class DigitsModel(pl.LightningModule):
    """A small convolutional classifier. It needs no code for influence functions."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1797 digits in a fixed random split: 75 % for training, 25 % for testing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[: len(y) * 3 // 4], order[len(y) * 3 // 4 :]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class DigitsData(pl.LightningDataModule):
    """The split of :func:`digits` as a data module."""

    def setup(self, stage: str) -> None:
        self.train, self.test = digits()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=64)


def fit(
    model: pl.LightningModule, data: TensorDataset, *, epochs: int, seed: int, **trainer_options: Any
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Trains a model from its initial weights. Returns the trainer and the model."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        **{"logger": False, **trainer_options},
    )
    order = torch.Generator().manual_seed(seed)
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True, generator=order))
    return trainer, model


@torch.no_grad()
def logits(model: pl.LightningModule, data: TensorDataset) -> Tensor:
    """The logits ``(n, 10)`` of all examples, in the order of the dataset."""
    return model.eval()(data.tensors[0])


def make_logger(name: str, output: Path, project: str) -> Any:
    """A logger that needs no account: W&B offline, CSV files, or none."""
    if name == "wandb":
        logger = WandbLogger(project=project, save_dir=output, offline=True)
        _ = logger.experiment  # starts the run here, so that the measured training time does not include it
        return logger
    return CSVLogger(output, name="csv") if name == "csv" else False


def make_parser(description: str | None, output: str, *, epochs: int) -> ArgumentParser:
    """A parser with the options that all examples have. The help shows the first paragraph of the description."""
    summary = (description or "").partition("\n\n")[0]
    parser = ArgumentParser(description=summary, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="training epochs of each model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the training order")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for pictures, files and logs")
    return parser


def quiet() -> None:
    """Silences Lightning's messages about hardware and small datasets, and limits PyTorch to one thread.

    Warnings of lightning_gif are still shown. A network as small as this one gains nothing from a second thread.
    """
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
