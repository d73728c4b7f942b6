"""Compares scores with leave-one-out retraining of a logistic regression on scikit-learn's digits.

    python benchmarks/leave_one_out.py

Multinomial logistic regression with weight decay has a single minimum. The script computes it up to rounding, with all
training examples and without each of some. A score predicts the change of the query's loss. If it does so exactly, the
correlation with the true changes is 1, and the slope of the true changes over the scores is 1. Influence functions are
a first-order approximation, so the remaining difference is of second order.

Prints a Markdown table: the smallest correlation over the queries, and the median slope.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits


class Logistic(pl.LightningModule):
    """A linear layer on the 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, digits.CLASSES).double()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.linear(batch[0].flatten(1).double()), batch[1])


def minimise(model: Logistic, data: TensorDataset, decay: float) -> Logistic:
    """Minimises the objective up to rounding, by Newton's method from the present weights. Returns the same model."""
    x, y = data.tensors[0].flatten(1).double(), data.tensors[1]
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    theta = torch.cat([model.linear.weight, model.linear.bias[:, None]], dim=1).detach()
    labels = F.one_hot(y, theta.shape[0]).to(x)
    for _ in range(30):
        p = (inputs @ theta.T).softmax(1)
        slope = (p - labels).T @ inputs / len(x) + decay * theta
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("nab,ni,nj->aibj", inner, inputs, inputs).reshape(theta.numel(), -1) / len(x)
        hessian.diagonal().add_(decay)
        theta = theta - torch.linalg.solve(hessian, slope.flatten()).view_as(theta)
        if float(slope.norm()) < 1e-13:
            break
    with torch.no_grad():
        model.linear.weight.copy_(theta[:, :-1])
        model.linear.bias.copy_(theta[:, -1])
    return model


@torch.no_grad()
def losses(model: Logistic, data: TensorDataset) -> Tensor:
    return F.cross_entropy(model.linear(data.tensors[0].flatten(1).double()), data.tensors[1], reduction="none")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--left_out", type=int, default=200, help="training examples to leave out, one at a time")
    parser.add_argument("--queries", type=int, default=20, help="test examples to use as queries")
    parser.add_argument("--decay", type=float, default=1e-2, help="weight decay")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    train, test = digits.digits()
    queries = TensorDataset(*(tensor[: options.queries] for tensor in test.tensors))
    model = minimise(Logistic(), train, options.decay)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    attach(trainer, model, train_dataloaders=DataLoader(train, 64), callback=GIFCallback(curvature_examples=None))
    left_out = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: options.left_out].sort().values

    before, truth = losses(model, queries), []
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for position in left_out.tolist():
        kept = torch.arange(len(train)) != position
        again = Logistic()
        again.load_state_dict(weights)
        minimise(again, TensorDataset(*(tensor[kept] for tensor in train.tensors)), options.decay)
        truth.append(losses(again, queries) - before)
    each = torch.stack(truth, dim=1)

    rows: dict[str, dict[str, Any]] = {
        "defaults": {},
        "`rtol=1e-6, damping=0`": {"rtol": 1e-6, "damping": 0.0, "max_iter": 2000},
        "`method='gif'`, all parameters, `rtol=1e-6`": {
            "method": "gif",
            "selector": ["*"],
            "rtol": 1e-6,
            "max_iter": 5000,
        },
    }
    print(f"{len(left_out)} of {len(train)} digits are left out, one at a time.\n")
    print("| weight decay | scores | query | correlation | slope |\n| --- | --- | --- | --- | --- |")
    for name, settings in rows.items():
        for what, per_example, actual in (("mean of all", False, each.mean(0)[None]), ("each", True, each)):
            report = trainer.influence(
                queries.tensors, per_example=per_example, weight_decay=options.decay, double=True, **settings
            )
            found = report.scores[:, torch.searchsorted(report.indices, left_out)]
            pairs = [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(found, actual, strict=True)]
            slopes = [(a @ b) / (a @ a) for a, b in zip(found, actual, strict=True)]
            cells = (float(torch.stack(pairs).min()), float(torch.stack(slopes).median()))
            print(f"| {options.decay:g} | {name} | {what} | {cells[0]:.4f} | {cells[1]:.3f} |")


if __name__ == "__main__":
    main()
