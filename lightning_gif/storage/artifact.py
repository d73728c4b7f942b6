"""Artifacts: a record of plain values and its tensors, verified by a digest, in one file or in a folder.

They are written atomically and read without unpickling.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zipfile
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
    """The contents of a file.

    Attributes:
        version: The version of the format.
        record: Plain values.
        tensors: Tensors by name.
    """

    version: int
    record: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file with one artifact.

    Attributes:
        name: The name of the format in the file, without the version: ``"lightning-gif edit"``.
        versions: All versions that can be read, in order. The last one is written by default.
        what: The kind of file with an article, for messages.
        remedy: What to do about a damaged file, as a sentence.
        error: The class of the errors about files that cannot be used.
        unversioned: Reads the metadata of old files that state no format. Returns the record, and the value that
            their digest covers in addition to the tensors.
    """

    name: str
    versions: tuple[int, ...]
    what: str
    remedy: str
    error: type[GIFError] = ConfigurationError
    unversioned: Callable[[Mapping[str, str]], tuple[Any, object]] | None = None

    def stated(self, version: int) -> str:
        """The format and version as a file states them."""
        return f"{self.name} {version}"


def write_file(
    path: Path, form: Format, record: Any, tensors: Mapping[str, Tensor], *, version: int | None = None
) -> None:
    """Writes an artifact to one safetensors file. An old file is replaced when the new one is on disk.

    Args:
        path: The file. Its folder must exist.
        form: The format.
        record: Plain values that JSON can hold.
        tensors: Tensors by name, on any device.
        version: The version of the format; by default the last one.
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
        check: Called with the record and the shapes of the tensors before any tensor is read. It raises an error if
            they are not as expected.

    Raises:
        GIFError: Of class ``form.error``, if the path is not a file, or if the file has another format, is damaged or
            edited, or fails the ``check``.
        OSError: If the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise form.error(f"{str(path)!r} is a folder or a device, not a file. {form.remedy}")
    if path.exists() and zipfile.is_zipfile(path):
        raise form.error(
            f"{str(path)!r} is a zip archive, such as a checkpoint, not {form.what}. Give {form.what}: a"
            " safetensors file that this package wrote."
        )
    with parse_errors_name(path, form.remedy, form.error):
        path.open("rb").close()  # raises the right OSError; safetensors reports any disk error as a missing file
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
    """The version, the record, and the value that the digest covers in addition to the tensors."""
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
    """Writes ``report.json`` and ``scores.safetensors`` into a new folder, and replaces an old folder by it.

    After an error the old folder is unchanged. After a power cut, either the old or the new folder is in place. The
    only exception is a power cut between two renames: then the old folder is next to it, as ``.NAME.….old``.

    Args:
        folder: The folder. Missing parent folders are created. An existing folder must be empty or hold a report.
        kind: The format and version, ``"lightning-gif thing 1"``. A folder that is replaced must have the same format.
        record: Plain values that JSON can hold.
        tensors: Tensors by name.

    Raises:
        ConfigurationError: If ``folder`` is a file or holds anything other than a report, and so is left unchanged; or
            if the record is too long to be read again.
    """
    target = Path(os.path.realpath(folder))  # if ``folder`` is a link, the folder that it points to is replaced
    _check_replaceable(target, kind)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": kind, "digest": digest(tensors, record), **record}, indent=1)
    if len(text) > MOST_BYTES // 4:  # a character has up to four bytes
        raise ConfigurationError(
            f"The report without its tensors has {len(text)} characters, but at most {MOST_BYTES // 4} can be read."
            " Use fewer queries, or keep their scores with `scores_to`."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{target.name}.{uuid.uuid4().hex}"
    new, old = target.with_name(mark), target.with_name(f"{mark}.old")
    try:
        new.mkdir()
        (new / RECORD).write_text(text, encoding="utf-8")
        (new / TENSORS).write_bytes(save(tensors))  # save_file() would create a file that other users cannot read
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
        ConfigurationError: If the folder has another format or version, if a file is damaged or was edited, or if the
            two files are of different reports.
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(folder)
    if not path.exists():
        left = sorted(path.parent.glob(f".{path.name}.*.old"))
        hint = f" An interrupted save left an earlier report at {str(left[-1])!r}." if left else ""
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
        stated, expected = record.pop("format"), record.pop("digest")
        if not isinstance(stated, str) or not isinstance(expected, str):
            raise TypeError("format and digest must be strings")
    if stated != kind:
        raise ConfigurationError(
            f"{os.fspath(folder)!r} holds {stated!r}, but {kind!r} was expected. Load it with the version of this"
            " package that saved it, or compute and save the report again."
        )
    with parse_errors_name(path / TENSORS, REMEDY):
        tensors = load((path / TENSORS).read_bytes())
        measured = digest(tensors, record)
    if measured != expected:
        raise ConfigurationError(
            f"{os.fspath(folder)!r} is damaged or has been edited, or its two files are of different reports: the"
            f" SHA-256 of their contents is {measured[:12]}…, but {RECORD} expects {expected[:12]}…. Copy both files of"
            " one report again."
        )
    return record, tensors


def _check_replaceable(target: Path, kind: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{str(target)!r} is a file, and is left alone. A report is a folder; give another.")
    names = sorted(os.listdir(target))
    if not names:
        return
    others = [name for name in names if name not in (RECORD, TENSORS)]
    try:
        stated = read(target / RECORD)["format"]
        same = isinstance(stated, str) and stated.rpartition(" ")[0] == kind.rpartition(" ")[0]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if others or not same:
        what = f"holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else "is no report"
        raise ConfigurationError(
            f"The folder {str(target)!r} {what}, and is left alone. Only a report of the same kind is replaced; give"
            " another folder."
        )
