"""Files of earlier versions are read correctly. ``old_files`` has one of each kind, named by its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from lightning_gif import InfluenceReport, UnlearnReport, verify
from lightning_gif.attribution.score_store import ScoreStore
from lightning_gif.unlearning.journal import Journal

DATA = Path(__file__).parent / "old_files"
EDIT, LOG = DATA / "edit-3.safetensors", DATA / "audit-log-1.jsonl"
MARK = {"weights": "of a test"}


def test_an_edit_of_format_3_has_its_original_text() -> None:
    report = UnlearnReport.load(EDIT)
    logged = json.loads(LOG.read_text().splitlines()[0])
    assert str(report.goal) == "class"
    assert (report.n_forget, report.n_retain, report.n_parameters, report.edit.count) == (16, 32, 83, 41)
    assert report.global_step == 6
    assert len(report.solves) == 4
    assert (report.forget.after, report.retain.after) == (6.347157686948776, 0.3014818597584963)
    assert report.summary()["remembered_before"] == logged["numbers"]["remembered_before"] == 0.9375
    assert report.summary().items() >= {k: v for k, v in logged["numbers"].items() if v != "nan"}.items()
    report.plot().canvas.draw()


def test_an_edit_of_format_3_still_matches_its_audit_log(tmp_path: Path) -> None:
    report = UnlearnReport.load(EDIT)
    assert verify(LOG, edits=[EDIT, report]).ok
    report.save(tmp_path / "again")
    assert UnlearnReport.load(tmp_path / "again").digests() == report.digests()
    assert verify(LOG, edits=tmp_path / "again").ok


def test_an_influence_report_of_format_2_is_read() -> None:
    report = InfluenceReport.load(DATA / "influence-2")
    assert report.scores.shape == (2, 48)
    assert report.proponents(1).scores[0, 0] == report.scores[0].max()
    assert report.k == 2
    assert [shown.label for shown in report.queries] == [0, 1]
    report.plot().canvas.draw()


def test_solves_of_an_earlier_version_are_resumed(tmp_path: Path) -> None:
    shutil.copytree(DATA / "journal", tmp_path / "journal")
    Journal.check(tmp_path / "journal")
    found = Journal(tmp_path / "journal", MARK).recall(0, ["answer", []], 3)
    assert found is not None
    assert found[0].tolist() == [1.0, -2.0, 0.5]
    assert found[1] == {"slope": -1.0}


def test_scores_of_an_earlier_version_are_resumed(tmp_path: Path) -> None:
    shutil.copytree(DATA / "scores-4", tmp_path / "scores")
    store = ScoreStore.open(tmp_path / "scores", 2, 3, MARK)
    assert store.done.tolist() == [True, True, False]
    assert store.scores[:, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    found = store.load_directions(0, 2)
    assert found is not None
    assert torch.equal(found[0], torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
    assert found[1] == {"damping": 0.25}
