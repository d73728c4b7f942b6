"""Single examples get new labels by a match with the predictions of a model that was trained with these."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.solvers import Status
from lightning_gif.unlearning import Matching, Tuning
from lightning_gif.unlearning.relabelling import minimise

from ..conftest import Classifier, blobs, fitted, make_trainer, same_weights, weights
from .test_matching import FORGET, attached, kept, made, minimised, noisy, noisy_classifier


def changed(data: TensorDataset, classes: int) -> TensorDataset:
    """The same data with other targets of the forget examples."""
    x, y = data.tensors
    return TensorDataset(x, y.index_put((torch.tensor(FORGET),), new_targets(y, classes)))


def new_targets(y: Tensor, classes: int) -> Tensor:
    return y[FORGET] + 2.0 if classes == 1 else (y[FORGET] + 1) % classes


@pytest.mark.parametrize("classes", [1, 3])
def test_the_first_change_is_the_minimum_that_the_theory_states(classes: int) -> None:
    """At the minimum, the gradient of w ℓ(new) − w gᵀv + vᵀ(G + D)v/2 is zero."""
    data, damping = made(classes), 0.05
    module = minimised(classes, data, torch.arange(60), damping)
    x, y = data.tensors
    new = y.index_put((torch.tensor(FORGET),), new_targets(y, classes))

    def loss(theta: Tensor, ids: Any, targets: Tensor) -> Tensor:
        out = x[ids] @ theta[: 5 * classes].view(classes, 5).T + theta[5 * classes :]
        return F.cross_entropy(out, targets[ids]) if classes > 1 else F.mse_loss(out.squeeze(1), targets[ids])

    theta = torch.cat([part.detach().flatten() for part in module.parameters()])
    options = {"damping": damping, "rtol": 1e-9, "curvature_examples": None, "max_iter": 300}
    trainer = attached(module, data, **options)
    tuning = Tuning(matching=Matching(relabel_steps=0))
    report = trainer.unlearn(
        FORGET, relabel=new[FORGET], step="match", tuning=tuning, dry_run=True, unconverged="raise"
    )
    change = torch.cat([report.edit.new[name] - report.edit.old[name] for name in ("layer.weight", "layer.bias")])
    gradient, forget = torch.func.grad(loss), torch.tensor(FORGET)
    weight = len(FORGET) / len(kept())
    system = torch.func.hessian(loss)(theta, kept(), y) + damping * torch.eye(len(theta))
    slopes = weight * (gradient(theta + change, forget, new) - gradient(theta, forget, y))
    torch.testing.assert_close(system @ change, -slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [1, 3])
def test_new_targets_of_a_convex_model_give_the_predictions_of_retraining(classes: int) -> None:
    data, decay = made(classes), 0.05
    x, y = data.tensors
    module = minimised(classes, data, torch.arange(60), decay)
    expected = minimised(classes, changed(data, classes), torch.arange(60), decay).layer(x[FORGET])
    before = module.layer(x[FORGET]).detach()
    trainer = attached(module, data, damping=decay * 60 / 56, curvature_examples=None)
    report = trainer.unlearn(FORGET, relabel=new_targets(y, classes), max_iter=20)
    assert float((module.layer(x[FORGET]) - expected).norm()) < 0.1 * float((before - expected).norm())
    assert report.relabelled is not None
    assert report.relabelled.after == pytest.approx(report.relabelled.predicted, rel=0.1)
    assert report.verdict.startswith("Done. ")


def test_a_label_that_was_learned_by_heart_is_corrected() -> None:
    data = noisy()
    trainer, module, _ = fitted(noisy_classifier(), data, callback=GIFCallback(), max_epochs=60)
    x, right = data.tensors[0], (data.tensors[1][:12] + 2) % 3
    before = weights(module)
    report = trainer.unlearn(list(range(12)), relabel=right)
    assert report.solve["solver"] == "nonlinear_cg"
    assert report.goal == "labels"
    with torch.no_grad():
        predicted = module(x).argmax(1)
    assert (predicted[:12] == right).sum() >= 10
    assert (predicted[12:] == data.tensors[1][12:]).double().mean() > 0.95
    assert report.memorization[1] <= 0.2 < report.memorization[0]
    report.undo()
    assert same_weights(weights(module), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_labels_that_contradict_the_other_data_do_not_spoil_the_model() -> None:
    """One in six right labels is replaced, where nothing in the images tells which."""
    data = blobs(240)
    x, y = data.tensors
    trainer, module, _ = fitted(Classifier(lr=0.3), data, callback=GIFCallback(), max_epochs=30)
    ids = list(range(0, 240, 6))
    wrong = (y[ids] + 1) % 3
    retrained = copy.deepcopy(Classifier(lr=0.3))
    labels = y.index_put((torch.tensor(ids),), wrong)
    make_trainer(max_epochs=30).fit(retrained, DataLoader(TensorDataset(x, labels), 16, shuffle=True))
    rest = [i for i in range(240) if i % 6]

    def right(net: Any) -> float:
        with torch.no_grad():
            return float((net(x[rest]).argmax(1) == y[rest]).double().mean())

    report = trainer.unlearn(ids, relabel=wrong)
    assert right(module) > right(retrained) - 0.02
    assert report.relabelled is not None
    assert report.relabelled.after < 0.8 * report.relabelled.before


def test_many_new_labels_are_learned_by_changes_that_see_all_of_them() -> None:
    trainer, _, data = fitted(max_epochs=10)
    labels = (data.tensors[1][:9] + 1) % 3
    options: dict[str, Any] = {"relabel": labels, "dry_run": True}
    options["tuning"] = Tuning(matching=Matching(relabel_steps=2, forgotten=4))
    report = trainer.unlearn(list(range(9)), **options)
    assert any("There are 9 new labels. With more than 8" in note for note in report.notes)
    assert report.solve["solver"] != "nonlinear_cg"
    assert trainer.unlearn(list(range(9)), step="match", **options).solve["solver"] == "nonlinear_cg"
    options["relabel"] = labels[:8]
    few = trainer.unlearn(list(range(8)), **options)
    assert few.solve["solver"] == "nonlinear_cg"
    assert not any("new labels, more than" in note for note in few.notes)


@pytest.mark.slow
def test_more_new_labels_take_more_steps_in_each_of_which_they_have_less_weight() -> None:
    numbers = Matching(relabel_steps=3, forgotten=4, forget_weight=0.2, prediction_tolerance=0.0)
    assert numbers.of(0) == numbers
    trainer, _, data = fitted(max_epochs=10)
    for count, times in ((1, 1), (8, 1), (9, 2), (17, 3)):
        assert numbers.of(count) == replace(numbers, steps=3 * times, forget_weight=0.2 / times)
        labels = (data.tensors[1][:count] + 1) % 3
        options: dict[str, Any] = {"relabel": labels, "step": "match", "tuning": Tuning(matching=numbers)}
        report = trainer.unlearn(list(range(count)), dry_run=True, **options)
        assert report.solves[1]["iterations"] == 3 * times


def test_an_unconverged_solve_for_new_labels_warns_if_a_tolerance_was_given() -> None:
    trainer, _, data = fitted(max_epochs=10)
    options: dict[str, Any] = {"relabel": (data.tensors[1][:3] + 1) % 3, "dry_run": True, "rtol": 1e-6}
    options["unconverged"] = "warn"
    with pytest.warns(match="The nonlinear_cg solve ended as 'max_iter'.* Raise `max_iter`"):
        trainer.unlearn([0, 1, 2], max_iter=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = trainer.unlearn([0, 1, 2], max_iter=200, double=True, **options)
    assert report.solve["residual"] <= 1e-6
    assert report.solves[0]["iterations"] < 200


@pytest.mark.parametrize(("margin", "damping"), [(3.0, 0.1), (5.0, 1e-2), (10.0, 1e-3), (20.0, 1e-4), (30.0, 1e-3)])
def test_the_minimum_is_found_from_a_label_that_was_learned_by_heart(margin: float, damping: float) -> None:
    """With one logit: log(1 + exp(margin − y)) + damping y²/2 has hardly any curvature but near the margin."""

    class OneLogit:
        outputs = (torch.tensor([-margin], dtype=torch.float64),)

        def derivative(self, direction: Tensor) -> list[Tensor]:
            return [direction]

        def gradient(self, at: list[Tensor]) -> Tensor:
            return -torch.sigmoid(-at[0])

        def along(self, at: list[Tensor], by: list[Tensor], size: float) -> tuple[float, float]:
            point = at[0] + size * by[0]
            wrong = torch.sigmoid(-point)
            return float(-wrong * by[0]), float(wrong * (1 - wrong) * by[0] ** 2)

    matrix = SimpleNamespace(products=0, examples=0, matvec=lambda vector: damping * vector)
    solution = minimise(
        matrix,  # type: ignore[arg-type]
        torch.zeros(1, dtype=torch.float64),
        OneLogit(),  # type: ignore[arg-type]
        1.0,
        lambda vector: vector,
        lambda vector: vector,
        rtol=1e-6,
        max_iter=20,
    )
    assert solution.status is Status.CONVERGED
    assert damping * float(solution.x) == pytest.approx(float(torch.sigmoid(margin - solution.x)), abs=2e-6)
