"""Removal and relabelling: against closed forms, against retraining, and back to the very same bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import (
    STRATEGIES,
    BatchError,
    ConfigurationError,
    ConvergenceWarning,
    GIFCallback,
    GIFMixin,
    GIFWarning,
    NonFiniteError,
    ObjectiveError,
    TrainingDataError,
    UnlearnReport,
    attach,
)
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.unlearning import (
    GOALS,
    ClassRemoval,
    EditProblem,
    ExampleRemoval,
    LabelCorrection,
    Preconditioner,
    QuadraticModel,
    Relinearisation,
    SampleSizes,
    Trial,
    TrustRegion,
    Tuning,
    problem,
)
from lightning_gif.unlearning.advice import warn_cost, warn_refreshed_statistics
from lightning_gif.unlearning.goals import Goal
from lightning_gif.unlearning.memorization import PredictedShare, count_wrong
from lightning_gif.unlearning.preconditioner import gradient_second_moment, preconditioner
from lightning_gif.unlearning.protocol import GoalName, Limits
from lightning_gif.unlearning.risk import QuantileMatchingLoss, bound_curvature
from lightning_gif.unlearning.strategies import natural, relinearise, search
from lightning_gif.unlearning.task import Scales

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..nets import make


class Quadratic(GIFMixin, Classifier):
    """Least squares: its risk is quadratic, so one natural step must land exactly on the retrained weights."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.influence_loss(batch).mean()

    def influence_loss(self, batch: Any) -> Tensor:
        return (self(batch[0]).squeeze(1) - batch[1]).square()

    def solve(self, x: Tensor, y: Tensor, weight_decay: float = 0.0) -> Tensor:
        """Sets the weights to the exact optimum and returns them, ``(5,)``."""
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        normal = 2 * design.T @ design / len(x) + weight_decay * torch.eye(5, dtype=x.dtype)
        found = torch.linalg.solve(normal, 2 * design.T @ y / len(x))
        with torch.no_grad():
            self.net.weight.copy_(found[None, :4])
            self.net.bias.copy_(found[4:])
        return found

    def flat(self) -> Tensor:
        return torch.cat([self.net.weight.detach().flatten(), self.net.bias.detach()])


def quadratic(n: int = 50, weight_decay: float = 0.0) -> tuple[Any, Quadratic, Tensor, Tensor]:
    x = torch.randn(n, 4, dtype=torch.float64)
    y = x @ torch.randn(4, dtype=torch.float64) + torch.randn(n, dtype=torch.float64)
    module = Quadratic().double()
    module.solve(x, y, weight_decay)
    trainer = make_trainer(precision="64-true")
    callback = GIFCallback(ratio=1.0, solver="dense", curvature_examples=None, weight_decay=weight_decay)
    attach(trainer, module, train_dataloaders=loader(TensorDataset(x, y)), callback=callback)
    return trainer, module, x, y


@pytest.mark.parametrize("method", ["gif", "fif", "pif", "if"])
@pytest.mark.parametrize("m", [1, 7, 20])
def test_the_natural_step_on_a_quadratic_risk_is_retraining(method: str, m: int) -> None:
    trainer, module, x, y = quadratic()
    report = trainer.unlearn((x[:m], y[:m]), step="natural", method=method)
    found = module.flat()
    torch.testing.assert_close(found, Quadratic().double().solve(x[m:], y[m:]), rtol=1e-8, atol=1e-10)
    assert report.n_found == report.n_forget == m
    assert report.n_retain == 50 - m
    # The local model of the retained risk is exact here.
    assert report.retain.predicted == pytest.approx(report.retain.after, rel=1e-8)


@pytest.mark.parametrize("m", [1, 7, 20])
def test_the_natural_step_is_retraining_with_weight_decay_too(m: int) -> None:
    trainer, module, x, y = quadratic(weight_decay=0.3)
    report = trainer.unlearn((x[:m], y[:m]), step="natural")
    expected = Quadratic().double().solve(x[m:], y[m:], weight_decay=0.3)
    torch.testing.assert_close(module.flat(), expected, rtol=1e-8, atol=1e-10)
    assert report.retain.predicted == pytest.approx(report.retain.after, rel=1e-8)
    report.undo()
    assert trainer.unlearn((x[:m], y[:m])).step_sizes == [1.0]


def test_the_second_order_of_a_group_is_closer_than_the_first_over_all_data() -> None:
    trainer, module, x, y = quadratic()
    before, truth = module.flat(), Quadratic().double().solve(x[10:], y[10:])
    report = trainer.unlearn((x[:10], y[:10]), step="natural", method="sif")
    assert report.edit.count == 5
    design = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    g = 2 / 40 * design[:10].T @ (design[:10] @ before - y[:10])
    first = before + torch.linalg.solve(2 / 50 * design.T @ design, g)
    assert (module.flat() - truth).norm() < 0.6 * (first - truth).norm()
    # A repair or a correction works with it as well.
    report.undo()
    corrected = y[:10] + 1.0
    trainer.unlearn((x[:10], y[:10]), relabel=corrected, step="natural", method="sif")
    truth = Quadratic().double().solve(x, torch.cat([corrected, y[10:]]))
    torch.testing.assert_close(module.flat(), truth, rtol=1e-8, atol=1e-10)  # labels do not bend a squared loss


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "ggn"},
        {"double": True},
        {"memory": 0.0},
        {"curvature_sampling": "balanced", "curvature_examples": 30},
        {"curvature_sampling": "logits", "curvature_examples": 30},
        {"curvature_sampling": "features", "curvature_examples": 30},
        {"solver": "lissa"},
        {"solver": "cgls"},
        {"solver": "plain_lissa"},
        {"solver": "stochastic_lissa", "batch_size": 16, "max_iter": 100, "damping": 0.3},
        {"discrepancy": 0.9},
        {"weight_decay": 1e-3},
        {"eigenvalues": 2},
    ],
    ids=str,
)
def test_every_choice_forgets_a_class_and_is_recorded(options: dict[str, Any]) -> None:
    trainer, module, dataset = fitted(max_epochs=20)
    before = weights(module)
    forget = batch_of(dataset, dataset.tensors[1] == 0)
    report = trainer.unlearn(forget, **options)
    assert report.forget.after > report.forget.before
    assert report.retain.after < 1.5 * report.retain.before + 0.1
    for name, value in options.items():
        assert report.settings[name] == value
    assert report.curvature["kind"] == options.get("curvature", "hessian")
    assert report.curvature["products"] > 0
    if "eigenvalues" in options:
        assert len(report.curvature["largest"]) == len(report.curvature["smallest"]) == 2
        assert report.curvature["largest"][0] > 0
        assert 0 <= report.curvature["negative_share"] <= 1
    if options.get("memory") == 0.0:
        assert report.curvature["batches_kept"] == 0
    assert {name: value.dtype for name, value in weights(module).items()} == {
        name: value.dtype for name, value in before.items()
    }
    report.undo()
    assert same_weights(weights(module), before)


def test_the_search_finds_the_natural_step_where_theory_is_exact() -> None:
    trainer, _, x, y = quadratic()
    report = trainer.unlearn((x[:7], y[:7]), step="search")
    assert report.goal is GoalName.EXAMPLES
    assert report.step == 1.0


def test_few_targets_give_the_best_gradient_match_that_they_can() -> None:
    """GIF on some parameters: the gradient of the retained risk is as small as least squares allows."""
    trainer, module, x, y = quadratic()
    names = ["net.bias"]
    report = trainer.unlearn((x[:7], y[:7]), step="natural", selector=names)
    assert set(report.edit.indices) == set(names)
    design = torch.cat([x[7:], torch.ones(43, 1, dtype=torch.float64)], 1)
    column = (2 / 43 * design.T @ design)[:, 4]
    before = Quadratic().double().solve(x, y)
    g = -2 / 43 * design.T @ (y[7:] - design @ before)  # ∇L_R at the optimum of L, which is −g
    expected = before[4] - column @ g / (column @ column)
    torch.testing.assert_close(module.flat()[4], expected, rtol=1e-8, atol=0)


def test_relabelling_moves_towards_the_corrected_optimum() -> None:
    trainer, module, x, y = quadratic()
    before, corrected = module.flat(), y.clone()
    corrected[:5] += 3.0
    truth = Quadratic().double().solve(x, corrected)
    report = trainer.unlearn((x[:5], y[:5]), relabel=corrected[:5])
    assert report.goal is GoalName.LABELS
    assert report.relabelled is not None
    assert report.relabelled.after < report.relabelled.before
    # One solve with the retained Hessian is not the corrected one, but most of the way.
    assert (module.flat() - truth).norm() < 0.25 * (before - truth).norm()


@pytest.mark.parametrize("relabel", [2, torch.tensor([2, 2, 2, 2]), lambda batch: torch.full((len(batch[1]),), 2)])
def test_labels_can_be_given_as_a_class_a_tensor_or_a_function(relabel: Any) -> None:
    trainer, module, dataset = fitted()
    forget = batch_of(dataset, torch.arange(0, 12, 3))  # four examples of class 0
    expected = trainer.unlearn(forget, relabel=torch.full((4,), 2), dry_run=True)
    found = trainer.unlearn(forget, relabel=relabel)
    assert found.relabelled == expected.relabelled
    assert found.relabelled is not None
    assert found.relabelled.after < found.relabelled.before
    loss = F.cross_entropy(module.eval()(forget[0]), torch.full((4,), 2)).item()
    assert loss == pytest.approx(found.relabelled.after, rel=1e-5)


def test_a_relabelled_loader_takes_targets_in_dataset_order() -> None:
    trainer, _, dataset = fitted()
    chosen = [3, 30, 12, 6]
    new = torch.tensor([1, 2, 1, 2])
    expected = trainer.unlearn(batch_of(dataset, chosen), relabel=new, dry_run=True)
    found = trainer.unlearn(DataLoader(Subset(dataset, chosen), 3), relabel=new, dry_run=True)
    assert found.relabelled is not None
    assert expected.relabelled is not None
    assert found.relabelled.after == pytest.approx(expected.relabelled.after)


# ----------------------------------------------------------------------------------------------------------------------
# What is forgotten, and what is kept
# ----------------------------------------------------------------------------------------------------------------------


def test_examples_are_found_by_content_and_by_index_alike() -> None:
    trainer, _, dataset = fitted()
    chosen = [5, 17, 40]
    by_content = trainer.unlearn(batch_of(dataset, chosen), dry_run=True)
    by_index = trainer.unlearn(DataLoader(Subset(dataset, chosen), 2), dry_run=True)
    nested = trainer.unlearn(DataLoader(Subset(Subset(dataset, range(5, 48)), [0, 12, 35]), 2), dry_run=True)
    for report in (by_content, by_index, nested):
        assert (report.n_forget, report.n_found, report.n_retain) == (3, 3, 45)
        assert report.retain == pytest.approx(by_content.retain)


def test_what_to_forget_can_be_given_as_indices_or_as_a_question() -> None:
    trainer, _, dataset = fitted()
    chosen = [40, 5, 17]
    expected = trainer.unlearn(DataLoader(Subset(dataset, chosen), 2), dry_run=True)
    by_index = trainer.unlearn(chosen, dry_run=True)
    wanted = dataset.tensors[0][chosen]
    asked = trainer.unlearn(lambda batch: (batch[0][:, None] == wanted).all(-1).any(-1), dry_run=True)
    for report in (by_index, asked):
        assert (report.n_forget, report.n_found, report.n_retain) == (3, 3, 45)
        assert tuple(report.forget) == pytest.approx(tuple(expected.forget), rel=1e-3)
        assert tuple(report.retain) == pytest.approx(tuple(expected.retain), rel=1e-3)
    of_class = trainer.unlearn(lambda batch: batch[1] == 1, dry_run=True)
    assert (of_class.n_forget, of_class.n_retain, of_class.goal) == (16, 32, GoalName.CLASS)
    assert trainer.unlearn(range(4), dry_run=True).n_forget == 4


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, numpy.array, lambda ids: list(numpy.array(ids))])
def test_new_labels_come_in_the_order_of_the_indices(kind: Any) -> None:
    trainer, _, dataset = fitted()
    new = torch.tensor([1, 2, 0])
    expected = trainer.unlearn(batch_of(dataset, [40, 5, 17]), relabel=new, dry_run=True)
    found = trainer.unlearn(kind([40, 5, 17]), relabel=new, dry_run=True)
    assert found.relabelled is not None
    assert expected.relabelled is not None
    assert found.relabelled.after == pytest.approx(expected.relabelled.after, rel=1e-4)
    with pytest.raises(TrainingDataError, match="given twice"):
        trainer.unlearn(kind([5, 5, 17]))


def test_only_the_training_examples_of_a_loader_can_be_named() -> None:
    """A loader over part of a dataset: indices mean the dataset that the loader is over."""
    dataset = blobs()
    trainer, _, _ = fitted(dataset=Subset(dataset, range(10, 48)))  # type: ignore[arg-type]
    assert trainer.unlearn([0, 37], dry_run=True).n_retain == 36
    with pytest.raises(
        TrainingDataError, match=r"1 of the \d+ given dataset indices belong to no training example: \[38\]"
    ):
        trainer.unlearn([0, 38])


@pytest.mark.parametrize(
    ("question", "error", "match"),
    [
        (lambda batch: batch[1] > 5, TrainingDataError, "true for none of the 48"),
        (lambda batch: batch[1], BatchError, r"a bool tensor of shape \[48\]; it returned int64"),
        (lambda batch: True, BatchError, "it returned bool"),
        (lambda batch: (batch[1] == 1)[:3], BatchError, r"it returned bool\[3\]"),
        (lambda one: one[1].item() == 1, BatchError, "truth values: RuntimeError: .* It was called with a whole batch"),
        (lambda batch: numpy.array([None] * len(batch[1])), BatchError, "returned no truth values: TypeError"),
        (lambda batch: ["a"] * len(batch[1]), BatchError, "returned no truth values: ValueError"),
    ],
)
def test_a_question_that_finds_nothing_or_is_no_question_is_refused(question: Any, error: Any, match: str) -> None:
    trainer, module, _ = fitted()
    before = weights(module)
    with pytest.raises(error, match=match):
        trainer.unlearn(question)
    assert same_weights(before, weights(module))


@pytest.mark.parametrize(
    "kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda mask: mask.numpy()[::-1].copy()[::-1]]
)
def test_a_question_can_be_answered_with_a_list_or_an_array(kind: Any) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(lambda batch: kind(batch[1] == 1), dry_run=True)
    assert report.n_forget == int((dataset.tensors[1] == 1).sum())


def memorised(**options: Any) -> tuple[Any, Classifier, TensorDataset, TensorDataset]:
    """A net that has learned random labels by heart, and unseen examples of the kind."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(120, 6, generator=generator), torch.randint(3, (120,), generator=generator)
    trained, unseen = TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    trainer, module, _ = fitted(Classifier(net), trained, GIFCallback(ratio=0.5, **options), max_epochs=60)
    return trainer, module, trained, unseen


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_what_was_learned_by_heart_gets_the_loss_of_unseen_examples(curvature: str) -> None:
    trainer, module, _, unseen = memorised(curvature=curvature)
    with torch.no_grad():
        expected = float(F.cross_entropy(module(unseen.tensors[0]), unseen.tensors[1]))
    plain = trainer.unlearn(list(range(24)), dry_run=True)
    assert math.isnan(plain.memorization[0])
    assert plain.n_unseen == 0
    assert trainer.unlearn(list(range(6)), unseen=loader(unseen), dry_run=True).n_unseen == 0  # too few to tell
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen))
    assert report.n_unseen == 60
    assert report.memorization[0] > 0.6
    assert report.memorization[1] < report.memorization[0]
    assert abs(report.forget.after - expected) < 0.2 * abs(report.forget.before - expected)
    assert report.retain.after - report.retain.before <= 0.1 * (expected - report.retain.before) + 1e-4
    assert report.trials[-1].risk < report.trials[0].risk
    assert "membership AUROC against 60 unseen examples" in str(report)


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
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen), dry_run=True)
    expected = report.retain.before + 8 * (24 / 36) * len(short) / 24 * float(short.square().mean().sqrt()) / 2
    assert report.trials[0].risk == pytest.approx(expected, rel=1e-4)


def test_unseen_examples_of_other_classes_say_nothing() -> None:
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


def test_unseen_examples_with_a_loss_that_is_not_finite_are_refused() -> None:
    trainer, module, _, unseen = memorised()
    before = weights(module)
    unseen.tensors[0][7] = math.nan
    with pytest.raises(NonFiniteError, match="unseen batch"):
        trainer.unlearn(list(range(24)), unseen=loader(unseen))
    assert same_weights(before, weights(module))


def test_the_validation_data_of_fit_are_unseen_examples() -> None:
    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5), max_epochs=5), Classifier(), blobs()
    trainer.fit(module, loader(dataset), [loader(blobs(30, seed=5), shuffle=False)])
    # Whatever the trainer ran since: neither no data, nor test data.
    trainer.test(module, loader(blobs(20, seed=6), shuffle=False), verbose=False)
    trainer.validate(module, loader(blobs(20, seed=6), shuffle=False), verbose=False)
    report = trainer.unlearn(range(20), dry_run=True)
    assert report.n_unseen == 30
    assert trainer.unlearn(range(20), unseen=False, dry_run=True).n_unseen == 0
    given = trainer.unlearn(range(20), unseen=loader(blobs(30, seed=5)), dry_run=True)
    assert report.memorization == given.memorization
    assert trainer.unlearn(lambda batch: batch[1] == 0, dry_run=True).n_unseen == 0  # a class needs none


def test_data_that_were_trained_on_are_not_unseen() -> None:
    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5)), Classifier(), blobs()
    trainer.fit(module, loader(dataset), loader(dataset, shuffle=False))
    assert trainer.unlearn(range(20), dry_run=True).n_unseen == 0
    with pytest.raises(ConfigurationError, match="examples of the training data"):
        trainer.unlearn([0, 1, 2], unseen=loader(Subset(dataset, range(40))))


def test_unseen_examples_that_are_no_harder_leave_the_step_of_the_theory() -> None:
    """Nothing is memorised here, so that nothing more than the theory is to be done."""
    trainer, _, _ = fitted(dataset=blobs(600), max_epochs=3)
    report = trainer.unlearn(range(20), unseen=loader(blobs(300, seed=3)), dry_run=True)
    assert report.n_unseen == 300
    assert report.step > 0


def test_validation_data_of_another_kind_are_no_unseen_examples() -> None:
    class Other(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_norm", batch[0].norm())

    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5)), Other(), blobs()
    trainer.fit(module, loader(dataset), DataLoader(TensorDataset(torch.randn(8, 2)), 4))
    assert trainer.unlearn(range(20), dry_run=True).n_unseen == 0
    with pytest.raises(BatchError, match="unseen batch"):
        trainer.unlearn([0, 1, 2], unseen=DataLoader(TensorDataset(torch.randn(8, 2)), 4))
    with pytest.raises(ConfigurationError, match="`unseen` must be a DataLoader"):
        trainer.unlearn([0, 1, 2], unseen=[1, 2])


def test_how_well_examples_are_told_from_unseen_ones_is_the_area_under_the_curve() -> None:
    """Within each class, averaged over the forgotten examples; ties count half."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1.0], [1.0], [5.0], [0.0]])

    class Loss(GIFMixin, Classifier):
        def influence_loss(self, batch: Any) -> Tensor:
            return batch[0][:, 0] + 1e-3 * self.net.weight.square().sum() * (batch[1] + 1)

    y = torch.tensor([0, 0, 1, 0, 0, 1, 0, 1])
    trainer, module, trained = make_trainer(), Loss(nn.Linear(1, 1)), TensorDataset(x[:5], y[:5])
    attach(trainer, module, train_dataloaders=loader(trained), callback=GIFCallback(ratio=1.0))
    report = trainer.unlearn(
        [0, 1, 2],
        unseen=DataLoader(TensorDataset(x[4:], y[4:]), 2),
        selector=["*"],
        step="natural",
        dry_run=True,
        tuning=Tuning(sample_sizes=SampleSizes(min_compared=1)),
    )
    # Class 0: losses 0 and 1 against 1 and 5: 1 and 3/4. Class 1: 2 against 1 and 0: 0.
    assert report.memorization[0] == pytest.approx((1 + 0.75 + 0) / 3)


def test_examples_that_the_model_never_saw_are_refused() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    x, y = batch_of(dataset, slice(0, 4))
    with pytest.raises(TrainingDataError, match="None of the 4 forget examples is in the training data"):
        trainer.unlearn((x + 1, y))
    assert same_weights(before, weights(module))


def test_all_copies_of_an_example_are_forgotten() -> None:
    x, y = blobs().tensors
    dataset = TensorDataset(torch.cat([x, x[:1].expand(5, -1)]), torch.cat([y, y[:1].expand(5)]))
    trainer, _, _ = fitted(dataset=dataset)
    report = trainer.unlearn((x[:1], y[:1]), dry_run=True)
    assert (report.n_forget, report.n_found, report.n_retain) == (1, 6, 47)
    assert any("6 copies" in note for note in report.notes)


def test_the_classes_that_stay_are_those_of_all_retained_data() -> None:
    """Not only of the examples that the Hessian happens to be taken over."""
    dataset = blobs(120, classes=12)
    trainer, _, _ = fitted(Classifier(nn.Linear(6, 12)), dataset, GIFCallback(unconverged="ignore"))
    for index in range(12):
        report = trainer.unlearn(batch_of(dataset, slice(index, index + 1)), curvature_examples=5, dry_run=True)
        assert report.goal is GoalName.EXAMPLES


def test_unfinished_training_does_not_keep_labels_from_being_corrected() -> None:
    trainer, _, dataset = fitted(max_epochs=1)
    for index in range(4):
        report = trainer.unlearn(batch_of(dataset, slice(index, index + 1)), relabel=(index + 1) % 3, dry_run=True)
        assert 0.2 < report.step < 8
        assert report.relabelled is not None
        assert report.relabelled.after < report.relabelled.before


class Brier(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).softmax(1), F.one_hot(batch[1], 3).float())


class TwoHeads(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(part, batch[1]) for part in (self(batch[0]), -self(batch[0])))


@pytest.mark.parametrize("module", [Brier, TwoHeads])
def test_a_class_whose_predictions_are_unknown_is_removed_as_single_examples_are_with_a_warning(
    module: type[Classifier],
) -> None:
    trainer, _, dataset = fitted(module(), max_epochs=10)
    with pytest.warns(GIFWarning, match="the model's predictions are not known"):
        report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1), dry_run=True)
    assert report.goal is GoalName.EXAMPLES


@pytest.mark.parametrize("factor", [1.0, 200.0])
def test_a_class_is_forgotten_whatever_the_loss_is_multiplied_by(factor: float) -> None:
    class Scaled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return factor * F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    trainer, _, dataset = fitted(Scaled(lr=1e-3), max_epochs=10)
    assert trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1)).memorization[1] <= 0.005


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


def test_what_is_left_of_a_class_is_what_the_model_says_without_it() -> None:
    """The predictions on retained examples end where the trained model is when the class is ruled out."""
    trainer, module, dataset = fitted()
    x, y = dataset.tensors
    before = module.eval()(x[y != 1]).detach()
    expected = before.index_fill(1, torch.tensor([1]), -math.inf).softmax(1)
    trainer.unlearn(batch_of(dataset, y == 1))
    after = module.eval()(x[y != 1]).softmax(1)
    assert (after - expected).abs().mean() < 0.3 * (before.softmax(1) - expected).abs().mean()


@pytest.mark.parametrize("at", [-12.0, -2.0, 0.0, 0.5, 4.0, 15.0])
def test_the_curvature_of_far_log_odds_bounds_the_unlikelihood(at: float) -> None:
    odds = torch.tensor(at, dtype=torch.float64)
    curvature = bound_curvature(odds)
    z = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    bound = F.softplus(odds) + odds.sigmoid() * (z - odds) + curvature / 2 * (z - odds).square()
    assert (bound - F.softplus(z)).min() > -1e-9
    lowest = float(odds - odds.sigmoid() / curvature)
    assert lowest == pytest.approx(-abs(at) / math.tanh(abs(at) / 2) if at else -2.0, rel=1e-3)


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_mask_is_refused_with_what_to_do(kind: Callable[[Tensor], Any]) -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(BatchError, match=r"mask\.nonzero\(\)\.flatten\(\)"):
        trainer.unlearn(kind(dataset.tensors[1] == 1))


def test_too_few_examples_to_compare_with_unseen_ones_are_said_to_be() -> None:
    trainer, _, dataset = fitted()
    unseen = loader(blobs(seed=5))
    report = trainer.unlearn(batch_of(dataset, slice(0, 3)), unseen=unseen, dry_run=True)
    assert any("there are fewer than 20 of one kind" in note for note in report.notes)
    assert not any("too few" in note for note in trainer.unlearn(batch_of(dataset, slice(0, 3)), dry_run=True).notes)


class Shifted(Classifier):
    """Labels are not the columns of the logits."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1] - 1)


def test_labels_that_are_not_those_of_the_loss_are_not_taken_for_predicted_classes() -> None:
    x, y = blobs().tensors
    trainer, module, dataset = fitted(Shifted(), TensorDataset(x, y + 1), max_epochs=20)
    of_class = dataset.tensors[1] == 2
    before = module.eval()(x[of_class]).softmax(1)[:, 1].mean()
    with pytest.warns(GIFWarning, match="and the labels of the batch"):
        report = trainer.unlearn(batch_of(dataset, of_class), step="search")
    assert report.goal is GoalName.EXAMPLES
    assert module.eval()(x[of_class]).softmax(1)[:, 1].mean() < before


class Masked(Classifier):
    """A class that is never predicted has a logit of −∞."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = torch.cat([self(batch[0]), torch.full((len(batch[0]), 1), -math.inf)], 1)
        return F.cross_entropy(logits, batch[1])


class OwnLosses(Classifier):
    """Batches whose tensors disagree on the first dimension."""

    def influence_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class Weighted(Classifier):
    """Neither vectorisable, nor a mean of the losses of single examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([1.0, 2.0, float(torch.tensor(3.0).item())])
        if float(batch[1].sum()) < 0:
            raise AssertionError
        return F.cross_entropy(self(batch[0]), batch[1], weight=weight)


@pytest.mark.parametrize("module", [Masked, OwnLosses, Weighted])
@pytest.mark.filterwarnings("ignore:The loss")
def test_classes_are_forgotten_and_labels_corrected_however_the_loss_is_made(module: type[Classifier]) -> None:
    trainer, _, dataset = fitted(module(), max_epochs=20)
    report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1), dry_run=True)
    assert report.goal is GoalName.CLASS
    assert report.memorization == (pytest.approx(1.0, abs=0.2), 0.0)
    repair = trainer.unlearn(batch_of(dataset, slice(0, 3)), relabel=(dataset.tensors[1][:3] + 1) % 3, dry_run=True)
    assert repair.relabelled is not None
    assert repair.relabelled.after < repair.relabelled.before


def test_the_curvature_of_a_class_is_the_one_that_was_asked_for() -> None:
    trainer, _, dataset = fitted(max_epochs=20)
    forget = batch_of(dataset, dataset.tensors[1] == 0)
    lowest = [
        trainer.unlearn(forget, curvature=kind, eigenvalues=1, dry_run=True).curvature["smallest"][0]
        for kind in ("hessian", "ggn")
    ]
    assert lowest[0] < lowest[1]
    assert lowest[1] > -1e-4


class Scaled(Classifier):
    """A loss that is multiplied by something."""

    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale * F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("factor", [1e-4, 0.01, 100.0])
def test_what_removal_may_cost_does_not_depend_on_what_the_loss_is_multiplied_by(factor: float) -> None:
    trainer, module, _ = fitted(Scaled(), max_epochs=20)
    forget = list(range(12))
    plain = trainer.unlearn(forget, unseen=False, dry_run=True)
    module.scale = factor
    scaled = trainer.unlearn(forget, unseen=False, dry_run=True)
    assert scaled.step_sizes == pytest.approx(plain.step_sizes, rel=0.05)
    assert scaled.retain.after / factor == pytest.approx(plain.retain.after, rel=0.05)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_corrected_labels_do_not_depend_on_what_the_loss_is_multiplied_by(factor: float) -> None:
    trainer, module, dataset = fitted(Scaled(), max_epochs=20)
    forget, new = batch_of(dataset, slice(0, 3)), (dataset.tensors[1][:3] + 1) % 3
    plain = trainer.unlearn(forget, relabel=new, dry_run=True).relabelled
    module.scale = factor
    scaled = trainer.unlearn(forget, relabel=new, dry_run=True).relabelled
    assert plain is not None
    assert scaled is not None
    assert scaled.after / factor == pytest.approx(plain.after, rel=0.05)


def test_the_first_step_towards_corrected_labels_is_not_too_long() -> None:
    """The Gauss–Newton matrix of labels that are predicted for certain is next to nothing along much of the slope."""

    def first(problem: Any) -> Trial:
        problem.descent_direction(problem.trials[0])
        return problem.evaluate(1.0)

    rises: dict[float | None, list[float]] = {None: [], 0.0: []}
    for seed in range(6):
        torch.manual_seed(seed)
        trainer, _, _ = fitted(max_epochs=10)
        for damping, found in rises.items():
            options: dict[str, Any] = {"damping": damping, "step": first, "dry_run": True}
            report = trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), **options)
            found.append(report.trials[1].risk - report.trials[0].risk)
            assert (report.solve["damping"] > 0) == (damping is None)
    assert sum(rise < 0 for rise in rises[None]) >= 5
    assert sum(rise > 0 for rise in rises[0.0]) >= 5


def test_labels_that_a_first_step_did_nothing_for_get_a_more_cautious_one() -> None:
    """Where the model is sharper than training made it the first step is too long by far more than is tried."""
    trainer, module, _ = fitted(max_epochs=160)
    with torch.no_grad():
        for parameter in module.net[-1].parameters():
            parameter *= 4
    options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "dry_run": True}
    report = trainer.unlearn([3, 17, 30], **options)
    assert report.step_sizes[0] == 0
    assert report.solves[1]["damping"] > 20 * report.solves[0]["damping"]
    (chosen,) = [trial for trial in report.trials if list(trial.step_sizes) == report.step_sizes]
    assert chosen.risk < 0.5 * report.trials[0].risk
    with pytest.warns(GIFWarning, match="No step size lowered"):
        assert not trainer.unlearn([3, 17, 30], damping=0.0, **options).trials[-1].risk < report.trials[0].risk


def test_corrected_labels_do_not_depend_on_the_size_of_batches() -> None:
    """In float64: walks of many steps amplify what float32 rounds."""
    trainer, _, _ = fitted(max_epochs=10)

    def edited(batch_size: int) -> UnlearnReport:
        options: dict[str, Any] = {"batch_size": batch_size, "double": True, "dry_run": True}
        return trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), **options)

    expected = edited(64)
    for found in (edited(16), edited(7)):
        assert found.step_sizes == expected.step_sizes
        for name, value in expected.edit.new.items():
            torch.testing.assert_close(found.edit.new[name], value, rtol=1e-5, atol=1e-6)


def test_the_risk_of_labels_is_that_of_the_corrected_ones_at_the_start() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, slice(0, 8)), relabel=(dataset.tensors[1][:8] + 1) % 3, dry_run=True)
    assert report.relabelled is not None
    assert report.trials[0].risk == pytest.approx(8 * 8 / 40 * report.relabelled.before, rel=1e-4)


def test_how_many_labels_are_not_yet_predicted_as_corrected_is_told() -> None:
    trainer, module, dataset = fitted(max_epochs=20)
    x, new = dataset.tensors[0][:8], (dataset.tensors[1][:8] + 1) % 3

    def wrong() -> float:
        return float((module.eval()(x).argmax(1) != new).double().mean())

    before = wrong()
    report = trainer.unlearn(batch_of(dataset, slice(0, 8)), relabel=new)
    assert report.memorization == (before, wrong())
    assert f"not predicted as the new label: {100 * before:.1f} % -> {100 * wrong():.1f} %" in str(report)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_labels_of_a_quadratic_risk_are_corrected_exactly(weight_decay: float) -> None:
    trainer, module, x, y = quadratic(weight_decay=weight_decay)
    corrected = y.clone()
    corrected[:20] += 3.0
    truth = Quadratic().double().solve(x, corrected, weight_decay)
    trainer.unlearn((x[:20], y[:20]), relabel=corrected[:20])
    torch.testing.assert_close(module.flat(), truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("relabel", [None, 2])
@pytest.mark.parametrize("examples", [slice(0, 6), None])
def test_the_local_model_is_that_of_the_risk(examples: slice | None, relabel: int | None) -> None:
    """Slope and bend along a solved change, against differences of the risk that is measured."""

    def strategy(problem: EditProblem) -> Trial:
        model = problem.descent_direction(problem.trials[0])
        h = 1e-3
        ahead, behind = problem.evaluate(h), problem.evaluate(-h)
        slope, bend = (
            (ahead.risk - behind.risk) / (2 * h),
            (ahead.risk - 2 * problem.trials[0].risk + behind.risk) / h**2,
        )
        assert model.slope == pytest.approx(slope, rel=1e-3)
        assert model.curvature == pytest.approx(bend, rel=1e-2)
        return ahead

    linear = Classifier(nn.Linear(6, 3))  # of which the Gauss–Newton matrix, which labels take, is the Hessian
    trainer, _, dataset = fitted(linear if relabel else None, max_epochs=10)
    forget = batch_of(dataset, dataset.tensors[1] == 1 if examples is None else examples)
    options = {"double": True, "curvature_examples": None, "weight_decay": 0.1, "dry_run": True}
    if relabel is None or examples is not None:
        trainer.unlearn(forget, relabel=relabel, step=strategy, **options)


def test_later_changes_are_newton_steps_on_the_targets() -> None:
    """On a quadratic risk they end where retraining does, from wherever the first change led."""

    def strategy(problem: EditProblem) -> Trial:
        problem.descent_direction(problem.trials[0])
        trial = problem.evaluate(0.5)
        for _ in range(6):
            assert problem.descent_direction(trial).slope < 0
            trial = problem.evaluate(*trial.step_sizes, 1.0)
        return trial

    trainer, module, x, y = quadratic()
    corrected = y.clone()
    corrected[:20] += 3.0
    report = trainer.unlearn((x[:20], y[:20]), relabel=corrected[:20], step=strategy)
    assert [solve["solver"] for solve in report.solves] == ["dense"] + ["truncated_newton"] * 6
    torch.testing.assert_close(module.flat(), Quadratic().double().solve(x, corrected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("share", "factor"), [(1.0, 1 / 3), (0.25, 4.0), (0.0, 128.0), (2.0, 1 / 3)])
def test_the_damping_of_newton_steps_follows_how_well_they_were_predicted(share: float, factor: float) -> None:
    damping: list[float] = []

    def strategy(problem: Any) -> Trial:
        problem.descent_direction(problem.trials[0])
        problem.descent_direction(problem.evaluate(0.0))
        damping.append(problem.newton_damping)
        problem.descent_direction(problem.evaluate(0.0, share) if share else problem.evaluate(0.0))
        damping.append(problem.newton_damping)
        return problem.evaluate(0.0, share)

    trainer, _, x, y = quadratic()
    trainer.unlearn((x[:20], y[:20]), relabel=y[:20] + 3.0, step=strategy, dry_run=True)
    assert damping[1] == pytest.approx(factor * damping[0])


def test_data_to_keep_that_is_to_be_forgotten_is_not_kept() -> None:
    trainer, _, dataset = fitted()
    with pytest.warns(GIFWarning, match="3 of the examples given as `retain`"):
        report = trainer.unlearn(batch_of(dataset, slice(0, 3)), retain=loader(dataset), dry_run=True)
    assert report.n_retain == 45


def test_texts_tell_examples_apart() -> None:
    class Texts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            lengths = torch.tensor([[float(len(text)), text.count("a")] for text in batch[0]])
            return F.cross_entropy(self(lengths), batch[1])

    words = ["a" * i + "b" * (i % 5) for i in range(1, 25)]
    dataset = [(word, i % 2) for i, word in enumerate(words)]
    trainer, _, _ = fitted(Texts(nn.Linear(2, 2), lr=1e-3), dataset)  # type: ignore[arg-type]
    with pytest.warns(GIFWarning, match="one after the other"):
        report = trainer.unlearn((words[:2], torch.tensor([0, 1])), targets="cached", dry_run=True)
    assert (report.n_found, report.n_retain, report.goal) == (2, 22, GoalName.EXAMPLES)


def test_examples_that_are_not_in_the_training_data_are_pointed_out() -> None:
    trainer, _, dataset = fitted()
    x, y = batch_of(dataset, slice(0, 4))
    with pytest.warns(GIFWarning, match="2 of the 4 forget examples were not found"):
        report = trainer.unlearn((torch.cat([x[:2], x[2:] + 1]), y), dry_run=True)
    assert report.n_found == 2
    assert any("not found" in note for note in report.notes)


def test_a_class_stays_a_class_of_the_data_whatever_is_given_as_retained() -> None:
    """Two of sixteen examples are not their class, though the loader of what to keep has none of the others."""
    trainer, _, dataset = fitted(max_epochs=20)
    others = DataLoader(Subset(dataset, [i for i in range(48) if i % 3]), 8)
    assert trainer.unlearn([0, 3], retain=others, dry_run=True).goal is GoalName.EXAMPLES


def test_the_retained_data_can_be_given() -> None:
    trainer, _, dataset = fitted()
    keep = list(range(10, 30))
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), retain=DataLoader(Subset(dataset, keep), 8), dry_run=True)
    assert report.n_retain == 20
    module = trainer.lightning_module.eval()
    x, y = batch_of(dataset, keep)
    assert report.retain.before == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)


def test_a_whole_class_is_told_from_single_examples() -> None:
    trainer, _, dataset = fitted(max_epochs=20)
    members = (dataset.tensors[1] == 1).nonzero().squeeze(1).tolist()
    assert trainer.unlearn(DataLoader(Subset(dataset, members), 8), dry_run=True).goal is GoalName.CLASS
    assert trainer.unlearn(DataLoader(Subset(dataset, members[:-3]), 8), dry_run=True).goal is GoalName.EXAMPLES


def test_the_reported_losses_are_those_of_the_edited_model() -> None:
    trainer, module, dataset = fitted(max_epochs=20)
    members = dataset.tensors[1] == 1
    report = trainer.unlearn(batch_of(dataset, members), dry_run=True)
    module.eval()

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            return tuple(
                F.cross_entropy(module(x), y).item()
                for x, y in (batch_of(dataset, members), batch_of(dataset, ~members))
            )  # type: ignore[return-value]

    assert losses() == pytest.approx((report.forget.before, report.retain.before), rel=1e-5)
    report.apply()
    assert losses() == pytest.approx((report.forget.after, report.retain.after), rel=1e-5)
    assert report.forget.after > math.log(3)


# ----------------------------------------------------------------------------------------------------------------------
# The edit
# ----------------------------------------------------------------------------------------------------------------------


def test_fit_influence_unlearn_undo_and_fit_again(tmp_path: Any) -> None:
    """The story of the README, end to end."""
    trainer, module, dataset = fitted(max_epochs=5)
    before = weights(module)
    report = trainer.influence(batch_of(dataset, slice(0, 2)))
    worst = report.opponents(3).indices[0]
    edit = trainer.unlearn(batch_of(dataset, worst), step="natural")
    after = weights(module)
    assert not same_weights(before, after)
    edit.save(tmp_path / "edit.safetensors")
    edit.undo()
    assert same_weights(before, weights(module))
    loaded = UnlearnReport.load(tmp_path / "edit.safetensors", module)
    loaded.apply()
    assert same_weights(after, weights(module))
    loaded.undo()
    assert same_weights(before, weights(module))
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, loader(dataset))
    assert not same_weights(before, weights(module))


def test_only_the_targets_change() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), step="natural", ratio=0.2)
    for name, value in weights(module).items():
        changed = (value != before[name]).flatten().nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(report.edit.indices.get(name, torch.empty(0)).tolist())
    assert 0 < report.edit.count <= 0.2 * 83


def test_a_dry_run_changes_nothing_and_can_be_made_real() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), step="natural", dry_run=True)
    assert same_weights(before, weights(module))
    report.apply()
    assert not same_weights(before, weights(module))
    report.undo()
    assert same_weights(before, weights(module))


def test_edits_are_undone_in_reverse_order_only() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    first = trainer.unlearn(batch_of(dataset, slice(0, 4)), step="natural", selector=["net.2.*"])
    second = trainer.unlearn(batch_of(dataset, slice(4, 8)), step="natural", selector=["net.2.*"])
    with pytest.raises(ValueError, match="Undo later edits first"):
        first.undo()
    second.undo()
    first.undo()
    assert same_weights(before, weights(module))


@pytest.mark.parametrize("given", [17, [1.5], slice(3), "all", torch.tensor(3)])
def test_what_names_no_examples_is_told_what_would(given: Any) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(BatchError, match="a list of indices of the training dataset"):
        trainer.unlearn(given)


def test_labels_that_the_examples_have_are_no_correction() -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(ObjectiveError, match="equal the old ones"):
        trainer.unlearn([0, 1], relabel=dataset.tensors[1][:2].tolist())


def test_a_report_tells_whether_the_edit_is_in_the_weights(tmp_path: Any) -> None:
    trainer, module, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), dry_run=True)
    assert "not in the weights: apply() applies it" in str(report)
    report.apply()
    assert "The edit is in the weights." in str(report)
    report.save(tmp_path / "edit.safetensors")
    loaded = UnlearnReport.load(tmp_path / "edit.safetensors")
    assert "in the weights" not in str(loaded)  # it is not known in which
    report.undo()
    assert "not in the weights" in str(UnlearnReport.load(tmp_path / "edit.safetensors", module))
    report.apply()
    trainer.unlearn(batch_of(dataset, slice(4, 8)))
    assert "have changed since" in str(report)


def test_a_poor_correction_is_told_to_be_one() -> None:
    """Biases alone cannot give each example the next class."""
    trainer, _, dataset = fitted(max_epochs=20)
    x, y = batch_of(dataset, slice(0, 12))
    with pytest.warns(GIFWarning, match="of the corrected examples are not predicted"):
        trainer.unlearn((x, y), relabel=(y + 1) % 3, selector=["*bias"], dry_run=True)


def test_the_losses_of_unseen_examples_are_reported() -> None:
    trainer, _, _, unseen = memorised()
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen))
    assert report.unseen is not None
    assert report.unseen.after == pytest.approx(
        float(F.cross_entropy(trainer.lightning_module(unseen.tensors[0]), unseen.tensors[1])), rel=1e-5
    )
    assert f"unseen loss: {report.unseen.before:.4g} -> {report.unseen.after:.4g}" in str(report)


def test_a_wrong_name_is_told_which_argument_of_the_call_was_meant() -> None:
    trainer, _, _ = fitted()
    with pytest.raises(ConfigurationError, match="Did you mean 'retain'"):
        trainer.unlearn([0], retains=None)
    with pytest.raises(ConfigurationError, match="Did you mean 'per_example'"):
        trainer.influence([0], per_examples=True)


def test_a_note_says_that_the_optimizer_still_remembers() -> None:
    trainer, _, dataset = fitted()
    assert any("optimizer" in note for note in trainer.unlearn(batch_of(dataset, slice(0, 4))).notes)


@pytest.mark.parametrize("step", [0.25, 3])
def test_a_given_step_is_taken(step: float) -> None:
    trainer, _, dataset = fitted()
    forget = batch_of(dataset, slice(0, 4))
    natural = trainer.unlearn(forget, step="natural", dry_run=True)
    given = trainer.unlearn(forget, step=step, dry_run=True)
    assert given.step == step
    for name in natural.edit.indices:
        change = natural.edit.new[name] - natural.edit.old[name]
        torch.testing.assert_close(given.edit.new[name] - given.edit.old[name], step * change, rtol=1e-3, atol=1e-6)


def test_an_unconverged_solve_warns_and_the_record_says_so() -> None:
    trainer, _, dataset = fitted()
    with pytest.warns(ConvergenceWarning):
        report = trainer.unlearn(
            batch_of(dataset, slice(0, 4)), max_iter=1, rtol=1e-6, unconverged="warn", dry_run=True
        )
    assert report.solve["status"] == "max_iter"


# ----------------------------------------------------------------------------------------------------------------------
# How far
# ----------------------------------------------------------------------------------------------------------------------


FLAT = QuadraticModel(0.0, 0.0)
A_CLASS = ClassRemoval()


class Fake:
    """A problem whose trials are given by functions of the step sizes."""

    def __init__(
        self,
        memorization: Callable[..., float] = lambda *steps: 0.0,
        retain: Callable[..., float] = lambda *steps: 0.1,
        *,
        risk: Callable[..., float] | None = None,
        forget: Callable[..., float] = lambda first=0.0, *later: first,
        goal: Goal = A_CLASS,
        target: float | None = 0.01,
        max_retain_loss: float = math.inf,
        models: Sequence[QuadraticModel] = (),
    ) -> None:
        self.rules, self.limits, self.tuning = goal, Limits(target, max_retain_loss), Tuning()
        self._functions = forget, retain, risk or retain, memorization
        self._models = list(models)
        self.solved: list[Trial | None] = []
        self.trials: list[Trial] = []
        self.evaluate()

    def evaluate(self, *step_sizes: float) -> Trial:
        assert len(step_sizes) <= len(self.solved)
        self.trials.append(Trial(step_sizes, *(function(*step_sizes) for function in self._functions)))
        return self.trials[-1]

    def influence_direction(self) -> QuadraticModel:
        assert not self.solved
        return self._solve(None)

    def descent_direction(self, at: Trial) -> QuadraticModel:
        assert at in self.trials
        assert len(at.step_sizes) <= len(self.solved)
        return self._solve(at)

    def _solve(self, at: Trial | None) -> QuadraticModel:
        self.solved.append(at)
        return self._models.pop(0) if self._models else FLAT


def beyond(needed: float) -> Callable[..., float]:
    """All are remembered before a step, and none after it."""
    return lambda first=0.0, *later: float(first < needed)


@pytest.mark.parametrize("needed", [0.3, 1.0, 5.0, 700.0])
def test_a_class_is_forgotten_by_about_the_smallest_step_that_does_it(needed: float) -> None:
    problem = Fake(beyond(needed))
    trial = search(problem)
    assert trial.memorization == 0.0
    assert max(needed, 1.0) <= trial.step_sizes[0] <= 1.05 * max(needed, 1.0)
    assert trial in problem.trials


def test_the_search_stops_at_what_forgetting_may_cost() -> None:
    problem = Fake(lambda s=0.0: 1.0 - s / 100, lambda s=0.0: 0.01 * s, max_retain_loss=0.115)
    trial = search(problem)
    assert trial.memorization > 0.5
    assert 0.08 < trial.retain_loss <= 0.115


def test_no_step_is_made_that_does_not_even_raise_the_loss_of_the_class() -> None:
    problem = Fake(
        lambda s=0.0: 1.0, lambda s=0.0: 1.0 + 0.01 * s, forget=lambda s=0.0: 1.2 - 0.1 * s, max_retain_loss=1.1
    )
    assert not search(problem).is_edit


@pytest.mark.parametrize("explodes", [math.nan, math.inf])
def test_a_step_that_breaks_the_model_is_never_chosen(explodes: float) -> None:
    problem = Fake(beyond(8), lambda s=0.0: 0.1 if s < 5 else explodes)
    assert search(problem).step_sizes[0] < 5
    problem = Fake(
        risk=lambda s=0.0: -s if s < 1.5 else explodes,
        goal=ExampleRemoval(),
        target=None,
        models=[QuadraticModel(-1, 1)],
    )
    assert 1.0 <= search(problem).step_sizes[0] < 1.5
    problem = labels(lambda *steps: explodes if steps else 1.0, QuadraticModel(-2.0, 2.0))
    assert relinearise(problem) == problem.trials[0]


@pytest.mark.parametrize("best", [0.1, 0.3, 1.0, 2.5, 90.0])
def test_the_risk_is_minimised_along_the_change(best: float) -> None:
    problem = Fake(risk=lambda s=0.0: (s / best - 1) ** 2, goal=LabelCorrection(), target=None)
    trial = search(problem)
    assert trial.step_sizes[0] == pytest.approx(best, rel=0.2)
    assert min(other.risk for other in problem.trials) == trial.risk


def test_no_step_is_a_possible_answer() -> None:
    assert not search(
        Fake(risk=lambda s=0.0: s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-1, 1)])
    ).is_edit


def test_single_examples_are_not_chased_far_beyond_the_natural_step() -> None:
    problem = Fake(risk=lambda s=0.0: -s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-1, 1)])
    assert search(problem).step_sizes == (4.0,)
    assert max(trial.step_size for trial in problem.trials) == 4.0


def test_the_step_of_least_risk_is_one_that_can_be_afforded() -> None:
    problem = Fake(
        lambda s=0.0: 0.8,
        lambda s=0.0: 0.1 + 0.1 * s,
        risk=lambda s=0.0: -s,
        goal=ExampleRemoval(),
        target=0.5,
        max_retain_loss=0.25,
        models=[QuadraticModel(-1.0, 0.0)],
    )
    assert 1.0 <= search(problem).step_size <= 1.5


def test_a_natural_step_that_costs_too_much_is_shortened() -> None:
    trial = search(Fake(beyond(0.2), lambda s=0.0: s * 0.5, max_retain_loss=0.115))
    assert 0.2 <= trial.step_sizes[0] < 0.23


def test_the_natural_step_is_natural_whatever_it_does() -> None:
    assert natural(Fake(lambda s=0.0: 1.0, lambda s=0.0: math.inf)).step_sizes == (1.0,)


def labels(
    risk: Callable[..., float], *models: QuadraticModel, memorization: Callable[..., float] = lambda *steps: 0.0
) -> Fake:
    """A label correction in which every change lowers the risk, or should."""
    return Fake(memorization, risk=risk, goal=LabelCorrection(), target=0.2, models=models)


@pytest.mark.parametrize(("left", "solves"), [(0.25, 12), (0.15, 2)])
def test_small_gains_end_the_correction_of_labels_once_few_are_left(left: float, solves: int) -> None:
    models = [QuadraticModel(-0.01, 0.01)] * 12
    problem = labels(lambda *steps: 9.0 - 0.005 * sum(steps), *models, memorization=lambda *steps: left)
    relinearise(problem)
    assert len(problem.solved) == solves


@pytest.mark.parametrize(("left", "solves"), [(0.25, 2), (0.15, 1)])
def test_labels_get_a_second_solve_where_the_first_one_led_nowhere_and_many_are_left(left: float, solves: int) -> None:
    models = [QuadraticModel(-1.0, 1.0)] * 12
    problem = labels(lambda *steps: 9.0 + sum(steps), *models, memorization=lambda *steps: left)
    assert not relinearise(problem).is_edit
    assert len(problem.solved) == solves


def test_a_class_is_forgotten_by_steps_that_lower_the_risk() -> None:
    """Each step promises a fall of 0.5, and the risk falls so."""
    problem = Fake(
        lambda *steps: 1.0 - sum(steps) / 3,
        risk=lambda *steps: 9.0 - 0.5 * sum(steps),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    trial = relinearise(problem)
    assert trial.memorization <= 0.01
    assert problem.solved[0] is problem.trials[0]  # not the change of the theory
    assert len(problem.solved) <= 12


def test_a_class_that_is_forgotten_is_left_alone_where_the_risk_is_next_to_nothing() -> None:
    problem = Fake(beyond(0.5), risk=lambda *steps: 4.0 * 0.02 ** sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 12)
    assert relinearise(problem).risk < 0.003
    assert len(problem.solved) == 1  # whose step was doubled
    problem = Fake(lambda *steps: 1.0, risk=lambda *steps: 9.0 - sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 12)
    relinearise(problem)
    assert len(problem.solved) == 12


def test_a_class_gets_a_second_solve_where_the_first_one_led_nowhere() -> None:
    problem = Fake(
        lambda first=0.0, *later: 1.0 - sum(later),
        risk=lambda first=0.0, *later: 9.0 + first - sum(later),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    trial = relinearise(problem)
    assert trial.step_sizes[0] == 0.0
    assert trial.is_edit
    problem = Fake(risk=lambda *steps: 9.0 + sum(steps), models=[QuadraticModel(-1.0, 1.0)] * 9)
    assert not relinearise(problem).is_edit
    assert len(problem.solved) == 2


@pytest.mark.parametrize("gain", [0.0, 1e-3])
def test_a_class_is_not_left_half_way_where_a_step_is_cut_short_to_almost_nothing(gain: float) -> None:
    """The second change leads up, but for its very beginning; those after it lead down."""

    def risk(first: float = 0.0, second: float = 0.0, *later: float) -> float:
        rise = second if second > 2**-9 else -gain * second * 2**9
        return 9.0 - first + rise - sum(later)

    problem = Fake(
        lambda *steps: 1.0 - sum(steps),
        risk=risk,
        models=[QuadraticModel(-1.0, 1.0), *[QuadraticModel(-1e-3, 1e-3)] * 9],
    )
    trial = relinearise(problem)
    assert len(trial.step_sizes) > 2
    assert sum(trial.step_sizes[2:]) > 1
    hopeless = Fake(
        lambda *steps: 1.0 - sum(steps),
        risk=lambda first=0.0, *later: 9.0 - first + sum(later),
        models=[QuadraticModel(-1.0, 1.0)] * 9,
    )
    assert relinearise(hopeless).step_sizes == (4.0,)
    assert len(hopeless.solved) == 3


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 1), (11, 5), (19, 8)])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_sizes_of_gradients_are_those_of_groups_whatever_the_batches(count: int, groups: int, batch_size: int) -> None:
    trainer, module, data = fitted(precision="64-true")
    with Objective.open(trainer, module) as objective:
        loader = DataLoader(Subset(data, range(count)), 4)
        examples = Examples.from_loader(loader, objective.prepare, batch_size=batch_size)
        objective.learn_structure(examples)
        each = torch.cat([rows for batch in examples.batches() for rows in objective.gradients(batch)])
        found = gradient_second_moment(objective, examples, objective, objective.theta, 8)
    parts = [each[start::groups] for start in range(groups)]
    torch.testing.assert_close(found, sum(len(part) * part.mean(0).square() for part in parts) / groups)


def test_units_are_shares_of_the_weights_and_for_labels_of_large_gradients_small() -> None:
    trainer, module, _ = fitted(precision="64-true")
    with Objective.open(trainer, module) as objective:
        positions = torch.arange(2, objective.space.size, 3)
        scale = partial(preconditioner, objective, positions, numbers=Preconditioner())
        shares = scale(None)
        sizes = [part.square().mean().sqrt() for part in objective.space.unflatten(objective.theta).values()]
        whole = objective.theta.square().mean().sqrt()
        counts = torch.tensor([part.numel() for part in objective.space.unflatten(objective.theta).values()])
        squares = torch.rand(objective.space.size, dtype=torch.float64)
        units = scale(squares)
        again = scale(1e6 * squares)
        nothing = scale(torch.zeros_like(squares))
    torch.testing.assert_close(shares, (torch.stack(sizes) / whole).clamp_min(1).repeat_interleave(counts))
    expected = (squares / squares[positions].mean() + 0.01) ** -0.25
    ratio = units / shares
    torch.testing.assert_close(ratio / ratio[0], expected / expected[0])
    assert ratio[positions].square().mean() == pytest.approx(1)
    torch.testing.assert_close(again, units)
    assert torch.equal(nothing, shares)


def test_labels_are_corrected_with_the_curvature_of_what_is_predicted() -> None:
    """Least squares on a Hessian with negative eigenvalues can lead up, far from the labels."""
    trainer, _, data = fitted()
    y = data.tensors[1]
    options: dict[str, Any] = {"relabel": (y[:6] + 1) % 3, "dry_run": True}
    found = trainer.unlearn(list(range(6)), **options)
    assert found.curvature["kind"] == "ggn"
    assert trainer.unlearn(list(range(6)), curvature="hessian", **options).curvature["kind"] == "hessian"
    assert trainer.unlearn(list(range(6)), step="natural", **options).curvature["kind"] == "hessian"


class Regression(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_targets_of_a_regression_are_corrected_on_the_way_to_what_retraining_finds(
    ratio: float, curvature: str
) -> None:
    x = torch.randn(160, 3)
    y = x[:, :1].sin() + 0.5 * x[:, 1:2] * x[:, 2:]
    wrong = y.clone()
    wrong[::16] += 4.0
    module = Regression(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)))
    callback = GIFCallback(ratio=ratio, curvature=curvature)
    trainer, _, _ = fitted(module, TensorDataset(x, wrong), callback, max_epochs=60)
    report = trainer.unlearn(list(range(0, 160, 16)), relabel=y[::16])
    assert report.relabelled is not None
    assert report.relabelled.after < 0.5 * report.relabelled.before
    assert report.retain.after < report.retain.before  # which the wrong targets had raised
    (chosen,) = [trial for trial in report.trials if list(trial.step_sizes) == report.step_sizes]
    assert 0 < chosen.risk < 0.5 * report.trials[0].risk


@pytest.mark.parametrize("seed", [0, 3])
def test_examples_of_a_regression_are_not_removed_at_the_cost_of_the_others(seed: int) -> None:
    """What is subtracted from the risk leaves it without a lower end, which an edit would follow."""
    torch.manual_seed(seed)
    x = torch.randn(300, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh() + 0.3 * x[:, 2:3] + 0.1 * torch.randn(300, 1)
    wrong = y.clone()
    wrong[::10] = -y[::10] + torch.randn(30, 1)
    module = Regression(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)))
    trainer, _, _ = fitted(module, TensorDataset(x, wrong), max_epochs=40)
    report = trainer.unlearn(list(range(0, 300, 10)), dry_run=True)
    share = 30 / 270
    assert report.retain.after <= (1 + share) * report.trials[0].retain_loss + 1e-6
    assert any(trial.retain_loss > (1 + share) * report.trials[0].retain_loss for trial in report.trials)


def test_examples_are_removed_beside_others_whose_labels_the_loss_leaves_out() -> None:
    class Ignoring(GIFMixin, Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.influence_loss(batch).mean()

        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-1, reduction="none")

    x, y = blobs().tensors
    y = y.clone()
    y[5::6] = -1
    trainer, _, _ = fitted(Ignoring(), TensorDataset(x, y), max_epochs=10)
    assert trainer.unlearn([0, 1], dry_run=True).n_retain == 46


def scales(share: float, *, classes: int | None = None, nat: float = 1.0) -> Scales:
    return Scales(forget_weight=share, n_classes=classes, loss_per_nat=lambda: nat, unseen_loss=None)


def trained(retain: float) -> Trial:
    """The trained model, of whose memorization nothing is known."""
    return Trial((), 1.0, retain, 1.0, math.nan)


@pytest.mark.parametrize(
    ("retain", "share", "classes", "nat", "budget"),
    [
        (2.0, 0.01, None, 1.0, 0.2),  # a tenth
        (2.0, 0.5, None, 1.0, 1.0),  # or the share of what goes
        (-2.0, 0.01, None, 1.0, 0.2),
        (0.0, 0.01, 10, 1.0, 0.01 * math.log(10)),  # of a loss that is next to nothing: of guessing
        (0.0, 0.01, 10, 1e-3, 1e-5 * math.log(10)),
    ],
)
def test_what_removal_may_cost(retain: float, share: float, classes: int | None, nat: float, budget: float) -> None:
    limits = ExampleRemoval().limits(trained(retain), scales(share, classes=classes, nat=nat))
    assert limits.target_memorization is None
    assert limits.max_retain_loss - retain == pytest.approx(budget)


def test_what_corrected_labels_may_cost_before_it_is_told() -> None:
    goal, known, unknown = LabelCorrection(), scales(0.1, classes=10), scales(0.1)  # a classifier, a regression
    assert goal.limits(trained(2.0), known) == (0.2, math.inf)
    assert goal.tolerated_increase(2.0, 0.0, known) == pytest.approx(0.2)
    assert goal.tolerated_increase(0.0, 0.0, known) == pytest.approx(0.05 * math.log(10))
    assert goal.limits(trained(0.0), unknown) == (None, math.inf)
    assert goal.tolerated_increase(0.0, 5.0, unknown) == pytest.approx(0.05)


def test_losses_that_an_edit_raised_are_told() -> None:
    def told(*losses: float) -> list[str]:
        notes: list[str] = []
        before, after = ({"retain": losses[i], "relabelled": losses[i + 1]} for i in (0, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warn_cost(LabelCorrection(), scales(0.1, classes=10), before, after, notes)
        return notes

    assert told(0.1, 3.0, 0.2, 0.1) == []  # 0.05 nats of the loss of guessing are less than 0.115
    assert "retained loss rose from 0.1 to 0.3" in told(0.1, 3.0, 0.3, 0.1)[0]
    assert told(0.1, 3.0, 0.1, 3.2) == []
    assert "corrected examples rose from 3 to 3.5" in told(0.1, 3.0, 0.1, 3.5)[0]


@pytest.mark.parametrize(("old", "new", "count"), [(0.5, 0.6, 1), (0.5, 0.54, 0), (-1.006, -1.018, 0), (-1.0, -0.8, 1)])
def test_statistics_that_raise_a_loss_are_told(old: float, new: float, count: int) -> None:
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_refreshed_statistics({"retain": old, "relabelled": 1.0}, {"retain": new, "relabelled": 1.0}, notes)
    assert len(notes) == count


def test_that_the_last_change_of_all_still_helped_is_told() -> None:
    trainer, _, _ = fitted(max_epochs=60)
    report = trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), dry_run=True)
    assert len(report.step_sizes) == 12
    assert any("stopped at the limit of 12 changes" in note for note in report.notes)
    one = trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), step="search", dry_run=True)
    assert not any("stopped at the limit" in note for note in one.notes)


def test_the_change_of_the_theory_does_not_count_as_a_step_that_nothing_came_of() -> None:
    trainer, _, _ = fitted(max_epochs=10)

    def damping(after_answer: bool) -> list[float]:
        def strategy(problem: Any) -> Trial:
            if after_answer:
                problem.influence_direction()
            problem.descent_direction(problem.trials[0])
            problem.descent_direction(problem.trials[0])
            return problem.evaluate(0.0)

        options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "step": strategy, "dry_run": True}
        return [solve["damping"] for solve in trainer.unlearn([3, 17, 30], **options).solves]

    plain, after = damping(False), damping(True)
    assert plain[1] > 30 * plain[0]
    assert after[0] == 0
    assert 0.3 < after[1] / plain[0] < 3  # on another sample


def test_what_corrected_labels_cost_is_told() -> None:
    """Labels at random for a net that has learned right ones."""
    x, y = blobs(200).tensors
    trainer, _, _ = fitted(dataset=TensorDataset(x, y), max_epochs=40)
    with pytest.warns(GIFWarning, match="The retained loss rose from .* The new labels contradict what the model"):
        report = trainer.unlearn(list(range(0, 200, 4)), relabel=(y[::4] + torch.arange(50)) % 3, dry_run=True)
    assert report.retain.after > report.retain.before


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        lambda labels: labels.numpy()[0],
        lambda labels: labels.numpy()[::-1],
        lambda labels: lambda batch: [2] * len(batch[1]),
    ],
)
def test_new_labels_can_be_arrays_lists_and_numbers_of_numpy(kind: Callable[[Tensor], Any]) -> None:
    trainer, _, _ = fitted()
    new = torch.tensor([2, 2, 2])
    expected = trainer.unlearn([0, 1, 2], relabel=new, dry_run=True)
    assert trainer.unlearn([0, 1, 2], relabel=kind(new), dry_run=True).relabelled == expected.relabelled


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_new_labels_that_are_no_class_are_refused(label: int) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(BatchError, match=f"`relabel` has the label {label}, but the model predicts 3 classes: 0 to 2"):
        trainer.unlearn([0, 1, 2], relabel=torch.tensor([1, label, 1]))


def test_labels_are_corrected_by_newton_steps_once_three_quarters_of_them_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, bool, int]] = []
    descend = EditProblem.descent_direction

    def told(self: EditProblem, at: Trial) -> QuadraticModel:
        first = not self._changes
        model = descend(self, at)
        newton = self.solutions[-1].solver == "truncated_newton"
        seen.append((at.memorization, newton, self.solutions[-1].iterations))
        assert newton == (not first and at.memorization <= 0.25)
        return model

    monkeypatch.setattr(EditProblem, "descent_direction", told)
    data = blobs(120)
    x, y = data.tensors
    wrong = y.clone()
    wrong[::4] = (y[::4] + 1) % 3
    trainer, _, _ = fitted(dataset=TensorDataset(x, wrong), callback=GIFCallback(ratio=0.5), max_epochs=20)
    trainer.unlearn(list(range(0, 120, 4)), relabel=y[::4])
    assert {newton for _, newton, _ in seen} == {False, True}
    assert max(steps for _, _, steps in seen) == 8


def test_labels_get_another_step_after_one_that_was_cut_short_but_not_after_two() -> None:
    """The second change leads up beyond its half, where it has gained next to nothing; the third leads down."""

    def risk(first: float = 0.0, second: float = 0.0, third: float = 0.0, *later: float) -> float:
        return 9.0 - first + (second if second > 0.5 else -0.02 * second) - third * then

    then = 1.0
    models = [QuadraticModel(-1.0, 1.0), QuadraticModel(-0.02, 0.02), *[QuadraticModel(-1.0, 1.0)] * 9]
    assert relinearise(labels(risk, *models)).step_sizes[1:3] == (0.5, 4.0)
    then = -1.0
    problem = labels(risk, *models)
    assert relinearise(problem).step_sizes == (4.0, 0.5)
    assert len(problem.solved) == 3
    hopeless = labels(lambda *steps: 9.0 + sum(steps), *models)
    assert not relinearise(hopeless).is_edit
    assert len(hopeless.solved) == 1


def test_a_model_that_promises_more_than_there_is_does_not_hide_a_step_that_helps() -> None:
    """It promises 400, of a risk that is 1 and falls to 0.3 in the middle of the step."""
    valley = lambda s=0.0, *later: 1.0 - 1.4 * (s if s < 0.5 else 1.0 - s)  # noqa: E731
    assert relinearise(labels(valley, QuadraticModel(-800.0, 800.0), QuadraticModel(-1.0, 1.0))).step_sizes == (0.5,)


def test_no_further_step_costs_more_than_forgetting_may() -> None:
    problem = Fake(
        lambda first=0.0, *later: 1.0 - sum(later) / 3,
        lambda first=0.0, *later: 0.1 + first + sum(later),
        risk=lambda first=0.0, *later: 9.0 - 0.5 * sum(later),
        max_retain_loss=0.4,
        models=[FLAT, *[QuadraticModel(-1.0, 1.0)] * 9],
    )
    assert relinearise(problem).retain_loss <= 0.4


def test_a_step_is_kept_as_far_as_the_risk_falls_as_predicted() -> None:
    """The model promises a fall of 0.5 for the whole step, and the risk rises beyond 0.6 of it."""
    valley = lambda r=0.0, *later: 1.0 - (r if r < 0.6 else 0.7 - r)  # noqa: E731
    assert relinearise(labels(valley, QuadraticModel(-1.0, 1.0))).step_sizes == (0.5,)


def test_a_step_is_made_longer_where_the_risk_falls_by_more_than_predicted() -> None:
    bowl = lambda r=0.0, *later: (r - 3.5) ** 2  # noqa: E731
    assert relinearise(labels(bowl, QuadraticModel(-1.0, 1.0))).step_sizes == (4.0,)
    assert relinearise(labels(bowl, QuadraticModel(-20.0, 20.0))).step_sizes == (1.0,)


def test_no_step_is_made_where_none_helps() -> None:
    assert not relinearise(labels(lambda *steps: 0.1 + sum(steps), QuadraticModel(-1.0, 1.0))).is_edit
    problem = labels(lambda *steps: 1.0 - 0.015 * sum(steps), *[QuadraticModel(-0.06, 0.06)] * 9)
    assert relinearise(problem).step_sizes == (1.0, 1.0)  # two in a row are enough of what is not worth it


def test_a_model_that_bends_up_too_early_does_not_hide_a_shorter_step() -> None:
    bowl = lambda s=0.0, *later: 1.0 - s + 1.5 * s**2  # noqa: E731
    assert relinearise(labels(bowl, QuadraticModel(-1.0, 10.5))).step_sizes == (0.5,)


def test_the_theory_decides_where_rounding_would() -> None:
    problem = Fake(
        risk=lambda s=0.0: 0.1 - 1e-9 * s, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-2e-9, 2e-9)]
    )
    assert relinearise(problem).step_sizes == (1.0,)
    assert problem.solved == [None]


def test_single_examples_get_further_steps_while_something_tells_them_from_unseen_ones() -> None:
    def problem(remembered: float) -> Fake:
        return Fake(
            lambda *steps: remembered,
            risk=lambda *steps: 9.0 - 0.5 * sum(steps),
            goal=ExampleRemoval(),
            target=0.5,
            models=[QuadraticModel(-0.5, 0.0), *[QuadraticModel(-1.0, 1.0)] * 11],
        )

    unlike, like = problem(0.7), problem(0.5)
    assert len(relinearise(unlike).step_sizes) > 1
    assert unlike.solved[0] is None  # the theory is asked first
    assert len(relinearise(like).step_sizes) == 1


def test_nothing_is_solved_anew_while_the_local_model_holds() -> None:
    risk = lambda s=0.0: -0.2 * s + 0.1 * s**2  # noqa: E731
    problem = Fake(risk=risk, goal=ExampleRemoval(), target=None, models=[QuadraticModel(-0.2, 0.2)])
    assert relinearise(problem).step_sizes == (1.0,)
    assert len(problem.solved) == 1


def later_only(problem: EditProblem) -> Trial:
    problem.influence_direction()
    problem.descent_direction(problem.trials[0])
    return problem.evaluate(0.0, 0.5)


def test_a_strategy_of_ones_own_is_taken_by_name_or_as_it_is() -> None:
    def half(problem: EditProblem) -> Trial:
        problem.influence_direction()
        problem.descent_direction(problem.evaluate(0.5))
        return problem.evaluate(0.5, 0.25)

    trainer, _, dataset = fitted()
    forget = batch_of(dataset, slice(0, 4))
    report = trainer.unlearn(forget, step=half, dry_run=True)
    assert report.step_sizes == [0.5, 0.25]
    assert len(report.solves) == 2
    assert "by changing nothing" not in str(
        trainer.unlearn(forget, step=lambda problem: later_only(problem), dry_run=True)
    )
    for bad, match in (
        (lambda problem: problem.trials[0], "after 0 solves"),
        (lambda problem: 1.0, "got 1.0"),
        (
            lambda problem: (problem.influence_direction(), Trial((3.0,), 0.0, 0.0, 0.0, 0.0))[1],
            "must solve for a change",
        ),
        (lambda problem: problem.evaluate(2.0), "1 step sizes were given, but there are only 0 changes"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            trainer.unlearn(forget, step=bad)
    STRATEGIES.register("half")(half)
    try:
        assert trainer.unlearn(forget, step="half", dry_run=True).step_sizes == report.step_sizes
    finally:
        del STRATEGIES._items["half"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accept_ratio", 0.0),
        ("accept_ratio", 1.5),
        ("accept_ratio", "0.5"),
        ("accept_ratio", math.nan),
        ("max_halvings", -1),
        ("max_halvings", 2.5),
        ("max_halvings", True),
        ("initial_damping", math.inf),
    ],
)
def test_tuned_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"`{name}` of TrustRegion must be a .*number .* got {value!r}"):
        TrustRegion(**{name: value})


def test_what_is_no_tuning_is_refused() -> None:
    trainer, _, _ = fitted()
    with pytest.raises(ConfigurationError, match=r"`tuning` must be a lightning_gif\.unlearning\.Tuning"):
        trainer.unlearn([0], tuning={"max_halvings": 3})
    with pytest.raises(ConfigurationError, match="`trust_region` of Tuning must be a TrustRegion"):
        Tuning(trust_region=SampleSizes())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="two goals of the same class"):
        Tuning(goals=(ClassRemoval(), ClassRemoval(target_memorization=0.1)))
    with pytest.raises(ConfigurationError, match="must be a tuple of goals"):
        Tuning(goals=ClassRemoval())  # type: ignore[arg-type]


def test_tuned_numbers_are_used_and_recorded(tmp_path: Any) -> None:
    trainer, _, _ = fitted(max_epochs=60)
    options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "dry_run": True}
    plain = trainer.unlearn([3, 17, 30], **options)
    assert plain.settings["tuning"]["goal"] == {
        "curvature_examples": 2048,
        "target_memorization": 0.2,
        "corrected_weight": 8.0,
        "retain_budget": 0.05,
        "far_memorization": 0.25,
        "first_damping": 0.2,
    }
    tuning = Tuning(goals=(LabelCorrection(corrected_weight=2.0),), relinearisation=Relinearisation(max_solves=3))
    tuned = trainer.unlearn([3, 17, 30], tuning=tuning, **options)
    assert (len(plain.solves), len(tuned.solves)) == (12, 3)
    assert tuned.trials[0].risk == pytest.approx(plain.trials[0].risk / 4)
    tuned.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit").settings["tuning"]
    assert loaded["goal"]["corrected_weight"] == 2.0
    assert loaded["relinearisation"]["max_solves"] == 3
    assert trainer.unlearn([3, 17, 30], tuning=Tuning(), **options).edit.digest == plain.edit.digest


def test_a_new_goal_is_a_class_and_one_line() -> None:
    """Removal that answers nothing but the retained loss, for examples of label 0."""

    @dataclass(frozen=True)
    class Gentle(ExampleRemoval):
        name = "gentle"
        compares_with_unseen = False

        @classmethod
        def applies(cls, request: Any, notes: list[str]) -> bool:
            return request.relabelled is None and set(request.forget.classes.tolist()) == {0}

    trainer, _, _ = fitted()
    GOALS.register("gentle")(Gentle)
    try:
        report = trainer.unlearn([0, 3], dry_run=True)
        assert report.goal == "gentle"
        assert trainer.unlearn([1, 4], dry_run=True).goal == "examples"
        assert "goal: gentle" in str(report)
    finally:
        del GOALS._items["gentle"]


def test_a_goal_may_count_predictions_beside_a_risk_of_losses() -> None:
    """The losses of a term that is no function of the logits are not mistaken for one."""

    @dataclass(frozen=True)
    class Counted(ExampleRemoval):
        name = "counted"

        def memorization(self, task: Any) -> PredictedShare:
            return PredictedShare(task.objective, task.forget_eval, count_wrong)

    trainer, module, data = fitted()
    options: dict[str, Any] = {"step": 0.5, "dry_run": True, "unseen": loader(blobs(24, seed=7))}
    plain = trainer.unlearn(list(range(20)), **options)
    GOALS.register("counted")(Counted)
    try:
        counted = trainer.unlearn(list(range(20)), **options)
    finally:
        del GOALS._items["counted"]
    assert counted.goal == "counted"
    assert [trial.risk for trial in counted.trials] == [trial.risk for trial in plain.trials]
    x, y = batch_of(data, slice(0, 20))
    assert counted.memorization[0] == pytest.approx(float((module(x).argmax(1) != y).double().mean()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("path", "trials"),
        ("enough", "target_memorization"),
        ("affordable", "max_retain_loss"),
        ("answer", "influence_direction"),
        ("descend", "descent_direction"),
        ("measure", "evaluate"),
    ],
)
def test_a_strategy_with_old_names_works_with_a_warning(old: str, new: str) -> None:
    def strategy(walk: Any) -> Any:
        with pytest.warns(DeprecationWarning, match=f"`walk.{old}` is now `{new}`") as caught:
            assert getattr(walk, old) == getattr(walk, new)
        assert caught[0].filename == __file__
        assert walk.goal is GoalName.EXAMPLES
        assert walk.goal == "examples"
        return natural(walk)

    trainer, _, _ = fitted()
    assert trainer.unlearn([0, 1], step=strategy, dry_run=True).step_sizes == [1.0]


@pytest.mark.parametrize(
    ("old", "new"),
    [("steps", "step_sizes"), ("step", "step_size"), ("remembered", "memorization"), ("moved", "is_edit")],
)
def test_old_names_of_a_trial_work_with_a_warning(old: str, new: str) -> None:
    trial = Trial((0.5, 1.0), 1.0, 2.0, 3.0, 0.25)
    with pytest.warns(DeprecationWarning, match=f"`Trial.{old}` is now `{new}`"):
        assert getattr(trial, old) == getattr(trial, new)
    with pytest.warns(DeprecationWarning, match=r"`QuadraticModel.bend` is now `curvature`"):
        assert QuadraticModel(-1.0, 3.0).bend == 3.0


# ----------------------------------------------------------------------------------------------------------------------
# Every kind of net
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perceptron", "batchnorm", "layernorm", "attention", "embedding"])
def test_a_class_is_forgotten_by_every_kind_of_net(name: str) -> None:
    """BatchNorm, dropout, LayerNorm, attention, embeddings: the class goes, the others and all statistics stay."""

    class WithAdam(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), self.lr)

    net, dataset = make(name, 96, large=True)
    module = WithAdam(net, 0.05 if name == "embedding" else 0.01)
    trainer, _, _ = fitted(module, dataset, GIFCallback(), max_epochs=40)
    before, (x, y) = weights(module), dataset.tensors
    module.eval()
    gone = y == 1
    kept_accuracy = float((module(x[~gone]).argmax(1) == y[~gone]).float().mean())
    report = trainer.unlearn(lambda batch: batch[1] == 1)
    assert report.goal is GoalName.CLASS
    predicted = module(x).argmax(1)
    assert float((predicted[gone] == 1).float().mean()) <= 0.05
    assert float((predicted[~gone] == y[~gone]).float().mean()) >= kept_accuracy - 0.05
    trained = dict(module.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in weights(module).items() if key not in trained)
    report.undo()
    assert same_weights(before, weights(module))


class Normalised(Classifier):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        )


@pytest.mark.parametrize("relabel", [None, 2])
def test_statistics_of_normalisation_are_computed_anew_where_asked(relabel: int | None, tmp_path: Any) -> None:
    """Of the retained or of all data; with the edit they go and come back."""
    trainer, module, dataset = fitted(Normalised(), max_epochs=10)
    before, gone = weights(module), dataset.tensors[1] == 1
    norm: Any = module.net[1]
    plain = trainer.unlearn(batch_of(dataset, gone), relabel=relabel)
    assert not plain.edit.buffers
    plain.undo()
    report = trainer.unlearn(batch_of(dataset, gone), relabel=relabel, refresh_statistics=True)
    changed = [note for note in report.notes if "recomputed running statistics raise" in note]
    raised = {
        f"the {name} loss from {one.after:.4g} to {other.after:.4g}."
        for name, one, other in (
            ("retain", plain.retain, report.retain),
            ("relabelled", plain.relabelled, report.relabelled),
        )
        if one is not None and other is not None and other.after > 1.1 * one.after
    }
    assert len(changed) == len(raised)
    assert all(any(text in note for note in changed) for text in raised)
    left = [float(note.split(" %")[0]) for note in report.notes if "still predicted as it" in note]
    assert left == (
        [round(100 * report.memorization[1], 1)] if relabel is None and report.memorization[1] > 0.005 else []
    )
    assert (norm.momentum, norm.num_batches_tracked) == (0.3, before["net.1.num_batches_tracked"])
    assert report.edit.count == plain.edit.count
    assert "running statistics recomputed: 2 buffers" in str(report)
    with torch.no_grad():
        kept = module.eval()(dataset.tensors[0][~gone])
    loss = float(F.cross_entropy(kept, dataset.tensors[1][~gone]))
    if report.relabelled is not None and plain.relabelled is not None:
        assert report.relabelled.before == plain.relabelled.before
    assert report.retain.after == pytest.approx(loss, rel=1e-5)  # what the model does, statistics included

    # The mean over all that stays, each example with the same weight; of variances within the batches.
    groups = [~gone] if relabel is None else [~gone, gone]
    with torch.no_grad():
        parts = [module.net[0](dataset.tensors[0][group]) for group in groups]
    shares = [len(part) / sum(len(other) for other in parts) for part in parts]
    mean = sum(share * part.mean(0) for share, part in zip(shares, parts, strict=True))
    variance = sum(share * part.var(0) for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)

    after = weights(module)
    report.save(tmp_path / "edit.safetensors")
    loaded = UnlearnReport.load(tmp_path / "edit.safetensors", module)
    loaded.undo()
    assert same_weights(before, weights(module))
    loaded.apply()
    assert same_weights(after, weights(module))


def test_one_corrected_example_does_not_keep_statistics_from_being_computed_anew() -> None:
    trainer, module, _ = fitted(Normalised(), max_epochs=2)
    assert trainer.unlearn([3], relabel=2, refresh_statistics=True).edit.buffers
    before = weights(module)
    with pytest.raises(ConfigurationError, match="two or more"):
        trainer.unlearn([3], relabel=1, refresh_statistics=True, batch_size=1)
    assert same_weights(before, weights(module))


def test_statistics_that_there_are_not_cannot_be_computed_anew() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    with pytest.raises(ConfigurationError, match="no layer with running statistics"):
        trainer.unlearn(batch_of(dataset, slice(0, 4)), refresh_statistics=True)
    assert same_weights(before, weights(module))


def test_examples_of_a_regression_net_are_forgotten() -> None:
    """Outliers that bend a curve: the edit takes its predictions towards those of a net that never saw them."""
    x = torch.linspace(-2, 2, 60)[:, None]
    y = torch.sin(2 * x[:, 0])
    y[10:14] += 2.0

    def trained(keep: Tensor) -> Any:
        torch.manual_seed(1)
        module = Curve(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        for _ in range(1500):
            optimizer.zero_grad()
            F.mse_loss(module(x[keep])[:, 0], y[keep]).backward()
            optimizer.step()
        trainer, data = make_trainer(), TensorDataset(x[keep], y[keep])
        attach(trainer, module, train_dataloaders=DataLoader(data, len(data)), callback=GIFCallback(ratio=1.0))
        return trainer, module

    class Curve(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1])

    keep = torch.ones(60, dtype=torch.bool)
    trainer, module = trained(keep)
    keep[10:14] = False
    truth = trained(keep)[1](x).detach()
    far = float((module(x).detach() - truth).square().mean())
    report = trainer.unlearn([10, 11, 12, 13])
    assert report.goal is GoalName.EXAMPLES
    assert float((module(x).detach() - truth).square().mean()) < 0.5 * far


def test_while_most_of_a_class_is_remembered_half_of_the_examples_give_the_curvature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[int] = []
    original = problem.open_curvature

    def noted(settings: Any, objective: Any, examples: Any, *args: Any, **options: Any) -> Any:
        looked_at.append(len(examples))
        return original(settings, objective, examples, *args, **options)

    trainer, _, _ = fitted(dataset=blobs(1200), max_epochs=4)
    monkeypatch.setattr(problem, "open_curvature", noted)
    edit = trainer.unlearn(lambda batch: batch[1] == 1, dry_run=True)
    assert edit.goal is GoalName.CLASS
    assert edit.trials[0].memorization > 0.5
    solves = list(zip(looked_at[::2], looked_at[1::2], strict=True))  # over retained examples, and over the class
    assert solves[0] == (128, 32)
    assert solves[-1] == (256, 64)
    looked_at.clear()
    trainer.unlearn(list(range(0, 30)), relabel=1, dry_run=True)
    assert set(looked_at) & {128} == set()
