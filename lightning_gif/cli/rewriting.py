"""Checkpoints that are rewritten with or without an edit."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..edit import Edit
from ..errors import CheckpointError, ConfigurationError
from ..parameters import weights_digest
from ..storage.atomic import replacing, sync
from ..storage.audit_log import Event
from ..storage.checkpoints import read_checkpoint
from ..storage.interrupts import uninterrupted
from ..unlearning.journal import Journal
from ..unlearning.report import UnlearnReport

__all__ = ["check_output", "rewrite", "undo"]


def undo(edit: str, ckpt_path: str, output: str, record: str | None) -> None:
    """Writes a checkpoint without an edit. The arguments are those of the command :func:`~.files.undo`."""
    target = check_output(output, "output")
    checkpoint, report = read_checkpoint(ckpt_path), UnlearnReport.load(edit)
    _check_ties(checkpoint["state_dict"], report.edit)
    rewrite(checkpoint, report, "undo", target, record)


def check_output(path: str, what: str, *, new: bool = False) -> Path:
    """The resolved path of a file to write. Creates its folder.

    Args:
        path: The path that the user gave.
        what: The name of the argument.
        new: Whether the file must not exist.

    Raises:
        ConfigurationError: If the path is a folder, or exists although it must not.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigurationError(f"--{what} must be a file, but {path!r} is a folder.")
    if new and target.exists():
        raise ConfigurationError(
            f"--{what} {path!r} exists already, and may be needed to undo an edit. Give another file."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def rewrite(
    checkpoint: dict[str, Any],
    report: UnlearnReport,
    event: Literal["unlearn", "undo"],
    output: Path,
    record: str | os.PathLike[str] | None,
    *,
    edit: Path | None = None,
    expected: str | None = None,
    solves: Path | None = None,
) -> None:
    """Applies or undoes an edit in a checkpoint, writes the checkpoint, and records it. If a part fails, none is done.

    The new checkpoint replaces ``output`` last, after everything that can fail because the disk is full.

    Args:
        checkpoint: The content of the checkpoint, which is changed in place.
        report: The report with the edit.
        event: Whether to apply or to undo the edit.
        output: The file to write.
        record: The audit log, or ``None``.
        edit: The file to save a new edit to, or ``None``.
        expected: The digest that the weights should have afterwards, if it is known.
        solves: The folder with the solved changes, which is removed at the end, or ``None``.

    Raises:
        CheckpointError: If the file cannot be written, or the weights differ from the expected ones.
    """
    weights = checkpoint["state_dict"]
    before = weights_digest(weights)
    if event == "undo":
        report.edit.undo(weights)
    else:
        report.edit.apply(weights)
    after = weights_digest(weights)
    if expected not in (None, after):
        raise CheckpointError(
            "The model does not hold the weights of the checkpoint bit for bit: they have another precision, loading"
            " changes them, or the checkpoint has tied weights twice. Nothing was written."
        )
    done = False
    try:
        with contextlib.ExitStack() as end:
            with contextlib.ExitStack() as take_back, replacing(output, take_back.pop_all) as temporary:
                try:
                    torch.save(checkpoint, temporary)
                except RuntimeError as error:  # the C++ writer raises this instead of an OSError if the disk is full
                    raise CheckpointError(f"{str(output)!r} cannot be written: {error}") from error
                sync(temporary)
                end.enter_context(uninterrupted())  # Ctrl-C waits until everything is written
                if edit is not None:
                    take_back.callback(edit.unlink, missing_ok=True)
                    report.save(edit)
                if record is not None:
                    report.write_down(event, record, before, after)
                    reverse: Event = "apply" if event == "undo" else "undo"
                    take_back.callback(report.write_down, reverse, record, after, before)
            if solves is not None:
                Journal.clear(solves)
            done = True
    except KeyboardInterrupt:
        if done:
            raise KeyboardInterrupt(f"{output} and all files that belong to it were written.") from None
        raise


def _check_ties(weights: dict[str, Any], edit: Edit) -> None:
    """Checks that a checkpoint does not have a tied weight twice, because the edit would be undone in one copy only.

    Raises:
        CheckpointError: If an edited weight equals another one. Without the model, it is unknown whether they are tied.
    """
    tensors_by_name = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in tensors_by_name.items() if name not in edit.indices}
    for name in sorted(tensors_by_name.keys() - others.keys()):
        edited = tensors_by_name[name]
        for other, value in others.items():
            if value.dtype == edited.dtype and value.data_ptr() != edited.data_ptr() and torch.equal(value, edited):
                raise CheckpointError(
                    f"{name!r} and {other!r} of the checkpoint are equal. If they are tied weights that were saved"
                    " twice, the edit would be undone in the first one only. Load the model, and use"
                    " UnlearnReport.load(edit, model).undo()."
                )
