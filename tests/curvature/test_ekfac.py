"""EK-FAC against the dense Gauss–Newton matrix, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach
from lightning_gif.curvature import ekfac
from lightning_gif.curvature.ekfac import EKFACInverse
from lightning_gif.curvature.methods import METHODS
from lightning_gif.curvature.output_curvature import _mixed, _root_product, _signs, output_vectors
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.data.examples import Examples
from lightning_gif.errors import ConfigurationError, GIFWarning
from lightning_gif.objective.objective import Objective
from lightning_gif.solvers import to_matrix

from ..conftest import Classifier as Blobs
from ..conftest import blobs, make_trainer

DAMPING = 0.1


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, regression: bool = False) -> None:
        super().__init__()
        self.net, self.regression = net, regression

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.regression:
            return F.mse_loss(self.net(batch[0]), batch[0].flatten(1)[:, :2])
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale, self.head = nn.Embedding(7, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.table(x) * self.scale).mean(1))


VECTORS, IMAGES, WORDS = torch.randn(20, 5), torch.randn(20, 1, 6, 6), torch.randint(0, 7, (20, 6))
NETS: dict[str, tuple[Any, Tensor, bool]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), VECTORS, False),
    "regression": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), VECTORS, True),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        IMAGES,
        False,
    ),
    "tokens": (Tokens, WORDS, False),
}
SETTINGS = GIFCallback(solver="ekfac", curvature="ggn", method="if", damping=DAMPING).settings


@contextmanager
def opened(name: str, batch_size: int = 8) -> Iterator[tuple[Objective, Examples]]:
    make, x, regression = NETS[name]
    torch.manual_seed(0)
    module, y = Classifier(make(), regression), torch.arange(len(x)) % 3
    with Objective.open(make_trainer(), module, double=True) as objective:
        examples = Examples.from_batch((x, y), objective.prepare, batch_size=batch_size)
        yield objective, objective.learn_structure(examples)


def fit(objective: Objective, examples: Examples) -> EKFACInverse:
    return EKFACInverse.fit(objective, examples, SETTINGS, METHODS["if"], torch.arange(objective.space.size))


def dense(objective: Objective, examples: Examples) -> tuple[Tensor, Tensor]:
    """The Gauss–Newton matrix, and the damped inverse of EK-FAC, ``(p, p)``."""
    matrix = to_matrix(open_curvature(SETTINGS, objective, examples))
    inverse, _ = fit(objective, examples).ihvp(torch.eye(len(matrix), dtype=torch.float64))
    return matrix, inverse


@pytest.mark.parametrize("name", list(NETS))
def test_it_has_the_trace_of_the_matrix_and_is_close_to_its_inverse(name: str) -> None:
    with opened(name) as (objective, examples):
        matrix, inverse = dense(objective, examples)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-9, atol=1e-9)
    approximation = torch.linalg.inv(inverse) - DAMPING * torch.eye(len(matrix))
    torch.testing.assert_close(approximation.trace(), matrix.trace())
    assert torch.linalg.eigvalsh(approximation).min() > -1e-8
    exact = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix)))
    assert (inverse - exact).norm() < 0.5 * exact.norm()
    assert (inverse - exact).norm() < (torch.eye(len(matrix)) / DAMPING - exact).norm()


def test_for_one_example_and_one_position_each_layer_is_exact() -> None:
    """Then the matrix of a layer is a Kronecker product."""
    with opened("perceptron") as (objective, examples):
        matrix, inverse = dense(objective, examples.subset(torch.tensor([3])))
        blocks = torch.zeros_like(matrix)
        for part in (slice(0, 24), slice(24, len(matrix))):
            blocks[part, part] = matrix[part, part]
    exact = torch.linalg.inv(blocks + DAMPING * torch.eye(len(matrix)))
    torch.testing.assert_close(inverse, exact, rtol=1e-7, atol=1e-7)


def test_parameters_outside_of_layers_have_the_diagonal() -> None:
    with opened("convolution") as (objective, examples):
        matrix, inverse = dense(objective, examples)
        for name in ("net.1.weight", "net.1.bias"):
            of = objective.space.of(name, torch.arange(len(matrix)))
            torch.testing.assert_close(inverse[of, of], 1 / (matrix.diag()[of] + DAMPING))
        assert fit(objective, examples).summary()["on_diagonal"] == 6


def test_a_side_that_is_too_long_keeps_its_own_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("perceptron") as (objective, examples):
        monkeypatch.setattr(ekfac, "_LARGEST_SIDE", 1)
        matrix, inverse = dense(objective, examples)
    torch.testing.assert_close(inverse, torch.diag(1 / (matrix.diag() + DAMPING)))


@pytest.mark.parametrize("name", list(NETS))
def test_the_quadratic_form_of_losses_is_that_of_their_gradients(name: str) -> None:
    with opened(name) as (objective, examples):
        inverse = fit(objective, examples)
        for batch in examples.batches():
            rows = torch.cat(list(objective.gradients(batch)))
            expected = (inverse.ihvp(rows)[0] * rows).sum(1)
            torch.testing.assert_close(inverse.quadratic()(rows), expected)
            torch.testing.assert_close(inverse.of_losses(objective, batch), expected)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    logs = F.log_softmax(z, dim=-1)
    return -(0.9 * logs.gather(1, y[:, None]).squeeze(1) + 0.1 * logs.mean(-1)).mean()


def squares(z: Tensor, y: Tensor) -> Tensor:
    return ((z - F.one_hot(y, 3)) ** 2).mean()


def squares_with_a_branch(z: Tensor, y: Tensor) -> Tensor:  # cannot be vectorised over examples
    return squares(z, y) if z.isfinite().all() else z.sum()


class WithLoss(pl.LightningModule):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.net, self.loss = NETS["perceptron"][0](), loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("by_hand", "of_torch"),
    [
        (smoothed, nn.CrossEntropyLoss(label_smoothing=0.1)),
        (squares, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z))),
        (squares_with_a_branch, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z))),
    ],
    ids=["softmax", "difference", "whole batches"],
)
def test_a_loss_by_hand_has_the_scores_of_the_loss_of_pytorch(by_hand: Any, of_torch: Any) -> None:
    y = torch.arange(20) % 3
    scores = []
    for loss in (by_hand, of_torch):
        torch.manual_seed(0)
        trainer, module = make_trainer(), WithLoss(loss)
        attach(trainer, module, train_dataloaders=DataLoader(TensorDataset(VECTORS, y), 8))
        scores.append(trainer.influence((VECTORS[:3], y[:3]), solver="ekfac", damping=DAMPING, double=True).scores)
    assert torch.allclose(scores[0], scores[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["perceptron", "convolution"])
def test_it_does_not_depend_on_the_size_of_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ekfac, "_DRAWS", 20)  # one random vector for each example
    found = []
    for size in (3, 20):
        with opened(name, size) as (objective, examples):
            found.append(dense(objective, examples)[1])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def loss_at(targets: Tensor) -> Any:
    return lambda predicted: F.cross_entropy(predicted.view(len(targets), -1), targets, reduction="sum")


@pytest.mark.slow
def test_the_second_moment_of_output_vectors_is_the_second_derivative() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    hessian = torch.autograd.functional.hessian(loss_at(targets), logits).view(12, 12)
    whole = list(output_vectors(loss_at(targets), logits, torch.arange(4), count=3, seed=0))
    moment = torch.zeros(12, 12, dtype=torch.float64)
    for row in range(4):
        of = slice(3 * row, 3 * row + 3)
        moment[of, of] = sum(torch.outer(v[row], v[row]) for v in whole) / len(whole)
    torch.testing.assert_close(moment, hessian)
    drawn = torch.stack(
        [next(output_vectors(loss_at(targets), logits, torch.arange(4), count=1, seed=s)) for s in range(4000)]
    ).view(-1, 12)
    assert (drawn.T @ drawn / len(drawn) - hessian).norm() < 0.05 * hessian.norm()


def test_mixed_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of its author's program for the seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [number % (1 << 64) for number in _mixed(torch.arange(1, 5)).tolist()] == expected


def test_signs_are_balanced_and_depend_on_the_id_alone() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    ids = torch.randperm(2000)
    signs = _signs(ids, 3, 2000 * 10, like).view(2000, 10)
    assert signs.dtype == like.dtype
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(_signs(ids[7:9], 3, 20, like).view(2, 10), signs[7:9])
    # The mean of 20000 signs, and the correlations of columns, of neighbours and of seeds, within five deviations.
    assert signs.mean().abs() < 5 / 20000**0.5
    moment = signs.T @ signs / 2000 - torch.eye(10, dtype=torch.float64)
    assert moment.abs().max() < 5 / 2000**0.5
    ordered = signs[ids.argsort()]
    assert (ordered[1:] * ordered[:-1]).mean().abs() < 5 / 20000**0.5
    assert (_signs(ids, 4, 2000 * 10, like).view(2000, 10) * signs).mean().abs() < 5 / 20000**0.5


def test_the_vectors_of_an_example_do_not_depend_on_its_batch() -> None:
    """Also where the second derivative of a confident example is too small for a triangular root."""
    torch.manual_seed(0)
    logits, targets, ids = torch.randn(12, 3), torch.arange(12) % 3, torch.arange(12) + 100
    logits[4] = torch.tensor([80.0, 0.0, -3.0])
    logits[9] = torch.tensor([9.0, 9.0, -50.0])
    together = torch.stack(list(output_vectors(loss_at(targets), logits, ids, count=2, seed=0)), dim=1)
    for row in range(12):
        of = slice(row, row + 1)
        alone = torch.stack(list(output_vectors(loss_at(targets[of]), logits[of], ids[of], count=2, seed=0)), dim=1)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)


def test_the_product_with_a_root_is_right_for_any_layout() -> None:
    torch.manual_seed(0)
    root = torch.randn(9, 9, dtype=torch.float64)
    matrix, vector = root @ root.T, torch.randn(9, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    expected = vectors @ (values.sqrt() * (vectors.T @ vector))
    torch.testing.assert_close(_root_product(lambda v: matrix @ v, vector), expected)


def wide(n: int = 60) -> tuple[pl.Trainer, TensorDataset]:
    torch.manual_seed(0)
    module, data = Blobs(), blobs(n)
    module.net = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 3))
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=DataLoader(data, 16))
    return trainer, data


def test_it_is_the_default_for_models_with_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = wide()
    batch = [tensor[:5] for tensor in data.tensors]
    for solver in ("ekfac_cg", "ekfac"):  # corrected by products, unless these take too many operations
        report = trainer.influence(batch, per_example=True)
        assert {solution.solver for solution in report.solutions} == {solver}
        assert report.curvature["kind"] == "ggn"
        assert report.settings["damping"] > 0
        torch.testing.assert_close(report.scores, trainer.influence(batch, per_example=True, solver=solver).scores)
        probed = 2 * sum(
            layer.weight.numel() for layer in trainer.lightning_module.modules() if type(layer) is nn.Linear
        )
        products = 6 * 4 * len(data) * probed
        monkeypatch.setattr("lightning_gif.defaults._EXACT_OPERATIONS", 4.5 * products)
        assert trainer.influence([one[:4] for one in batch], per_example=True).solution.solver == "ekfac_cg"
        assert trainer.influence(batch).solution.solver == "ekfac_cg"
    report = trainer.influence(batch, per_example=True)
    whole = trainer.influence(batch, solver="ekfac")
    torch.testing.assert_close(whole.scores[0], report.scores.mean(0), rtol=1e-3, atol=1e-9)
    assert trainer.self_influence().settings["solver"] == "ekfac"
    for options in ({"max_iter": 5}, {"rtol": 1e-2}, {"eigenvalues": 2}, {"targets": "batch"}):
        assert trainer.influence(batch, unconverged="ignore", **options).solution.solver not in ("ekfac", "ekfac_cg")


def test_it_serves_self_influence() -> None:
    trainer, _ = wide()
    exact = trainer.self_influence(max_iter=64)
    found = trainer.self_influence(solver="ekfac", damping=exact.settings["damping"])
    assert (found.scores > 0).all()
    both = torch.stack([exact.scores[0].argsort().argsort(), found.scores[0].argsort().argsort()]).double()
    assert torch.corrcoef(both)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gif"}, "needs method='if'"),
        ({"targets": "batch"}, "For scores over target parameters, omit `solver`"),
        ({"curvature": "hessian"}, "Use curvature='ggn'"),
        ({"max_iter": 5, "rtol": 1e-2}, "takes no `max_iter`, `rtol`"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_remedy(options: dict[str, Any], message: str) -> None:
    trainer, data = wide()
    batch = [tensor[:5] for tensor in data.tensors]
    with pytest.raises(ConfigurationError, match=message):
        trainer.influence(batch, solver="ekfac", **options)
    for remedy in ({"method": "if", "solver": "ekfac"}, {"targets": "batch"}, {"curvature": "ggn", "solver": "ekfac"}):
        assert trainer.influence(batch, unconverged="ignore", **remedy).scores.isfinite().all()


def test_a_module_without_layers_is_refused() -> None:
    trainer, data = wide()
    trainer.lightning_module.net = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    batch = [tensor[:5] for tensor in data.tensors]
    with pytest.raises(ConfigurationError, match=r"layers that are linear in them.*Omit `solver`"):
        trainer.influence(batch, solver="ekfac")
    assert trainer.influence(batch, unconverged="ignore").scores.isfinite().all()


class Branching(nn.Module):
    """The result is the same in both branches."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.first, self.last, self.most = nn.Linear(6, 300), nn.Linear(300, 3, bias=False), most

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden) if len(x) <= self.most else torch.einsum("bi,oi->bo", hidden, self.last.weight)


def test_examples_with_other_layers_are_computed_one_at_a_time() -> None:
    trainer, data = wide(n=100)
    batch = [tensor[:5] for tensor in data.tensors]
    state = trainer.lightning_module.net.state_dict()
    trainer.lightning_module.net = Branching(70)  # more examples than are used to choose how to compute gradients
    trainer.lightning_module.net.first.load_state_dict({name: state[f"0.{name}"] for name in ("weight", "bias")})
    trainer.lightning_module.net.last.load_state_dict({"weight": state["2.weight"]})
    report = trainer.influence(batch)
    assert report.solution.solver == "ekfac_cg"
    torch.testing.assert_close(report.scores, trainer.influence(batch, batch_size=50).scores, rtol=1e-3, atol=1e-8)
    trainer.lightning_module.net = Branching(9)
    assert trainer.influence(batch).solution.solver == "cg"


class Partly(nn.Module):
    """A network with parameters that no example, or only some rounding error, depends on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 300), nn.Linear(300, 3), kind
        self.other, self.back = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.other.bias.fill_(-1e3)  # a dead unit

    def forward(self, x: Tensor) -> Tensor:
        result = self.last(self.first(x).relu())
        if self.kind == "unused":
            return result
        if self.kind == "without gradient":
            with torch.no_grad():
                hidden = self.other(x)
            return result + self.back(hidden)
        return result + (self.back(self.other(x).relu()) - self.back.bias) * (1e-20 if self.kind == "tiny" else 1.0)


@pytest.mark.parametrize("kind", ["unused", "without gradient", "dead", "tiny"])
def test_parameters_without_curvature_change_nothing(kind: str) -> None:
    trainer, data = wide()
    batch = [tensor[:5] for tensor in data.tensors]
    torch.manual_seed(0)
    trainer.lightning_module.net = Partly(kind)
    report = trainer.influence(batch, per_example=True)
    assert report.solution.solver == "ekfac_cg"
    assert trainer.self_influence(solver="ekfac").scores.isfinite().all()
    if kind == "unused":
        for parameter in (
            *trainer.lightning_module.net.other.parameters(),
            *trainer.lightning_module.net.back.parameters(),
        ):
            parameter.requires_grad_(False)
        torch.testing.assert_close(report.scores, trainer.influence(batch, per_example=True).scores)


def test_a_curvature_of_zero_is_warned_of() -> None:
    trainer, data = wide()
    trainer.lightning_module.training_step = lambda batch, index: F.nll_loss(
        trainer.lightning_module.net(batch[0]), batch[1]
    )
    batch = [tensor[:5] for tensor in data.tensors]
    with pytest.warns(GIFWarning, match="exactly zero in all directions"):
        report = trainer.influence(batch, solver="ekfac", curvature="ggn")
    assert report.scores.isfinite().all()


class TiedText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(x).mean(1)).tanh(), self.table.weight)[:, :3]


def test_a_table_that_is_the_head_too_is_one_block() -> None:
    torch.manual_seed(0)
    module, words = Classifier(TiedText()), torch.randint(0, 9, (20, 4))
    with Objective.open(make_trainer(), module, double=True) as objective:
        examples = Examples.from_batch((words, torch.arange(20) % 3), objective.prepare, batch_size=8)
        matrix, inverse = dense(objective, objective.learn_structure(examples))
        assert fit(objective, examples).summary()["on_diagonal"] == 0
    approximation = torch.linalg.inv(inverse) - DAMPING * torch.eye(len(matrix))
    torch.testing.assert_close(approximation.trace(), matrix.trace())
    exact = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix)))
    assert (inverse - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("fault", ["error", "nan"])
def test_eigenvectors_that_fail_in_float32_are_computed_in_float64(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, dtypes = torch.linalg.eigh, []

    def eigh(matrix: Tensor) -> Any:
        dtypes.append(matrix.dtype)
        if matrix.dtype is torch.float64:
            return original(matrix)
        if fault == "error":
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        values, vectors = original(matrix)
        return values, vectors.index_fill(1, torch.tensor([1]), torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    moment = torch.diag(torch.tensor([3.0, 0.0, 1.0]))
    found = ekfac.eigenvectors(moment)
    assert dtypes == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.T @ moment @ found, torch.diag(torch.tensor([0.0, 1.0, 3.0])))


@pytest.mark.parametrize("name", ["convolution", "tokens"])
def test_gradients_can_be_rotated_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (2**24, 1):
        monkeypatch.setattr(ekfac, "_PART_BYTES", size)
        with opened(name) as (objective, examples):
            inverse = fit(objective, examples)
            forms = [inverse.of_losses(objective, batch) for batch in examples.batches()]
            results.append((inverse.ihvp(torch.ones(1, objective.space.size).double())[0], torch.cat(forms)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["perceptron", "convolution", "tokens"])
def test_squares_from_pairs_of_positions_are_those_of_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for positions in (0, 16):
        monkeypatch.setattr(ekfac, "_PAIRED", positions)
        with opened(name) as (objective, examples):
            inverse = fit(objective, examples)
            forms = [inverse.of_losses(objective, batch) for batch in examples.batches()]
            results.append((torch.cat([block.values.flatten() for block in inverse.blocks]), torch.cat(forms)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
