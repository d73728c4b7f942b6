"""Anomaly detectors of anomalib that train without weights from elsewhere."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from anomalib.data.dataclasses.torch import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models import Fastflow, Ganomaly
from torch.utils.data import DataLoader

from . import Case, Items, quiet


def images(size: int, n: int = 16) -> DataLoader[Any]:
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    items = [ImageItem(image=one, gt_label=torch.tensor(0)) for one in x]
    return DataLoader(Items(items), 8, shuffle=True, collate_fn=ImageBatch.collate)


def train(model: Any, options: dict[str, Any], size: int, callbacks: list[Any]) -> Any:
    plain = {"pre_processor": False, "post_processor": False, "evaluator": False, "visualizer": False}
    module = model(**plain, **options)
    if size == 64:
        module.pre_processor = model.configure_pre_processor((size, size))
    options = quiet(callbacks)
    del options["enable_checkpointing"]
    engine = Engine(default_root_dir=tempfile.mkdtemp(), **options)
    engine.fit(module, train_dataloaders=images(size))
    return engine.trainer


FLOW = {"backbone": "resnet18", "pre_trained": False, "flow_steps": 1, "hidden_ratio": 0.1}
CASES = [
    Case("Fastflow", partial(train, Fastflow, FLOW, 64)),
    Case("Ganomaly", partial(train, Ganomaly, {"n_features": 4, "latent_vec_size": 4, "batch_size": 8}, 64)),
]
