"""Targets are found in every kind of parameter, as many as ``ratio`` asks for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.selection import SELECTORS, energy_of

from ..conftest import make_trainer
from .reference import Module, fitted

N, RATIO = 60, 0.2
Y = torch.arange(N) % 3
WORDS = Y[:, None] * 4 + torch.randint(0, 4, (N, 5), generator=torch.Generator().manual_seed(0))
POINTS = F.one_hot(Y, 3).repeat(1, 2) * 2 + torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
IMAGES = POINTS.view(N, 1, 2, 3)


class InByOut(nn.Module):
    """A layer with the weight laid out as inputs × outputs, as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.cells = kind(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(x))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3) * 0.1)
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.offset


NETS: dict[str, tuple[Any, Tensor]] = {
    "in by out": (lambda: nn.Sequential(InByOut(6, 8), nn.Tanh(), InByOut(8, 3)), POINTS),
    "LSTM": (lambda: Recurrent(nn.LSTM), WORDS),
    "GRU": (lambda: Recurrent(nn.GRU), WORDS),
    "embedding": (lambda: nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(40, 3)), WORDS),
    "attention": (Attention, WORDS),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        IMAGES,
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), weight_norm(nn.Linear(8, 3))),
        POINTS,
    ),
    "bare": (Bare, POINTS),
}


class Net(Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = NETS[name][0]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02)


def picked(trainer: Any) -> dict[str, Tensor]:
    return dict(trainer.callbacks[0].targets)


@pytest.mark.mostly_slow(16)
@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "threshold" and energy_of(name) is None])
@pytest.mark.parametrize("name", list(NETS))
def test_at_least_half_of_the_share_that_ratio_asks_for_is_picked(name: str, selector: str) -> None:
    module = Net(name)
    trainer = make_trainer(GIFCallback(selector, ratio=RATIO), max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(TensorDataset(NETS[name][1], Y), 20))
    targets, total = picked(trainer), sum(parameter.numel() for parameter in module.parameters())
    for parameter, entries in targets.items():
        assert len(entries.unique()) == len(entries)
        assert torch.isin(entries, torch.arange(module.get_parameter(parameter).numel())).all()
    count = sum(map(len, targets.values()))
    assert 0.5 * RATIO * total <= count <= RATIO * total


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", list(NETS))
def test_a_class_is_forgotten_by_changing_them(name: str) -> None:
    module = Net(name)
    x = NETS[name][1]
    trainer = fitted(module, TensorDataset(x, Y), epochs=20)
    with torch.no_grad():
        assert (module.net(x).argmax(1) == Y).float().mean() > 0.9
    trainer.unlearn((Y == 1).nonzero().flatten().tolist())
    with torch.no_grad():
        right = (module.net(x).argmax(1) == Y).float()
    assert right[Y == 1].mean() < 0.1
    assert right[Y != 1].mean() > 0.9


def test_units_of_a_layer_laid_out_as_inputs_by_outputs_are_its_outputs() -> None:
    """With a ratio of one unit, the entries of one column of the weight are picked."""
    torch.manual_seed(0)
    module = Module()
    module.net = nn.Sequential(InByOut(6, 8))
    module.training_step = lambda batch, batch_idx: F.mse_loss(module.net(batch[0])[:, :1], batch[0][:, :1])
    trainer = make_trainer(GIFCallback("highest_k_gradients", ratio=1 / 8), max_epochs=1)
    trainer.fit(module, torch.utils.data.DataLoader(TensorDataset(POINTS, Y), 20))
    entries = picked(trainer)["net.0.weight"]
    assert entries.tolist() == [8 * row for row in range(6)]  # only the first output has a gradient


def test_rows_of_words_that_never_occur_are_picked_last() -> None:
    module = Net("embedding")
    x = NETS["embedding"][1].clamp(max=9)
    trainer = make_trainer(GIFCallback("highest_k_gradients", ratio=0.5), max_epochs=1)
    with torch.no_grad():
        module.net[2].requires_grad_(False)
    trainer.fit(module, torch.utils.data.DataLoader(TensorDataset(x, Y), 20))
    rows = (picked(trainer)["net.0.weight"] // 8).unique()
    assert len(rows) == math.floor(0.5 * 12)
    assert not torch.isin(rows, torch.tensor([10, 11])).any()
