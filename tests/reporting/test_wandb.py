"""What W&B gets, read back from the folder of an offline run."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning, UnlearnReport
from lightning_gif.parameters import weights_digest
from lightning_gif.reporting import to_wandb
from lightning_gif.reporting.contents import Table
from lightning_gif.reporting.page import Page
from lightning_gif.reporting.pictures import markdown, png
from lightning_gif.reporting.previews import image_of, text_of
from lightning_gif.unlearning import ExampleRemoval, Tuning

from ..conftest import batch_of, fitted, same_weights, weights
from ..reports import csv_values, image_net, images
from .wandb_runs import OfflineRun

PAGE = Path(__file__).parents[2] / "docs" / "wandb.md"


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    """A logger of an offline run. It sets WANDB_MODE for the whole process; this is put back."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "elsewhere"))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    yield logger
    logger.experiment.finish()


def read(logger: WandbLogger) -> OfflineRun:
    """Finishes the run and reads it."""
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    return OfflineRun.read(folder)


def quick(**options: Any) -> GIFCallback:
    return GIFCallback(ratio=0.5, unconverged="ignore", **options)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A query in training, another one after it, a dry run, an edit, and its undo: all in one run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder / "elsewhere"))
        logger, dataset = WandbLogger(save_dir=folder, offline=True), images()
        options = {"k": 2, "name": "three images"}
        query = batch_of(dataset, [0, 1, 2])
        callback = quick(report_every_n_epochs=1, query=query, report_options=options)
        trainer, module, _ = fitted(image_net(), dataset, callback=callback, logger=logger, max_epochs=2)
        found: dict[str, Any] = {"trainer": trainer, "dataset": dataset, "folder": folder}
        found["influence"] = trainer.influence(batch_of(dataset, [4]), k=3, name="one image", eigenvalues=2)
        trainer.self_influence(k=2)
        found["before"] = weights_digest(module)
        trainer.unlearn([4, 7], step="natural", name="two", dry_run=True)
        found["edit"] = edit = trainer.unlearn([4, 7], step="natural", name="two")
        found["after"] = weights_digest(module)
        found["live"] = dict(logger.experiment.summary)
        edit.undo()
        found["run"] = read(logger)
    return found


@pytest.mark.slow
def test_sections_have_few_keys_and_a_step_axis_of_their_own(story: dict[str, Any]) -> None:
    run = story["run"]
    charts = {key for key in run.keys for value in run.values(key)[:1] if isinstance(value, (int, float))}
    sections = {key.rpartition("/")[0] for key in run.keys}
    assert sections == {
        "gif_targets",
        "gif_influence/three images",
        "gif_influence/one image",
        "gif_self_influence",
        "gif_dry_run/two",
        "gif_unlearn/two",
    }
    for section in sections - {"gif_targets"}:
        axis = f"{section}/{'event' if 'run' in section or 'unlearn' in section else 'step'}"
        keys = {key for key in run.keys if key.rpartition("/")[0] == section} - {axis}
        assert len(keys & charts) <= 4
        assert len(keys) <= 10
        assert {run.axes[key.removesuffix("_table")] for key in keys} == {axis}
        assert run.values(axis) == sorted(run.values(axis))


def test_each_query_and_edit_is_a_series_of_its_own(story: dict[str, Any]) -> None:
    run, report = story["run"], story["influence"]
    assert len(run.values("gif_influence/three images/score_max")) == 2
    assert run.values("gif_influence/one image/score_max") == [float(report.scores.max())]
    assert run.values("gif_influence/one image/step") == [story["trainer"].global_step]


def test_the_table_has_epoch_name_and_predicted_label_and_the_page_its_pictures(story: dict[str, Any]) -> None:
    run, report, dataset = story["run"], story["influence"], story["dataset"]
    rows = run.table("gif_influence/one image/examples")
    assert [row["kind"] for row in rows] == ["query"] + ["proponent"] * 3 + ["opponent"] * 3
    assert {row["name"] for row in rows} == {"one image"}
    assert {row["epoch"] for row in rows} == {2}
    assert [row["index"] for row in rows[1:4]] == report.proponents().indices[0].tolist()
    assert [row["score"] for row in rows[4:]] == report.opponents().scores[0].tolist()
    module = story["trainer"].lightning_module
    predicted = module(dataset.tensors[0]).argmax(1).tolist()  # undone, so these are the weights of the report
    indices = [4, *(row["index"] for row in rows[1:])]
    assert [row["predicted"] for row in rows] == [predicted[index] for index in indices]
    assert [row["target"] for row in rows] == [index % 3 for index in indices]
    shown = run.file("gif_influence/one image/examples_pictures").read_text()
    assert shown.count("data:image/png;base64,") == len(rows)


def test_the_report_its_figure_the_scores_and_the_diagnostics_are_there(story: dict[str, Any]) -> None:
    run, report = story["run"], story["influence"]
    printed = re.sub(r"<[^>]*>", "", run.file("gif_influence/one image/report").read_text())
    assert printed.strip() == str(report)
    assert run.file("gif_influence/one image/plot").stat().st_size > 1000
    histogram = run.values("gif_influence/one image/scores")[-1]
    assert sum(histogram["values"]) == report.n_train
    diagnostics = {row["name"]: row["value"] for row in run.table("gif_influence/one image/diagnostics")}
    assert diagnostics["n_train"] == 24
    assert diagnostics["largest_eigenvalue_1"] == report.curvature["largest"][0]
    residuals = [value for name, value in diagnostics.items() if name.startswith("residual_after_")]
    assert residuals == report.solution.residuals


def test_the_sums_by_class_are_a_bar_chart(story: dict[str, Any]) -> None:
    run, report = story["run"], story["influence"]
    assert run.charts["gif_influence/one image/by_class"] == "wandb/bar/v0"
    rows = run.table("gif_influence/one image/by_class_table")
    sums = report.by_group()
    assert {row["class"]: row["total"] for row in rows} == pytest.approx(
        {str(name): total for name, total in zip(sums.names, sums.totals.tolist(), strict=True)}
    )
    assert [row["examples"] for row in rows] == [8, 8, 8]


def test_the_settings_are_in_the_config(story: dict[str, Any]) -> None:
    run = story["run"]
    assert run.config["gif_influence/one image"]["method"] == story["influence"].settings["method"]
    assert run.config["gif_unlearn/two"]["tuning"] == story["edit"].settings["tuning"]


def test_dry_run_edit_and_undo_are_different_events(story: dict[str, Any]) -> None:
    run, edit = story["run"], story["edit"]
    before, after = edit.retain.before, edit.retain.after
    assert run.values("gif_dry_run/two/retain_loss") == [before, after]
    assert run.values("gif_dry_run/two/edits_in_weights") == [0, 0]
    assert run.values("gif_unlearn/two/retain_loss") == [before, after, before]
    assert run.values("gif_unlearn/two/edits_in_weights") == [0, 1, 0]
    assert run.values("gif_unlearn/two/event") == [1, 2, 3]
    rows = run.table("gif_unlearn/two/events")
    assert [row["kind"] for row in rows] == ["dry_run", "unlearn", "undo"]
    assert [row["goal"] for row in rows] == ["examples"] * 3
    assert [row["retain_loss_after"] for row in rows] == [after, after, before]


def test_the_summary_describes_the_weights_as_they_are(story: dict[str, Any]) -> None:
    run, edit = story["run"], story["edit"]
    assert story["live"]["gif_unlearn/two/forget_loss"] == edit.forget.after
    assert story["live"]["gif_unlearn/two/state"].endswith("1 edit in the weights")
    assert run.summary["gif_unlearn/two/forget_loss"] == edit.forget.before
    state = "after undoing the edit 'two' for 2 examples (goal: examples): 0 edits in the weights"
    assert run.summary["gif_unlearn/two/state"] == state
    assert "The edit is not in the weights" in run.file("gif_unlearn/two/report").read_text()


def test_forgotten_examples_are_listed_without_their_contents(story: dict[str, Any]) -> None:
    run, dataset = story["run"], story["dataset"]
    rows = run.table("gif_unlearn/two/forgotten")
    assert [row["index"] for row in rows] == [4, 7]
    assert [row["target"] for row in rows] == [1, 1]
    module = story["trainer"].lightning_module
    with torch.no_grad():
        assert [row["predicted_before"] for row in rows] == module(dataset.tensors[0][[4, 7]]).argmax(1).tolist()
        story["edit"].apply(state := {name: value.clone() for name, value in module.state_dict().items()})
        logits = torch.func.functional_call(module, state, dataset.tensors[0][[4, 7]])
    assert [row["predicted_after"] for row in rows] == logits.argmax(1).tolist()
    assert "example" not in rows[0]


def test_edit_and_report_are_artifacts_and_the_edit_leads_from_weights_to_weights(story: dict[str, Any]) -> None:
    made = story["run"].artifacts
    assert [one.type for one in made] == [
        *["influence-report"] * 4,
        "edit",
        "weights-digest",
        "edit",
        "weights-digest",
    ]
    used, edit, left = made[-3:]
    assert [one.use_after_commit for one in made[-3:]] == [True, False, False]
    for artifact, expected in ((used, story["before"]), (left, story["after"])):
        assert json.loads(artifact.metadata)["sha256"] == expected
    metadata = json.loads(edit.metadata)
    assert (metadata["before"], metadata["after"]) == (story["before"], story["after"])
    assert (metadata["name"], metadata["goal"], metadata["event"]) == ("two", "examples", "unlearn")
    (content,) = edit.manifest.contents
    loaded = UnlearnReport.load(content.local_path)
    assert loaded.digests() == story["edit"].digests()


def test_all_of_the_run_is_in_its_folder(story: dict[str, Any]) -> None:
    run = story["run"]
    folder = run.folder.resolve()
    for artifact in run.artifacts:
        assert artifact.type != "run_table"
        assert all(folder in Path(content.local_path).parents for content in artifact.manifest.contents)
    assert not [file for file in (story["folder"] / "elsewhere").rglob("*") if file.is_file()]
    moved = story["folder"] / "moved"
    shutil.copytree(run.folder, moved)
    assert OfflineRun.read(moved).table("gif_unlearn/two/events") == run.table("gif_unlearn/two/events")
    for row in run.rows:
        for value in row.values():
            if isinstance(value, dict) and "path" in value:
                assert (moved / "files" / value["path"]).is_file()


def keys_of(run: OfflineRun) -> set[str]:
    """The keys without names of calls. A dry run has the keys of an edit, and self-influence those of influence."""
    state = {key for key in run.summary if key.endswith("/state")}
    found = {key for key in run.keys | run.charts.keys() | state if not key.endswith("_table")}
    plain = {re.sub(r"/.*/", "/", key) for key in found}
    return {key.replace("dry_run", "unlearn").replace("self_influence", "influence") for key in plain}


def test_the_page_documents_each_key_and_no_other(logger: WandbLogger) -> None:
    dataset, unseen = images(60), images(60)
    query = batch_of(dataset, [0, 1])
    callback = quick(snapshots=2, report_every_n_epochs=4, query=query, report_options={"k": 2})
    trainer, module, _ = fitted(image_net(), dataset, callback=callback, logger=logger, max_epochs=4)
    held_out = DataLoader(unseen, 20)
    trainer.unlearn(list(range(30)), step="natural", unseen=held_out, dry_run=True)
    trainer.unlearn(lambda batch: batch[1] == 1, step="natural", name="a class")
    trainer.unlearn([0, 1], relabel=2, step="natural")
    trainer.validate_influence(query, lambda indices, seed: copy.deepcopy(module), n_subsets=3, n_seeds=2)
    documented = set(re.findall(r"^\| `(gif_\w+/\w+)`", PAGE.read_text(), flags=re.MULTILINE))
    assert keys_of(read(logger)) == documented


def test_an_alert_is_sent_if_the_retained_loss_rises(logger: WandbLogger) -> None:
    trainer, _, _ = fitted(logger=logger)
    for step, dry_run in ((0.0, False), (30.0, True)):
        trainer.unlearn([0, 1, 2], step=step, dry_run=dry_run)
    edit = trainer.unlearn([0, 1, 2], step=30.0)
    assert edit.retain.after > 1.1 * edit.retain.before
    edit.undo()
    assert read(logger).alerts == ["The retained loss rose"]


def test_a_tuned_number_decides_when_an_alert_is_sent(logger: WandbLogger) -> None:
    trainer, _, _ = fitted(logger=logger)
    for share in (1e6, 0.1):
        tuning = Tuning(goals=(ExampleRemoval(notable_increase=share),))
        edit = trainer.unlearn([0, 1, 2], step=30.0, tuning=tuning)
        assert 1.1 < edit.retain.after / edit.retain.before < 1e6
        edit.undo()
    assert read(logger).alerts == ["The retained loss rose"]


def test_tables_of_other_data_hold_their_values_for_each_query(logger: WandbLogger) -> None:
    trainer, _, dataset = fitted(logger=logger)
    trainer.influence(batch_of(dataset, list(range(10))), per_example=True, k=2)
    run = read(logger)
    rows = run.table("gif_influence/examples")
    queries = [row for row in rows if row["kind"] == "query"]
    assert [row["example"] for row in queries] == [text_of(dataset[index]) for index in range(8)]
    assert [row["query"] for row in queries] == list(range(8))
    assert len(rows) == 8 + 8 * 4
    assert all(row["example"] == text_of(dataset[row["index"]]) for row in rows if row["kind"] != "query")
    assert sum(run.values("gif_influence/scores")[-1]["values"]) == 10 * len(dataset)
    assert "gif_influence/examples_pictures" not in run.keys


def test_other_loggers_and_the_run_itself_go_on(tmp_path: Path, logger: WandbLogger) -> None:
    others = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer, _, dataset = fitted(image_net(), images(), logger=[logger, *others])
    report = trainer.influence(batch_of(dataset, [4]), k=3)
    assert csv_values(others[0])["gif_influence/score_max"] == float(report.scores.max())
    logger.experiment.log({"mine": 1})
    assert logger.experiment.summary["mine"] == 1


def test_a_logger_with_a_prefix_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, prefix="mine")
    trainer, _, dataset = fitted(logger=logger)
    trainer.influence(batch_of(dataset, [4]))
    run = read(logger)
    assert run.axes["mine-gif_influence/score_max"] == "mine-gif_influence/step"
    assert len(run.values("mine-gif_influence/score_max")) == 1


def test_files_that_are_too_large_are_named_and_not_logged(
    logger: WandbLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_wandb, "LARGEST_FILES", 100)
    trainer, _, dataset = fitted(logger=logger)
    with pytest.warns(GIFWarning, match=r"The files of the report take 0 MiB.*report.save\(path\)"):
        report = trainer.influence(batch_of(dataset, [0]))
    report.save(Path(logger.experiment.dir).parent / "kept")  # as the warning says
    assert not read(logger).artifacts


@pytest.mark.parametrize("name", ["", " ", "a/b", "a*b", 3])
def test_a_name_that_cannot_be_a_part_of_a_key_is_refused(name: Any) -> None:
    trainer, _, dataset = fitted()
    calls = (
        lambda: trainer.influence(batch_of(dataset, [0]), name=name),
        lambda: trainer.self_influence(name=name),
        lambda: trainer.unlearn([0], name=name),
        lambda: trainer.validate_influence(batch_of(dataset, [0]), lambda indices, seed: None, name=name),
    )
    for call in calls:
        with pytest.raises(ConfigurationError, match=r"`name` must be a text of letters.*'held-out eights'"):
            call()
    assert trainer.influence(batch_of(dataset, [0]), name="held-out eights").name == "held-out eights"


def test_a_finished_run_costs_neither_report_nor_edit(logger: WandbLogger, tmp_path: Path) -> None:
    after = CSVLogger(tmp_path)
    trainer, module, dataset = fitted(logger=[logger, after])
    before = weights(module)
    wandb.finish()
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*is finished, and no new one is started"):
        answer = trainer.influence(batch_of(dataset, [0]))
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        answer.log()
    assert csv_values(after)["gif_influence/score_max"] == float(answer.scores.max())
    assert wandb.run is None
    assert len(list(tmp_path.rglob("*.wandb"))) == 1
    with pytest.warns(GIFWarning, match="WandbLogger did not log the report.*finished") as caught:
        report = trainer.unlearn(batch_of(dataset, [0]), step="natural")
    assert len([one for one in caught if "did not log" in str(one.message)]) == 1
    assert csv_values(after)["gif_unlearn/edits_in_weights"] == 1.0
    assert not same_weights(weights(module), before)
    with pytest.warns(GIFWarning, match="is finished, and no new one is started"):
        report.undo()
    assert same_weights(weights(module), before)


def test_a_disabled_run_takes_the_numbers_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    trainer, _, dataset = fitted(image_net(), images(), logger=logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        answer = trainer.influence(batch_of(dataset, [4]), k=3)
        assert dict(logger.experiment.summary)["gif_influence/score_max"] == float(answer.scores.max())
        trainer.unlearn([4], step="natural").undo()
        wandb.finish()
        answer.log()  # a run that was never one takes no harm from its end
    assert not list(tmp_path.rglob("*.wandb"))


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (6, 4, 3)])
def test_a_picture_is_the_same_in_its_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(picture))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_tables_as_pages_and_as_text_hold_any_words() -> None:
    table = Table(["a", "b"], [["<b>|x", image_of(images()[0])], [None, 0.12]])
    page = Page("t", tables={"": table}).document()
    assert "&lt;b&gt;|x" in page
    assert page.count("<img ") == 1
    assert markdown(table).splitlines() == ["| a | b |", "| --- | --- |", "| <b>\\|x | picture |", "|  | 0.12 |"]


def test_each_allowed_name_of_a_call_names_an_artifact(logger: WandbLogger) -> None:
    trainer, _, dataset = fitted(image_net(), images(), callback=quick(), logger=logger)
    batch, names = batch_of(dataset, [4]), ["größe", "grässe", "x" * 150]
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)  # a logger that fails is a warning
        for name in names:
            trainer.influence(batch, k=2, name=name)
    made = [artifact.name for artifact in read(logger).artifacts]
    assert len(set(made)) == len(names)
    assert [name[:20] for name in made] == ["gif_influence-gr__e-", "gif_influence-gr_sse", "gif_influence-xxxxxx"]
