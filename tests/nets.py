"""A small and a larger network of each common kind, with data: solves are tested on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .conftest import Classifier, blobs

__all__ = ["NETS", "Regressor", "Sine", "make"]

TOKENS, LENGTH = 11, 5


def points(n: int) -> TensorDataset:
    return blobs(n)


def sequences(n: int) -> TensorDataset:
    """Sequences of tokens. The class is the count of the most frequent token, modulo 3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(TOKENS, (n, LENGTH), generator=generator)
    return TensorDataset(x, (x < 4).sum(1) % 3)


def series(n: int) -> TensorDataset:
    """Noisy waves of three frequencies, two channels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    time = torch.linspace(0, 3, LENGTH)
    wave = torch.sin(time[None, :, None] * (y[:, None, None] + 1.0) + torch.tensor([0.0, 1.0]))
    return TensorDataset(wave + 0.5 * torch.randn(n, LENGTH, 2, generator=generator), y)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.cell = cell(2, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Cells(nn.Module):
    """A recurrent cell that is called step by step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Transformer(nn.Module):
    """Embeddings, attention, LayerNorm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x) + self.position).mean(1))


class Bag(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).mean(1)))


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, channels, 3, padding=1),
        nn.BatchNorm1d(channels),
        nn.GELU(),
        nn.Conv1d(channels, channels, 3),
        nn.BatchNorm1d(channels),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4 * channels, 3),
    )


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def normalised(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.SiLU(), nn.Dropout(0.5), nn.Linear(width, 3))


# name: (net of a width, small width, larger width, data)
NETS: dict[str, tuple[Callable[[int], nn.Module], int, int, Callable[[int], TensorDataset]]] = {
    "perceptron": (perceptron, 4, 64, points),
    "batchnorm": (convolutions, 2, 24, points),
    "layernorm": (normalised, 4, 96, points),
    "attention": (Transformer, 4, 32, sequences),
    "embedding": (Bag, 4, 48, sequences),
    "gru": (lambda width: Recurrent(nn.GRU, width), 2, 32, series),
    "lstm": (lambda width: Recurrent(nn.LSTM, width), 2, 32, series),
    "cells": (Cells, 2, 32, series),
}


class Regressor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x)[:, 0], y.float())


def make(name: str, n: int, *, large: bool = False) -> tuple[nn.Module, TensorDataset]:
    net, small, larger, data = NETS[name]
    return net(larger if large else small), data(n)


class Sine(torch.autograd.Function):
    """A function whose second derivative PyTorch leaves out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()
