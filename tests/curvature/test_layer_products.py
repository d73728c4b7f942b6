"""Products with many vectors from the Jacobians of layers, against the Gauss–Newton matrix and against passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import attach
from lightning_gif.curvature import by_solver
from lightning_gif.curvature.layer_products import layer_products, saves_time
from lightning_gif.curvature.products import CURVATURES
from lightning_gif.curvature.streaming import Curvature, graph_bytes
from lightning_gif.data.batch import Batch
from lightning_gif.data.examples import Examples
from lightning_gif.errors import ObjectiveError
from lightning_gif.objective import memory, outputs
from lightning_gif.objective.jacobians import _Factors, _Rows, layer_jacobians
from lightning_gif.objective.objective import Objective

from ..conftest import make_trainer


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Regressor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).to(batch[0]))


class Words(nn.Module):
    """A table, a factor, a matrix without a bias that is used twice, and an output whose bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4, padding_idx=0), nn.Parameter(torch.ones(4))
        self.twice, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.table(x) * self.scale)))
        return self.head(hidden.mean(1))


IMAGES, WORDS = torch.randn(20, 2, 6, 6), torch.randint(0, 7, (20, 6))
NETS: dict[str, tuple[Any, Tensor]] = {
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
            *(nn.Conv2d(4, 6, 3, 2, groups=2), nn.GELU(), nn.Conv2d(6, 16, 2), nn.Flatten(), nn.Linear(16, 3)),
        ),
        IMAGES,
    ),
    "words": (Words, WORDS),
}


@contextmanager
def opened(name: str, kind: type[Classifier] = Classifier) -> Iterator[tuple[Objective, Examples]]:
    make, x = NETS[name]
    torch.manual_seed(0)
    module, y = kind(make()), torch.arange(len(x)) % 3
    with Objective.open(make_trainer(), module, double=True) as objective:
        examples = Examples.from_batch((x, y), objective.prepare, batch_size=8)
        yield objective, objective.learn_structure(examples)


@pytest.mark.parametrize(
    ("name", "kind"), [("convolutions", Classifier), ("words", Classifier), ("convolutions", Regressor)]
)
@pytest.mark.parametrize("kept", [0.0, 1e9])
def test_products_are_those_of_the_gauss_newton_matrix(name: str, kind: type[Classifier], kept: float) -> None:
    with opened(name, kind) as (objective, train):
        by_passes = CURVATURES["ggn"](objective)
        expected = Curvature(by_passes, objective.theta, train)
        curvature = Curvature(layer_products(objective, by_passes), objective.theta, train, memory=kept)
        columns = torch.randn(objective.space.size, 5, dtype=objective.theta.dtype)
        torch.testing.assert_close(curvature.matvec(columns), expected.matvec(columns), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            curvature.matvec(columns[:, 0]), expected.matvec(columns[:, 0]), rtol=1e-6, atol=1e-9
        )
        assert curvature.summary()["batches_kept"] == (curvature.summary()["batches"] if kept else 0)
        assert curvature.positive_semidefinite


def test_each_layer_keeps_what_is_small() -> None:
    """A convolution over many positions keeps its Jacobian, and a matrix its inputs and output gradients."""
    with opened("convolutions") as (objective, train):
        layers, batch = objective.layers, next(train.batches())
        assert layers is not None
        ((_, recorded),) = layers.passes(partial(outputs.outputs, layers.together), batch)
        units = [torch.eye(3, dtype=torch.float64)[column].expand(batch.size, 3).reshape(-1) for column in range(3)]
        found = layer_jacobians(recorded, units)
        assert isinstance(found[0], _Rows)
        assert isinstance(found[-1], _Factors)
        # (uᵀJ)v = uᵀ(Jv), for each layer alone
        directions = torch.randn(4, objective.space.size, dtype=torch.float64)
        weights = torch.randn(4, 3, batch.size, dtype=torch.float64)
        for one in found:
            total = torch.zeros_like(directions)
            one.pull(objective.space, weights, total)
            pushed = one.push(objective.space, directions)
            torch.testing.assert_close((total * directions).sum(1), (pushed * weights).sum((1, 2)))


def test_a_loss_that_bypasses_its_predictions_is_refused() -> None:
    with opened("convolutions") as (objective, train):
        objective.loss_sum = lambda theta, batch: theta.square().sum()  # type: ignore[method-assign]
        linearise = layer_products(objective, CURVATURES["ggn"](objective))
        with pytest.raises(
            ObjectiveError, match="the gradient through the predictions is not the gradient of the loss"
        ):
            linearise(objective.theta, next(train.batches()))


def attached(net: nn.Module, x: Tensor) -> tuple[pl.Trainer, Classifier]:
    trainer, module = make_trainer(), Classifier(net)
    attach(trainer, module, train_dataloaders=DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), 16))
    return trainer, module


def convolutions() -> nn.Module:
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 64, 3))
    return nn.Sequential(*layers)


def test_they_are_chosen_where_weights_are_shared_and_for_enough_products() -> None:
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(144, 30), nn.ReLU(), nn.Linear(30, 3))
    for net, expected in ((convolutions(), True), (perceptron, False)):
        module, x = Classifier(net), torch.randn(30, 1, 12, 12)
        with Objective.open(make_trainer(), module) as objective:
            train = Examples.from_batch((x, torch.arange(30) % 3), objective.prepare, batch_size=16)
            objective.learn_structure(train)
            assert saves_time(objective, 30, 20) == expected
            assert not saves_time(objective, 30, 1)
            assert not saves_time(objective, 10**8, 20)  # too many bytes


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("solver", ["cg", "nystrom", "ekfac_cg"])
def test_scores_are_those_of_products_by_passes(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(48, 1, 12, 12)
    trainer, _ = attached(convolutions(), x)
    queries = x[:18], torch.arange(18) % 3

    def scores() -> Tensor:
        options = {"max_iter": 40} if solver == "nystrom" else {}
        return trainer.influence(queries, per_example=True, solver=solver, damping=1.0, double=True, **options).scores

    chosen: list[int] = []
    original = by_solver.layer_products
    monkeypatch.setattr(by_solver, "layer_products", lambda *given: chosen.append(1) or original(*given))
    found = []
    for free in (2**27, 2**37):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        found.append(scores())
    assert len(chosen) == 2
    assert torch.equal(*found)
    monkeypatch.setattr(by_solver, "saves_time", lambda *_: False)
    torch.testing.assert_close(found[0], scores(), rtol=1e-5, atol=1e-9)


def test_the_memory_of_jacobians_is_counted() -> None:
    with opened("convolutions") as (objective, train):
        batch: Batch = next(train.batches())
        product, graphs = layer_products(objective, CURVATURES["ggn"](objective))(objective.theta, batch)
        assert graph_bytes(*graphs) == sum(tensor.nbytes for tensor in graphs)
        assert product(torch.zeros(objective.space.size, 2, dtype=torch.float64)).abs().max() == 0
