"""Every benchmark is a command with a help text, and runs to its end on very little data."""

from __future__ import annotations

import gzip
import logging
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch

from .test_easydub import generate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# The arguments of a smallest run. DATA stands for a folder with a few images in the format of MNIST, and EASYDUB for a
# folder in the layout of EasyDUB.
SMALLEST: dict[str, str] = {
    "attribution_time": "--data DATA --examples 60 --queries 1 --peers",
    "backdoor": "--data DATA --net resnet --epochs 1 --seeds 1 --steps natural",
    "check": "--data DATA --nets digits --examples 200 --queries 2 --forget 4 --repeats 1",
    "compare": "--model tests.line.Net --data tests.line.Blobs --forget_class 1 --trainer.max_epochs 1 "
    "--baselines [ssd]",
    "defaults": "--data DATA --net resnet --classes 0 --epochs 1 --what step",
    "easydub": "--root EASYDUB --models 2",
    "faults": "--injections 4",
    "field": "lightning --only BoringModel",
    "forget_class": "--data DATA --net resnet --epochs 1 --seeds 1 --classes 1 --steps natural",
    "growth": "--widths 12 24 --counts 64 640 --queries 1 3",
    "hvp": "--data DATA --examples 32 --repeats 1 --epochs 1",
    "intervals": "--tasks cancer --fits 6",
    "lds": "--subsets 4 --queries 2 --seeds 1 --epochs 3 --draws 10 --only nothing",
    "leave_one_out": "--left_out 2 --queries 2",
    "memory": "--data DATA --counts 60 --budgets 0.25",
    "mislabeled": "--data DATA --nets mlp --examples 60 --epochs 3 --seeds 1",
    "overhead": "--steps 40 --net resnet",
    "paper": "--table 1 --data DATA --net resnet --epochs 1 --runs 1 --solve_steps 2 --rows 1",
    "preconditioned": "--data DATA --nets mlp --epochs 1 --examples 16 --queries 2 --iterations 2",
    "processes": "--widths 12 --examples 64",
    "products": "--data DATA --nets mlp --examples 16 --vectors 2 --repeats 1",
    "random_removal": "--data DATA --net resnet --epochs 1 --seeds 1 --steps natural --shares 0.1",
    "relabel_ensembles": "--tasks digits --epochs 2 --models 4 --members 2 --examples 300 --sets '10 moved' "
    "--methods nothing 'unlearn, default'",
    "scaling": "--widths 12 --ratios 0.1 --width 12 --examples 32 --repeats 1",
    "sensitivity": "--data DATA --nets mlp --goals class --examples 100 --epochs 1 --draws 1 --every 30",
    "small": "--rounds 1 --net convolutions",
    "solve": "--data DATA --examples 32 --max-iter 3 --repeats 1 --epochs 1",
    "store": "--data DATA --nets cnn --ranks 8 --train 60 --scored 20 --queries 2",
    "synthetic": "--size 30 --columns 5 --sigma 1 --condition 100 --max-iter 10 --budgets 5 --most-products 100",
    "tasks": "--tasks digits --halves 3 --seeds 1",
    "through_training": "--data DATA --only 'CNN, GELU, AdamW' --draws 3 --examples 40 --epochs 1",
    "tinynet_forget": "--data DATA --epochs 1",
    "unlearning_ensembles": "--tasks regression --epochs 2 --models 4 --members 2 --sets cluster "
    "--methods nothing oracle",
}


def commands() -> list[Path]:
    return [file for file in sorted(BENCHMARKS.glob("*.py")) if '__name__ == "__main__"' in file.read_text()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes in noise. Each class is a bright square at its own place."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 240), ("t10k", 60)):
        labels = torch.arange(count) % 10
        images = torch.randint(60, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 14 * (label // 5), 5 * (label % 5)
            image[row : row + 8, column : column + 6] += 150
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + tensor.to(torch.uint8).numpy().tobytes())
    return folder


def run(file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a benchmark as its command would, but in this process: starting another takes longer than most runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            runpy.run_path(str(file), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_each_benchmark_has_a_smallest_run() -> None:
    assert [file.stem for file in commands()] == sorted(SMALLEST)


@pytest.mark.parametrize("file", commands(), ids=lambda file: file.stem)
def test_each_benchmark_has_a_help_text(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(file, ["--help"], monkeypatch)
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("file", commands(), ids=lambda file: file.stem)
def test_a_smallest_run_prints_a_table(
    file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = SMALLEST[file.stem].replace("DATA", str(data))
    if "EASYDUB" in arguments:
        arguments = arguments.replace("EASYDUB", str(generate(tmp_path / "easydub")))
    run(file, shlex.split(arguments), monkeypatch)
    printed = capsys.readouterr().out
    assert any(character.isdigit() for character in printed), printed


@pytest.mark.slow
def test_the_callback_works_on_demos_of_lightning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are compared with exact scores, and their state with that before each call."""
    try:
        run(BENCHMARKS / "field.py", ["lightning", "--only", "BoringModel", "LightningLSTM"], monkeypatch)
    finally:
        logging.disable(logging.NOTSET)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    columns = next(line for line in lines if line[0] == "package")
    rows = [dict(zip(columns, line, strict=True)) for line in lines if line[0].startswith("lightning")]
    assert [row["module"] for row in rows] == ["BoringModel", "LightningLSTM"]
    for row in rows:
        assert row["outcome"] == "works as it is"
        assert float(row["error of the scores"]) < 1e-6
        assert (row["training unchanged"], row["state unchanged"]) == ("yes", "yes")
