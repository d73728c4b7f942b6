"""Scores against closed forms and retraining, and their independence of batches, order and folders."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    GIFCallback,
    GIFMixin,
    GIFWarning,
    InfluenceReport,
    ObjectiveError,
    attach,
)
from lightning_gif.curvature import by_solver
from lightning_gif.curvature.by_solver import SolverInverse
from lightning_gif.data.batch import Batch
from lightning_gif.data.examples import Examples
from lightning_gif.objective import memory
from lightning_gif.objective.objective import Objective
from lightning_gif.parameters import ParameterSpace
from lightning_gif.storage.digests import digest

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer


def asked(module: Any, dataset: Any, **settings: Any) -> Any:
    """A trainer for an untrained model in double precision; undamped least squares over all data by default."""
    trainer = make_trainer(precision="64-true")
    plain = {"method": "gif", "curvature": "hessian", "solver": "dense", "damping": 0.0, "curvature_examples": None}
    callback = GIFCallback(**{"ratio": 0.5, **plain, **settings})
    attach(trainer, module.double(), train_dataloaders=loader(dataset), callback=callback)
    return trainer


def gradients(module: Classifier, dataset: TensorDataset) -> Tensor:
    """Explicit per-example gradients, ``(n, p)``."""
    module.eval()
    rows = []
    for x, y in dataset:
        loss = F.cross_entropy(module(x[None].to(module.dtype)), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["gif", "fif", "pif", "if"])
@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)
        ),
    ],
    ids=["mlp", "conv"],
)
def test_scores_are_inner_products_with_explicit_per_example_gradients(method: str, net: Any) -> None:
    module, dataset = Classifier(net()).double(), blobs(20)
    trainer = asked(module, dataset, method=method, batch_size=7)
    query = batch_of(dataset, slice(0, 4))
    report = trainer.influence(query, damping=0.1)

    per_example = gradients(module, dataset)
    matrix = torch.autograd.functional.hessian(
        lambda theta: F.cross_entropy(
            torch.func.functional_call(module, _unflatten(module, theta), (dataset.tensors[0].double(),)),
            dataset.tensors[1],
        ),
        torch.cat([p.detach().flatten() for p in module.parameters()]),
    )
    offsets, start = {}, 0
    for name, parameter in module.named_parameters():
        offsets[name], start = start, start + parameter.numel()
    s = torch.cat([entries + offsets[name] for name, entries in report.targets.items()]).sort().values
    everything = torch.arange(start)
    rows = {"gif": everything, "fif": s, "pif": everything, "if": everything}[method]
    cols = {"gif": s, "fif": s, "pif": everything, "if": everything}[method]
    part = matrix[rows][:, cols]
    changes = torch.linalg.solve(part.T @ part + 0.01 * torch.eye(len(cols)), part.T @ per_example[:, rows].T)
    q = torch.zeros(start, dtype=torch.float64)
    q[s] = per_example[:4].mean(0)[s]
    expected = (q[cols] @ changes) / (len(dataset) - 1)
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-5, atol=1e-9)


def _unflatten(module: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    pieces = theta.split([p.numel() for p in module.parameters()])
    return {n: piece.view(p.shape) for (n, p), piece in zip(module.named_parameters(), pieces, strict=True)}


def test_scores_do_not_depend_on_the_batch_size() -> None:
    module, dataset = Classifier().double(), blobs(50)
    query = batch_of(dataset, slice(0, 3))
    expected = asked(module, dataset).influence(query, batch_size=50).scores
    for batch_size in (1, 7, 16, 49, 1000):  # also with a ragged last batch
        found = asked(module, dataset).influence(query, batch_size=batch_size).scores
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_scores_follow_the_examples_when_the_dataset_is_reordered() -> None:
    module, dataset = Classifier().double(), blobs(40)
    query = batch_of(dataset, slice(0, 3))
    order = torch.randperm(40)
    reordered = TensorDataset(*(tensor[order] for tensor in dataset.tensors))
    expected = asked(module, dataset).influence(query).scores[0]
    found = asked(module, reordered).influence(query).scores[0]
    torch.testing.assert_close(found, expected[order], rtol=1e-8, atol=1e-12)


def test_the_aggregated_query_is_the_mean_of_the_queries_for_each_example() -> None:
    module, dataset = Classifier().double(), blobs(30)
    trainer = asked(module, dataset)
    query = batch_of(dataset, slice(5, 9))
    single = trainer.influence(query, targets="cached", damping=0.1)
    each = trainer.influence(query, targets="cached", damping=0.1, per_example=True)
    assert single.scores.shape == (1, 30)
    assert each.scores.shape == (4, 30)
    assert len(each.solutions) == 4
    torch.testing.assert_close(each.scores.mean(0), single.scores[0], rtol=1e-8, atol=1e-12)
    # and the batch's examples in a loader give the same query
    loaded = trainer.influence(DataLoader(Subset(dataset, range(5, 9)), 3), targets="cached", damping=0.1)
    torch.testing.assert_close(loaded.scores, single.scores, rtol=1e-8, atol=1e-12)


def test_indices_are_dataset_indices_although_the_loader_shuffles() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, slice(0, 1)), solver="dense")
    assert torch.equal(report.indices, torch.arange(len(dataset)))
    best = int(report.proponents(1).indices[0, 0])
    # An example's own removal raises its loss the most here; the index leads to that very example.
    alone = trainer.influence(batch_of(dataset, slice(best, best + 1)), solver="dense")
    assert report.scores[0, best] == report.scores.max()
    assert alone.scores.shape == (1, len(dataset))


def test_a_subset_keeps_its_own_numbering() -> None:
    dataset = blobs(40)
    subset = Subset(dataset, [30, 3, 12, 25, 8, 9, 10])
    trainer = asked(Classifier(), subset)
    report = trainer.influence(batch_of(dataset, slice(0, 2)))
    assert torch.equal(report.indices, torch.arange(7))  # positions in the dataset that the loader was given


class Regression(GIFMixin, Classifier):
    """Ridge regression; the penalty is part of each example's loss, so that its mean is the objective."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.influence_loss(batch).mean()

    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        penalty = 0.01 * sum(p.square().sum() for p in self.parameters())
        return (self(x).squeeze(1) - y).square() + penalty


class Logistic(Regression):
    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        penalty = 0.005 * sum(p.square().sum() for p in self.parameters())
        return F.binary_cross_entropy_with_logits(self(x).squeeze(1), y, reduction="none") + penalty


def train_to_optimum(module: Regression, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.influence_loss((x, y)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_sums_over_groups_predict_the_removal_of_small_groups_and_underestimate_large_ones() -> None:
    n = 400
    x = torch.randn(n + 10, 5, dtype=torch.float64)
    y = (x @ torch.randn(5, dtype=torch.float64) + 0.7 * torch.randn(n + 10, dtype=torch.float64) > 0).double()
    train, query = TensorDataset(x[:n], y[:n]), (x[n:], y[n:])
    module = Logistic().double()
    train_to_optimum(module, *train.tensors)
    base = module.influence_loss(query).mean().item()
    report = asked(module, train, method="if", damping=0.0).influence(query)

    def without(members: Tensor) -> float:
        retrained = copy.deepcopy(module)
        train_to_optimum(retrained, x[:n][~members], y[:n][~members])
        return retrained.influence_loss(query).mean().item() - base

    for column, low, high in ((torch.arange(n) // 10, 1.0, 1.1), (torch.randint(0, 2, (n,)), 1.6, 2.6)):
        groups = report.by_group(column)
        changes = torch.tensor([without(column == name) for name in groups.names], dtype=torch.float64)
        assert float(torch.corrcoef(torch.stack([groups.totals, changes]))[0, 1]) > 0.99
        # The change divided by the sum: (n-1)/(n-m), which is 1.02 for ten examples and 2 for half of them.
        assert low < float(changes @ groups.totals / groups.totals.square().sum()) < high


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("model", [Regression, Logistic], ids=["linear", "logistic"])
@pytest.mark.parametrize("method", ["gif", "if"])
def test_scores_predict_leave_one_out_retraining(model: Any, method: str) -> None:
    n = 400
    x = torch.randn(n + 10, 5, dtype=torch.float64)
    signal = x @ torch.randn(5, dtype=torch.float64) + 0.7 * torch.randn(n + 10, dtype=torch.float64)
    y = signal if model is Regression else (signal > 0).double()
    train, query = TensorDataset(x[:n], y[:n]), (x[n:], y[n:])

    module = model().double()
    train_to_optimum(module, x[:n], y[:n])
    base = module.influence_loss(query).mean().item()
    report = asked(module, train, ratio=1.0, method=method, solver="lissa", rtol=1e-8, max_iter=5000).influence(query)

    changes = []
    for left_out in range(0, n, 4):
        keep = torch.arange(n) != left_out
        retrained = copy.deepcopy(module)
        train_to_optimum(retrained, x[:n][keep], y[:n][keep])
        changes.append(retrained.influence_loss(query).mean().item() - base)
    truth, scores = torch.tensor(changes, dtype=torch.float64), report.scores[0, ::4]
    assert float(torch.corrcoef(torch.stack([truth, scores]))[0, 1]) > 0.99
    # The sign and the unit are correct too: positive means that the query's loss rises. Retraining also changes the
    # curvature, which scores leave out.
    slope = float((truth @ scores) / (scores @ scores))
    assert slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_weight_decay_of_the_optimizer_is_part_of_the_objective(weight_decay: float) -> None:
    """Leave-one-out of ridge regression whose penalty is the optimizer's, in closed form."""

    class Least(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return (self(batch[0]).squeeze(1) - batch[1]).square()

    n = 60
    x = torch.randn(n, 3, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(n, dtype=torch.float64)
    ridge = weight_decay * torch.eye(3, dtype=torch.float64)

    def optimum(keep: Tensor) -> Tensor:
        a, b = x[keep], y[keep]
        return torch.linalg.solve(2 * a.T @ a / len(a) + ridge, 2 * a.T @ b / len(a))

    everything = torch.ones(n, dtype=torch.bool)
    module = Least(nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        module.net.weight.copy_(optimum(everything)[None])
    trainer = asked(module, TensorDataset(x, y))
    query = (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    report = trainer.influence(query, method="if", solver="dense", curvature_examples=None, weight_decay=weight_decay)

    def loss(theta: Tensor) -> Tensor:
        return (query[0] @ theta - query[1]).square().mean()

    truth = []
    for i in range(n):
        keep = everything.clone()
        keep[i] = False
        truth.append(float(loss(optimum(keep)) - loss(optimum(everything))))
    scores, truth = report.scores[0], torch.tensor(truth, dtype=torch.float64)
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.99
    assert float((scores - truth).norm() / truth.norm()) < 0.15


def test_extreme_eigenvalues_are_computed_on_request() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 2))
    assert "largest" not in trainer.influence(query).curvature
    report = trainer.influence(query, eigenvalues=2, curvature="hessian")
    assert len(report.curvature["largest"]) == len(report.curvature["smallest"]) == 2
    assert report.curvature["kind"] == "hessian"


def test_computation_is_in_float64_on_request() -> None:
    trainer, module, dataset = fitted()
    query = batch_of(dataset, slice(0, 2))
    single, double = (trainer.influence(query, solver="dense", damping=0.1, double=d) for d in (False, True))
    assert single.solution.x.dtype == torch.float32
    assert double.solution.x.dtype == torch.float64
    torch.testing.assert_close(single.scores, double.scores, rtol=1e-2, atol=1e-5)
    assert next(module.parameters()).dtype == torch.float32


def test_there_are_no_second_order_scores() -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(ConfigurationError, match="method='sif'"):
        trainer.influence(batch_of(dataset, slice(0, 2)), method="sif")


def test_a_query_may_have_another_measurement_than_the_loss() -> None:
    class Margin(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

        def influence_measurement(self, batch: Any) -> Tensor:
            return -self.influence_loss(batch)

    dataset = blobs(30)
    module = Margin().double()
    trainer = asked(module, dataset)
    plain = asked(Classifier(module.net), dataset)
    query = batch_of(dataset, slice(0, 3))
    torch.testing.assert_close(trainer.influence(query).scores, -plain.influence(query).scores)


def test_only_the_parameters_that_may_change_become_targets() -> None:
    class Head(GIFMixin, Classifier):
        def influence_parameters(self) -> list[str]:
            return ["net.2.*"]

    trainer, _, dataset = fitted(Head())
    assert set(trainer.influence(batch_of(dataset, slice(0, 2)), targets="cached").targets) <= {
        "net.2.weight",
        "net.2.bias",
    }
    assert set(trainer.unlearn(batch_of(dataset, slice(0, 2))).edit.indices) <= {"net.2.weight", "net.2.bias"}


def test_a_solve_that_does_not_converge_warns_or_raises_as_configured() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 2))
    with pytest.warns(ConvergenceWarning, match="Raise `max_iter` or `damping`"):
        report = trainer.influence(query, method="gif", max_iter=2, unconverged="warn")
    assert not report.solution.converged
    with pytest.raises(ConvergenceError, match="'max_iter'") as raised:
        trainer.influence(query, method="gif", max_iter=2, unconverged="raise")
    assert "solver='lsmr'" not in str(raised.value)  # which it was
    with pytest.raises(ConvergenceError, match="or use solver='lsmr'"):
        trainer.influence(query, method="gif", solver="cgls", max_iter=2, unconverged="raise")


@pytest.mark.parametrize("targets", ["cached", "class", "batch"])
def test_targets_come_from_the_requested_source(targets: str) -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, dataset.tensors[1] == 1)
    report = trainer.influence(query, targets=targets, ratio=0.2)
    assert 0.1 < report.targets.count / 83 <= 0.2
    if targets != "cached":
        cached = trainer.influence(query, targets="cached", ratio=0.2)
        assert report.targets.jaccard(cached.targets) < 1


def test_cached_targets_are_used_unchanged() -> None:
    trainer, _, dataset = fitted()
    callback = trainer.callbacks[0]
    query = batch_of(dataset, slice(0, 2))
    assert trainer.influence(query, targets="cached").targets is callback.targets
    assert trainer.influence(query, method="gif").targets is callback.targets
    assert trainer.influence(query).targets.count == 83  # all parameters, unless targets are requested


def test_a_summed_loss_counts_each_example_once_also_for_a_query_of_one_example() -> None:
    class Summed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1], reduction="sum")
            return loss if float(loss) > -1 else 2 * loss  # a condition on a value, which vmap does not support

    dataset = blobs(30)
    query = batch_of(dataset, slice(0, 1))
    module = Classifier().double()
    expected = asked(module, dataset).influence(query).scores
    with pytest.warns(GIFWarning, match="one after the other"):
        found = asked(Summed(module.net), dataset).influence(query, batch_size=7).scores
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_coupled_losses_are_reported_also_for_a_query_of_one_example() -> None:
    class Coupled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            return F.cross_entropy(logits * logits.norm(), batch[1])

    dataset = blobs(30)
    with pytest.warns(GIFWarning, match="they are coupled"):
        asked(Coupled(), dataset).influence(batch_of(dataset, slice(0, 1)), damping=0.1)


def test_a_measurement_that_uses_no_labels_needs_none() -> None:
    class Entropy(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

        def influence_measurement(self, batch: Any) -> Tensor:
            return torch.distributions.Categorical(logits=self(batch[0])).entropy()

    dataset = blobs(30)
    report = asked(Entropy(), dataset).influence((dataset.tensors[0][:3],), selector=["net.2.*"], damping=0.1)
    assert report.scores.shape == (1, 30)


def test_a_callback_attached_to_another_model_ranks_neurons_again() -> None:
    trainer, first, dataset = fitted()
    chosen = trainer.callbacks[0].targets
    other = Classifier(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    attach(trainer, other, train_dataloaders=loader(dataset))
    report = trainer.influence(batch_of(dataset, slice(0, 2)))
    assert report.targets is not chosen
    report.targets.flat(ParameterSpace(other))
    assert first is not other


# ----------------------------------------------------------------------------------------------------------------------
# Defaults
# ----------------------------------------------------------------------------------------------------------------------


def damped(module: Classifier, dataset: TensorDataset, damping: float) -> tuple[Tensor, Tensor]:
    """Per-example gradients ``(n, p)`` and the inverse of the damped Gauss-Newton matrix ``(p, p)``."""
    rows, x = gradients(module, dataset), dataset.tensors[0].to(torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def logits(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    jacobian = torch.cat(
        [part.flatten(2) for part in torch.autograd.functional.jacobian(logits, tuple(parameters))], dim=2
    )
    p = logits(*parameters).softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(x)
    return rows, torch.linalg.inv(ggn + damping * torch.eye(len(ggn), dtype=ggn.dtype))


def open_trainer(module: Any, dataset: Any, **settings: Any) -> Any:
    """A trainer in double precision with all arguments at their defaults."""
    trainer = make_trainer(precision="64-true")
    callback = GIFCallback(curvature_examples=None, **settings)
    attach(trainer, module.double(), train_dataloaders=loader(dataset), callback=callback)
    return trainer


def test_default_scores_use_the_damped_gauss_newton_matrix_of_all_parameters() -> None:
    module, dataset = Classifier().double(), blobs(30)
    report = open_trainer(module, dataset).influence(batch_of(dataset, slice(0, 4)), rtol=1e-10)
    assert (report.settings["method"], report.settings["curvature"], report.settings["solver"]) == ("if", "ggn", "cg")
    rows, inverse = damped(module, dataset, report.settings["damping"])
    expected = rows[:4].mean(0) @ inverse @ rows.T / 29
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-4, atol=1e-9)


def test_measured_damping_is_in_the_unit_of_the_loss() -> None:
    class Scaled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 10 * super().training_step(batch, batch_idx)

    module, dataset = Scaled().double(), blobs(30)
    plain = Classifier(module.net)
    query = batch_of(dataset, slice(0, 4))
    one, ten = (open_trainer(net, dataset).influence(query, curvature="hessian") for net in (plain, module))
    assert ten.settings["damping"] == pytest.approx(10 * one.settings["damping"])
    torch.testing.assert_close(ten.scores, 10 * one.scores, rtol=1e-6, atol=0)


def test_a_custom_loss_function_has_default_scores_too() -> None:
    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]).logsumexp(1) - self(batch[0]).gather(1, batch[1][:, None])[:, 0]).mean()

    dataset = blobs(30)
    report = open_trainer(Own(), dataset).influence(batch_of(dataset, slice(0, 4)))
    assert (report.settings["method"], report.settings["curvature"], report.settings["solver"]) == (
        "if",
        "hessian",
        "lsmr",
    )


def test_the_plain_least_squares_of_the_paper_are_available_by_name() -> None:
    trainer, _, dataset = fitted()
    settings = trainer.influence(batch_of(dataset, slice(0, 4)), method="gif").settings
    names = ("method", "curvature", "solver", "damping", "rtol")
    assert [settings[name] for name in names] == ["gif", "hessian", "lsmr", 0.0, 1e-3]


def test_many_queries_share_a_sketch_and_are_scored_by_gradients() -> None:
    module, dataset = Classifier().double(), blobs(200)
    trainer = open_trainer(module, dataset)
    query = batch_of(dataset, slice(0, 40))
    report = trainer.influence(query, per_example=True, max_iter=83)
    assert report.settings["solver"] == "nystrom"
    rows, inverse = damped(module, dataset, report.settings["damping"])
    torch.testing.assert_close(report.scores, rows[:40] @ inverse @ rows.T / 199, rtol=1e-3, atol=1e-6)
    few = trainer.influence(batch_of(dataset, slice(0, 3)), per_example=True, solver="nystrom", max_iter=83)
    torch.testing.assert_close(few.scores, report.scores[:3], rtol=1e-3, atol=1e-6)  # by forward mode


def test_many_queries_with_a_discrepancy_use_a_solver_that_supports_it() -> None:
    trainer = open_trainer(Classifier().double(), dataset := blobs(200))
    report = trainer.influence(batch_of(dataset, slice(0, 40)), per_example=True, max_iter=83, discrepancy=0.5)
    assert report.settings["solver"] == "cg"
    assert all(solution.residual <= 0.5 for solution in report.solutions)
    assert max(solution.iterations for solution in report.solutions) < 83


# ----------------------------------------------------------------------------------------------------------------------
# Self-influence
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_self_influence_is_the_inverse_curvature_norm_of_each_gradient(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", 1024 if exact else 1)
    module, dataset = Classifier().double(), blobs(60)
    report = open_trainer(module, dataset, max_iter=83, batch_size=7).self_influence()
    assert report.scores.shape == (1, 60)
    rows, inverse = damped(module, dataset, report.settings["damping"])
    expected = torch.einsum("np,pq,nq->n", rows, inverse, rows) / 59
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-6 if exact else 1e-3, atol=1e-9)


def test_a_sketch_of_small_rank_overestimates_self_influence_and_keeps_its_order() -> None:
    trainer, _, _ = fitted()
    exact = trainer.self_influence().scores[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_solver, "DENSE_PARAMETERS", 1)
        rough = trainer.self_influence(max_iter=20).scores[0]
    assert (rough > 0.999 * exact).all()
    assert torch.corrcoef(torch.stack([rough.argsort().argsort(), exact.argsort().argsort()]).double())[0, 1] > 0.9


def test_the_sketch_for_self_influence_has_rank_64_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_solver, "DENSE_PARAMETERS", 1)
    trainer, _, _ = fitted()
    report = trainer.self_influence()
    assert report.settings["max_iter"] == 64
    assert "inverse of the curvature: sketch of rank 64\n" in str(report)
    assert trainer.self_influence(max_iter=80).settings["max_iter"] == 80
    assert trainer.self_influence(solver="cg").settings["max_iter"] == 64
    assert trainer.self_influence(rtol=1e-3).settings["max_iter"] == 64
    assert trainer.self_influence(memory=0).settings["max_iter"] == 64  # the smallest rank of a sketch
    assert fitted(dataset=blobs(10))[0].self_influence().settings["max_iter"] == 64
    assert trainer.influence(blobs(20).tensors, per_example=True).settings["max_iter"] > 64


def test_self_influence_can_be_restricted_to_cached_targets_and_to_some_examples() -> None:
    trainer, _, _ = fitted()
    whole, part = trainer.self_influence(), trainer.self_influence(targets="cached")
    assert part.targets is trainer.callbacks[0].targets
    assert (part.scores < whole.scores).any()
    some = trainer.self_influence(among=[5, 3])
    torch.testing.assert_close(some.scores, whole.scores[:, [5, 3]])
    assert some.indices.tolist() == [5, 3]


def test_wrong_labels_have_high_self_influence() -> None:
    dataset = blobs(200)
    x, y = dataset.tensors
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[::10] = True
    trainer, _, _ = fitted(dataset=TensorDataset(x, torch.where(wrong, (y + 1) % 3, y)))
    scores = trainer.self_influence().scores[0]
    above = (scores[wrong][:, None] > scores[~wrong]).double().mean()
    assert above > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# Scores of some examples, and scores in a folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("among", [[5, 3, 11], lambda batch: batch[1] == 2])
def test_scores_of_some_examples_equal_their_scores_among_all(among: Any) -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    whole, some = trainer.influence(query), trainer.influence(query, among=among)
    expected = [5, 3, 11] if isinstance(among, list) else (dataset.tensors[1] == 2).nonzero().flatten().tolist()
    assert some.indices.tolist() == expected
    torch.testing.assert_close(some.scores, whole.scores[:, expected], rtol=1e-4, atol=1e-8)


def test_invalid_choices_of_examples_to_score_are_refused() -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(ConfigurationError, match="`among` must be indices"):
        trainer.influence(batch_of(dataset, slice(0, 3)), among="all")


def test_scores_in_a_folder_resume_after_an_interruption(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=0))
    query = batch_of(dataset, slice(0, 3))
    options: dict[str, Any] = {"per_example": True, "batch_size": 16}
    expected = trainer.influence(query, **options)
    seen: list[int] = []
    original = Objective.directional_derivatives

    def fragile(self: Objective, batch: Batch, directions: Tensor) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch.size)
        return original(self, batch, directions)

    monkeypatch.setattr(Objective, "directional_derivatives", fragile)
    with pytest.raises(KeyboardInterrupt):
        trainer.influence(query, **options, scores_to=tmp_path / "scores")
    monkeypatch.setattr(Objective, "directional_derivatives", original)

    def no_solve(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the solve is done")

    left: list[int] = []

    def counted(self: Objective, batch: Batch, directions: Tensor) -> Tensor:
        left.append(batch.size)
        return original(self, batch, directions)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "directional_derivatives", counted)
        patch.setattr(SolverInverse, "fit", no_solve)
        report = trainer.influence(query, **options, scores_to=tmp_path / "scores")
    assert sum(seen) + sum(left) == len(dataset)
    assert torch.equal(report.scores, expected.scores)
    assert report.solution.summary()["hvps"] == expected.solution.hvps
    assert "proponents" in str(report)
    names = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert names == ["directions-0.safetensors", "done.bin", "manifest.json", "scores.bin"]
    with safe_open(tmp_path / "scores" / "directions-0.safetensors", "pt") as file:
        assert len(file.get_tensor("directions")) == 0  # the diagnostics of the solves are still there

    with monkeypatch.context() as patch:
        patch.setattr(SolverInverse, "fit", no_solve)
        finished = trainer.influence(query, **options, scores_to=tmp_path / "scores")
    assert torch.equal(finished.scores, expected.scores)
    assert finished.solution.summary()["hvps"] == expected.solution.hvps


def test_damaged_scores_of_a_finished_call_are_computed_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=0))
    query = batch_of(dataset, slice(0, 3))
    expected = trainer.influence(query, scores_to=tmp_path / "scores").scores.clone()
    content = bytearray((tmp_path / "scores" / "scores.bin").read_bytes())
    content[8] ^= 1
    (tmp_path / "scores" / "scores.bin").write_bytes(content)
    fit, solved = SolverInverse.fit, list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        solved.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(SolverInverse, "fit", counted)
    with pytest.warns(GIFWarning, match="1 of 48 examples in .* are damaged"):
        assert torch.equal(trainer.influence(query, scores_to=tmp_path / "scores").scores, expected)
    assert torch.equal(trainer.influence(query, scores_to=tmp_path / "scores").scores, expected)
    assert len(solved) == 1


@pytest.mark.parametrize("stored", [5, None, [], {}, {"solutions": [1], "curvature": {}, "damping": 0.1}])
def test_stored_solve_diagnostics_are_read_or_refused(stored: Any, tmp_path: Any) -> None:
    trainer, module, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    trainer.influence(query, scores_to=tmp_path)
    directions = {"directions": torch.empty(0, sum(parameter.numel() for parameter in module.parameters()))}
    metadata = {"told": json.dumps(stored), "digest": digest(directions, stored)}
    save_file(directions, tmp_path / "directions-0.safetensors", metadata)
    with pytest.raises(ConfigurationError, match=r"directions-0.*its solves are repeated"):
        trainer.influence(query, scores_to=tmp_path)


def test_model_states_with_stored_ihvps_are_not_solved_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=2), max_epochs=3)
    query = batch_of(dataset, slice(0, 3))
    options: dict[str, Any] = {"per_example": True, "snapshots": True}
    expected = trainer.influence(query, **options)
    fit, solved = SolverInverse.fit, list[int]()

    def fragile(*args: Any, **kwargs: Any) -> Any:
        if len(solved) == 1:
            raise KeyboardInterrupt
        solved.append(1)
        return fit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SolverInverse, "fit", fragile)
        with pytest.raises(KeyboardInterrupt):
            trainer.influence(query, **options, scores_to=tmp_path / "scores")
    again = list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        again.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(SolverInverse, "fit", counted)
    report = trainer.influence(query, **options, scores_to=tmp_path / "scores")
    assert len(again) == len(expected.settings["snapshots"]) > 0  # of these and the present state the first was there
    assert torch.equal(report.scores, expected.scores)


def test_scores_of_another_call_are_not_resumed(tmp_path: Any) -> None:
    trainer, module, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    done = trainer.influence(query, scores_to=tmp_path / "scores")
    again = trainer.influence(query, scores_to=tmp_path / "scores")
    assert torch.equal(again.scores, done.scores)
    changes: dict[str, dict[str, Any]] = {
        "queries": {"batch": batch_of(dataset, slice(1, 4))},
        "damping": {"damping": 0.7},
        "n_examples, the examples that are scored": {"among": [1, 2]},
        "n_queries, per_example": {"per_example": True},
        "max_iter, seed": {"max_iter": 3, "seed": 4},
    }
    for names, change in changes.items():
        with pytest.raises(ConfigurationError, match=rf"differs in: {names}\. This call cannot resume from them"):
            trainer.influence(**{"batch": query, **change}, scores_to=tmp_path / "scores")
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1e-3
    with pytest.raises(ConfigurationError, match="differs in: weights"):
        trainer.influence(query, scores_to=tmp_path / "scores")
    assert torch.equal(done.scores, again.scores)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "holds no scores of an earlier call"),
        ("manifest.json", b"[]", "holds no scores of an earlier call"),
        ("manifest.json", b"{}", "differs in: format, n_queries"),
        ("scores.bin", b"short", "5 bytes"),
        ("done.bin", b"", "0 bytes"),
    ],
)
def test_damaged_scores_are_refused(tmp_path: Any, name: str, content: bytes, message: str) -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    trainer.influence(query, scores_to=tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        trainer.influence(query, scores_to=tmp_path)
    assert (tmp_path / name).read_bytes() == content


def test_damaged_ihvps_are_refused(tmp_path: Any) -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    trainer.influence(query, scores_to=tmp_path)
    (tmp_path / "directions-0.safetensors").write_bytes(b"not one")
    with pytest.raises(ConfigurationError, match="damaged"):
        trainer.influence(query, scores_to=tmp_path)


def test_weight_decay_adds_curvature_in_directions_outside_of_a_sketch() -> None:
    trainer, _, dataset = fitted(dataset=blobs(100))
    query = batch_of(dataset, slice(0, 40))
    options: dict[str, Any] = {"per_example": True, "weight_decay": 0.3, "damping": 1e-3}
    exact = trainer.influence(query, solver="cg", max_iter=200, **options)
    sketched = trainer.influence(query, solver="nystrom", max_iter=40, **options)
    assert sketched.settings["damping"] == 1e-3
    assert (sketched.scores - exact.scores).norm() < 0.05 * exact.scores.norm()


@pytest.mark.parametrize("method", ["gif", "pif", "sif"])
def test_self_influence_refuses_methods_that_are_not_symmetric(method: str) -> None:
    trainer, _, _ = fitted(callback=GIFCallback(method=method))
    with pytest.raises(ConfigurationError, match=r"trainer.self_influence\(method='if'\)"):
        trainer.self_influence()
    assert trainer.self_influence(method="if").scores.shape == (1, 48)


def test_scores_of_other_frozen_weights_are_not_resumed(tmp_path: Any) -> None:
    module = Classifier()
    module.net[0].requires_grad_(False)
    trainer, _, dataset = fitted(module)
    query = batch_of(dataset, slice(0, 3))
    trainer.influence(query, scores_to=tmp_path)
    with torch.no_grad():
        module.net[0].weight[0, 0] += 1e-3
    with pytest.raises(ConfigurationError, match="differs in: weights"):
        trainer.influence(query, scores_to=tmp_path)


@pytest.mark.parametrize("per_example", [False, True])
def test_only_the_strongest_scores_are_kept_with_their_ranks_among_all(tmp_path: Any, per_example: bool) -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, slice(0, 3))
    options: dict[str, Any] = {"per_example": per_example, "batch_size": 7, "k": 2}
    whole = trainer.influence(query, **options)
    report = trainer.influence(query, **options, keep=5)
    assert report.scores.shape == report.indices.shape == (3 if per_example else 1, 10)
    assert report.n_train == report.summary()["n_train"] == len(dataset)
    for k in (1, 2, 5):
        for ends, expected in ((report.proponents(k), whole.proponents(k)), (report.opponents(k), whole.opponents(k))):
            assert torch.equal(ends.indices, expected.indices)
            assert torch.equal(ends.scores, expected.scores)
    lines = [line for line in str(whole).splitlines()[1:] if "by class: " not in line]  # sums need all scores
    assert str(report).splitlines()[1:] == lines
    table = report.to_dataframe().query("query == 0")
    scores = dict(zip(whole.indices.tolist(), whole.scores[0].tolist(), strict=True))
    assert [scores[index] for index in table["index"]] == table["score"].tolist()
    report.plot()
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report", dataset)
    assert repr(loaded) == repr(report)
    assert torch.equal(loaded.proponents(5).indices, report.proponents(5).indices)
    with pytest.raises(ConfigurationError, match="kept 5 scores of each end"):
        report.proponents(6)
    with pytest.raises(ConfigurationError, match="sums of groups"):
        report.by_group()


def test_keeping_half_of_the_scores_at_each_end_keeps_all() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, slice(0, 3)), keep=len(dataset) // 2)
    assert report.scores.shape == (1, len(dataset))
    report.by_group()


@pytest.mark.parametrize("keep", [0, -1, True, 2.0, 9, "all"])
def test_invalid_values_of_keep_are_refused(keep: Any) -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(
        ConfigurationError, match=r"`keep` must be None or a whole number of at least k=10.* a smaller `k`"
    ):
        trainer.influence(batch_of(dataset, slice(0, 3)), keep=keep)


def test_scores_to_and_keep_exclude_each_other(tmp_path: Any) -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(ConfigurationError, match="Give only one of them"):
        trainer.influence(batch_of(dataset, slice(0, 3)), keep=20, scores_to=tmp_path)


def test_scores_to_refuses_a_file(tmp_path: Path) -> None:
    trainer, _, dataset = fitted()
    (tmp_path / "scores").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"to a folder, but .* is a file"):
        trainer.influence(batch_of(dataset, slice(3)), scores_to=tmp_path / "scores")
    assert (tmp_path / "scores").read_text() == "mine"


def test_scores_that_need_much_memory_go_to_a_folder_from_which_the_call_resumes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, dataset = fitted()
    trainer._default_root_dir = str(tmp_path)
    query = batch_of(dataset, slice(0, 3))
    expected = trainer.influence(query, memory=0.0)
    assert not list(tmp_path.glob("lightning_gif_scores/*"))
    monkeypatch.setattr(memory, "ALWAYS_IN_MEMORY", 8 * len(dataset) - 1)
    kept = trainer.influence(query, memory=0.0, keep=10)
    assert not list(tmp_path.glob("lightning_gif_scores/*"))
    found = trainer.influence(query, memory=0.0)
    (folder,) = tmp_path.glob("lightning_gif_scores/*")
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(kept.proponents().indices, found.proponents().indices)
    (folder / "done.bin").write_bytes(bytes(4 * len(dataset)))
    (folder / "scores.bin").write_bytes(bytes(8 * len(dataset)))
    assert torch.equal(trainer.influence(query, memory=0.0).scores, expected.scores)
    assert list(tmp_path.glob("lightning_gif_scores/*")) == [folder]


# ----------------------------------------------------------------------------------------------------------------------
# Forward mode is not always the derivative of training
# ----------------------------------------------------------------------------------------------------------------------


class TemporalDifferences(Classifier):
    """Targets computed by the same network, which are constants in training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            target = y + 0.9 * self(x.flip(1)).amax(1)
        return F.mse_loss(self(x)[:, 0], target)


class OwnTemporalDifferences(GIFMixin, TemporalDifferences):
    def influence_loss(self, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            target = y + 0.9 * self(x.flip(1)).amax(1)
        return F.mse_loss(self(x)[:, 0], target, reduction="none")


class Hooked(Classifier):
    """A hook that scales gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        if hidden.requires_grad:
            hidden.register_hook(self.changed)
        return F.cross_entropy(self.net[2](hidden), batch[1])

    def changed(self, gradient: Tensor) -> Tensor:
        return 0.1 * gradient


class Clipped(Hooked):
    """A hook that is not linear, so the gradient of a sum of losses is not the sum of the gradients."""

    def changed(self, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.02, 0.02)


class Reversal(torch.autograd.Function):
    """The gradient reversed, which its forward-mode derivative is not (Ganin and Lempitsky, ICML 2015)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class Reversed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = Reversal.apply(self.net[1](self.net[0](batch[0])))
        return F.cross_entropy(self.net[2](hidden), batch[1])


REVERSE_ONLY = [TemporalDifferences, OwnTemporalDifferences, Hooked, Clipped, Reversed]


def reverse_gradients(module: Classifier, dataset: TensorDataset) -> Tensor:
    """The gradients of training for each example alone, ``(n, p)``."""
    rows = []
    for x, y in dataset:
        loss = module.training_step((x[None], y[None]), 0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


def quiet(kind: type[Classifier]) -> Classifier:
    module = kind().double().eval()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module


@pytest.mark.mostly_slow(2)
@pytest.mark.filterwarnings("ignore:The losses of single examples are computed one after the other")
@pytest.mark.parametrize("kind", [kind for kind in REVERSE_ONLY if kind is not Clipped])
def test_scores_agree_with_training_gradients_if_forward_mode_does_not(kind: type[Classifier]) -> None:
    x, y = blobs(20).tensors
    module, dataset = quiet(kind), TensorDataset(x.double(), y)
    rows = reverse_gradients(module, dataset)
    trainer = asked(module, dataset, method="if", curvature="ggn", batch_size=7)
    drawn = torch.random.get_rng_state()
    single = trainer.influence(batch_of(dataset, slice(0, 4)), damping=0.1)
    few = trainer.influence(batch_of(dataset, slice(0, 4)), damping=0.1, per_example=True)
    many = trainer.influence(batch_of(dataset, slice(None)), damping=0.1, per_example=True)
    assert torch.equal(torch.random.get_rng_state(), drawn)

    # The matrix from second derivatives of the whole batch, as training computes them.
    parameters = list(module.parameters())
    hidden = module.net[1](module.net[0](x.double()))
    logits = module.net[2](hidden)
    columns = []
    for out in logits.flatten():
        columns.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, parameters, retain_graph=True)]))
    jacobian = torch.stack(columns).view(20, 3, -1)
    below = sum(parameter.numel() for parameter in module.net[0].parameters())
    if kind in (Hooked, Reversed):
        jacobian[..., :below] *= -0.5 if kind is Reversed else 0.1
        p = logits.softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    else:
        inner = torch.diag_embed(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64).expand(20, 3))
    matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / 20
    solved = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), rows.T)
    for report, queries in ((single, rows[:4].mean(0)[None]), (few, rows[:4]), (many, rows)):
        expected = queries @ solved / 19
        torch.testing.assert_close(report.scores, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:The losses of single examples are computed one after the other")
def test_gradients_that_a_hook_changes_nonlinearly_have_no_gauss_newton_matrix() -> None:
    x, y = blobs(20).tensors
    dataset = TensorDataset(x.double(), y)
    with pytest.raises(ObjectiveError, match=r"a hook on a tensor that changes gradients"):
        asked(quiet(Clipped), dataset, method="if", curvature="ggn").influence(batch_of(dataset, slice(0, 4)))


@pytest.mark.filterwarnings("ignore:The losses of single examples are computed one after the other")
@pytest.mark.parametrize("kind", REVERSE_ONLY)
@pytest.mark.parametrize("count", [1, 20])
def test_directional_derivatives_are_inner_products_with_training_gradients(kind: type[Classifier], count: int) -> None:
    x, y = blobs(20).tensors
    module, dataset = quiet(kind), TensorDataset(x.double(), y)
    rows = reverse_gradients(module, dataset)
    trainer = make_trainer(precision="64-true")
    attach(trainer, module, train_dataloaders=loader(dataset))
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(dataset), objective.prepare, batch_size=6)
        objective.learn_structure(train)
        objective.learn_derivatives(train)
        directions = torch.randn(count, objective.space.size, dtype=torch.float64)
        found = [objective.directional_derivatives(batch, directions) for batch in train.batches()]
        explicit = torch.cat([part for batch in train.batches() for part in objective.gradients(batch)])
    torch.testing.assert_close(torch.cat(found, 1), directions @ rows.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(explicit, rows, rtol=1e-9, atol=1e-11)


def test_hessian_products_treat_targets_computed_by_the_network_as_constants() -> None:
    x, y = blobs(20).tensors
    module, dataset = quiet(TemporalDifferences), TensorDataset(x.double(), y)
    with torch.no_grad():
        targets = y + 0.9 * module(x.double().flip(1)).amax(1)

    def loss(theta: Tensor) -> Tensor:
        logits = torch.func.functional_call(module, _unflatten(module, theta), (x.double(),))
        return F.mse_loss(logits[:, 0], targets)

    theta = torch.cat([p.detach().flatten() for p in module.parameters()])
    matrix, rows = torch.autograd.functional.hessian(loss, theta), reverse_gradients(module, dataset)
    report = asked(module, dataset, method="if", curvature="hessian").influence(batch_of(dataset, [3]), damping=0.1)
    expected = (
        rows[3]
        @ torch.linalg.solve(matrix.T @ matrix + 0.01 * torch.eye(len(matrix), dtype=torch.float64), matrix @ rows.T)
        / 19
    )
    torch.testing.assert_close(report.scores[0], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_a_few_examples_late_in_the_data_are_enough_to_detect_the_difference() -> None:
    """The first half of the data has terminal states only, whose targets are not predictions."""

    class Terminal(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            with torch.no_grad():
                later = self(x.flip(1)).amax(1)
            return F.mse_loss(self(x)[:, 0], torch.where(y > 1, later, y.to(later.dtype)))

    x, y = blobs(21).tensors
    dataset = TensorDataset(x.double(), y.sort().values)
    module = quiet(Terminal)
    rows = reverse_gradients(module, dataset)
    plain = asked(module, dataset, method="if", curvature="ggn").influence(batch_of(dataset, [20]), damping=10.0)
    many = asked(module, dataset, method="if", curvature="ggn").influence(
        batch_of(dataset, slice(None)), damping=10.0, per_example=True
    )
    torch.testing.assert_close(plain.scores[0], many.scores[20], rtol=1e-9, atol=1e-12)
    assert rows[20].norm() > 1e-3


def test_ordinary_modules_use_forward_mode_also_for_perfectly_fitted_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32, gradients of such examples consist of rounding errors, with any method."""
    module, dataset = Classifier(), blobs(24)
    trainer, calls = make_trainer(max_epochs=1), 0
    with torch.no_grad():
        module.net[2].weight.mul_(60)
    trained = TensorDataset(dataset.tensors[0], module(dataset.tensors[0]).argmax(1))
    attach(trainer, module, train_dataloaders=loader(trained))
    original = torch.func.jvp

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.func, "jvp", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        trainer.influence(batch_of(trained, slice(0, 4)), damping=0.1, batch_size=8)
    with Objective.open(trainer, module) as objective:
        train = Examples.from_loader(loader(trained), objective.prepare, batch_size=8)
        objective.learn_structure(train)
        objective.learn_derivatives(train)
        calls = 0
        objective.directional_derivatives(next(train.batches()), objective.theta[None])
    assert calls == 1


def test_gradients_that_are_all_zero_cause_a_warning() -> None:
    """A unit that the query activates, but no training example does."""

    class Dead(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(torch.relu(self(batch[0]))[:, 0], batch[1].to(self.dtype))

    net = nn.Linear(6, 1)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    dataset = TensorDataset(-torch.rand(12, 6) - 0.1, torch.ones(12))
    trainer = asked(Dead(net), dataset, method="if", curvature="ggn")
    with pytest.warns(GIFWarning) as caught:
        report = trainer.influence((torch.ones(1, 6), torch.zeros(1)), damping=0.1)
    assert not report.scores.any()
    messages = [str(warning.message) for warning in caught]
    assert any("curvature of the training loss is exactly zero" in message for message in messages)
    assert any("scored training examples have a gradient of exactly zero" in message for message in messages)
    with pytest.warns(GIFWarning, match="scored training examples have a gradient of exactly zero"):
        assert not trainer.self_influence(damping=0.1, method="if").scores.any()
