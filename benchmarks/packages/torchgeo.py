"""Tasks of torchgeo on synthetic images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchgeo.trainers import ClassificationTask, RegressionTask, SemanticSegmentationTask

from . import Case, Items, fitted


def samples(target: str, n: int, size: int = 32) -> Items:
    """Bright, medium and dark images, each with its class, its brightness or a mask of its bright pixels."""
    x = torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(n)) * 0.5
    y: Any = torch.arange(n) % 3
    x = x + y[:, None, None, None]
    targets = {"class": y, "brightness": y.float(), "mask": (x[:, 0] > 1).long()}[target]
    key = "mask" if target == "mask" else "label"
    return Items([{"image": image, key: one} for image, one in zip(x, targets, strict=True)])


def train(task: Any, target: str, options: dict[str, Any], callbacks: list[Any]) -> Any:
    module = task(weights=None, in_channels=4, **options)
    return fitted(module, samples(target, 16), callbacks, validation=DataLoader(samples(target, 24), 8))


CASES = [
    Case(
        "ClassificationTask",
        partial(train, ClassificationTask, "class", {"model": "lcnet_035", "num_classes": 3}),
        lambda module, batch: module(batch["image"]),
        lambda z, batch: F.cross_entropy(z, batch["label"]),
    ),
    Case(
        "RegressionTask",
        partial(train, RegressionTask, "brightness", {"model": "lcnet_035", "num_outputs": 1}),
        lambda module, batch: module(batch["image"]),
        lambda z, batch: F.mse_loss(z, batch["label"][:, None]),
    ),
    Case(
        "SemanticSegmentationTask (unet)",
        partial(
            train,
            SemanticSegmentationTask,
            "mask",
            {"model": "unet", "backbone": "tu-lcnet_035", "task": "multiclass", "num_classes": 2},
        ),
    ),
]
