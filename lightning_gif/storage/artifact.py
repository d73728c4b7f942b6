"""A folder with a record in plain numbers and its tensors: written whole or not at all, and read without unpickling."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ..errors import ConfigurationError
from .atomic import sync
from .digests import digest
from .schema import MOST_BYTES, parse_errors_name, read

__all__ = ["REMEDY", "read_folder", "write_folder"]


RECORD, TENSORS = "report.json", "scores.safetensors"

REMEDY = "Copy it again from where it was saved."


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
