"""The verification of an audit log against edit files and weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .errors import CheckpointError, ConfigurationError, EditError
from .parameters import weights_digest
from .storage.audit_log import read
from .storage.checkpoints import read_checkpoint
from .unlearning.goals import GOALS
from .unlearning.report import UnlearnReport

__all__ = ["Check", "Verification", "verify"]

_MARKS = {True: "ok  ", False: "FAIL", None: "note"}

_SHORT = 12


class Check(NamedTuple):
    """One check of a verification.

    Attributes:
        what: What was checked.
        ok: Whether it passed; ``None`` for a note, which neither passes nor fails.
        found: The result of the check in words.
    """

    what: str
    ok: bool | None
    found: str


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`. Printed, it lists the entries and all checks.

    Attributes:
        record: The path of the audit log.
        entries: Its entries, up to the first damaged one.
        checks: All checks.
        last_hash: The hash of the last entry. If you publish it, others can detect later changes of the entries up to
            this one.
        standing: The numbers of the entries whose edits were applied and not undone.
    """

    record: str
    entries: list[dict[str, Any]]
    checks: list[Check]
    last_hash: str
    standing: list[int]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok is not False for check in self.checks)

    def __str__(self) -> str:
        standing = f"of {_listed(self.standing)}" if self.standing else "none"
        known = "" if self.checks[0].ok else ", as far as it can be read"
        return "\n".join(
            [
                f"Audit log {self.record}: {_counted(len(self.entries), 'entry', 'entries')}",
                *(f"  {entry['number']:>3}  {entry['time']}  {_summary(entry)}" for entry in self.entries),
                *(f"{_MARKS[check.ok]}  {check.what}: {check.found}" for check in self.checks),
                f"Edits that were applied and not undone{known}: {standing}.",
                f"Last hash: {self.last_hash if self.entries else 'none'}",
                "This is evidence, not a certificate. Anyone who can write the audit log can rewrite it from any entry"
                " on, or remove its last entries. If that matters, publish the last hash where it cannot be changed. An"
                " audit log shows which weights were written. It does not show that nothing of the data is left in"
                " them.",
            ]
        )


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
    log = read(record)
    entries = log.entries
    damaged = log.damage is not None or not entries
    if log.damage is not None:
        problem = f"{log.damage} The lines from there on are not checked."
        if not entries:
            problem += f" If {os.fspath(record)!r} is another file, give the one in which edits were recorded."
        chain = Check("chain", False, problem)
    elif not entries:  # an audit log is created with its first entry
        chain = Check("chain", False, "there is no entry: all of them were cut off, or this is not an audit log")
    else:
        intact = f"{_counted(len(entries), 'entry is as it was', 'entries are as they were')} written, in this order"
        chain = Check("chain", True, intact)
    checks = [chain, *_joins(entries)]
    if published is not None:
        checks.append(_published(published, entries, damaged))
    checks += [_edit(given, entries, damaged) for given in edits]
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
    return Verification(os.fspath(record), entries, checks, log.last_hash, _standing(entries))


def _joins(entries: list[dict[str, Any]]) -> list[Check]:
    """Notes about weights that changed between entries, by something other than a recorded edit."""
    checks = []
    for one, other in itertools.pairwise(entries):
        if one["weights"]["after"] != other["weights"]["before"]:
            where = _place(other["weights"]["before"], entries[: one["number"]])
            reason = (
                "the model was trained or changed otherwise in between, or is another one"
                if where is None
                else f"it starts from the weights {where}, so later changes were not kept"
            )
            what = f"entries {one['number']} and {other['number']}"
            checks.append(Check(what, None, f"the second does not start from the weights after the first: {reason}"))
    if len(entries) > 1 and not checks:
        checks.append(Check("joins", True, "each entry starts from the weights after the one before"))
    return checks


def _absent(what: str, damaged: bool, result: str) -> Check:
    """The check of something that matches no entry. If some entries cannot be read, it is only a note."""
    return Check(what, None, "matches no entry that can be read") if damaged else Check(what, False, result)


def _published(published: str, entries: list[dict[str, Any]], damaged: bool) -> Check:
    here = [entry["number"] for entry in entries if entry["hash"] == published.strip()]
    if here:
        return Check("published hash", True, f"matches entry {here[0]}: no entry up to it has been changed since")
    return _absent(
        "published hash", damaged, "matches no entry: the audit log was rewritten or cut off since it was published"
    )


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
        return Check(what, True, f"matches {_listed(whole)}")
    if same:
        numbers = _listed([entry["number"] for entry in same])
        differs = "its report differs: it was changed, or is from another call with the same result"
        return Check(what, False, f"it changes the weights as in {numbers}, but {differs}")
    return _absent(what, damaged, "matches no entry: it was changed, or was computed elsewhere")


def _weights(what: str, weights: str, entries: list[dict[str, Any]], damaged: bool) -> Check:
    where = _place(weights, entries)
    if where is None:
        return _absent(
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


def _place(weights: str, entries: list[dict[str, Any]]) -> str | None:
    """The last place in an audit log that has these weights, in words; ``None`` if there is none."""
    for when in ("after", "before"):
        for entry in reversed(entries):
            if entry["weights"][when] == weights:
                return f"{when} entry {entry['number']}"
    return None


def _standing(entries: list[dict[str, Any]]) -> list[int]:
    """The numbers of the entries whose edits were applied and not undone."""
    standing: dict[int, str] = {}
    for entry in entries:
        values = entry["edit"]["values"]
        if entry["event"] in ("unlearn", "apply"):
            standing[entry["number"]] = values
        elif entry["event"] == "undo":
            undone = [number for number, other in standing.items() if other == values]
            if undone:
                del standing[undone[-1]]
    return list(standing)


def _summary(entry: dict[str, Any]) -> str:
    """The event, the number of examples and the goal of an entry.

    The values are checked, because a correct hash does not show who wrote the entry.
    """
    request = entry.get("asked")
    if not isinstance(request, dict):
        return str(entry["event"])
    count, goal = request.get("n_forget"), request.get("goal")
    if not isinstance(count, int) or goal not in GOALS:
        return str(entry["event"])
    return f"{entry['event']:<7}  {_counted(count, 'example', 'examples')} (goal: {goal})"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _listed(numbers: list[int]) -> str:
    return f"entr{'y' if len(numbers) == 1 else 'ies'} {' and '.join(map(str, numbers))}"
