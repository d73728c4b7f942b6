"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["replace_file", "replacing", "sync"]


@contextmanager
def replacing(path: Path, placed: Callable[[], Any] = lambda: None) -> Iterator[Path]:
    """A file to write, which takes the place of an old one once all of it is on the disk, and not before.

    After an error within the block the old file is as it was.

    Args:
        path: Where to; its folder must be there.
        placed: Is called once it has taken that place; what is left, and may still fail, is to wait for the disk.

    Raises:
        OSError: If it cannot be written; or is, which the error says, but perhaps not for good.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary  # with the permissions of the old file, or of any new one
        if path.exists():
            shutil.copymode(path, temporary)
        sync(temporary)
        os.replace(temporary, path)
        placed()
    finally:
        temporary.unlink(missing_ok=True)
    try:
        sync(path.parent)
    except OSError as error:
        unsure = f"it is written and in its place, but may not have reached the disk ({error.strerror})"
        raise OSError(error.errno, unsure, str(path)) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file as :func:`replacing` does.

    Args:
        path: Where to; its folder must be there.
        content: All of it.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # Windows, for folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
