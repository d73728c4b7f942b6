"""The checks of an audit log on its own. They need neither PyTorch nor Lightning."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .audit_log import read

__all__ = ["Check", "Verification", "absent", "listed", "place", "verify_log"]

_MARKS = {True: "ok  ", False: "FAIL", None: "note"}


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
        standing = f"of {listed(self.standing)}" if self.standing else "none"
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


def verify_log(
    record: str | os.PathLike[str],
    published: str | None = None,
    evidence: Callable[[list[dict[str, Any]], bool], list[Check]] | None = None,
) -> Verification:
    """Checks an audit log: see :func:`~lightning_gif.verify`, which also checks edit files and weights against it.

    Args:
        record: The audit log.
        published: A hash that was published earlier. It must be the hash of an entry.
        evidence: Gives further checks, from the entries and whether some cannot be read.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
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
    if evidence is not None:
        checks += evidence(entries, damaged)
    return Verification(os.fspath(record), entries, checks, log.last_hash, _standing(entries))


def _joins(entries: list[dict[str, Any]]) -> list[Check]:
    """Notes about weights that changed between entries, by something other than a recorded edit."""
    checks = []
    for one, other in itertools.pairwise(entries):
        if one["weights"]["after"] != other["weights"]["before"]:
            where = place(other["weights"]["before"], entries[: one["number"]])
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


def absent(what: str, damaged: bool, result: str) -> Check:
    """The check of something that matches no entry. If some entries cannot be read, it is only a note."""
    return Check(what, None, "matches no entry that can be read") if damaged else Check(what, False, result)


def _published(published: str, entries: list[dict[str, Any]], damaged: bool) -> Check:
    here = [entry["number"] for entry in entries if entry["hash"] == published.strip()]
    if here:
        return Check("published hash", True, f"matches entry {here[0]}: no entry up to it has been changed since")
    return absent(
        "published hash", damaged, "matches no entry: the audit log was rewritten or cut off since it was published"
    )


def place(weights: str, entries: list[dict[str, Any]]) -> str | None:
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
    if not isinstance(count, int) or not str(goal).isidentifier():
        return str(entry["event"])
    return f"{entry['event']:<7}  {_counted(count, 'example', 'examples')} (goal: {goal})"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def listed(numbers: list[int]) -> str:
    """Numbers of entries in words."""
    return f"entr{'y' if len(numbers) == 1 else 'ies'} {' and '.join(map(str, numbers))}"
