"""A whole call of ``unlearn``: what it records and reports, for every choice and every kind of net."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import ConfigurationError, ConvergenceWarning, GIFCallback, UnlearnReport, attach
from lightning_gif.unlearning.protocol import GoalName

from ..conftest import Classifier, batch_of, fitted, loader, make_trainer, same_weights, weights
from ..nets import make
from .doubles import memorised


@pytest.mark.mostly_slow(4)
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


def test_each_solve_records_the_settings_that_were_chosen_for_it() -> None:
    trainer, _, dataset = fitted()
    forget = batch_of(dataset, slice(0, 4))
    first = trainer.unlearn(forget, step="natural", dry_run=True)
    assert first.settings["max_iter"] is None
    assert [(one["max_iter"], one["rtol"]) for one in first.solves] == [(10, 1e-4)]
    further = trainer.unlearn(forget, rtol=1e-3, step="natural", dry_run=True)
    assert [(one["max_iter"], one["rtol"]) for one in further.solves] == [(200, 1e-3)]
    class_removal = trainer.unlearn(lambda batch: batch[1] == 1, dry_run=True)
    assert {one["max_iter"] for one in class_removal.solves} == {5}


def test_only_the_targets_change() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), step="natural", ratio=0.2)
    for name, value in weights(module).items():
        changed = (value != before[name]).flatten().nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(report.edit.indices.get(name, torch.empty(0)).tolist())
    assert 0 < report.edit.count <= 0.2 * 83


def test_the_losses_of_unseen_examples_are_reported() -> None:
    trainer, _, _, unseen = memorised()
    report = trainer.unlearn(list(range(24)), unseen=loader(unseen))
    assert report.unseen is not None
    assert report.unseen.after == pytest.approx(
        float(F.cross_entropy(trainer.lightning_module(unseen.tensors[0]), unseen.tensors[1])), rel=1e-5
    )
    assert f"unseen loss: {report.unseen.before:.4g} -> {report.unseen.after:.4g}" in str(report)


def test_an_unknown_argument_is_refused_with_the_one_that_was_meant() -> None:
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


@pytest.mark.mostly_slow(2)
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


@pytest.mark.slow
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
