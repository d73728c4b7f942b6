"""The Hessian, its parts, and the four methods against dense matrices in float64 on nets with indefinite Hessians."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import (
    METHODS,
    SOLVERS,
    ConfigurationError,
    GIFCallback,
    GIFMixin,
    GIFWarning,
    ObjectiveError,
    attach,
)
from lightning_gif.curvature.methods import Group
from lightning_gif.curvature.products import (
    CURVATURES,
    gauss_newton,
    has_gauss_newton,
    hessian,
    jacobian_products,
    warn_if_asymmetric,
)
from lightning_gif.curvature.solve import solve, solve_with_relative_damping
from lightning_gif.curvature.streaming import Curvature, graph_bytes
from lightning_gif.data.batch import Batch
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.parameters import Targets
from lightning_gif.solvers import dense, lissa, to_matrix
from lightning_gif.solvers.operators import Scaled, Submatrix

from ..conftest import Classifier, blobs, loader, make_trainer
from ..nets import NETS as NETS_OF_ALL_KINDS
from ..nets import Regressor, Sine, make
from ..solvers.test_solvers import Matrix

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
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=batch_size)
        objective.learn_structure(train)
        yield objective, train


def hessian_of(objective: Objective, examples: Examples, **options: Any) -> Curvature:
    return Curvature(hessian(objective.loss_sum), objective.theta, examples, **options)


def dense_hessian(objective: Objective, examples: Examples) -> Tensor:
    """The Hessian by autograd, of a loss that is written here and not derived by the objective."""
    data = [batch.data for batch in examples.batches()]
    x, y = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])

    def loss(theta: Tensor) -> Tensor:
        parameters = objective.space.unflatten(theta)
        logits = torch.func.functional_call(objective.module, parameters, (x,))
        return F.cross_entropy(logits, y)

    return torch.autograd.functional.hessian(loss, objective.theta)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_products_equal_those_of_the_dense_hessian_for_any_batches(net: str, batch_size: int) -> None:
    with opened(net, batch_size=batch_size) as (objective, train):
        matrix = dense_hessian(objective, train)
        assert torch.linalg.eigvalsh(matrix).min() < -1e-3  # the Hessian is indefinite
        found = to_matrix(hessian_of(objective, train))
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
        objective.learn_structure(train)
        assert not hessian_of(objective, train).matvec(objective.theta).any()


def test_rows_and_columns_equal_those_of_the_dense_matrix() -> None:
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        matrix = to_matrix(curvature)
        rows, cols = torch.tensor([0, 3, 40]), torch.tensor([1, 2, 5, 52])
        for r, c in ((rows, cols), (None, cols), (rows, None), (None, None)):
            part = Submatrix(curvature, r, c)
            expected = matrix[slice(None) if r is None else r][:, slice(None) if c is None else c]
            torch.testing.assert_close(to_matrix(part), expected)
            torch.testing.assert_close(to_matrix(part.T), expected.T)
            vector = torch.randn(expected.shape[0], dtype=torch.float64)
            torch.testing.assert_close(part.rmatvec(vector), expected.T @ vector)


def test_every_product_is_counted() -> None:
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        part = Submatrix(curvature, None, torch.tensor([1, 2]))
        part.rmatvec(part.matvec(torch.ones(2, dtype=torch.float64)))
        part.T.matvec(objective.theta)
        assert curvature.products == part.products == 3


def test_the_gauss_newton_matrix_of_a_convex_loss_declares_itself_positive_semidefinite() -> None:
    with opened() as (objective, train):
        s = some_targets(objective)
        ggn = Curvature(CURVATURES["ggn"](objective), objective.theta, train, weight_decay=0.1)
        assert torch.linalg.eigvalsh(to_matrix(ggn)).min() > 0
        assert ggn.positive_semidefinite
        assert ggn.draw(0).positive_semidefinite
        assert Submatrix(ggn, s, s).positive_semidefinite
        assert not Submatrix(ggn, None, s).positive_semidefinite
        undeclared = gauss_newton(objective.outputs, objective.loss_sum_at, objective.loss_sum)
        assert not Curvature(undeclared, objective.theta, train).positive_semidefinite
        assert not hessian_of(objective, train).positive_semidefinite


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("method", ["if", "fif", "pif"])
def test_solvers_solve_the_same_damped_system_of_the_gauss_newton_matrix(method: str) -> None:
    with opened() as (objective, train):
        ggn = Curvature(CURVATURES["ggn"](objective), objective.theta, train, weight_decay=0.01)
        matrix, size = to_matrix(ggn), objective.space.size
        targets = some_targets(objective) if METHODS[method].selects else torch.arange(size)
        kept = targets if method == "fif" else torch.arange(size)
        queries = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rhs = torch.zeros(size, 2, dtype=torch.float64)
        rhs[targets] = queries[:, targets].T
        damped = matrix[kept][:, kept] + 0.05 * torch.eye(len(kept), dtype=torch.float64)
        expected = torch.zeros(2, size, dtype=torch.float64)
        expected[:, kept] = torch.linalg.solve(damped, rhs[kept]).T
        for solver in ("lsmr", "cgls", "lissa", "dense", "cg", "nystrom"):
            options: dict[str, Any] = {"damping": 0.05, "rtol": 1e-10, "max_iter": 3000}
            found, _ = METHODS[method].query(ggn, targets, queries, partial(SOLVERS[solver], **options))
            assert float((found - expected).norm() / expected.norm()) < 1e-6, solver


def test_a_preconditioner_keeps_a_positive_semidefinite_system_symmetric() -> None:
    with opened() as (objective, train):
        ggn = Curvature(CURVATURES["ggn"](objective), objective.theta, train, weight_decay=0.1)
        targets, size = some_targets(objective), objective.space.size
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(size, dtype=torch.float64, generator=generator)
        units = 1 + 3 * torch.rand(size, dtype=torch.float64, generator=generator)
        d = units[targets]
        scaled = d[:, None] * to_matrix(Submatrix(ggn, targets, targets)) * d
        eye = torch.eye(len(targets), dtype=torch.float64)
        expected = d * torch.linalg.solve(scaled + 0.1 * eye, d * gradient[targets])
        for solver in ("cg", "lsmr", "dense"):
            options: dict[str, Any] = {"damping": 0.1, "rtol": 1e-10, "max_iter": 3000}
            change, _ = METHODS["fif"].edit(
                ggn,
                targets,
                gradient,
                partial(SOLVERS[solver], **options),
                None,
                units,
            )
            assert float((change - expected).norm() / expected.norm()) < 1e-6, solver


def some_targets(objective: Objective) -> Tensor:
    return Targets({"net.0.weight": torch.arange(3, 14), "net.2.bias": torch.tensor([0, 2])}).flat(objective.space)


def dense_edit(method: str, matrix: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """The formulas of the methods, with dense matrices."""
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
        curvature = hessian_of(objective, train)
        matrix = dense_hessian(objective, train)
        targets = some_targets(objective) if METHODS[method].selects else torch.arange(objective.space.size)
        gradient = matrix @ torch.randn(objective.space.size, dtype=torch.float64)
        gradient += 0.1 * torch.randn_like(gradient) if method in ("gif", "fif") else 0.0
        change, (solution,) = METHODS[method].edit(curvature, targets, gradient, precise(solver))
        expected = dense_edit(method, matrix, targets, gradient)
        assert float((change - expected).norm() / expected.norm()) < 1e-6
        assert solution.residual < 1e-8


@pytest.mark.parametrize("method", ["gif", "fif"])
def test_a_preconditioner_keeps_the_minimiser_and_weights_the_damping(method: str) -> None:
    with opened() as (objective, train):
        curvature, matrix = hessian_of(objective, train), dense_hessian(objective, train)
        targets, size = some_targets(objective), objective.space.size
        gradient = torch.randn(size, dtype=torch.float64)
        units = 1 + 3 * torch.rand(size, dtype=torch.float64)
        change, _ = METHODS[method].edit(curvature, targets, gradient, precise("dense"), None, units)
        torch.testing.assert_close(change, dense_edit(method, matrix, targets, gradient), rtol=1e-6, atol=1e-8)
        damped, _ = METHODS[method].edit(
            curvature, targets, gradient, lambda a, b: dense(a, b, damping=0.1), None, units
        )
        rows = targets if method == "fif" else torch.arange(size)
        part = matrix[rows][:, targets] * units[targets]
        normal = part.T @ part + 0.1**2 * torch.eye(len(targets), dtype=torch.float64)
        expected = units[targets] * torch.linalg.solve(normal, part.T @ gradient[rows])
        torch.testing.assert_close(damped, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pif", "if"])
def test_lissa_inverts_a_damped_full_hessian(method: str) -> None:
    with opened() as (objective, train):
        matrix = dense_hessian(objective, train)
        curvature = hessian_of(objective, train)
        targets = some_targets(objective) if method == "pif" else torch.arange(objective.space.size)
        gradient = torch.randn(objective.space.size, dtype=torch.float64)
        change, _ = METHODS[method].edit(
            curvature, targets, gradient, lambda a, b: lissa(a, b, damping=0.05, rtol=1e-11, max_iter=50_000)
        )
        normal = matrix @ matrix + 0.05**2 * torch.eye(len(matrix), dtype=torch.float64)
        expected = torch.linalg.solve(normal, matrix @ gradient)[targets]
        assert float((change - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("method", ["gif", "fif", "pif", "if"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_query_is_the_adjoint_of_the_edit(method: str, damping: float) -> None:
    """``wᵀg = q[S]ᵀx(g)`` for every ``g``, so one solve for each query is enough."""
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        targets = some_targets(objective) if METHODS[method].selects else torch.arange(objective.space.size)
        query = torch.randn(objective.space.size, dtype=torch.float64)

        def solve(operator: Any, rhs: Tensor) -> Any:
            return dense(operator, rhs, damping=damping)

        (direction,), _ = METHODS[method].query(curvature, targets, query[None], solve)
        for _ in range(3):
            gradient = torch.randn(objective.space.size, dtype=torch.float64)
            change, _ = METHODS[method].edit(curvature, targets, gradient, solve)
            assert float(direction @ gradient) == pytest.approx(float(query[targets] @ change), rel=1e-6)


def test_a_query_that_does_not_depend_on_the_targets_is_refused() -> None:
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        query = torch.zeros(objective.space.size, dtype=torch.float64)
        query[-1] = 1.0
        with pytest.raises(ObjectiveError, match="does not depend on the target parameters"):
            METHODS["gif"].query(curvature, torch.tensor([0, 1]), query[None], dense)
        assert curvature.products == 0


def test_the_settings_reach_the_solver() -> None:
    settings = GIFCallback(solver="lissa", max_iter=3, rtol=1e-9, damping=0.25, unconverged="ignore").settings
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        rhs = torch.randn(objective.space.size, dtype=torch.float64)
        (found,) = solve(settings, curvature, rhs)
        expected = lissa(curvature, rhs, damping=0.25, rtol=1e-9, max_iter=3)
        assert torch.equal(found.x, expected.x)
        assert found.iterations == 3
        (again,) = solve_with_relative_damping(settings, 0.5, curvature, rhs)  # the share is for open damping
        assert torch.equal(again.x, found.x)
        assert (again.damping, again.hvps) == (0.25, found.hvps)


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.float64), (1e-6, torch.float64), (1e-24, torch.float32)])
def test_default_damping_is_relative_to_the_curvature_along_the_right_hand_side(
    scale: float, dtype: torch.dtype
) -> None:
    settings = GIFCallback(solver="dense").settings
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        matrix = Matrix(to_matrix(curvature).to(dtype))
        rhs = torch.randn(objective.space.size, dtype=dtype)
        (found,) = solve_with_relative_damping(settings, 0.3, matrix, scale * rhs)
        damping = 0.3 * float(matrix.rmatvec(rhs).norm() / rhs.norm())
        assert found.damping == pytest.approx(damping, rel=1e-5)
        expected = dense(matrix, scale * rhs, damping=damping)
        torch.testing.assert_close(found.x / scale, expected.x / scale, rtol=1e-3, atol=0)
        (counted,) = solve_with_relative_damping(settings, 0.3, curvature, rhs.double())
        assert counted.hvps == objective.space.size + 1
        assert counted.examples == len(train) * counted.hvps
        (without,) = solve(settings, matrix, rhs)
        assert without.damping == 0
        assert without.x.norm() > 1.5 * (found.x / scale).norm()


# ----------------------------------------------------------------------------------------------------------------------
# Every kind of network
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def opened_net(name: str, module: type[Classifier] = Classifier) -> Iterator[tuple[Objective, Examples]]:
    net, dataset = make(name, 13)
    trained = module(net).double()
    data = TensorDataset(*(x.double() if x.is_floating_point() else x for x in dataset.tensors))
    trainer = make_trainer(precision="64-true")
    attach(trainer, trained, train_dataloaders=loader(data))
    with warnings.catch_warnings(), Objective.open(trainer, trained) as objective:
        warnings.simplefilter("ignore", GIFWarning)  # recurrent layers cannot be vectorised
        train = Examples.from_loader(loader(data), objective.prepare, batch_size=5)
        objective.learn_structure(train)
        yield objective, train


def logits(objective: Objective, train: Examples) -> tuple[Any, Tensor]:
    batches = [batch.data for batch in train.batches()]
    x, y = (torch.cat([data[i] for data in batches]) for i in (0, 1))

    def outputs(theta: Tensor) -> Tensor:
        parameters = {f"net.{name.removeprefix('net.')}": v for name, v in objective.space.unflatten(theta).items()}
        return torch.func.functional_call(objective.module, parameters, (x,))

    return outputs, y


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", list(NETS_OF_ALL_KINDS))
def test_hessian_and_gauss_newton_products_equal_dense_ones_on_every_kind_of_network(name: str) -> None:
    with opened_net(name) as (objective, train):
        outputs, y = logits(objective, train)
        theta = objective.theta

        dense_one = torch.autograd.functional.hessian(lambda t: F.cross_entropy(outputs(t), y), theta)
        torch.testing.assert_close(to_matrix(hessian_of(objective, train)), dense_one, rtol=1e-8, atol=1e-11)

        jacobian = torch.autograd.functional.jacobian(outputs, theta)  # (n, 3, p)
        p = torch.softmax(outputs(theta), 1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        expected = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(y)
        found = to_matrix(Curvature(CURVATURES["ggn"](objective), theta, train))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
        assert torch.linalg.eigvalsh(found).min() > -1e-12
        assert not torch.allclose(found, dense_one, atol=1e-4)  # the two differ here


class LogSoftmax(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(torch.log_softmax(self(batch[0]), dim=1), batch[1])


class Reshaped(Classifier):
    """As in language models: the log-probabilities of all positions in one table."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])[:, None]
        return F.nll_loss(F.log_softmax(logits, -1).view(-1, 3), batch[1].view(-1))


class Normalised(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.nll_loss(logits - logits.logsumexp(1, keepdim=True), batch[1])


class Teacher(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        targets = (batch[1][:, None, None] == torch.arange(3)).to(self.dtype)
        return F.kl_div(F.log_softmax(self(batch[0]), -1)[:, None], targets, reduction="batchmean")


class Criterion(Classifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), target=batch[1])


class OwnLosses(Classifier, GIFMixin):
    def influence_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(input=self(batch[0]), target=batch[1], reduction="none")


class OwnReshaped(OwnLosses):
    def influence_loss(self, batch: Any) -> Tensor:
        columns = F.log_softmax(self(batch[0]), 1)[..., None]
        return F.nll_loss(columns, batch[1][:, None], reduction="none")[:, 0]


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("module", [LogSoftmax, Reshaped, Normalised, Teacher, Criterion, OwnLosses, OwnReshaped])
def test_predictions_are_recognised_however_the_loss_is_written(module: type[Classifier]) -> None:
    def matrix(kind: type[Classifier]) -> Tensor:
        torch.manual_seed(3)
        with opened_net("perceptron", kind) as (objective, train):
            return to_matrix(Curvature(CURVATURES["ggn"](objective), objective.theta, train))

    torch.testing.assert_close(matrix(module), matrix(Classifier), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_a_regression_is_that_of_least_squares() -> None:
    with opened_net("perceptron", Regressor) as (objective, train):
        outputs, _ = logits(objective, train)
        jacobian = torch.autograd.functional.jacobian(lambda t: outputs(t)[:, 0], objective.theta)
        found = to_matrix(Curvature(CURVATURES["ggn"](objective), objective.theta, train))
        torch.testing.assert_close(found, 2 * jacobian.T @ jacobian / len(jacobian), rtol=1e-8, atol=1e-12)


class Linear(Classifier):
    """Logits in place of log-probabilities."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


def test_a_curvature_that_is_zero_causes_a_warning() -> None:
    with opened_net("perceptron", Linear) as (objective, train):
        curvature = Curvature(CURVATURES["ggn"](objective), objective.theta, train, weight_decay=0.1)
        vector = torch.randn_like(objective.theta)
        torch.testing.assert_close(curvature.matvec(vector), 0.1 * vector)
        with pytest.warns(GIFWarning, match="exactly zero in all directions"):
            curvature.warn_if_zero()
    with opened_net("perceptron", Reshaped) as (objective, train):
        curvature = Curvature(CURVATURES["ggn"](objective), objective.theta, train)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GIFWarning)
            curvature.warn_if_zero()  # no product yet
            curvature.matvec(vector)
            curvature.matvec(torch.zeros_like(vector))
            curvature.warn_if_zero()


def test_a_loss_that_bypasses_its_predictions_is_refused_for_each_batch_structure() -> None:
    """A penalty on batches of sequences only, after a batch of single positions without one."""
    calls = 0

    def loss_sum(theta: Tensor, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        x = batch.data
        return F.mse_loss(x @ theta, x.sum(-1)) + (theta.square().sum() if x.ndim == 3 else 0.0)

    linearise = gauss_newton(
        lambda theta, batch: batch.data @ theta,
        lambda theta, batch: lambda out: F.mse_loss(out, batch.data.sum(-1)),
        loss_sum,
    )
    theta = torch.randn(3, dtype=torch.float64)
    for size in (4, 4, 2, 1):
        linearise(theta, Batch.of(torch.randn(size, 3, dtype=torch.float64)))
    assert calls == 1  # once for each structure
    for _ in range(2):
        with pytest.raises(
            ObjectiveError, match="the gradient through the predictions is not the gradient of the loss"
        ):
            linearise(theta, Batch.of(torch.randn(4, 2, 3, dtype=torch.float64)))


@pytest.mark.parametrize("margin", [1, 3, 5])  # at 5 all losses are zero in float32
@pytest.mark.parametrize("broken", [False, True])
def test_a_second_derivative_that_is_left_out_is_not_confused_with_rounding(margin: float, broken: bool) -> None:
    torch.manual_seed(0)
    x, theta = torch.randn(40, 6).abs() + 0.5, 0.1 * torch.randn(6, 3)
    theta[:, 0] += margin

    def loss_sum(theta: Tensor, batch: Batch) -> Tensor:
        z = x @ theta.view(6, 3)
        return F.cross_entropy(z + Sine.apply(z) if broken else z, torch.zeros(40).long(), reduction="sum")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_asymmetric(SimpleNamespace(loss_sum=loss_sum), theta.flatten(), Batch.of(x))  # type: ignore[arg-type]
    assert ["is not symmetric" in str(warning.message) for warning in caught] == [True] * broken


def test_gauss_newton_allows_for_the_rounding_of_bfloat16() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    net = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    names, sizes = zip(*((name, one.shape) for name, one in net.named_parameters()), strict=True)

    def outputs(theta: Tensor, batch: Batch) -> Tensor:
        parts = theta.split([size.numel() for size in sizes])
        values = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(net, values, (x,)).float()

    def loss_sum(theta: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs(theta, batch), y, reduction="sum")

    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    losses = SimpleNamespace(
        outputs=outputs,
        loss_sum_at=lambda theta, batch: lambda out: F.cross_entropy(out, y, reduction="sum"),
        loss_sum=loss_sum,
    )
    assert has_gauss_newton(losses, theta, Batch.of([x, y]))  # type: ignore[arg-type]


def test_gauss_newton_without_a_loss_function_of_pytorch_is_refused() -> None:
    class ByHand(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (torch.logsumexp(self(batch[0]), 1) - self(batch[0]).gather(1, batch[1][:, None])[:, 0]).mean()

    with opened_net("perceptron", ByHand) as (objective, train):
        to_matrix(hessian_of(objective, train))  # this is allowed
        with pytest.raises(ObjectiveError, match="curvature='hessian'"):
            Curvature(CURVATURES["ggn"](objective), objective.theta, train).matvec(objective.theta)


# ----------------------------------------------------------------------------------------------------------------------
# The cost of a product
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CURVATURES))
def test_kept_passes_give_the_same_products_and_are_not_repeated(kind: str) -> None:
    with opened(batch_size=5) as (objective, train):
        calls = 0
        linearise = CURVATURES[kind](objective)

        def counted(theta: Tensor, batch: Batch) -> Any:
            nonlocal calls
            calls += 1
            return linearise(theta, batch)

        vectors = torch.randn(objective.space.size, 3, dtype=torch.float64)
        found, passes = {}, {}
        for memory in (0.0, 1.0, float("inf")):
            calls = 0
            curvature = Curvature(counted, objective.theta, train, memory=memory)
            found[memory] = [curvature.matvec(column) for column in vectors.T]
            passes[memory] = calls
        assert passes == {0.0: 15, 1.0: 15, float("inf"): 5}  # 23 examples in fives; one byte is not enough for a pass
        for memory in (0.0, 1.0):
            for one, other in zip(found[memory], found[float("inf")], strict=True):
                assert torch.equal(one, other)
        assert curvature.summary()["batches_kept"] == curvature.summary()["batches"] == 5


def test_a_budget_keeps_some_passes_and_repeats_the_others() -> None:
    for held in (False, True):
        with opened(batch_size=5) as (objective, train):
            examples = train.cached() if held else train
            one = graph_bytes(*hessian(objective.loss_sum)(objective.theta, next(train.batches()))[1])
            curvature = Curvature(hessian(objective.loss_sum), objective.theta, examples, memory=2.5 * one)
            expected = hessian_of(objective, train)
            for _ in range(3):
                vector = torch.randn_like(objective.theta)
                torch.testing.assert_close(curvature.matvec(vector), expected.matvec(vector))
            assert curvature.summary()["batches_kept"] == 2
            assert curvature.examples == 3 * 23


def test_the_memory_of_a_graph_is_that_of_its_saved_tensors() -> None:
    x = torch.randn(100, requires_grad=True)
    y = x.tanh()  # saves its result
    assert graph_bytes(y) == 400
    assert graph_bytes(y * y) == 400  # the same tensor counts once
    assert graph_bytes(y.exp()) == 800
    weight = torch.randn(1_000_000)[:100]  # a view does not count its whole base
    assert graph_bytes((x * weight).sum()) == 400


def test_several_vectors_give_the_products_of_each_alone() -> None:
    with opened(batch_size=7) as (objective, train):
        vectors = torch.randn(objective.space.size, 4, dtype=torch.float64)
        curvature = hessian_of(objective, train, weight_decay=0.3)
        expected = torch.stack([hessian_of(objective, train, weight_decay=0.3).matvec(v) for v in vectors.T], 1)
        torch.testing.assert_close(curvature.matvec(vectors), expected)
        assert curvature.products == 4
        assert curvature.examples == 4 * 23


def test_weight_decay_is_a_multiple_of_the_identity() -> None:
    with opened() as (objective, train):
        plain, decayed = (to_matrix(hessian_of(objective, train, weight_decay=w)) for w in (0.0, 0.3))
        torch.testing.assert_close(decayed - plain, 0.3 * torch.eye(len(plain), dtype=torch.float64))


@pytest.mark.parametrize("held", [False, True])
def test_draws_are_unbiased_and_counted(held: bool) -> None:
    with opened(n=24, batch_size=6) as (objective, train):
        curvature = hessian_of(objective, train.cached() if held else train)
        vector = torch.randn_like(objective.theta)
        draws = torch.stack([curvature.draw(seed).matvec(vector) for seed in range(400)])
        assert curvature.products == 400
        assert curvature.examples == 400 * 6
        whole = curvature.matvec(vector)
        error = (draws.mean(0) - whole).norm() / whole.norm()
        scatter = (draws - whole).norm(dim=1).mean() / whole.norm()
        assert error < 3 * scatter / 400**0.5
        assert scatter > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# The second-order influence of a group
# ----------------------------------------------------------------------------------------------------------------------


def test_the_second_order_is_closer_to_retraining_than_the_first_on_least_squares() -> None:
    """A quadratic risk has no third derivatives: the error falls with the cube of the share removed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, generator=generator, dtype=torch.float64) + torch.randn(400, dtype=torch.float64)
    x[:80] *= 1.5  # the group differs from the other examples

    def moments(rows: slice) -> tuple[Tensor, Tensor]:
        return x[rows].T @ x[rows] / len(x[rows]), x[rows].T @ y[rows] / len(x[rows])

    group, rest = moments(slice(80)), moments(slice(80, 400))

    class Dense:
        products = examples = 0

        def __init__(self, matrix: Tensor) -> None:
            self.matrix, self.shape = matrix, (5, 5)
            self.dtype, self.device = matrix.dtype, matrix.device

        def matvec(self, vectors: Tensor) -> Tensor:
            return self.matrix @ vectors

        rmatvec = matvec

    def solve(operator: Any, rhs: Tensor) -> Any:
        return dense(operator, rhs)

    errors = {}
    everything = torch.arange(5)
    for share in (0.02, 0.04, 0.08):
        whole = tuple((1 - share) * r + share * g for r, g in zip(rest, group, strict=True))
        start = torch.linalg.solve(*whole)
        truth = torch.linalg.solve(*rest) - start
        gradient = share / (1 - share) * (group[0] @ start - group[1])
        removed = Group(share, Dense(group[0]), None)
        second, solutions = METHODS["sif"].edit(Dense(rest[0]), everything, gradient, solve, removed)
        first, _ = METHODS["if"].edit(Dense(whole[0]), everything, gradient, solve)
        errors[share] = float((second - truth).norm())
        assert len(solutions) == 2
        assert errors[share] < 0.5 * float((first - truth).norm())
        # With the curvature of the retained data, the first order is exact for a quadratic risk.
        exact, _ = METHODS["if"].edit(Dense(rest[0]), everything, gradient, solve)
        torch.testing.assert_close(exact, truth)
    assert errors[0.08] / errors[0.04] > 6
    assert errors[0.04] / errors[0.02] > 6


def test_relabelling_by_the_second_order_uses_both_curvatures() -> None:
    """Logistic regression with corrected labels, for which the inputs change the curvature but the labels do not."""
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        group = Group(0.2, curvature, curvature)
        gradient = torch.randn_like(objective.theta)
        first, _ = METHODS["if"].edit(curvature, torch.arange(len(gradient)), 0.8 * gradient, damped)
        both, _ = METHODS["sif"].edit(curvature, torch.arange(len(gradient)), gradient, damped, group)
        torch.testing.assert_close(both, first)  # no difference of curvature, so no second order


def damped(operator: Any, rhs: Tensor) -> Any:
    return dense(operator, rhs, damping=0.1)


def test_there_is_no_second_order_score_of_single_examples() -> None:
    with opened() as (objective, train):
        curvature = hessian_of(objective, train)
        with pytest.raises(ConfigurationError, match="'if'"):
            METHODS["sif"].query(curvature, torch.arange(3), objective.theta[None], dense)
        assert curvature.products == 0


@pytest.mark.parametrize("rows", [False, True])
def test_an_operator_with_a_preconditioner_is_the_scaled_matrix(rows: bool) -> None:
    units = torch.tensor([1.0, 3.0, 0.5, 7.0], dtype=torch.float64)
    with opened() as (objective, train):
        some = torch.tensor([0, 2, 5, 9])
        part = Submatrix(hessian_of(objective, train), some, some)
        plain = to_matrix(part)
        expected = (units[:, None] if rows else 1.0) * plain * units
        scaled = Scaled(part, units, rows=rows)
        torch.testing.assert_close(to_matrix(scaled), expected)
        vector = torch.randn(4, dtype=torch.float64)
        torch.testing.assert_close(scaled.matvec(vector), expected @ vector)
        torch.testing.assert_close(scaled.rmatvec(vector), expected.T @ vector)


class _Loud(torch.autograd.Function):
    """The identity; its backward pass looks at values, which vmap does not allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        assert not gradient.isnan().any().item()
        return gradient


class Loud(OwnLosses):
    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(_Loud.apply(self(x)), y, reduction="none")


@pytest.mark.parametrize("module", [Classifier, Regressor, LogSoftmax, OwnLosses, Loud])
@pytest.mark.parametrize("memory", [0.0, 1e9])
def test_products_with_jacobians_are_those_of_the_gauss_newton_matrix(module: type[Classifier], memory: float) -> None:
    with opened_net("layernorm", module) as (objective, train):
        expected = Curvature(CURVATURES["ggn"](objective), objective.theta, train)
        curvature = Curvature(jacobian_products(objective), objective.theta, train, memory=memory)
        columns = torch.randn(objective.space.size, 3, dtype=objective.theta.dtype)
        torch.testing.assert_close(curvature.matvec(columns), expected.matvec(columns))
        torch.testing.assert_close(curvature.matvec(columns[:, 0]), expected.matvec(columns[:, 0]))
        assert curvature.summary()["batches_kept"] == (curvature.summary()["batches"] if memory else 0)
        assert curvature.positive_semidefinite


class Penalised:
    """Losses with a penalty that does not pass through the predictions."""

    def loss_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(batch.data @ theta, batch.data.sum(-1), reduction="sum") + theta.square().sum()

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        return batch.data @ theta

    def loss_sum_at(self, theta: Tensor, batch: Batch) -> Any:
        return lambda out: F.mse_loss(out, batch.data.sum(-1), reduction="sum")


def test_products_with_jacobians_refuse_a_loss_that_bypasses_its_predictions() -> None:
    batch = Batch.of(torch.randn(4, 3, dtype=torch.float64))
    with pytest.raises(ObjectiveError, match="the gradient through the predictions is not the gradient of the loss"):
        jacobian_products(Penalised())(torch.randn(3, dtype=torch.float64), batch)


def test_the_memory_of_jacobians_is_counted() -> None:
    with opened_net("layernorm") as (objective, train):
        _, graphs = jacobian_products(objective)(objective.theta, next(train.batches()))
        n = next(train.batches()).size
        size = objective.theta.itemsize
        assert graph_bytes(*graphs) == n * 3 * objective.space.size * size + n * 9 * size
