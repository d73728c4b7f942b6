"""The counted memory against sums by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.inspection.peak import PeakMemory

from ..conftest import Classifier, make_trainer

KIB = 1024
OF_FLOATS = 4 * KIB  # the bytes of 1024 of them


def test_tensors_count_while_they_live() -> None:
    before = torch.ones(KIB)
    with PeakMemory() as memory:
        first = before + 1
        assert memory.live == OF_FLOATS
        second = first * 2
        del first
        third = second - 1
    assert memory.live == memory.peak == 2 * OF_FLOATS
    del second, third
    assert memory.live == 0


def test_views_and_changes_in_place_need_nothing() -> None:
    with PeakMemory() as memory:
        made = torch.zeros(KIB)
        views = made.view(32, 32), made[:10], made.T
        made.add_(1)
        views[0].mul_(2)
    assert memory.peak == OF_FLOATS


def test_what_a_backward_pass_needs_counts() -> None:
    x = torch.ones(KIB, requires_grad=True)
    with PeakMemory() as memory:
        y = x.exp().sin()  # both results are kept for the backward pass
        assert memory.live >= 2 * OF_FLOATS
        y.sum().backward()
        del y
    assert x.grad is not None
    assert memory.live == OF_FLOATS  # the gradient


def test_results_of_vmap_count_for_all_examples() -> None:
    x = torch.ones(16, KIB)
    with PeakMemory() as memory:
        torch.vmap(torch.exp)(x)
    assert memory.peak >= 16 * OF_FLOATS


def test_sparse_tensors_are_left_out() -> None:
    with PeakMemory() as memory:
        torch.eye(3).to_sparse() * 2
    assert memory.peak < KIB


class Images(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)
        )


@pytest.mark.slow
def test_the_predicted_memory_of_a_call_is_what_it_needs() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 1, 14, 14)
    y = F.adaptive_avg_pool2d(x, 2).flatten(1).argmax(1)
    trainer = make_trainer(GIFCallback(), max_epochs=1)
    trainer.fit(Images(), DataLoader(TensorDataset(x, y), 64))
    query = x[:20], y[:20]
    calls = (
        lambda: trainer.influence(query),
        lambda: trainer.influence(query, per_example=True),
        lambda: trainer.self_influence(),
        lambda: trainer.unlearn(range(50), dry_run=True),
    )
    for cost, call in zip(trainer.influence.check(n_queries=20, n_forget=50).costs, calls, strict=True):
        with PeakMemory() as memory:
            call()
        assert 0.7 < cost.gib * 2**30 / memory.peak < 1.4, cost.call
