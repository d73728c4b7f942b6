"""The check of a module says what the calls after it do."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import (
    SOLVERS,
    ConfigurationError,
    GIFCallback,
    GIFWarning,
    ObjectiveError,
    TrainingDataError,
    attach,
)
from lightning_gif.reports import CheckReport

from ..conftest import make_trainer

N = 60
X, Y = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
DATA = TensorDataset(X, Y)


class Net(pl.LightningModule):
    """Logistic regression on features, with a frozen first layer if asked for."""

    reduction = "mean"

    def __init__(self, width: int = 8, *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        self.net[0].requires_grad_(not frozen)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Sum(Net):
    reduction = "sum"


class Coupled(Net):
    """Its loss depends on the mean of a batch."""

    def training_step(self, batch: Any) -> Tensor:
        z = self.net(batch[0])
        return F.cross_entropy(z + z.mean(0), batch[1])


class Doubled(Net):
    """It defines losses that are twice those of its step."""

    def influence_loss(self, batch: Any) -> Tensor:
        return 2 * F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class HeadOnly(Net):
    def influence_parameters(self) -> list[str]:
        return ["net.2.bias"]


def trained(module: pl.LightningModule, **options: Any) -> pl.Trainer:
    trainer = make_trainer(GIFCallback(**options), max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        trainer.fit(module, DataLoader(DATA, 8))
    return trainer


@pytest.mark.parametrize(("module", "reduction"), [(Net, "mean"), (Sum, "sum")])
def test_the_losses_agree_with_the_step(module: type[Net], reduction: str) -> None:
    report = trained(module()).influence.check()
    assert report.agreement.reduction == reduction
    assert report.agreement.difference < 1e-5
    assert report.losses == "training_step, vectorised over examples"
    assert report.curvature == {"scores": "ggn", "edits": "ggn"}
    assert report.matches
    assert report.warnings == []


def test_losses_of_another_size_than_the_step_show() -> None:
    report = trained(Doubled()).influence.check()
    assert report.losses == "influence_loss"
    assert report.agreement.difference == pytest.approx(0.5, rel=1e-4)
    assert "differs by 50.0% from the mean" in str(report)
    assert any("not those of training_step" in message for message in report.warnings)


def test_coupled_losses_are_in_the_warnings_of_the_report_and_only_there() -> None:
    trainer = trained(Coupled())
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        report = trainer.influence.check()
    assert any("coupled" in message for message in report.warnings)
    assert "warning: " in str(report)


def test_the_layers_have_the_targets_of_an_edit() -> None:
    trainer = trained(Net(), ratio=0.25)
    report = trainer.influence.check()
    edit = trainer.unlearn([0, 3], dry_run=True, targets="cached", step="natural").edit
    assert report.n_targets == sum(map(len, edit.indices.values()))
    assert [(layer.name, layer.kind, layer.size) for layer in report.layers] == [
        ("net.0", "Linear", 56),
        ("net.2", "Linear", 27),
    ]
    assert report.n_parameters == 83


def test_a_subset_is_named() -> None:
    trainer = make_trainer(GIFCallback(), max_epochs=1)
    trainer.fit(Net(), DataLoader(Subset(DATA, range(40, 60)), 8))
    report = trainer.influence.check()
    assert "positions in the Subset" in str(report)
    with pytest.raises(TrainingDataError, match=r"from 0 to 19. These are positions in a Subset.*Subset\(dataset, in"):
        trainer.unlearn([45], dry_run=True)
    assert trainer.unlearn(DataLoader(Subset(DATA, [45]), 64), step="natural", dry_run=True).data["indices"] == [5]


def test_frozen_layers_are_left_out() -> None:
    assert [layer.name for layer in trained(Net(frozen=True)).influence.check().layers] == ["net.2"]


def test_few_targets_are_warned_of_with_the_layers_without_any() -> None:
    report = trained(HeadOnly(), ratio=0.5).influence.check()
    assert report.n_targets < 0.25 * report.n_parameters
    (message,) = report.warnings
    assert "no target parameters: net.0" in message
    assert "influence_parameters" in message
    named = trained(HeadOnly(), selector=["net.2.bias"]).influence.check()  # parameters that the user has named
    assert named.warnings == []
    assert named.n_targets == 3


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("width", [8, 200])  # the curvature matrix is formed for 83 parameters, and not for 2003
@pytest.mark.parametrize("queries", [1, 20])
def test_the_products_are_those_of_the_calls(width: int, queries: int) -> None:
    trainer = trained(Net(width))
    report = trainer.influence.check(n_queries=queries)
    query, itself = report.costs[-3], report.costs[-2]
    made = trainer.influence([X[:queries], Y[:queries]], per_example=True)
    # A solve that converges early takes fewer products.
    early = any(solution.converged for solution in made.solutions)
    products = made.n_states * made.curvature["products"]  # those of the present state in a report
    assert products == query.products or (early and products < query.products)
    assert trainer.self_influence().curvature["products"] == itself.products
    edit = trainer.unlearn([0, 3], dry_run=True)
    solve = edit.solves[0]
    made, expected = solve["hvps"], report.costs[-1].products
    assert made == expected or (solve["status"] == "converged" and made < expected)


def test_the_products_that_measure_an_unknown_damping_are_predicted() -> None:
    trainer = make_trainer(GIFCallback())
    attach(trainer, Net(), train_dataloaders=DataLoader(DATA, 8))
    edit = trainer.unlearn([0, 3], dry_run=True, rtol=1e-12, max_iter=8, unconverged="ignore")
    assert edit.curvature["products"] == trainer.influence.check().costs[-1].products


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_has_estimates_of_the_calls_that_it_serves(solver: str) -> None:
    trainer = trained(Net(), solver=solver, unconverged="ignore")
    calls = [cost.call.partition("(")[0].partition(" of")[0] for cost in trainer.influence.check().costs]
    assert calls[:2] == ["trainer.influence", "trainer.self_influence"]
    trainer.influence([X[:1], Y[:1]])
    try:
        trainer.unlearn([0, 3], dry_run=True)
    except ConfigurationError:
        assert calls[2:] == []
    else:
        assert calls[2:] == ["trainer.unlearn"]


def test_costs_are_positive_and_grow_with_what_is_asked_for() -> None:
    trainer = trained(Net())
    for cost in trainer.influence.check().costs:
        assert cost.seconds > 0
        assert math.isfinite(cost.seconds)
        assert cost.gib > 0
    one, many = trainer.influence.check(n_queries=40).costs[:2]
    assert many.products > one.products


def test_scores_over_several_states_cost_as_many_times_the_products() -> None:
    products = []
    for snapshots in (0, 1, 3):
        trainer = make_trainer(GIFCallback(snapshots=snapshots, unconverged="ignore"), max_epochs=9)
        trainer.fit(Net(), DataLoader(DATA, 20))
        query, itself, *_ = trainer.influence.check().costs
        products.append((query.products, itself.products))
        assert len(trainer.influence([X[:1], Y[:1]]).settings["snapshots"]) == snapshots
    (once, itself), *others = products
    assert others == [(2 * once, itself), (4 * once, itself)]


def test_the_report_is_text_and_plain_values() -> None:
    report = trained(Net()).influence.check()
    assert json.loads(json.dumps(report.to_dict()))["module"] == "Net"
    assert repr(report) == str(report)  # as a notebook shows it
    for part in ("60 training examples, 83 trainable", "losses of single examples", "trainer.unlearn of 59 examples"):
        assert part in str(report)


def test_nothing_changes() -> None:
    module = Net()
    trainer = trained(module)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    trainer.influence.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_module_that_is_refused_is_refused_with_the_reason() -> None:
    class NoLoss(Net):
        def training_step(self, batch: Any) -> Any:
            return "no loss"

    trainer = make_trainer(GIFCallback())
    attach(trainer, NoLoss(), train_dataloaders=DataLoader(DATA, 8))
    with pytest.raises(ObjectiveError, match="must return a scalar loss"):
        trainer.influence.check()


def test_the_bound_method_can_be_pickled_and_lists_its_check() -> None:
    callback = GIFCallback()
    trainer = make_trainer(callback)
    attach(trainer, Net(), train_dataloaders=DataLoader(DATA, 8), callback=callback)
    assert isinstance(trainer.influence.check(), CheckReport)
    assert isinstance(pickle.loads(pickle.dumps(trainer.influence)).check(), CheckReport)
