"""The goals: which one an edit has, what it reaches, what it may cost, and goals of one's own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import ConfigurationError, EditError, GIFCallback, GIFMixin, GIFWarning, UnlearnReport
from lightning_gif.unlearning import (
    GOALS,
    ClassRemoval,
    ExampleRemoval,
    Goal,
    LabelCorrection,
    SampleSizes,
    Trial,
    Tuning,
)
from lightning_gif.unlearning.checked import number
from lightning_gif.unlearning.memorization import Memorization
from lightning_gif.unlearning.protocol import GoalName
from lightning_gif.unlearning.risk import RiskTerm

from ..conftest import Classifier, batch_of, blobs, fitted, loader, same_weights, weights
from .doubles import memorised, scales


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_memorised_examples_get_the_loss_of_unseen_examples(curvature: str) -> None:
    trainer, module, _, unseen = memorised(curvature=curvature)
    with torch.no_grad():
        expected = float(F.cross_entropy(module(unseen.tensors[0]), unseen.tensors[1]))
    plain = trainer.unlearn(list(range(24)), dry_run=True)
    assert math.isnan(plain.memorization[0])
    assert plain.n_unseen == 0
    assert trainer.unlearn(list(range(6)), unseen=loader(unseen), dry_run=True).n_unseen == 0  # too few to tell
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen), step="relinearise")
    assert report.n_unseen == 60
    assert report.memorization[0] > 0.6
    assert report.memorization[1] < report.memorization[0]
    assert abs(report.forget.after - expected) < 0.2 * abs(report.forget.before - expected)
    assert report.retain.after - report.retain.before <= 0.1 * (expected - report.retain.before) + 1e-4
    assert report.trials[-1].risk < report.trials[0].risk
    assert "membership AUROC against 60 unseen examples" in str(report)


def test_unseen_examples_that_are_no_harder_leave_the_influence_step() -> None:
    """Nothing is memorised here, so that nothing more than the theory is to be done."""
    trainer, _, _ = fitted(dataset=blobs(600), max_epochs=3)
    report = trainer.unlearn(range(20), unseen=loader(blobs(300, seed=3)), dry_run=True)
    assert report.n_unseen == 300
    assert report.step > 0


@pytest.mark.slow
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


def test_what_is_left_of_a_class_is_what_the_model_says_without_it() -> None:
    """The predictions on retained examples end where the trained model is when the class is ruled out."""
    trainer, module, dataset = fitted()
    x, y = dataset.tensors
    before = module.eval()(x[y != 1]).detach()
    expected = before.index_fill(1, torch.tensor([1]), -math.inf).softmax(1)
    trainer.unlearn(batch_of(dataset, y == 1))
    after = module.eval()(x[y != 1]).softmax(1)
    assert (after - expected).abs().mean() < 0.3 * (before.softmax(1) - expected).abs().mean()


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


@pytest.mark.parametrize("module", [Masked, OwnLosses, pytest.param(Weighted, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The loss")
def test_classes_are_forgotten_and_labels_corrected_however_the_loss_is_made(module: type[Classifier]) -> None:
    trainer, _, dataset = fitted(module(), max_epochs=20)
    report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1), dry_run=True)
    assert report.goal is GoalName.CLASS
    assert report.memorization == (pytest.approx(1.0, abs=0.2), 0.0)
    repair = trainer.unlearn(batch_of(dataset, slice(0, 3)), relabel=(dataset.tensors[1][:3] + 1) % 3, dry_run=True)
    assert repair.relabelled is not None
    assert repair.relabelled.after < repair.relabelled.before
    removals = [trainer.unlearn(given, dry_run=True) for given in (batch_of(dataset, slice(0, 3)), [0, 1, 2])]
    assert removals[0].forget.after == pytest.approx(removals[1].forget.after, rel=1e-3)


class Scaled(Classifier):
    """A loss that is multiplied by something."""

    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale * F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("factor", [1e-4, 0.01, 100.0])
def test_what_removal_may_cost_does_not_depend_on_what_the_loss_is_multiplied_by(factor: float) -> None:
    trainer, module, _ = fitted(Scaled(), max_epochs=20)
    forget = list(range(12))
    plain = trainer.unlearn(forget, unseen=False, dry_run=True, step="relinearise")
    module.scale = factor
    scaled = trainer.unlearn(forget, unseen=False, dry_run=True, step="relinearise")
    assert scaled.step_sizes == pytest.approx(plain.step_sizes, rel=0.05)
    assert scaled.retain.after / factor == pytest.approx(plain.retain.after, rel=0.05)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_corrected_labels_do_not_depend_on_what_the_loss_is_multiplied_by(factor: float) -> None:
    trainer, module, dataset = fitted(Scaled(), max_epochs=20)
    forget, new = batch_of(dataset, slice(0, 3)), (dataset.tensors[1][:3] + 1) % 3
    options = {"relabel": new, "dry_run": True, "step": "relinearise"}
    plain = trainer.unlearn(forget, **options).relabelled
    module.scale = factor
    scaled = trainer.unlearn(forget, **options).relabelled
    assert plain is not None
    assert scaled is not None
    assert scaled.after / factor == pytest.approx(plain.after, rel=0.05)


def test_a_class_stays_a_class_of_the_data_whatever_is_given_as_retained() -> None:
    """Two of sixteen examples are not their class, though the loader of what to keep has none of the others."""
    trainer, _, dataset = fitted(max_epochs=20)
    others = DataLoader(Subset(dataset, [i for i in range(48) if i % 3]), 8)
    assert trainer.unlearn([0, 3], retain=others, dry_run=True).goal is GoalName.EXAMPLES


def test_a_whole_class_is_distinguished_from_single_examples() -> None:
    trainer, _, dataset = fitted(max_epochs=20)
    members = (dataset.tensors[1] == 1).nonzero().squeeze(1).tolist()
    assert trainer.unlearn(DataLoader(Subset(dataset, members), 8), dry_run=True).goal is GoalName.CLASS
    assert trainer.unlearn(DataLoader(Subset(dataset, members[:-3]), 8), dry_run=True).goal is GoalName.EXAMPLES


class Regression(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


@pytest.mark.mostly_slow(1)
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
    if curvature == "ggn":
        assert math.isnan(chosen.risk)  # a match does not use it
    else:
        assert 0 < chosen.risk < 0.5 * report.trials[0].risk


@pytest.mark.mostly_slow(1)
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


def test_what_corrected_labels_may_cost_before_a_warning() -> None:
    goal, known, unknown = LabelCorrection(), scales(0.1, classes=10), scales(0.1)  # a classifier, a regression
    assert goal.limits(trained(2.0), known) == (0.2, math.inf)
    assert goal.tolerated_increase(2.0, 0.0, known) == pytest.approx(0.2)
    assert goal.tolerated_increase(0.0, 0.0, known) == pytest.approx(0.05 * math.log(10))
    assert goal.limits(trained(0.0), unknown) == (None, math.inf)
    assert goal.tolerated_increase(0.0, 5.0, unknown) == pytest.approx(0.05)


@contextlib.contextmanager
def registered(name: str, goal: type[Goal]) -> Iterator[None]:
    GOALS.register(name)(goal)
    try:
        yield
    finally:
        del GOALS._items[name]


@dataclass(frozen=True)
class OwnCorrection(ExampleRemoval):
    """New labels that an edit learns as the training loss asks for, with its own numbers, costs and measurement."""

    influence_first = False
    compares_with_unseen = False

    descent_iterations: int = number(3, low=1, open_low=False)

    @classmethod
    def applies(cls, request: Any, notes: list[str]) -> bool:
        return request.relabelled is not None

    def risk(self, task: Any) -> list[RiskTerm]:
        retained, n = super().risk(task)[0], task.sizes.descent_curvature
        return [retained, RiskTerm(task.forget_weight, task.relabelled, task.relabelled_eval, n, task.objective)]

    def memorization(self, task: Any) -> Memorization:
        class Norm(Memorization):
            def at(self, theta: Tensor) -> float:
                return float(theta.norm())

        return Norm()

    def costs(self, before: Any, after: Any, scales: Any) -> list[str]:
        return [f"It cost {sorted(before)}."]


def test_a_goal_of_ones_own_has_its_own_numbers_costs_and_measurement() -> None:
    trainer, module, data = fitted(max_epochs=20)
    norm = float(torch.cat([part.flatten() for part in module.parameters()]).norm())
    y = data.tensors[1][:4]
    with registered("own correction", OwnCorrection):
        with pytest.warns(GIFWarning, match="It cost"):
            report = trainer.unlearn([0, 1, 2, 3], relabel=(y + 1) % 3, dry_run=True, step="relinearise")
        more = trainer.unlearn([0, 1, 2, 3], relabel=(y + 1) % 3, dry_run=True, max_iter=4, step="relinearise")
    assert max(solve["iterations"] for solve in report.solves) == 3  # 5 for others, 8 for the built-in correction
    assert max(solve["iterations"] for solve in more.solves) == 4
    assert report.memorization[0] == pytest.approx(norm)
    assert "It cost ['forget', 'relabelled', 'retain']." in report.notes
    assert report.settings["tuning"]["goal"]["descent_iterations"] == 3


def test_a_goal_has_the_name_that_it_is_registered_under(tmp_path: Path) -> None:
    class Mine(ExampleRemoval):
        name = "other"

    trainer, module, _ = fitted()
    before = weights(module)
    with registered("mine", Mine):
        with pytest.raises(ConfigurationError, match="Mine is registered already, as 'mine'"):
            GOALS.register("yours")(Mine)
        report = trainer.unlearn([0, 3], dry_run=True)
        assert report.goal == Mine.name == "mine"
        report.save(tmp_path / "edit")
        assert UnlearnReport.load(tmp_path / "edit").goal == "mine"
        with pytest.raises(ConfigurationError, match="goal named 'mine' is registered already"):
            GOALS.register("mine")(type("Second", (ExampleRemoval,), {}))
    with pytest.raises(EditError, match="the goal 'mine', which is not registered here"):
        UnlearnReport.load(tmp_path / "edit")
    assert same_weights(before, weights(module))


def test_the_share_of_forget_examples_in_the_curvature_is_a_number_of_class_removal() -> None:
    trainer, _, _ = fitted(dataset=blobs(90), max_epochs=10)
    sizes = SampleSizes(descent_curvature=40)
    counts = []
    for share in (0.25, 1.0):
        tuning = Tuning(goals=(ClassRemoval(forget_share=share),), sample_sizes=sizes)
        report = trainer.unlearn(lambda batch: batch[1] == 0, tuning=tuning, dry_run=True)
        counts.append(report.solves[0]["examples"] / report.solves[0]["hvps"])
    # Each product is one over retained and one over forget examples. Half of them, as the first step is far away.
    assert counts == [(20 + 5) / 2, (20 + 20) / 2]


def test_a_new_goal_is_a_class_and_one_line() -> None:
    """Removal that answers nothing but the retained loss, for examples of label 0."""

    @dataclass(frozen=True)
    class Gentle(ExampleRemoval):
        compares_with_unseen = False

        @classmethod
        def applies(cls, request: Any, notes: list[str]) -> bool:
            return request.relabelled is None and set(request.forget.classes.tolist()) == {0}

    trainer, _, _ = fitted()
    with registered("gentle", Gentle):
        report = trainer.unlearn([0, 3], dry_run=True)
        assert report.goal == "gentle"
        assert trainer.unlearn([1, 4], dry_run=True).goal == "examples"
        assert "goal: gentle" in str(report)
