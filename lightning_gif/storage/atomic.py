"""Files that are replaced atomically."""

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
    """Yields the path of a temporary file to write. At the end of the block it replaces the file at ``path``.

    After an error inside the block the old file is unchanged.

    Args:
        path: The file. Its folder must exist.
        placed: Called when the new file is in place. After that, the folder is synced to disk, which can still fail.

    Raises:
        OSError: If the file cannot be written. Also if it is in place, but its folder could not be synced to disk; the
            message then says so.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
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
        unsure = f"the file is written and in its place, but may not have reached the disk ({error.strerror})"
        raise OSError(error.errno, unsure, str(path)) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file atomically, see :func:`replacing`.

    Args:
        path: The file. Its folder must exist.
        content: The whole contents.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
