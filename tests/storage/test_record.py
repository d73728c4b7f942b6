"""The audit log: its contents, the detection of every change, and complete writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

import lightning_gif
from lightning_gif import (
    CheckpointError,
    ConfigurationError,
    EditError,
    GIFCallback,
    RecordError,
    UnlearnReport,
    Verification,
    verify,
)
from lightning_gif.parameters import weights_digest
from lightning_gif.storage.audit_log import FIRST, append, read
from lightning_gif.storage.checkpoints import read_checkpoint

from ..conftest import Classifier, fitted, loader, same_weights, weights

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


def recorded(path: Path, **settings: Any) -> tuple[Any, nn.Module, Any]:
    options = {"ratio": 0.5, "unconverged": "ignore", **settings}
    return fitted(callback=GIFCallback(record=str(path), **options))


def told(number: int = 0) -> dict[str, Any]:
    """The contents of an entry, with made-up digests and numbers."""
    digests = {name: hashlib.sha256(f"{name}{number}".encode()).hexdigest() for name in ("values", "report")}
    before, after = (hashlib.sha256(f"{n}".encode()).hexdigest() for n in (number, number + 1))
    change = {"before": before, "after": after}
    return {"weights": change, "edit": {**change, **digests}, "numbers": {"loss": 0.1 + number, "nothing": math.nan}}


def written(path: Path, count: int = 3) -> list[bytes]:
    for number in range(count):
        append(path, "unlearn", told(number))
    return path.read_bytes().splitlines(keepends=True)


def failed(found: Verification) -> list[str]:
    assert found.ok is not any(check.ok is False for check in found.checks)
    return [check.what for check in found.checks if check.ok is False]


# --------------------------------------------------------------------------------------------------------------------
# The contents of an entry
# --------------------------------------------------------------------------------------------------------------------


def test_an_entry_has_the_request_and_the_result(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    before = weights_digest(module)
    start = datetime.now(timezone.utc).replace(microsecond=0)
    report = trainer.unlearn([17, 4], seed=3)
    (entry,) = read(path).entries
    assert (entry["event"], entry["number"], entry["previous"]) == ("unlearn", 1, FIRST)
    assert start <= datetime.fromisoformat(entry["time"]) <= datetime.now(timezone.utc)
    asked = entry["asked"]
    assert (asked["goal"], asked["n_forget"], sorted(asked["indices"])) == ("examples", 2, [4, 17])
    assert asked["relabelled"] is None
    assert entry["weights"] == {"before": before, "after": weights_digest(module)}
    assert (entry["edit"]["before"], entry["edit"]["after"]) == (report.edit.digest_before, report.edit.digest_after)
    assert entry["settings"] == json.loads(json.dumps(report.settings))
    assert entry["settings"]["seed"] == 3
    assert entry["numbers"]["retain_loss_after"] == report.retain.after
    assert entry["numbers"]["remembered_after"] == "nan"
    assert entry["versions"]["lightning_gif"] == lightning_gif.__version__
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["versions"]["lightning"] == lightning.__version__
    assert entry["notes"] == report.notes
    assert f"recorded in {path}." in str(report)


def test_the_digest_of_examples_depends_on_contents_and_not_on_order(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, _, dataset = recorded(path)
    x, y = dataset.tensors
    for asked in ([1, 5], [5, 1], (x[[5, 1]], y[[5, 1]]), [1, 6]):
        trainer.unlearn(asked).undo()
    made = [entry["asked"] for entry in read(path).entries if entry["event"] == "unlearn"]
    assert len({entry["examples"] for entry in made[:3]}) == 1
    assert made[3]["examples"] != made[0]["examples"]
    assert [sorted(entry["indices"]) for entry in made] == [[1, 5], [1, 5], [1, 5], [1, 6]]


def test_the_digests_of_new_labels_and_of_the_training_data_differ(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, _, dataset = recorded(path)
    trainer.unlearn([1, 5], relabel=0).undo()
    trainer.unlearn([1, 5], relabel=2).undo()
    dataset.tensors[0][0] += 1.0  # spread over 48 examples, all of which are hashed
    trainer.unlearn([1, 5], relabel=2).undo()
    one, two, three = (entry for entry in read(path).entries if entry["event"] == "unlearn")
    assert one["asked"]["goal"] == "labels"
    assert one["asked"]["relabelled"] != two["asked"]["relabelled"] == three["asked"]["relabelled"]
    assert one["asked"]["examples"] == two["asked"]["examples"] == three["asked"]["examples"]
    assert one["train"] == two["train"] != three["train"]


def test_the_weights_digest_depends_on_every_parameter_and_buffer_and_equals_that_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    trainer, module, _ = fitted(Classifier(net))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert weights_digest(module) == weights_digest(read_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    seen = {weights_digest(module)}
    for name in list(module.state_dict()):
        value = module.state_dict()[name]
        value.view(-1)[0] += 1
        seen.add(weights_digest(module))
    assert len(seen) == 1 + len(module.state_dict())


def test_a_dry_run_undo_and_apply_are_different_entries(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    report = trainer.unlearn([1, 2], dry_run=True)
    report.apply()
    report.undo()
    report.apply()
    kept = read(path)
    assert [entry["event"] for entry in kept.entries] == ["dry_run", "apply", "undo", "apply"]
    assert kept.entries[0]["weights"]["before"] == kept.entries[0]["weights"]["after"]
    assert len({entry["edit"]["report"] for entry in kept.entries}) == 1
    assert len({entry["weights"]["after"] for entry in kept.entries}) == 2
    found = verify(path, edits=[report], module=module)
    assert found.ok
    assert found.standing == [4]


def test_a_call_may_use_another_audit_log_or_none(tmp_path: Path) -> None:
    trainer, _, _ = recorded(tmp_path / "one.jsonl")
    trainer.unlearn([1, 2], record=False).undo()
    assert not list(tmp_path.iterdir())
    report = trainer.unlearn([1, 2], record=tmp_path / "two.jsonl")
    report.undo()
    assert not (tmp_path / "one.jsonl").exists()
    assert len(read(tmp_path / "two.jsonl").entries) == 2


def test_a_loaded_edit_is_recorded_in_the_given_audit_log(tmp_path: Path) -> None:
    path, file = tmp_path / "deletions.jsonl", tmp_path / "edit.safetensors"
    trainer, module, _ = recorded(path)
    before = weights(module)
    trainer.unlearn([1, 2]).save(file)
    loaded = UnlearnReport.load(file, module)
    loaded.undo(record=path)
    assert same_weights(before, weights(module))
    loaded.apply()
    loaded.record = path
    loaded.undo()
    entries = read(path).entries
    assert [entry["event"] for entry in entries] == ["unlearn", "undo", "undo"]
    assert entries[0]["edit"] == entries[1]["edit"]
    assert {"indices", "examples"} <= entries[1]["asked"].keys()
    assert entries[1]["asked"] == entries[0]["asked"]


def test_an_edit_that_was_saved_without_its_data_digest_is_recorded_as_such(tmp_path: Path) -> None:
    path, file = tmp_path / "deletions.jsonl", tmp_path / "edit.safetensors"
    trainer, module, _ = fitted()
    report = trainer.unlearn([1, 2])
    report = replace(report, data={})
    report.save(file)
    UnlearnReport.load(file, module).undo(record=path)
    (entry,) = read(path).entries
    assert entry["asked"]["n_forget"] == 2
    assert entry["asked"]["indices"] is None
    assert verify(path, edits=file, module=module).ok


def test_metrics_add_an_entry_with_the_digest_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    report = trainer.unlearn([1, 2])
    report.record_metrics({"accuracy": torch.tensor(0.5), "attack": 0.25})
    entry = read(path).entries[-1]
    assert entry["event"] == "metrics"
    assert entry["metrics"] == {"accuracy": 0.5, "attack": 0.25}
    assert set(entry["weights"].values()) == {weights_digest(module)}
    with pytest.raises(RecordError, match="'accuracy' is 'good'"):
        report.record_metrics({"accuracy": "good"})  # type: ignore[dict-item]
    for bad in (0.5, {}, {1: 0.5}):
        with pytest.raises(RecordError, match=rf"numbers by name, such as .*, got {re.escape(str(bad))}"):
            report.record_metrics(bad)  # type: ignore[arg-type]
    report.record = None
    with pytest.raises(RecordError, match="has no audit log"):
        report.record_metrics({"accuracy": 0.5})
    assert len(read(path).entries) == 2
    assert verify(path, module=module).standing == [1]


# --------------------------------------------------------------------------------------------------------------------
# The chain
# --------------------------------------------------------------------------------------------------------------------


def test_a_change_of_any_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    lines = written(path)
    content = b"".join(lines)
    starts = [0, len(lines[0]), len(lines[0]) + len(lines[1])]
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        damage = read(path).damage
        line = sum(start <= position for start in starts)
        assert damage is not None
        assert damage.startswith(f"line {line}:"), (position, damage)
        assert "chain" in failed(verify(path))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [*lines, lines[2]], 4),
        (lambda lines: [lines[0], b"\n", *lines[1:]], 2),
        (lambda lines: [*lines[:2], lines[2][:-1]], 3),
        (lambda lines: [*lines[:2], lines[2][:40]], 3),
        (lambda lines: [lines[0].replace(b":", b": ", 1), *lines[1:]], 1),
        (lambda lines: [*lines, b"[" * 100_000], 4),
        (lambda lines: [*lines, b"\xff\xfe"], 4),
        (lambda lines: [*lines, b"[1]\n"], 4),
    ],
)
def test_removing_moving_or_adding_a_line_is_detected(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    path = tmp_path / "deletions.jsonl"
    path.write_bytes(b"".join(change(written(path))))
    kept = read(path)
    assert kept.damage is not None
    assert kept.damage.startswith(f"line {line}:")
    assert len(kept.entries) == line - 1
    content = path.read_bytes()
    with pytest.raises(RecordError, match=f"damaged in line {line}"):
        append(path, "undo", told())
    assert path.read_bytes() == content
    assert f"FAIL  chain: line {line}" in str(verify(path))


def test_rewriting_with_new_hashes_is_detected_by_a_published_hash_only(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    written(path)
    published = verify(path).last_hash
    append(path, "undo", told(3))
    assert verify(path, published=published).ok
    path.unlink()
    written(path, 2)
    append(path, "unlearn", {**told(2), "numbers": {"loss": 0.0}})
    assert verify(path).ok
    assert failed(verify(path, published=published)) == ["published hash"]


@pytest.mark.parametrize(
    "change",
    [
        {"event": "forged"},
        {"number": 7},
        {"time": "\x1b[2J"},
        {"time": None},
        {"weights": "none"},
        {"weights": {"before": 1, "after": 2}},
        {"edit": {}},
    ],
)
def test_an_entry_with_a_correct_hash_and_invalid_contents_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "deletions.jsonl"
    entry = json.loads(written(path, 1)[0])
    entry.update(change)
    del entry["hash"]
    entry["hash"] = hashlib.sha256(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n")
    assert "was not written by this package" in str(read(path).damage)
    assert not verify(path).ok


def test_an_empty_audit_log_verifies_no_edit(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    path.write_bytes(b"")
    assert failed(verify(path)) == ["chain"]
    assert "Last hash: none" in str(verify(path))
    assert verify(path).last_hash == FIRST
    append(path, "undo", told())  # an empty log may be started
    assert verify(path).ok
    path.write_bytes(b"")
    assert failed(verify(path, module=nn.Linear(2, 2))) == ["chain"]
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_read_is_not_reported_as_missing(tmp_path: Path) -> None:
    trainer, module, _ = fitted()
    path = tmp_path / "deletions.jsonl"
    edits = [trainer.unlearn([index], record=path) for index in (1, 2)]
    last = verify(path, edits=edits, module=module)
    assert last.ok
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second.replace(b"unlearn", b"unlearm", 1))
    found = verify(path, edits=edits, module=module, published=last.last_hash)
    assert failed(found) == ["chain"]
    known = {check.what: check for check in found.checks[1:]}
    assert known["published hash"].found == known["module"].found == "matches no entry that can be read"
    assert [check.ok for check in found.checks if check.what == "edit"] == [True, None]
    assert "not undone, as far as it can be read: of entry 1." in str(found)
    edits[1].edit.undo(module)
    (again,) = [check for check in verify(path, module=module).checks if check.what == "module"]
    assert again.ok is None
    assert "after entry 1" in again.found


# --------------------------------------------------------------------------------------------------------------------
# Complete or not at all
# --------------------------------------------------------------------------------------------------------------------


@forks
@pytest.mark.parametrize("moment", ["half written", "not on the disk", "not replaced", "replaced"])
def test_a_killed_process_leaves_whole_entries(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "deletions.jsonl"
    written(path, 2)
    child = os.fork()
    if not child:

        def die(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        write, replace = Path.write_bytes, os.replace
        if moment == "half written":
            Path.write_bytes = lambda self, data: die(write(self, data[: len(data) // 2]))  # type: ignore[method-assign]
        elif moment == "not on the disk":
            os.fsync = die
        elif moment == "not replaced":
            os.replace = die
        else:
            os.replace = lambda *args: die(replace(*args))
        append(path, "unlearn", told(2))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = read(path)
    assert kept.damage is None
    assert len(kept.entries) == (3 if moment == "replaced" else 2)
    assert append(path, "undo", told(2))["number"] == len(kept.entries) + 1
    assert read(path).damage is None


def appending(path: Path, count: int) -> int:
    """A process that adds a number of entries."""
    child = os.fork()
    if not child:
        for number in range(count):
            append(path, "unlearn", told(number))
        os._exit(0)
    return child


@forks
def test_a_process_killed_at_any_moment_leaves_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    least = 0
    for round_ in range(3):
        child = appending(path, 10_000)
        deadline = time.monotonic() + 60
        while (not path.exists() or len(read(path).entries) < least + 3) and time.monotonic() < deadline:
            time.sleep(0.003 + 0.0007 * round_)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        kept = read(path)
        assert kept.damage is None
        assert len(kept.entries) >= least + 3
        least = append(path, "undo", told())["number"]
        assert least == len(kept.entries) + 1


@forks
def test_processes_that_write_at_once_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    children = [appending(path, 8) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert [entry["number"] for entry in read(path).entries] == list(range(1, 25))


def test_an_edit_that_cannot_be_recorded_is_not_made(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="the size of files cannot be limited here")
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    first = trainer.unlearn([1, 2])
    before, content = weights(module), path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(content) + 100, limits[1])
    )  # only a part can be written, as on a full disk
    try:
        with pytest.raises(RecordError, match="cannot be written"):
            trainer.unlearn([3, 4])
        with pytest.raises(RecordError, match="cannot be written"):
            first.undo()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same_weights(before, weights(module))
    assert path.read_bytes() == content
    assert sorted(found.name for found in tmp_path.iterdir()) == [".deletions.jsonl.lock", "deletions.jsonl"]
    first.undo()
    assert verify(path, module=module).ok


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_after_the_file_was_replaced_undoes_edit_and_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    trainer.unlearn([1, 2])
    before, content = weights(module), path.read_bytes()
    replace, calls = os.replace, []

    def interrupted(*args: Any) -> None:
        replace(*args)
        calls.append(args)
        if len(calls) == 1:
            raise error("now")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((KeyboardInterrupt, RecordError)):
        trainer.unlearn([3, 4])
    assert same_weights(before, weights(module))
    assert path.read_bytes() == content


def test_a_damaged_audit_log_is_reported_before_any_solve(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    path.write_text("something else\n")
    before = weights(module)
    with pytest.raises(RecordError, match=r"line 1: it is not an entry of an audit log.*\)\. Nothing was added"):
        trainer.unlearn([1, 2])
    with pytest.raises(RecordError, match="damaged in line 1"):
        GIFCallback(record=str(path))
    with pytest.raises(ConfigurationError, match="is a folder"):
        trainer.unlearn([1, 2], record=tmp_path)
    with pytest.raises(ConfigurationError, match="must be the path of a file"):
        trainer.unlearn([1, 2], record=7)
    with pytest.raises(ConfigurationError, match="must be the path of a file, or None, got ''"):
        trainer.unlearn([1, 2], record="")
    assert same_weights(before, weights(module))
    assert path.read_text() == "something else\n"


def test_an_audit_log_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "deletions.jsonl", tmp_path / "link.jsonl"
    append(path, "unlearn", told())
    path.chmod(0o600)
    link.symlink_to(path)
    append(link, "unlearn", told(1))
    assert link.is_symlink()
    assert len(read(path).entries) == 2
    assert path.stat().st_mode & 0o777 == 0o600


# --------------------------------------------------------------------------------------------------------------------
# Verifying edits and weights
# --------------------------------------------------------------------------------------------------------------------


def test_an_audit_log_its_edits_and_a_checkpoint_are_verified_together(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    files = []
    for number, indices in enumerate(([1, 2], [3])):
        files.append(tmp_path / f"{number}.safetensors")
        trainer.unlearn(indices).save(files[-1])
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
    found = verify(path, edits=files, checkpoint=tmp_path / "1.ckpt", module=module)
    assert found.ok
    assert found.standing == [1, 2]
    for line in ("chain: 2 entries", "matches entry 1", "matches entry 2", "bit by bit", "not a certificate"):
        assert line in str(found)
    assert found.last_hash in str(found)
    early = verify(path, checkpoint=tmp_path / "0.ckpt")
    assert failed(early) == [f"checkpoint {tmp_path / '0.ckpt'}"]
    assert "those after entry 1, not those after the last" in str(early)


def test_training_between_edits_is_reported_and_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, dataset = recorded(path)
    trainer.unlearn([1, 2])
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, loader(dataset))
    trainer.unlearn([3])
    found = verify(path, module=module)
    assert found.ok
    assert "note  entries 1 and 2: the second does not start from the weights after the first" in str(found)
    assert "trained or changed otherwise" in str(found)


def test_discarded_changes_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    kept = weights(module)
    trainer.unlearn([1, 2])
    module.load_state_dict(kept)
    trainer.unlearn([3])
    assert "it starts from the weights before entry 1, so later changes were not kept" in str(verify(path))


def test_a_modified_edit_file_is_detected(tmp_path: Path) -> None:
    path, file = tmp_path / "deletions.jsonl", tmp_path / "edit.safetensors"
    trainer, _, _ = recorded(path)
    report = trainer.unlearn([1, 2])
    report.save(file)
    content = file.read_bytes()
    assert verify(path, edits=file).ok

    values = bytearray(content)
    values[-1] ^= 1  # the values come last
    number = content.replace(f'"n_retain\\": {report.n_retain}'.encode(), b'"n_retain\\": 99')
    assert number != content
    for changed in (bytes(values), number, content[:-3], b"", content[:100] + b"\0" + content[101:]):
        file.write_bytes(changed)
        found = verify(path, edits=[file])
        assert failed(found) == [f"edit {file}"], str(found)
    file.write_bytes(number)
    other = trainer.unlearn([5], record=False)
    assert "matches no entry" in str(verify(path, edits=[other]))
    with pytest.raises(FileNotFoundError):
        verify(path, edits=[tmp_path / "none"])
    with pytest.raises(ConfigurationError, match="edit files or reports"):
        verify(path, edits=[7])  # type: ignore[list-item]


def test_one_changed_bit_of_a_checkpoint_is_detected(tmp_path: Path) -> None:
    path, file = tmp_path / "deletions.jsonl", tmp_path / "a.ckpt"
    trainer, module, _ = recorded(path)
    trainer.unlearn([1, 2])
    trainer.save_checkpoint(file)
    content = bytearray(file.read_bytes())
    where = content.index(module.net[0].weight.detach().numpy().tobytes())
    content[where + 5] ^= 4
    file.write_bytes(content)
    found = verify(path, checkpoint=file)
    assert failed(found) == [f"checkpoint {file}"]
    assert "match no entry" in str(found)


def test_hostile_checkpoints_fail_the_check_and_run_no_code(tmp_path: Path) -> None:
    path, file = tmp_path / "deletions.jsonl", tmp_path / "a.ckpt"
    written(path)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    sound = {"weight": torch.zeros(3)}
    for content in (
        {"state_dict": sound, "hyper_parameters": Evil()},
        {"state_dict": {"weight": torch.zeros(1).expand(10**12)}},
        {"state_dict": {"weight": torch.zeros(3).to_sparse()}},
        {"state_dict": {3: torch.zeros(3)}},
        {"state_dict": {}},
        {"state_dict": [torch.zeros(3)]},
        [sound],
        sound,
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=r"a\.ckpt"):
            read_checkpoint(file)
        assert failed(verify(path, checkpoint=file)) == [f"checkpoint {file}"]
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": sound}, file)
    whole = file.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_checkpoint(file)


# --------------------------------------------------------------------------------------------------------------------
# Edits that are undone out of order
# --------------------------------------------------------------------------------------------------------------------


def test_an_edit_below_another_of_the_same_tensors_cannot_be_undone_and_nothing_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    first = trainer.unlearn([1, 2])
    trainer.unlearn([3])
    before = weights(module)
    with pytest.raises(EditError, match="Undo later edits first"):
        first.undo()
    assert same_weights(before, weights(module))
    assert len(read(path).entries) == 2


def test_an_edit_of_other_tensors_can_be_undone_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "deletions.jsonl"
    trainer, module, _ = recorded(path)
    start = weights(module)
    first = trainer.unlearn([1, 2], selector=["net.0.*"])
    second = trainer.unlearn([3], selector=["net.2.*"])
    after = weights(module)
    first.undo()
    for name, value in weights(module).items():
        assert torch.equal(value, (start if name.startswith("net.0") else after)[name]), name
    found = verify(path, edits=[first, second], module=module)
    assert found.ok
    assert found.standing == [2]
    assert "not undone: of entry 2." in str(found)
    second.undo()
    assert same_weights(start, weights(module))
    assert read(path).entries[-1]["weights"]["after"] == read(path).entries[0]["weights"]["before"]
