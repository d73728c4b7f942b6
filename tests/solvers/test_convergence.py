"""Solves that are given nothing but the solver's name converge: on every kind of net, early in training and at its end.

The Hessians are indefinite all along; where the loss is low they are ill-conditioned as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, InfluenceReport, UnlearnReport
from lightning_gif.selection.statistics import neuron_layers
from lightning_gif.solvers.solution import Status

from ..conftest import Classifier, batch_of, loader, make_trainer
from ..nets import NETS, make

ALL_SOLVERS = pytest.mark.parametrize("solver", ["lissa", "lsmr", "cgls"])
# A net is trained once, by the worker that has all its tests.
ALL_NETS = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NETS])
BOTH_FITS = pytest.mark.parametrize("long", [False, True], ids=["short", "long"])

# The losses of recurrent networks are computed one example at a time, or little faster.
EXAMPLES = dict.fromkeys(NETS, 96) | {"gru": 24, "lstm": 48, "cells": 9}

# Without an rtol, unlearning makes a fixed number of iterations.
RTOL = 1e-2

# The training that separates the classes by a mean of embeddings.
LEARNING_RATES = dict.fromkeys(NETS, 0.01) | {"embedding": 0.05}


class WithAdam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


class Trained(NamedTuple):
    trainer: pl.Trainer
    dataset: TensorDataset

    @property
    def query(self) -> tuple[Tensor, ...]:
        return batch_of(self.dataset, slice(0, 8))

    @property
    def one_class(self) -> tuple[Tensor, ...]:
        return batch_of(self.dataset, self.dataset.tensors[1] == 0)


@cache
def trained(name: str, long: bool) -> Trained:
    """A net after 3 epochs of SGD or 40 of Adam, once for all tests."""
    torch.manual_seed(0)
    net, dataset = make(name, EXAMPLES[name], large=True)
    module = WithAdam(net, LEARNING_RATES[name]) if long else Classifier(net)
    if name == "attention":  # LiSSA takes more than 400 iterations with targets in the projections of the inputs
        module.influence_parameters = lambda: [f"{layer}.*" for layer in neuron_layers(module)]
    trainer = make_trainer(GIFCallback(unconverged="raise", cache_steps=None), max_epochs=40 if long else 3)
    trainer.fit(module, loader(dataset))
    return Trained(trainer, dataset)


def check_influence(report: InfluenceReport, solver: str) -> None:
    found = report.solution
    assert found.solver == solver
    assert found.status is Status.CONVERGED
    assert found.residual <= found.rtol == 1e-3
    assert torch.isfinite(found.x).all()
    assert torch.isfinite(report.scores).all()
    assert report.scores.any()


def check_edit(report: UnlearnReport, solver: str) -> None:
    for found in report.solves:
        assert found["solver"] == solver
        assert found["status"] == "converged"
        assert found["residual"] <= found["rtol"] == RTOL
    assert all(torch.isfinite(new).all() for new in report.edit.new.values())
    changed = any((report.edit.new[name] != old).any() for name, old in report.edit.old.items())
    assert changed == any(report.step_sizes)  # no step, if no allowed step size forgets anything
    assert torch.isfinite(torch.tensor([report.forget.after, report.retain.after])).all()


@pytest.mark.mostly_slow(7)
@ALL_SOLVERS
@BOTH_FITS
@ALL_NETS
def test_influence_converges_on_every_net(name: str, long: bool, solver: str) -> None:
    net = trained(name, long)
    check_influence(net.trainer.influence(net.query, method="gif", solver=solver), solver)


@pytest.mark.mostly_slow(7)
@BOTH_FITS
@ALL_NETS
def test_default_scores_of_every_net_come_from_a_convex_curvature(name: str, long: bool) -> None:
    report = trained(name, long).trainer.influence(trained(name, long).query)
    assert report.curvature["kind"] == "ggn"
    assert report.solution.solver in ("cg", "ekfac_cg")  # EK-FAC for nets with more than 1024 parameters, all in layers
    assert report.solution.status in (Status.CONVERGED, Status.MAX_ITER)
    assert report.solution.residual < 0.3
    assert torch.isfinite(report.scores).all()
    assert report.scores.any()


@pytest.mark.mostly_slow(7)
@ALL_SOLVERS
@BOTH_FITS
@ALL_NETS
def test_forgetting_a_class_converges_on_every_net(name: str, long: bool, solver: str) -> None:
    net = trained(name, long)
    check_edit(net.trainer.unlearn(net.one_class, solver=solver, rtol=RTOL, step="search", dry_run=True), solver)


@pytest.mark.mostly_slow(2)
@pytest.mark.xdist_group("gru")
@ALL_SOLVERS
@BOTH_FITS
def test_solves_for_all_weights_of_a_recurrent_net_converge(long: bool, solver: str) -> None:
    """By default a share of the weights are targets."""
    net = trained("gru", long)
    check_influence(net.trainer.influence(net.query, method="gif", solver=solver, selector=["*"]), solver)
    check_edit(
        net.trainer.unlearn(net.one_class, solver=solver, selector=["*"], rtol=RTOL, step="search", dry_run=True),
        solver,
    )


@pytest.mark.mostly_slow(7)
@BOTH_FITS
@pytest.mark.parametrize(
    "name",  # "cells" is the same function as "gru"
    [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NETS if n != "cells"],
)
def test_the_hessians_of_these_nets_are_indefinite(name: str, long: bool) -> None:
    net = trained(name, long)
    ends = net.trainer.influence(net.query, curvature="hessian", eigenvalues=1).curvature
    assert ends["largest"][0] > 0
    assert ends["smallest"][0] < -1e-4 * ends["largest"][0]


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", ["perceptron", "attention", "embedding", "gru"])
def test_all_solvers_agree_with_dense_algebra(name: str) -> None:
    net, dataset = make(name, 12)
    trainer = make_trainer(GIFCallback(ratio=0.5, unconverged="raise"))
    trainer.fit(Classifier(net), loader(dataset))
    small = Trained(trainer, dataset)
    options: dict[str, Any] = {"damping": 0.1, "rtol": 1e-8, "max_iter": 2000, "double": True}

    def answers(solver: str) -> tuple[Tensor, Tensor]:
        scores = trainer.influence(small.query, method="gif", solver=solver, **options).scores
        report = trainer.unlearn(small.one_class, solver=solver, step="natural", dry_run=True, **options)
        return scores, torch.cat([report.edit.new[name] - old for name, old in report.edit.old.items()])

    scores, change = answers("dense")
    for solver in ("lissa", "lsmr", "cgls"):
        found_scores, found_change = answers(solver)
        assert (found_scores - scores).norm() < 1e-6 * scores.norm()
        assert (found_change - change).norm() < 1e-5 * change.norm()  # of weights in float32
