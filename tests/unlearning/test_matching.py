"""Single examples are removed by a match with the predictions of a model that was trained without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach
from lightning_gif.curvature.products import output_derivative
from lightning_gif.data.batch import Batch
from lightning_gif.errors import ConfigurationError, GIFWarning
from lightning_gif.selection.training_length import TrainingLength
from lightning_gif.unlearning import Matching, Tuning

from ..conftest import Classifier, blobs, fitted, loader, make_trainer, same_weights, weights


class Linear(pl.LightningModule):
    """Logistic or least-squares regression."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.layer(x)
        return F.cross_entropy(out, y) if y.dtype == torch.long else F.mse_loss(out.squeeze(1), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def made(classes: int, n: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    if classes == 1:
        return TensorDataset(x, x.sum(1) + torch.randn(n, generator=generator, dtype=torch.float64))
    return TensorDataset(x, torch.randint(0, classes, (n,), generator=generator))


def minimised(classes: int, data: TensorDataset, kept: Tensor, decay: float) -> Linear:
    """The minimiser of the mean loss over the kept examples, with a quadratic penalty."""
    torch.manual_seed(0)
    module = Linear(classes).double()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step([part[kept] for part in data.tensors], 0)
        loss = loss + decay / 2 * sum(one.square().sum() for one in module.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return module


def attached(module: pl.LightningModule, data: TensorDataset, **options: Any) -> pl.Trainer:
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(data, 16), callback=GIFCallback(double=True, **options))
    return trainer


FORGET = [3, 17, 20, 41]


def kept(n: int = 60) -> Tensor:
    return torch.tensor([i for i in range(n) if i not in FORGET])


@pytest.mark.parametrize("classes", [1, 3])
def test_the_first_change_is_the_damped_newton_step(classes: int) -> None:
    data, damping = made(classes), 0.05
    module = minimised(classes, data, torch.arange(60), damping)
    x, y = data.tensors
    rest = kept()

    def loss(theta: Tensor, ids: Any) -> Tensor:
        out = x[ids] @ theta[: 5 * classes].view(classes, 5).T + theta[5 * classes :]
        return F.cross_entropy(out, y[ids]) if classes > 1 else F.mse_loss(out.squeeze(1), y[ids])

    theta = torch.cat([part.detach().flatten() for part in module.parameters()])
    hessian = torch.func.hessian(loss)(theta, rest)  # the Gauss–Newton matrix, since outputs are linear in parameters
    slopes = [torch.func.grad(loss)(theta, ids) for ids in (torch.tensor(FORGET), rest)]
    gradient = len(FORGET) / 60 * (slopes[0] - slopes[1])  # of all data less that of the rest
    torch.testing.assert_close(gradient, torch.func.grad(loss)(theta, torch.arange(60)) - slopes[1])
    expected = torch.linalg.solve(hessian + damping * torch.eye(len(theta)), gradient)
    options = {"damping": damping, "rtol": 1e-10, "curvature_examples": None, "max_iter": 200}
    trainer = attached(module, data, **options)
    report = trainer.unlearn(FORGET, tuning=Tuning(matching=Matching(steps=0)), dry_run=True)
    found = torch.cat([report.edit.new[name] - report.edit.old[name] for name in ("layer.weight", "layer.bias")])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_snapshot_has_a_share_of_the_gradient(share: float) -> None:
    data, rest, damping = made(3), kept(), 0.1
    x, y = data.tensors
    module = minimised(3, data, torch.arange(60), 0.05)
    trainer = attached(module, data, damping=damping, rtol=1e-10, curvature_examples=None, max_iter=200)
    (callback,) = (one for one in trainer.callbacks if isinstance(one, GIFCallback))
    earlier = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    callback.tracker.snapshots.kept, callback.tracker.snapshots.last = {0: earlier}, 1

    def loss(theta: Tensor, ids: Any) -> Tensor:
        return F.cross_entropy(x[ids] @ theta[:15].view(3, 5).T + theta[15:], y[ids])

    theta, before = (
        torch.cat([state[name].flatten() for name in ("layer.weight", "layer.bias")])
        for state in (module.state_dict(), earlier)
    )
    hessian = torch.func.hessian(loss)(theta, rest)
    last, first = (
        torch.func.grad(loss)(at, torch.arange(60)) - torch.func.grad(loss)(at, rest) for at in (theta, before)
    )
    gradient = (1 - share) * last + share * first
    expected = torch.linalg.solve(hessian + damping * torch.eye(len(theta)), gradient)
    tuning, whole = Tuning(matching=Matching(earlier_share=share)), {"method": "if", "solver": "cg", "curvature": "ggn"}
    report = trainer.unlearn(FORGET, tuning=tuning, step=stepped, **whole)
    found = torch.cat([report.edit.new[name] - report.edit.old[name] for name in ("layer.weight", "layer.bias")])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_report_names_the_snapshots_of_a_match() -> None:
    for snapshots, count in (("auto", 1), (0, 0)):
        trainer, _, _ = fitted(callback=GIFCallback(snapshots=snapshots), max_epochs=6)
        assert len(trainer.unlearn(FORGET, dry_run=True).settings["snapshots"]) == count
        assert trainer.unlearn(FORGET, step="natural", dry_run=True).settings["snapshots"] == []
        unused = Tuning(matching=Matching(earlier_share=0.0))
        assert trainer.unlearn(FORGET, tuning=unused, dry_run=True).settings["snapshots"] == []


def stepped(problem: Any) -> Any:
    """A strategy that makes the first change of a match, whatever comes of it."""
    problem.leave_out()
    return problem.evaluate(1.0)


@pytest.mark.parametrize("classes", [1, 3])
def test_removal_from_a_convex_model_is_retraining(classes: int) -> None:
    """The edited predictions are far nearer to those of the minimiser without the examples than the trained ones."""
    data, decay = made(classes), 0.05
    x, _ = data.tensors
    module = minimised(classes, data, torch.arange(60), decay)
    expected = minimised(classes, data, kept(), decay * 60 / 56).layer(x[FORGET])
    before = module.layer(x[FORGET]).detach()
    trainer = attached(module, data, damping=decay, curvature_examples=None)
    report = trainer.unlearn(FORGET, max_iter=20)
    distance = float((module.layer(x[FORGET]) - expected).norm())
    assert distance < 0.2 * float((before - expected).norm())
    assert report.forget.after == pytest.approx(report.forget.predicted, rel=0.1)
    assert report.verdict.startswith("Done. ")


def test_predictions_after_a_change_are_those_to_first_order() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    theta = torch.cat([part.detach().flatten() for part in module.parameters()])
    x, direction = torch.randn(5, 4, dtype=torch.float64), torch.randn(len(theta), dtype=torch.float64)
    names = [(name, part.shape, part.numel()) for name, part in module.named_parameters()]

    def outputs(at: Tensor, batch: Batch) -> Tensor:
        pieces = at.split([size for _, _, size in names])
        parts = {name: piece.view(shape) for (name, shape, _), piece in zip(names, pieces, strict=True)}
        return torch.func.functional_call(module, parts, (batch.data,))

    at, derivative = output_derivative(outputs, theta, Batch.of(x), direction)
    step = 1e-6
    beside = outputs(theta + step * direction, Batch.of(x)) - outputs(theta - step * direction, Batch.of(x))
    torch.testing.assert_close(at, module(x).detach())
    torch.testing.assert_close(derivative, beside.detach() / (2 * step), rtol=1e-6, atol=1e-7)


def noisy_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)), lr=0.3)


def noisy(n: int = 120) -> TensorDataset:
    """Blobs with wrong labels, which a net has to memorize."""
    data = blobs(n, features=20)
    data.tensors[1][:12] = (data.tensors[1][:12] + 1) % 3
    return data


def test_memorized_examples_are_forgotten_and_the_others_keep_their_predictions() -> None:
    trainer, module, data = fitted(noisy_classifier(), noisy(), callback=GIFCallback(), max_epochs=60)
    x = data.tensors[0]
    before = weights(module)
    with torch.no_grad():
        trained = module(x).argmax(1)
    report = trainer.unlearn(list(range(12)))
    assert report.settings["method"] == "if"
    assert report.edit.count == report.n_parameters
    assert report.forget.after - report.forget.before > 0.5 * (report.forget.predicted - report.forget.before) > 0
    with torch.no_grad():
        assert (module(x[12:]).argmax(1) == trained[12:]).double().mean() > 0.95
    assert report.verdict.split(".")[0] in ("Done", "Partly done")
    report.undo()
    assert same_weights(weights(module), before)


def test_a_ratio_keeps_the_edit_sparse() -> None:
    trainer, _, _ = fitted(noisy_classifier(), noisy(), callback=GIFCallback(), max_epochs=20)
    for options in ({"ratio": 0.2}, {"selector": "random"}):
        report = trainer.unlearn([0, 1, 2], dry_run=True, **options)
        assert report.settings["method"] == "fif"
        assert report.edit.count <= 0.25 * report.n_parameters
        assert report.solve["solver"] == "cg"


@pytest.mark.slow
def test_match_is_refused_for_other_goals_and_settings_and_the_remedies_work() -> None:
    trainer, _, data = fitted(max_epochs=10)
    with pytest.raises(ConfigurationError, match="for single examples that are removed or get new labels") as error:
        trainer.unlearn(lambda batch: batch[1] == 1, step="match")
    assert "step='relinearise'" in str(error.value)
    trainer.unlearn(lambda batch: batch[1] == 1, step="relinearise", dry_run=True)
    labels = (data.tensors[1][:2] + 1) % 3
    for options in ({"solver": "cgls"}, {"discrepancy": 0.1}):  # the solve for new labels is not linear
        with pytest.raises(ConfigurationError, match="Omit `method`, `curvature`, `solver` and `discrepancy`"):
            trainer.unlearn([0, 1], relabel=labels, step="match", **options)
        other = trainer.unlearn([0, 1], relabel=labels, dry_run=True, unconverged="ignore", **options)
        assert other.solve["solver"] != "nonlinear_cg"
        assert any("The settings exclude a match" in note for note in other.notes)
    assert trainer.unlearn([0, 1], relabel=labels, step="match", solver="cg").solve["solver"] == "nonlinear_cg"
    for options in ({"method": "gif"}, {"curvature": "hessian"}):
        with pytest.raises(ConfigurationError, match="Omit `method`, `curvature`, `solver` and"):
            trainer.unlearn([0, 1], step="match", **options)
        assert len(trainer.unlearn([0, 1], dry_run=True, **options).solves) >= 1
    for options in ({"method": "if"}, {"method": "fif", "solver": "cg"}, {"curvature": "ggn"}):
        assert trainer.unlearn([0, 1], step="match", dry_run=True, **options).solves[0]["curvature"] == "ggn"


def test_a_loss_without_known_predictions_is_edited_in_another_way_with_a_note() -> None:
    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return (1 - torch.cos(self.net(x)[range(len(y)), y])).mean()

    trainer, _, _ = fitted(Own(), max_epochs=5)
    report = trainer.unlearn([0, 1], dry_run=True)
    assert any("not recognised" in note and "step='relinearise'" in note for note in report.notes)
    trainer.unlearn([0, 1], dry_run=True, step="relinearise")


def test_nothing_is_forgotten_where_nothing_was_learned() -> None:
    """Many copies of each example: without one of them, training would give the same model."""
    base = blobs(12)
    data = TensorDataset(*(torch.cat([part] * 40) for part in base.tensors))
    trainer, _, _ = fitted(Classifier(lr=0.1), data, max_epochs=10)
    report = trainer.unlearn([0, 1], dry_run=True)
    assert report.verdict.startswith("Nothing to do. ")


# ----------------------------------------------------------------------------------------------------------------------
# The length of training
# ----------------------------------------------------------------------------------------------------------------------


class Optimized(Classifier):
    """A classifier with an optimizer of choice, and learning rates that halve at each step."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__()
        self.kind, self.options = optimizer, options

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=0.1, **self.options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 1.0), ({"momentum": 0.9}, 10.0), ({"momentum": 0.9, "dampening": 0.9}, 1.0), ({"weight_decay": 0.3}, 1.0)],
)
def test_the_length_is_the_sum_of_learning_rates_over_one_minus_momentum(
    options: dict[str, float], factor: float
) -> None:
    callback = GIFCallback()
    fitted(Optimized(torch.optim.SGD, **options), callback=callback, max_epochs=2)  # 3 steps in each epoch
    length = callback.tracker.length
    expected = factor * sum(0.1 * 0.5**step for step in range(6))
    assert list(length.lengths.values()) == pytest.approx([expected] * 4)
    assert set(length.decays.values()) == {options.get("weight_decay", 0.0)}
    assert length.seconds > 0


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_length_of_adam_is_divided_by_the_root_of_the_second_moment(decoupled: bool) -> None:
    callback, kind = GIFCallback(), torch.optim.AdamW if decoupled else torch.optim.Adam
    trainer, module, _ = fitted(Optimized(kind, weight_decay=0.2), callback=callback, max_epochs=1)
    (optimizer,) = trainer.optimizers
    rates = sum(0.1 * 0.5**step for step in range(3))
    for name, parameter in module.named_parameters():
        state = optimizer.state[parameter]
        divisor = float((state["exp_avg_sq"].mean() / (1 - 0.999**3)).sqrt()) + 1e-8
        assert callback.tracker.length.lengths[name] == pytest.approx(rates / divisor, rel=1e-5)
        assert callback.tracker.length.decays[name] == pytest.approx(0.2 * divisor if decoupled else 0.2)


def test_the_length_is_in_checkpoints_and_goes_on_when_training_does(tmp_path: Path) -> None:
    callback, data = GIFCallback(), blobs()
    trainer, module, _ = fitted(callback=callback, dataset=data, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = GIFCallback()
    make_trainer(resumed, max_epochs=4).fit(Classifier(), loader(data, shuffle=True), ckpt_path=tmp_path / "two.ckpt")
    for name, length in callback.tracker.length.lengths.items():
        assert resumed.tracker.length.lengths[name] == pytest.approx(2 * length)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(data, shuffle=True))
    assert callback.tracker.length.lengths == pytest.approx(resumed.tracker.length.lengths)


@pytest.mark.slow
def test_without_a_record_of_the_training_the_damping_is_a_share_of_the_largest_eigenvalue() -> None:
    data = noisy()
    trained, module, _ = fitted(noisy_classifier(), data, callback=GIFCallback(snapshots=0), max_epochs=60)
    recorded = trained.unlearn(list(range(12)), dry_run=True)
    trainer = make_trainer()
    attach(trainer, module, train_dataloaders=loader(data))
    report = trainer.unlearn(list(range(12)), dry_run=True)
    assert report.solve["damping"] != pytest.approx(recorded.solve["damping"])
    assert any("guess" in note and "training was not recorded" in note for note in report.notes)
    assert not any("guess" in note for note in recorded.notes)
    given = trainer.unlearn(list(range(12)), dry_run=True, damping=recorded.solve["damping"])
    assert given.forget.after == pytest.approx(recorded.forget.after, rel=0.02)
    assert not any("guess" in note for note in given.notes)


def test_an_optimizer_that_cannot_be_read_ends_gathering_and_not_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: TrainingLength, optimizer: torch.optim.Optimizer) -> None:
        raise KeyError("lr")

    monkeypatch.setattr(TrainingLength, "add", fails)
    with pytest.warns(GIFWarning, match="reading the learning rates failed"):
        trainer, _, _ = fitted(max_epochs=2)
    assert trainer.current_epoch == 2


def test_a_regression_is_matched_in_its_predictions() -> None:
    data = made(1)
    module = Linear(1).double()
    trainer = make_trainer(GIFCallback(double=True), max_epochs=30, precision="64-true")
    trainer.fit(module, DataLoader(data, 16, shuffle=True))
    report = trainer.unlearn(FORGET, dry_run=True)
    assert report.forget.after == pytest.approx(report.forget.predicted, rel=0.1)


@pytest.mark.filterwarnings("ignore")
def test_an_edit_that_would_do_more_damage_than_good_is_not_made() -> None:
    trainer, _, _ = fitted(noisy_classifier(), noisy(), callback=GIFCallback(), max_epochs=20)
    for options in ({"damping": 1e-6}, {"damping": 0.0}):
        report = trainer.unlearn([0, 1], dry_run=True, **options)
        assert report.retain.after <= max(report.retain.before, report.retain.predicted) + abs(
            report.forget.predicted - report.forget.before
        )
    report = trainer.unlearn(list(range(119)), dry_run=True)
    assert report.forget.after <= 2 * report.forget.predicted


class Frozen(Classifier):
    """Its first layer is not in the optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net[2].parameters(), 0.01)


def test_parameters_that_training_did_not_change_stay_as_they_are() -> None:
    trainer, _, _ = fitted(Frozen(noisy_classifier().net), noisy(), callback=GIFCallback(), max_epochs=20)
    report = trainer.unlearn([0, 1, 2], dry_run=True)
    assert not any("guess" in note for note in report.notes)
    change = {name: float((report.edit.new[name] - report.edit.old[name]).norm()) for name in report.edit.new}
    assert change["net.0.weight"] < 1e-3 * change["net.2.weight"]


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Rprop])
def test_the_length_of_other_optimizers_is_unknown_and_a_note_says_so(kind: type[torch.optim.Optimizer]) -> None:
    trainer, _, _ = fitted(Optimized(kind), callback=GIFCallback(), max_epochs=2)
    report = trainer.unlearn([0, 1], dry_run=True)
    assert any("guess" in note and kind.__name__ in note for note in report.notes)


def test_the_length_of_rmsprop_has_the_momentum() -> None:
    lengths = []
    for momentum in (0.0, 0.9):
        callback = GIFCallback()
        torch.manual_seed(0)
        fitted(Optimized(torch.optim.RMSprop, momentum=momentum), callback=callback, max_epochs=1)
        lengths.append(callback.tracker.length.lengths["net.2.bias"])
    assert 3 < lengths[1] / lengths[0] < 30


def test_an_interrupted_fit_keeps_its_length() -> None:
    class Stops(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                raise RuntimeError("stop")

    callback = GIFCallback()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callback, max_epochs=1).fit(Stops(), loader(blobs()))
    assert list(callback.tracker.length.lengths.values()) == pytest.approx([0.2] * 4)


def test_the_parts_of_a_match_need_their_order() -> None:
    trainer, _, _ = fitted(max_epochs=5)
    for wrong in (lambda p: p.match(), lambda p: p.predictions):
        with pytest.raises(ConfigurationError, match=r"leave_out"):
            trainer.unlearn([0, 1], dry_run=True, step=wrong)

    def right(problem: Any) -> Any:
        problem.leave_out()
        problem.match()
        return problem.evaluate(1.0, 1.0)

    assert trainer.unlearn([0, 1], dry_run=True, step=right, method="if", solver="cg", curvature="ggn").edit.count
