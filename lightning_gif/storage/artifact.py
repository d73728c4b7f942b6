"""Artifacts: a record in plain values and its tensors, recognised by a digest, in one file or in a folder.

They are written whole or not at all, and read without unpickling.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from ..errors import ConfigurationError, GIFError
from .atomic import replace_file, sync
from .digests import digest
from .schema import MOST_BYTES, parse, parse_errors_name, read

__all__ = ["REMEDY", "Artifact", "Format", "read_file", "read_folder", "write_file", "write_folder"]


RECORD, TENSORS = "report.json", "scores.safetensors"

REMEDY = "Copy it again from where it was saved."


class Artifact(NamedTuple):
    """What a file holds.

    Attributes:
        version: The version of its format.
        record: Plain values.
        tensors: By name.
    """

    version: int
    record: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file with one artifact.

    Attributes:
        name: What the file states as its format, before the version: ``"lightning-gif edit"``.
        versions: All that are read, in order. The last one is written by default.
        what: What such a file is, in words with an article, for messages.
        remedy: What to do about a damaged file, as a sentence.
        error: What is raised about a file that cannot be used.
        unversioned: Reads the metadata of files that were written before they stated a format: the record, and the
            value that their digest covers besides the tensors.
    """

    name: str
    versions: tuple[int, ...]
    what: str
    remedy: str
    error: type[GIFError] = ConfigurationError
    unversioned: Callable[[Mapping[str, str]], tuple[Any, object]] | None = None

    def stated(self, version: int) -> str:
        """What a file of a version states as its format."""
        return f"{self.name} {version}"


def write_file(
    path: Path, form: Format, record: Any, tensors: Mapping[str, Tensor], *, version: int | None = None
) -> None:
    """Writes an artifact to one safetensors file, which takes the place of an old one once all of it is on the disk.

    Args:
        path: Where to; its folder must be there.
        form: The format.
        record: What JSON can hold.
        tensors: By name, on any device.
        version: The version of the format, by default the last one.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stated = form.stated(form.versions[-1] if version is None else version)
    metadata = {"format": stated, "report": json.dumps(record), "digest": digest(tensors, record)}
    replace_file(path, save(tensors, metadata=metadata))


def read_file(
    path: Path, form: Format, check: Callable[[Any, dict[str, list[int]]], None] = lambda record, shapes: None
) -> Artifact:
    """Reads what :func:`write_file` wrote.

    Args:
        path: The file.
        form: Its format.
        check: Is given the record and the shapes of the tensors before any tensor is read, and raises if they are not
            those of the file that was looked for.

    Raises:
        GIFError: Of the kind ``form.error``: if it is no file, of another format, damaged or edited, or if ``check``
            raised an error about what it holds.
        OSError: If it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise form.error(f"{str(path)!r} is a folder or a device, not a file. {form.remedy}")
    with parse_errors_name(path, form.remedy, form.error):
        path.open("rb").close()  # safetensors reports any error of the disk as a missing file
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            version, record, signed = _parsed(path, form, metadata)
            names = list(file.keys())
            check(record, {name: file.get_slice(name).get_shape() for name in names})
            tensors = {name: file.get_tensor(name) for name in names}
        if digest(tensors, signed) != metadata["digest"]:
            raise ValueError("it was edited or damaged: its contents do not have the SHA-256 that it states")
    return Artifact(version, record, tensors)


def _parsed(path: Path, form: Format, metadata: Mapping[str, str]) -> tuple[int, Any, object]:
    """The version, the record, and what the digest covers besides the tensors."""
    if "format" not in metadata and form.unversioned is not None:
        return 0, *form.unversioned(metadata)
    known = {form.stated(version): version for version in form.versions}
    stated = metadata.get("format")
    if stated not in known:
        raise form.error(
            f"{str(path)!r} is not {form.what} of this package: it states the format {stated!r}, expected"
            f" {' or '.join(map(repr, known))}. {form.remedy}"
        )
    record = parse(metadata["report"])
    return known[stated], record, record


def write_folder(
    folder: str | os.PathLike[str], kind: str, record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Writes ``report.json`` and ``scores.safetensors`` into a new folder, which then takes the place of an old one.

    After an error the old folder is as it was. A power cut finds the old one or the new one at its place, or for the
    moment between two renames neither: the old one is beside it then, as ``.NAME.….old``.

    Args:
        folder: Where to; the folders above are made. What is there must be such a folder itself, or empty.
        kind: What is written and in which version, ``"lightning-gif thing 1"``; all but the version must be that of the
            folder that is replaced.
        record: What JSON can hold.
        tensors: By name.

    Raises:
        ConfigurationError: If there is something else at ``folder``, which is left alone; or if the record is so long
            that it would not be read.
    """
    target = Path(os.path.realpath(folder))  # the folder that a link leads to is replaced, not the link
    _check_replaceable(target, kind)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": kind, "digest": digest(tensors, record), **record}, indent=1)
    if len(text) > MOST_BYTES // 4:  # of up to four bytes each
        raise ConfigurationError(
            f"The words and numbers of the report take {len(text)} characters, of which {MOST_BYTES // 4} are read."
            " Ask about fewer queries, or keep their scores with `scores_to`."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{target.name}.{uuid.uuid4().hex}"
    new, old = target.with_name(mark), target.with_name(f"{mark}.old")
    try:
        new.mkdir()
        (new / RECORD).write_text(text, encoding="utf-8")
        (new / TENSORS).write_bytes(save(tensors))  # save_file() would make a file that nobody else may read
        for path in (new / RECORD, new / TENSORS, new):
            sync(path)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_folder(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what :func:`write_folder` wrote: the record and the tensors.

    Raises:
        ConfigurationError: If it is another kind of folder or another version, if a file is damaged or was edited, or
            if the two files do not belong together.
        FileNotFoundError: If there is no such folder.
    """
    path = Path(folder)
    if not path.exists():
        left = sorted(path.parent.glob(f".{path.name}.*.old"))
        hint = f" A save that was cut off has left an earlier one beside it, at {str(left[-1])!r}." if left else ""
        raise FileNotFoundError(f"There is no report at {os.fspath(folder)!r}.{hint}")
    if not path.is_dir():
        raise ConfigurationError(f"{os.fspath(folder)!r} is a file. A report is a folder; give the folder of `save`.")
    missing = [name for name in (RECORD, TENSORS) if not (path / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"{os.fspath(folder)!r} is not a whole report: {' and '.join(missing)} is missing. Give the folder of"
            " `save`, with both of its files."
        )
    with parse_errors_name(path / RECORD, REMEDY):
        record = read(path / RECORD)
        found, expected = record.pop("format"), record.pop("digest")
        if not isinstance(found, str) or not isinstance(expected, str):
            raise TypeError("format and digest must be strings")
    if found != kind:
        raise ConfigurationError(
            f"{os.fspath(folder)!r} holds {found!r}, but {kind!r} was expected. Load it with the version of this"
            " package that saved it, or save the report anew."
        )
    with parse_errors_name(path / TENSORS, REMEDY):
        tensors = load((path / TENSORS).read_bytes())
        measured = digest(tensors, record)
    if measured != expected:
        raise ConfigurationError(
            f"{os.fspath(folder)!r} is damaged or has been edited, or its two files are of different reports: the"
            f" SHA-256 of what they hold is {measured[:12]}…, but {RECORD} expects {expected[:12]}…. Copy both files of"
            " one report again."
        )
    return record, tensors


def _check_replaceable(target: Path, kind: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{str(target)!r} is a file, and is left alone. A report is a folder; name another.")
    names = sorted(os.listdir(target))
    if not names:
        return
    others = [name for name in names if name not in (RECORD, TENSORS)]
    try:
        found = read(target / RECORD)["format"]
        same = isinstance(found, str) and found.rpartition(" ")[0] == kind.rpartition(" ")[0]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if others or not same:
        what = f"holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else "is no report"
        raise ConfigurationError(
            f"The folder {str(target)!r} {what}, and is left alone. Only a report of the same kind is replaced; name"
            " another folder."
        )
