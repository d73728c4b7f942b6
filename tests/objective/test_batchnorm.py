"""The running statistics of BatchNorm, recomputed for an edited model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gif import ConfigurationError, UnlearnReport

from ..conftest import Classifier, batch_of, fitted, same_weights, weights


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
    if relabel is None:
        n = len(report.outcomes["forget"].after)
        assert report.verdict.partition(". ")[2].startswith(f"{round(n * report.memorization[1])} of {n} examples of")
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


@pytest.mark.slow
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
