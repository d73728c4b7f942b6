"""The notes and warnings of an edit that missed its target or cost too much."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, GIFWarning
from lightning_gif.unlearning import LabelCorrection
from lightning_gif.unlearning.advice import warn_cost, warn_refreshed_statistics

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .doubles import scales


def test_a_note_says_that_too_few_examples_can_be_compared_with_unseen_ones() -> None:
    trainer, _, dataset = fitted()
    unseen = loader(blobs(seed=5))
    for step in ("match", "relinearise"):
        report = trainer.unlearn(batch_of(dataset, slice(0, 3)), unseen=unseen, step=step, dry_run=True)
        (note,) = (note for note in report.notes if "there are fewer than 20 of one kind" in note)
        assert ("decide how far the edit goes" in note) == (step == "relinearise")  # a match only measures losses
    assert not any("too few" in note for note in trainer.unlearn(batch_of(dataset, slice(0, 3)), dry_run=True).notes)


def test_a_poor_correction_warns() -> None:
    """Biases alone cannot give each example the next class."""
    trainer, _, dataset = fitted(max_epochs=20)
    x, y = batch_of(dataset, slice(0, 12))
    with pytest.warns(GIFWarning, match="corrected examples are not predicted"):
        trainer.unlearn((x, y), relabel=(y + 1) % 3, selector=["*bias"], dry_run=True, step="relinearise")


def test_losses_that_an_edit_raised_are_noted() -> None:
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


@pytest.mark.slow
def test_an_edit_that_takes_longer_than_the_training_says_that_retraining_is_cheaper() -> None:
    trainer, _, _ = fitted(callback=(callback := GIFCallback()))
    length = callback.tracker.length
    assert length.seconds > 0
    for seconds, is_cheaper in ((1e-6, True), (1e6, False), (0.0, False)):  # 0: no training was recorded
        length.seconds = seconds
        notes = trainer.unlearn([3, 17, 30], dry_run=True).notes
        assert any(note.startswith("Retraining is cheaper here: this edit took") for note in notes) == is_cheaper
        assert ("retraining is cheaper: the whole training took" in str(trainer.influence.check())) == is_cheaper


@pytest.mark.parametrize("recorded", [True, False])
def test_of_a_resumed_training_only_the_whole_record_counts(recorded: bool, tmp_path: Path) -> None:
    module, data = Classifier(), blobs()
    trainer = make_trainer(GIFCallback() if recorded else None, max_epochs=4)
    trainer.fit(module, loader(data))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = GIFCallback()
    resumed = make_trainer(callback, max_epochs=5)
    resumed.fit(module, loader(data), ckpt_path=tmp_path / "first.ckpt")
    length = callback.tracker.length
    assert math.isfinite(length.seconds) == recorded
    length.seconds *= 1e-6  # less than an edit takes
    notes = resumed.unlearn([3, 17, 30], dry_run=True).notes
    assert any("Retraining is cheaper" in note for note in notes) == recorded
    assert any("because the beginning of the training was not recorded" in note for note in notes) != recorded
    assert ("retraining is cheaper" in str(resumed.influence.check())) == recorded


@pytest.mark.parametrize(("old", "new", "count"), [(0.5, 0.6, 1), (0.5, 0.54, 0), (-1.006, -1.018, 0), (-1.0, -0.8, 1)])
def test_statistics_that_raise_a_loss_are_noted(old: float, new: float, count: int) -> None:
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_refreshed_statistics(
            LabelCorrection(), {"retain": old, "relabelled": 1.0}, {"retain": new, "relabelled": 1.0}, notes
        )
    assert len(notes) == count


def test_a_note_says_that_the_last_change_still_helped() -> None:
    trainer, _, _ = fitted(max_epochs=60)
    report = trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), dry_run=True, step="relinearise")
    assert len(report.step_sizes) == 12
    assert any("stopped at the limit of 12 changes" in note for note in report.notes)
    one = trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), step="search", dry_run=True)
    assert not any("stopped at the limit" in note for note in one.notes)


@pytest.mark.slow
def test_a_costly_label_correction_warns() -> None:
    """Labels at random for a net that has learned right ones."""
    x, y = blobs(200).tensors
    trainer, _, _ = fitted(dataset=TensorDataset(x, y), max_epochs=40)
    with pytest.warns(GIFWarning, match="The retained loss rose from .* The new labels contradict what the model"):
        report = trainer.unlearn(
            list(range(0, 200, 4)), relabel=(y[::4] + torch.arange(50)) % 3, dry_run=True, step="relinearise"
        )
    assert report.retain.after > report.retain.before
