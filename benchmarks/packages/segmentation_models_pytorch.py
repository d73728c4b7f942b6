"""Networks and losses of segmentation-models-pytorch with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import Case, Supervised, fitted


def masks(n: int = 16, size: int = 32) -> TensorDataset:
    """Noise, with a bright square in each image. Its size differs between images."""
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5
    y = torch.zeros(n, size, size, dtype=torch.long)
    for number in range(n):
        y[number, 4 : 10 + number, 6 : 12 + number] = 1
    return TensorDataset(x + y[:, None], y)


def train(loss: nn.Module, callbacks: list[Any]) -> Any:
    small = {"encoder_weights": None, "encoder_depth": 3, "decoder_channels": (8, 8, 4), "classes": 2}
    return fitted(Supervised(smp.Unet("tu-lcnet_035", **small), loss), masks(), callbacks)


def dice_of_each(module: Any, batch: Any) -> Tensor:
    x, y = batch
    loss = smp.losses.DiceLoss("multiclass")
    return torch.stack([loss(z[None], one[None]) for z, one in zip(module(x), y, strict=True)])


LOSSES: dict[str, Any] = {
    "CrossEntropyLoss": nn.CrossEntropyLoss(),
    "SoftCrossEntropyLoss with smoothing": smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1),
    "FocalLoss": smp.losses.FocalLoss("multiclass"),
}

CASES = [Case(f"Unet, {name}", partial(train, loss)) for name, loss in LOSSES.items()]
CASES.append(Case("Unet, DiceLoss", partial(train, smp.losses.DiceLoss("multiclass")), influence_loss=dice_of_each))
