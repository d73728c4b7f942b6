"""Modules of packages from PyPI, each fitted as the users of its package would fit it, on small synthetic data.

There is one file for each package. It imports its package at the top, and has a list ``CASES``. Nothing is downloaded:
networks have random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["MODULES", "Case", "Items", "fitted"]

MODULES: Mapping[str, tuple[str, ...]] = {
    "lightning": ("lightning",),
    "torch-geometric": ("torch_geometric",),
    "transformers": ("transformers",),
    "peft": ("peft", "transformers"),
    "timm": ("timm",),
    "segmentation-models-pytorch": ("segmentation-models-pytorch",),
    "lightly": ("lightly",),
    "torchgeo": ("torchgeo",),
    "anomalib": ("anomalib",),
    "pytorch-tabular": ("pytorch-tabular",),
    "pytorch-forecasting": ("pytorch-forecasting",),
    "darts": ("darts",),
    "neuralforecast": ("neuralforecast",),
    "chemprop": ("chemprop",),
    "scvi-tools": ("scvi-tools",),
}
"""The packages, each with the distributions whose versions are printed."""


@dataclass(frozen=True)
class Case:
    """One module of a package.

    Attributes:
        name: What is trained.
        fit: Builds the module and its data, fits it with the given callbacks, and returns the trainer.
        predict: The predictions for a batch of one example, of any shape. The loss must be convex in them. ``None`` if
            the scores have no exact reference.
        loss: The loss ``()`` of the predictions and the batch.
        influence_loss: The losses ``(B,)`` of a batch, for a module that needs the method ``influence_loss``.
        dataloader: Makes a training loader from the loader of the package, if that one cannot be used. It is passed as
            ``dataloader=`` where ``influence_loss`` is used.
    """

    name: str
    fit: Callable[[list[Any]], Any]
    predict: Callable[[Any, Any], Tensor] | None = None
    loss: Callable[[Tensor, Any], Tensor] | None = None
    influence_loss: Callable[[Any, Any], Tensor] | None = None
    dataloader: Callable[[Any], DataLoader[Any]] | None = None


class Items(Dataset[Any]):
    """A list as a dataset."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def fitted(
    module: pl.LightningModule, data: Any, callbacks: list[Any], *, validation: Any = None, **options: Any
) -> Any:
    """A trainer after a short fit on the CPU.

    Args:
        module: The module.
        data: A loader or a dataset.
        callbacks: The trainer's callbacks.
        validation: A validation loader.
        **options: Options of the loader of a dataset.
    """
    loader = DataLoader(data, 8, shuffle=True, **options) if isinstance(data, Dataset) else data
    trainer = pl.Trainer(**quiet(callbacks))
    trainer.fit(module, loader, validation)
    return trainer


def quiet(callbacks: list[Any]) -> dict[str, Any]:
    """Options of a trainer that prints and writes nothing."""
    return {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }


class Supervised(pl.LightningModule):
    """A network in the plainest module: ``loss(net(x), y)`` on batches ``(x, y)``."""

    def __init__(self, net: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)
