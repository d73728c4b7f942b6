"""The adaptor for the precomputed models of EasyDUB, on a small folder in its layout."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import easydub

N, FORGET, MODELS = 40, [3, 11, 30], 2


def save_array(file: Path, values: torch.Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, values.numpy())


def generate(root: Path) -> Path:
    """A folder with small random models and images. The retrained models have the margins of the trained ones, plus 1
    on the forget examples.
    """
    generator = np.random.default_rng(0)
    folder = root / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, count in {**{f"data_batch_{i}": N // 5 for i in range(1, 6)}, "test_batch": 12}.items():
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {b"data": images, b"labels": generator.integers(0, 10, count).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    save_array(root / "forget_sets/cifar10/forget_set_2.npy", torch.tensor(FORGET))
    data = easydub.EasyDUB(root, 2)
    train, val = data.images()
    for model in range(MODELS):
        torch.manual_seed(model)
        net = easydub.resnet9(width=2).eval()
        file = root / f"models/cifar10/pretrain/resnet9/id_{model}_epoch_23.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"model.{key}": value for key, value in net.state_dict().items()}, file)
        module = easydub.Module(net)
        every, unseen = easydub.margins_of(module, train), easydub.margins_of(module, val)
        parts = data.split(every)
        base, end = root / "margins/cifar10", f"resnet9/id_{model}_epoch_23.npy"
        trained = {"forget_2": parts["forget"], "retain": every, "val": unseen}
        retrained = {"forget": parts["forget"] + 1, "retain": parts["retain"], "val": unseen}
        for part, values in trained.items():
            save_array(base / "pretrain" / part / end, values)
        for part, values in retrained.items():
            save_array(base / "oracle/forget_2" / part / end, values)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("easydub"))


def test_margins_are_of_the_same_examples_for_all_models(root: Path) -> None:
    data, models = easydub.EasyDUB(root, 2), range(MODELS)
    assert data.forget().tolist() == FORGET
    for part, count in (("forget", len(FORGET)), ("retain", N - len(FORGET)), ("val", 12)):
        ours, theirs = data.trained(part, models), data.retrained(part, models)
        assert ours.shape == theirs.shape == (MODELS, count)
        torch.testing.assert_close(theirs, ours + (part == "forget"))


def test_the_models_have_the_margins_that_are_stored(root: Path) -> None:
    data = easydub.EasyDUB(root, 2)
    train, val = data.images()
    assert train.tensors[0].shape == (N, 3, 32, 32)
    for model in range(MODELS):
        module = easydub.Module(data.net(model))
        found = {**data.split(easydub.margins_of(module, train)), "val": easydub.margins_of(module, val)}
        for part, values in found.items():
            torch.testing.assert_close(values.float(), data.trained(part, [model])[0])


@pytest.mark.slow
def test_the_command_compares_edited_models_with_retrained_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["easydub.py", "--root", str(root), "--models", str(MODELS)])
    easydub.main()
    printed: list[Any] = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: [float(value) for value in row[1:]] for row in printed[2:] if len(row) > 1}
    assert rows["nothing"][0] > 1  # only the forget examples have other margins
    assert rows["nothing"][1:3] == [0, 0]
    assert rows["unlearn, default"][3] > 0
    assert all(value >= 0 for value in rows["unlearn, default"])


def test_an_edit_changes_the_margins(root: Path) -> None:
    data = easydub.EasyDUB(root, 2)
    margins, _ = easydub.edited(data, [0], {"step": 50.0})
    for part in easydub.PARTS:
        assert margins[part].shape == data.trained(part, [0]).shape
        assert not torch.allclose(margins[part].float(), data.trained(part, [0]))


def test_without_models_there_is_no_edit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("margins", "forget_sets"):
        (tmp_path / part).symlink_to(root / part)
    monkeypatch.setattr(sys, "argv", ["easydub.py", "--root", str(tmp_path), "--models", str(MODELS)])
    easydub.main()
    printed = capsys.readouterr()
    assert "unlearn" not in printed.out
    assert "has no folder models, so nothing is edited" in printed.err
