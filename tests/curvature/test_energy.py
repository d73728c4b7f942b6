"""Gradient energies against dense computations in float64, and the selectors that rank by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, InfluenceReport, SelectionError, UnlearnReport, attach
from lightning_gif.curvature import ekfac
from lightning_gif.curvature.energy import gradient_energies, gradient_share
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.selection import SELECTORS, Blocks, energy_of
from lightning_gif.solvers import to_matrix

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights

SELECTED = [name for name in SELECTORS if energy_of(name) is not None]
NETS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(5, 3), torch.randn(20, 5)),
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(20, 5)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(20, 1, 4, 4),
    ),
}


@contextmanager
def opened(name: str, batch_size: int = 8, order: Tensor | None = None) -> Iterator[tuple[Objective, Examples, Any]]:
    make, x = NETS[name]
    torch.manual_seed(0)
    module, y = Classifier(make()), torch.arange(len(x)) % 3
    data = (x, y) if order is None else (x[order], y[order])
    callback = GIFCallback(curvature="ggn", double=True, batch_size=batch_size)
    with Objective.open(make_trainer(), module, double=True) as objective:
        examples = Examples.from_batch(data, objective.prepare, batch_size=batch_size)
        yield objective, objective.learn_structure(examples), callback.settings


def rows_of(objective: Objective, examples: Examples) -> Tensor:
    """The gradient of each example, by one backward pass for each."""
    found = []
    for batch in examples.batches():
        theta = objective.theta.detach().requires_grad_()
        found += [torch.autograd.grad(one, theta, retain_graph=True)[0] for one in objective.losses(theta, batch)]
    return torch.stack(found)


@pytest.mark.parametrize("name", list(NETS))
def test_energies_by_the_diagonal_are_those_of_the_gradients_of_examples(name: str) -> None:
    with opened(name) as (objective, examples, settings):
        rows = rows_of(objective, examples)
        gradient, diagonal = rows[:4].mean(0), rows.square().mean(0)
        found = gradient_energies("fisher_diagonal", objective, examples, settings, gradient)
        dampings = [part.mean().expand(part.numel()) for part in objective.space.unflatten(diagonal).values()]
        expected = gradient.square() / (diagonal + 0.3 * torch.cat(dampings))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        named = {key: objective.space.of(key, found) for key in objective.space.slots}
        blocks = Blocks.of(objective.module, named)
        first = next(iter(named))
        weight = expected[: objective.space.slots[first].size].view(objective.space.slots[first].shape)
        bias = objective.space.of(first.replace("weight", "bias"), expected)
        torch.testing.assert_close(blocks.energies[: len(bias)], weight.flatten(1).sum(1) + bias)
        torch.testing.assert_close(blocks.energies.sum(), expected.sum())


@pytest.mark.parametrize("name", ["linear", "perceptron"])
def test_energies_by_ekfac_are_exact_where_the_matrix_of_a_layer_is_a_kronecker_product(name: str) -> None:
    """It is one for a single example with a single position."""
    with opened(name) as (objective, examples, settings):
        one = examples.subset(torch.tensor([3]))
        gradient = rows_of(objective, examples)[:4].mean(0)
        found = gradient_energies("ekfac", objective, one, settings, gradient)
        matrix = to_matrix(open_curvature(settings, objective, one))
        expected = torch.zeros_like(gradient)
        for part in [slice(0, 18)] if name == "linear" else [slice(0, 24), slice(24, 39)]:
            block = matrix[part, part]
            # One example has three predictions, so no more eigenvalues can differ from zero.
            damped = block + block.diag().sum() / 3 * torch.eye(len(block))
            expected[part] = gradient[part] * torch.linalg.solve(damped, gradient[part])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("energy", ["fisher_diagonal", "ekfac"])
@pytest.mark.parametrize("name", ["perceptron", "convolution"])
def test_energies_depend_neither_on_the_size_of_batches_nor_on_the_order(
    name: str, energy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ekfac, "_DRAWS", 20)  # one random vector for each example, as for many examples
    found = []
    for size, order in ((3, None), (20, None), (7, torch.randperm(20))):
        if order is not None and energy == "ekfac":
            continue  # its random vectors are drawn by position
        with opened(name, size, order) as (objective, examples, settings):
            gradient = torch.linspace(-1, 1, objective.space.size, dtype=torch.float64)
            found.append(gradient_energies(energy, objective, examples, settings, gradient))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("energy", ["fisher_diagonal", "ekfac"])
def test_parameters_without_a_gradient_have_no_energy(energy: str) -> None:
    with opened("perceptron") as (objective, examples, settings):
        first = objective.space.slots["net.0.weight"].size + objective.space.slots["net.0.bias"].size
        objective.theta[first:] = 0.0  # with zero weights above it, the first layer has no gradient and no curvature
        gradient = objective.gradient(examples)
        assert not gradient[:first].any()
        energies = gradient_energies(energy, objective, examples, settings, gradient)
        assert not energies[:first].any()
        assert energies[first:].any()


def test_the_share_of_a_gradient_is_the_ratio_of_squared_norms() -> None:
    gradients = torch.tensor([[3.0, 0.0, 4.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert gradient_share(gradients[:1], torch.tensor([0])) == pytest.approx(9 / 25)
    assert gradient_share(gradients, torch.tensor([0, 1])) == pytest.approx((9 / 25 + 2 / 3 + 0) / 3)
    assert gradient_share(gradients, torch.arange(3)) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# In calls
# ----------------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.view(len(x), 3, 2))[0][:, -1])


def share_of(module: pl.LightningModule, targets: Any, *data: Tensor) -> float:
    """The share of the squared norm of the mean loss's gradient that targets hold."""
    loss = F.cross_entropy(module(data[0]), data[1])
    if len(data) == 3:
        loss = loss - F.cross_entropy(module(data[0]), data[2])
    named = dict(module.named_parameters())
    squares = [part.square().flatten() for part in torch.autograd.grad(loss, list(named.values()))]
    held = sum(float(part[targets[name]].sum()) for name, part in zip(named, squares, strict=True) if name in targets)
    return held / float(torch.cat(squares).sum())


@pytest.mark.parametrize("selector", SELECTED)
@pytest.mark.parametrize("choice", ["batch", "class"])
def test_an_edit_by_them_is_undone_bit_for_bit_and_tells_its_share(selector: str, choice: Any, tmp_path: Path) -> None:
    trainer, module, data = fitted(callback=GIFCallback(selector, ratio=0.4, unconverged="ignore"))
    before, forget = weights(module), batch_of(data, [1, 4, 7])
    assert trainer.callbacks[0].targets is None  # training does not know what will be forgotten
    share = {}
    for relabel in (None, 2):
        report = trainer.unlearn(forget, targets=choice, relabel=relabel, step="natural")
        after = weights(module)
        assert 0 < report.edit.count <= int(0.4 * 83)
        report.undo()
        assert not same_weights(before, after)
        assert same_weights(before, weights(module))
        new = () if relabel is None else (torch.full((3,), relabel),)
        share = report.gradient_share
        assert share == pytest.approx(share_of(module, report.edit.indices, *forget, *new), rel=1e-4)
        assert f"targets hold {100 * share:.0f} % of the gradient" in str(report)
        assert report.summary()["gradient_share"] == share
        report.save(tmp_path / "edit.safetensors")
        assert UnlearnReport.load(tmp_path / "edit.safetensors").gradient_share == share


@pytest.mark.parametrize("selector", SELECTED)
def test_scores_over_them_tell_the_mean_share_of_the_queries(selector: str, tmp_path: Path) -> None:
    trainer, module, data = fitted(callback=GIFCallback(ratio=0.4, unconverged="ignore"))
    query = batch_of(data, [1, 5])
    report = trainer.influence(query, targets="batch", selector=selector, per_example=True)
    shares = [share_of(module, report.targets, *batch_of(data, [index])) for index in (1, 5)]
    assert report.gradient_share == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert f"hold {100 * report.gradient_share:.0f} % of the gradient on average" in str(report)
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert loaded.gradient_share == report.summary()["gradient_share"] == loaded.summary()["gradient_share"]
    assert str(loaded) == str(report)


def test_a_report_over_all_parameters_has_the_share_one() -> None:
    trainer, module, data = fitted()
    query = batch_of(data, [1, 5])
    for report in (
        trainer.influence(query),
        trainer.self_influence(),
        trainer.unlearn(query, method="if", step="natural", dry_run=True),
    ):
        assert report.gradient_share == 1.0
        assert "of the gradient" not in str(report)
    restricted = trainer.self_influence(targets="cached")
    shares = [share_of(module, restricted.targets, *batch_of(data, [index])) for index in range(len(data))]
    assert restricted.gradient_share == pytest.approx(sum(shares) / len(shares), rel=1e-4)


@pytest.mark.parametrize("selector", SELECTED)
def test_there_are_no_cached_targets_by_the_gradient_of_a_batch(selector: str) -> None:
    module, data = Classifier(), blobs(48)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(data), callback=GIFCallback(selector, unconverged="ignore"))
    with pytest.raises(SelectionError, match=r"no cached targets\. Pass targets=.batch., or targets=.class."):
        trainer.influence(batch_of(data, [0]), targets="cached")
    picked = [trainer.influence(batch_of(data, [0, 2]), targets="batch", batch_size=size).targets for size in (16, 48)]
    assert picked[0].jaccard(picked[1]) == 1


def test_a_module_with_parameters_outside_of_layers_is_refused_by_ekfac_only() -> None:
    module, data = Classifier(Recurrent()), blobs(48)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(data), callback=GIFCallback(unconverged="ignore"))
    query = batch_of(data, [0, 2])
    with pytest.raises(SelectionError, match="Use selector='caps', which needs gradients only"):
        trainer.unlearn(query, selector="ekfac_caps")
    report = trainer.unlearn(query, selector="caps", step="natural", ratio=0.3, dry_run=True)
    assert 0 < report.edit.count <= int(0.3 * report.n_parameters)


def test_equal_energies_are_taken_in_the_order_of_the_module() -> None:
    data = TensorDataset(torch.zeros(12, 6), torch.arange(12) % 3)
    module = Classifier(nn.Linear(6, 3))
    with torch.no_grad():
        module.net.bias.zero_()
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(data), callback=GIFCallback("caps", unconverged="ignore"))
    targets = trainer.influence(batch_of(data, [0]), targets="batch", ratio=0.67).targets
    assert targets["net.weight"].tolist() == list(range(12))
    assert targets["net.bias"].tolist() == [0, 1]  # the output of the label, and the first of the others
