"""Applying an edit and undoing it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_gif import UnlearnReport

from ..conftest import batch_of, fitted, same_weights, weights


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


def test_a_report_says_whether_the_edit_is_in_the_weights(tmp_path: Any) -> None:
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
