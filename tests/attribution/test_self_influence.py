"""Self-influence: which matrix it inverts, whatever the module, its size and its curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import ConvergenceError, ConvergenceWarning
from lightning_gif.curvature.products import CURVATURES

from ..conftest import Classifier, blobs
from .test_influence import damped, gradients, open_trainer


class ByHand(Classifier):
    """Its loss is not a loss function of PyTorch, so it has no Gauss–Newton matrix."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean()


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


def test_a_curvature_wrongly_declared_to_have_no_negative_eigenvalue_is_warned_about() -> None:
    def declared(losses: Any) -> Any:
        linearise = CURVATURES["hessian"](losses)
        linearise.positive_semidefinite = True
        return linearise

    CURVATURES.register("declared")(declared)
    try:
        trainer = open_trainer(Classifier().double(), blobs(60), curvature="declared", damping=0.01)
        with pytest.warns(ConvergenceWarning, match="'declared' is declared positive semi-definite, but"):
            report = trainer.self_influence()
        with pytest.raises(ConvergenceError, match="Use curvature='hessian'"):
            trainer.self_influence(unconverged="raise")
        expected = trainer.self_influence(curvature="hessian")
    finally:
        CURVATURES._items.pop("declared")
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
