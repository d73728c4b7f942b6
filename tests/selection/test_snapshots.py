"""The choice of snapshots, and scores that are averaged over them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gif import ConfigurationError, GIFCallback, attach
from lightning_gif.selection import snapshots
from lightning_gif.selection.snapshots import Snapshots

from ..conftest import WEIGHTS_ONLY, Classifier, batch_of, fitted, loader, make_trainer


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 15, 40, 100, 400])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_snapshots_are_spread_from_a_third_of_the_epochs_on(count: int, epochs: int) -> None:
    some, net = Snapshots(count), nn.Linear(2, 2)
    for epoch in range(epochs):
        some.add(epoch, net)
        assert len(some.kept) <= max(2 * count, 4)
    chosen = [epoch + 1 for epoch in sorted(some.chosen())]
    assert len(chosen) == min(count, len([epoch for epoch in some.kept if epoch < epochs - 1]))
    assert all(number < epochs for number in chosen)
    if epochs >= 3:
        assert epochs / 5 <= chosen[0] <= epochs / 3
    if epochs >= 15 and count > 1:
        assert len(chosen) == count
        assert chosen[-1] >= 0.6 * epochs
        steps = [later / earlier for earlier, later in itertools.pairwise(chosen)]
        assert max(steps) < 3


def test_snapshots_are_copies_and_a_new_fit_discards_them() -> None:
    some, net = Snapshots(2), nn.Linear(2, 2)
    for epoch in range(3):
        with torch.no_grad():
            net.weight.fill_(epoch)
        some.add(epoch, net)
    assert [float(state["weight"][0, 0]) for state in some.kept.values()] == [0.0, 1.0]
    assert list(some.chosen()) == [0, 1]
    some.add(0, net)
    assert list(some.kept) == [0]
    empty = Snapshots(0)
    empty.add(0, net)
    assert not empty.kept
    assert not empty.chosen()


@pytest.mark.parametrize("count", [-1, 1.5, True, None, "all"])
def test_invalid_numbers_of_snapshots_are_refused(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="`snapshots` must be 'auto' or a whole number"):
        GIFCallback(snapshots=count)


def test_one_snapshot_is_kept_by_default_unless_the_module_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, dataset = fitted(max_epochs=6)
    query = batch_of(dataset, slice(0, 3))
    report = trainer.influence(query)
    assert report.settings["snapshots"] == [1]
    assert trainer.influence(query, snapshots=False).settings["snapshots"] == []
    assert trainer.self_influence().settings["snapshots"] == []
    assert trainer.self_influence(snapshots=True).settings["snapshots"] == [1]
    monkeypatch.setattr(snapshots, "_AUTOMATIC_BYTES", 100)
    trainer, _, _ = fitted(max_epochs=6)
    assert trainer.influence(query).settings["snapshots"] == []
    trainer, _, _ = fitted(callback=GIFCallback(snapshots=1), max_epochs=6)
    assert trainer.influence(query).settings["snapshots"] == [1]


def test_a_snapshot_that_nobody_asked_for_is_not_in_checkpoints(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(max_epochs=6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", **WEIGHTS_ONLY)["lightning_gif"]["snapshots"] == {}
    fresh = make_trainer(GIFCallback())
    fresh.validate(Classifier(), loader(dataset), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    query = batch_of(dataset, slice(0, 3))
    assert fresh.influence(query, dataloader=loader(dataset)).settings["snapshots"] == []
    trainer.test(
        trainer.lightning_module, loader(dataset), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False
    )
    assert trainer.influence(query, dataloader=loader(dataset)).settings["snapshots"] == [1]


class Normal(Classifier):
    """A module with buffers that training changes."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))


def test_scores_over_snapshots_are_the_mean_of_the_scores_of_each_state(tmp_path: Path) -> None:
    trainer, module, dataset = fitted(Normal(), callback=GIFCallback(snapshots=2), max_epochs=6)
    query = batch_of(dataset, slice(0, 3))
    before = copy.deepcopy(module.state_dict())
    report = trainer.influence(query, per_example=True, snapshots=True)
    epochs = report.settings["snapshots"]
    assert len(epochs) == 2
    assert str(report).startswith(
        "Influence of 48 training examples on 3 queries, averaged over 3 states of training ("
    )
    parts = [trainer.influence(query, per_example=True, snapshots=False).scores]
    for epoch in epochs:
        state = trainer.callbacks[0].tracker.snapshots.kept[epoch]
        other, earlier = make_trainer(), Normal()
        earlier.load_state_dict(state)
        attach(other, earlier, train_dataloaders=loader(dataset), callback=GIFCallback())
        parts.append(other.influence(query, per_example=True).scores)
    torch.testing.assert_close(report.scores, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-7)
    assert (parts[1] - parts[0]).abs().max() > 1e-5  # buffers and weights of another epoch
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    filed = trainer.influence(query, per_example=True, snapshots=True, scores_to=tmp_path / "scores")
    torch.testing.assert_close(filed.scores, report.scores)
    with pytest.raises(ConfigurationError, match="differs in: snapshots"):
        trainer.influence(query, per_example=True, snapshots=False, scores_to=tmp_path / "scores")


def test_self_influence_over_snapshots_is_the_mean_over_the_states() -> None:
    trainer, _, dataset = fitted(Normal(), callback=GIFCallback(snapshots=2), max_epochs=6)
    report = trainer.self_influence(snapshots=True, among=[3, 5, 8])
    parts = [trainer.self_influence(among=[3, 5, 8]).scores]
    for epoch in report.settings["snapshots"]:
        other, earlier = make_trainer(), Normal()
        earlier.load_state_dict(trainer.callbacks[0].tracker.snapshots.kept[epoch])
        attach(other, earlier, train_dataloaders=loader(dataset), callback=GIFCallback())
        parts.append(other.self_influence(among=[3, 5, 8]).scores)
    assert len(parts) == 3
    torch.testing.assert_close(report.scores, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-7)
    assert (parts[1] - parts[0]).abs().max() > 1e-5
    with pytest.raises(ConfigurationError, match=r"there are none\. Fit with GIFCallback"):
        fitted(max_epochs=1)[0].self_influence(snapshots=True)


def test_snapshots_are_restored_from_a_checkpoint(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=2), max_epochs=6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    query = batch_of(dataset, slice(0, 3))
    fresh = make_trainer(GIFCallback(snapshots=2))
    fresh.validate(Classifier(), loader(dataset), ckpt_path=tmp_path / "a.ckpt", **WEIGHTS_ONLY, verbose=False)
    again = fresh.influence(query, snapshots=True, dataloader=loader(dataset))
    torch.testing.assert_close(again.scores, trainer.influence(query, snapshots=True).scores)


def test_averaging_without_snapshots_is_refused() -> None:
    trainer, _, dataset = fitted(callback=GIFCallback(snapshots=0))
    with pytest.raises(ConfigurationError, match=r"GIFCallback\(snapshots=1\)"):
        trainer.influence(batch_of(dataset, slice(0, 3)), snapshots=True)
