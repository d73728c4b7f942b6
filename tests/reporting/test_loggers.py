"""Reports in CSV files, TensorBoard, W&B and loggers of other makes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_gif import GIFCallback, GIFWarning
from lightning_gif.reporting.context import CallContext
from lightning_gif.reporting.loggers import log_figure, log_histogram, log_scalars, log_table, log_text
from lightning_gif.reporting.previews import image_of, text_of

from ..conftest import batch_of, fitted, same_weights, weights
from ..reports import csv_values, image_net, images, report_of


def event_values(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_csv_has_the_values_as_soon_as_the_call_returns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    values = csv_values(logger)
    assert values["gif/influence/score_max"] == float(answer.scores.max())
    assert values["gif/influence/solve_iterations"] == answer.solution.iterations
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    values = csv_values(logger)
    assert values["gif/unlearn/forget_loss_after"] == edit.forget.after
    assert values["gif/unlearn/n_changed"] == edit.edit.count
    assert values["gif/influence/score_min"] == float(answer.scores.min())  # rewritten with more columns, not lost
    assert values["gif/targets/count"] > 0
    assert "gif/unlearn/goal" not in values  # words are not metrics


def test_tensorboard_has_the_values_at_the_step_of_training(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    found = event_values(logger.log_dir)
    assert found["gif/influence/score_max"] == [(6, pytest.approx(float(answer.scores.max())))]
    assert found["gif/unlearn/retain_loss_before"] == [(6, pytest.approx(edit.retain.before))]
    assert trainer.global_step == 6


def test_tensorboard_has_the_figure_the_histogram_and_the_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    answer = trainer.influence(batch_of(dataset, [4]), k=3)
    edit = trainer.unlearn(batch_of(dataset, [4]), step="natural", dry_run=True)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0}).Reload()
    (histogram,) = events.Histograms("gif/influence/scores")
    assert histogram.step == trainer.global_step
    assert histogram.histogram_value.num == len(dataset)
    assert histogram.histogram_value.sum == pytest.approx(float(answer.scores.sum()))
    (picture,) = events.Images("gif/influence/plot")
    figure = answer.plot()
    assert (picture.width, picture.height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    (text,) = events.Tensors("gif/influence/report/text_summary")
    logged = text.tensor_proto.string_val[0].decode()
    assert [line.removeprefix("    ") for line in logged.splitlines()] == str(answer).splitlines()
    assert all(line.startswith("    ") for line in logged.splitlines())
    (text,) = events.Tensors("gif/unlearn/report/text_summary")
    assert text.tensor_proto.string_val[0].decode().split() == str(edit).split()
    assert text.step == trainer.global_step
    (picture,) = events.Images("gif/unlearn/plot")
    figure = edit.plot()
    assert (picture.width, picture.height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))


def test_tensorboard_without_matplotlib_has_all_but_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    report = report_of([[0.1, -0.2, 0.3]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.log([logger])
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert tags["images"] == []
    assert tags["histograms"] == ["gif/influence/scores"]
    assert "gif/influence/report/text_summary" in tags["tensors"]


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    """An offline run. The logger sets WANDB_MODE for the whole process; it is put back."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    yield logger
    logger.experiment.finish()


def wandb_tables(logger: WandbLogger, key: str) -> list[dict[str, Any]]:
    found = sorted(Path(logger.experiment.dir, "media", "table").glob(f"{key}_*.table.json"), key=os.path.getmtime)
    return [json.loads(path.read_text()) for path in found]


def test_wandb_has_values_tables_and_pictures_beside_other_loggers(tmp_path: Path, wandb_logger: WandbLogger) -> None:
    others = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer, _, dataset = fitted(image_net(), images(), logger=[wandb_logger, *others])
    answer = trainer.influence(batch_of(dataset, [4, 7]), k=3, eigenvalues=2)
    trainer.unlearn(batch_of(dataset, [4]), step="natural")
    run = wandb_logger.experiment

    summary = dict(run.summary)
    assert summary["gif/influence/score_max"] == float(answer.scores.max())
    assert summary["gif/unlearn/step"] == 1.0
    assert summary["trainer/global_step"] == trainer.global_step

    (examples,) = wandb_tables(wandb_logger, "gif/influence/examples")
    assert examples["columns"] == ["query", "kind", "rank", "index", "score", "target", "example"]
    rows = [dict(zip(examples["columns"], row, strict=True)) for row in examples["data"]]
    assert [row["kind"] for row in rows] == ["query"] * 2 + ["proponent"] * 3 + ["opponent"] * 3
    assert [row["target"] for row in rows[:2]] == [1, 1]
    assert [row["index"] for row in rows[2:5]] == answer.proponents().indices[0].tolist()
    assert [row["score"] for row in rows[5:]] == answer.opponents().scores[0].tolist()
    assert all(row["target"] == row["index"] % 3 for row in rows[2:])
    assert all(row["example"] == "Image" for row in rows)  # the pictures themselves are in the table's artifact

    scores = summary["gif/influence/scores"]
    assert scores["_type"] == "histogram"
    assert sum(scores["values"]) == len(dataset)
    assert scores["bins"][-1] == pytest.approx(float(answer.scores.max()))
    (solve,) = wandb_tables(wandb_logger, "gif/influence/solve")
    assert [row[1] for row in solve["data"]] == answer.solution.residuals
    (ends,) = wandb_tables(wandb_logger, "gif/influence/eigenvalues")
    assert [row[2] for row in ends["data"]] == answer.curvature["largest"] + answer.curvature["smallest"]
    (path,) = wandb_tables(wandb_logger, "gif/unlearn/path")
    assert [row[0] for row in path["data"]] == [0.0, 1.0]

    assert csv_values(others[0])["gif/unlearn/step"] == 1.0
    assert event_values(others[1].log_dir)["gif/unlearn/step"] == [(trainer.global_step, 1.0)]
    run.log({"mine": 1})  # the run goes on
    assert run.summary["mine"] == 1


def test_wandb_tables_of_other_data_hold_their_values_for_each_query(wandb_logger: WandbLogger) -> None:
    trainer, _, dataset = fitted(logger=wandb_logger)
    trainer.influence(batch_of(dataset, list(range(10))), per_example=True, k=2)
    (examples,) = wandb_tables(wandb_logger, "gif/influence/examples")
    rows = [dict(zip(examples["columns"], row, strict=True)) for row in examples["data"]]
    queries = [row for row in rows if row["kind"] == "query"]
    assert [row["example"] for row in queries] == [text_of(dataset[index]) for index in range(8)]
    assert [row["query"] for row in queries] == list(range(8))
    assert len(rows) == 8 + 8 * 4
    assert all(row["example"] == text_of(dataset[row["index"]]) for row in rows if row["kind"] != "query")
    assert sum(wandb_logger.experiment.summary["gif/influence/scores"]["values"]) == 10 * len(dataset)


def test_a_finished_wandb_run_costs_neither_report_nor_edit(wandb_logger: WandbLogger, tmp_path: Path) -> None:
    import wandb

    after = CSVLogger(tmp_path)
    trainer, module, dataset = fitted(logger=[wandb_logger, after])
    before = weights(module)
    wandb.finish()
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*is finished, and no new one is started"):
        answer = trainer.influence(batch_of(dataset, [0]))
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        answer.log()
    assert csv_values(after)["gif/influence/score_max"] == float(answer.scores.max())
    assert wandb.run is None
    assert len(list(tmp_path.rglob("*.wandb"))) == 1
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*finished"):
        report = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    assert csv_values(after)["gif/unlearn/step"] == 1.0
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        report.log()
    assert not same_weights(weights(module), before)
    report.undo()
    assert same_weights(weights(module), before)


def test_a_disabled_wandb_run_takes_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        answer = trainer.influence(batch_of(dataset, [4]), k=3)
        assert dict(logger.experiment.summary)["gif/influence/score_max"] == float(answer.scores.max())
        wandb.finish()
        answer.log()  # a run that was never one takes no harm from its end
    assert not list(tmp_path.rglob("*.wandb"))


class Broken(CSVLogger):
    """Takes what training logs, and fails at a report."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith(("gif/influence", "gif/unlearn")) for name in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_named_and_the_others_are_served(tmp_path: Path) -> None:
    loggers = [Broken(tmp_path, name="broken"), CSVLogger(tmp_path, name="whole")]
    trainer, module, dataset = fitted(logger=loggers)
    with pytest.warns(GIFWarning, match="Broken failed to log the report.*OSError: disk full"):
        answer = trainer.influence(batch_of(dataset, [0]))
    assert csv_values(loggers[1])["gif/influence/n_train"] == 48
    before = weights(module)
    with pytest.warns(GIFWarning, match="Broken failed to log the report"):
        edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    edit.undo()
    assert same_weights(weights(module), before)
    with pytest.raises(OSError, match="disk full"):
        answer.log()


def test_logging_can_be_left_out_and_made_up_for(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(
        callback=GIFCallback(ratio=0.5, unconverged="ignore", log_reports=False), logger=logger
    )
    answer = trainer.influence(batch_of(dataset, [0]))
    assert not any(name.startswith("gif") for name in csv_values(logger))
    answer.log(prefix="mine")
    assert csv_values(logger)["mine/n_train"] == 48
    elsewhere = CSVLogger(tmp_path, name="elsewhere")
    answer.log([elsewhere])
    assert csv_values(elsewhere)["gif/influence/n_train"] == 48


def test_no_logger_and_a_dry_run_of_the_trainer_log_nothing(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(logger=False)
    report = trainer.influence(batch_of(dataset, [0]))
    assert report.loggers == []
    report.log()
    trainer, _, dataset = fitted(logger=CSVLogger(tmp_path), fast_dev_run=True)
    trainer.influence(batch_of(dataset, [0]), targets="batch").log()
    trainer.unlearn(batch_of(dataset, [0]), step=0.1)
    assert not list(tmp_path.rglob("*.csv"))


class LeastLogger:
    """The least that a logger can be."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))


def test_only_finite_numbers_reach_a_logger_and_tables_only_those_that_take_them() -> None:
    logger = LeastLogger()
    values = {"a": 1, "b": 2.5, "words": "no", "nan": math.nan, "inf": math.inf, "none": None}
    log_scalars([logger], values, prefix="x", step=3)
    assert logger.metrics == [({"x/a": 1.0, "x/b": 2.5}, 3)]
    unread = iter([[1]])
    log_table([logger], "t", ["a"], unread)
    assert next(unread) == [1]
    log_histogram([logger], "h", torch.ones(3), step=3)
    log_text([logger], "x", "words", step=3)
    log_figure([logger], "f", pytest.fail, step=3)  # type: ignore[arg-type]
    assert len(logger.metrics) == 1


def test_a_writer_of_another_make_gets_what_it_can_take() -> None:
    class Writer:
        def __init__(self) -> None:
            self.taken: dict[str, Any] = {}
            self.flushed = 0

        def add_text(self, key: str, text: str, step: int) -> None:
            self.taken[key] = (text, step)

        def flush(self) -> None:
            self.flushed += 1

    class Writing(LeastLogger):
        experiment = Writer()

    logger = Writing()
    report_of([[0.1, -0.2]], context=CallContext(global_step=5)).log([logger], prefix="mine")
    ((numbers, step),) = logger.metrics
    assert numbers["mine/n_train"] == 2
    assert step == 5
    assert list(logger.experiment.taken) == ["mine/report"]
    assert logger.experiment.taken["mine/report"][0].lstrip().startswith("Influence of 2 training examples")
    assert logger.experiment.flushed == 2


def test_pictures_in_tables_of_wandb_are_enlarged_and_show_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    class Tables(LeastLogger):
        def __init__(self, experiment: Any) -> None:
            super().__init__()
            self.experiment = experiment

        def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
            self.cells = data[0]

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self.histogram = metrics

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, other = Tables(wandb.init(mode="disabled")), Tables(object())
    small = image_of(images()[0])
    for each in (logger, other):
        log_table([each], "t", ["image", "number"], [[small, 3]])
        log_histogram([each], "h", torch.ones(3), step=3)
    wandb.finish()
    assert other.cells[0] is small
    assert other.cells[1] == 3
    assert not hasattr(other, "histogram")
    assert isinstance(logger.histogram["h"], wandb.Histogram)
    picture, number = logger.cells
    assert number == 3
    assert isinstance(picture, wandb.Image)
    shown = np.asarray(picture.image)
    assert shown.shape == (64, 64)
    np.testing.assert_array_equal(shown[::8, ::8], small)


@pytest.mark.slow
def test_neither_the_package_nor_other_loggers_load_wandb(tmp_path: Path) -> None:
    """The package does not load matplotlib or pandas either. One fresh process answers both questions."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import lightning.pytorch, torchmetrics, torch.func
before = set(sys.modules)
import lightning_gif
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
from lightning.pytorch.loggers import CSVLogger
from tests.conftest import fitted, batch_of
trainer, module, data = fitted(logger=CSVLogger({str(tmp_path)!r}))
trainer.influence(batch_of(data, [0]))
trainer.unlearn(batch_of(data, [0]), step="natural")
print("wandb" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = out.splitlines()[0]
    assert "lightning_gif" in imported
    for name in ("wandb", "matplotlib", "pandas"):
        assert name not in imported
    assert out.split()[-1] == "False"
