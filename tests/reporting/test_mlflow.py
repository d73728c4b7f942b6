"""What MLflow gets, read back from its file store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger

from lightning_gif import GIFWarning, InfluenceReport, UnlearnReport

from ..conftest import batch_of, fitted
from ..reports import image_net, images

pytest.importorskip("mlflow", reason="MLflow is large, and no part of the development tools")


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")


def metric(logger: Any, key: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in logger.experiment.get_metric_history(logger.run_id, key)]


def artifacts(logger: Any) -> Path:
    return Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file:"))


def test_a_report_is_in_the_run_with_its_figure_its_tables_and_its_files(logger: Any) -> None:
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    report = trainer.influence(batch_of(dataset, [4]), k=3, name="one image")
    step = trainer.global_step
    assert metric(logger, "gif_influence/one image/score_max") == [(step, float(report.scores.max()))]
    folder = artifacts(logger) / f"gif_influence/one image/step-{step}"
    assert (folder / "report.txt").read_text() == str(report)
    assert (folder / "plot.png").stat().st_size > 1000
    examples = json.loads((folder / "examples.json").read_text())
    assert examples["index"][1:4] == report.proponents().indices[0].tolist()
    assert (folder / "examples.html").read_text().count("<img ") == 7
    assert json.loads((folder / "settings.json").read_text())["method"] == report.settings["method"]
    assert sum(json.loads((folder / "scores.json").read_text())["counts"]) == 24
    assert json.loads((folder / "by_class.json").read_text())["examples"] == [8, 8, 8]
    assert InfluenceReport.load(folder / "influence").scores.equal(report.scores)


def test_dry_run_edit_and_undo_are_different_events(logger: Any) -> None:
    trainer, _, _ = fitted(logger=logger)
    trainer.unlearn([4, 7], step="natural", dry_run=True)
    edit = trainer.unlearn([4, 7], step="natural")
    edit.undo()
    before, after = edit.retain.before, edit.retain.after
    assert [value for _, value in metric(logger, "gif_dry_run/retain_loss")] == [before, after]
    assert [value for _, value in metric(logger, "gif_unlearn/retain_loss")] == [before, after, before]
    assert [value for _, value in metric(logger, "gif_unlearn/edits_in_weights")] == [0, 1, 0]
    events = json.loads((artifacts(logger) / "gif_unlearn/event-3/events.json").read_text())
    assert events["kind"] == ["dry_run", "unlearn", "undo"]
    tags = logger.experiment.get_run(logger.run_id).data.tags
    assert tags["gif_unlearn/state"].endswith("0 edits in the weights")
    loaded = UnlearnReport.load(artifacts(logger) / "gif_unlearn/event-2/edit.safetensors")
    assert loaded.digests() == edit.digests()


def test_a_store_that_fails_is_one_warning(logger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, dataset = fitted(logger=logger)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the server")

    monkeypatch.setattr(type(logger.experiment), "log_dict", unreachable)
    with pytest.warns(GIFWarning, match="MLFlowLogger failed.*ConnectionError: no route") as caught:
        trainer.influence(batch_of(dataset, [0]))
    assert len([one for one in caught if "MLFlowLogger" in str(one.message)]) == 1
