"""Tasks of torchgeo on synthetic images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torchgeo.trainers import ClassificationTask, RegressionTask, SemanticSegmentationTask

from . import Case, Items, fitted


def samples(target: str, n: int = 16, size: int = 32) -> Items:
    x = torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(0)) * 0.5
    y: Any = torch.arange(n) % 3
    x = x + y[:, None, None, None]
    if target == "mask":
        y = (x[:, 0] > 1).long()
    return Items([{"image": a, target: b.float() if target == "target" else b} for a, b in zip(x, y, strict=True)])


def train(task: Any, target: str, options: dict[str, Any], callbacks: list[Any]) -> Any:
    target_key = {"mask": "mask", "label": "label"}.get(target, "label")
    data = samples(target_key if target != "target" else "label")
    if target == "target":
        data = Items([{"image": one["image"], "label": one["label"].float()} for one in data.items])
    return fitted(task(weights=None, in_channels=4, **options), data, callbacks)


CASES = [
    Case(
        "ClassificationTask",
        partial(train, ClassificationTask, "label", {"model": "lcnet_035", "num_classes": 3}),
        lambda module, batch: module(batch["image"]),
        lambda z, batch: F.cross_entropy(z, batch["label"]),
    ),
    Case(
        "RegressionTask",
        partial(train, RegressionTask, "target", {"model": "lcnet_035", "num_outputs": 1}),
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
