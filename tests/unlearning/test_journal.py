"""An interrupted edit resumes and ends bit for bit the same. It does not resume from solves of another call."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_gif import BatchError, ConfigurationError, ConvergenceError, TrainingDataError, UnlearnReport
from lightning_gif.session import Session
from lightning_gif.storage.digests import digest
from lightning_gif.unlearning import TrustRegion, Tuning
from lightning_gif.unlearning.journal import Journal
from lightning_gif.unlearning.problem import EditProblem
from lightning_gif.unlearning.protocol import Trial

from ..conftest import Classifier, batch_of, blobs, fitted, loader, same_weights, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "a class": {"batch": lambda batch: batch[1] == 1},
    "labels": {"batch": [0, 3, 6, 9], "relabel": torch.tensor([1, 2, 1, 2])},
    "examples": {"batch": list(range(24)), "unseen": loader(blobs(40, seed=3))},
    "examples, relinearised": {"batch": list(range(24)), "unseen": loader(blobs(40, seed=3)), "step": "relinearise"},
    "the theory alone": {"batch": [1, 2], "step": "search"},
}


def counting(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    """A list of the solves from now on. One of them is replaced by an interrupt."""
    made: list[str] = []
    for name in ("_solve_influence", "_solve_descent", "_solve_leave_out", "_solve_match"):
        original = getattr(EditProblem, name)

        def solve(self: Any, *args: Any, original: Callable[..., Any] = original, name: str = name) -> Any:
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(name)
            return original(self, *args)

        monkeypatch.setattr(EditProblem, name, solve)
    return made


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("what", OPTIONS)
def test_an_interrupted_edit_resumes_and_ends_bit_for_bit_the_same(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, module, _ = fitted()
    folder, before = tmp_path / "solves", weights(module)
    expected = trainer.unlearn(**OPTIONS[what])
    wanted = weights(module)
    expected.undo()
    total = len(expected.solves)
    for stop in range(total):
        with monkeypatch.context() as patch:
            counting(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                trainer.unlearn(**OPTIONS[what], solves_to=folder)
        assert same_weights(weights(module), before)
        with monkeypatch.context() as patch:
            made = counting(patch)
            report = trainer.unlearn(**OPTIONS[what], solves_to=folder)
        assert len(made) == total - stop
        assert same_weights(weights(module), wanted)
        assert list(map(repr, report.trials)) == list(map(repr, expected.trials))  # NaN is not equal to itself
        assert [{**one, "seconds": 0, "peak_memory": 0} for one in report.solves] == [
            {**one, "seconds": 0, "peak_memory": 0} for one in expected.solves
        ]
        assert report.curvature == expected.curvature
        assert report.residuals == expected.residuals
        assert any(f"recalled from {str(folder)!r}: {stop} of {total}." in note for note in report.notes) == (stop > 0)
        assert not folder.exists()
        report.undo()
        assert same_weights(weights(module), before)


def test_after_a_dry_run_the_same_call_makes_the_edit_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = fitted()
    looked_at = trainer.unlearn(**OPTIONS["a class"], solves_to=tmp_path / "solves", dry_run=True)
    assert len(list((tmp_path / "solves").iterdir())) == len(looked_at.solves)
    made = counting(monkeypatch)
    edit = trainer.unlearn(**OPTIONS["a class"], solves_to=tmp_path / "solves")
    assert not made
    assert edit.edit.digest == looked_at.edit.digest
    assert not (tmp_path / "solves").exists()


def test_solves_of_another_call_are_not_resumed(tmp_path: Path) -> None:
    trainer, module, _ = fitted()
    asked = {"batch": [1, 2, 5], "step": "natural", "solves_to": tmp_path, "dry_run": True}
    trainer.unlearn(**asked)
    (kept,) = tmp_path.iterdir()
    content = kept.read_bytes()
    others: dict[str, dict[str, Any]] = {
        "the examples to be forgotten": {"batch": [1, 2, 6]},
        "new labels, goal": {"relabel": 2},
        "damping": {"damping": 0.7},
        r"tuning \(trust region\)": {"tuning": Tuning(trust_region=TrustRegion(max_halvings=3))},
        "target parameters, ratio": {"ratio": 0.25},
        "target parameters": {"targets": "cached"},
        "retained examples": {"retain": loader(blobs(30, seed=4))},
        "training data": {"dataloader": loader(blobs(48, seed=5))},
    }
    for names, other in others.items():
        with pytest.raises(ConfigurationError, match=f"of another call, which differs in: (?:.*, )?{names}[.,]"):
            trainer.unlearn(**{**asked, **other})
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1e-3
    with pytest.raises(ConfigurationError, match="differs in: weights"):
        trainer.unlearn(**asked)
    assert kept.read_bytes() == content


def test_a_strategy_with_other_decisions_resumes_up_to_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, _ = fitted()

    def two(second: float) -> Callable[[EditProblem], Trial]:
        def both(problem: EditProblem) -> Trial:
            problem.influence_direction()
            problem.descent_direction(problem.evaluate(second))
            return problem.evaluate(second, 1.0)

        return both

    trainer.unlearn([1, 2], step=two(1.0), solves_to=tmp_path, dry_run=True)
    expected = trainer.unlearn([1, 2], step=two(0.5), dry_run=True)
    made = counting(monkeypatch)
    found = trainer.unlearn([1, 2], step=two(0.5), solves_to=tmp_path, dry_run=True)
    assert made == ["_solve_descent"]
    assert found.edit.digest == expected.edit.digest
    assert trainer.unlearn([1, 2], step=two(0.5), solves_to=tmp_path, dry_run=True).edit.digest == expected.edit.digest
    assert made == ["_solve_descent"]


def test_a_change_after_a_different_change_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = fitted()
    report = trainer.unlearn(**OPTIONS["a class"], solves_to=tmp_path, dry_run=True)
    assert len(report.solves) > 1
    rewritten(tmp_path / "change-00.safetensors", lambda _, change: change * (1 + 1e-6), signed=True)
    made = counting(monkeypatch)
    again = trainer.unlearn(**OPTIONS["a class"], solves_to=tmp_path, dry_run=True)
    assert len(made) == len(again.solves) - 1


def rewritten(path: Path, change: Callable[[dict[str, Any], torch.Tensor], torch.Tensor], *, signed: bool) -> None:
    """Changes the record or the tensor of a file, with or without a new digest."""
    with safe_open(path, "pt") as file:
        metadata, tensor = dict(file.metadata()), file.get_tensor("change")
    record = json.loads(metadata["report"])
    tensor = change(record, tensor)
    metadata["report"] = json.dumps(record)
    if signed:
        metadata["digest"] = digest({"change": tensor}, record)
    save_file({"change": tensor}, path, metadata=metadata)


def with_text(path: Path, name: str, text: str) -> None:
    """Changes the metadata of a file."""
    with safe_open(path, "pt") as file:
        metadata, tensor = dict(file.metadata()), file.get_tensor("change")
    save_file({"change": tensor}, path, metadata={**metadata, name: text})


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"nothing"), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: rewritten(path, lambda _, change: change + 1, signed=False), "SHA-256"),
        (lambda path: rewritten(path, lambda _, change: change[:-1], signed=True), "shape"),
        (lambda path: rewritten(path, lambda _, change: change / 0, signed=True), "not finite"),
        (lambda path: rewritten(path, lambda r, change: (r.update(values={}), change)[1], signed=True), "damaged"),
        (lambda path: with_text(path, "report", "[1"), "damaged"),
        (
            lambda path: with_text(path, "format", "another 1"),
            "not a solve of `unlearn`.*states .*'another 1'.*Delete it",
        ),
        (lambda path: rewritten(path, lambda r, change: (r.pop("request"), change)[1], signed=True), "request"),
    ],
)
def test_a_damaged_file_is_reported(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    trainer, module, _ = fitted()
    before = weights(module)
    trainer.unlearn([1, 2, 5], solves_to=tmp_path, dry_run=True)
    path = min(tmp_path.iterdir())
    damage(path)
    with pytest.raises(ConfigurationError, match=message) as error:
        trainer.unlearn([1, 2, 5], solves_to=tmp_path)
    assert path.name in str(error.value)
    assert "Delete it" in str(error.value)
    assert same_weights(weights(module), before)
    path.unlink()
    trainer.unlearn([1, 2, 5], solves_to=tmp_path)


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"notes\.txt"):
        trainer.unlearn([1, 2], solves_to=tmp_path)
    with pytest.raises(ConfigurationError, match="must be a folder"):
        trainer.unlearn([1, 2], solves_to=tmp_path / "notes.txt")
    with pytest.raises(ConfigurationError, match="`solves_to`"):
        trainer.unlearn([1, 2], solves_to=3)
    with pytest.raises(ConfigurationError, match="`solves_to` must be the path of a folder, or None, got ''"):
        trainer.unlearn([1, 2], solves_to="")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "change-00.safetensors").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(ConfigurationError, match="change-00"):
        trainer.unlearn([1, 2], solves_to=tmp_path / "linked")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unusable_folder_is_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = fitted()

    def denied(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    def work(*args: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(Session, "forget", work)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"be created and written to, but '.*file/below' cannot: .*Not a dir"):
        trainer.unlearn([1, 2], solves_to=tmp_path / "file" / "below")
    (tmp_path / "solves").mkdir()
    refusals: list[tuple[str, Any, str, Callable[..., Any]]] = [
        ("solves", Path, "iterdir", denied),
        ("solves", os, "access", lambda *_: False),
        ("solves/below/it", os, "access", lambda *_: False),
    ]
    refusals += [(folder, Path, "mkdir", denied) for folder in ("solves/below", "solves/below/it")]
    for folder, owner, name, refused in refusals:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refused)
            with pytest.raises(ConfigurationError, match=rf"'.*{folder}' cannot: .*Permission denied.*{folder}'"):
                trainer.unlearn([1, 2], solves_to=tmp_path / folder)
    assert not list((tmp_path / "solves").iterdir())


@pytest.mark.parametrize("examples", [[1000], []])
def test_a_call_that_is_refused_creates_no_folder(examples: list[int], tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(TrainingDataError):
        trainer.unlearn(examples, solves_to=tmp_path / "some" / "solves")
    with pytest.raises(BatchError):
        trainer.unlearn([1, 2], relabel=7, solves_to=tmp_path / "some" / "solves")
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_broken_link_is_reported_before_any_work(tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"can be created and written to, but '.*link/below' cannot"):
        trainer.unlearn([1, 2], solves_to=tmp_path / "link" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_file_that_cannot_be_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = fitted()
    trainer.unlearn([1, 2, 5], solves_to=tmp_path, dry_run=True)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(OSError, match=r"Input/output error: '.*change-00\.safetensors'") as error:
            trainer.unlearn([1, 2, 5], solves_to=tmp_path)
    assert "Delete" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_an_unfinished_file_of_a_killed_process_is_ignored(tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    (tmp_path / f".change-00.safetensors.{'0' * 32}").write_bytes(b"half of")
    trainer.unlearn([1, 2], solves_to=tmp_path)
    assert not tmp_path.exists()


def test_clearing_a_missing_folder_is_not_an_error(tmp_path: Path) -> None:
    Journal.clear(tmp_path / "nowhere")
    (tmp_path / "kept").write_text("")
    Journal.clear(tmp_path)
    assert (tmp_path / "kept").exists()


def test_an_edit_that_cannot_be_recorded_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(UnlearnReport, "change", full)
        with pytest.raises(OSError, match="No space"):
            trainer.unlearn(batch_of(dataset, slice(0, 3)), solves_to=tmp_path / "solves")
    assert same_weights(weights(module), before)
    made = counting(monkeypatch)
    trainer.unlearn(batch_of(dataset, slice(0, 3)), solves_to=tmp_path / "solves")
    assert not made


def test_other_labels_order_or_loss_are_recognised_as_another_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Smoothed(Classifier):
        smooth = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smooth)

    trainer, module, dataset = fitted(Smoothed(), blobs(300))
    forget = list(range(1, 100, 7))
    asked: dict[str, Any] = {"step": "natural", "targets": "cached", "solves_to": tmp_path, "dry_run": True}
    trainer.unlearn(forget, **asked)
    with pytest.raises(ConfigurationError, match="differs in: the examples to be forgotten, in their order"):
        trainer.unlearn(forget[::-1], **asked)
    changed = dataset.tensors[1].clone()
    dataset.tensors[1][150:160] = (dataset.tensors[1][150:160] + 1) % 3  # of 300 examples, all of which are hashed
    with pytest.raises(ConfigurationError, match=r"differs in: .*training data"):
        trainer.unlearn(forget, **asked)
    dataset.tensors[1].copy_(changed)
    made = counting(monkeypatch)
    trainer.unlearn(forget, **asked)
    assert not made
    module.smooth = 0.3
    trainer.unlearn(forget, **asked)
    assert made == ["_solve_influence"]


def test_a_resumed_solve_that_did_not_converge_warns_again(tmp_path: Path) -> None:
    trainer, _, _ = fitted()
    asked: dict[str, Any] = {"rtol": 1e-9, "max_iter": 2, "solves_to": tmp_path, "dry_run": True}
    trainer.unlearn([1, 2], **asked)
    with pytest.raises(ConvergenceError):
        trainer.unlearn([1, 2], **asked, unconverged="raise")
