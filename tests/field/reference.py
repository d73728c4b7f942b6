"""What scores must be: those of the dense, damped Gauss–Newton matrix in float64, from the definition alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gif import GIFCallback

from ..conftest import make_trainer

DAMPING = 0.1
CONVERGED: dict[str, Any] = {"double": True, "damping": DAMPING, "max_iter": 400, "rtol": 1e-10}

Predict = Callable[[Any, Any], Tensor]
LossOf = Callable[[Tensor, Any], Tensor]


class Module(pl.LightningModule):
    """A module with a small net, trained by SGD."""

    def __init__(self, inputs: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Items(Dataset[Any]):
    """A dataset of the items of a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def cross_entropy(logits: Tensor, label: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(1, -1), torch.as_tensor(label).reshape(1))


def squared_error(prediction: Tensor, target: Any) -> Tensor:
    return F.mse_loss(prediction, torch.as_tensor(target).double().reshape(prediction.shape))


def fitted(
    module: pl.LightningModule, data: Dataset[Any], collate: Any = None, epochs: int = 3, **options: Any
) -> pl.Trainer:
    """A trainer with the callback after a short fit."""
    trainer = make_trainer(GIFCallback(**{"ratio": 0.5, "snapshots": 0, **options}), max_epochs=epochs)
    trainer.fit(module, DataLoader(data, 8, shuffle=True, collate_fn=collate))
    return trainer


def dense_scores(
    module: nn.Module,
    predict: Predict,
    loss_of: LossOf,
    examples: Sequence[tuple[Any, Any]],
    query: Sequence[int],
) -> Tensor:
    """``(1/(n−1))·qᵀ(G + λ)⁻¹gᵢ`` for each example, ``(n,)``, where ``q`` is the mean gradient of the query's losses.

    Args:
        module: The module.
        predict: ``(module, input) → (d,)``, the prediction for one example.
        loss_of: ``(prediction (d,), target) → ()``.
        examples: Input and target of each training example.
        query: Positions of the query's examples.
    """
    wide = copy.deepcopy(module).double().eval()
    parameters = [parameter for parameter in wide.parameters() if parameter.requires_grad]

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    rows, matrix = [], torch.zeros((), dtype=torch.float64)
    for given, target in examples:
        prediction = predict(wide, given).reshape(-1)
        jacobian = torch.stack([gradient(one) for one in prediction])
        curvature = torch.autograd.functional.hessian(lambda z, y=target: loss_of(z, y), prediction.detach())
        matrix = matrix + jacobian.T @ curvature @ jacobian / len(examples)
        rows.append(gradient(loss_of(prediction, target)))
    gradients = torch.stack(rows)
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64)
    return gradients @ torch.linalg.solve(damped, gradients[list(query)].mean(0)) / (len(examples) - 1)


def error(scores: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to the norm of the exact scores."""
    return float((scores.double() - exact).norm() / exact.norm())
