"""The examples run as commands, and print and write what their docstrings promise."""

from __future__ import annotations

import csv
import importlib
import json
import logging
import math
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from digits import CLASSES, digits

from lightning_gif import UnlearnReport

EXAMPLES = Path(__file__).parent.parent / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as its command would, and returns its output without colours.

    It runs in this process, because starting another takes seconds. Afterwards its settings of the process are undone.
    """

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
        threads = torch.get_num_threads()
        environment = {"COLUMNS": "120", "WANDB_SILENT": "true", "NO_COLOR": "1"}
        try:
            with warnings.catch_warnings(), mock.patch.dict(os.environ, environment):
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            for logger, level in levels.items():
                logging.getLogger(logger).setLevel(level)
        return capsys.readouterr().out

    return run


def row(printed: str, start: str) -> list[str]:
    """The cells of the first table row that starts with a text."""
    line = next(line for line in printed.splitlines() if line.startswith(f"│ {start}"))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def percent(cell: str) -> float:
    assert cell.endswith("%")
    return float(cell[:-1])


def assert_pictures(folder: Path, *names: str) -> None:
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


@pytest.mark.slow
def test_forget_a_digit(run: Run, tmp_path: Path) -> None:
    printed = run("forget_a_digit.py", "--output", tmp_path, "--epochs", 4, "--digit", 3, "--logger", "csv")
    before, after, retrained = map(percent, row(printed, "digit 3"))
    assert before > 50 > 20 > after >= retrained == 0
    before, after, _ = map(percent, row(printed, "the other digits"))
    assert before > 80
    assert after > before - 20
    assert "Undone: the weights are bit-identical" in printed
    assert "from the file gives the same predictions" in printed
    assert "proponents: " in printed
    names = ("accuracy", "unlearning", "predictions", "attention", "influence")
    assert_pictures(tmp_path, *(f"{name}.png" for name in names))
    assert "<html" in (tmp_path / "edit.html").read_text()
    report = UnlearnReport.load(tmp_path / "edit.safetensors")
    assert report.n_forget == report.n_found == 137
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        columns = next(csv.reader(file))
    assert {"train/loss", "gif_unlearn/retain_loss", "gif_influence/score_max"} <= set(columns)


@pytest.mark.slow
def test_find_mislabeled(run: Run, tmp_path: Path) -> None:
    printed = run("find_mislabeled.py", "--output", tmp_path)
    assert "135 of 1347 training examples have a wrong label." in printed
    found, accuracies = printed.split("Test accuracy")
    for ranking in ("self-influence", "training loss"):
        auc, tenth, fifth, _ = row(found, ranking)
        assert float(auc) > 0.95
        assert percent(fifth) > percent(tenth) > 80
        before, cleaned, ideal = map(percent, row(accuracies, ranking))
        assert cleaned > before + 1
        assert ideal > before + 1
    assert_pictures(tmp_path, "suspects.png", "self_influence.png")


@pytest.mark.slow
def test_find_poisoned(run: Run, tmp_path: Path) -> None:
    printed = run("find_poisoned.py", "--output", tmp_path)
    assert "67 of 1347 training examples are poisoned." in printed
    found, repaired = printed.split("First 20% inspected")
    auc, tenth, fifth = row(found, "opponents")
    assert float(auc) > 0.9
    assert percent(fifth) > percent(tenth) > 50
    for ranking in ("training loss", "self-influence"):
        auc, tenth, _ = row(found, ranking)
        assert float(auc) < 0.6
        assert percent(tenth) < 15
    before, edited, retrained = map(percent, row(repaired, "images with the patch"))
    assert before > 90
    assert max(edited, retrained) < 20
    before, edited, _ = map(percent, row(repaired, "test accuracy"))
    assert edited > before - 2
    assert_pictures(tmp_path, "suspects.png")


@pytest.mark.slow
def test_why_misread(run: Run, tmp_path: Path) -> None:
    printed = run("why_misread.py", "--output", tmp_path)
    asked, label, read_as = map(int, re.findall(r"#(\d+): label (\d), prediction (\d)", printed)[0])
    assert int(digits()[1].tensors[1][asked]) == label != read_as
    by_class = next(line for line in printed.splitlines() if line.startswith("  by class: "))
    totals = {int(name): float(total) for name, total in re.findall(r"(\d) \((\S+)\)", by_class)}
    assert len(totals) == CLASSES
    assert totals[label] > 0 > totals[read_as]
    assert f"Strongest opponents: the {min(totals, key=totals.__getitem__)}s." in printed
    assert_pictures(tmp_path, "influence.png")
    page = (tmp_path / "influence.html").read_text()
    assert f"read as {read_as} (" in page


@pytest.mark.slow
def test_wandb_report(run: Run, tmp_path: Path) -> None:
    printed = run("wandb_report.py", "--output", tmp_path, "--epochs", 4)
    where, how, which = printed.splitlines()
    folder = Path(where.removeprefix("The offline run is in "))
    assert folder.parent.parent == tmp_path
    assert how == f"Sync it to your account: wandb sync {folder}"
    assert list(folder.glob("run-*.wandb"))
    for key in ("gif_influence", "history", "by_class", "gif_unlearn", "gif_dry_run"):
        assert key in which
    tables = (folder / "files/media/table/gif_influence/test images of 8").glob("history_*.table.json")
    longest = max((json.loads(table.read_text()) for table in tables), key=lambda table: len(table["data"]))
    epochs = {row[longest["columns"].index("epoch")] for row in longest["data"]}
    assert epochs == {1, 3}
    examples = list((folder / "files/media/table/gif_influence").glob("*/examples_*.table.json"))
    assert len(examples) == 3  # two in training, one after it
    (page,) = (folder / "files/media/html/gif_influence/worst image").glob("examples_pictures_*.html")
    assert page.read_text().count("<img ") == 1 + 2 * 10


@pytest.mark.slow
def test_toxic_samples(run: Run, tmp_path: Path) -> None:
    printed = run("toxic_samples.py", "--output", tmp_path, "--per-step", 50)
    assert "after 10 steps" in printed
    names = ("trained", "gif", "fif", "pif", "least gradient", "least loss", "retrained")
    values = {name: [float(cell) for cell in row(printed, name)] for name in names}
    moved = {name: cells[:2] for name, cells in values.items()}
    loss, norm = ({name: cells[i] for name, cells in values.items()} for i in (2, 3))

    assert moved["retrained"] == pytest.approx([-12, 9], abs=1e-3)  # the inverse of the mixing matrix, times ones
    assert loss["retrained"] == norm["retrained"] == 0
    assert values["fif"] == pytest.approx(values["least loss"], abs=2e-4)
    assert values["gif"] == pytest.approx(values["least gradient"], abs=2e-3)
    assert math.dist(moved["least gradient"], moved["least loss"]) > 0.1  # otherwise the two checks above are trivial
    assert 0 < loss["fif"] < loss["gif"] < loss["trained"] / 5
    assert 0 < norm["gif"] < norm["fif"] / 2
    assert math.dist(moved["pif"], moved["retrained"]) < 0.3
    assert loss["pif"] > loss["trained"]
    assert "the weights are bit-identical to the trained ones" in printed
    assert_pictures(tmp_path, "trajectories.png")


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        *(("forget_a_digit.py", 15), ("find_mislabeled.py", 30), ("find_poisoned.py", 30)),
        *(("why_misread.py", 15), ("wandb_report.py", 10)),
    ],
)
def test_help_describes_the_example_and_has_the_defaults(
    name: str, epochs: int, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "handwritten digit" in printed
    assert "--epochs EPOCHS" in printed
    assert f"(default: {epochs})" in printed


def benchmarks() -> list[Path]:
    """The benchmarks that are commands."""
    found = sorted((EXAMPLES.parent / "benchmarks").glob("*.py"))
    return [file for file in found if '__name__ == "__main__"' in file.read_text()]


def test_each_benchmark_is_published() -> None:
    published = (EXAMPLES.parent / "benchmarks" / "README.md").read_text()
    assert len(benchmarks()) > 10
    assert not [file.name for file in benchmarks() if f"python benchmarks/{file.name} " not in published]


@pytest.mark.parametrize("file", benchmarks(), ids=lambda file: file.stem)
def test_each_benchmark_can_be_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    assert callable(importlib.import_module(file.stem).main)
