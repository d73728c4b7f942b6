"""The verification of an audit log against edit files and weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from .errors import CheckpointError, ConfigurationError, EditError
from .parameters import weights_digest
from .storage.checkpoints import read_checkpoint
from .storage.verification import Check, Verification, absent, listed, place, verify_log
from .unlearning.report import UnlearnReport

__all__ = ["Check", "Verification", "verify"]

_SHORT = 12


def verify(
    record: str | os.PathLike[str],
    *,
    edits: str | os.PathLike[str] | UnlearnReport | Sequence[str | os.PathLike[str] | UnlearnReport] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    module: nn.Module | None = None,
    published: str | None = None,
) -> Verification:
    """Checks an audit log, and checks edit files and weights against it.

    Every entry must be unchanged since it was written, and have the hash of the previous entry. If the weights before
    an entry differ from those after the previous entry, a note says so: the model was trained or changed in between.
    The weights of a checkpoint or module must equal those after the last entry, bit for bit.

    Args:
        record: The file that ``GIFCallback(record=…)`` wrote.
        edits: One or more edit files or reports. The digests of each must equal those of an entry.
        checkpoint: A Lightning checkpoint. No code in it is executed.
        module: A module.
        published: A hash that was published earlier. It must be the hash of an entry.

    Returns:
        The verification. A damaged audit log is a failed check, not an error.

    Raises:
        ConfigurationError: If ``edits`` has anything other than files and reports.
        FileNotFoundError: If a file does not exist.

    Example::

        result = lightning_gif.verify("deletions.jsonl", edits=["edit.safetensors"], checkpoint="edited.ckpt")
        print(result)
        assert result.ok
    """
    if isinstance(edits, (str, os.PathLike, UnlearnReport)):
        edits = [edits]

    def evidence(entries: list[dict[str, Any]], damaged: bool) -> list[Check]:
        checks = [_edit(given, entries, damaged) for given in edits]
        if checkpoint is not None:
            what = f"checkpoint {os.fspath(checkpoint)}"
            try:
                weights = read_checkpoint(checkpoint)["state_dict"]
            except CheckpointError as error:
                checks.append(Check(what, False, str(error)))
            else:
                checks.append(_weights(what, weights_digest(weights), entries, damaged))
        if module is not None:
            checks.append(_weights("module", weights_digest(module), entries, damaged))
        return checks

    return verify_log(record, published, evidence)


def _edit(given: str | os.PathLike[str] | UnlearnReport, entries: list[dict[str, Any]], damaged: bool) -> Check:
    if isinstance(given, UnlearnReport):
        what, report = "edit", given
    elif isinstance(given, (str, os.PathLike)):
        what = f"edit {os.fspath(given)}"
        try:
            report = UnlearnReport.load(given)
        except EditError as error:
            return Check(what, False, str(error))
    else:
        raise ConfigurationError(f"`edits` must be edit files or reports of `unlearn`, got {given!r}.")
    digests = report.digests()
    same = [entry for entry in entries if entry["edit"]["values"] == digests["values"]]
    whole = [entry["number"] for entry in same if entry["edit"] == digests]
    if whole:
        return Check(what, True, f"matches {listed(whole)}")
    if same:
        numbers = listed([entry["number"] for entry in same])
        differs = "its report differs: it was changed, or is from another call with the same result"
        return Check(what, False, f"it changes the weights as in {numbers}, but {differs}")
    return absent(what, damaged, "matches no entry: it was changed, or was computed elsewhere")


def _weights(what: str, weights: str, entries: list[dict[str, Any]], damaged: bool) -> Check:
    where = place(weights, entries)
    if where is None:
        return absent(
            what,
            damaged,
            f"its weights (SHA-256 {weights[:_SHORT]}…) match no entry: they were trained or changed otherwise, or"
            " belong to another model",
        )
    if damaged:
        return Check(what, None, f"its weights are those {where}, as far as the audit log can be read")
    if entries[-1]["weights"]["after"] == weights:
        return Check(what, True, "its weights are, bit by bit, those after the last entry")
    return Check(what, False, f"its weights are those {where}, not those after the last entry")
