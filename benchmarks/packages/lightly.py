"""Self-supervised losses of lightly on two views of each image, as in the tutorials of the package."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import Case, fitted


def views(n: int = 32) -> TensorDataset:
    """Two noisy views of each image, which has one of eight patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(8, 3, 8, 8, generator=generator)[torch.arange(n) % 8]
    noise = torch.randn(2, n, 3, 8, 8, generator=generator) * 0.5
    return TensorDataset(patterns + noise[0], patterns + noise[1])


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TwoViews(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class SimCLR(TwoViews):
    def __init__(self) -> None:
        super().__init__()
        self.head = SimCLRProjectionHead(8, 8, 4)
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(*(self.head(self.backbone(x)) for x in batch))


class BarlowTwins(SimCLR):
    def __init__(self) -> None:
        super().__init__()
        self.head = BarlowTwinsProjectionHead(8, 8, 4)
        self.criterion = BarlowTwinsLoss()


class SimSiam(TwoViews):
    def __init__(self) -> None:
        super().__init__()
        self.projection = SimSiamProjectionHead(8, 8, 4)
        self.prediction = SimSiamPredictionHead(4, 4, 4)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self.projection(self.backbone(x)) for x in batch)
        p0, p1 = self.prediction(z0), self.prediction(z1)
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))


class BYOL(TwoViews):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.prediction = BYOLProjectionHead(8, 8, 4), BYOLPredictionHead(4, 4, 4)
        self.backbone_momentum, self.head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.head, self.head_momentum, m=0.9)
        p0, p1 = (self.prediction(self.head(self.backbone(x))) for x in batch)
        z0, z1 = (self.head_momentum(self.backbone_momentum(x)).detach() for x in batch)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


def against_fixed_images(module: Any, batch: Any) -> Tensor:
    """The contrastive loss of the two views of each image against fixed images, not against the rest of its batch."""
    z0, z1 = (F.normalize(module.head(module.backbone(x))) for x in batch)
    fixed = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(batch[0])
    others = F.normalize(module.head(module.backbone(fixed)))
    logits = torch.cat([(z0 * z1).sum(1, keepdim=True), z0 @ others.T], 1) / 0.5
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")


def train(kind: Any, callbacks: list[Any]) -> Any:
    return fitted(kind(), views(), callbacks)


CASES = [
    Case("SimSiam", partial(train, SimSiam)),
    Case("BYOL", partial(train, BYOL)),
    Case("SimCLR (NTXentLoss)", partial(train, SimCLR), influence_loss=against_fixed_images),
    Case("BarlowTwins", partial(train, BarlowTwins), influence_loss=against_fixed_images),
]
