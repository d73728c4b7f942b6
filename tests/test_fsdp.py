"""Several processes that hold parts of the parameters (FSDP2) give the results of one device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities import consolidate_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gif import CheckpointError, GIFCallback, attach, verify
from lightning_gif.cli import main
from lightning_gif.parameters import tensors_of
from lightning_gif.storage.checkpoints import read_checkpoint

from .conftest import FSDP2, make_trainer
from .ddp_worker import (
    QUERY,
    Adapted,
    N,
    Sharded,
    answers,
    learned,
    of_texts,
    points,
    results,
    seen,
    trained,
    with_adapters,
)
from .test_ddp import AMPLIFIED, LOOSE, Launched, launch

# These tests share the results of a launch.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fsdp"), FSDP2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """What two processes left, whose checkpoints are consolidated."""
    return launch(2, tmp_path_factory.mktemp("fsdp"), "sharded", "adapted", strategy="fsdp2")


def consolidated(folder: Path) -> Path:
    """A single file of a sharded checkpoint, by the command that messages name."""
    file = folder.with_suffix(".ckpt")
    if not file.exists():
        command = [sys.executable, "-m", consolidate_checkpoint.__name__, str(folder), "--output_file", str(file)]
        subprocess.run(command, check=True, capture_output=True)
    return file


def close(found: Tensor, expected: Tensor, what: str) -> None:
    tolerance = 1e-5 * float(expected.double().norm()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance, msg=f"not that of one device: {what}")


def test_a_fit_with_sharded_parameters_is_unchanged_and_gathers_what_one_device_gathers(two: Launched) -> None:
    trainer, _ = learned(1)
    expected = seen(trainer)
    for found in two.answers("sharded"):
        assert found["sharded"]
        assert found["same training"]
        assert found["reports"] == 3
        assert found["replica undone"]
        for kind in ("seen", "seen, replicated"):
            assert found[kind].keys() == expected.keys()
            for name, value in expected.items():
                close(found[kind][name], value, name)


def test_scores_with_sharded_parameters_are_those_of_one_device_with_a_consolidated_checkpoint(
    two: Launched, tmp_path: Path
) -> None:
    file = consolidated(two.folder / "trained")
    module = Sharded.load_from_checkpoint(file, net=trained().net, lr=0.01)
    trainer = make_trainer(GIFCallback(ratio=0.4, double=True, batch_size=8, snapshots=2), devices=1)
    trainer.validate(module, DataLoader(points(40), 16), ckpt_path=file, verbose=False)  # for the cached targets
    attach(trainer, module, train_dataloaders=DataLoader(points(N), 12))
    for name, expected in answers(trainer, tmp_path).items():
        for found in two.answers("sharded"):
            close(found["answers"][name], expected, name)


def test_a_check_names_the_layers_as_the_user_wrote_them(two: Launched) -> None:
    for found in two.answers("sharded"):
        assert "net.0  Linear: " in found["check"]
        assert found["same classes"]


def test_an_edit_of_sharded_parameters_is_that_of_one_device_and_is_undone_bit_for_bit(two: Launched) -> None:
    trainer, module = learned(1)
    edit = trainer.unlearn([3, 17, 30])
    for found in two.answers("sharded"):
        for name, value in module.state_dict().items():
            close(found["edited"][name], value, name)
        close(found["logits"], module(QUERY[0]).detach(), "logits")
        assert found["whole after validation"]  # otherwise this would not test what FSDP2 keeps after a forward pass
        assert found["in the weights"]
        assert found["undone"]
        assert found["applied"]
        assert found["verified"]
        assert found["restored"]
        assert "have changed since" in found["no undo"]
    edit.undo()


def test_the_record_of_sharded_weights_verifies_their_consolidated_checkpoint(
    two: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    two.answers("sharded")
    record, edit = two.folder / "record", two.folder / "edit.safetensors"
    edited, before = (consolidated(two.folder / name) for name in ("edited", "trained"))
    assert verify(record, edits=edit, checkpoint=edited).ok
    assert not verify(record, edits=edit, checkpoint=before).ok
    command = ["verify", "--record", str(record), "--edit", str(edit), "--ckpt_path"]
    assert main([*command, str(edited)]) == 0
    assert main([*command, str(two.folder / "edited")]) != 0
    assert "consolidate_checkpoint" in capsys.readouterr().out


def test_adapters_and_tied_layers_in_mixed_precision_give_the_results_of_one_device(two: Launched) -> None:
    first, second = two.answers("adapted")
    torch.manual_seed(3)
    tied = nn.Linear(12, 12)
    net = nn.Sequential(Adapted(), nn.Tanh(), tied, nn.Tanh(), tied, nn.Linear(12, 3))
    module = Sharded(net).double()
    module.load_state_dict(first["before"], strict=False)
    trainer = make_trainer(GIFCallback(ratio=0.4, double=True, batch_size=8), devices=1)
    attach(trainer, module, train_dataloaders=DataLoader(points(N), 12))
    scores = trainer.influence(QUERY, per_example=True, max_iter=8, damping=0.05).scores
    trainer.unlearn([3, 17], step="natural", max_iter=8, damping=0.05, unseen=DataLoader(points(40, seed=5), 16))
    for found in (first, second):
        assert found["undone"]
        assert found["frozen"]
        close(found["scores"], scores, "scores")
        for name, value in tensors_of(module).items():
            close(found["after"][name], value.detach(), name)


def test_parameters_that_do_not_fit_in_memory_are_not_gathered(two: Launched) -> None:
    for found in two.answers("sharded"):
        assert found["no memory"].startswith("ConfigurationError (GIFError)"), found["no memory"]
        for part in ("Sharded are sharded", "GiB", "consolidate_checkpoint", "attach()"):
            assert part in found["no memory"]


def test_a_checkpoint_of_the_first_fsdp_is_consolidated_and_attached_as_its_refusal_says(tmp_path: Path) -> None:
    whole = sum(parameter.numel() for parameter in trained().parameters())
    for found in launch(2, tmp_path, "first fsdp").answers("first fsdp"):
        assert found["parts"] < whole
    folder = tmp_path / "of the first FSDP"
    with pytest.raises(CheckpointError, match=r"lightning\.pytorch\.utilities\.consolidate"):
        read_checkpoint(folder)
    file = tmp_path / "whole.ckpt"
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", str(folder)]
    subprocess.run([*command, "--output_file", str(file)], check=True, capture_output=True)
    scores = []
    for module in (trained(), Sharded.load_from_checkpoint(file, net=trained().net)):
        trainer = make_trainer(GIFCallback(double=True), devices=1)
        attach(trainer, module, train_dataloaders=DataLoader(points(N), 12))
        scores.append(trainer.influence(QUERY).scores)
    assert scores[0].equal(scores[1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("story", ["texts", "with adapters"])
def test_scores_of_tokens_and_edits_of_language_models_are_those_of_one_process(
    story: str, strategy: str, tmp_path: Path
) -> None:
    if story == "with adapters":
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    expected = {"texts": of_texts, "with adapters": with_adapters}[story](1, tmp_path)
    assert sum("tokens of" in name and len(value) > 0 for name, value in expected.items()) >= 6
    for found in launch(2, tmp_path, story, strategy=strategy).answers(story):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value is not False, name
            close(torch.as_tensor(found[name]), torch.as_tensor(value), name)


@pytest.mark.parametrize("world", [2, 4])
def test_all_results_with_sharded_parameters_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    expected = results(1, tmp_path)
    launched = launch(world, tmp_path, "results", strategy="fsdp2")
    for found in launched.answers("results"):
        for name, value in expected.items():
            share = LOOSE if any(part in name for part in AMPLIFIED) else 1e-5
            tolerance = share * float(value.double().nan_to_num().norm()) + 1e-12
            torch.testing.assert_close(
                found[name], value, rtol=share, atol=tolerance, equal_nan=True, msg=f"not that of one process: {name}"
            )


def test_a_process_that_fails_or_dies_stops_the_others_that_hold_parts(tmp_path: Path) -> None:
    launched = launch(2, tmp_path, "failures", "unreadable", "unkept", "unreported", "death", strategy="fsdp2")
    first, last = launched.answers("failures")
    missing = [name for name in last if name.startswith("missing")]
    assert len(missing) == 6
    for name in missing:
        assert last[name] == "FileNotFoundError: image 7 is missing"
        assert first[name].startswith("RankError (GIFError): Rank 1 failed"), first[name]
    for found in (first, last):
        assert "must have the same batch" in found["other batch"]
        assert "out of step" in found["out of step"]
        assert "cannot be written" in found["no record"]
        assert "cannot be written" in found["no undo"]
        assert found["still edited"]
        assert found["same scores afterwards"]
        assert found["same weights afterwards"]
    for found in launched.answers("unreadable"):
        assert (found["epochs"], found["targets of"], found["gathers"]) == (3, 0, False)
    for found in launched.answers("unkept"):
        assert (found["epochs"], found["gathers"], found["kept"], found["told"]) == (3, False, [0], 1)
    for found in launched.answers("unreported"):
        assert found["FileNotFoundError epochs"] == found["LookupError epochs"] == 2
    told = launched.answer("death", 0)["dead"]
    assert told.startswith("RankError (GIFError)"), told
    assert "one has ended" in told
