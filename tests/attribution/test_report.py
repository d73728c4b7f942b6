"""The folder of an influence report: saved whole or not at all, and read without its dataset."""

from __future__ import annotations

import json
import math
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import Subset

from lightning_gif import ConfigurationError, InfluenceReport
from lightning_gif.attribution.display import rows
from lightning_gif.parameters import Targets
from lightning_gif.reporting.previews import Shown
from lightning_gif.storage.artifact import read_folder, write_folder

from ..conftest import batch_of, fitted
from ..reports import answer_on_images, csv_values, drawn, report_of


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("method", ["if", "gif"])
def test_a_loaded_report_says_and_shows_the_same_without_the_dataset(
    tmp_path: Path, per_example: bool, method: str
) -> None:
    report, dataset = answer_on_images(per_example=per_example, method=method)
    report.global_step = 6
    report.save(tmp_path / "new" / "report")
    assert sorted(os.listdir(tmp_path / "new" / "report")) == ["report.json", "scores.safetensors"]
    loaded = InfluenceReport.load(tmp_path / "new" / "report")
    assert loaded.dataset is None
    assert torch.equal(loaded.scores, report.scores)
    assert torch.equal(loaded.indices, report.indices)
    assert loaded.scores.dtype == torch.float64
    for one, other in ((report.proponents(), loaded.proponents()), (report.opponents(5), loaded.opponents(5))):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.scores, other.scores)
    assert (str(loaded), repr(loaded), loaded.summary()) == (str(report), repr(report), report.summary())
    for name in ("curvature", "settings", "k", "seconds", "global_step"):
        assert getattr(loaded, name) == getattr(report, name)
    assert [s.residuals for s in loaded.solutions] == [s.residuals for s in report.solutions]
    assert loaded.solution.status is report.solution.status
    assert dict(loaded.targets).keys() == dict(report.targets).keys()
    assert all(torch.equal(loaded.targets[name], entries) for name, entries in report.targets.items())
    assert loaded.to_dataframe().equals(report.to_dataframe())
    for query in range(len(report.scores)):
        assert drawn(loaded, query) == drawn(report, query)
    assert list(map(repr, rows(loaded))) == list(map(repr, rows(report)))
    labels = loaded.by_group(dataset.tensors[1])
    assert torch.equal(labels.totals, report.by_group().totals)
    logger = CSVLogger(tmp_path)
    loaded.log([logger])
    assert csv_values(logger)["gif_influence/score_max"] == float(report.scores.max())
    loaded.save(tmp_path / "again")  # and what was loaded can be saved
    assert drawn(InfluenceReport.load(tmp_path / "again")) == drawn(report)


def test_a_loaded_report_says_which_pictures_it_has_not_and_reads_them_from_the_dataset(tmp_path: Path) -> None:
    report, dataset = answer_on_images()
    report.save(tmp_path / "report")
    assert len(drawn(InfluenceReport.load(tmp_path / "report"))[2]) == 3 + 3 + 3
    more = InfluenceReport.load(tmp_path / "report")
    more.k = 5
    assert sum("not kept" in text.replace("\n", " ") for text in drawn(more)[1]) == 4
    more = InfluenceReport.load(str(tmp_path / "report"), dataset)
    more.k = report.k = 5
    assert drawn(more) == drawn(report)
    assert torch.equal(more.by_group().totals, report.by_group().totals)
    with pytest.raises(ConfigurationError, match="10 items, but that of the report has 24"):
        InfluenceReport.load(tmp_path / "report", Subset(dataset, range(10)))


def test_texts_and_labels_of_any_kind_come_back(tmp_path: Path) -> None:
    looks = [Shown(label, None, text) for label, text in (("a “b”", "schön\n$"), (None, ""), (2.5, "x"), (True, "y"))]
    strange = (math.nan, 1 + 2j, Decimal("1.5"), np.datetime64("2020-01-02"), np.bytes_(b"z"), torch.tensor(math.inf))
    looks += [Shown.of((torch.ones(2), label)) for label in strange]
    assert [shown.label for shown in looks[4:]] == ["nan", "(1+2j)", "1.5", "2020-01-02", "b'z'", "inf"]
    report = report_of([[0.1, -0.2, 0.3]], queries=looks, examples={100: looks[0]})
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert [(shown.label, shown.text) for shown in loaded.queries] == [(shown.label, shown.text) for shown in looks]
    assert list(loaded.examples) == [100]
    json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)  # for other readers too


def test_all_targets_of_a_large_model_take_little_room(tmp_path: Path) -> None:
    targets = Targets({"weight": torch.arange(1_000_000), "bias": torch.tensor([0, 3, 17])})
    report_of([[0.1, -0.2]], targets=targets).save(tmp_path / "report")
    assert (tmp_path / "report" / "scores.safetensors").stat().st_size < 150_000
    loaded = InfluenceReport.load(tmp_path / "report").targets
    assert torch.equal(loaded["weight"], targets["weight"])
    assert loaded["bias"].tolist() == [0, 3, 17]


def test_a_report_is_replaced_whole_and_nothing_else_ever(tmp_path: Path) -> None:
    first, second = report_of([[0.1, -0.2]]), report_of([[0.5, -0.2, 1.0]])
    empty = tmp_path / "report"
    empty.mkdir()
    first.save(empty)
    (tmp_path / "link").symlink_to(empty)
    second.save(tmp_path / "link")
    assert InfluenceReport.load(empty).scores.tolist() == [[0.5, -0.2, 1.0]]
    assert sorted(os.listdir(tmp_path)) == ["link", "report"]
    plain = tmp_path / "file"
    plain.touch()
    assert {path.stat().st_mode for path in empty.iterdir()} == {plain.stat().st_mode}  # readable as any new file
    assert (tmp_path / "link").is_symlink()

    (empty / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for other in ("work", "foreign", "broken"):
        (tmp_path / other).mkdir()
    (tmp_path / "work" / "model.py").write_text("mine")
    (tmp_path / "foreign" / "report.json").write_text('{"format": "another 1"}')
    (tmp_path / "broken" / "report.json").write_text("mine")
    for name, what in (
        ("report", "holds notes.txt"),
        ("file", "is a file"),
        ("work", "holds model.py"),
        ("foreign", "is no report"),
        ("broken", "is no report"),
    ):
        content = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(ConfigurationError, match=f"{what}.*left alone"):
            first.save(tmp_path / name)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == content
    assert InfluenceReport.load(empty).scores.shape == (1, 3)


@pytest.mark.parametrize("failing", [1, 2], ids=["taking the old away", "putting the new in its place"])
def test_scores_that_cannot_be_saved_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    report_of([[0.1, -0.2]]).save(tmp_path / "report")
    rename = Path.rename
    calls: list[Any] = []

    def fail(self: Path, target: Any) -> Any:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        report_of([[0.5, -0.2, 1.0]]).save(tmp_path / "report")
    assert os.listdir(tmp_path) == ["report"]
    assert InfluenceReport.load(tmp_path / "report").scores.tolist() == [[0.1, -0.2]]


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report"
    report, _ = answer_on_images()
    report.save(path)
    record, scores = path / "report.json", path / "scores.safetensors"
    text, content = record.read_text(), scores.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            InfluenceReport.load(path)
        record.write_text(text)
        scores.write_bytes(content)
        InfluenceReport.load(path)

    flipped = bytearray(content)
    flipped[-1] ^= 1
    for bad in (b"", b"no scores", content[:-8], content + b"more"):
        scores.write_bytes(bad)
        refused("scores.safetensors' is damaged")
    scores.write_bytes(bytes(flipped))
    refused("is damaged or has been edited, or its two files are of different reports: the SHA-256")
    for bad_text in ("", "{", "[]", "{}", text[: len(text) // 2], text.replace('"digest": "', '"digest": 3, "x": "')):
        record.write_text(bad_text)
        refused("report.json' is damaged")
    record.write_text(text.replace("lightning-gif influence 2", "lightning-gif influence 9"))
    refused("holds 'lightning-gif influence 9', but 'lightning-gif influence 2' was expected. Load it with the version")
    for old, new in (
        ('"k": 3', '"k": 2'),
        ('"text": "', '"text": "not '),
        ('"seconds": ', '"seconds": 1'),
        ("cg", "cgls"),
    ):
        assert old in text
        record.write_text(text.replace(old, new, 1))
        refused("is damaged or has been edited")
    record.write_text(json.dumps(json.loads(text)))
    assert str(InfluenceReport.load(path)) == str(report)  # how it is laid out is not what it says

    other = report_of([[0.1, -0.2]])
    other.save(tmp_path / "other")
    scores.write_bytes((tmp_path / "other" / "scores.safetensors").read_bytes())
    refused("of different reports.*Copy both files")
    scores.unlink()
    with pytest.raises(ConfigurationError, match=r"scores\.safetensors is missing"):
        InfluenceReport.load(path)
    with pytest.raises(ConfigurationError, match=r"is a file\. A report is a folder"):
        InfluenceReport.load(record)
    with pytest.raises(FileNotFoundError, match="no report"):
        InfluenceReport.load(tmp_path / "missing")


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda value: value[:-1], r"scores \[1, 24\].*indices \[23\].*1 solves. Expected"),
        ("indices", lambda value: -value, "do not fit together"),
        ("indices", lambda value: value.double(), "do not fit together"),
        ("scores", lambda value: value.float(), "do not fit together.*float32"),
        ("scores", lambda value: value[0], "do not fit together"),
        ("scores", lambda value: value.repeat(2, 1), "do not fit together"),
        ("scores", lambda value: value[:0], "do not fit together"),
        ("queries/0", lambda value: value.float(), "the picture 'queries/0' is torch.float32"),
        ("queries/0", lambda value: value[None, None], "expected uint8 .H, W. or .H, W, 3."),
        ("targets/net.1.weight", lambda value: value[:0], "damaged"),
    ],
)
def test_parts_that_disagree_are_refused_although_their_sum_is_right(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    report, _ = answer_on_images(method="fif", selector=["net.1.weight"])
    report.save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", "lightning-gif influence 2")
    write_folder(tmp_path / "report", "lightning-gif influence 2", record, {**tensors, name: change(tensors[name])})
    with pytest.raises(ConfigurationError, match=message):
        InfluenceReport.load(tmp_path / "report")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda record, key=key: record.pop(key), "damaged: KeyError") for key in ("solutions", "looks", "settings")),
        (lambda record: record["solutions"][0].update(status="lost"), "damaged: ValueError"),
        (lambda record: record["solutions"][0].update(more=1), "damaged: TypeError"),
        (
            lambda record: record["looks"].update({"queries/../../secret": record["looks"].pop("queries/0")}),
            "ValueError",
        ),
        (lambda record: record["looks"].pop("queries/0"), "damaged: KeyError"),
    ],
)
def test_a_record_of_another_make_is_refused_although_its_sum_is_right(
    tmp_path: Path, change: Any, message: str
) -> None:
    report, _ = answer_on_images()
    report.save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", "lightning-gif influence 2")
    change(record)
    write_folder(tmp_path / "report", "lightning-gif influence 2", record, tensors)
    with pytest.raises(ConfigurationError, match=message):
        InfluenceReport.load(tmp_path / "report")


def test_all_of_a_report_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def note(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def check(self: Path, target: Any) -> Any:
        assert {path.stat().st_ino for path in (self, *self.iterdir())} <= set(synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    report_of([[0.1, -0.2]]).save(tmp_path / "report")
    assert synced[-1] == tmp_path.stat().st_ino  # and so is its name


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    report, _ = answer_on_images()
    report.save(tmp_path / "report")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, pytest.fail)
    InfluenceReport.load(tmp_path / "report").plot()


@pytest.mark.parametrize("more", [{}, {"among": [30, 4, 17, 9]}, {"among": [30, 4, 17, 9, 11], "keep": 2, "k": 2}])
def test_losses_are_those_of_the_training_examples(more: dict[str, Any], tmp_path: Path) -> None:
    trainer, module, data = fitted()
    report = trainer.influence(batch_of(data, [1, 2]), per_example=True, losses=True, **more)
    assert trainer.influence(batch_of(data, [1]), **more).losses is None
    x, y = data.tensors
    with torch.no_grad():
        expected = F.cross_entropy(module.eval()(x), y, reduction="none").double()
    assert report.losses is not None
    assert report.losses.shape == report.indices.shape
    torch.testing.assert_close(report.losses, expected[report.indices], rtol=1e-5, atol=1e-6)
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert loaded.losses is not None
    assert loaded.losses.equal(report.losses)
    table = loaded.to_dataframe(labels=False)
    found = torch.as_tensor(table["loss"].to_numpy())
    torch.testing.assert_close(found, expected[table["index"].to_numpy()], rtol=1e-5, atol=1e-6)
    itself = trainer.self_influence(losses=True)
    assert itself.losses is not None
    torch.testing.assert_close(itself.losses, expected[itself.indices], rtol=1e-5, atol=1e-6)
