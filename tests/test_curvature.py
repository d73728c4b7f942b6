"""The Hessian, its parts, and the four methods against dense matrices in float64 on nets with indefinite Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gif import METHODS, SOLVERS, GIFCallback, ObjectiveError, attach
from lightning_gif.curvature import Hessian, Submatrix
from lightning_gif.data import Examples
from lightning_gif.objective import Objective
from lightning_gif.parameters import Targets
from lightning_gif.solvers import dense, lissa, to_matrix

from .conftest import Classifier, blobs, loader, make_trainer

NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)
    ),
    "norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.SiLU(), nn.Dropout(0.5), nn.Linear(4, 3)),
}


@contextmanager
def opened(net: str = "mlp", n: int = 23, batch_size: int = 23) -> Iterator[tuple[Objective, Examples]]:
    """An untrained float64 net, whose Hessian is indefinite, and its data."""
    module = Classifier(NETS[net]()).double()
    dataset = blobs(n)
    trainer = make_trainer(precision="64-true")
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module) as objective:
        yield objective, Examples.from_loader(loader(dataset), objective.prepare, batch_size=batch_size)


def dense_hessian(objective: Objective, examples: Examples) -> Tensor:
    """By autograd on a loss that is written out here, not derived by the objective."""
    data = [batch.data for batch in examples.batches()]
    x, y = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])

    def loss(theta: Tensor) -> Tensor:
        parameters = objective.space.unflatten(theta)
        logits = torch.func.functional_call(objective.module, parameters, (x,))
        return F.cross_entropy(logits, y)

    return torch.autograd.functional.hessian(loss, objective.theta)


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_a_product_is_that_of_the_dense_hessian_whatever_the_batches(net: str, batch_size: int) -> None:
    with opened(net, batch_size=batch_size) as (objective, train):
        matrix = dense_hessian(objective, train)
        assert torch.linalg.eigvalsh(matrix).min() < -1e-3  # the case that matters
        found = to_matrix(Hessian(objective.loss_sum, objective.theta, train))
        torch.testing.assert_close(found, matrix, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_linear_in_the_parameters_has_no_curvature() -> None:
    class Linear(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum(1).mean()

    module = Linear(nn.Linear(6, 3))
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(blobs()))
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(blobs()), objective.prepare, batch_size=16)
        assert not Hessian(objective.loss_sum, objective.theta, train).matvec(objective.theta).any()


def test_rows_and_columns_are_those_of_the_matrix() -> None:
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        matrix = to_matrix(hessian)
        rows, cols = torch.tensor([0, 3, 40]), torch.tensor([1, 2, 5, 52])
        for r, c in ((rows, cols), (None, cols), (rows, None), (None, None)):
            part = Submatrix(hessian, r, c)
            expected = matrix[slice(None) if r is None else r][:, slice(None) if c is None else c]
            torch.testing.assert_close(to_matrix(part), expected)
            torch.testing.assert_close(to_matrix(part.T), expected.T)
            vector = torch.randn(expected.shape[0], dtype=torch.float64)
            torch.testing.assert_close(part.rmatvec(vector), expected.T @ vector)


def test_every_product_is_counted() -> None:
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        part = Submatrix(hessian, None, torch.tensor([1, 2]))
        part.rmatvec(part.matvec(torch.ones(2, dtype=torch.float64)))
        part.T.matvec(objective.theta)
        assert hessian.products == part.products == 3


def some_targets(objective: Objective) -> Tensor:
    return Targets({"net.0.weight": torch.arange(3, 14), "net.2.bias": torch.tensor([0, 2])}).flat(objective.space)


def dense_edit(method: str, matrix: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """The table of methods, written out."""
    if method == "gif":
        a = matrix[:, s]
        return torch.linalg.solve(a.T @ a, a.T @ g)
    if method == "fif":
        return torch.linalg.solve(matrix[s][:, s], g[s])
    return torch.linalg.pinv(matrix, rtol=1e-9) @ g if method == "if" else (torch.linalg.pinv(matrix, rtol=1e-9) @ g)[s]


def precise(solver: str) -> Any:
    return lambda operator, rhs: SOLVERS[solver](operator, rhs, damping=0.0, rtol=1e-12, max_iter=200_000, seed=0)


# The full Hessian of a softmax net is singular (the logits' common shift), and close to it in many directions: lissa
# gets there, but by very many steps. The methods that invert the whole of it are checked with the dense solver.
@pytest.mark.parametrize(
    ("method", "solver"),
    [("gif", "lissa"), ("fif", "lissa"), *((method, "dense") for method in ("gif", "fif", "pif", "if"))],
)
def test_methods_agree_with_dense_algebra_on_an_indefinite_hessian(method: str, solver: str) -> None:
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        matrix = dense_hessian(objective, train)
        targets = some_targets(objective) if METHODS[method].selects else torch.arange(objective.space.size)
        gradient = matrix @ torch.randn(objective.space.size, dtype=torch.float64)
        gradient += 0.1 * torch.randn_like(gradient) if method in ("gif", "fif") else 0.0
        change, solution = METHODS[method].edit(hessian, targets, gradient, precise(solver))
        expected = dense_edit(method, matrix, targets, gradient)
        assert float((change - expected).norm() / expected.norm()) < 1e-6
        assert solution.residual < 1e-8


@pytest.mark.parametrize("method", ["pif", "if"])
def test_lissa_inverts_a_damped_full_hessian(method: str) -> None:
    with opened() as (objective, train):
        matrix = dense_hessian(objective, train)
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        targets = some_targets(objective) if method == "pif" else torch.arange(objective.space.size)
        gradient = torch.randn(objective.space.size, dtype=torch.float64)
        change, _ = METHODS[method].edit(
            hessian, targets, gradient, lambda a, b: lissa(a, b, damping=0.05, rtol=1e-11, max_iter=50_000)
        )
        normal = matrix @ matrix + 0.05**2 * torch.eye(len(matrix), dtype=torch.float64)
        expected = torch.linalg.solve(normal, matrix @ gradient)[targets]
        assert float((change - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_query_is_the_adjoint_of_the_edit(method: str, damping: float) -> None:
    """``wᵀg = q[S]ᵀx(g)`` for every ``g``: what makes one solve a query enough."""
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        targets = some_targets(objective) if METHODS[method].selects else torch.arange(objective.space.size)
        query = torch.randn(objective.space.size, dtype=torch.float64)

        def solve(operator: Any, rhs: Tensor) -> Any:
            return dense(operator, rhs, damping=damping)

        direction, _ = METHODS[method].query(hessian, targets, query, solve)
        for _ in range(3):
            gradient = torch.randn(objective.space.size, dtype=torch.float64)
            change, _ = METHODS[method].edit(hessian, targets, gradient, solve)
            assert float(direction @ gradient) == pytest.approx(float(query[targets] @ change), rel=1e-6)


def test_a_query_that_does_not_depend_on_the_targets_says_so() -> None:
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        query = torch.zeros(objective.space.size, dtype=torch.float64)
        query[-1] = 1.0
        with pytest.raises(ObjectiveError, match="does not depend on the target parameters"):
            METHODS["gif"].query(hessian, torch.tensor([0, 1]), query, dense)
        assert hessian.products == 0


def test_the_settings_reach_the_solver() -> None:
    settings = GIFCallback(max_iter=3, rtol=1e-9, damping=0.25, unconverged="ignore").settings
    with opened() as (objective, train):
        hessian = Hessian(objective.loss_sum, objective.theta, train)
        rhs = torch.randn(objective.space.size, dtype=torch.float64)
        found = settings.solve(hessian, rhs)
        expected = lissa(hessian, rhs, damping=0.25, rtol=1e-9, max_iter=3)
        assert torch.equal(found.x, expected.x)
        assert found.iterations == 3
