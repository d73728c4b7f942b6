"""The audit log: one line of JSON for each change of a model's weights, with the hash of the previous line."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from filelock import FileLock

from .._compat import lightning_version
from .._version import __version__
from ..errors import RecordError
from .atomic import replace_file
from .schema import parse

__all__ = ["FIRST", "Event", "Record", "append", "check_whole", "read"]


Event = Literal["unlearn", "apply", "undo", "dry_run", "metrics"]
"""``unlearn``: an edit was computed and applied. ``apply``: an earlier edit was applied. ``undo``: an edit was undone.
``dry_run``: an edit was computed and measured, not applied. ``metrics``: the weights were evaluated, not changed."""

_EVENTS = get_args(Event)

_FORMAT = "lightning-gif record 1"

FIRST = "0" * 64
"""The value that the first entry has instead of the hash of a previous entry."""

# The names of the digests that each entry must have.
_DIGESTS = {"weights": ("before", "after"), "edit": ("before", "after", "values", "report")}


class Record(NamedTuple):
    """The contents of an audit log.

    Attributes:
        entries: The entries in order, up to the first damaged one.
        damage: The line and the kind of the damage; ``None`` if the file is intact.
    """

    entries: list[dict[str, Any]]
    damage: str | None

    @property
    def last_hash(self) -> str:
        """The hash of the last entry. Anyone who knows it can detect later changes of the entries up to this one."""
        return self.entries[-1]["hash"] if self.entries else FIRST


def read(path: str | os.PathLike[str]) -> Record:
    """Reads an audit log and checks its chain of hashes.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    return _follow(Path(path).read_bytes())


def _follow(content: bytes) -> Record:
    entries: list[dict[str, Any]] = []
    previous = FIRST
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            entry = _parse(line, number, previous)
        except RecordError as error:
            return Record(entries, f"line {number}: {error}")
        entries.append(entry)
        previous = entry["hash"]
    return Record(entries, None)


def append(path: str | os.PathLike[str], event: Event, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Adds an entry to an audit log atomically: after an interruption, either the old or the new file is in place.

    Processes that write to the same file wait for each other, by means of a lock file next to it.

    Args:
        path: The audit log. It is created with its folders if it does not exist.
        event: The event.
        contents: The rest of the entry: plain values that JSON can hold, with the digests ``weights`` and ``edit``.

    Returns:
        The entry, with its number, time, versions and hash.

    Raises:
        RecordError: If the audit log is damaged or cannot be written. It is then unchanged.
    """
    import torch  # here, because reading an audit log does not need it

    target = Path(os.path.realpath(path))  # if ``path`` is a link, the file that it points to is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            old = target.read_bytes() if target.exists() else b""
            record = _follow(old)
            check_whole(record, path)
            entry = {
                "format": _FORMAT,
                "number": len(record.entries) + 1,
                "previous": record.last_hash,
                "event": event,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "versions": {
                    "lightning_gif": __version__,
                    "torch": torch.__version__,
                    "lightning": lightning_version(),
                    "python": platform.python_version(),
                },
                **_plain(contents),
            }
            entry["hash"] = _hash(entry)
            _write(target, old, old + _canonical(entry) + b"\n")
    except OSError as error:
        raise RecordError(
            f"The audit log {os.fspath(path)!r} cannot be written ({error}), so the weights are unchanged. Free some"
            " disk space or give another file, and try again."
        ) from error
    return entry


def _write(target: Path, old: bytes, new: bytes) -> None:
    try:
        replace_file(target, new)
    except BaseException:  # an interrupt or a disk error can come after the new file is in place
        if target.exists() and target.read_bytes() == new:
            replace_file(target, old)
        raise


def check_whole(record: Record, path: str | os.PathLike[str]) -> None:
    """Checks that an audit log is not damaged.

    Raises:
        RecordError: If it is damaged. No entry may be added to it then.
    """
    if record.damage is not None:
        raise RecordError(
            f"The audit log {os.fspath(path)!r} is damaged in {record.damage} Nothing was added to it. Restore it from"
            " a copy, or move it away and start another."
        )


def _parse(line: bytes, number: int, previous: str) -> dict[str, Any]:
    """The entry of a line.

    Args:
        line: The line.
        number: The number that the entry must have.
        previous: The hash of the previous entry, which the entry must have.

    Raises:
        RecordError: If the line is not this entry, or was changed after it was written.
    """
    try:
        entry = parse(line)
        if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
            raise RecordError(f"it is not an entry of an audit log of this package ({_FORMAT!r}).")
        written = _canonical(entry) + b"\n"
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"it is not an entry of an audit log, each of which is a line of JSON ({error}).") from None
    stated = entry.pop("hash", None)
    if stated != _hash(entry) or line != written:
        raise RecordError("the entry was changed after it was written: its hash is not that of its contents.")
    if entry.get("previous") != previous:
        raise RecordError(
            "it does not have the hash of the previous line: a line was changed, added, removed or moved."
        )
    # The fields are checked, because a correct hash does not show who wrote the entry.
    digests = [
        entry[part].get(name) if isinstance(entry.get(part), dict) else None
        for part, names in _DIGESTS.items()
        for name in names
    ]
    try:
        datetime.fromisoformat(entry["time"])
        timed = True
    except (KeyError, TypeError, ValueError):
        timed = False
    if (
        entry.get("number") != number
        or entry.get("event") not in _EVENTS
        or not timed
        or not all(isinstance(digest, str) for digest in digests)
    ):
        raise RecordError("the entry lacks its number, event, time or digests: it was not written by this package.")
    return {**entry, "hash": stated}


def _canonical(entry: Mapping[str, Any]) -> bytes:
    """The canonical text of an entry, from which its hash is computed."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _plain(value: Any) -> Any:
    """Converts a value for JSON. Non-finite numbers become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
