"""Message-passing networks of chemprop on batches of molecules."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import torch.nn.functional as F
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN
from chemprop.nn import BinaryClassificationFFN, BondMessagePassing, MeanAggregation, RegressionFFN
from torch import Tensor

from . import Case, fitted

ENDS = ("O", "N", "F", "Cl")


def molecules(binary: bool, n: int = 32) -> MoleculeDataset:
    points = []
    for number in range(n):
        smiles = "C" * (1 + number % 6) + ENDS[number % 4]
        value = float(number % 4 < 2) if binary else number % 6 / 3 + (number % 4) / 2
        points.append(MoleculeDatapoint.from_smi(smiles, numpy.array([value])))
    return MoleculeDataset(points)


def train(head: Any, binary: bool, batch_norm: bool, callbacks: list[Any]) -> Any:
    module = MPNN(
        BondMessagePassing(d_h=6, depth=2), MeanAggregation(), head(input_dim=6, hidden_dim=6), batch_norm=batch_norm
    )
    return fitted(module, build_dataloader(molecules(binary), batch_size=8), callbacks)


def predictions(module: Any, batch: Any) -> Tensor:
    return module.predictor.train_step(module.fingerprint(batch.bmg, batch.V_d, batch.X_d))


CASES = [
    Case(
        "MPNN, regression",
        partial(train, RegressionFFN, False, False),
        predictions,
        lambda z, batch: F.mse_loss(z, batch.Y),
    ),
    Case(
        "MPNN with BatchNorm, binary classification",
        partial(train, BinaryClassificationFFN, True, True),
        predictions,
        lambda z, batch: F.binary_cross_entropy_with_logits(z, batch.Y),
    ),
]
