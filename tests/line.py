"""A model and its data in a module, as a user of the command line has them."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader

from .conftest import Classifier, blobs, loader

__all__ = ["Blobs", "Net", "Tied"]


class Net(Classifier):
    def __init__(self, width: int = 8, lr: float = 0.1, folder: str = "here") -> None:
        super().__init__(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)), lr)
        self.save_hyperparameters()


class Tied(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)))
        self.net[2].weight = self.net[0].weight


class Blobs(pl.LightningDataModule):
    def __init__(self, n: int = 48) -> None:
        super().__init__()
        self.n = n

    def setup(self, stage: str) -> None:
        self.train, self.held_out = blobs(self.n), blobs(self.n, seed=1)

    def train_dataloader(self) -> DataLoader:
        return loader(self.train)

    def val_dataloader(self) -> DataLoader:
        return loader(self.held_out, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return loader(self.held_out, shuffle=False)
