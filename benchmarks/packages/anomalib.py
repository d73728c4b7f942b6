"""Anomaly detectors of anomalib that train without downloaded weights."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from anomalib.data.dataclasses.torch import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models import Fastflow, Ganomaly
from torch import Tensor
from torch.utils.data import DataLoader

from . import Case, Items, quiet

SIZE = 64


def images(n: int = 16) -> DataLoader[Any]:
    x = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    items = [ImageItem(image=one, gt_label=torch.tensor(0)) for one in x]
    return DataLoader(Items(items), 8, shuffle=True, collate_fn=ImageBatch.collate)


def train(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    plain = {"post_processor": False, "evaluator": False, "visualizer": False}
    module = model(pre_processor=model.configure_pre_processor((SIZE, SIZE)), **plain, **options)
    trainer = quiet(callbacks)
    del trainer["enable_checkpointing"]
    engine = Engine(default_root_dir=tempfile.mkdtemp(), **trainer)
    engine.fit(module, train_dataloaders=images())
    return engine.trainer


class GanomalyWithLosses(Ganomaly):
    """GANomaly optimises manually. The loss of an image is the error with which the generator reconstructs it."""

    def influence_loss(self, batch: Any) -> Tensor:
        fake, _, _ = self.model.generator(batch.image)
        return (fake - batch.image).square().flatten(1).mean(1)


def flow_of_each(module: Any, batch: Any) -> Tensor:
    """The negative log-likelihood of each image. In evaluation mode the model returns a map of anomalies instead."""
    module.model.training = True
    hidden, jacobians = module.model(batch.image)
    pairs = zip(hidden, jacobians, strict=True)
    return torch.stack([0.5 * one.square().sum((1, 2, 3)) - log for one, log in pairs]).sum(0)


FLOW = {"backbone": "resnet18", "pre_trained": False, "flow_steps": 1, "hidden_ratio": 0.1}
CASES = [
    Case("Fastflow", partial(train, Fastflow, FLOW), influence_loss=flow_of_each),
    Case("Ganomaly", partial(train, Ganomaly, {"n_features": 4, "latent_vec_size": 4, "batch_size": 8})),
    Case(
        "Ganomaly with `influence_loss` in the class",
        partial(train, GanomalyWithLosses, {"n_features": 4, "latent_vec_size": 4, "batch_size": 8}),
    ),
]
