"""Models of scvi-tools, fitted by their own `train` on counts of genes."""

from __future__ import annotations

from functools import partial
from typing import Any

import anndata
import numpy
import scvi
from torch import Tensor
from torch.utils.data import DataLoader

from . import Case, quiet


def cells(n: int = 48, genes: int = 10) -> anndata.AnnData:
    generator = numpy.random.default_rng(0)
    kind = numpy.arange(n) % 3
    counts = generator.poisson(2 + 3 * (numpy.arange(genes) % 3 == kind[:, None])).astype(numpy.float32)
    data = anndata.AnnData(counts)
    data.obs["kind"] = [str(one) for one in kind]
    return data


def train(kind: Any, setup: dict[str, Any], options: dict[str, Any], callbacks: list[Any]) -> Any:
    scvi.settings.seed = 0
    data = cells()
    kind.setup_anndata(data, **setup)
    model = kind(data, **options)
    trainer = quiet(callbacks)
    epochs = trainer.pop("max_epochs")
    model.train(max_epochs=epochs, train_size=1.0, batch_size=16, **trainer)
    return model.trainer


def at_the_mean(module: Any, batch: Any) -> Tensor:
    """The negative evidence lower bound of each cell, with a latent variable at its mean instead of a draw."""
    net = module.module
    inputs = net._get_inference_input(batch)
    inferred = net.inference(**inputs)
    inferred["z"] = inferred["qz"].loc
    generated = net.generative(**net._get_generative_input(batch, inferred))
    losses = net.loss(batch, inferred, generated)
    return losses.reconstruction_loss["reconstruction_loss"] + losses.kl_local["kl_divergence_z"]


def of_single_cells(loader: Any) -> DataLoader[Any]:
    dataset = loader.dataset
    while isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    return DataLoader(dataset, 16, shuffle=True)


SMALL = {"n_hidden": 8, "n_latent": 2}
CASES = [
    *(
        Case(
            kind.__name__,
            partial(train, kind, {}, SMALL),
            influence_loss=at_the_mean,
            dataloader=of_single_cells,
        )
        for kind in (scvi.model.SCVI, scvi.model.LinearSCVI)
    ),
    Case(
        "SCANVI",
        partial(train, scvi.model.SCANVI, {"labels_key": "kind", "unlabeled_category": "?"}, SMALL),
    ),
]
