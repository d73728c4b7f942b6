"""The report of an edit: its file, and its attributes."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_gif import EditError, UnlearnReport

from ..conftest import Classifier, batch_of, fitted, same_weights, weights
from ..reports import image_net


def assert_same_report(one: UnlearnReport, other: UnlearnReport) -> None:
    for name in ("indices", "old", "new"):
        first, second = getattr(one.edit, name), getattr(other.edit, name)
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype
            assert torch.equal(first[key], second[key])
    assert one.edit.shapes == other.edit.shapes
    assert (one.edit.digest_before, one.edit.digest_after) == (other.edit.digest_before, other.edit.digest_after)
    for name in ("goal", "step", "forget", "retain", "relabelled", "n_forget", "n_found", "n_retain", "n_parameters"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("trials", "solve", "residuals", "settings", "notes", "seconds", "global_step"):
        assert repr(getattr(one, name)) == repr(getattr(other, name))  # NaN equals itself in words only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_report_comes_back_from_its_file_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    class Cast(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.net[0].weight.dtype)).float()

    module = Cast().to(dtype)
    trainer, _, dataset = fitted(module)
    before = weights(module)
    report = trainer.unlearn(batch_of(dataset, [0, 1]), relabel=2, step="natural")
    after = weights(module)
    assert {value.dtype for value in report.edit.new.values()} == {dtype}
    assert not same_weights(before, after)

    report.save(tmp_path / "edit.safetensors")
    loaded = UnlearnReport.load(tmp_path / "edit.safetensors")
    assert_same_report(report, loaded)
    with pytest.raises(EditError, match="pass the model"):
        loaded.undo()
    loaded.undo(module)
    assert same_weights(weights(module), before)
    bound = UnlearnReport.load(str(tmp_path / "edit.safetensors"), module)
    bound.apply()
    assert same_weights(weights(module), after)
    assert str(bound) == str(report)
    bound.plot()
    bound.log()


@pytest.mark.parametrize(("old", "new"), [("path", "trials"), ("steps", "step_sizes"), ("remembered", "memorization")])
def test_old_names_of_attributes_work_and_name_the_new_ones(old: str, new: str) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural", dry_run=True)
    with pytest.warns(DeprecationWarning, match=rf"`UnlearnReport\.{old}` is now `{new}`") as caught:
        assert getattr(report, old) is getattr(report, new)
    assert caught[0].filename == __file__


def test_the_old_name_of_the_processes_of_a_report_works() -> None:
    trainer, _, dataset = fitted()
    query = batch_of(dataset, [0, 1])
    for report in (trainer.unlearn(query, step="natural", dry_run=True), trainer.influence(query)):
        with pytest.warns(DeprecationWarning, match=rf"`{type(report).__name__}\.ranks` is now `processes`"):
            assert report.ranks is report.processes


def test_what_was_recorded_of_an_edit_cannot_be_assigned_to_and_what_is_known_of_the_trainer_can() -> None:
    trainer, module, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural", dry_run=True)
    with pytest.raises(FrozenInstanceError, match="'retain'"):
        report.retain = report.forget
    assert report.module is module
    assert (report.loggers, report.record) == (trainer.loggers, None)
    for name, value in (("module", None), ("loggers", [1]), ("record", "log.jsonl"), ("global_step", 9)):
        setattr(report, name, value)
        assert getattr(report, name) == getattr(report.context, name) == value


def test_a_search_with_its_path_comes_back(tmp_path: Path) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1, 2]), step="search")
    report.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit")
    assert len(loaded.trials) > 2
    assert_same_report(report, loaded)


def some_edit() -> tuple[pl.LightningModule, UnlearnReport]:
    trainer, module, dataset = fitted()
    return module, trainer.unlearn(batch_of(dataset, [0]), step="natural")


def test_saving_replaces_a_file_whole_and_makes_folders(tmp_path: Path) -> None:
    _, report = some_edit()
    path = tmp_path / "new" / "folder" / "edit.safetensors"
    report.save(path)
    path.write_bytes(b"old")
    report.save(path)
    assert_same_report(report, UnlearnReport.load(path))
    assert os.listdir(path.parent) == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it as they may any new file


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = some_edit()
    path = tmp_path / "edit.safetensors"
    path.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    module, report = some_edit()
    path = tmp_path / "edit.safetensors"
    report.save(path)
    content = path.read_bytes()
    for bad in (b"", b"no edit", content[:-8], content.replace(b"lightning-gif edit 4", b"lightning-gif edit 9")):
        path.write_bytes(bad)
        with pytest.raises(EditError, match=r"damaged|not an edit"):
            UnlearnReport.load(path)
    path.write_bytes(content)
    with pytest.raises(EditError, match="another model"):
        UnlearnReport.load(path, image_net())
    with pytest.raises(FileNotFoundError):
        UnlearnReport.load(tmp_path / "missing")
    UnlearnReport.load(path, module).undo()
