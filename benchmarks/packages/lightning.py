"""Lightning's own demo modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import Tensor
from torch.utils.data import TensorDataset

from . import Case, fitted

VOCABULARY = 12


def texts(n: int = 24, length: int = 6) -> TensorDataset:
    """Texts that count upwards with some noise, and the same texts one token later."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(VOCABULARY, (n, 1), generator=generator)
    noise = torch.randint(2, (n, length + 1), generator=generator)
    tokens = (start + torch.arange(length + 1) + noise) % VOCABULARY
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def boring(callbacks: list[Any]) -> Any:
    return fitted(BoringModel(), RandomDataset(32, 40), callbacks)


class SmallTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """Downloads nothing."""


class SmallLSTM(LightningLSTM):
    def prepare_data(self) -> None:
        """Downloads nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def transformer(callbacks: list[Any]) -> Any:
    module = SmallTransformer(VOCABULARY)
    module.model = Transformer(VOCABULARY, ninp=8, nhid=8, nlayers=1)
    return fitted(module, texts(), callbacks)


def lstm(callbacks: list[Any]) -> Any:
    module = SmallLSTM(VOCABULARY)
    module.model = type(module.model)(VOCABULARY, ninp=8, nhid=8, nlayers=1, dropout=0.0)
    return fitted(module, texts(), callbacks)


def nll(logs: Tensor, batch: Any) -> Tensor:
    return F.nll_loss(logs.log_softmax(-1), batch[1].reshape(-1))


def lstm_logits(module: Any, batch: Any) -> Tensor:
    return module.model(batch[0], module.model.init_hidden(len(batch[0])))[0]


CASES = [
    Case("BoringModel", boring, lambda module, x: module(x), lambda z, x: F.mse_loss(z, torch.ones_like(z))),
    Case("LightningTransformer", transformer, lambda module, batch: module(*batch), nll),
    Case("LightningLSTM", lstm, lstm_logits, nll),
]
