"""The command line: an edit from a checkpoint to the audit log and back, and errors in one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import Subset, WeightedRandomSampler

from lightning_gif import GIFCallback, GIFWarning, InfluenceReport, UnlearnReport, ValidationReport, verify
from lightning_gif.cli import COMMANDS, files, main, model
from lightning_gif.cli.parsing import _remedy
from lightning_gif.cli.tool import Tool as _Tool
from lightning_gif.storage import atomic
from lightning_gif.storage.audit_log import read
from lightning_gif.storage.checkpoints import read_checkpoint
from lightning_gif.unlearning import EditProblem

from .conftest import blobs, loader, make_trainer, same_weights
from .line import Blobs, Net, Tied

OPTIONS = ["--model", "tests.line.Net", "--data", "tests.line.Blobs"]
FIT = {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-gif"])


@pytest.fixture
def trained() -> dict[str, Any]:
    """A training run with its checkpoint ``a.ckpt``."""
    trainer = make_trainer(GIFCallback(), max_epochs=2)
    trainer.fit(Net(width=5), datamodule=Blobs())
    trainer.save_checkpoint("a.ckpt")
    return read_checkpoint("a.ckpt")


def unlearn(*args: str, output: str = "b.ckpt", edit: str = "edit.safetensors") -> int:
    indices = [] if any(arg.startswith("--indices") for arg in args) else ["--indices", "[3,1]"]
    return main(["unlearn", *OPTIONS, "--ckpt_path", "a.ckpt", *indices, "--output", output, "--edit", edit, *args])


def content(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def flip(path: str, position: int) -> bytes:
    """Changes one bit of a file, and returns the old contents."""
    whole = Path(path).read_bytes()
    changed = bytearray(whole)
    changed[position] ^= 1
    Path(path).write_bytes(changed)
    return whole


def test_an_edit_is_made_recorded_verified_and_undone(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: value.clone() for name, value in trained["state_dict"].items()}
    original = Path("a.ckpt").read_bytes()
    assert unlearn("--record", "deletions.jsonl", "--gif.ratio", "0.4") == 0
    told = capsys.readouterr().out
    assert "The edited checkpoint is b.ckpt, the edit edit.safetensors." in told
    assert "Create a new optimizer" in told
    assert Path("a.ckpt").read_bytes() == original

    (entry,) = read("deletions.jsonl").entries
    assert entry["event"] == "unlearn"
    assert sorted(entry["asked"]["indices"]) == [1, 3]
    assert entry["settings"]["ratio"] == 0.4
    edited = content("b.ckpt")
    assert not same_weights(before, edited["state_dict"])
    assert edited.keys() == trained.keys()
    assert edited["optimizer_states"] == trained["optimizer_states"]
    assert edited["hyper_parameters"] == trained["hyper_parameters"]
    assert edited["epoch"] == trained["epoch"]
    restored = Net.load_from_checkpoint("b.ckpt", weights_only=True)
    assert same_weights(restored.state_dict(), edited["state_dict"])

    check = ["verify", "--record", "deletions.jsonl", "--edit", "edit.safetensors", "--ckpt_path", "b.ckpt"]
    assert main(check) == 0
    assert verify("deletions.jsonl").last_hash in capsys.readouterr().out
    weight = Path("b.ckpt").read_bytes().index(edited["state_dict"]["net.0.weight"].numpy().tobytes())
    for path, position, where in (
        ("deletions.jsonl", 100, "chain: line 1"),
        ("edit.safetensors", -1, "edit edit.safetensors"),
        ("b.ckpt", weight, "checkpoint b.ckpt"),
    ):
        whole = flip(path, position)
        assert main(check) == 1
        assert f"FAIL  {where}" in capsys.readouterr().out
        Path(path).write_bytes(whole)

    undo = ["undo", "--edit", "edit.safetensors", "--ckpt_path", "b.ckpt", "--output", "c.ckpt"]
    assert main([*undo, "--record", "deletions.jsonl"]) == 0
    assert same_weights(before, content("c.ckpt")["state_dict"])
    assert [entry["event"] for entry in read("deletions.jsonl").entries] == ["unlearn", "undo"]
    assert main(["verify", "--record", "deletions.jsonl", "--ckpt_path", "c.ckpt", "--edit", "[edit.safetensors]"]) == 0
    assert main(["verify", "--record", "deletions.jsonl", "--ckpt_path", "b.ckpt"]) == 1


def test_an_edited_checkpoint_replaces_the_old_one(trained: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in trained["state_dict"].items()}
    assert unlearn(output="a.ckpt") == 0
    assert not same_weights(before, content("a.ckpt")["state_dict"])
    assert main(["undo", "--edit", "edit.safetensors", "--ckpt_path", "a.ckpt", "--output", "a.ckpt"]) == 0
    assert same_weights(before, content("a.ckpt")["state_dict"])
    assert Path("a.ckpt").stat().st_size < 2 * Path("edit.safetensors").stat().st_size + 20_000


def test_the_command_gives_the_results_of_the_trainer(trained: dict[str, Any]) -> None:
    assert unlearn("--relabel", "[0,2]", "--step", "natural", "--unseen", "false", "--gif.ratio", "0.4") == 0
    data = Blobs()
    trainer = make_trainer(GIFCallback(ratio=0.4))
    trainer.validate(Net(width=5), datamodule=data, ckpt_path="a.ckpt", verbose=False)
    report = trainer.unlearn([3, 1], relabel=torch.tensor([0, 2]), step="natural", unseen=False)
    made = UnlearnReport.load("edit.safetensors")
    assert made.edit.digest == report.edit.digest
    assert same_weights(trainer.lightning_module.state_dict(), content("b.ckpt")["state_dict"])


def test_an_interrupted_command_resumes(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert unlearn("--solves_to", "solves") == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("lightning-gif unlearn: interrupted. No file was written in part.")
    assert "--solves_to" in told
    assert not Path("b.ckpt").exists()
    assert list(Path("solves").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(EditProblem, "_solve_influence", interrupted)
        patch.setattr(EditProblem, "_solve_descent", interrupted)
        assert unlearn("--solves_to", "solves") == 0
    assert Path("b.ckpt").exists()
    assert not Path("solves").exists()


def test_ctrl_c_cannot_separate_the_log_entry_from_the_checkpoint(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = UnlearnReport.write_down

    def interrupted(self: UnlearnReport, *args: Any) -> None:
        original(self, *args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(UnlearnReport, "write_down", interrupted)
    assert unlearn("--record", "deletions.jsonl", "--solves_to", "solves") == 130
    assert re.search(r"interrupted\. .*b\.ckpt and all files that belong to it were written\.", capsys.readouterr().err)
    assert verify("deletions.jsonl", edits="edit.safetensors", checkpoint="b.ckpt").ok
    assert not Path("solves").exists()


@pytest.mark.parametrize("command", ["unlearn", "undo"])
def test_a_checkpoint_that_cannot_be_replaced_is_logged(
    command: str, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).suffix == ".ckpt":
            raise OSError(errno.EIO, "Input/output error", str(target))
        original(source, target)

    if command == "undo":
        assert unlearn("--record", "deletions.jsonl") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        undo = ["undo", "--edit", "edit.safetensors", "--ckpt_path", "b.ckpt", "--output", "c.ckpt"]
        run = {"unlearn": unlearn, "undo": lambda *args: main([*undo, *args])}[command]
        assert run("--record", "deletions.jsonl") == 2
    assert "Input/output error" in capsys.readouterr().err
    events = [entry["event"] for entry in read("deletions.jsonl").entries]
    assert events == (["unlearn", "undo"] if command == "unlearn" else ["unlearn", "undo", "apply"])
    assert verify("deletions.jsonl", checkpoint="a.ckpt" if command == "unlearn" else "b.ckpt").ok
    assert Path("edit.safetensors").exists() == (command == "undo")
    assert sorted(path.name for path in Path().glob("*.ckpt")) == ["a.ckpt", "b.ckpt"][: 1 + (command == "undo")]
    assert run("--record", "deletions.jsonl") == 0
    assert verify("deletions.jsonl", edits="edit.safetensors").ok


def test_a_replaced_checkpoint_is_kept_if_its_folder_cannot_be_synchronised(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(path: Path) -> None:
        if path.is_dir() and Path("b.ckpt").exists():
            raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync", failing)
        assert unlearn("--record", "deletions.jsonl") == 2
    assert "is written and in its place" in capsys.readouterr().err
    assert [entry["event"] for entry in read("deletions.jsonl").entries] == ["unlearn"]
    assert verify("deletions.jsonl", edits="edit.safetensors", checkpoint="b.ckpt").ok


def test_a_file_that_is_not_an_audit_log_is_named(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--record", "a.ckpt"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  chain: line 1" in told
    assert "If 'a.ckpt' is another file, give the one" in told
    assert unlearn("--record", "deletions.jsonl") == 0
    capsys.readouterr()
    Path("deletions.jsonl").write_bytes(Path("deletions.jsonl").read_bytes() + b"{}\n")
    assert main(["verify", "--record", "deletions.jsonl"]) == 1
    assert "is another file" not in capsys.readouterr().out


def test_the_check_says_what_the_commands_will_cost(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *OPTIONS, "--ckpt_path", "a.ckpt", "--n_queries", "20"]) == 0
    printed = capsys.readouterr().out
    assert "losses of single examples: training_step" in printed
    assert "per_example=True), 20 queries" in printed


def test_indices_come_from_a_file(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("indices.txt").write_text("3, 1\n17\n")
    assert unlearn("--indices_file", "indices.txt", "--record", "deletions.jsonl") == 0
    assert sorted(read("deletions.jsonl").entries[0]["asked"]["indices"]) == [1, 3, 17]
    assert unlearn("--indices", "17", edit="single", output="c.ckpt") == 0
    assert UnlearnReport.load("single").data["indices"] == [17]
    for text, told in (("3 one", "there is 'one'"), ("", "it is empty")):
        Path("indices.txt").write_text(text)
        assert unlearn("--indices_file", "indices.txt", edit="other") == 2
        assert told in capsys.readouterr().err
    assert unlearn("--indices_file", "indices.txt", "--indices", "[1]", edit="other") == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize(("split", "held_out"), [("train", False), ("test", True), ("val", True)])
def test_influence_takes_queries_from_a_split(
    trained: dict[str, Any], split: str, held_out: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["influence", *OPTIONS, "--ckpt_path", "a.ckpt", "--output", "answer", "--split", split]
    assert main([*command, "--indices", "[5,2]", "--per_example", "true", "--k", "3"]) == 0
    assert "proponents" in capsys.readouterr().out
    data = Blobs()
    data.setup("fit")
    trainer = make_trainer(GIFCallback())
    trainer.validate(Net(width=5), datamodule=data, ckpt_path="a.ckpt", verbose=False)
    dataset = data.held_out if held_out else data.train
    expected = trainer.influence(tuple(part[[5, 2]] for part in dataset.tensors), per_example=True, k=3)
    torch.testing.assert_close(InfluenceReport.load("answer").scores, expected.scores)


def test_a_store_answers_as_the_training_data_do(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    common = [*OPTIONS, "--ckpt_path", "a.ckpt"]
    assert main(["store", *common, "--output", "gradients"]) == 0
    assert "Store of the gradients of" in capsys.readouterr().out
    asked = ["influence", *common, "--indices", "[5,2]", "--per_example", "true", "--k", "3"]
    assert main([*asked, "--store", "gradients", "--output", "answer"]) == 0
    assert main([*asked, "--gif.solver", "ekfac", "--output", "full"]) == 0
    found, full = InfluenceReport.load("answer"), InfluenceReport.load("full")
    torch.testing.assert_close(found.scores, full.scores, rtol=0, atol=0.02 * float(full.scores.abs().max()))
    assert main([*asked, "--store", "nothing", "--output", "other"]) == 2
    assert "There is no store at 'nothing'" in capsys.readouterr().err


def validate(*args: str) -> int:
    length = [] if any(arg.startswith("--trainer.max") for arg in args) else ["--trainer.max_epochs", "2"]
    command = ["validate", *OPTIONS, "--ckpt_path", "a.ckpt", "--output", "answer", "--trainer.accelerator", "cpu"]
    return main([*command, "--n_subsets", "3", *length, *args])


@pytest.mark.slow
def test_scores_are_tested_by_new_models_of_the_same_configuration(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate("--indices", "[5,2,7,8]", "--share", "0.6") == 0
    assert "compared with 3 retrainings on 3 random subsets with 60 % of the data" in capsys.readouterr().out
    report, data = ValidationReport.load("answer"), Blobs()
    data.setup("fit")
    seeds = []

    def retrain(indices: list[int], seed: int) -> Net:
        seeds.append(seed)
        net, order = Net(width=5), torch.Generator().manual_seed(seed)
        make_trainer().fit(net, loader(Subset(data.train, indices), generator=order), data.val_dataloader())
        return net

    trainer = make_trainer(GIFCallback())
    trainer.validate(Net(width=5), datamodule=data, ckpt_path="a.ckpt", verbose=False)
    query = tuple(part[[5, 2, 7, 8]] for part in data.held_out.tensors)
    expected = trainer.validate_influence(query, retrain, n_subsets=3, share=0.6)
    torch.testing.assert_close(report.predicted, expected.predicted)
    torch.testing.assert_close(report.losses, expected.losses)
    assert validate("--indices", "[5,2,7,8]", "--share", "0.6", "--n_seeds", "2") == 0
    assert "6 retrainings (3 of an earlier call)" in capsys.readouterr().out
    assert ValidationReport.load("answer").noise_ceiling is not None
    assert validate("--n_queries", "4") == 2
    assert "answer-retrainings are from another call, which differs in: queries, share" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["a.ckpt", "answer", "answer-retrainings"]


def test_retraining_takes_the_data_of_a_model_without_a_datamodule(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def train_dataloader(self: Net) -> Any:
        made.append(loader(Subset(blobs(), torch.randperm(48).tolist()[:40])))  # another split each time
        return made[-1]

    monkeypatch.setattr(Net, "train_dataloader", train_dataloader, raising=False)
    command = ["validate", *OPTIONS[:2], "--ckpt_path", "a.ckpt", "--output", "answer", "--trainer.max_epochs", "1"]
    command += ["--trainer.accelerator", "cpu", "--n_subsets", "3", "--split", "train", "--indices", "[1,2]"]
    assert main(command) == 0, capsys.readouterr().err
    assert ValidationReport.load("answer").removed.shape == (3, 40)
    assert len(made) == 2  # one for the queries


def test_an_interrupted_test_of_scores_resumes(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = _Tool.retrain, []

    def interrupted(self: Any, indices: list[int], seed: int) -> Any:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, indices, seed)

    monkeypatch.setattr(_Tool, "retrain", interrupted)
    assert validate("--n_queries", "3") == 130
    assert "The same command resumes after the last model that was trained." in capsys.readouterr().err
    assert validate("--n_queries", "3") == 0
    assert len(calls) == 4
    assert "(2 of an earlier call)" in capsys.readouterr().out


def test_retraining_that_would_not_be_that_of_the_checkpoint_is_refused(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate("--trainer.max_steps", "-1") == 2
    assert "give --trainer.max_epochs" in capsys.readouterr().err
    sampler = WeightedRandomSampler([1.0] * 48, 48)
    for options, told in (
        ({"sampler": sampler, "shuffle": False}, "draws examples by WeightedRandomSampler and BatchSampler"),
        ({"batch_size": 30, "drop_last": True}, "24 training examples, fewer than the batch size 30"),
    ):
        monkeypatch.setattr(Blobs, "train_dataloader", lambda self, options=options: loader(self.train, **options))
        assert validate("--n_queries", "3") == 2
        assert told in capsys.readouterr().err


def test_loggers_and_files_of_the_run_are_left_out_of_retraining(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["GIFCallback", "ModelCheckpoint", "LearningRateMonitor", "EarlyStopping"]
    callbacks: list[dict[str, Any]] = [
        {"class_path": f"{'lightning_gif' if name == 'GIFCallback' else 'lightning.pytorch.callbacks'}.{name}"}
        for name in names
    ]
    callbacks[3]["init_args"] = {"monitor": "val_loss"}
    config = {
        "trainer": {**FIT, "default_root_dir": "runs", "logger": True, "enable_checkpointing": True},
        "model": {"class_path": "tests.line.Net"},
        "data": {"class_path": "tests.line.Blobs"},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
    }
    config["trainer"]["callbacks"] = callbacks
    seen = []

    class Tool(_Tool):
        def retrain(self, indices: list[int], seed: int) -> Any:
            found = super().retrain(indices, seed)
            seen.append((found.trainer, found.trainer.optimizers))
            return found

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        Path("fit.yaml").write_text(yaml.safe_dump(config))
        cli = LightningCLI(args=["fit", "--config", "fit.yaml"])
        cli.trainer.save_checkpoint("a.ckpt")
        patch.setattr("lightning_gif.cli.model.Tool", Tool)
        before = sorted(Path("runs").rglob("checkpoints/*"))
        command = ["validate", "--config", "fit.yaml", "--ckpt_path", "a.ckpt", "--output", "answer"]
        assert main([*command, "--n_subsets", "3", "--n_queries", "3"]) == 0, capsys.readouterr().err
    for trainer, (optimizer,) in seen:
        assert "EarlyStopping" in {type(callback).__name__ for callback in trainer.callbacks}
        assert not {"ModelCheckpoint", "LearningRateMonitor", "GIFCallback"} & {
            type(callback).__name__ for callback in trainer.callbacks
        }
        assert trainer.loggers == []
        assert isinstance(optimizer, torch.optim.Adam)
    assert len({id(trainer) for trainer, _ in seen}) == 3
    assert sorted(Path("runs").rglob("checkpoints/*")) == before


def test_the_config_file_of_a_fit_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = {**FIT, "default_root_dir": ".", "callbacks": [{"class_path": "lightning_gif.GIFCallback"}]}
    trainer["callbacks"][0]["init_args"] = {"ratio": 0.3, "record": "deletions.jsonl"}  # type: ignore[index]
    model = {"class_path": "tests.line.Net", "init_args": {"width": 4}}
    config = {"seed_everything": 1, "trainer": trainer, "model": model, "data": {"class_path": "tests.line.Blobs"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path("fit.yaml").write_text(yaml.safe_dump(config))
        cli = LightningCLI(args=["fit", "--config", "fit.yaml"])
    cli.trainer.save_checkpoint("a.ckpt")
    saved = str(Path(cli.trainer.log_dir) / "config.yaml")
    command = ["unlearn", "--config", saved, "--ckpt_path", "a.ckpt", "--indices", "[1]", "--output", "b.ckpt"]
    command += ["--edit", "edit.safetensors"]
    assert main(command) == 0, capsys.readouterr().err
    assert read("deletions.jsonl").entries[0]["settings"]["ratio"] == 0.3
    capsys.readouterr()
    assert main([*command, "--gif.ratio", "0.4"]) == 2
    assert "in one place" in capsys.readouterr().err


def test_hyperparameters_come_from_the_checkpoint_unless_they_are_given(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert unlearn("--model.folder", "elsewhere") == 0  # of width 5, where the default is 8
    for width in ("6", "8"):  # also if it is the default of the class
        assert unlearn("--model.width", width, edit="other") == 2
    Path("model.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "tests.line.Net", "init_args": {"width": 8}}})
    )
    assert unlearn("--config", "model.yaml", edit="other") == 2
    assert unlearn("--model", '{"class_path": "tests.line.Net", "init_args": {"width": 8}}', edit="other") == 2
    told = capsys.readouterr().err
    assert "does not fit Net" in told
    assert "--model.init_args" in told


@pytest.mark.parametrize("command", ["influence", "store", "validate", "unlearn", "undo", "verify"])
def test_every_command_prints_its_config(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = OPTIONS if command in ("influence", "store", "validate", "unlearn") else []
    with pytest.raises(SystemExit) as end:
        main([command, *options, "--print_config"])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "Unable to serialize" not in printed
    assert "ckpt_path" in yaml.safe_load(printed)


def test_a_printed_config_has_the_arguments_that_the_help_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["influence", *OPTIONS, "--gif.ratio", "0.03", "--trainer.max_epochs", "7", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["gif"]["ratio"] == 0.03
    assert printed["trainer"]["max_epochs"] == 7


@pytest.mark.parametrize("command", ["check", "influence", "validate", "unlearn"])
def test_help_begins_with_the_arguments_of_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            main([command, option])
        assert ended.value.code == 0
        texts[option] = capsys.readouterr().out
    for text in texts.values():
        first = text.index("Arguments of the command:")
        assert first < text.index("--ckpt_path") < text.index("The model, as for LightningCLI:")
    # Lines of known subclasses, which depend on what is imported, do not count.
    assert sum(line.startswith("  --") for line in texts["--help"].splitlines()) < 40
    for hidden in ("--trainer.max_epochs", "--gif.ratio", "--optimizer"):
        assert hidden not in texts["--help"]
        assert hidden in texts["--help_all"]


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("influence", "store", "validate", "unlearn", "undo", "verify"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        told = capsys.readouterr().out
        assert "checkpoint" in told
        assert "Arguments of the command:" in told
    assert main(["unlearn", *OPTIONS, "--indices", "many"]) == 2
    assert "--indices must be a list in brackets or a whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["forget"])
    assert end.value.code == 2
    assert "unlearn" in capsys.readouterr().err


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--ckpt_path", "none.ckpt"], "none.ckpt"),
        (["--indices", "[1,99]"], "belong to no training example: [99]"),
        (["--gif.solver", "lsmt"], "lsmr"),
        (["--step", "far"], "Known: match, natural, relinearise, search"),
        (["--output", "."], "is a folder"),
        (["--output", "x", "--edit", "x"], "different files"),
        (["--edit", "a.ckpt"], "exists already"),
        (["--record", "a.ckpt"], "damaged in line 1"),
        (["--record", "a.ckpt/record"], "cannot be written"),
        (["--indices", "[]"], "Give the training examples to forget"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert unlearn(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lightning-gif unlearn: ")
    assert told in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_checkpoint_that_cannot_be_written_leaves_no_trace(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="the size of files cannot be limited here")
    Path("b.ckpt").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))  # this is enough for the edit
    try:
        assert unlearn("--record", "deletions.jsonl") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["a.ckpt", "b.ckpt"]
    assert Path("b.ckpt").read_text() == "old"


def test_an_edit_of_another_model_is_refused(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert unlearn() == 0
    trainer = make_trainer()
    trainer.fit(Net(width=6), datamodule=Blobs())
    trainer.save_checkpoint("other.ckpt")
    undo = ["undo", "--edit", "edit.safetensors", "--output", "c.ckpt", "--ckpt_path"]
    for path, told in (("other.ckpt", "computed for another model"), ("a.ckpt", "the edit is not in the weights")):
        capsys.readouterr()
        assert main([*undo, path]) == 2
        assert told in capsys.readouterr().err
    assert not Path("c.ckpt").exists()


def test_tied_weights_stay_tied_and_duplicates_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Tied(), datamodule=Blobs())
    trainer.save_checkpoint("a.ckpt")
    before = content("a.ckpt")
    options = ["--model", "tests.line.Tied", "--gif.selector", "[net.0.weight]", "--gif.damping", "0.1"]
    undo = ["undo", "--edit", "edit.safetensors", "--output", "c.ckpt", "--ckpt_path", "b.ckpt"]
    assert unlearn(*options) == 0
    state = content("b.ckpt")["state_dict"]
    assert torch.equal(state["net.0.weight"], state["net.2.weight"])
    assert not torch.equal(state["net.0.weight"], before["state_dict"]["net.0.weight"])
    assert main(undo) == 0
    assert same_weights(content("c.ckpt")["state_dict"], before["state_dict"])

    for path in ("a.ckpt", "b.ckpt"):
        state = {name: value.clone() for name, value in content(path)["state_dict"].items()}
        torch.save({**content(path), "state_dict": state}, path)
    capsys.readouterr()
    assert unlearn(*options, edit="other") == 2
    assert "the checkpoint has tied weights twice" in capsys.readouterr().err
    assert main(undo) == 2
    assert "tied weights that were saved twice" in capsys.readouterr().err


def test_a_checkpoint_of_another_precision_is_refused(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: value.half() for name, value in content("a.ckpt")["state_dict"].items()}
    torch.save({**content("a.ckpt"), "state_dict": state}, "a.ckpt")
    assert unlearn("--record", "deletions.jsonl") == 2
    assert "float16" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["a.ckpt"]


def test_a_checkpoint_that_would_run_code_is_refused(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (os.path.abspath("ran"),)

    torch.save({**content("a.ckpt"), "hyper_parameters": Evil()}, "a.ckpt")
    assert unlearn() == 2
    assert main(["undo", "--edit", "x", "--ckpt_path", "a.ckpt", "--output", "c.ckpt"]) == 2
    assert "cannot be read as tensors and plain values" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_saved_statistics_are_used_and_damage_to_them_is_reported(trained: dict[str, Any]) -> None:
    assert unlearn("--targets", "cached") == 0
    torch.save({**content("a.ckpt"), "lightning_gif": {"neurons": 3}}, "a.ckpt")
    with pytest.warns(GIFWarning, match="state of GIFCallback is damaged or does not fit the model, and is ignored"):
        assert unlearn("--targets", "cached", edit="other") == 0


def test_snapshots_of_a_checkpoint_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(GIFCallback(snapshots=2), max_epochs=6)
    trainer.fit(Net(width=5), datamodule=Blobs())
    trainer.save_checkpoint("long.ckpt")
    asked = ["influence", *OPTIONS, "--ckpt_path", "long.ckpt", "--output", "report", "--snapshots", "true"]
    assert main([*asked, "--gif.snapshots", "2"]) == 0
    assert "averaged over 3 states of training" in capsys.readouterr().out
    assert len(InfluenceReport.load("report").settings["snapshots"]) == 2
    assert main(asked) == 0
    assert len(InfluenceReport.load("report").settings["snapshots"]) == 1
    assert main([*asked, "--gif.snapshots", "0"]) == 2
    assert "there are none. Fit with GIFCallback(snapshots" in capsys.readouterr().err


def test_a_hook_changes_what_is_loaded_but_not_what_is_written(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def harmless(self: Net, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch"] = -1

    def harmful(self: Net, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.2.bias"] = checkpoint["state_dict"]["net.2.bias"] + 1

    monkeypatch.setattr(Net, "on_load_checkpoint", harmless)
    assert unlearn() == 0
    assert content("b.ckpt")["epoch"] == trained["epoch"]
    monkeypatch.setattr(Net, "on_load_checkpoint", harmful)
    assert unlearn("--gif.selector", "[net.0.*]", edit="other") == 2
    assert "loading changes them" in capsys.readouterr().err
    assert not Path("other").exists()


@pytest.mark.parametrize(
    "order",
    [
        ["--config", "short.yaml", *OPTIONS],
        [*OPTIONS, "--config", "short.yaml"],
        ["--data", "tests.line.Blobs", "--config=short.yaml", "--model=tests.line.Net"],
        ["--config", "other.yaml", *OPTIONS],
        ["--model.init_args.width", "5", *OPTIONS],
    ],
)
def test_options_can_be_given_in_any_order(order: list[str], trained: dict[str, Any]) -> None:
    Path("short.yaml").write_text("model:\n  width: 5\n")
    Path("other.yaml").write_text("model:\n  class_path: tests.line.Tied\n")
    assert main(["influence", *order, "--ckpt_path", "a.ckpt", "--output", "answer"]) == 0
    assert InfluenceReport.load("answer").n_train == 48


def test_the_overview_has_the_first_line_of_each_command() -> None:
    assert set(COMMANDS) == {*model.COMMANDS, *files.COMMANDS}
    for name, (module, line) in COMMANDS.items():
        found = {"model": model, "files": files}[module].COMMANDS[name]
        assert (found.__doc__ or "").splitlines()[0] == line


IMPORTED = """
import sys
from lightning_gif.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(code, *sorted({name.split(".")[0] for name in sys.modules} & {"torch", "lightning", "pytorch_lightning"}))
"""


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(
    ("arguments", "code", "imported"),
    [
        (["--help"], 0, []),
        (["verify", "--help"], 0, []),
        (["verify", "--record", "deletions.jsonl"], 0, []),
        (["verify", "--recrd", "deletions.jsonl"], 2, []),
        (["verify", "--record", "missing.jsonl"], 2, []),
        (["verify", "--record", "deletions.jsonl", "--edit", "edit.safetensors"], 0, ["torch"]),
        (["undo", "--help"], 0, []),
        (
            ["undo", "--edit", "edit.safetensors", "--ckpt_path", "b.ckpt", "--output", "c.ckpt", "--record", "log"],
            0,
            ["torch"],
        ),
        (["undo", "--edit", "missing", "--ckpt_path", "b.ckpt", "--output", "c.ckpt"], 2, ["torch"]),
    ],
)
def test_commands_on_files_import_neither_lightning_nor_more_than_they_need(
    arguments: list[str], code: int, imported: list[str], trained: dict[str, Any]
) -> None:
    assert unlearn("--record", "deletions.jsonl") == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IMPORTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1].split() == [str(code), *imported], done.stderr


def test_without_jsonargparse_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["verify", "--record", "deletions.jsonl"]) == 2
    assert "pip install 'lightning-gif[cli]'" in capsys.readouterr().err


def test_the_command_runs_as_a_process(trained: dict[str, Any]) -> None:
    """Exit code and output are those of the function. The test starts one process only, since each takes seconds."""
    root = Path(__file__).parent.parent
    assert unlearn("--record", "deletions.jsonl") == 0
    assert main(["verify", "--record", "deletions.jsonl", "--ckpt_path", "b.ckpt"]) == 0
    command = [sys.executable, "-W", "ignore", "-m", "lightning_gif", "verify", "--record", "deletions.jsonl"]
    done = subprocess.run(
        [*command, "--ckpt_path", "a.ckpt"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "before entry 1" in done.stdout


def test_saved_arguments_that_do_not_fit_the_model_are_reported(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**content("a.ckpt"), "hyper_parameters": {"width": "wide"}}, "other.ckpt")
    assert main(["influence", *OPTIONS, "--ckpt_path", "other.ckpt", "--output", "report"]) == 2
    assert "width" in capsys.readouterr().err


def test_error_messages_of_older_parsers_are_understood() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--ratio")
    assert "--output must be given" in _remedy('Key "output" is required but not included in config object', parser)
    assert "Did you mean --ratio?" in _remedy("Unrecognized arguments: --ration 3", parser)
    assert "such as --indices '[3,77]'" in _remedy("unrecognized arguments: 77", parser)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["influence", *OPTIONS, "--snapshots"], ["such as --snapshots true"]),
        (["influence", *OPTIONS, "--ckpt_path", "a.ckpt"], ["--output must be given"]),
        (["undo", "--edit", "edit"], ["--ckpt_path, --output must be given"]),
        (["influence", *OPTIONS, "--gif.ration", "0.2"], ["--gif.ration 0.2", "Did you mean --gif.ratio?"]),
        (["verify", "--recrd", "x"], ["Did you mean --record?"]),
        (["influence", *OPTIONS, "--indices", "1,2"], ["Write a list in brackets: '[1,2]'."]),
        (
            ["influence", "--model", "Missing", "--ckpt_path", "a.ckpt", "--output", "a"],
            ["--model package.module.Class"],
        ),
        (["influence", "--config", "short.yaml"], ["give the classes, too: --model package.Model", "'width'"]),
        (
            ["influence", *OPTIONS, "--trainer.max_epochs", "three"],
            ["must be a whole number or null, got three"],
        ),
        (
            ["unlearn", *OPTIONS[:2], "--ckpt_path", "a.ckpt", "--indices", "3", "--output", "a", "--edit", "b"],
            ["no train_dataloader", "Give a datamodule that has one, by --data package.module.Class."],
        ),
        (
            ["influence", *OPTIONS[:2], "--ckpt_path", "a.ckpt", "--output", "a"],
            ["no test_dataloader", "--data package.module.Class, or give another --split"],
        ),
        (["influence", *OPTIONS, "--split", "tast"], ["--split must be train or val or test, got tast."]),
        (
            ["influence", *OPTIONS, "--data", "tests.line.Blabs"],
            ["'Blabs'", "--data package.module.Class"],
        ),
        (
            ["influence", *OPTIONS, "--model.init_args.width", "wide"],
            ["tests.line.Net: width", "Got value: wide"],
        ),
        (
            ["influence", *OPTIONS, "--trainer.strategy", "fast", "--ckpt_path", "a.ckpt", "--output", "a"],
            ["--trainer.", "strategy='fast'"],
        ),
        (["influence", *OPTIONS, "--ckpt_path", "short.yaml", "--output", "a"], ["'short.yaml' is not a checkpoint"]),
        (["influence", *OPTIONS, "--ckpt_path", "folder", "--output", "a"], ["'folder' is a folder", "consolidate"]),
    ],
)
def test_invalid_arguments_are_reported_with_a_remedy(
    arguments: list[str], words: list[str], trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("short.yaml").write_text("model:\n  width: 5\n")
    Path("folder").mkdir()
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert all(word in told for word in words), told
