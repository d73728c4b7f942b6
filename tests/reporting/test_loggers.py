"""Reports in CSV files, TensorBoard, W&B and loggers of other makes."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gif import EditError, GIFCallback, GIFWarning, UnlearnReport, verify
from lightning_gif.reporting.context import CallContext
from lightning_gif.reporting.loggers import log_figure, log_histogram, log_scalars, log_table, log_text
from lightning_gif.unlearning.logged import EVENT_COLUMNS
from lightning_gif.unlearning.picture import draw_summary

from ..conftest import Classifier, batch_of, fitted, loader, make_trainer, same_weights, weights
from ..reports import csv_values, image_net, images, report_of, titles


def event_values(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_csv_has_the_values_as_soon_as_the_call_returns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    values = csv_values(logger)
    assert values["gif_influence/score_max"] == float(answer.scores.max())
    assert values["gif_influence/diagnostics/solve_iterations"] == answer.solution.iterations
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    values = csv_values(logger)
    assert values["gif_unlearn/forget_loss"] == edit.forget.after
    assert values["gif_unlearn/diagnostics/n_changed"] == edit.edit.count
    assert values["gif_influence/score_min"] == float(answer.scores.min())  # rewritten with more columns, not lost
    assert values["gif_targets/count"] > 0
    assert "gif_unlearn/diagnostics/goal" not in values  # words are not metrics
    settings = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert settings["gif_influence"]["method"] == "if"
    assert settings["gif_unlearn"]["tuning"]


def test_tensorboard_has_the_values_at_the_step_of_training(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    answer = trainer.influence(batch_of(dataset, [0]))
    edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    found = event_values(logger.log_dir)
    assert found["gif_influence/score_max"] == [(6, pytest.approx(float(answer.scores.max())))]
    change = [(6, pytest.approx(edit.retain.before)), (6, pytest.approx(edit.retain.after))]
    assert found["gif_unlearn/retain_loss"] == change
    assert trainer.global_step == 6


def test_tensorboard_has_the_figure_the_histogram_and_the_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    answer = trainer.influence(batch_of(dataset, [4]), k=3)
    edit = trainer.unlearn(batch_of(dataset, [4]), step="natural", dry_run=True)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0}).Reload()
    (histogram,) = events.Histograms("gif_influence/scores")
    assert histogram.step == trainer.global_step
    assert histogram.histogram_value.num == len(dataset)
    assert histogram.histogram_value.sum == pytest.approx(float(answer.scores.sum()))
    (picture,) = events.Images("gif_influence/plot")
    figure = answer.plot()
    assert (picture.width, picture.height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    (text,) = events.Tensors("gif_influence/report/text_summary")
    logged = text.tensor_proto.string_val[0].decode()
    assert [line.removeprefix("    ") for line in logged.splitlines()] == str(answer).splitlines()
    assert all(line.startswith("    ") for line in logged.splitlines())
    (text,) = events.Tensors("gif_dry_run/report/text_summary")
    assert text.tensor_proto.string_val[0].decode().split() == str(edit).split()
    assert text.step == trainer.global_step
    (picture,) = events.Images("gif_dry_run/plot")
    figure = draw_summary(edit, examples=False)
    assert (picture.width, picture.height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    (table,) = events.Tensors("gif_influence/examples/text_summary")
    head, _, *rows = table.tensor_proto.string_val[0].decode().splitlines()
    assert head.split(" | ")[-2:] == ["predicted", "example |"]
    assert len(rows) == 1 + 2 * 3
    (settings,) = events.Tensors("gif_influence/settings/text_summary")
    assert '"method": "if"' in settings.tensor_proto.string_val[0].decode()


def test_forget_examples_are_not_in_the_figure_that_is_logged() -> None:
    figures: list[Any] = []
    writer = SimpleNamespace(add_figure=lambda key, figure, step: figures.append(figure))
    trainer, _, _ = fitted(image_net(), images(), callback=GIFCallback(ratio=0.5))
    edit = trainer.unlearn([4, 7], step="natural")
    edit.log([SimpleNamespace(experiment=writer, log_metrics=lambda values, step: None)])
    figures.append(edit.plot())
    assert [sum(len(axes.images) for axes in figure.axes) for figure in figures] == [0, 2]
    assert "Mean loss" in titles(figures[0])


def test_events_of_other_copies_of_the_weights_are_not_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, module, _ = fitted(logger=logger)
    edit = trainer.unlearn([4, 7], step="natural")
    copy = {name: value.clone() for name, value in module.state_dict().items()}
    edit.undo(copy)
    assert csv_values(logger)["gif_unlearn/edits_in_weights"] == 1
    edit.undo()
    edit.apply(copy)
    assert csv_values(logger)["gif_unlearn/edits_in_weights"] == 0
    assert csv_values(logger)["gif_unlearn/event"] == 2


def test_dry_run_edit_and_undo_are_different_events_in_csv_and_tensorboard(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard")]
    trainer, _, _ = fitted(logger=loggers)
    trainer.unlearn([4, 7], step="natural", name="two", dry_run=True)
    edit = trainer.unlearn([4, 7], step="natural", name="two")
    edit.undo()
    edit.apply()
    before, after = edit.retain.before, edit.retain.after
    with Path(loggers[0].log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    scalars = event_values(loggers[1].log_dir)
    expected = {
        "gif_dry_run/two/retain_loss": [before, after],
        "gif_dry_run/two/edits_in_weights": [0, 0],
        "gif_unlearn/two/retain_loss": [before, after, before, before, after],
        "gif_unlearn/two/edits_in_weights": [0, 1, 0, 0, 1],
        "gif_unlearn/two/event": [1, 2, 3, 3, 4],
    }
    for key, values in expected.items():
        assert [float(row[key]) for row in rows if row.get(key)] == values
        assert [value for _, value in scalars[key]] == pytest.approx(values)


def test_what_is_logged_by_hand_is_the_last_event(tmp_path: Path) -> None:
    trainer, _, _ = fitted(callback=GIFCallback(ratio=0.5, unconverged="ignore", log_reports=False))
    edit = trainer.unlearn([4, 7], step="natural", dry_run=True)
    for act, section, point in (
        (lambda: None, "gif_dry_run", edit.retain.after),
        (edit.apply, "gif_unlearn", edit.retain.after),
        (edit.undo, "gif_unlearn", edit.retain.before),
    ):
        logger = LeastLogger()
        act()
        assert logger.metrics == []
        edit.log([logger])
        numbers = [metrics for metrics, _ in logger.metrics if f"{section}/retain_loss" in metrics]
        assert numbers[-1][f"{section}/retain_loss"] == point


def test_a_saved_dry_run_is_one_until_it_is_applied(tmp_path: Path) -> None:
    trainer, module, _ = fitted()
    log = tmp_path / "edits.jsonl"
    edit = trainer.unlearn([4, 7], step="natural", dry_run=True, record=log)

    def sections() -> set[str]:
        edit.save(tmp_path / "edit.safetensors")
        assert verify(log, edits=[tmp_path / "edit.safetensors"]).ok
        logger = LeastLogger()
        UnlearnReport.load(tmp_path / "edit.safetensors").log([logger])
        return {key.split("/")[0] for metrics, _ in logger.metrics for key in metrics}

    assert sections() == {"gif_dry_run"}
    trained = weights(module)
    module.load_state_dict({name: value + 1 for name, value in trained.items()})
    with pytest.raises(EditError):
        edit.apply()
    module.load_state_dict(trained)
    assert sections() == {"gif_dry_run"}
    edit.apply()
    assert sections() == {"gif_unlearn"}
    edit.undo()
    assert sections() == {"gif_unlearn"}


def test_events_are_of_their_own_time_and_counted_on_after_a_resume(tmp_path: Path) -> None:
    trainer, module, dataset = fitted(max_epochs=1)
    edit = trainer.unlearn([4, 7], step="natural")
    first = trainer.global_step
    trainer.fit_loop.max_epochs = 2
    edit.undo()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.fit(module, loader(dataset))
    trainer.unlearn([1], step="natural")
    rows = trainer.callbacks[0].events.rows
    place = [EVENT_COLUMNS.index(name) for name in ("event", "epoch", "global_step")]
    found = [[row[i] for i in place] for row in rows]
    assert found == [[1, 1, first], [2, 1, first], [3, 2, 2 * first]]

    resumed = make_trainer(GIFCallback(ratio=0.5, unconverged="ignore"), max_epochs=3)
    resumed.fit(Classifier(), loader(dataset), ckpt_path=tmp_path / "a.ckpt")
    again = resumed.unlearn([4], step="natural")
    assert again.context.happened[:3] == (3, "unlearn", 1)
    assert [row[0] for row in resumed.callbacks[0].events.rows] == [1, 2, 3]


def test_tensorboard_without_matplotlib_has_all_but_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    report = report_of([[0.1, -0.2, 0.3]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.log([logger])
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert tags["images"] == []
    assert tags["histograms"] == ["gif_influence/scores"]
    assert "gif_influence/report/text_summary" in tags["tensors"]


class Broken(CSVLogger):
    """Takes what training logs, and fails at a report."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith(("gif_influence", "gif_unlearn")) for name in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_named_and_the_others_are_served(tmp_path: Path) -> None:
    loggers = [Broken(tmp_path, name="broken"), CSVLogger(tmp_path, name="whole")]
    trainer, module, dataset = fitted(logger=loggers)
    with pytest.warns(GIFWarning, match="Broken failed to log the report.*OSError: disk full"):
        answer = trainer.influence(batch_of(dataset, [0]))
    assert csv_values(loggers[1])["gif_influence/diagnostics/n_train"] == 48
    before = weights(module)
    with pytest.warns(GIFWarning, match="Broken failed to log the report.*OSError: disk full") as caught:
        edit = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    assert len([one for one in caught if "failed to log" in str(one.message)]) == 1
    with pytest.warns(GIFWarning, match="Broken failed to log the report"):
        edit.undo()
    assert same_weights(weights(module), before)
    assert csv_values(loggers[1])["gif_unlearn/edits_in_weights"] == 0
    with pytest.warns(GIFWarning, match="Broken failed to log the report"):
        answer.log()


def test_a_logger_without_a_working_experiment_is_named(tmp_path: Path) -> None:
    class Unreachable(CSVLogger):
        @property
        def experiment(self) -> Any:
            if self.down:
                raise ConnectionError("no route to the server")
            return super().experiment

        down = False

    logger = Unreachable(tmp_path)
    trainer, _, dataset = fitted(logger=logger)
    logger.down = True
    with pytest.warns(GIFWarning, match="Unreachable failed.*ConnectionError: no route to the server"):
        report = trainer.influence(batch_of(dataset, [0]))
    logger.down = False
    report.log([logger])  # as the warning says
    assert csv_values(logger)["gif_influence/score_max"] == float(report.scores.max())


def test_logging_can_be_left_out_and_made_up_for(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer, _, dataset = fitted(
        callback=GIFCallback(ratio=0.5, unconverged="ignore", log_reports=False), logger=logger
    )
    answer = trainer.influence(batch_of(dataset, [0]))
    assert not any(name.startswith("gif") for name in csv_values(logger))
    answer.log(prefix="mine")
    assert csv_values(logger)["mine/diagnostics/n_train"] == 48
    elsewhere = CSVLogger(tmp_path, name="elsewhere")
    answer.log([elsewhere])
    assert csv_values(elsewhere)["gif_influence/diagnostics/n_train"] == 48


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
    assert numbers == {"mine/score_max": 0.1, "mine/score_min": -0.2}
    assert step == 5
    assert list(logger.experiment.taken) == [
        f"mine/{name}" for name in ("settings", "report", "examples", "diagnostics")
    ]
    assert logger.experiment.taken["mine/report"][0].lstrip().startswith("Influence of 2 training examples")
    assert logger.experiment.flushed == 5


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
