"""The edit problem: its changes against closed forms, and the curvature and damping of each solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, GIFWarning, UnlearnReport
from lightning_gif.unlearning import EditProblem, QuadraticModel, Trial, problem
from lightning_gif.unlearning.protocol import GoalName

from ..conftest import Classifier, batch_of, blobs, fitted
from .doubles import Quadratic, quadratic


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
    assert trainer.unlearn((x[:m], y[:m]), step="relinearise").step_sizes == [1.0]


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


def test_the_curvature_of_a_class_is_the_one_that_was_asked_for() -> None:
    trainer, _, dataset = fitted(max_epochs=20)
    forget = batch_of(dataset, dataset.tensors[1] == 0)
    lowest = [
        trainer.unlearn(forget, curvature=kind, eigenvalues=1, dry_run=True).curvature["smallest"][0]
        for kind in ("hessian", "ggn")
    ]
    assert lowest[0] < lowest[1]
    assert lowest[1] > -1e-4


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_failed_first_step_towards_labels_is_followed_by_a_more_damped_one() -> None:
    """Where the model is sharper than training made it the first step is too long by far more than is tried."""
    trainer, module, _ = fitted(max_epochs=160)
    with torch.no_grad():
        for parameter in module.net[-1].parameters():
            parameter *= 4
    options: dict[str, Any] = {"relabel": torch.tensor([1, 0, 2]), "dry_run": True, "step": "relinearise"}
    report = trainer.unlearn([3, 17, 30], **options)
    assert report.step_sizes[0] < 0.01
    assert report.solves[1]["damping"] > 10 * report.solves[0]["damping"]
    (chosen,) = [trial for trial in report.trials if list(trial.step_sizes) == report.step_sizes]
    assert chosen.risk < 0.9 * report.trials[0].risk
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


def test_labels_are_corrected_with_the_curvature_of_what_is_predicted() -> None:
    """Least squares on a Hessian with negative eigenvalues can lead up, far from the labels."""
    trainer, _, data = fitted()
    y = data.tensors[1]
    options: dict[str, Any] = {"relabel": (y[:6] + 1) % 3, "dry_run": True}
    found = trainer.unlearn(list(range(6)), **options)
    assert found.curvature["kind"] == "ggn"
    assert trainer.unlearn(list(range(6)), curvature="hessian", **options).curvature["kind"] == "hessian"
    assert trainer.unlearn(list(range(6)), step="natural", **options).curvature["kind"] == "hessian"


def test_the_influence_direction_does_not_count_as_a_rejected_step() -> None:
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


def test_labels_are_corrected_by_newton_steps_once_three_quarters_of_them_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, bool, int]] = []
    descend = EditProblem.descent_direction

    def watched(self: EditProblem, at: Trial) -> QuadraticModel:
        first = not self.solutions
        model = descend(self, at)
        newton = self.solutions[-1].solver == "truncated_newton"
        seen.append((at.memorization, newton, self.solutions[-1].iterations))
        assert newton == (not first and at.memorization <= 0.25)
        return model

    monkeypatch.setattr(EditProblem, "descent_direction", watched)
    data = blobs(120)
    x, y = data.tensors
    wrong = y.clone()
    wrong[::4] = (y[::4] + 1) % 3
    trainer, _, _ = fitted(dataset=TensorDataset(x, wrong), callback=GIFCallback(ratio=0.5), max_epochs=20)
    trainer.unlearn(list(range(0, 120, 4)), relabel=y[::4], step="relinearise")
    assert {newton for _, newton, _ in seen} == {False, True}
    assert max(steps for _, _, steps in seen) == 8


@pytest.mark.slow
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
