"""Small image classifiers of timm with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn
from torch.utils.data import TensorDataset

from . import Case, Supervised, fitted


def images(n: int = 24, size: int = 32) -> TensorDataset:
    """Noise with a bright square. Its position is the class."""
    y = torch.arange(n) % 3
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 8 * label : 8 * label + 8] += 1
    return TensorDataset(x, y)


def train(name: str, options: dict[str, Any], loss: nn.Module, callbacks: list[Any]) -> Any:
    net = timm.create_model(name, pretrained=False, num_classes=3, **options)
    return fitted(Supervised(net, loss), images(), callbacks)


NETS: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": (4, 4, 8, 8), "stem_width": 4},
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2},
    "convnext_atto": {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1)},
    "lcnet_035": {},
}

CASES = [
    Case(
        name,
        partial(train, name, options, nn.CrossEntropyLoss()),
        lambda module, batch: module(batch[0]),
        lambda z, batch: F.cross_entropy(z, batch[1]),
    )
    for name, options in NETS.items()
]
CASES.append(
    Case(
        "vit_tiny_patch16_224, timm's LabelSmoothingCrossEntropy",
        partial(train, "vit_tiny_patch16_224", NETS["vit_tiny_patch16_224"], LabelSmoothingCrossEntropy(0.1)),
        lambda module, batch: module(batch[0]),
        lambda z, batch: F.cross_entropy(z, batch[1], label_smoothing=0.1),
    )
)
