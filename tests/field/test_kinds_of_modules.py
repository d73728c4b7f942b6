"""Layers and steps that modules composed at random have shown to matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_gif import GIFCallback

from ..conftest import blobs, make_trainer, same_weights, weights
from .reference import Module

DATA = blobs(40)
EXAMPLES = [(x.double(), y) for x, y in zip(*DATA.tensors, strict=True)]


class Plain(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("selector", ["highest_k_gradients", "largest_gradients"])
def test_a_weight_that_changes_buffers_when_it_is_read_is_not_read_in_training(selector: str) -> None:
    """Spectral normalisation takes a step of its power iteration at each reading of the weight."""
    trained = []
    for callback in (None, GIFCallback(selector, ratio=0.5)):
        torch.manual_seed(0)
        module = Plain()
        module.net[0] = parametrizations.spectral_norm(module.net[0])
        module.net[2] = nn.utils.spectral_norm(module.net[2])
        make_trainer(callback, max_epochs=2).fit(module, DataLoader(DATA, 8))
        trained.append(weights(module))
    assert same_weights(*trained)
