"""Self-influence: which matrix it inverts, whatever the module, its size and its curvature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    GIFCallback,
    GIFWarning,
    ObjectiveError,
    attach,
)
from lightning_gif.curvature import by_solver
from lightning_gif.curvature.products import CURVATURES
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .test_influence import damped, gradients, open_trainer


class ByHand(Classifier):
    """A cross-entropy from two evaluations of the net, so that no tensor of the step is its prediction."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        chosen = torch.einsum("bc,bc->b", self(x), (y[:, None] == torch.arange(3)).to(x.dtype))
        return (torch.einsum("bc->b", self(x).cosh() + self(x).sinh()).log() - chosen).mean()


def hessian_of(module: Classifier, dataset: TensorDataset) -> Tensor:
    """The Hessian of the mean cross-entropy in float64, ``(p, p)``."""
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    shapes = {name: value.shape for name, value in module.named_parameters()}
    x, y = dataset.tensors[0].double(), dataset.tensors[1]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(module, values, (x,)), y)

    return torch.autograd.functional.hessian(loss, flat)


def test_with_the_hessian_an_eigenvalue_counts_by_its_size_in_self_influence() -> None:
    module, dataset = ByHand().double(), blobs(60)
    report = open_trainer(module, dataset, weight_decay=0.01).self_influence()
    values, vectors = torch.linalg.eigh(hessian_of(module, dataset))
    assert report.settings["curvature"] == "hessian"
    assert report.curvature["negative_eigenvalues"] == int((values < -1e-9).sum()) > 0
    sizes = torch.hypot(values + 0.01, torch.tensor(report.settings["damping"]))
    decayed = gradients(module, dataset) + 0.01 * torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    expected = (decayed @ vectors).square() @ (1 / sizes) / 59
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-6, atol=1e-9)
    assert report.scores.min() > 0


@contextmanager
def declared_semidefinite() -> Iterator[str]:
    """The name of a curvature that is the Hessian, and wrongly declares to have no negative eigenvalues."""

    def declared(losses: Any) -> Any:
        linearise = CURVATURES["hessian"](losses)
        linearise.positive_semidefinite = True
        return linearise

    CURVATURES.register("declared")(declared)
    try:
        yield "declared"
    finally:
        CURVATURES._items.pop("declared")


def test_a_curvature_wrongly_declared_to_have_no_negative_eigenvalue_is_warned_about() -> None:
    with declared_semidefinite() as name:
        trainer = open_trainer(Classifier().double(), blobs(60), curvature=name, damping=0.01)
        with pytest.warns(ConvergenceWarning, match="'declared' is declared positive semi-definite, but"):
            report = trainer.self_influence()
        with pytest.raises(ConvergenceError, match="Use curvature='hessian'"):
            trainer.self_influence(unconverged="raise")
        expected = trainer.self_influence(curvature="hessian")
    assert report.curvature["status"] == "indefinite"
    assert "status" not in expected.curvature
    torch.testing.assert_close(report.scores, expected.scores)


def test_without_damping_self_influence_leaves_directions_without_curvature_out() -> None:
    module, dataset = Classifier().double(), blobs(60)
    report = open_trainer(module, dataset, damping=0.0).self_influence()
    rows, _ = damped(module, dataset, 1.0)
    ggn = torch.linalg.inv(damped(module, dataset, 1.0)[1]) - torch.eye(rows.shape[1], dtype=rows.dtype)
    expected = torch.einsum("np,pq,nq->n", rows, torch.linalg.pinv(ggn, hermitian=True, rtol=1e-11), rows) / 59
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-4, atol=1e-9)


class Wide(ByHand):
    """More parameters than self-influence forms a matrix of."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 120), nn.Tanh(), nn.Linear(120, 3)))


def test_self_influence_has_a_default_for_many_parameters_and_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, module, _ = fitted(Wide())
    assert sum(parameter.numel() for parameter in module.parameters()) > by_solver.DENSE_PARAMETERS
    report = trainer.self_influence()
    assert report.settings["curvature"] == "hessian"
    assert report.scores.min() > 0
    assert report.curvature["negative_eigenvalues"] > 0
    assert report.curvature["products"] == 2 * 64 + 3
    assert trainer.self_influence(solver="lsmr").scores.min() > 0
    monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", 10_000)
    exact = trainer.self_influence()
    assert (report.scores > 0.999 * exact.scores).all()
    assert torch.corrcoef(torch.cat([report.scores, exact.scores]).argsort().argsort().double())[0, 1] > 0.8


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.02}, {"weight_decay": 0.02, "damping": 0.0}])
def test_a_sketch_of_full_rank_is_exact_for_the_hessian(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, dataset = ByHand().double(), blobs(60)
    trainer = open_trainer(module, dataset, max_iter=83, **options)
    exact = trainer.self_influence()
    monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", 1)
    sketch = trainer.self_influence()
    torch.testing.assert_close(sketch.scores, exact.scores, rtol=1e-6, atol=1e-9)
    assert sketch.curvature["negative_eigenvalues"] == exact.curvature["negative_eigenvalues"] > 0


def test_self_influence_without_any_curvature_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return -self.net[0](x).gather(1, y[:, None]).mean()

    trainer = open_trainer(Linear(nn.Sequential(nn.Linear(6, 3))), blobs(30))
    for limit in (1024, 1):
        monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", limit)
        with pytest.warns(GIFWarning, match="curvature of the training loss is exactly zero"):
            assert not trainer.self_influence().scores.any()


def test_each_remedy_that_a_message_about_self_influence_names_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", 1)
    dataset = blobs(60)
    by_hand = open_trainer(ByHand(), dataset)
    query = batch_of(dataset, slice(0, 4))

    def works(scores: Any) -> None:
        assert scores.scores.isfinite().all()

    with pytest.raises(ConfigurationError, match="Omit `damping`"):
        by_hand.self_influence(damping=0.0)
    works(by_hand.self_influence())
    with pytest.raises(ConfigurationError, match="Use solver='lsmr'"):
        by_hand.influence(query, solver="nystrom")
    works(by_hand.influence(query, solver="lsmr"))
    with pytest.raises(ObjectiveError, match="use curvature='hessian'"):
        by_hand.self_influence(curvature="ggn")
    works(by_hand.self_influence(curvature="hessian"))
    with declared_semidefinite() as name:
        with pytest.raises(ConfigurationError, match="For self-influence, use curvature='hessian'"):
            by_hand.self_influence(curvature=name)
        works(by_hand.self_influence(curvature="hessian"))
    with pytest.raises(ConfigurationError, match=r"trainer\.self_influence\(method='if'\)"):
        by_hand.self_influence(method="gif")
    works(by_hand.self_influence(method="if"))


def convolutions() -> nn.Module:
    layers = (nn.Conv1d(8, 300, 28), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(300, 3))
    return nn.Sequential(nn.Unflatten(1, (8, 64)), *layers)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 130), nn.Tanh(), nn.Linear(130, 3))


@pytest.mark.parametrize(("net", "forms_jacobians"), [(convolutions, True), (perceptron, False)])
def test_jacobians_are_formed_where_weights_are_shared(net: Any, forms_jacobians: bool) -> None:
    """Products with the Jacobians of a perceptron take longer than passes through it."""
    dataset, trainer = blobs(30, 512), make_trainer()
    module = Classifier(net())
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=30)
        objective.learn_structure(train)
        settings = GIFCallback(curvature="ggn", max_iter=64).settings
        assert by_solver.SketchInverse.uses_jacobians(objective, settings, 30) == forms_jacobians
        assert not by_solver.SketchInverse.uses_jacobians(objective, settings, 10**6)  # more than 2 GiB


@pytest.mark.slow
def test_self_influence_of_few_examples_passes_through_each_example_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dataset = Classifier(convolutions()), blobs(30, 512)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(dataset))
    passes: list[int] = []
    original = by_solver.open_curvature

    def counted(*args: Any, **options: Any) -> Any:
        curvature = original(*args, **options)
        linearise = curvature._linearise
        curvature._linearise = lambda theta, batch: passes.append(batch.size) or linearise(theta, batch)
        return curvature

    monkeypatch.setattr(by_solver, "open_curvature", counted)
    scores = trainer.self_influence(solver="cg").scores
    assert sum(passes) == len(dataset)
    monkeypatch.setattr(by_solver, "saves_time", lambda *_: False)
    for most in (by_solver._JACOBIAN_BYTES, 0):  # from the Jacobians of single examples, and by products
        monkeypatch.setattr(by_solver, "_JACOBIAN_BYTES", most)
        torch.testing.assert_close(scores, trainer.self_influence(solver="cg").scores, rtol=1e-3, atol=0)


def test_the_default_is_ekfac_where_all_parameters_are_in_linear_layers() -> None:
    module, dataset = Classifier(convolutions()), blobs(30, 512)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(dataset))
    report = trainer.self_influence()
    assert report.curvature["inverse"] == "ekfac"
    assert torch.equal(report.scores, trainer.self_influence(solver="ekfac").scores)
    assert trainer.self_influence(max_iter=8).curvature["inverse"] == "sketch of rank 8"
