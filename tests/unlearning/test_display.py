"""How the report of an edit is printed and drawn."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from ..conftest import Classifier, batch_of, fitted


def test_print_of_an_edit_has_both_sides_and_the_notes() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural")
    text = str(report)
    assert f"Edit for 2 examples (goal: examples; 46 retained) by changing {report.edit.count} of 83" in text
    assert f"forget loss: {report.forget.before:.4g} -> {report.forget.after:.4g}" in text
    assert f"retain loss: {report.retain.before:.4g} -> {report.retain.after:.4g}" in text
    assert "note: The optimizer's state" in text
    corrected = trainer.unlearn(batch_of(dataset, [2, 3]), relabel=0, step="natural")
    assert corrected.relabelled is not None
    assert f"relabelled loss: {corrected.relabelled.before:.4g}" in str(corrected)


def test_a_plot_of_an_edit_shows_the_search_and_the_solve() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="search")
    search, solve = report.plot().axes
    assert search.get_title() == "losses along the change, goal: examples"
    assert solve.get_title() == f"first solve: lsmr, {report.solve['iterations']} iterations"
    forget, forget_after, retain, retain_after, _, chosen = search.lines
    assert forget_after.get_ydata()[0] == report.forget.after
    assert retain_after.get_ydata()[0] == report.retain.after
    assert forget.get_label() == "forget"
    steps = sorted(trial.step_size for trial in report.trials)
    assert forget.get_xdata().tolist() == steps == retain.get_xdata().tolist()
    assert chosen.get_xdata()[0] == report.step
    assert solve.lines[0].get_ydata().tolist() == report.residuals
    assert search.get_yscale() == "log"


def test_a_plot_of_several_changes_shows_the_losses_after_each() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1))
    assert len(report.step_sizes) > 1
    losses, memory, _ = report.plot().axes
    assert memory.get_title() == "still predicted as the class"
    path, end = memory.lines
    assert path.get_ydata()[0] == report.memorization[0] == report.trials[0].memorization
    assert path.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert end.get_ydata()[0] == report.memorization[1]
    forget, forget_after, *_ = losses.lines
    assert forget.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert forget.get_ydata()[0] == pytest.approx(report.forget.before, rel=1e-6)
    assert forget.get_ydata()[-1] == pytest.approx(report.forget.after, rel=1e-3)
    assert forget_after.get_xdata()[0] == len(report.step_sizes)


def test_losses_that_are_not_positive_are_drawn_on_a_plain_scale() -> None:
    class Shifted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) - 5.0

    trainer, _, dataset = fitted(Shifted())
    search = trainer.unlearn(batch_of(dataset, [0, 1]), step=0.5).plot().axes[0]
    assert search.get_yscale() == "linear"
    low, high = search.get_ylim()
    assert low < high < 0
