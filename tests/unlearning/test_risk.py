"""The risk of each goal, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lightning_gif.unlearning.risk import QuantileMatchingLoss, bound_curvature

from ..conftest import batch_of, fitted, loader
from .doubles import memorised


def ranked(**groups: tuple[list[float], list[float]]) -> QuantileMatchingLoss:
    objective: Any = None
    pairs = {int(label[1:]): (torch.tensor(mine), torch.tensor(others)) for label, (mine, others) in groups.items()}
    return QuantileMatchingLoss(objective, pairs)


def test_a_forgotten_example_should_have_the_loss_of_the_unseen_one_of_its_class_and_rank() -> None:
    """The median of three has the median of the unseen ones; what is of a class without any keeps its loss."""
    found = ranked(c0=([0.0, 0.1, 0.2], [1.0, 3.0, 4.0]), c1=([5.0], [7.0, 9.0]))
    wanted = found.targets(torch.tensor([0.1, 5.0, 0.3]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(wanted, torch.tensor([3.0, 8.0, 0.3]))
    same = torch.rand(1000).sort().values.tolist()
    wanted = ranked(c0=(same, same)).targets(torch.tensor(same), torch.zeros(1000, dtype=torch.long))
    torch.testing.assert_close(wanted, torch.tensor(same), atol=5e-3, rtol=0)


def test_a_loss_that_is_computed_anew_stands_where_it_stood_up_to_rounding() -> None:
    """In batches of another size, or another process, the last bits are others."""
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0)).sort().values
    found, classes = ranked(c0=(losses.tolist(), [0.0, 10.0])), torch.zeros(50, dtype=torch.long)
    wanted = found.targets(losses, classes)
    torch.testing.assert_close(wanted, 10 * (torch.arange(50) + 0.5) / 50)
    for change in (1e-6, -1e-6):
        torch.testing.assert_close(found.targets(losses * (1 + change), classes), wanted, rtol=0, atol=0.02)


def test_equal_losses_have_the_rank_in_their_middle() -> None:
    """A saturated net, whose losses are all zero, is not taken for one that has nothing to forget."""
    wanted = ranked(c0=([0.0] * 100, [1.0, 2.0, 3.0])).targets(torch.zeros(4), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(wanted, torch.full((4,), 2.0))


def test_the_risk_of_single_examples_is_what_they_lack_of_the_unseen_losses() -> None:
    """With the weight of eight retained losses, half the mean of what is lacked squared, in the unit of its size."""
    trainer, module, trained, unseen = memorised()
    with torch.no_grad():
        forgotten = F.cross_entropy(module(trained.tensors[0][:24]), trained.tensors[1][:24], reduction="none")
        others = F.cross_entropy(module(unseen.tensors[0]), unseen.tensors[1], reduction="none")
    lack = torch.zeros(24)
    for label in range(3):
        here = (trained.tensors[1][:24] == label).nonzero().squeeze(1)
        rank = (forgotten[here].argsort().argsort() + 0.5) / len(here)
        lack[here] = (torch.quantile(others[unseen.tensors[1] == label], rank) - forgotten[here]).clamp_min(0)
    short = lack[lack > 0.05 * lack.square().mean().sqrt()]
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen), step="natural", dry_run=True)
    expected = report.retain.before + 8 * (24 / 36) * len(short) / 24 * float(short.square().mean().sqrt()) / 2
    assert report.trials[0].risk == pytest.approx(expected, rel=1e-4)


def test_unseen_examples_of_other_classes_are_not_used() -> None:
    trainer, _, _, unseen = memorised()
    y = trainer.train_dataloader.dataset.tensors[1]
    most = y.mode().values
    mine = (y == most).nonzero().squeeze(1)[:20].tolist()
    others = unseen.tensors[1] != most
    strangers = TensorDataset(*(tensor[others] for tensor in unseen.tensors))
    options = {"dry_run": True, "step": lambda problem: (problem.influence_direction(), problem.evaluate(1.0))[1]}
    assert len(mine) == 20
    with_them = trainer.unlearn(mine, unseen=loader(strangers), **options)
    assert math.isnan(with_them.memorization[0])
    assert with_them.trials[0].risk == trainer.unlearn(mine, unseen=False, **options).trials[0].risk


@pytest.mark.parametrize("gone", [[1], [0, 2]])
def test_the_risk_of_a_class_is_a_divergence_from_the_model_without_it(gone: list[int]) -> None:
    """At the trained weights it is known in closed form: ``KL(q ‖ p) = −log(1 − p(gone))``."""
    trainer, module, dataset = fitted()
    x, y = dataset.tensors
    forget = torch.isin(y, torch.tensor(gone))
    probability = module.eval()(x).softmax(1)[:, gone].sum(1).double()
    log_others = (1 - probability.detach()).log()
    report = trainer.unlearn(batch_of(dataset, forget), curvature_examples=len(y), dry_run=True)
    expected = -log_others[~forget].mean() - 0.2 * log_others[forget].mean()
    assert report.trials[0].risk == pytest.approx(float(expected), rel=1e-4)
    predicted = torch.isin(module(x[forget]).argmax(1), torch.tensor(gone))
    assert report.memorization[0] == pytest.approx(float(predicted.double().mean()))


@pytest.mark.parametrize("at", [-12.0, -2.0, 0.0, 0.5, 4.0, 15.0])
def test_the_curvature_of_far_log_odds_bounds_the_unlikelihood(at: float) -> None:
    odds = torch.tensor(at, dtype=torch.float64)
    curvature = bound_curvature(odds)
    z = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    bound = F.softplus(odds) + odds.sigmoid() * (z - odds) + curvature / 2 * (z - odds).square()
    assert (bound - F.softplus(z)).min() > -1e-9
    lowest = float(odds - odds.sigmoid() / curvature)
    assert lowest == pytest.approx(-abs(at) / math.tanh(abs(at) / 2) if at else -2.0, rel=1e-3)


def test_the_risk_of_labels_is_that_of_the_corrected_ones_at_the_start() -> None:
    trainer, _, dataset = fitted()
    new = (dataset.tensors[1][:8] + 1) % 3
    report = trainer.unlearn(batch_of(dataset, slice(0, 8)), relabel=new, step="natural", dry_run=True)
    assert report.relabelled is not None
    assert report.trials[0].risk == pytest.approx(8 * 8 / 40 * report.relabelled.before, rel=1e-4)
